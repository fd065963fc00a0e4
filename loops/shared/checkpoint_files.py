"""A run's checkpoints on disk: what one consists of, which are complete, newest or best, and what can be read from one.

A checkpoint is a folder `checkpoints/KIND-epochEE-stepNNNNNN` of the run folder:

    __R_0.distcp, .metadata  trainable parameters and optimizer state by name, in the format of torch's distributed
                             checkpoint: rank R wrote its shards, and of what all ranks hold alike a part
    optimizer.pt             the optimizer's settings and plain values, and the schedule
    rank-RRRRR.pt            random state of rank R: python, numpy, torch, the device; what else is only its own
    extra-RRRRR.pt           what the loop of rank R gave as `extra`, if anything
    state.json               what the loop needs to find its place: epoch, step, rows consumed, ...
    manifest.json            sizes and checksums of all these files; written last: a folder that has it is complete

Beside it may stand `.tmp-NAME`, which is being written or removed, and for an instant `.old-NAME`, whose place a new
one of that name is taking. Nothing here needs a process group or a model.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import shutil
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

FORMAT = "plumbline-checkpoint-2"
METADATA, OPTIMIZER, STATE, MANIFEST = ".metadata", "optimizer.pt", "state.json", "manifest.json"
WEIGHT, MOMENT, REFERENCE = "model/", "optimizer/", "reference/"  # first parts of the tensors' keys
TENSORS = ".distcp"  # ending of the files with tensors
TEMPORARY, REPLACED = ".tmp-", ".old-"
BLOCK = 1 << 24  # bytes read at once for a checksum


class AlteredError(ValueError):
    """A file's contents are not those that it was written with; its text is one sentence."""


def find_checkpoint(
    run_folder: Path | str, resume_from: str, *, accelerator: Accelerator | None = None, without: Sequence[Path] = ()
) -> Path | None:
    """The checkpoint that `resume_from` means: `none`, `latest`, `best` (of the run folder), or a path.

    `latest` is the newest complete one and `best` the one by the metric it was saved with; incomplete ones are skipped
    with one warning each, those in `without` silently; None when there is none. The stored tensors are compared with
    their checksums when they are read, all other files here. With an accelerator every rank must call this: they agree
    on what rank 0 finds. Raises ValueError when a path is not a complete checkpoint, or when not every rank sees what
    rank 0 does.
    """
    if resume_from == "none":
        return None
    parent = Path(run_folder) / "checkpoints"
    if resume_from not in ("latest", "best"):
        agreed_manifest(Path(resume_from), accelerator)
        return Path(resume_from)
    is_main = accelerator is None or accelerator.is_main_process
    candidates = whole_checkpoints(parent) if is_main else []
    if resume_from == "best":
        candidates = best_first(candidates)
    candidates = [one for one in candidates if one[0] not in without]
    if accelerator is not None:
        candidates = broadcast_object_list([candidates])[0]
    for path, _ in candidates:
        problem = None
        manifest = agreed_manifest(path, accelerator)
        try:
            compare_checksums(path, manifest, [name for name in manifest["files"] if not name.endswith(TENSORS)])
        except (ValueError, OSError) as error:
            problem = str(error)
        problems = [problem] if accelerator is None else gather_object([problem])
        problem = next((text for text in problems if text), None)
        if problem is None:
            return path
        if is_main:
            logger.warning("skipped: %s", problem)
    return None


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Whole trainable tensors on the CPU by name, without process group or model.

    Raises ValueError when the checkpoint is incomplete or corrupt.
    """
    path = Path(path)
    manifest = read_manifest(path)
    stored = stored_tensors(path, WEIGHT)
    weights = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    read_tensors(path, {WEIGHT + name: tensor for name, tensor in weights.items()}, manifest)
    return weights


def read_state(path: Path) -> dict[str, Any]:
    """The loop's own state in a checkpoint, as it was given to `save`."""
    return json.loads((path / STATE).read_text())


