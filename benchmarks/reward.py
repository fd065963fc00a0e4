"""The reward of the comparison's GRPO runs; both sides import this very function."""

import zlib


def fingerprint(*, completions: list[str], **columns: list) -> list[float]:
    """A number in [0, 1) that differs for different texts, so that no group is all equal and none can be skipped."""
    return [zlib.crc32(text.encode()) / 2**32 for text in completions]
