"""Atomic, asynchronous, sharded checkpoints; bitwise resume.

A checkpoint (its files: checkpoint_files.py) holds tensors by name, in pieces, so it does not depend on how the model
was wrapped or sharded. A frozen base is not written; it is read from its own folder.

All files are written into `.tmp-NAME`, which is renamed when every byte is on disk; the oldest checkpoints are removed
only after that. One of the same name is `.old-NAME` between the two renames, and `find_checkpoint` knows it: once there
was a complete checkpoint, there always is one.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import pickle
import random
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor

from loops.shared.checkpoint_files import (
    FORMAT,
    MANIFEST,
    METADATA,
    MOMENT,
    OPTIMIZER,
    REFERENCE,
    REPLACED,
    STATE,
    TEMPORARY,
    TENSORS,
    WEIGHT,
    AlteredError,
    agreed_manifest,
    clear_leftovers,
    compare_checksums,
    extra_file,
    flush_to_disk,
    prune,
    rank_file,
    read_state,
    read_tensors,
    sealed,
    stored_tensors,
    whole_checkpoints,
)
from loops.shared.layers import plain_name, reshard
from loops.shared.optimizer_state import load_state, state_to_tensors

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim.lr_scheduler import LRScheduler

logger = logging.getLogger(__name__)

REPORT = ".report"  # ending of what each rank leaves in the temporary folder when its files are on disk

Best = tuple[str, float, bool]  # name of a metric, its value now, whether greater is better


class NotSaved(OSError):
    """A checkpoint could not be written; its text is one sentence, the same on every rank. Older ones stay."""


class Saver:
    """Writes the checkpoints of a run, one at a time; with `wait=False` in a thread of its own while training goes on.

    The thread works on copies in host memory (kept for the next save: they cost this rank's share of a checkpoint) and
    talks to other ranks through files only, so its work cannot get between the training's collectives. Rank 0 waits for
    the others' files as long as they grow, `deadline` seconds beyond (20 once its main thread has ended).

    Ranks that do not see rank 0's folder (other machines without a shared disk) write nothing: while copies are made
    they send what only they hold to those that do, so that the checkpoint is complete on rank 0's machine, whose host
    memory must have room for it.
    """

    def __init__(self, folder: Path | str, *, accelerator: Accelerator, keep: int = 0, deadline: float = 300.0):
        """keep: after a save so many checkpoints stay, the newest (0: all), and besides them the best."""
        self.parent = Path(folder) / "checkpoints"
        self.accelerator, self.keep = accelerator, keep
        self.deadline = deadline
        self.buffers: dict[Any, Tensor] = {}
        self.reference: Mapping[str, Tensor] = {}  # what follows the policy and is saved with it
        self.agreed: _Agreed | None = None
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None

    def save(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler,
        state: Mapping[str, Any],
        best: Best | None = None,
        extra: Mapping[str, Any] | None = None,
        wait: bool = True,
    ) -> Path:
        """Write `checkpoints/KIND-epochEE-stepNNNNNN` and return its path; every rank must call this.

        state: what the loop needs on resume (JSON types): `step`, the optimizer steps done, and anything else; its
        `epoch`, if any, shows in the name. KIND is lora where the model has adapters, else full. best: the metric by
        which the best checkpoint is kept; without it that of the newest save that had one counts (NaN is never best).
        extra: what each rank has of its own, in types that `torch.load(weights_only=True)` reads.

        Returns when all is on disk, or with `wait=False` when it is copied; then the next `save` or `wait` waits for
        the rest and raises its error. Raises NotSaved where the files cannot be written (a full disk), TypeError for a
        state that is not JSON, ValueError for other bad input.
        """
        self.wait()
        job: _Job | None = None
        problem: Exception | None = None
        try:
            job = self._prepared(model, optimizer, scheduler, state, best, extra)
        except (TypeError, ValueError) as error:  # before the first file, so that wrong input costs nothing
            problem = error
        raise_first(self.accelerator, problem)
        assert job is not None
        self._plan(job)
        self._stage(job, None if wait else self.buffers)
        if wait:
            self._run(job, in_background=False)
            self._raise_failure()
        else:
            name = f"checkpoint {job.final.name}"
            self.thread = threading.Thread(target=self._run, args=(job,), kwargs={"in_background": True}, name=name)
            self.thread.start()
        return job.final

    def wait(self) -> None:
        """Return when nothing is being written any more; every rank must call this. Raises NotSaved as `save` does."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
            self._raise_failure()

    def _raise_failure(self) -> None:
        failure, self.failure = self.failure, None
        raise_first(self.accelerator, failure)

    def _prepared(self, model, optimizer, scheduler, state, best, extra) -> _Job:
        """Everything that is written, without a copy of the tensors; no rank waits for another."""
        reshard(model)
        parameters = dict(trainable_parameters(self.accelerator.unwrap_model(model)))
        moments, record, own = state_to_tensors(optimizer, parameters)
        tensors = {WEIGHT + name: parameter.detach() for name, parameter in parameters.items()}
        tensors |= {MOMENT + key: tensor for key, tensor in moments.items()}
        tensors |= {REFERENCE + name: tensor for name, tensor in self.reference.items()}
        step, kind = state["step"], "lora" if any("lora_" in name for name in parameters) else "full"
        rank = self.accelerator.process_index
        blobs = {rank_file(rank): packed({"random": random_state(self.accelerator.device), "optimizer": own})}
        if extra:
            try:
                blobs[extra_file(rank)] = packed(dict(extra))
                torch.load(io.BytesIO(blobs[extra_file(rank)]), weights_only=True)
            except (pickle.PickleError, AttributeError, TypeError) as error:
                raise ValueError(f"extra holds what a checkpoint cannot give back: {error}") from error
        if self.accelerator.is_main_process:
            blobs[OPTIMIZER] = packed({**record, "scheduler": scheduler.state_dict()})
            blobs[STATE] = json.dumps(state).encode()
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "kind": kind,
            "step": step,
            "world_size": self.accelerator.num_processes,
            "device": self.accelerator.device.type,
        }
        if best is not None:
            name, value, greater = best
            manifest["metrics"] = {name: value if math.isfinite(value) else None}
            manifest["best"] = {"metric": name, "greater_is_better": greater}
        final = self.parent / f"{kind}-epoch{int(state.get('epoch', 0)):02d}-step{step:06d}"
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())  # whole ones, not the shards
        # A shard without elements would only repeat the place of another one.
        tensors = {key: t for key, t in tensors.items() if not (isinstance(t, DTensor) and t.to_local().numel() == 0)}
        writer = _Writer(self.parent / (TEMPORARY + final.name))
        return _Job(final, manifest, blobs, size, _Planner(tensors), writer)

    def _plan(self, job: _Job) -> None:
        """Make the temporary folder and agree on who writes what; tensors that ranks hold alike are shared out."""
        main, rank = self.accelerator.is_main_process, self.accelerator.process_index
        mark = job.temporary / f"0{REPORT}"  # tells this folder from what a killed run left on another machine's disk
        told: list[Any] = [None, str(time.time_ns())]
        if main:
            try:
                clear_leftovers(self.parent)
                job.temporary.mkdir(parents=True)
                mark.write_text(told[1])
            except Exception as error:
                told[0] = not_saved(job, error)
        problem, token = broadcast_object_list(told)
        if problem is not None:
            raise problem
        sees = False
        with suppress(OSError):
            sees = mark.read_text() == token
        job.writer.set_up_storage_writer(main)
        local, before = job.planner.create_local_plan(), self.agreed
        answers = gather_object([(sees, before is not None and before.local == local)])
        seeing = [one for one, (sees, _) in enumerate(answers) if sees]
        if before is None or before.seeing != seeing or not all(same for _, same in answers):
            plans, sent = hand_over(gather_object([local]), seeing)
            plans, metadata = job.planner.create_global_plan(plans)  # the same on every rank, from the same plans
            self.agreed = _Agreed(local, seeing, job.writer.prepare_global_plan(plans)[rank], sent, metadata)
            if main and sent and (before is None or before.seeing != seeing):
                logger.warning(
                    "%d of %d ranks, the first of them %d, do not see %s, so checkpoints are gathered and are whole "
                    "on the machine of rank 0 only: to resume, copy them to every machine",
                    *(len(sent), len(answers), min(sent), self.parent),
                )
        assert self.agreed is not None
        job.agreed = self.agreed

    def _stage(self, job: _Job, buffers: dict[Any, Tensor] | None) -> None:
        """Copy what this rank writes into `buffers` (None copies nothing), and bring over what it writes for others.

        One tensor at a time is on its way. Every rank must call this.
        """
        rank, device, agreed = self.accelerator.process_index, self.accelerator.device, job.agreed
        for source, items in agreed.sent.items():
            target = writer_for(source, agreed.seeing)
            if rank == source:
                distributed.send_object_list([job.blobs], target)
                for item in items:
                    distributed.send(as_bytes(job.planner.resolve_data(item).to(device)), target)
            elif rank == target:
                received: list[Any] = [None]
                distributed.recv_object_list(received, source)
                job.blobs |= received[0]
                for item in items:
                    wanted: Any = item.tensor_data
                    piece = torch.empty(wanted.chunk.sizes, dtype=wanted.properties.dtype, device=device)
                    distributed.recv(as_bytes(piece), source)
                    job.planner.stage(item, piece, {} if buffers is None else buffers)
        if buffers is not None:
            for item in agreed.plan.items:
                if item.index not in job.planner.staged:
                    job.planner.stage(item, job.planner.resolve_data(item), buffers)
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)

    def _run(self, job: _Job, in_background: bool) -> None:
        """Write this rank's files; on rank 0 also wait for the others', and give the folder its name."""
        try:
            self._write(job)
        except Exception as error:
            self.failure = not_saved(job, error)
        except BaseException as error:  # of a signal, in the main thread: the next save removes partial files
            if not in_background:
                raise
            self.failure = error
        finally:
            job.planner.staged = {}

    def _write(self, job: _Job) -> None:
        rank, folder = self.accelerator.process_index, job.temporary
        if rank not in job.agreed.seeing:
            return
        try:
            results = job.writer.write_data(job.agreed.plan, job.planner).wait()
            for name, data in job.blobs.items():
                (folder / name).write_bytes(data)
            names = {result.storage_data.relative_path for result in results} | job.blobs.keys()
            report = {"results": results, "files": {name: sealed(folder / name) for name in names}}
            if rank != 0:
                leave_report(folder, rank, report)
                return
            reports = {0: report} | self._reports(job)
            failed = next((report["error"] for report in reports.values() if "error" in report), None)
            if failed:
                raise NotSaved(failed)
            self._publish(job, reports)
        except Exception as error:
            if rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            for path in (*folder.glob(f"__{rank}_*"), *(folder / name for name in job.blobs)):
                path.unlink(missing_ok=True)  # a full disk then has room for the report
            with suppress(OSError):
                leave_report(folder, rank, {"error": str(not_saved(job, error))})
            raise

    def _reports(self, job: _Job) -> dict[int, dict[str, Any]]:
        """The reports of the other ranks that write, when all are there."""
        reports: dict[int, dict[str, Any]] = {}
        seen, since = -1, time.monotonic()
        while True:
            size = 0
            for entry in os.scandir(job.temporary):
                with suppress(FileNotFoundError):  # renamed or removed while we look
                    size += entry.stat().st_size
                    rank = int(entry.name.removesuffix(REPORT)) if entry.name.endswith(REPORT) else 0
                    if rank and rank not in reports:
                        reports[rank] = pickle.loads(Path(entry.path).read_bytes())
            missing = sorted(set(job.agreed.seeing) - {0} - reports.keys())
            if not missing or any("error" in report for report in reports.values()):
                return reports
            if size != seen:
                seen, since = size, time.monotonic()
            patience = self.deadline if threading.main_thread().is_alive() else min(self.deadline, 20.0)
            if time.monotonic() - since > patience:
                raise NotSaved(
                    f"{job.final} was not saved: rank {', '.join(map(str, missing))} wrote nothing for {patience:.0f} "
                    f"seconds; the checkpoint before it stays."
                )
            time.sleep(0.02)

    def _publish(self, job: _Job, reports: Mapping[int, Mapping[str, Any]]) -> None:
        """Rank 0: metadata, manifest, the rename, and only then the pruning."""
        folder, final = job.temporary, job.final
        job.writer.finish(job.agreed.metadata, [report["results"] for report in reports.values()])
        files = {name: entry for report in reports.values() for name, entry in report["files"].items()}
        files[METADATA] = sealed(folder / METADATA)
        for rank in reports:
            (folder / f"{rank}{REPORT}").unlink(missing_ok=True)
        others = whole_checkpoints(self.parent, warn=False)
        # Later than any other, also where the clock of this machine is behind that of the one before.
        latest = max((manifest["saved_at"] for _, manifest in others), default=0)
        manifest = {**job.manifest, "saved_at": max(time.time_ns(), latest + 1), "files": dict(sorted(files.items()))}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))
        flush_to_disk(folder / MANIFEST)
        flush_to_disk(folder)
        replaced = self.parent / (REPLACED + final.name)
        if final.exists():  # a run that went back and came to this step again
            os.replace(final, replaced)
        os.replace(folder, final)
        flush_to_disk(self.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        if self.keep > 0:
            prune(self.parent, self.keep)


@dataclass
class _Agreed:
    """What the ranks agreed on at the last save; used again while every rank has the same tensors to write."""

    local: SavePlan  # what this rank has
    seeing: list[int]  # ranks that see the folder, and write
    plan: SavePlan  # what this rank writes
    sent: dict[int, list[WriteItem]]  # what each other rank sends to `writer_for` it
    metadata: Metadata


@dataclass
class _Job:
    """A checkpoint that is being written."""

    final: Path
    manifest: dict[str, Any]
    blobs: dict[str, bytes]  # small files that this rank writes
    bytes: int  # of all ranks' tensors
    planner: _Planner
    writer: _Writer
    agreed: _Agreed = field(init=False)

    @property
    def temporary(self) -> Path:
        return self.final.parent / (TEMPORARY + self.final.name)


class _Writer(FileSystemWriter):
    """torch's writer, without a random number and this machine's path in the metadata."""

    def __init__(self, path: Path):
        super().__init__(path, sync_files=False)  # `sealed` does it, once for every kind of file

    def storage_meta(self) -> None:
        return None


class _Planner(DefaultSavePlanner):
    """torch's planner over flat names; the writer gets copies where `stage` made them, else the tensors themselves."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.set_up_planner(dict(tensors))
        self.staged: dict[Any, Tensor] = {}

    def stage(self, item: WriteItem, tensor: Tensor, buffers: dict[Any, Tensor]) -> None:
        """Begin to copy into a buffer in host memory, which is made where none fits."""
        key, on_device = (item.index.fqn, item.index.offset), tensor.device.type != "cpu"
        buffer = buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_device)
        self.staged[item.index] = buffer.copy_(tensor, non_blocking=on_device)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        staged = self.staged.get(write_item.index)
        return super().resolve_data(write_item) if staged is None else staged


def hand_over(plans: list[SavePlan], seeing: list[int]) -> tuple[list[SavePlan], dict[int, list[WriteItem]]]:
    """Let only the ranks in `seeing` write: (plans, what each other rank sends to `writer_for` it, each piece once)."""
    known = {item.index for rank in seeing for item in plans[rank].items}
    items = [list(plan.items) if rank in seeing else [] for rank, plan in enumerate(plans)]
    sent: dict[int, list[WriteItem]] = {}
    for rank in sorted(set(range(len(plans))) - set(seeing)):
        sent[rank] = [item for item in plans[rank].items if item.index not in known]
        known |= {item.index for item in sent[rank]}
        items[writer_for(rank, seeing)] += sent[rank]
    return [replace(plan, items=own) for plan, own in zip(plans, items, strict=True)], sent


def writer_for(rank: int, seeing: list[int]) -> int:
    return seeing[rank % len(seeing)]


def as_bytes(tensor: Tensor) -> Tensor:
    """[bytes] of a tensor, in its own memory where it is contiguous: not every backend sends every dtype."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def packed(value: object) -> bytes:
    """What `torch.save` would write."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def leave_report(folder: Path, rank: int, report: Mapping[str, Any]) -> None:
    """Tell rank 0 that this rank is done; the name appears with its contents."""
    part = folder / f"{rank}.part"
    part.write_bytes(pickle.dumps(dict(report)))
    os.replace(part, folder / f"{rank}{REPORT}")


def not_saved(job: _Job, error: BaseException) -> BaseException:
    """An error of writing as one sentence; any other as it is."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):  # torch's writer turns some into a RuntimeError
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, NotSaved) or cause is None:
        return error
    parent = next(path for path in (job.final.parent, *job.final.parent.parents) if path.exists())
    free, needed = shutil.disk_usage(parent).free / 2**20, job.bytes / 2**20
    if cause.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and free > needed:
        return NotSaved(f"{job.final} was not saved ({cause}); the checkpoint before it, if any, stays.")
    return NotSaved(
        f"{job.final} was not saved ({cause.strerror or cause}): it needs {needed:.1f} MiB and {free:.1f} MiB are free "
        f"on its disk; the checkpoint before it stays; free some space, or lower save_total_limit."
    )