def read_extra(path: Path, rank: int) -> dict[str, Any]:
    """What rank `rank` of the processes that wrote a checkpoint gave as `extra`; {} where it gave nothing.

    The manifest's `world_size` says how many there were: a run with another number deals their contents out anew.
    """
    file = path / extra_file(rank)
    return torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else {}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files all have the size it says; else ValueError with what is wrong."""
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint {path}: set resume_from to latest, none or a checkpoint folder.")
    if not (path / MANIFEST).is_file() and (path / "checkpoints").is_dir():
        raise ValueError(
            f"{path} is a run folder and no checkpoint: set output_dir to it and resume_from to latest, or name one of "
            f"{path / 'checkpoints'}."
        )
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{path} is not a complete checkpoint: it has no {MANIFEST}.")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except ValueError as error:  # undecodable bytes too
        raise ValueError(f"{path} is not a complete checkpoint: its {MANIFEST} is not JSON ({error}).") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this program: its {MANIFEST} does not say {FORMAT}.")
    missing = {"files", "saved_at", "step", "world_size", "device"} - manifest.keys()
    if missing or not isinstance(manifest["files"], dict):
        raise ValueError(f"{path} is not a complete checkpoint: its {MANIFEST} lacks {', '.join(sorted(missing))}.")
    for name, (size, _) in manifest["files"].items():
        if not (path / name).is_file():
            raise ValueError(f"{path} is not a complete checkpoint: {name} is missing.")
        found = (path / name).stat().st_size
        if found != size:
            raise ValueError(f"{path} is not a complete checkpoint: {name} has {found} bytes instead of {size}.")
    return manifest


def agreed_manifest(path: Path, accelerator: Accelerator | None) -> dict[str, Any]:
    """`read_manifest`, by every rank where there is an accelerator; ValueError where one does not see what rank 0 does.

    Machines without a shared disk may have no copy of a checkpoint, or an older one of the same name.
    """
    if accelerator is None:
        return read_manifest(path)
    manifest: dict[str, Any] = {}
    problem = None
    try:
        manifest = read_manifest(path)
    except (ValueError, OSError) as error:
        problem = str(error)
    answers = gather_object([(problem, manifest.get("saved_at"))])
    if answers[0][0]:
        raise ValueError(answers[0][0])
    other = next((rank for rank, answer in enumerate(answers) if answer != answers[0]), None)
    if other is not None:
        raise ValueError(
            f"rank {other} does not see the checkpoint that rank 0 has in {path}: copy it to every machine, or set "
            f"output_dir to storage that all machines share."
        )
    return manifest


def compare_checksums(path: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise AlteredError where the contents of one of these files are not those that it was written with."""
    for name in names:
        refuse_altered(path, manifest, name, checksum(path / name))


def refuse_altered(path: Path, manifest: Mapping[str, Any], name: str, found: int) -> None:
    if found != manifest["files"][name][1]:
        raise AlteredError(f"{path} is not a complete checkpoint: {name} was altered after it was written.")


def whole_checkpoints(parent: Path, *, warn: bool = True) -> list[tuple[Path, dict[str, Any]]]:
    """Checkpoints in `parent` with files of the right size, and their manifests, newest first by the time of writing.

    Time and not step: a run that was sent back to an earlier step goes on from what it wrote last. Incomplete ones are
    named in a warning, exports beside them (NAME.hf_model) are not. One that was being replaced when its run was killed
    counts while nothing stands in its place.
    """
    found = []
    for path in parent.glob("*-step*[0-9]"):
        if path.name.startswith(TEMPORARY):
            continue
        if path.name.startswith(REPLACED) and (parent / path.name.removeprefix(REPLACED)).exists():
            continue
        try:
            manifest = read_manifest(path)
        except ValueError as error:
            if warn:
                logger.warning("skipped: %s", error)
            continue
        found.append((path, manifest))
    return sorted(found, key=lambda one: (one[1]["saved_at"], one[1]["step"]), reverse=True)


def best_first(found: list[tuple[Path, dict[str, Any]]]) -> list[tuple[Path, dict[str, Any]]]:
    """Those that have a value of the metric that the newest with one names; the best first, of equals the oldest."""
    best = next((manifest["best"] for _, manifest in found if manifest.get("best")), {})
    name, sign = best.get("metric"), -1 if best.get("greater_is_better") else 1
    having = [one for one in found if one[1].get("metrics", {}).get(name) is not None]
    return sorted(having, key=lambda one: (one[1]["metrics"][name] * sign, one[1]["saved_at"]))


def stored_tensors(path: Path, first: str) -> dict[str, TensorStorageMetadata]:
    """Shape, dtype and places of the stored tensors whose keys begin with `first`, by the rest of the key."""
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    return {key.removeprefix(first): entry for key, entry in stored.items() if key.startswith(first)}  # type: ignore


