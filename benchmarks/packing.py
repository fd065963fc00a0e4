"""SFT with `packing_strategy: best_fit` against `step`, A B A B: one epoch of the same rows, the same token budget.

    python benchmarks/packing.py                                 # 500 GSM8K rows, the 30M shape, two cores
    python benchmarks/packing.py --count 1000 --pairs 0          # only count the forwards, on 1, 2 and 8 processes

Nothing is padded either way; what differs is how full micro-batches are, so how many there are. The steps of `step` get
as many rows as make `micro_batches` full micro-batches on average. Prints tables as Markdown. Every run is a process of
its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers import AutoTokenizer  # noqa: E402

from benchmarks.compare import SHARED, evenly, read_rows, run_child, write_model, write_rows  # noqa: E402
from benchmarks.scaling import SHAPES  # noqa: E402
from data.batches import best_fit, cut_step, rows_of_step, steps_per_epoch  # noqa: E402


def run(strategy: str, rows_per_step: int, model: Path, rows: str, options, folder: Path) -> dict[str, float]:
    """One epoch; seconds and tokens of all its steps."""
    settings = {
        "model_id": str(model),
        "lora_r": 0,
        "dataset_name": rows,
        "output_dir": str(folder / "run"),
        "packing_strategy": strategy,
        "max_tokens_per_batch": options.max_tokens,
        "train_batch_size": rows_per_step,
        "learning_rate": 1e-5,
        "mixed_precision": "no",
    }
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    command = [str(ROOT / "loops/sft.py"), "--config", str(folder / "config.yaml")]
    machine = SimpleNamespace(device="cpu", threads=options.threads)
    peak = run_child([sys.executable], command, folder, machine, {"PYTHONPATH": str(ROOT)})
    steps = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    total = {name: sum(step[name] for step in steps) for name in ("time/step", "tokens/loss", "tokens/computed")}
    return total | {"steps": len(steps), "peak": peak}


def forwards(lengths: list[int], per_step: int, processes: int, max_tokens: int) -> int:
    """Micro-batches of one epoch on each process; lengths: tokens of every row, or of every bin."""
    total = 0
    for step in range(steps_per_epoch(len(lengths), per_step)):
        rows = rows_of_step(step, num_rows=len(lengths), rows_per_step=per_step, seed=42)
        drawn = [lengths[row] for row in rows]
        total += len(cut_step(drawn, rank=0, num_processes=processes, max_rows=1, max_tokens=max_tokens))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=["best_fit", "bfd"], default="best_fit")
    parser.add_argument("--count", type=int, default=500, help="rows")
    parser.add_argument("--max_tokens", type=int, default=1024, help="of a micro-batch")
    parser.add_argument("--micro_batches", type=int, default=2, help="full ones a step")
    parser.add_argument("--pairs", type=int, default=2, help="runs of each side, in turn")
    parser.add_argument("--threads", type=int, default=2, help="CPU cores")
    parser.add_argument("--shape", choices=list(SHAPES), default="30m")
    parser.add_argument("--rows", default=SHARED / "data/gsm8k_train.jsonl", help="JSONL of question and answer")
    parser.add_argument("--tokenizer", default=SHARED / "tokenizers/smollm2-135m-instruct", help="a tokenizer's folder")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    rows = [{"prompt": f"{r['question']}\n", "completion": r["answer"]} for r in read_rows(options.rows)]
    rows = evenly(rows, options.count)
    lengths = [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in rows]  # and a stop token
    order = None if options.strategy == "bfd" else range(len(rows))
    filled = [sum(lengths[row] for row in bin) for bin in best_fit(lengths, options.max_tokens, order)]
    sizes = {options.strategy: options.micro_batches, "step": round(options.micro_batches * len(rows) / len(filled))}
    print(f"| forwards of an epoch, on each process | {options.strategy} | step | ratio |\n| --- | --- | --- | --- |")
    for processes in (1, 2, 8):
        counts = [
            forwards(units, size * processes, processes, options.max_tokens)
            for units, size in zip((filled, lengths), sizes.values(), strict=True)
        ]
        print(f"| {processes} processes | {counts[0]} | {counts[1]} | **{counts[0] / counts[1]:.3f}** |", flush=True)
    if not options.pairs:
        return
    sides: dict[str, list[dict[str, float]]] = {name: [] for name in sizes}
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary, "model")
        write_model(model, SHAPES[options.shape], tokenizer)
        file = write_rows(Path(temporary, "rows.jsonl"), rows)
        for pair in range(options.pairs):
            for name, size in sizes.items():
                result = run(name, size, model, file, options, Path(temporary, f"{name}-{pair}"))
                sides[name].append(result)
                print(f"{name}, pair {pair + 1}: {result}", flush=True)
    print(f"\n| | {options.strategy} | step | ratio | in each pair |\n| --- | --- | --- | --- | --- |")
    for label, value in (
        ("seconds per 1,000 trained tokens", lambda r: 1000 * r["time/step"] / r["tokens/loss"]),
        ("steps of the epoch", lambda r: r["steps"]),
        ("peak memory, GiB", lambda r: r["peak"] / 2**30),
    ):
        ours, theirs = ([value(r) for r in sides[name]] for name in sizes)
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        shown = " ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"| {label} | {median(ours):.4g} | {median(theirs):.4g} | **{median(ratios):.3f}** | {shown} |")


if __name__ == "__main__":
    main()
