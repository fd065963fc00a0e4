"""Starting a run: the accelerator, the seeds, the run folder, the resolved config and where the code came from."""

from __future__ import annotations

import atexit
import importlib.metadata
import json
import logging
import os
import platform
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import nn

from loops.shared.checkpoint import find_checkpoint, load_checkpoint, read_manifest, save_checkpoint
from loops.shared.tracking import SilentTracker, Tracker, start_tracking
from loops.shared.weights import export_model


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long to train, where to write, what to report."""

    output_dir: str | None = None
    """The run folder itself; default `results_dir/model_id/LOOP-DATE-TIME`. Refused when it already holds a run."""
    results_dir: str = "results"
    """Parent of the default run folders."""
    run_name: str | None = None
    """Name shown in the trackers, and the last part of the default run folder."""
    seed: int = 42
    """One seed for initial weights, order of rows, dropout and sampling."""
    resume_from: str = "none"
    """`none`, `latest` (newest checkpoint of the run folder, or a new start), or the path of a checkpoint."""
    num_train_epochs: float = 1.0
    """Passes over the training rows; ignored when `max_steps` is above 0."""
    max_steps: int = 0
    """Optimizer steps; 0 (or -1) means: as many as `num_train_epochs` needs."""
    logging_steps: int = 1
    """Steps between two rows sent to the trackers and the progress bar (metrics.jsonl gets every step)."""
    eval_steps: int = 0
    """Steps between two evaluations; 0 means: only before the first and after the last step."""
    save_steps: int = 0
    """Steps between two checkpoints; 0 means: none (the final export is always written)."""
    save_total_limit: int = 2
    """Checkpoints kept, the newest ones; 0 keeps all."""
    log_completions_steps: int = 0
    """Steps between two printed tables of sample completions; 0 prints none."""
    report_to: str | list[str] = "none"
    """Trackers besides metrics.jsonl: any of mlflow, wandb, tensorboard (list or comma list), or none."""
    mlflow_uri: str | None = None
    """MLflow tracking server (http://..., file:..., sqlite:...); setting it implies `report_to: mlflow`."""
    mlflow_experiment_name: str = "plumbline"
    """MLflow experiment, and W&B project."""
    mixed_precision: str = "auto"
    """`no`, `bf16` (autocast around the forward), or `auto`: bf16 on a GPU that has it, else no."""
    fsdp: str | dict = field(default_factory=dict)
    """Sharding: a mapping of FSDP settings, or the flat string `full_shard auto_wrap offload`; empty means none."""
    fsdp_config: dict = field(default_factory=dict)
    """Further FSDP settings in transformers' spelling, read together with `fsdp`."""
    cpu_offload: bool = False
    """Keep sharded parameters in host memory (needs `fsdp`)."""

    def __post_init__(self) -> None:
        if self.mixed_precision not in ("auto", "no", "bf16"):
            raise ValueError(f"mixed_precision is {self.mixed_precision!r}; give auto, no or bf16.")
        for name in ("logging_steps", "eval_steps", "save_steps", "save_total_limit", "log_completions_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 or more.")
        if self.logging_steps == 0:
            raise ValueError("logging_steps is 0; give 1 or more.")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ValueError("max_steps and num_train_epochs are both 0 or less; give one of them.")
        if self.cpu_offload and not self.fsdp:
            raise ValueError("cpu_offload needs fsdp; give fsdp: full_shard too.")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps if self.max_steps > 0 else max(1, round(self.num_train_epochs * steps_per_epoch))


@dataclass
class Run:
    """What `start_run` gives the loop."""

    config: RunConfig
    accelerator: Accelerator
    folder: Path
    tracker: Tracker | SilentTracker
    checkpoint: Path | None  # to resume from
    card: dict  # what the model card tells
    latest: dict[str, float] = field(default_factory=dict)  # newest value of each metric
    save_seconds: float | None = None  # of a checkpoint written since the last row

    def say(self, text: str) -> None:
        """One line for the person at the terminal, from the main process."""
        if self.accelerator.is_main_process:
            print(text, flush=True)

    def due(self, step: int, every: int, last: bool) -> bool:
        """Whether what happens every `every` steps (0: only at the end) is due after step `step`."""
        return last or (every > 0 and step % every == 0)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Metrics of a step, to metrics.jsonl and the trackers; evaluations are also said."""
        if self.save_seconds is not None:
            metrics, self.save_seconds = metrics | {"time/save": self.save_seconds}, None
        self.latest |= metrics
        self.tracker.log(metrics, step)
        self.tracker.progress(step, metrics)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name.startswith("eval/"))
        if shown:
            self.say(f"step {step}: {shown}")

    def load(self, policy: nn.Module, optimizer, scheduler, total_steps: int) -> int:
        """Put the checkpoint to resume from back, if there is one; returns the step to go on from."""
        self.tracker.expect(total_steps)
        if self.checkpoint is None:
            return 0
        objects = {"model": policy, "optimizer": optimizer, "scheduler": scheduler}
        step = load_checkpoint(self.checkpoint, accelerator=self.accelerator, **objects)["step"]
        self.say(f"resuming from {self.checkpoint}" if step < total_steps else f"{self.folder} is a finished run")
        return step

    def save(self, policy: nn.Module, optimizer, scheduler, step: int, epoch: int) -> None:
        """Write a checkpoint that a resumed run continues exactly; its seconds are in the next row, as `time/save`."""
        began = time.perf_counter()
        save_checkpoint(
            self.folder,
            accelerator=self.accelerator,
            model=policy,
            optimizer=optimizer,
            scheduler=scheduler,
            step=step,
            state={"step": step, "epoch": epoch},
            keep=self.config.save_total_limit,
        )
        self.save_seconds = time.perf_counter() - began

    def finish(self, policy: nn.Module, tokenizer, *, merge: bool) -> None:
        """Export the trained model to `model/` in the run folder, and close the trackers."""
        folder = self.folder / "model"
        card = self.card | {"metrics": {k: v for k, v in self.latest.items() if k.startswith("eval/")}}
        export_model(self.accelerator.unwrap_model(policy), tokenizer, folder, merge=merge, card=card)
        self.accelerator.wait_for_everyone()
        atexit.unregister(self.tracker.finish)
        self.tracker.finish(ok=True)
        self.say(f"model written to {folder}")


def start_run(config: RunConfig, *, loop: str, resolved: str, settings: dict) -> Run:
    """Accelerator, seeds, run folder with provenance, trackers; call it before any weights are read.

    loop: name of the loop; resolved: the whole config as YAML, written to the folder; settings: the same as a mapping,
    for the trackers. Raises ValueError where the folder already holds a run and `resume_from` is none.
    """
    model_id = settings["model"]["model_id"]
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    on_cpu = not torch.accelerator.is_available()
    precision = config.mixed_precision
    if precision == "auto":
        precision = "bf16" if not on_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, gradient_accumulation_steps=1)
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise ValueError(
            f"the launcher asked for {asked} processes but this one runs alone; start with "
            f"`accelerate launch --multi_gpu --num_processes {asked} loops/{loop}.py ...`, on CPUs too."
        )
    if config.fsdp and accelerator.num_processes > 1:
        raise ValueError("fsdp over several processes is not built yet; leave fsdp out to train with DDP.")
    if on_cpu and accelerator.num_processes == 1:  # `accelerate launch` sets one thread a process
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    set_seed(config.seed)
    _quieten(accelerator.is_main_process)

    name = config.run_name or f"{loop}-{time.strftime('%Y%m%d-%H%M%S')}"
    if config.output_dir:
        folder = Path(config.output_dir)
    else:
        local = Path(model_id)
        folder = Path(config.results_dir, local.resolve().name if local.exists() else model_id, name)
    folder = Path(broadcast_object_list([str(folder)])[0])
    if folder.exists() and any(folder.iterdir()) and config.resume_from == "none":
        raise ValueError(f"output_dir {folder} already holds files; give another output_dir, or resume_from: latest.")
    accelerator.wait_for_everyone()
    checkpoint = find_checkpoint(folder, config.resume_from)
    card = {
        "base_model": model_id,
        "loop": loop,
        "dataset": settings["data"]["dataset_name"],
        "command": "accelerate launch " + " ".join(sys.argv),
        "settings": {key: value for section in ("optim", "batch") for key, value in settings[section].items()},
        "versions": _versions(),
    }
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(resolved)
        name = f"provenance-{checkpoint.name}.json" if checkpoint else "provenance.json"
        (folder / name).write_text(json.dumps(_provenance(accelerator, config.seed), indent=1) + "\n")
    accelerator.wait_for_everyone()
    tracker = start_tracking(
        accelerator,
        folder=folder,
        report_to=config.report_to,
        run_name=config.run_name or folder.name,
        project=config.mlflow_experiment_name or "plumbline",
        mlflow_uri=config.mlflow_uri or None,  # SageMaker's files leave it as an empty text
        config=settings,
        resume_step=read_manifest(checkpoint)["step"] if checkpoint else None,
        logging_steps=config.logging_steps,
    )
    atexit.register(tracker.finish, ok=False)  # a run that ends early is marked as failed
    run = Run(config, accelerator, folder, tracker, checkpoint, card)
    if config.resume_from == "latest" and checkpoint is None:
        run.say(f"{folder} holds no checkpoint: starting anew")
    if config.fsdp:
        run.say("fsdp: one process has nothing to shard, so this run is not sharded")
    return run


def add_sums(into: dict, terms: dict) -> None:
    """Add a micro-batch's detached sums to the step's; names that end in `_max` keep the larger value."""
    for name, value in terms.items():
        value = float(value)
        into[name] = max(into.get(name, value), value) if name.endswith("_max") else into.get(name, 0.0) + value


def reduce_sums(accelerator: Accelerator, sums: dict) -> dict[str, float]:
    """The step's sums over all processes, in one exchange; `..._max`, time/ and optim/ by maximum.

    Processes may hold different names (one that had nothing to do holds few): a missing name adds nothing.
    """
    total: dict[str, float] = {}
    for terms in gather_object([dict(sums)]):
        for name, value in terms.items():
            if name.endswith("_max") or name.startswith(("time/", "optim/")):
                total[name] = max(total.get(name, float("-inf")), float(value))
            else:
                total[name] = total.get(name, 0.0) + float(value)
    return total


@contextmanager
def one_sentence_errors(prog: str) -> Iterator[None]:
    """End with exit code 2 and one sentence for bad input; anything unexpected keeps its traceback.

    Bad input is a ValueError or FileNotFoundError raised by this project's own code (not from inside a library).
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        house = Path(__file__).resolve().parents[2]
        ours = Path(frames[-1].filename).resolve()
        if not any(ours.is_relative_to(house / room) for room in ("loops", "losses", "data", "configs", "launch")):
            raise
        print(f"{prog}: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def seed_process(seed: int, rank: int) -> None:
    """Own streams of random numbers for this process (dropout), once the weights are built alike everywhere."""
    random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def _quieten(is_main: bool) -> None:
    """Keep the terminal for the run: no libraries' progress bars, no advice that nobody here can follow."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # optional CPU kernels that it would fetch from the hub
    if not is_main:
        logging.getLogger("loops").setLevel(logging.ERROR)


def _versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "peft", "datasets", "bitsandbytes", "flash-attn", "vllm"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _provenance(accelerator: Accelerator, seed: int) -> dict:
    """Where this run came from: command, code, packages, machine."""

    def git(*words: str) -> str | None:
        try:
            here = Path(__file__).parent
            return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None  # not a checkout: an installed copy has no commit to name

    changes = git("status", "--porcelain")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": sys.argv,
        "seed": seed,
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "packages": _versions(),
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
        "platform": platform.platform(),
    }
