"""Plumbline and TRL side by side, A B A B: the same model folder, rows, examples a step and cores; prints and appends
a table of ratios to `benchmarks/RESULTS.md`.

    python benchmarks/compare.py                                       # all workloads on two CPU cores, fp32
    python benchmarks/compare.py --workload gsm8k --loops sft --lora
    python benchmarks/compare.py --workload long-prompt --device cuda --shape qwen3-0.6b --prompt_tokens 1000
    python benchmarks/compare.py --scaling                             # Plumbline alone, against its shapes
    python benchmarks/compare.py --mfu --device cuda                   # Plumbline alone: MFU, head, longest sequence

Every measurement is a process of its own. A run's first step is warm-up and not counted; its seconds are the median of
the other steps. TRL is installed by this script, in an environment of its own (`benchmarks/.trl-venv`, or from local
wheels with `--wheels DIR`); nothing of the project imports it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))

from benchmarks.scaling import SHAPES, mfu_table, scaling_table  # noqa: E402

LOOPS = {"quickstart": ("grpo",), "gsm8k": ("sft", "dpo", "grpo"), "long-prompt": ("grpo",)}  # of each workload
MEASURES = {  # what is in the table: (name in a run's result, unit, factor)
    "seconds a step": ("step", "s", 1.0),
    "of these, update": ("update", "s", 1.0),
    "of these, rollout and reward": ("rollout", "s", 1.0),
    "trained tokens a second": ("tokens_per_second", "", 1.0),
    "trained tokens a step": ("tokens", "", 1.0),
    "peak memory": ("peak", "GiB", 2.0**-30),
}
LORA = {"lora_r": 16, "lora_alpha": 32}
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Job:
    """One loop on one workload. The rows file holds exactly one step's rows, so every step takes them all."""

    workload: str
    loop: str
    model: str
    rows: str
    rows_per_step: int  # sequences (SFT), pairs (DPO) or completions (GRPO)
    max_seq_length: int = 1024
    num_generations: int = 8
    max_completion_length: int = 128


def write_jobs(options, folder: Path) -> list[Job]:
    """Write the models and rows of the chosen workloads into `folder`."""
    jobs = []
    workloads = list(LOOPS) if options.workload == "all" else [options.workload]
    if "quickstart" in workloads and "grpo" in options.loops:
        jobs.append(quickstart_job(folder))
    if workloads == ["quickstart"]:
        return jobs

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    model = folder / "model"
    write_model(model, SHAPES[options.shape or "30m"], tokenizer)
    solved = read_rows(options.rows)
    completions = {"num_generations": options.generations}
    for workload in workloads[workloads[0] == "quickstart" :]:
        for loop in (loop for loop in LOOPS[workload] if loop in options.loops):
            limits: dict[str, int] = {}
            if loop == "sft":
                rows = [{"prompt": f"{r['question']}\n", "completion": r["answer"]} for r in solved]
                rows = evenly(rows, options.batch)
            elif loop == "dpo":
                rows = evenly([plain_pair(row) for row in read_rows(options.preferences)], options.batch)
            elif workload == "gsm8k":
                rows = evenly(two_shot_prompts(solved, tokenizer), options.prompts)
                limits = completions | {"max_completion_length": options.completion_tokens or 128}
            else:
                rows = [long_prompt(solved, tokenizer, options.prompt_tokens)]
                limits = completions | {"max_completion_length": options.completion_tokens or 100}
                limits["max_seq_length"] = 2 * options.prompt_tokens
            file = write_rows(folder / f"{workload}-{loop}.jsonl", rows)
            rows_per_step = len(rows) * (options.generations if loop == "grpo" else 1)
            jobs.append(Job(workload, loop, str(model), file, rows_per_step, **limits))
    return jobs


