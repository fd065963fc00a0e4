"""Plumbline and TRL side by side, A B A B: the same model folder, rows, examples a step and cores; prints and appends
a table of ratios to `benchmarks/RESULTS.md`.

    python benchmarks/compare.py                                       # all workloads on two CPU cores, fp32
    python benchmarks/compare.py --workload gsm8k --loops sft --lora
    python benchmarks/compare.py --workload gsm8k --loops grpo --engine vllm     # our side samples with vLLM
    python benchmarks/compare.py --workload quickstart --to_accuracy 0.95        # training until it has learned
    python benchmarks/compare.py --workload long-prompt --device cuda --shape qwen3-0.6b --prompt_tokens 1000
    python benchmarks/compare.py --scaling                             # Plumbline alone, against its shapes
    python benchmarks/compare.py --ranks                               # Plumbline alone, one process and two
    python benchmarks/compare.py --mfu --device cuda                   # Plumbline alone: MFU, head, longest sequence

Every measurement is a process of its own. A run's first step is warm-up and not counted; its seconds are the median of
the other steps. With `--to_accuracy` both train as configs/grpo.yaml says, with the same learning rate in every step,
and the seconds are those of all steps until greedy answers to the held-out problems are that good; measuring that is
not counted. Our side runs in the interpreter that runs this script, which must have vLLM for `--engine vllm`. TRL is
installed by this script, in an environment of its own (`benchmarks/.trl-venv`, or from local wheels with `--wheels
DIR`), and samples with its default, transformers; nothing of the project imports it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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
MEASURES = {  # what is in the table where a run has it: (name in its result, unit, factor)
    "training until the accuracy": ("to_accuracy", "s", 1.0),
    "steps until then": ("steps_to_accuracy", "", 1.0),
    "seconds a step": ("step", "s", 1.0),
    "of these, update": ("update", "s", 1.0),
    "of these, rollout and reward": ("rollout", "s", 1.0),
    "trained tokens a second": ("tokens_per_second", "", 1.0),
    "trained tokens a step": ("tokens", "", 1.0),
    "peak memory": ("peak", "GiB", 2.0**-30),
}
LORA = {"lora_r": 16, "lora_alpha": 32}
RATES = {"learning_rate": 1e-5, "lr_scheduler_type": "constant"}  # but for --to_accuracy
GRPO = {  # both sides have these names; they are the defaults of both, and what configs/grpo.yaml says
    "loss_type": "dapo",
    "scale_rewards": "group",
    "epsilon": 0.2,
    "beta": 0.0,
    "num_iterations": 1,
    "temperature": 1.0,
}
ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm")  # of both sides too
RANKS = {  # topology: launcher's file
    "one process": None,
    "DDP x 2": "launch/cpu_ddp.yaml",
    "FSDP2 x 2": "launch/cpu_fsdp2.yaml",
}


@dataclass(frozen=True)
class Job:
    """One loop on one workload. Without `eval_rows` the rows are exactly one step's, so every step takes them all."""

    workload: str
    loop: str
    model: str
    rows: str
    rows_per_step: int  # sequences (SFT), pairs (DPO) or completions (GRPO)
    steps: int
    seed: int = 42
    eval_rows: str = ""
    max_seq_length: int = 1024
    num_generations: int = 8
    max_completion_length: int = 128


def write_jobs(options, folder: Path) -> list[Job]:
    """Write the models and rows of the chosen workloads into `folder`."""
    jobs = []
    workloads = list(LOOPS) if options.workload == "all" else [options.workload]
    if "quickstart" in workloads and "grpo" in options.loops:
        jobs.append(quickstart_job(options, folder))
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
            jobs.append(Job(workload, loop, str(model), file, rows_per_step, options.steps + 1, **limits))
    return jobs


def quickstart_job(options, folder: Path) -> Job:
    """32 problems x 8 completions of at most 48 tokens by the embedded model, or by random weights of its shape."""
    from transformers import AutoTokenizer

    source = ROOT / "data/quickstart/model"
    if not source.exists():
        print("data/quickstart/model does not exist: quickstart runs with random weights")
        scratch = ROOT / "data/quickstart/scratch"
        source = folder / "quickstart-model"
        write_model(source, json.loads((scratch / "config.json").read_text()), AutoTokenizer.from_pretrained(scratch))
    tokenizer = AutoTokenizer.from_pretrained(source)

    def as_text(name: str, rows: list[dict]) -> str:  # so that both sides tokenise the same
        return write_rows(
            folder / name, [{"prompt": chat_text(row, tokenizer), "answer": row["answer"]} for row in rows]
        )

    rows = read_rows(ROOT / "data/quickstart/train.jsonl")
    if not options.to_accuracy:
        file = as_text("quickstart-grpo.jsonl", evenly(rows, 32))
        return Job("quickstart", "grpo", str(source), file, 256, options.steps + 1, max_completion_length=48)
    heldout = as_text("quickstart-heldout.jsonl", read_rows(ROOT / "data/quickstart/heldout.jsonl"))
    file = as_text("quickstart-train.jsonl", rows)
    steps = options.steps or recipe()["run"]["max_steps"]
    return Job("quickstart", "grpo", str(source), file, 256, steps, eval_rows=heldout, max_completion_length=48)


