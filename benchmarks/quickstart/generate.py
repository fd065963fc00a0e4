"""Writes the quickstart's rows, tokenizer and model config: `python -m benchmarks.quickstart.generate [folder]`.

The task is the addition of two numbers of three digits. A demonstration either works the columns out before the
answer, or answers at once; both are right, but a small model can only rely on the first:

    prompt      347 + 685 = ?
    worked      <think>7+5=12 4+8+1=13 3+6+1=10</think>
                <answer>1032</answer>
    at once     <think></think>
                <answer>1032</answer>

Three in five SFT rows answer at once, so the SFT model does too, and is often wrong. GRPO finds out from the reward
alone that thinking pays; DPO is told so by its pairs.

One seed gives every file, byte for byte. The problems of `heldout.jsonl` and `preferences_heldout.jsonl` appear in no
training file, in neither order of their operands.
"""

from __future__ import annotations

import json
import random
import sys
from itertools import islice
from pathlib import Path

from benchmarks.quickstart.tokenizer import (
    CHAT_TEMPLATE,
    MODEL_MAX_LENGTH,
    PAD_TOKEN,
    SPECIAL_TOKENS,
    STOP_TOKEN,
    build_tokenizer,
    build_tokenizer_config,
)

SEED = 20260
SMALLEST, LARGEST = 100, 999  # operands, of equally many digits
NUM_HELDOUT = 512
NUM_SFT = 3072
SHARE_AT_ONCE = 0.6  # of the SFT rows; above one half, so that the most likely completion answers at once
NUM_PROMPTS = 3072
NUM_PREFERENCES = 1536
SHARE_REJECTED_AT_ONCE = 0.75  # of the rejected completions; the others are worked, with a slip

SLIPS = ("sum", "carry")
Problem = tuple[int, int]


def columns_of(problem: Problem) -> list[tuple[int, int]]:
    """The two digits of every column, units first."""
    return [(int(a), int(b)) for a, b in zip(reversed(str(problem[0])), reversed(str(problem[1])), strict=True)]


def work_out(problem: Problem, slip: str, random_numbers: random.Random) -> tuple[str, str]:
    """The column sums, units first, and the answer that they give, with the named slip in one column (or none).

    A slip is followed through to a wrong answer: `sum` is a column's sum off by one or two, `carry` a carry forgotten
    or invented.
    """
    columns = columns_of(problem)
    slipped = None if slip == "none" else random_numbers.randrange(1 if slip == "carry" else 0, len(columns))
    steps, digits, carry = [], "", 0
    for place, (a, b) in enumerate(columns):
        if slip == "carry" and place == slipped:
            carry = 1 - carry
        total = a + b + carry
        if slip == "sum" and place == slipped:
            total = off_by_a_little(total, random_numbers)
        steps.append(f"{a}+{b}" + ("+1" if carry else "") + f"={total}")
        carry, digit = divmod(total, 10)
        digits = str(digit) + digits
    return " ".join(steps), str(int(str(carry) + digits))


def off_by_a_little(total: int, random_numbers: random.Random) -> int:
    """The sum of a column plus or minus 1 or 2, between 0 and 19."""
    return random_numbers.choice([total + change for change in (-2, -1, 1, 2) if 0 <= total + change <= 19])


def worked(problem: Problem, slip: str, random_numbers: random.Random) -> str:
    """A completion that works the columns out, with the named slip (or none)."""
    work, answer = work_out(problem, slip, random_numbers)
    return f"<think>{work}</think>\n<answer>{answer}</answer>"


def at_once(problem: Problem, slip: str, random_numbers: random.Random) -> str:
    """The same answer without the work."""
    _, answer = work_out(problem, slip, random_numbers)
    return f"<think></think>\n<answer>{answer}</answer>"


def row(problem: Problem, **turns: str) -> dict:
    """One row: the conversational prompt, the assistant's turns by column, and the plain answer for the reward."""
    a, b = problem
    columns = {name: [{"role": "assistant", "content": text}] for name, text in turns.items()}
    return {"prompt": [{"role": "user", "content": f"{a} + {b} = ?"}], **columns, "answer": str(a + b)}