def read_tensors(
    path: Path, targets: Mapping[str, Tensor], manifest: Mapping[str, Any], rank: int = 0, ranks: int = 1
) -> None:
    """Fill tensors, shards or whole, with what is stored under their keys; no rank waits for another.

    Of `ranks`, each compares the checksums of its part of the files, while it reads them. Raises AlteredError, when
    some tensors are filled already.
    """
    names = sorted((name for name in manifest["files"] if name.endswith(TENSORS)), key=lambda name: (len(name), name))
    reader = _Reader(path, manifest, names[rank::ranks])
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that it reads without a process group, which is the intention
        try:
            distributed_checkpoint.load(dict(targets), storage_reader=reader, planner=planner, no_dist=True)
        except CheckpointException as error:  # torch puts its own around what was raised
            raise next(iter(error.failures.values()))[0] from None


class _Reader(FileSystemReader):
    """torch's reader, which reads each file from front to back and compares the checksums of those in `checked`."""

    def __init__(self, path: Path, manifest: Mapping[str, Any], checked: Sequence[str]):
        super().__init__(path)
        self.folder, self.manifest, self.checked = path, manifest, checked

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[str, dict[tuple[int, int], list[ReadItem]]] = {name: {} for name in self.checked}
        for item in plan.items:  # a stored piece may be wanted for several places
            stored = self.storage_data[item.storage_index]
            pieces = wanted.setdefault(stored.relative_path, {})
            pieces.setdefault((stored.offset, stored.length), []).append(item)
        for name, pieces in wanted.items():
            try:
                self._read_file(name, pieces, planner)
            except RuntimeError:  # torch cannot read what was altered
                refuse_altered(self.folder, self.manifest, name, checksum(self.folder / name))
                raise
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_file(self, name: str, pieces: dict[tuple[int, int], list[ReadItem]], planner: LoadPlanner) -> None:
        value, checked = 0, name in self.checked
        with open(self.folder / name, "rb") as file:
            for offset, length in sorted(pieces):
                if checked:
                    value = checksum_of(file, value, offset - file.tell())
                file.seek(offset)
                data = file.read(length)
                value = zlib.crc32(data, value)
                tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
                for item in pieces[offset, length]:
                    part = tensor
                    for axis, (start, size) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                        part = part.narrow(axis, start, size)
                    target = planner.resolve_tensor(item).detach()
                    planner.commit_tensor(item, target.copy_(part))
            if checked:
                refuse_altered(self.folder, self.manifest, name, checksum_of(file, value))


def remove(path: Path) -> None:
    """Remove a folder, or a link to one without what it points to."""
    path.unlink() if path.is_symlink() else shutil.rmtree(path)


def clear_leftovers(parent: Path) -> None:
    """Remove what saves that were cut off left behind; what one of them was replacing goes back to its place.

    What cannot be removed is named in a warning and stays: tidying must not cost a save.
    """
    for left_over in (*parent.glob(f"{REPLACED}*"), *parent.glob(f"{TEMPORARY}*")):
        final = parent / left_over.name.removeprefix(REPLACED)
        try:
            if left_over.name.startswith(REPLACED) and not final.exists():
                os.replace(left_over, final)
            else:
                remove(left_over)
        except OSError as error:
            logger.warning("%s is not needed any more and cannot be removed: %s", left_over, error)


def prune(parent: Path, keep: int) -> None:
    """Remove all whole checkpoints but the `keep` newest and the best; one that cannot be removed is named."""
    found = whole_checkpoints(parent, warn=False)
    best = best_first(found)[:1]
    for path, manifest in found[keep:]:
        if (path, manifest) in best:
            continue
        try:
            os.replace(path, path.parent / (TEMPORARY + path.name))  # gone at once, whatever happens next
            remove(path.parent / (TEMPORARY + path.name))
        except OSError as error:
            logger.warning("%s is not needed any more and cannot be removed: %s", path, error)


def sealed(path: Path) -> list[int]:
    """[bytes, checksum] of a file just written (so read from memory, not from the disk), once it is on the disk."""
    entry = [path.stat().st_size, checksum(path)]
    flush_to_disk(path)
    return entry


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    with open(path, "rb", buffering=0) as file:
        return checksum_of(file)


def checksum_of(file: IO[bytes], value: int = 0, length: float = math.inf) -> int:
    """CRC-32 of the next `length` bytes of a file, going on from `value`."""
    while length > 0 and (block := file.read(int(min(BLOCK, length)))):
        value, length = zlib.crc32(block, value), length - len(block)
    return value


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def extra_file(rank: int) -> str:
    return f"extra-{rank:05d}.pt"


def flush_to_disk(path: Path) -> None:
    """fsync a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