def quickstart_job(folder: Path) -> Job:
    """32 problems x 8 completions of at most 48 tokens by the embedded model, or by random weights of its shape."""
    from transformers import AutoTokenizer

    source = ROOT / "data/quickstart/model"
    if not source.exists():
        print("data/quickstart/model does not exist: quickstart runs with random weights")
        scratch = ROOT / "data/quickstart/scratch"
        source = folder / "quickstart-model"
        write_model(source, json.loads((scratch / "config.json").read_text()), AutoTokenizer.from_pretrained(scratch))
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = []
    for row in evenly(read_rows(ROOT / "data/quickstart/train.jsonl"), 32):  # as text, so both tokenise the same
        text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        rows.append({"prompt": text, "answer": row["answer"]})
    file = write_rows(folder / "quickstart-grpo.jsonl", rows)
    return Job("quickstart", "grpo", str(source), file, 256, max_completion_length=48)


def write_model(folder: Path, shape: dict[str, Any], tokenizer) -> None:
    """A Qwen3 of this shape with random weights, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    AutoModelForCausalLM.from_config(Qwen3Config(**(shape | special))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_rows(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def evenly(rows: list, count: int) -> list:
    """`count` rows from all over the list, so that their lengths are typical."""
    if len(rows) < count:
        raise SystemExit(f"{count} rows a step are asked for and only {len(rows)} are there; give more rows.")
    return rows[:: len(rows) // count][:count]


def plain_pair(row: dict) -> dict:
    """A conversational preference as plain text: chat templates end turns differently on the two sides."""
    prompt, chosen, rejected = (row[name][-1]["content"] for name in ("prompt", "chosen", "rejected"))
    return {"prompt": f"{prompt}\n", "chosen": chosen, "rejected": rejected}


def two_shot_prompts(solved: list[dict], tokenizer) -> list[dict]:
    """Two solved problems, then a question, where that makes 300 to 500 tokens."""
    prompts = [
        f"{worked(first)}{worked(second)}Question: {third['question']}\nAnswer:"
        for first, second, third in zip(solved[0::3], solved[1::3], solved[2::3], strict=False)
    ]
    return [{"prompt": text} for text in prompts if 300 <= len(tokenizer(text)["input_ids"]) <= 500]


def long_prompt(solved: list[dict], tokenizer, tokens: int) -> dict:
    """Solved problems, cut after `tokens` tokens (tokenising the text again may give a few more or less)."""
    ids = tokenizer("".join(worked(row) for row in solved), verbose=False)["input_ids"]
    return {"prompt": tokenizer.decode(ids[:tokens])}


def worked(row: dict) -> str:
    return f"Question: {row['question']}\nAnswer: {row['answer']}\n\n"


def run_plumbline(job: Job, options, folder: Path) -> dict[str, float]:
    """One run of `loops/LOOP.py`; what its metrics.jsonl says of the counted steps."""
    settings: dict[str, Any] = {
        "model_id": job.model,
        "dataset_name": job.rows,
        "output_dir": str(folder / "run"),
        "max_steps": options.steps + 1,
        "per_device_train_batch_size": job.rows_per_step,
        "max_seq_length": job.max_seq_length,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": options.gradient_checkpointing,
        "torch_dtype": torch_dtype(options),
        "mixed_precision": "bf16" if options.device == "cuda" else "no",
    } | (LORA if options.lora else {"lora_r": 0})
    if job.loop == "dpo":
        settings["precompute_ref_log_probs"] = False  # the reference is part of every step, on both sides
    if job.loop == "grpo":
        settings |= {
            "num_generations": job.num_generations,
            "max_completion_length": job.max_completion_length,
            "reward_functions": "benchmarks.reward:fingerprint",
        }
    config = folder / "config.yaml"
    config.write_text(json.dumps(settings | pairs_of(options.plumbline), indent=1))  # JSON is YAML
    command = [str(ROOT / f"loops/{job.loop}.py"), "--config", str(config)]
    peak = run_child(sys.executable, command, folder, options, {"PYTHONPATH": str(ROOT)})
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    steps = []
    for row in rows:
        update = row.get("time/update", row["time/step"])
        phases = {"update": update, "rollout": row["time/step"] - update}
        steps.append({"step": row["time/step"], "tokens": row["tokens/loss"], **phases})
    return summary(steps, peak)


def run_trl(job: Job, options, folder: Path, python: str, environment: dict[str, str]) -> dict[str, float]:
    """One run of `trl_side.py`."""
    settings = {
        "job": asdict(job),
        "output_dir": str(folder / "run"),
        "steps": options.steps + 1,
        "device": options.device,
        "learning_rate": LEARNING_RATE,
        "gradient_checkpointing": options.gradient_checkpointing,
        "torch_dtype": torch_dtype(options),
        "extra": pairs_of(options.trl),
    } | (LORA if options.lora else {"lora_r": 0, "lora_alpha": 0})
    (folder / "settings.json").write_text(json.dumps(settings))
    command = [str(HERE / "trl_side.py"), str(folder / "settings.json"), str(folder / "steps.json")]
    peak = run_child(python, command, folder, options, environment)
    return summary(json.loads((folder / "steps.json").read_text())["steps"], peak)


def torch_dtype(options) -> str:
    """Of the weights, on both sides: bf16 only where they are frozen on a GPU."""
    return "bfloat16" if options.device == "cuda" and options.lora else "float32"


def run_child(python: str, command: list[str], folder: Path, options, environment: dict[str, str]) -> int:
    """Run a script through `child.py`; returns its peak memory in bytes."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables = {**os.environ, **quiet, **environment}
    if options.device == "cpu":
        variables |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(options.threads)}
    cores = str(options.threads if options.device == "cpu" else 0)
    full = [python, str(HERE / "child.py"), str(folder / "peak.json"), cores, *command]
    done = subprocess.run(full, cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(full)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads((folder / "peak.json").read_text())["peak"]


def summary(steps: list[dict], peak: int) -> dict[str, float]:
    """Medians over the steps after the first."""
    result = {name: median(step[name] for step in steps[1:]) for name in ("step", "update", "rollout", "tokens")}
    return result | {"tokens_per_second": result["tokens"] / result["step"], "peak": peak}


def pairs_of(texts: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` texts as a mapping; a value that is JSON is read as JSON."""
    pairs = {}
    for text in texts:
        key, _, value = text.partition("=")
        try:
            pairs[key] = json.loads(value)
        except json.JSONDecodeError:
            pairs[key] = value
    return pairs


def install_trl(wheels: str | None) -> tuple[str, dict[str, str]]:
    """(interpreter, environment variables) of TRL's own environment, made on the first call."""
    if wheels:  # beside this environment's packages, but visible to the child alone
        target = HERE / ".trl-site"
        if not target.exists():
            files = [str(path) for path in sorted(Path(wheels).glob("*.whl"))]
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
            subprocess.run([*pip, "--target", str(target), *files], check=True)
        return sys.executable, {"PYTHONPATH": str(target)}
    python = HERE / ".trl-venv/bin/python"
    same = [f"{name}=={version(name)}" for name in ("torch", "transformers", "accelerate", "peft", "datasets")]
    if not python.exists() or subprocess.run([python, "-c", "import trl"], capture_output=True).returncode:
        print("installing TRL into benchmarks/.trl-venv ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(python.parents[1])], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "trl==1.16.*", *same], check=True)
    return str(python), {"PYTHONPATH": ""}


def table_of(job: Job, weights: str, runs: list[tuple[dict, dict]]) -> list[str]:
    """Rows of the table: medians over the pairs of runs, and the ratio within each pair."""
    lines = []
    for label, (name, unit, factor) in MEASURES.items():
        if name in ("update", "rollout") and job.loop != "grpo":
            continue
        ours, theirs = (median(side[name] for side in sides) * factor for sides in zip(*runs, strict=True))
        ratios = [a[name] / b[name] for a, b in runs]
        shown = " ".join(f"{ratio:.3f}" for ratio in ratios)
        cells = f"{label} | {ours:,.4g} {unit} | {theirs:,.4g} {unit} | **{median(ratios):.3f}** | {shown}"
        lines.append(f"| {job.workload} | {job.loop} {weights} | {cells} |")
    return lines


def compare(options) -> str:
    """Run everything that was asked for; returns the table."""
    lines = [
        "| workload | loop | measure | Plumbline | TRL | Plumbline / TRL | in each pair |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    python, environment = install_trl(options.wheels)
    with tempfile.TemporaryDirectory() as temporary:
        for job in write_jobs(options, Path(temporary)):
            runs = []
            for pair in range(options.pairs):
                folders = [Path(temporary, f"{job.workload}-{job.loop}-{pair}-{side}") for side in ("A", "B")]
                for folder in folders:
                    folder.mkdir()
                ours = run_plumbline(job, options, folders[0])
                theirs = run_trl(job, options, folders[1], python, environment)
                runs.append((ours, theirs))
                shown = " ".join(f"{name} {ours[name]:.4g}|{theirs[name]:.4g}" for name in ours)
                print(f"{job.workload} {job.loop} pair {pair + 1}: Plumbline|TRL {shown}", flush=True)
            lines += table_of(job, "LoRA r=16" if options.lora else "full", runs)
    return "\n".join(lines)


def heading(options) -> str:
    """When, what and where."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown commit"
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.partition(":")[2] for line in open("/proc/cpuinfo") if line.startswith("model name")]
        cpu = names[0].strip() if names else cpu
    cores = f"{options.threads} of {os.cpu_count()} cores" if options.device == "cpu" else f"{os.cpu_count()} cores"
    machine = f"{cpu}, {cores}, load {os.getloadavg()[0]:.1f} before the start"
    if options.device == "cuda":
        import torch

        machine = f"{torch.cuda.get_device_name()}; {machine}"
    torch_version = f"torch {version('torch')}, transformers {version('transformers')}"
    command = shlex.join(["python", "benchmarks/compare.py", *sys.argv[1:]])
    return f"## {time.strftime('%Y-%m-%d %H:%M')}, {commit}\n\n{machine}; {torch_version}\n\n    {command}\n"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=[*LOOPS, "all"], help="default: all, unless a table is asked for")
    parser.add_argument("--loops", default="sft,dpo,grpo", type=lambda text: text.split(","))
    parser.add_argument("--lora", action="store_true", help="LoRA r=16 on all linear layers instead of all weights")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU cores of either side")
    parser.add_argument("--pairs", type=int, default=2, help="runs of each side, in turn")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a run, after one that is not")
    parser.add_argument("--shape", choices=list(SHAPES), help="of the model (default 30m; --mfu: every Qwen3)")
    parser.add_argument("--batch", type=int, default=8, help="rows a step of SFT and DPO")
    parser.add_argument("--prompts", type=int, default=4, help="prompts a step of gsm8k GRPO")
    parser.add_argument("--generations", type=int, default=8, help="completions a prompt of gsm8k and long-prompt")
    parser.add_argument("--prompt_tokens", type=int, default=2000, help="of long-prompt")
    parser.add_argument("--completion_tokens", type=int, help="default: 128 for gsm8k, 100 for long-prompt")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="on both sides (default: on neither)")
    parser.add_argument("--rows", default=SHARED / "data/gsm8k_train.jsonl", help="JSONL of question and answer")
    parser.add_argument("--preferences", default=SHARED / "data/preferences_math.jsonl", help="JSONL of preferences")
    parser.add_argument("--tokenizer", default=SHARED / "tokenizers/smollm2-135m-instruct", help="a tokenizer's folder")
    parser.add_argument("--wheels", help="folder with TRL's wheel, for a machine without network")
    parser.add_argument("--plumbline", nargs="*", default=[], metavar="KEY=VALUE", help="more settings of our side")
    parser.add_argument("--trl", nargs="*", default=[], metavar="KEY=VALUE", help="more settings of TRL's config")
    parser.add_argument("--scaling", action="store_true", help="table: cost of our update against its shapes")
    parser.add_argument("--mfu", action="store_true", help="table: MFU, fused head, longest sequence (needs a GPU)")
    parser.add_argument("--no_record", action="store_true", help="do not append to RESULTS.md")
    options = parser.parse_args()
    if not options.workload and not (options.scaling or options.mfu):
        options.workload = "all"
    return options


def main() -> None:
    options = parse_options()
    text = heading(options)
    if options.workload:
        text += f"\n{compare(options)}\n"
    if options.scaling:
        text += f"\n{scaling_table(options)}\n"
    if options.mfu:
        text += f"\n{mfu_table(options)}\n"
    print(text)
    if not options.no_record:
        results = HERE / "RESULTS.md"
        before = results.read_text() if results.exists() else "# Results\n\nAppended by `benchmarks/compare.py`.\n"
        results.write_text(f"{before}\n{text}")


if __name__ == "__main__":
    main()