def chat_text(row: dict, tokenizer) -> str:
    """A conversational prompt as the text that the model reads."""
    return tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)


def recipe() -> dict[str, Any]:
    """configs/grpo.yaml by section."""
    import yaml

    return yaml.safe_load((ROOT / "configs/grpo.yaml").read_text())


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


def run_plumbline(job: Job, options, folder: Path, launcher: Sequence[str] = ()) -> dict[str, float]:
    """One run of `loops/LOOP.py`; what its metrics.jsonl says of the counted steps."""
    settings: dict[str, Any] = {
        "model_id": job.model,
        "dataset_name": job.rows,
        "output_dir": str(folder / "run"),
        "max_steps": job.steps,
        "seed": job.seed,
        "train_batch_size": job.rows_per_step,
        "per_device_train_batch_size": job.rows_per_step,
        "max_seq_length": job.max_seq_length,
        "gradient_checkpointing": options.gradient_checkpointing,
        "torch_dtype": torch_dtype(options),
        "mixed_precision": "bf16" if options.device == "cuda" else "no",
    }
    settings |= rates_of(job) | (LORA if options.lora else {"lora_r": 0})
    if job.loop == "dpo":
        settings["precompute_ref_log_probs"] = False  # the reference is part of every step, on both sides
    if job.loop == "grpo":
        settings |= GRPO | {
            "engine": options.engine,
            "num_generations": job.num_generations,
            "max_completion_length": job.max_completion_length,
            "reward_functions": f"benchmarks.reward:{reward_of(job)}",
        }
    if job.eval_rows:
        settings |= {"eval_dataset_name": job.eval_rows, "eval_steps": options.eval_steps}
        settings["eval_reward"] = settings["reward_functions"]
    config = folder / "config.yaml"
    config.write_text(json.dumps(settings | pairs_of(options.plumbline), indent=1))  # JSON is YAML
    command = [str(ROOT / f"loops/{job.loop}.py"), "--config", str(config)]
    peak = run_child([sys.executable, *launcher], command, folder, options, {"PYTHONPATH": str(ROOT)})
    steps = []
    for row in map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines()):
        if "time/step" in row:  # else an evaluation before the first step
            update = row.get("time/update", row["time/step"])
            phases = {"update": update, "rollout": row["time/step"] - update, "accuracy": row.get("eval/accuracy")}
            steps.append({"step": row["time/step"], "tokens": row["tokens/loss"], **phases})
    return summary(steps, peak, options.to_accuracy)


def run_trl(job: Job, options, folder: Path, python: str, environment: dict[str, str]) -> dict[str, float]:
    """One run of `trl_side.py`."""
    from loops.shared.optim import OptimConfig, learning_rate_at

    optim = OptimConfig(**rates_of(job))
    shared = GRPO if job.loop == "grpo" else {}
    settings = {
        "job": asdict(job),
        "output_dir": str(folder / "run"),
        "device": options.device,
        "rates": [learning_rate_at(step, optim, job.steps) for step in range(job.steps)],
        "reward": reward_of(job),
        "eval_steps": options.eval_steps,
        "to_accuracy": options.to_accuracy,
        "gradient_checkpointing": options.gradient_checkpointing,
        "torch_dtype": torch_dtype(options),
        "extra": {name: getattr(optim, name) for name in ADAM} | shared | pairs_of(options.trl),
    } | (LORA if options.lora else {"lora_r": 0, "lora_alpha": 0})
    (folder / "settings.json").write_text(json.dumps(settings))
    command = [str(HERE / "trl_side.py"), str(folder / "settings.json"), str(folder / "steps.json")]
    peak = run_child([python], command, folder, options, environment)
    return summary(json.loads((folder / "steps.json").read_text()), peak, options.to_accuracy)


def rates_of(job: Job) -> dict[str, Any]:
    """Settings of the optimizer and its schedule, in Plumbline's words."""
    return recipe()["optim"] if job.eval_rows else RATES


def reward_of(job: Job) -> str:
    """Function in `reward.py`."""
    return "exact_answer" if job.eval_rows else "fingerprint"


def torch_dtype(options) -> str:
    """Of the weights, on both sides: bf16 only where they are frozen on a GPU."""
    return "bfloat16" if options.device == "cuda" and options.lora else "float32"