def draw_problems(count: int, random_numbers: random.Random) -> list[Problem]:
    """Distinct problems; no two are the same pair of operands, in either order."""
    problems: dict[frozenset[int], Problem] = {}
    while len(problems) < count:
        problem = (random_numbers.randint(SMALLEST, LARGEST), random_numbers.randint(SMALLEST, LARGEST))
        problems.setdefault(frozenset(problem), problem)
    return list(problems.values())


def demonstration(problem: Problem, random_numbers: random.Random) -> dict:
    """One SFT row, in either style."""
    style = at_once if random_numbers.random() < SHARE_AT_ONCE else worked
    return row(problem, completion=style(problem, "none", random_numbers))


def preference(problem: Problem, random_numbers: random.Random) -> dict:
    """One pair: right and worked against wrong in either style."""
    style = at_once if random_numbers.random() < SHARE_REJECTED_AT_ONCE else worked
    rejected = style(problem, random_numbers.choice(SLIPS), random_numbers)
    return row(problem, chosen=worked(problem, "none", random_numbers), rejected=rejected)


def build_rows() -> dict[str, list[dict]]:
    """File name -> rows. No problem stands in two files, but for the held-out ones, which have preferences too.

    Every file has random numbers of its own, so that a change to one leaves the others as they are.
    """
    problems = iter(draw_problems(NUM_HELDOUT + NUM_SFT + NUM_PROMPTS + NUM_PREFERENCES, random.Random(SEED)))
    heldout, sft, prompts, preferences = (
        list(islice(problems, count)) for count in (NUM_HELDOUT, NUM_SFT, NUM_PROMPTS, NUM_PREFERENCES)
    )
    of_sft, of_preferences, of_heldout = (random.Random(SEED + number) for number in (1, 2, 3))
    return {
        "sft_train.jsonl": [demonstration(problem, of_sft) for problem in sft],
        "train.jsonl": [row(problem) for problem in prompts],
        "preferences_train.jsonl": [preference(problem, of_preferences) for problem in preferences],
        "heldout.jsonl": [row(problem, completion=worked(problem, "none", of_heldout)) for problem in heldout],
        "preferences_heldout.jsonl": [preference(problem, of_heldout) for problem in heldout],
    }


def build_model_config(vocab_size: int) -> dict:
    """The content of `config.json`: a Qwen3 of about 1 M parameters; every width is a multiple of 64."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **{"vocab_size": vocab_size, "hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu"},
        **{"attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.05, "rms_norm_eps": 1e-06},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": MODEL_MAX_LENGTH,
        "tie_word_embeddings": True,
        **{"bos_token_id": None, "eos_token_id": SPECIAL_TOKENS.index(STOP_TOKEN)},
        **{"pad_token_id": SPECIAL_TOKENS.index(PAD_TOKEN), "dtype": "float32", "use_cache": True},
    }


def build_files() -> dict[str, str]:
    """Path below the quickstart's folder -> content of every generated file."""
    tokenizer, config = build_tokenizer(), build_model_config(len(build_tokenizer()["model"]["vocab"]))
    stops = {key: config[key] for key in ("eos_token_id", "pad_token_id")}
    files = {
        "scratch/config.json": json.dumps(config, indent=2) + "\n",
        "scratch/generation_config.json": json.dumps(stops, indent=2) + "\n",
        "scratch/tokenizer.json": json.dumps(tokenizer, indent=1, ensure_ascii=False) + "\n",
        "scratch/tokenizer_config.json": json.dumps(build_tokenizer_config(), indent=2) + "\n",
        "scratch/chat_template.jinja": CHAT_TEMPLATE,
    }
    for name, rows in build_rows().items():
        files[name] = "".join(json.dumps(one) + "\n" for one in rows)
    return files


def main(folder: Path) -> None:
    """Write every generated file below `folder`; other files there are left alone."""
    for name, content in build_files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data/quickstart"))
