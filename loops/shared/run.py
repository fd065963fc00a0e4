"""Starting a run: the accelerator, the seeds, the run folder, the resolved config and where the code came from."""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import math
import os
import random
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import nn

from loops.shared.checkpoint import NotSaved, Saver, load_checkpoint
from loops.shared.checkpoint_files import AlteredError, find_checkpoint, read_extra, read_manifest, read_state
from loops.shared.failures import TERMINATED, FiniteGuard, StopRequest, Watch, explain_out_of_memory, group_timeout
from loops.shared.identity import (
    package_versions,
    provenance,
    refuse_other_run,
    rows_digest,
    settings_of_identity,
    weights_digest,
)
from loops.shared.launcher import start_accelerator, started_by_accelerate
from loops.shared.metrics import Metrics
from loops.shared.models import ModelConfig
from loops.shared.run_folder import claim_folder, list_contents, read_json, release_claim, take_folder, writing_to
from loops.shared.sharding import Sharding, is_sharded, prepare, read_sharding, sharding_line
from loops.shared.tracking import (
    SilentTracker,
    Tracker,
    TrackerSettings,
    check_trackers,
    leaf_values,
    printable,
    start_tracking,
    without_passwords,
)
from loops.shared.weights import WrongLogits, check_export, export_model, logits_of

logger = logging.getLogger(__name__)

