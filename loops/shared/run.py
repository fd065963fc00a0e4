"""Starting a run: the accelerator, the seeds, the run folder, the resolved config and where the code came from."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import importlib.metadata
import inspect
import json
import logging
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import time
import traceback
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import nn

from loops.shared.checkpoint import NotSaved, Saver, load_checkpoint
from loops.shared.checkpoint_folder import find_checkpoint, read_extra, read_manifest, read_state
from loops.shared.guards import TERMINATED, FiniteGuard, StopRequest, Watch, explain_out_of_memory, group_timeout
from loops.shared.layers import plain_name
from loops.shared.models import ModelConfig, Reference
from loops.shared.rollout.config import Sampling
from loops.shared.sharding import (
    Sharding,
    build_accelerator,
    is_sharded,
    prepare,
    read_launcher_sharding,
    read_sharding,
    sharding_line,
)
from loops.shared.tracking import SilentTracker, Tracker, check_trackers, printable, start_tracking, without_passwords
from loops.shared.weights import WrongLogits, check_export, export_model, logits_of

logger = logging.getLogger(__name__)


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
    """`none`, `latest` (newest checkpoint of the run folder; a new start where the folder is empty, or holds a start of
    this very run that ended before its first checkpoint), `best` (by `save_best`), or a path."""
    num_train_epochs: float = 1.0
    """Passes over the training rows; ignored when `max_steps` is above 0."""
    max_steps: int = 0
    """Optimizer steps (in GRPO sets of rollouts, each with `num_iterations` updates); 0 (or -1) means: as many as
    `num_train_epochs` needs."""
    logging_steps: int = 1
    """Steps between two rows sent to the trackers and the progress bar (metrics.jsonl gets every step)."""
    eval_steps: int = 0
    """Steps between two evaluations; 0 means: only before the first and after the last step."""
    save_steps: int = 0
    """Steps between two checkpoints; 0 means: none (the final export is always written)."""
    save_total_limit: int = 2
    """Checkpoints kept, the newest ones; 0 keeps all."""
    save_best: str | None = None
    """Metric (eval/loss, eval/accuracy, ...) by which the best checkpoint is kept besides the newest ones; it has to be
    measured where checkpoints are saved."""
    greater_is_better: bool | None = None
    """Whether more of `save_best` is better; default: unless its name ends in loss."""
    save_async: bool = True
    """Write checkpoints while training goes on; costs a copy of what is saved in host memory."""
    log_completions_steps: int = 0
    """Steps between two tables of sample completions with their rewards, printed and in completions.jsonl; 0: none."""
    report_to: str | list[str] = "none"
    """Trackers besides metrics.jsonl: any of mlflow, wandb, tensorboard (list or comma list), or none."""
    mlflow_uri: str | None = None
    """MLflow tracking server (http://..., file:..., sqlite:...); setting it implies `report_to: mlflow`."""
    mlflow_experiment_name: str | None = None
    """MLflow experiment, and W&B project; left out, MLFLOW_EXPERIMENT_NAME or WANDB_PROJECT, else `plumbline`."""
    mixed_precision: str = "auto"
    """`no`, `bf16` (autocast around the forward; under fsdp bf16 parameters, and reductions and outputs in fp32), or
    `auto`: bf16 where the launcher says it and on a GPU that has it, else no."""
    fsdp: str | dict = field(default_factory=dict)
    """Sharding over processes with FSDP2: the string `full_shard auto_wrap offload`, or a mapping
    (reshard_after_forward, dp_replicate_size, ...: `loops/shared/sharding.py`); empty means none."""
    fsdp_config: dict = field(default_factory=dict)
    """Further FSDP settings in transformers' spelling, read together with `fsdp`."""
    cpu_offload: bool = False
    """Keep shards in host memory, and run the optimizer there; implies `fsdp: full_shard`."""
    on_non_finite: str = "stop"
    """What a non-finite gradient (NaN or inf) does: `stop` the run, or `skip` the optimizer step (ten in a row stop
    the run)."""
    heartbeat_timeout: float = 40.0
    """Seconds after which a process that nobody hears of ends the run."""
    collective_timeout: float = 1800.0
    """Seconds that processes wait for one that lives but is behind (a slow reward, say)."""

    def __post_init__(self) -> None:
        if self.mixed_precision not in ("auto", "no", "bf16"):
            raise ValueError(f"mixed_precision is {self.mixed_precision!r}; give auto, no or bf16.")
        if self.on_non_finite not in ("stop", "skip"):
            raise ValueError(f"on_non_finite is {self.on_non_finite!r}; give stop or skip.")
        if self.save_best and not self.save_steps:
            raise ValueError(
                f"save_best is {self.save_best!r} and save_steps 0: nothing would be saved; set save_steps."
            )
        if self.save_best and "/" not in self.save_best:
            near = self.save_best.replace("_", "/", 1)
            raise ValueError(f"save_best is {self.save_best!r}, which is no metric: give its path, such as {near}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; give a number from 0 to {2**32 - 1}.")
        for name in ("heartbeat_timeout", "collective_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number of seconds above 0.")
        for name in ("logging_steps", "eval_steps", "save_steps", "save_total_limit", "log_completions_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 or more.")
        if self.logging_steps == 0:
            raise ValueError("logging_steps is 0; give 1 or more.")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ValueError("max_steps and num_train_epochs are both 0 or less; give one of them.")
        read_sharding(self.fsdp, self.fsdp_config, self.cpu_offload)  # refuses what it does not know

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        return (
            self.max_steps if self.max_steps > 0 else max(1, math.ceil(self.num_train_epochs * steps_per_epoch - 1e-9))
        )


@dataclass
class Run:
    """What `start_run` gives the loop."""

    config: RunConfig
    accelerator: Accelerator
    loop: str
    resolved: str  # the whole config as YAML
    settings: dict  # the same as a mapping
    folder: Path
    checkpoint: Path | None  # to resume from
    sharding: Sharding | None = None
    claim: IO | None = None  # of the folder, on the main process
    earlier: dict | None = None  # identity of the run in the folder, which ended before its first checkpoint
    tracker: Tracker | SilentTracker = field(default_factory=SilentTracker)
    identity: dict = field(default_factory=dict)  # what a checkpoint must agree on for its step to mean the same
    latest: dict[str, float] = field(default_factory=dict)  # newest value of each metric
    pending: dict[str, float] = field(default_factory=dict)  # seconds of what happened since the last row
    logged: dict[str, float] = field(default_factory=dict)  # metrics of the newest row
    total_steps: int = 0
    closers: list[Callable[[], object]] = field(default_factory=list)  # called when this process ends
    stopping: bool = False  # some process was asked to stop; all of them know after the step's `reduce`

    def __post_init__(self) -> None:
        accelerator, config = self.accelerator, self.config
        self.guard = FiniteGuard(accelerator, config.on_non_finite)
        # `accelerate launch` passes no signal on to a single process: its own end is the sign
        alone = accelerator.num_processes == 1 and bool(_launcher_words())
        self.stop = StopRequest(verbose=accelerator.is_main_process, follow_parent=alone)
        self.watch = Watch(
            accelerator,
            heartbeat_timeout=config.heartbeat_timeout,
            collective_timeout=config.collective_timeout,
            stop=self.stop,
        )
        self.watch.start()
        self.saver = Saver(self.folder, accelerator=accelerator)

    def on_end(self, closer: Callable[[], object]) -> None:
        """Call `closer` when the run ends, also where a thread ends the process (a dead rank, a second SIGTERM)."""
        self.closers.append(closer)
        self._on_abort(closer)

    def _on_abort(self, closer: Callable[[], object]) -> None:
        self.watch.closers.append(closer)
        self.stop.closers.append(closer)

    @property
    def server_key(self) -> str | None:
        """The key of vLLM's servers: from the environment, since options are written to the run folder."""
        return os.environ.get("VLLM_API_KEY")

    def set_phase(self, step: int, what: str) -> None:
        """Record the step and the phase, which the message names when a process hangs or dies."""
        self.watch.set_phase(step, what)

    def reduce(self, sums: dict) -> dict[str, float]:
        """`reduce_sums` of the step; afterwards all processes agree whether the run is to stop."""
        total = reduce_sums(self.accelerator, sums | {"stop_max": float(self.stop.requested)})
        self.stopping = total.pop("stop_max") > 0
        if self.guard.skipped:
            total["optim/skipped_steps"] = float(self.guard.skipped)
        return total

    def print_main(self, text: str) -> None:
        """Print on the main process."""
        if self.accelerator.is_main_process:
            print(printable(text), flush=True)

    def _due(self, step: int, every: int) -> bool:
        """Whether what happens every `every` steps, and after the last one, is due after step `step`."""
        return step == self.total_steps or (every > 0 and step % every == 0)

    def eval_due(self, step: int) -> bool:
        """Whether an evaluation is due after step `step`."""
        return self._due(step, self.config.eval_steps)

    def save_due(self, step: int) -> bool:
        """Whether a checkpoint is due after step `step`; always when the run is to stop. Every process calls this."""
        if "time/eval" in self.logged:  # an evaluation may have been long, and the next step's `reduce` is far
            self.reduce({})
        return self.stopping or (self.config.save_steps > 0 and self._due(step, self.config.save_steps))

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Metrics of a step, to metrics.jsonl and the trackers; evaluations are also said."""
        metrics, self.pending = metrics | self.pending, {}
        if self.config.on_non_finite == "skip":
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        model, name = self.settings["model"], "optim/unchanged"
        if name in metrics and name not in self.latest and model["torch_dtype"] == "bfloat16" and not model["lora_r"]:
            self.print_main(
                f"bfloat16 weights, rounded stochastically: step {step} moved {100 * (1 - metrics[name]):.1f} %"
            )
        self.latest |= metrics
        self.logged = metrics
        self.tracker.log(metrics, step)
        self.tracker.progress(step, metrics)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if _is_shown(name, value, metrics))
        best = self.config.save_best or ""
        if step == 0 and best.startswith("eval/") and best not in metrics:
            raise ValueError(f"save_best is {best}, which evaluations do not measure: there are {shown}.")
        if shown:
            self.print_main(f"step {step}: {shown}")
        for name, value in metrics.items():
            if name.startswith("loss/") and not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {step}: the run has diverged; nothing was exported."
                )

    @property
    def sharded(self) -> bool:
        """Whether models are split over processes."""
        return is_sharded(self.accelerator)

    def prepare(self, policy: nn.Module, optimizer, reference: Reference | None = None):
        """(policy, optimizer), wrapped or sharded; from here on each process has random numbers of its own."""
        values = not self.settings["model"]["from_scratch"]
        digest = weights_digest(policy, values) if self.accelerator.is_main_process else None
        self.identity["weights"] = broadcast_object_list([digest])[0]
        prepared = prepare(self.accelerator, policy, optimizer, reference=reference, sharding=self.sharding)
        self.print_main(sharding_line(self.accelerator, policy, self.sharding))
        for sentence in self.sharding.ignored if self.sharding else ():
            self.print_main(f"fsdp: ignored {sentence}")
        seed = self.config.seed + self.accelerator.process_index  # own randomness (dropout): the weights are built
        random.seed(seed)
        torch.manual_seed(seed)
        return prepared

    def create_folder(self, total_steps: int, *, rows: Sequence, **sizes: int | str) -> None:
        """Create the run folder, with the resolved config and provenance, and start the trackers; of a run that is
        resumed `resume` does that, so that a checkpoint that does not fit changes nothing.

        Called when everything is built, so that bad input writes nothing. rows: the encoded training rows; sizes: what,
        with loop, seed and rows, says which rows a step has. Raises ValueError where the checkpoint to resume from is
        of another run; ends the process where the run in the folder has no step left.
        """
        self.total_steps = total_steps
        self.identity |= {"loop": self.loop, "seed": self.config.seed, "rows": len(rows), **sizes}
        self.identity |= {"digest": rows_digest(rows), "mixed_precision": self.accelerator.mixed_precision}
        self.identity |= settings_of_identity(self.loop, self.settings)
        if self.checkpoint is None:
            if self.earlier is not None:
                refuse_other_run(str(self.folder), self.earlier, self.identity)
            if self.config.resume_from != "none":
                self.print_main(f"{self.folder} holds no checkpoint: starting anew")
            return self._begin(None)
        state = {"packing_strategy": "step"} | read_state(self.checkpoint)  # which older ones do not name
        refuse_other_run(str(self.checkpoint), state, self.identity)
        if state["step"] > total_steps:
            raise ValueError(
                f"{self.checkpoint} is at step {state['step']}, beyond this run's {total_steps} (max_steps)."
            )
        exported = read_json(self.folder / "model" / MARK)
        told = broadcast_object_list([[(self.folder / "model").exists(), exported]])[0]
        if told[0] and told[1].get("run") != self._mark()["run"]:
            raise ValueError(f"{self.folder}/model was not written by this run: move it elsewhere, or set output_dir.")
        if state["step"] == total_steps == told[1].get("step"):
            self.print_main(
                f"{self.folder} is trained to its last step, {total_steps}, and exported: nothing was done; raise "
                f"max_steps to go on, or export again with python -m launch.export."
            )
            self.close(ok=True)
            raise SystemExit(0)
        return None

    def _begin(self, step: int | None) -> None:
        """Write the first files, cut rows past `step` and start the trackers; None: a new run."""
        fresh = False
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            fresh = Path(self.claim.name).parent != self.folder.resolve()
            with writing_to(self.folder):
                self.folder.mkdir(parents=True, exist_ok=not fresh)
                if fresh:
                    claim, self.claim = self.claim, claim_folder(self.folder)
                    release_claim(claim)
                name = f"provenance-{self.checkpoint.name}.json" if self.checkpoint else "provenance.json"
                text = json.dumps(_provenance(self.accelerator, self.config.seed, self.identity), indent=1)
                hidden = self.folder / f".{name}"  # a folder with nothing but hidden files is empty
                hidden.write_text(text + "\n")
                os.replace(hidden, self.folder / name)
        try:
            self.tracker = start_tracking(
                self.accelerator,
                folder=self.folder,
                report_to=self.config.report_to,
                run_name=self.config.run_name or None,
                project=self.config.mlflow_experiment_name or None,
                mlflow_uri=self.config.mlflow_uri or None,  # SageMaker's files leave it as an empty text
                config=self.settings,
                resume_step=step,
                logging_steps=self.config.logging_steps,
                total_steps=self.total_steps,
            )
        except ValueError:
            if fresh:
                shutil.rmtree(self.folder, ignore_errors=True)  # made above
            raise
        atexit.register(self.tracker.finish, ok=False)  # a run that ends early is marked as failed
        self._on_abort(partial(self.tracker.finish, ok=False))
        if self.accelerator.is_main_process:
            (self.folder / "config.yaml").write_text(without_passwords(self.resolved))
            if without_passwords(self.resolved) != self.resolved:
                self.print_main("passwords in addresses are written nowhere: give them again on resume")

    def resume(self, policy: nn.Module, optimizer, scheduler) -> int:
        """Put the checkpoint to resume from back, if there is one; returns the step to go on from."""
        self.stop.install()  # from here on SIGTERM stops the run after the current step
        if self.checkpoint is None:
            return 0
        objects = {"model": policy, "optimizer": optimizer, "scheduler": scheduler}
        checked = self.config.resume_from in ("latest", "best")
        state = load_checkpoint(self.checkpoint, accelerator=self.accelerator, checked=checked, **objects)
        self._begin(state["step"])
        self.print_main(f"resuming from {self.checkpoint}")
        told = {key: value for key, value in self.identity["rows_from"].items() if key.startswith(("eval_", "code "))}
        now = {"steps in total": self.total_steps, **self.settings["optim"], **told}
        then = {"steps in total": state.get("total_steps", self.total_steps), **state.get("optim", {})}
        then |= state.get("rows_from", {})
        changed = [f"{key} {then[key]} -> {value}" for key, value in now.items() if then.get(key, value) != value]
        if changed:
            rate = scheduler.get_last_lr()[0]
            self.print_main(
                f"changed: {', '.join(changed)}; from step {state['step'] + 1} on, at a learning rate of {rate:g}"
            )
        return state["step"]

    def _mark(self) -> dict:
        """What says in an exported folder that this run wrote it, as JSON gives it back."""
        compared = {key: value for key, value in self.identity.items() if not key.endswith("_from")}
        text = json.dumps(compared, sort_keys=True)
        return {"run": hashlib.sha256(text.encode()).hexdigest(), "step": self.total_steps}

    def show_completions(self, prompts, completions, rewards, advantages: list, step: int) -> None:
        """A few completions of the first prompt with their rewards (`data.rewards.RewardResult`), in the run folder and
        as a table, when that is due."""
        every = self.config.log_completions_steps
        if not (prompts and every and self._due(step, every)):
            return
        rows = []
        for i, completion in enumerate(completions[:4]):
            parts = {f"reward/{name}": values[i] for name, values in rewards.by_name.items()}
            total = None if math.isnan(rewards.total[i]) else rewards.total[i]
            row = {"prompt": prompts[0].text, "completion": completion.text, "reward": total}
            row |= (parts if len(parts) > 1 else {}) | {"advantage": advantages[i]}
            rows.append(row | {"finish_reason": completion.finish_reason, "tokens": len(completion.token_ids)})
        self.tracker.completions(rows, step)

    def extra(self) -> dict:
        """What this process saved besides the training state; nothing where there were other numbers of processes."""
        if not self.checkpoint or read_manifest(self.checkpoint)["world_size"] != self.accelerator.num_processes:
            return {}
        return read_extra(self.checkpoint, self.accelerator.process_index)

    def save(
        self, policy: nn.Module, optimizer, scheduler, step: int, *, epoch: int, extra: dict | None = None
    ) -> None:
        """Write a checkpoint that a resumed run continues exactly; the seconds that training waits for it are in the
        next row, as `time/save`. A run that was asked to stop ends here (exit code 143)."""
        began = time.perf_counter()
        self.set_phase(step, "saving")
        name = self.config.save_best
        greater = self.config.greater_is_better
        if greater is None:
            greater = not (name or "").endswith("loss")
        saved = self._wait_for_saver()
        try:
            self.saver.save(
                model=policy,
                optimizer=optimizer,
                scheduler=scheduler,
                step=step,
                state={
                    **{"step": step, "epoch": epoch, "total_steps": self.total_steps, **self.identity},
                    "stops": self.accelerator.unwrap_model(policy).generation_config.eos_token_id,  # for exports
                    **{part: self.settings[part] for part in ("model", "optim")},
                },
                keep=self.config.save_total_limit,
                best=(name, self.logged[name], greater) if name and name in self.logged else None,
                extra=extra,
                wait=self.stopping or not self.config.save_async,
            )
            saved = True
        except NotSaved as error:  # what was saved before is still there, and so is the run
            saved = False
            self.print_main(f"not saved: {error}")
        if name and name not in self.logged:
            measured = ", ".join(key for key in self.latest if key.startswith("eval/"))
            self.print_main(
                f"save_best: {name} was not measured at step {step} (there are {measured or 'no evaluations'})"
            )
        self.pending["time/save"] = time.perf_counter() - began
        if self.stopping:
            hint = f"; go on with --resume_from latest --output_dir {self.folder}" if saved else ", which is not saved"
            self.print_main(f"stopped after step {step}{hint}")
            self.close(ok=False)
            raise SystemExit(TERMINATED)

    def _wait_for_saver(self) -> bool:
        """Wait for the checkpoint that is being written; whether it was."""
        try:
            self.saver.wait()
        except NotSaved as error:
            self.print_main(f"not saved: {error}")
            return False
        return True

    def export(self, policy: nn.Module, tokenizer, config: ModelConfig) -> None:
        """Export the trained model to `model/` in the run folder, and end the run."""
        self.set_phase(self.total_steps, "exporting")
        folder = self.folder / "model"
        card = {
            "base_model": self.settings["model"]["model_id"],
            "loop": self.loop,
            "dataset": self.settings["data"]["dataset_name"],
            "command": "accelerate launch " + " ".join(sys.argv),
            "settings": {key: value for part in ("optim", "batch") for key, value in self.settings[part].items()},
            "versions": _versions(),
            "metrics": {name: value for name, value in self.latest.items() if name.startswith("eval/")},
        }
        partly = self.folder / ".tmp-model"
        if self.accelerator.is_main_process:
            shutil.rmtree(partly, ignore_errors=True)
        model = self.accelerator.unwrap_model(policy)
        expected = logits_of(model, self.accelerator.device)
        export_model(
            model, tokenizer, partly, merge=config.exports_merged, card=without_passwords(card), title=folder.name
        )
        if self.accelerator.is_main_process:
            if reason := check_export(model, partly, expected, config, self.accelerator):
                self.print_main(f"the export was not compared with the policy: {reason}")
            written = sorted(path.name for path in partly.iterdir())
            (partly / MARK).write_text(json.dumps({**self._mark(), "files": [*written, MARK]}, indent=1) + "\n")
            if folder.exists():  # of the same run, resumed when it had ended; what others put there stays
                for path in folder.iterdir():
                    if path.name not in read_json(folder / MARK).get("files", []) and path.name not in written:
                        os.replace(path, partly / path.name)
                shutil.rmtree(folder, ignore_errors=True)
            os.replace(partly, folder)
        self._wait_for_saver()
        self.close(ok=True)
        self.print_main(f"model written to {folder}")
        if self.accelerator.is_main_process:
            rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
            for name in ("eval/loss", "eval/reward_accuracy", "eval/accuracy", "eval/missing"):
                found = [row for row in rows if row.get(name) is not None]
                if any(_is_shown(name, row[name], row) for row in found):
                    self.print_main(f"{name} {found[0][name]:.4g} before, {found[-1][name]:.4g} after")
        self.stop.remove()

    def close(self, *, ok: bool) -> None:
        """Call what `on_end` was given, and close the trackers; on every process.

        The barrier is the last exchange of all: where that is a gather, one of gloo's threads may still hold tensors of
        Python's while the interpreter ends, which aborts the process (torch 2.13).
        """
        self.accelerator.wait_for_everyone()
        for closer in self.closers:  # an engine: a rollout under way would be waited for
            closer()
        atexit.unregister(self.tracker.finish)
        self.tracker.finish(ok=ok)
        release_claim(self.claim)
        self.watch.stop()


def start_run(config: RunConfig, *, loop: str, resolved: str, settings: dict, expandable_segments: bool = True) -> Run:
    """Accelerator and seeds; call it before any weights are read. It writes nothing: `Run.create_folder` does.

    loop: name of the loop; resolved: the whole config as YAML; settings: the same as a mapping. expandable_segments: of
    torch's CUDA allocator; vLLM's sleep in this process cannot work with them (pytorch 147851). Raises ValueError where
    the folder already holds a run that is not to be resumed, and where the launcher's settings contradict the loop's.
    """
    if expandable_segments:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _settings.clear()
    _settings.update(settings)
    on_cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    _check_evaluation(config, settings)
    precision, launchers = config.mixed_precision, os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision == "auto" and launchers == "bf16":
        precision = launchers
    elif precision == "auto":
        precision = "bf16" if not on_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    if launchers not in ("no", precision):
        raise ValueError(
            f"mixed_precision is {launchers} in the launcher's settings and {precision} here: give the loop's own "
            f"mixed_precision (no or bf16), and the launcher the same or no."
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ValueError(
            "dynamo_backend is set in the launcher, which would compile every shape of a batch: set it to no there; "
            "compile: true in the loop's config compiles the layers."
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    sharding = _find_sharding(config, loop, processes)
    if sharding is None or processes == 1:  # or accelerate would shard by the launcher's word alone
        os.environ.pop("ACCELERATE_USE_FSDP", None)
    accelerator = build_accelerator(
        sharding,
        precision=precision,
        on_cpu=on_cpu,
        processes=processes,
        per_machine=int(os.environ.get("LOCAL_WORLD_SIZE", processes)),
        timeout=group_timeout(config.collective_timeout),
    )
    _check_launcher(accelerator, loop, processes, sharding, precision)
    if on_cpu and accelerator.num_processes == 1 and not _threads_are_set():
        torch.set_num_threads(available_cpus())
    set_seed(config.seed)
    _quieten(accelerator.is_main_process)

    folder = Path(config.output_dir or "")
    if not config.output_dir:
        model_id = settings["model"]["model_id"]
        model = Path(model_id).resolve().name if Path(model_id).exists() else model_id
        folder = Path(config.results_dir, model, config.run_name or f"{loop}-{time.strftime('%Y%m%d-%H%M%S')}")
    claim, told = None, [str(folder), None, None, False]
    if accelerator.is_main_process:
        try:
            check_trackers(config.report_to, config.mlflow_uri or None)
            claim, folder, earlier = _take_folder(config, folder)
            told = [str(folder), None, earlier, any((folder / "checkpoints").glob("[!.]*-step*[0-9]"))]
        except ValueError as error:
            told[1] = str(error)
    name, problem, earlier, saved = broadcast_object_list(told)
    if problem:
        raise ValueError(problem)
    folder = Path(name)
    checkpoint = find_checkpoint(folder, config.resume_from, accelerator=accelerator)
    if checkpoint is None and saved and config.resume_from != "none":
        best = config.resume_from == "best"
        why = "is whole and was saved with save_best" if best else "is whole"
        raise ValueError(f"{folder} has checkpoints, but none {why}; name one by its path, or set none.")
    if checkpoint is None and earlier == {}:
        raise ValueError(
            f"{folder} has no checkpoint to resume from, and starting anew would overwrite what it holds "
            f"({_contents(folder)}): give another output_dir."
        )
    return Run(config, accelerator, loop, resolved, settings, folder, checkpoint, sharding, claim, earlier)


def _take_folder(config: RunConfig, folder: Path) -> tuple[IO, Path, dict | None]:
    """(claim, folder, what it holds of a run that may start anew there: its identity, {} where none may, None where it
    is empty). A name made from the time gets a number where it is taken.

    Raises ValueError where another process runs there, where it cannot be written, or holds files and is not resumed.
    """
    names = [folder]
    if not (config.output_dir or config.run_name):
        names += [folder.with_name(f"{folder.name}-{number}") for number in range(2, 100)]
    wanted, problem = config.resume_from, ""
    for folder in names:
        with writing_to(folder):
            claim, taken = claim_folder(folder), _contents(folder)
            inside = Path(wanted).resolve().parent.parent == folder.resolve()
            if claim is None:
                problem = f"output_dir {folder} is in use by another process: wait for it, or give another one."
            elif taken and (wanted == "none" or wanted not in ("latest", "best") and not inside):
                problem = f"output_dir {folder} already holds files ({taken}): give another, or resume_from: latest."
                release_claim(claim)
            else:
                ended = (folder / "model").exists()
                known = {} if ended else read_json(folder / "provenance.json").get("identity", {})
                return claim, folder, known if taken else None
    raise ValueError(problem)


def _contents(folder: Path) -> str:
    """Names of the files in a folder, for messages: none where all are hidden, or a save that was cut off left them."""
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    empty = (folder / "checkpoints").is_dir() and all(p.name[0] == "." for p in (folder / "checkpoints").iterdir())
    shown = [name for name in names if name[0] != "." and not (empty and name == "checkpoints")]
    return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")


def claim_folder(folder: Path) -> IO | None:
    """An open file that only this process has locked, until it ends, however it does; None where another one has it.

    It lies in the folder, or in the nearest one above that is there. File systems without locks give it to everybody.
    """
    folder = folder.resolve()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    name = ".claim" if place == folder else f".claim-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    file = open(place / name, "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
            raise BlockingIOError  # its holder is just leaving
    except (BlockingIOError, PermissionError, FileNotFoundError):
        file.close()
        return None
    except OSError:
        pass
    atexit.register(release_claim, file)
    return file


def release_claim(claim: IO | None) -> None:
    """Give a folder back: remove the file, then the lock."""
    if claim is not None and not claim.closed:
        Path(claim.name).unlink(missing_ok=True)
        claim.close()


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Errors of the file system as one sentence."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be written ({error.strerror}): give another one.") from error


def read_json(path: Path) -> dict:
    """A JSON file's mapping; empty where there is none."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    return {}


MARK = "run.json"  # in an exported folder: which run wrote it, after which step, which files
# Settings that a run may change when it is resumed: they cost time or memory only, ...
FREE = {"gradient_checkpointing", "activation_offloading", "compile", "attn_implementation", "merge_weights"}
FREE |= {"bnb_4bit_quant_storage", "eval_reward", "precompute_ref_log_probs", "prompts_per_step"}
# ... or decide what is compared itself: the rows, and the weights and the dtype that training began with.
OF_WEIGHTS = ("model_id", "revision", "torch_dtype", "from_scratch", "trust_remote_code")


def settings_of_identity(loop: str, settings: dict) -> dict:
    """`decides`: settings that make it another run; `rows_from`, `weights_from`: those that explain other digests."""
    own = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    model, rollout = settings["model"], settings.get("rollout", {})
    decides = {**own, **model, **settings.get("reward", {})}
    if loop == "grpo":
        decides |= {key: rollout[key] for key in ("num_generations", *vars(Sampling())) if key in rollout}
    for key in (*FREE, *OF_WEIGHTS, "tokenizer_id"):
        decides.pop(key, None)
    unused = ("lora_", "use_", "modules_to_save") if not model["lora_r"] else ()
    unused += () if model["load_in_4bit"] else ("bnb_",)
    decides = {key: value for key, value in decides.items() if key == "lora_r" or not key.startswith(unused)}
    rows = {"tokenizer_id": model["tokenizer_id"], **settings["data"], **settings.get("encode", {})}
    given = settings.get("reward", {}).get("reward_functions", ())
    for name in given.split(",") if isinstance(given, str) else given:  # told on resume: a reward may be mended
        module, _, function = name.strip().partition(":")
        with suppress(KeyError, AttributeError, OSError, TypeError):  # one of ours, or without source
            source = inspect.getsource(getattr(sys.modules[module], function)).encode()
            rows[f"code of {name.strip()}"] = hashlib.sha256(source).hexdigest()[:8]
    found = {"decides": decides, "rows_from": rows, "weights_from": {key: model[key] for key in OF_WEIGHTS}}
    return json.loads(json.dumps(without_passwords(found)))


def refuse_other_run(where: str, old: dict, new: dict) -> None:
    """Raise ValueError, naming what differs, unless a run with the identity `new` may go on from `old`.

    What an older version did not record is not compared.
    """

    def differing(before: dict, after: dict) -> list[str]:
        return [f"{k} {before[k]} and this run {v}" for k, v in after.items() if k in before and before[k] != v]

    def pick(identity: dict, *keys: str) -> dict:
        return {key: identity[key] for key in keys if key in identity}

    sizes = ("loop", "seed", "rows", "packing_strategy", "mixed_precision")
    found = differing(pick(old, *sizes), pick(new, *sizes)) + differing(old.get("decides", {}), new["decides"])
    for digest, source, name in (("digest", "rows_from", "dataset_name"), ("weights", "weights_from", "model_id")):
        if digest in old and old[digest] != new.get(digest):
            found += differing(old.get(source, {}), new[source])
            what = "rows" if digest == "digest" else "weights or another config.json"
            found = found or [f"other {what} in {name} {new[source][name]} than are there now"]
    if found:
        raise ValueError(
            f"{where} has {', '.join(found)}: it is of another run; resume it with its own settings, or start this one "
            f"in another output_dir."
        )
    for words in differing(pick(old, "rows_per_step"), pick(new, "rows_per_step")):
        key = "prompts_per_step" if new["loop"] == "grpo" else "train_batch_size"
        raise ValueError(
            f"{where} has {words}, which has another number of processes or another batch size: set {key}: "
            f"{old['rows_per_step']} to go on with it."
        )


def rows_digest(rows: Sequence) -> str:
    """Of encoded rows in their order: token ids, targets, and the columns that rewards read."""
    digest = hashlib.sha256()
    for row in rows:
        for name, value in vars(row).items():
            if name == "number":  # its place in the data, for messages
                continue
            try:
                part = array("q", value).tobytes()
            except TypeError:
                part = json.dumps(value, default=lambda one: type(one).__name__, skipkeys=True).encode()
            digest.update(b"%d " % len(part) + part)
    return digest.hexdigest()


def weights_digest(model: Any, values: bool) -> str:
    """Of the model's config and of its weights' names, shapes and dtypes and, with `values`, 64 values of each."""
    config = {key: value for key, value in model.config.to_diff_dict().items() if key[0] != "_"}
    for key in ("transformers_version", "dtype", "torch_dtype", "quantization_config", "use_cache"):
        config.pop(key, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        digest.update(f"{plain_name(name)} {tuple(weight.shape)} {weight.dtype}".encode())
        if values and not weight.is_meta:
            digest.update(flat[:: max(1, len(flat) // 64)][:64].to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


def _check_evaluation(config: RunConfig, settings: dict) -> None:
    """Refuse, or name, what asks for evaluations where there are no rows for them."""
    data = settings["data"]
    if data["eval_dataset_name"] or data["eval_split_ratio"]:
        return
    if (config.save_best or "").startswith("eval/"):
        raise ValueError(
            f"save_best is {config.save_best} and there are no evaluation rows: set eval_dataset_name or "
            f"eval_split_ratio."
        )
    if config.eval_steps:
        logger.warning("eval_steps is %d and there are no evaluation rows: nothing is evaluated", config.eval_steps)


def _threads_are_set() -> bool:
    """Whether somebody chose the number of threads; one a process is the launcher's own choice."""
    words, before = _launcher_words(), b""
    if not words:
        return "OMP_NUM_THREADS" in os.environ
    with suppress(OSError):
        before = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    chosen = any(word.partition("=")[0] == "--num_cpu_threads_per_process" for word in words)
    return chosen or any(line.startswith(b"OMP_NUM_THREADS=") for line in before.split(b"\0"))


def available_cpus(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this process may use at once: those it may run on, within its container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # version 2, version 1
        with suppress(OSError, ValueError):
            quota, period = " ".join((groups / name).read_text() for name in names).split()
            if int(quota) > 0:
                count = min(count, max(1, int(quota) // int(period)))
    return count


def _find_sharding(config: RunConfig, loop: str, processes: int) -> Sharding | None:
    """What the config or the launcher says about sharding; both at once, or something else than FSDP, is an error."""
    launcher = read_launcher_sharding(os.environ)
    own = read_sharding(config.fsdp, config.fsdp_config, config.cpu_offload)
    if launcher and own:
        raise ValueError("fsdp is set in the config and in the launcher's file; leave it in one of them.")
    for name, word in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if os.environ.get(name, "false").lower() == "true":
            raise ValueError(f"the launcher asks for {word}; the loops shard with FSDP2: set fsdp: full_shard instead.")
    asked = 1 if processes > 1 else _asked_processes()
    if asked > 1:
        raise ValueError(
            f"the launcher was asked for {asked} processes and started one; start with `accelerate launch --multi_gpu "
            f"--num_processes {asked} loops/{loop}.py ...` (on CPUs too), or with --num_processes 1."
        )
    return own or launcher


def _launcher_words() -> list[str]:
    """The arguments of the `accelerate launch` above this process; empty where there is none, or none can be seen."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")[:-1]
    except OSError:  # no such file outside Linux
        return []
    if "launch" not in words or not any("accelerate" in word for word in words[: words.index("launch")]):
        return []
    return words[words.index("launch") + 1 :]


def _asked_processes() -> int:
    """Processes that `accelerate launch` was asked for; 1 where that cannot be seen.

    With `--cpu`, or `use_cpu: true` in its file, it starts one process whatever the number, and tells it nothing.
    """
    words = _launcher_words()
    if not words:
        return 1
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    arguments, _ = launch_command_parser().parse_known_args(words)
    if arguments.num_processes is not None:
        return arguments.num_processes
    file = arguments.config_file or (default_config_file if Path(default_config_file).is_file() else None)
    return load_config_from_file(file).num_processes if file else 1


def _check_launcher(
    accelerator: Accelerator, loop: str, processes: int, sharding: Sharding | None, precision: str
) -> None:
    """Raise ValueError where the launcher set what the loop sets itself, or gave less than it was asked for."""
    if accelerator.num_processes != processes:
        raise ValueError(
            f"the launcher asked for {processes} processes but this one runs alone; start with "
            f"`accelerate launch --multi_gpu --num_processes {processes} loops/{loop}.py ...`, on CPUs too."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError("gradient_accumulation_steps is set in the launcher; give it to the loop instead.")
    assert is_sharded(accelerator) == (sharding is not None and processes > 1), accelerator.distributed_type
    assert accelerator.mixed_precision == precision


def _is_shown(name: str, value: float, metrics: dict) -> bool:
    """Whether an evaluation's number is for the terminal: no loss that is minus the reward, no count of nothing."""
    negated = name == "eval/loss" and "eval/reward" in metrics
    return name.startswith("eval/") and not negated and not (name == "eval/missing" and not value)


def add_sums(into: dict, terms: dict) -> None:
    """Add a micro-batch's detached sums to the step's; names that end in `_max` keep the larger value.

    Tensors stay on their device, so that nothing waits for it between micro-batches.
    """
    for name, value in terms.items():
        value = torch.as_tensor(value, dtype=torch.float64)
        if name not in into:
            into[name] = value
        else:
            into[name] = torch.maximum(into[name], value) if name.endswith("_max") else into[name] + value


def reduce_sums(accelerator: Accelerator, sums: dict) -> dict[str, float]:
    """The step's sums over all processes, in one exchange; `..._max`, time/ and optim/ by maximum.

    Processes may hold different names (one that had nothing to do holds few): a missing name adds nothing.
    """
    total: dict[str, float] = {}
    for terms in gather_object([{name: float(value) for name, value in sums.items()}]):
        for name, value in terms.items():
            if name.endswith("_max") or name.startswith(("time/", "optim/")):
                larger = math.nan if math.isnan(value) else max(value, total.get(name, value))
                total[name] = math.nan if math.isnan(total.get(name, value)) else larger
            else:
                total[name] = total.get(name, 0.0) + value
    return total


_settings: dict = {}  # of the run that this process is in, for advice when memory runs out


@contextmanager
def one_sentence_errors(prog: str) -> Iterator[bool]:
    """End with exit code 2 and one sentence for bad input; anything unexpected keeps its traceback.

    Bad input is a ValueError or FileNotFoundError raised by this project's own code (not from inside a library) while
    everything is built: once a step is on the stack, it is a mistake in the code. User code that calls `exit()`
    ends the run with 1: only this project's own ends have the code 0. torchrun is left the sentence for its own last
    lines, so of several processes only a machine's first one prints it; yields whether this one does.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    prints = not file or os.environ.get("LOCAL_RANK", "0") == "0"

    def leave(text: str) -> None:
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(file or os.devnull).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))

    def end(sentence: object, code: int) -> NoReturn:
        text = printable(f"{prog}: error: {sentence}")
        leave(text)
        if prints:
            print(text, file=sys.stderr, flush=True)
        raise SystemExit(code) from None

    try:
        yield prints
    except SystemExit as stop:
        frames = traceback.extract_tb(stop.__traceback__)
        ends = (Path(__file__), Path(__file__).resolve().parents[2] / "configs/loader.py")
        if stop.code not in (None, 0) or Path(frames[-1].filename).resolve() in ends:
            if isinstance(stop.__context__, ValueError):
                leave(f"{prog}: {stop.__context__}")
            raise
        caller = next(frame for frame in reversed(frames) if not frame.filename.startswith("<frozen"))
        place = f"{caller.filename} line {caller.lineno}"
        end(f"code of the run's own called exit() ({place}): nothing was exported; let it raise an error.", 1)
    except (FloatingPointError, WrongLogits) as error:
        end(error, 1)
    except torch.OutOfMemoryError as error:
        traceback.print_exc()
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        end(explain_out_of_memory(error, _settings, num_processes=processes), 1)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        house = Path(__file__).resolve().parents[2]
        ours = Path(frames[-1].filename).resolve()
        in_a_step = any(frame.name in ("sample_batch", "build_microbatches", "train_step") for frame in frames)
        rooms = ("loops", "losses", "data", "configs", "launch")
        expected = isinstance(error, ValueError | FileNotFoundError) and not in_a_step
        if expected and any(ours.is_relative_to(house / room) for room in rooms):
            end(error, 2)
        leave(f"{type(error).__name__}: {error}")
        raise


def _quieten(is_main: bool) -> None:
    """Keep the terminal for the run: no libraries' progress bars but those of a download that somebody waits for."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    watched = is_main and sys.stderr.isatty() and not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # the hub's too
    if watched:
        enable_progress_bars()
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


def _provenance(accelerator: Accelerator, seed: int, identity: dict) -> dict:
    """Where this run came from: command, code, packages, machine, and what makes another run another one."""

    def git(*words: str) -> str | None:
        try:
            here = Path(__file__).parent
            return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None  # not a checkout: an installed copy has no commit to name

    changes = git("status", "--porcelain")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": without_passwords(sys.argv),
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
        "identity": identity,
    }