def load_checkpoint(
    path: Path | str,
    *,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    reference: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Put a checkpoint back into freshly built objects and return the loop's `state`; every rank must call this.

    The number of ranks and the sharding may be others than those that wrote it: parameters, optimizer state and
    schedule are the same to the last bit. Random streams go on exactly on as many ranks; else each rank is seeded from
    (the state's `seed`, step, rank), and a warning says so. `read_extra` gives back what the loop saved beside.

    reference: tensors of a reference that follows the policy (`Reference.tensors`), which are overwritten.

    Everything is checked before anything is changed. Raises AlteredError where a file is not
    as it was written, and ValueError when the checkpoint is incomplete or corrupt, is
    another or none on some rank's machine, or is of another model (parameters, shapes, dtypes, optimizer, device).
    Call it last, after the model, the optimizer and the data loader were built and prepared, since building them draws
    random numbers.
    """
    path, reference = Path(path), reference or {}
    reshard(model)
    parameters = dict(trainable_parameters(accelerator.unwrap_model(model)))
    rank = accelerator.process_index
    manifest = agreed_manifest(path, accelerator)
    problem: Exception | None = None
    try:
        if manifest["device"] != accelerator.device.type:
            raise ValueError(
                f"{path} holds the random state of {manifest['device']} and this run is on {accelerator.device.type}: "
                f"resume on {manifest['device']}."
            )
        small = [name for name in manifest["files"] if not name.endswith(TENSORS)]
        compare_checksums(path, manifest, small[rank :: accelerator.num_processes])
        refuse_other_parameters(path, stored_tensors(path, WEIGHT), parameters)
        if stored_tensors(path, REFERENCE).keys() != reference.keys():
            raise ValueError(f"{path} was saved with another ref_update: its reference has other tensors.")
        same_ranks = manifest["world_size"] == accelerator.num_processes
        saved = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
        own = torch.load(path / rank_file(rank), map_location="cpu", weights_only=True) if same_ranks else None
        state = read_state(path)
        try:
            moments, put_moments = load_state(optimizer, parameters, saved, own["optimizer"] if own else {})
        except ValueError as error:
            raise ValueError(f"{path} {error}") from error
    except (ValueError, OSError) as error:
        problem = error
    raise_first(accelerator, problem)

    tensors = {MOMENT + key: tensor for key, tensor in moments.items()}
    weights = {name: torch.empty_like(parameter) for name, parameter in parameters.items()}  # no gradients are there
    tensors |= {WEIGHT + name: weight.detach() for name, weight in weights.items()}
    averages = {name: torch.empty_like(tensor) for name, tensor in reference.items()}
    tensors |= {REFERENCE + name: tensor for name, tensor in averages.items()}
    try:
        read_tensors(path, tensors, manifest, rank, accelerator.num_processes)
    except (ValueError, OSError) as error:
        problem = error
    raise_first(accelerator, problem)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights.pop(name))
        for name, tensor in reference.items():
            tensor.copy_(averages.pop(name))
    put_moments()
    scheduler.load_state_dict(saved["scheduler"])
    schedule: Any = scheduler  # LambdaLR, which loads the rate of the settings that wrote the checkpoint
    for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        rate = base * factor(schedule.last_epoch)
        group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
    schedule._last_lr = [torch.clone(lr) if isinstance(lr := g["lr"], Tensor) else lr for g in optimizer.param_groups]
    if own is not None:
        set_random_state(own["random"], accelerator.device)
    else:
        seed_random_streams(int(state.get("seed", 0)), manifest["step"], rank)
        if accelerator.is_main_process:
            logger.warning(
                "%s was written by %d processes and this run has %d: weights, optimizer and schedule go on exactly, "
                "random streams (dropout) are seeded anew from the run's seed, step and rank",
                path,
                manifest["world_size"],
                accelerator.num_processes,
            )
    accelerator.wait_for_everyone()
    return state


def refuse_other_parameters(
    path: Path, saved: Mapping[str, TensorStorageMetadata], parameters: Mapping[str, nn.Parameter]
) -> None:
    """Raise ValueError unless names, shapes and dtypes of the saved weights are those of the model."""
    if saved.keys() != parameters.keys():
        missing, extra = sorted(parameters.keys() - saved.keys()), sorted(saved.keys() - parameters.keys())
        example = f"it lacks {missing[0]}" if missing else f"it has {extra[0]}"
        raise ValueError(
            f"{path} belongs to another model: {len(extra)} of its {len(saved)} parameters are unknown and "
            f"{len(missing)} of the model's {len(parameters)} are missing ({example}); check model_id and lora_r."
        )
    for name, parameter in parameters.items():
        shape, dtype = tuple(saved[name].size), saved[name].properties.dtype
        if (shape, dtype) != (tuple(parameter.shape), parameter.dtype):
            raise ValueError(
                f"{path} belongs to another model: {name} is {shape} {dtype} there and "
                f"{tuple(parameter.shape)} {parameter.dtype} here; check model_id, torch_dtype and lora_r."
            )


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Trainable parameters of an unwrapped model under the names they have without wrappers; tied weights once."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield plain_name(name), parameter


def raise_first(accelerator: Accelerator, problem: BaseException | None) -> None:
    """Raise on every rank the problem of the first rank that has one; every rank must call this."""
    told = None if problem is None else (type(problem).__name__, str(problem))
    first = next((one for one in gather_object([told]) if one is not None), None)
    if first is None:
        return
    if first == told:
        raise problem  # type: ignore[misc]  # with its traceback
    kinds: dict[str, type[Exception]] = {"NotSaved": NotSaved, "TypeError": TypeError, "AlteredError": AlteredError}
    kinds["ValueError"] = ValueError
    raise kinds.get(first[0], RuntimeError)(first[1]) from problem


def random_state(device: torch.device) -> dict[str, Any]:
    """State of every global random stream of this process, in types that `torch.load(weights_only=True)` reads."""
    kind, keys, *rest = numpy.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (kind, numpy.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `random_state` gave."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"], device)


def seed_random_streams(seed: int, step: int, rank: int) -> None:
    """Begin every global random stream of this process anew, at a place that only (seed, step, rank) decide."""
    words = numpy.random.SeedSequence([abs(seed), step, rank]).generate_state(4)
    random.seed(int(words[0]))
    numpy.random.seed(words[1:3])
    torch.manual_seed(int(words[3]))