BUILDING, STARTING, EXPORTING = "building", "starting", "exporting"  # phases of a run that are no part of a step
MARK = "run.json"  # in an exported folder: which run wrote it, after which step, which files


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
    """Seconds without news of a process after which the run ends."""
    collective_timeout: float = 1800.0
    """Seconds that processes wait for one that is alive but behind (in a slow reward function, for example)."""

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
    phase: str = BUILDING
    stopping: bool = False  # some process was asked to stop; all of them know after the step's `reduce`

    def __post_init__(self) -> None:
        accelerator, config = self.accelerator, self.config
        self.guard = FiniteGuard(accelerator, config.on_non_finite)
        # `accelerate launch` passes no signal on to a single process, which has to watch for its end
        alone = accelerator.num_processes == 1 and started_by_accelerate()
        self.stop = StopRequest(verbose=accelerator.is_main_process, follow_parent=alone)
        self.watch = Watch(
            accelerator,
            heartbeat_timeout=config.heartbeat_timeout,
            collective_timeout=config.collective_timeout,
            stop=self.stop,
        )
        self.watch.start()
        self.saver = Saver(self.folder, accelerator=accelerator, keep=config.save_total_limit)

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
        self.phase = what
        self.watch.set_phase(step, what)

    def reduce(self, metrics: Metrics) -> dict[str, float]:
        """The step's numbers over all processes; afterwards all of them agree whether the run is to stop."""
        metrics.max("stop", float(self.stop.requested))
        numbers = metrics.reduce(self.accelerator)
        self.stopping = numbers.pop("stop") > 0
        if self.guard.skipped:
            numbers["optim/skipped_steps"] = float(self.guard.skipped)
        return numbers

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
            self.reduce(Metrics())
        return self.stopping or (self.config.save_steps > 0 and self._due(step, self.config.save_steps))

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write the metrics of a step to metrics.jsonl and the trackers; evaluations are also printed."""
        metrics, self.pending = metrics | self.pending, {}
        if self.config.on_non_finite == "skip":
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        name, model = "optim/unchanged", self.settings.get("model", {})
        bf16 = model.get("torch_dtype") == "bfloat16" and not model.get("lora_r")
        if bf16 and name in metrics and name not in self.latest:
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

    def prepare(self, policy: nn.Module, optimizer, reference=None):
        """(policy, optimizer), wrapped or sharded; from here on each process has random numbers of its own."""
        values = not self.settings.get("model", {}).get("from_scratch")
        digest = weights_digest(policy, values) if self.accelerator.is_main_process else None
        self.identity["weights"] = broadcast_object_list([digest])[0]
        self.reference = reference
        prepared = prepare(self.accelerator, policy, optimizer, reference=reference, sharding=self.sharding)
        self.print_main(sharding_line(self.accelerator, policy, self.sharding))
        for sentence in self.sharding.ignored if self.sharding else ():
            self.print_main(f"fsdp: ignored {sentence}")
        seed = self.config.seed + self.accelerator.process_index  # for dropout; the weights are built
        random.seed(seed)
        torch.manual_seed(seed)
        return prepared

    def create_folder(self, total_steps: int, *, rows: Sequence, **sizes: int | str) -> None:
        """Create the run folder with the resolved config and provenance, and start the trackers.

        Of a run that is resumed `resume` does that, so that a checkpoint that does not fit changes nothing. Call this
        when everything is built, so that bad input writes nothing. rows: the encoded training rows; sizes: what else
        decides which rows a step has. Raises ValueError where the checkpoint to resume from is of another run; ends
        the process where the run in the folder has no step left.
        """
        self.phase, self.total_steps = STARTING, total_steps
        self.identity |= {"loop": self.loop, "seed": self.config.seed, "rows": len(rows), **sizes}
        self.identity |= {"digest": rows_digest(rows), "mixed_precision": self.accelerator.mixed_precision}
        self.identity |= settings_of_identity(self.settings)
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
                text = json.dumps(provenance(self.accelerator, self.config.seed, self.identity), indent=1)
                hidden = self.folder / f".{name}"  # a folder with nothing but hidden files is empty
                hidden.write_text(text + "\n")
                os.replace(hidden, self.folder / name)
        try:
            self.tracker = start_tracking(
                self.accelerator,
                TrackerSettings(
                    self.config.report_to,
                    run_name=self.config.run_name or None,
                    project=self.config.mlflow_experiment_name or None,
                    mlflow_uri=self.config.mlflow_uri or None,  # SageMaker's files leave it as an empty text
                    logging_steps=self.config.logging_steps,
                ),
                folder=self.folder,
                config=self.settings,
                resume_step=step,
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
        objects["reference"] = self.reference.tensors() if self.reference is not None else None
        skipped: list[Path] = []
        while True:
            try:
                state = load_checkpoint(self.checkpoint, accelerator=self.accelerator, **objects)
                break
            except AlteredError as error:
                skipped.append(self.checkpoint)
                wanted = self.config.resume_from if self.config.resume_from in ("latest", "best") else "none"
                found = find_checkpoint(self.folder, wanted, accelerator=self.accelerator, without=skipped)
                if found is None:
                    raise
                self.checkpoint = found
                self.print_main(f"skipped: {error}")
        self._begin(state["step"])
        self.print_main(f"resuming from {self.checkpoint}")
        told = {key: value for key, value in self.identity["rows_from"].items() if key.startswith(("eval_", "code "))}
        now = {"steps in total": self.total_steps, **self.settings.get("optim", {}), **told}
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

    def show_completions(self, rollouts: Sequence, advantages: list[float], step: int) -> None:
        """A few rollouts of the first prompt with their rewards, in the run folder and as a table, when that is due."""
        every = self.config.log_completions_steps
        if not (every and self._due(step, every)):
            return
        rows = []
        for rollout, advantage in zip(rollouts[:4], advantages, strict=False):
            completion, parts = rollout.completion, {f"reward/{name}": value for name, value in rollout.rewards.items()}
            total = None if math.isnan(rollout.reward) else rollout.reward
            row = {"prompt": rollout.prompt.text, "completion": completion.text, "reward": total}
            row |= (parts if len(parts) > 1 else {}) | {"advantage": advantage}
            rows.append(row | {"finish_reason": completion.finish_reason, "tokens": len(completion.token_ids)})
        if rows:
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
        if self.reference is not None:
            self.saver.reference = self.reference.tensors()
        try:
            self.saver.save(
                model=policy,
                optimizer=optimizer,
                scheduler=scheduler,
                state={
                    **{"step": step, "epoch": epoch, "total_steps": self.total_steps, **self.identity},
                    "stops": self.accelerator.unwrap_model(policy).generation_config.eos_token_id,  # for exports
                    **{part: self.settings[part] for part in ("model", "optim") if part in self.settings},
                },
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
        self.set_phase(self.total_steps, EXPORTING)
        folder = self.folder / "model"
        card = {
            "base_model": config.model_id,
            "loop": self.loop,
            "dataset": self.settings.get("data", {}).get("dataset_name"),
            "command": "accelerate launch " + " ".join(sys.argv),
            "settings": self.settings.get("optim", {}) | self.settings.get("batch", {}),
            "versions": package_versions(),
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
    global _current
    if expandable_segments:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    values = leaf_values(settings)
    _check_evaluation(config, values)
    own = read_sharding(config.fsdp, config.fsdp_config, config.cpu_offload)
    accelerator, sharding = start_accelerator(config.mixed_precision, own, group_timeout(config.collective_timeout))
    set_seed(config.seed)
    _quieten(accelerator.is_main_process)

    names = [Path(config.output_dir or config.results_dir)]
    if not config.output_dir:
        model_id = values.get("model_id") or "model"
        model = Path(model_id).resolve().name if Path(model_id).exists() else model_id
        name = config.run_name or f"{loop}-{time.strftime('%Y%m%d-%H%M%S')}"
        more = [] if config.run_name else [f"{name}-{number}" for number in range(2, 100)]
        names = [Path(config.results_dir, model, each) for each in (name, *more)]
    claim, told = None, [str(names[0]), None, None, False]
    if accelerator.is_main_process:
        try:
            check_trackers(config.report_to, config.mlflow_uri or None)
            claim, folder, earlier = take_folder(names, config.resume_from)
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
        why = "is complete and was saved with save_best" if best else "is complete"
        raise ValueError(f"{folder} has checkpoints, but none {why}; name one by its path, or set none.")
    if checkpoint is None and earlier == {}:
        raise ValueError(
            f"{folder} has no checkpoint to resume from, and starting anew would overwrite what it holds "
            f"({list_contents(folder)}): give another output_dir."
        )
    _current = Run(config, accelerator, loop, resolved, settings, folder, checkpoint, sharding, claim, earlier)
    return _current


def _check_evaluation(config: RunConfig, values: dict) -> None:
    """Refuse, or warn about, settings that ask for evaluations where there are no rows for them."""
    if values.get("eval_dataset_name") or values.get("eval_split_ratio"):
        return
    if (config.save_best or "").startswith("eval/"):
        raise ValueError(
            f"save_best is {config.save_best} and there are no evaluation rows: set eval_dataset_name or "
            f"eval_split_ratio."
        )
    if config.eval_steps:
        logger.warning("eval_steps is %d and there are no evaluation rows: nothing is evaluated", config.eval_steps)


def _is_shown(name: str, value: float, metrics: dict) -> bool:
    """Whether an evaluation's number is for the terminal: no loss that is minus the reward, no count of nothing."""
    negated = name == "eval/loss" and "eval/reward" in metrics
    return name.startswith("eval/") and not negated and not (name == "eval/missing" and not value)


