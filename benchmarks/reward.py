"""The rewards of the comparison's GRPO runs; both sides import these very functions. Standard library alone."""

import re
import zlib


def fingerprint(*, completions: list[str], **columns: list) -> list[float]:
    """A number in [0, 1) that differs for different texts, so that no group is all equal and none can be skipped."""
    return [zlib.crc32(text.encode()) / 2**32 for text in completions]


def exact_answer(*, completions: list[str], answer: list[str], **columns: list) -> list[float]:
    """1 where a completion answers with the row's whole number, else 0: the project's `exact_answer`, for such rows.

    The answer is what stands in the last `<answer>...</answer>` after the thoughts, without any the last number there.
    """
    rewards = []
    for text, gold in zip(completions, answer, strict=True):
        text = text.rpartition("</think>")[2]
        found = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
        found = found or re.findall(r"(?:(?<![\w)\]])-)?\d+(?:\.\d+)?", text)
        rewards.append(float(bool(found) and found[-1].strip().isdigit() and int(found[-1]) == int(gold)))
    return rewards
