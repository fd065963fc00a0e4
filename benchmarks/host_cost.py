"""What a step costs on the host beside model, sampler and reward: choosing rows, cutting, packing, padding, moving.

    OMP_NUM_THREADS=1 python benchmarks/host_cost.py [--rows 1000000] [--tokens 65536] [--processes 512]

Milliseconds per step on one core, the median of ten steps: SFT rows of about 500 tokens, DPO pairs of about 1,000, GRPO
groups of 8 completions of 256 tokens; `--tokens` are those of one process. Prints a table as Markdown.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from data.batches import cut_microbatches, cut_step, rows_of_step, share_of_rank  # noqa: E402
from data.chat import Example, Pair, Prompt  # noqa: E402
from data.pack import pack_completions, pack_examples, pack_pairs  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DISTINCT = 10_000  # token sequences; a million rows share them, so that the benchmark fits into a laptop's memory
PARTS = ("rows", "cut", "pack", "pad", "move")


def token_ids(draw: random.Random, low: int, high: int) -> array:
    return array("i", draw.choices(range(50_000), k=draw.randint(low, high)))


def sft(step: int, rows: list[Example], options, clock: Callable[[str], None]) -> None:
    size = options.tokens // 500 * options.processes
    chosen = rows_of_step(step, num_rows=len(rows), rows_per_step=size, seed=0)
    sum(rows[row].num_targets for row in chosen)
    clock("rows")
    lengths = [len(rows[row].input_ids) for row in chosen]
    cuts = cut_step(lengths, rank=0, num_processes=options.processes, max_rows=8, max_tokens=16_384)
    clock("cut")
    batches = [pack_examples([rows[chosen[i]] for i in cut]) for cut in cuts]
    clock("pack")
    [batch.to(DEVICE) for batch in batches]
    clock("move")


def dpo(step: int, rows: list[Pair], options, clock: Callable[[str], None]) -> None:
    size = options.tokens // 1000 * options.processes
    chosen = rows_of_step(step, num_rows=len(rows), rows_per_step=size, seed=0)
    clock("rows")
    lengths = [rows[row].num_tokens for row in chosen]
    cuts = cut_step(lengths, rank=0, num_processes=options.processes, max_rows=8, max_tokens=16_384)
    clock("cut")
    batches = [pack_pairs([rows[chosen[i]] for i in cut]) for cut in cuts]
    clock("pack")
    [batch.to(DEVICE) for batch in batches]
    clock("move")


def grpo(step: int, rows: list[Prompt], options, clock: Callable[[str], None]) -> None:
    groups = options.tokens // (8 * 256)
    completions = [list(range(256)) for _ in range(8 * groups)]
    logprobs = [[-0.5] * 256 for _ in completions]
    clock("")
    chosen = rows_of_step(step, num_rows=len(rows), rows_per_step=groups * options.processes, seed=0)
    lengths = [len(rows[row].prompt_ids) for row in chosen]
    own = share_of_rank(lengths, rank=0, num_processes=options.processes)
    prompts = [rows[chosen[i]].prompt_ids for i in own for _ in range(8)]
    clock("rows")
    sizes = [len(ids) for ids in completions]
    cuts = cut_microbatches(sizes, prompts=prompts, max_rows=8, max_tokens=16_384)
    clock("cut")
    batches = [pack_completions([prompts[i] for i in cut], [completions[i] for i in cut]) for cut in cuts]
    clock("pack")
    padded = [batch.to_padded([logprobs[i] for i in cut]) for batch, cut in zip(batches, cuts, strict=True)]
    clock("pad")
    [batch.to(DEVICE) for batch in batches] + [values.to(DEVICE) for values in padded]
    clock("move")


def measure(loop: Callable, rows: list, options) -> dict[str, float]:
    """Milliseconds of each part."""
    times: dict[str, list[float]] = {}
    for step in range(12):
        began = time.perf_counter()

        def clock(part: str) -> None:
            nonlocal began
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            times.setdefault(part, []).append(1000 * (now - began))
            began = now

        loop(step, rows, options, clock)
    return {part: median(values[2:]) for part, values in times.items() if part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(0)
    sequences = [token_ids(draw, 250, 750) for _ in range(DISTINCT)]
    flags = {length: array("b", [i >= length // 2 for i in range(length)]) for length in range(250, 751)}
    examples = [Example(ids, flags[len(ids)]) for ids in sequences]
    beginnings = [token_ids(draw, 100, 300) for _ in range(100)]
    replies = [token_ids(draw, 300, 500) for _ in range(100)]
    rejected = [ids[:50] + token_ids(draw, 250, 450) for ids in replies]
    pairs = [Pair(beginnings[i % 99], replies[i % 100], rejected[i % 100]) for i in range(DISTINCT)]
    prompts = [Prompt(list(ids), "", {}) for ids in beginnings]
    print(f"{options.rows:,} rows, {options.tokens:,} tokens per step and process, {options.processes} process(es)\n")
    print("| loop | " + " | ".join(f"{part} ms" for part in (*PARTS, "all")) + " |")
    print("| --- |" + " ---: |" * (len(PARTS) + 1))
    for loop, distinct in ((sft, examples), (dpo, pairs), (grpo, prompts)):
        rows = (distinct * (options.rows // len(distinct) + 1))[: options.rows]
        found = measure(loop, rows, options)
        cells = [f"{found.get(part, 0.0):.2f}" for part in PARTS] + [f"{sum(found.values()):.2f}"]
        print(f"| {loop.__name__} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