def run_child(start: list[str], command: list[str], folder: Path, options, environment: dict[str, str]) -> int:
    """Run a script through `child.py`; returns the peak memory, in bytes, of its largest process.

    start: the interpreter, and a launcher where there is one.

    Raises:
        SystemExit: it failed, or ran on other cores or threads than it was given.
    """
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables = {**os.environ, **quiet, **environment}
    if options.device == "cpu":
        variables |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(options.threads)}
    cores = str(options.threads if options.device == "cpu" else 0)
    full = [*start, str(HERE / "child.py"), str(folder / "peak"), cores, *command]
    done = subprocess.run(full, cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(full)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    seen = [json.loads(file.read_text()) for file in sorted(folder.glob("peak*"))]
    for one in seen if options.device == "cpu" else ():
        if one["cores"] not in (0, options.threads) or one["threads"] != options.threads:
            raise SystemExit(f"{' '.join(full)} ran on {one['cores']} cores with {one['threads']} threads.")
    return max(one["peak"] for one in seen)


def summary(steps: list[dict], peak: int, target: float | None) -> dict[str, float]:
    """Medians over the steps after the first; with a target, of the steps until the accuracy was that high."""
    result: dict[str, float] = {"peak": peak}
    if target is not None:  # the peak would be that of measuring the accuracy
        measured = {number: step["accuracy"] for number, step in enumerate(steps, 1) if step.get("accuracy")}
        print("accuracy after step", " ".join(f"{number}: {value:.3f}" for number, value in measured.items()))
        needed = next((number for number, value in measured.items() if value >= target), None)
        steps = steps[:needed]
        seconds = sum(step["step"] for step in steps)
        result = {"to_accuracy": seconds if needed else math.inf, "steps_to_accuracy": needed or math.inf}
    for name in ("step", "update", "rollout", "tokens"):
        result[name] = median(step[name] for step in steps[1:] or steps)
    return result | {"tokens_per_second": result["tokens"] / result["step"]}


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


def trl_versions(python: str, environment: dict[str, str]) -> str:
    """What TRL's environment has."""
    names = ("trl", "transformers", "torch")
    code = f"from importlib.metadata import version as v; print(', '.join(f'{{n}} {{v(n)}}' for n in {names}))"
    found = subprocess.run([python, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True)
    return found.stdout.strip()


def table_of(job: Job, options, runs: list[tuple[dict, dict]]) -> list[str]:
    """Rows of the table: medians over the pairs of runs, and the ratio within each pair."""
    what = f"{job.loop} {'LoRA r=16' if options.lora else 'full'}"
    what += f", {options.engine}" if job.loop == "grpo" else ""
    lines = []
    for label, (name, unit, factor) in MEASURES.items():
        if name not in runs[0][0] or (name in ("update", "rollout") and job.loop != "grpo"):
            continue
        ours, theirs = (median(side[name] for side in sides) * factor for sides in zip(*runs, strict=True))
        ratios = [a[name] / b[name] for a, b in runs]
        shown = " ".join(f"{ratio:.3f}" for ratio in ratios)
        cells = f"{label} | {ours:,.4g} {unit} | {theirs:,.4g} {unit} | **{median(ratios):.3f}** | {shown}"
        lines.append(f"| {job.workload} | {what} | {cells} |")
    return lines


def compare(options) -> str:
    """Run everything that was asked for; returns the table."""
    python, environment = install_trl(options.wheels)
    versions = trl_versions(python, environment)
    lines = [
        f"TRL's side: {versions}.",
        "",
        "| workload | loop, our engine | measure | Plumbline | TRL | Plumbline / TRL | in each pair |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        for job in write_jobs(options, Path(temporary)):
            runs = []
            for pair in range(options.pairs):
                job = replace(job, seed=42 + pair)
                folders = [Path(temporary, f"{job.workload}-{job.loop}-{pair}-{side}") for side in ("A", "B")]
                for folder in folders:
                    folder.mkdir()
                ours = run_plumbline(job, options, folders[0])
                theirs = run_trl(job, options, folders[1], python, environment)
                runs.append((ours, theirs))
                shown = " ".join(f"{name} {ours[name]:.4g}|{theirs[name]:.4g}" for name in ours)
                print(f"{job.workload} {job.loop} pair {pair + 1}: Plumbline|TRL {shown}", flush=True)
            lines += table_of(job, options, runs)
    return "\n".join(lines)


def ranks_table(options) -> str:
    """SFT on the same rows by one process and by two over gloo, in turn; one core and one thread each."""
    changed = {"workload": "gsm8k", "loops": ["sft"], "threads": 1, "steps": options.steps or 3, "to_accuracy": None}
    options = argparse.Namespace(**vars(options) | changed | {"device": "cpu", "lora": False})
    runs: dict[str, list[dict[str, float]]] = {label: [] for label in RANKS}
    with tempfile.TemporaryDirectory() as temporary:
        (job,) = write_jobs(options, Path(temporary))
        for pair in range(options.pairs):
            for label, file in RANKS.items():
                folder = Path(temporary, f"{label}-{pair}")
                folder.mkdir()
                launch = ["-m", "accelerate.commands.launch", "--config_file", file, "--main_process_port", "0"]
                runs[label].append(run_plumbline(job, options, folder, launch if file else ()))
                print(label, runs[label][-1], flush=True)
    lines = [
        f"SFT, {options.shape or '30m'} shape, fp32, {job.rows_per_step} GSM8K rows a step over all processes, which "
        "have one thread on a core of their own each, gloo:",
        "",
        "| processes | seconds a step | against one process | in each turn | peak GiB a process |",
        "| --- | --- | --- | --- | --- |",
    ]
    for label, results in runs.items():
        ratios = [many["step"] / one["step"] for many, one in zip(results, runs["one process"], strict=True)]
        step, peak = (median(result[name] for result in results) for name in ("step", "peak"))
        shown = " ".join(f"{ratio:.3f}" for ratio in ratios)
        lines.append(f"| {label} | {step:.3f} | **{median(ratios):.3f}** | {shown} | {peak / 2**30:.2f} |")
    return "\n".join(lines)


def heading(script: str, cores: str, packages: Sequence[str], device: str = "cpu") -> str:
    """When, what and where; call it before the measurements, for the load."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown commit"
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.partition(":")[2] for line in open("/proc/cpuinfo") if line.startswith("model name")]
        cpu = names[0].strip() if names else cpu
    machine = f"{cpu}, {cores}, load {os.getloadavg()[0]:.1f} before the start"
    if device == "cuda":
        import torch

        machine = f"{torch.cuda.get_device_name()}; {machine}"
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    command = shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]])
    return f"## {time.strftime('%Y-%m-%d %H:%M')}, {commit}\n\n{machine}; {versions}\n\n    {command}\n"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=[*LOOPS, "all"], help="default: all, unless a table is asked for")
    parser.add_argument("--loops", default="sft,dpo,grpo", type=lambda text: text.split(","))
    parser.add_argument("--lora", action="store_true", help="LoRA r=16 on all linear layers instead of all weights")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers", help="of our side's GRPO")
    parser.add_argument("--to_accuracy", type=float, help="of quickstart: train until held-out answers are this good")
    parser.add_argument("--eval_steps", type=int, default=1, help="steps between two measurements for --to_accuracy")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU cores of either side")
    parser.add_argument("--pairs", type=int, default=2, help="runs of each side, in turn")
    counted = "counted steps of a run, after one that is not (default 3); with --to_accuracy all steps (as the config)"
    parser.add_argument("--steps", type=int, help=counted)
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
    parser.add_argument("--ranks", action="store_true", help="table: our SFT step on one process and on two (CPU)")
    parser.add_argument("--mfu", action="store_true", help="table: MFU, fused head, longest sequence (needs a GPU)")
    parser.add_argument("--no_record", action="store_true", help="do not append to RESULTS.md")
    options = parser.parse_args()
    if not options.workload and not (options.scaling or options.mfu or options.ranks):
        options.workload = "all"
    if options.to_accuracy and options.workload != "quickstart":
        parser.error("--to_accuracy is for --workload quickstart.")
    if options.engine == "vllm" and not importlib.util.find_spec("vllm"):
        parser.error(f"--engine vllm: {sys.executable} has no vLLM; run this script with an interpreter that has it.")
    if options.steps is None and not options.to_accuracy:
        options.steps = 3
    return options


def main() -> None:
    options = parse_options()
    cores = f"{options.threads} of {os.cpu_count()} cores" if options.device == "cpu" else f"{os.cpu_count()} cores"
    packages = ["torch", "transformers", *(["vllm"] if options.engine == "vllm" else [])]
    text = heading("compare.py", cores, packages, options.device)
    if options.workload:
        text += f"\n{compare(options)}\n"
    if options.scaling:
        text += f"\n{scaling_table(options)}\n"
    if options.ranks:
        text += f"\n{ranks_table(options)}\n"
    if options.mfu:
        text += f"\n{mfu_table(options)}\n"
    print(text)
    if not options.no_record:
        results = HERE / "RESULTS.md"
        before = results.read_text() if results.exists() else "# Results\n\nAppended by `benchmarks/compare.py`.\n"
        results.write_text(f"{before}\n{text}")


if __name__ == "__main__":
    main()
