"""Run the same small trainings from two checkouts; compare every number that they log, and the weights at their ends.

    git worktree add ../before COMMIT
    python benchmarks/same_numbers.py ../before . [--only dpo-lora] [--rename old/name=new/name] [--within 1e-12]

Or, to run the older checkout once for many comparisons (`before.json` is of this machine and holds only there):

    python benchmarks/same_numbers.py --record before.json ../before
    python benchmarks/same_numbers.py before.json .

A change of how the code is laid out must not change a number; this is the proof. The cases are SFT, DPO and GRPO; full,
LoRA and QLoRA; one process, DDP x 2 and FSDP2 x 2; and GRPO's other paths (two iterations, KL, a token budget). Both
checkouts run one after the other on this machine, in one thread, so that equal arithmetic gives equal bits. Times and
memory are left out. Ends with 1 where a number differs by more than `--within` (0: bit for bit) or a name is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = 10
LOOPS = {
    "sft": ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"],
    "dpo": ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--max_train_samples", "96"],
    "grpo": ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--num_generations", "4"],
}
KINDS = {
    "full": [],
    "lora": ["--lora_r", "4", "--lora_dropout", "0.1"],
    "qlora": ["--lora_r", "4", "--load_in_4bit", "true"],
}
TOPOLOGIES = {"one": None, "ddp2": "launch/cpu_ddp.yaml", "fsdp2": "launch/cpu_fsdp2.yaml"}
OTHERS = {  # GRPO's paths that the cases above do not take; DPO and SFT within a token budget
    "grpo-iterations": ["--num_iterations", "2"],
    "grpo-beta": ["--beta", "0.05"],
    "grpo-budget": ["--max_tokens_per_batch", "512"],
    "dpo-budget": ["--max_tokens_per_batch", "512"],
    "sft-budget": ["--max_tokens_per_batch", "512"],
    "sft-best_fit": ["--packing_strategy", "best_fit", "--max_tokens_per_batch", "512"],
}
LEFT_OUT = ("time/", "memory/", "tokens/per_second")


def cases() -> dict[str, tuple[str, str | None, list[str]]]:
    """Name -> (loop, launch file, options)."""
    found = {
        f"{loop}-{kind}-{topology}": (loop, file, LOOPS[loop] + more)
        for loop in LOOPS
        for kind, more in KINDS.items()
        for topology, file in TOPOLOGIES.items()
    }
    return found | {
        name: (name.partition("-")[0], None, LOOPS[name.partition("-")[0]] + o) for name, o in OTHERS.items()
    }


def run(
    house: Path, loop: str, file: str | None, options: list[str], folder: Path
) -> tuple[list[dict], dict[str, str]]:
    """(rows of metrics.jsonl without times, sha256 of each file of weights) of one training from `house`."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", file] if file else []
    command = [sys.executable, *launcher, f"loops/{loop}.py", "--config", f"configs/{loop}.yaml", *options]
    command += [
        "--output_dir",
        str(folder),
        "--max_steps",
        str(STEPS),
        "--logging_steps",
        "1",
        "--max_eval_samples",
        "8",
    ]
    command += ["--max_completion_length", "12", "--log_completions_steps", "0"]
    if "--load_in_4bit" in options:  # which quantises weights that are read
        command += ["--model_id", "data/quickstart/model", "--from_scratch", "false"]
    alone = {"PYTHONPATH": str(house), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=house, env=os.environ | alone, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} in {house}:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if not name.startswith(LEFT_OUT)} for row in rows]
    files = sorted((folder / "model").glob("*.safetensors"))
    return rows, {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}


def gap(before: list[dict], after: list[dict], renamed: dict[str, str]) -> tuple[float, str]:
    """The largest relative difference of two numbers, and its name; infinite where a row or a name is missing."""
    worst = (0.0, "")
    if len(before) != len(after):
        return math.inf, f"{len(before)} rows and {len(after)}"
    for old, new in zip(before, after, strict=True):
        old = {renamed.get(name, name): value for name, value in old.items()}
        if missing := old.keys() - new.keys():
            return math.inf, f"no {sorted(missing)[0]} in step {new.get('step')}"
        for name, value in old.items():
            if value != new[name] and not (value != value and new[name] != new[name]):
                worst = max(worst, (abs(value - new[name]) / max(abs(value), abs(new[name])), name))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout, or a file that --record wrote")
    parser.add_argument("after", type=Path, nargs="?")
    parser.add_argument("--record", type=Path, metavar="FILE", help="only run the first checkout, and keep its numbers")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rename", nargs="*", default=[], metavar="OLD=NEW", help="metrics that have another name now")
    parser.add_argument("--within", type=float, default=0.0, help="relative difference that is allowed")
    arguments = parser.parse_args()
    renamed = dict(pair.split("=") for pair in arguments.rename)
    before = json.loads(arguments.before.read_text()) if arguments.before.is_file() else None
    recorded: dict = {}
    wrong = 0
    print("| case | numbers | largest difference | weights |\n|---|---|---|---|", flush=True)
    for name, (loop, file, options) in cases().items():
        if arguments.only not in name:
            continue
        with tempfile.TemporaryDirectory() as parent:
            if before is None:
                old = run(arguments.before.resolve(), loop, file, options, Path(parent) / "before")
            else:
                old = before[name]
            if arguments.record:
                recorded[name] = old
                arguments.record.write_text(json.dumps(recorded))
                print(f"| {name} | {sum(map(len, old[0]))} | recorded | |", flush=True)
                continue
            new = run(arguments.after.resolve(), loop, file, options, Path(parent) / "after")
        difference, where = gap(old[0], new[0], renamed)
        same = old[1] == new[1] and bool(old[1])
        wrong += difference > arguments.within or (not same and not arguments.within)
        numbers = sum(map(len, new[0]))
        print(f"| {name} | {numbers} | {difference:.1e} {where} | {'equal' if same else 'differ'} |", flush=True)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