_current: Run | None = None  # the run of this process, for messages about errors


@contextmanager
def one_sentence_errors(prog: str) -> Iterator[bool]:
    """End with exit code 2 and one sentence for bad input; anything unexpected keeps its traceback.

    Bad input is a ValueError or FileNotFoundError raised by this project's own code (not from inside a library) before
    the first step or after the last one: during the steps it is a mistake in the code. User code that calls `exit()`
    ends the run with 1, since nothing was exported. Under torchrun, which prints the sentence itself from a file, only
    the first process of a machine prints it; yields whether this one does.
    """
    global _current
    _current = None
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
        try:
            yield prints
        except BaseException:
            for closer in _current.closers if _current else ():
                with suppress(Exception):
                    closer()  # an engine: Python waits for the threads of a rollout under way before anything else
            raise
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
        settings = _current.settings if _current else {}
        phase = _current.phase if _current else BUILDING
        files = [Path(frame.filename).parent.name for frame in traceback.extract_tb(error.__traceback__)]
        place = "sampling" if "rollout" in files else "reading the weights" if phase == BUILDING else "training"
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        end(explain_out_of_memory(error, leaf_values(settings), place=place, num_processes=processes), 1)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        house = Path(__file__).resolve().parents[2]
        ours = Path(frames[-1].filename).resolve()
        in_a_step = _current is not None and _current.phase not in (BUILDING, STARTING, EXPORTING)
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
        warnings.filterwarnings("ignore", "a reward failed")  # all processes know the failure, one prints it
