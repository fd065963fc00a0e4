"""Checkpoints that are whole or not there, and a resume that goes on as if nothing had happened.

A checkpoint is a folder `checkpoints/KIND-epochEE-stepNNNNNN` of the run folder:

    trainable.safetensors   trainable parameters by name, whole tensors (a frozen base is read from its own folder)
    optimizer.pt            optimizer state by parameter name, its settings, and the schedule
    random-RRRRR.pt         random state of rank R: python, numpy, torch, the device
    state.json              what the loop needs to find its place: epoch, step, rows consumed, ...
    manifest.json           sizes of all these files; written last, so a folder with a true manifest is whole

It is written as `.tmp-NAME` beside its place and renamed when every byte is on disk. Names and whole tensors, not
positions and shards, are stored, so nothing in the files depends on how the model was wrapped or split.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim.lr_scheduler import LRScheduler

logger = logging.getLogger(__name__)

FORMAT = "plumbline-checkpoint-1"
WEIGHTS, OPTIMIZER, STATE, MANIFEST = "trainable.safetensors", "optimizer.pt", "state.json", "manifest.json"
TEMPORARY, REPLACED = ".tmp-", ".old-"  # a folder that is being written, and one whose place is being taken
WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.")  # put into names by torch.compile and checkpointing


def save_checkpoint(
    folder: Path | str,
    *,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    step: int,
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `folder/checkpoints/KIND-epochEE-stepNNNNNN` and return its path; every rank must call this.

    `step` is the number of optimizer steps done, `state` what the loop wants back on resume (JSON types; its `epoch`,
    if any, shows in the name), KIND is lora where the model has adapters, else full. Afterwards only the `keep`
    newest checkpoints stay (0 keeps all). The folder must be on storage that all ranks share.
    """
    parameters = dict(trainable_parameters(accelerator.unwrap_model(model)))
    kind = "lora" if any("lora_" in name for name in parameters) else "full"
    parent = Path(folder) / "checkpoints"
    final = parent / f"{kind}-epoch{int(state.get('epoch', 0)):02d}-step{step:06d}"
    temporary, replaced = parent / (TEMPORARY + final.name), parent / (REPLACED + final.name)
    written = json.dumps({**state, "step": step})  # before the first file, so that a wrong type costs nothing

    if accelerator.is_main_process:
        for left_over in (*parent.glob(f"{TEMPORARY}*"), *parent.glob(f"{REPLACED}*")):
            shutil.rmtree(left_over)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()

    # Gathering shards is collective, so every rank builds these; only the main process writes them.
    weights = {name: whole(parameter) for name, parameter in parameters.items()}
    moments = optimizer_by_name(optimizer, parameters)
    if accelerator.is_main_process:
        save_file(weights, temporary / WEIGHTS)
        torch.save({**moments, "scheduler": scheduler.state_dict()}, temporary / OPTIMIZER)
        (temporary / STATE).write_text(written)
    torch.save(random_state(accelerator.device), temporary / random_file(accelerator.process_index))
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        expected = {WEIGHTS, OPTIMIZER, STATE, *(random_file(rank) for rank in range(accelerator.num_processes))}
        missing = expected - {path.name for path in temporary.iterdir()}
        if missing:
            raise ValueError(
                f"{temporary} lacks {', '.join(sorted(missing))}: the ranks do not see the same folder, so set "
                f"output_dir to storage that all of them share."
            )
        sizes = {}
        for name in sorted(expected):
            flush_to_disk(temporary / name)
            sizes[name] = (temporary / name).stat().st_size
        manifest = {
            "format": FORMAT,
            "kind": kind,
            "step": step,
            "world_size": accelerator.num_processes,
            "device": accelerator.device.type,
            "saved_at": time.time_ns(),
            "files": sizes,
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2))
        flush_to_disk(temporary / MANIFEST)
        flush_to_disk(temporary)
        if final.exists():  # a run that went back and came to this step again
            os.replace(final, replaced)
        os.replace(temporary, final)
        flush_to_disk(parent)
        shutil.rmtree(replaced, ignore_errors=True)
        if keep > 0:
            for old in whole_checkpoints(parent)[keep:]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(
    path: Path | str,
    *,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
) -> dict[str, Any]:
    """Put a checkpoint back into freshly built objects and return the loop's `state`; every rank must call this.

    Everything is read and compared before anything is changed. Raises ValueError when the checkpoint is torn (no or
    false manifest, missing or short file) or foreign (other parameters, shapes, dtypes, optimizer, number of
    processes or device). Call it last, after the model, the optimizer and the data loader were built and prepared,
    since building them draws random numbers.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if manifest["world_size"] != accelerator.num_processes:
        raise ValueError(
            f"{path} was written by {manifest['world_size']} processes and this run has {accelerator.num_processes}: "
            f"launch with --num_processes {manifest['world_size']}."
        )
    if manifest["device"] != accelerator.device.type:
        raise ValueError(
            f"{path} holds the random state of {manifest['device']} and this run is on {accelerator.device.type}: "
            f"resume on {manifest['device']}."
        )
    parameters = dict(trainable_parameters(accelerator.unwrap_model(model)))
    weights = load_file(path / WEIGHTS)
    saved = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    randomness = torch.load(path / random_file(accelerator.process_index), map_location="cpu", weights_only=True)
    state = read_state(path)

    refuse_other_parameters(path, weights, parameters)
    names = name_groups(optimizer, parameters)
    if saved["class"] != optimizer_class(optimizer) or [group["params"] for group in saved["groups"]] != names:
        raise ValueError(
            f"{path} belongs to another optimizer ({saved['class']} over {len(saved['groups'])} parameter groups, not "
            f"{optimizer_class(optimizer)} over {len(names)}): resume with the settings it was written with."
        )

    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(like(parameter, weights[name]))
    numbers = {name: number for number, name in enumerate(name for group in names for name in group)}
    optimizer.load_state_dict(
        {
            "state": {
                numbers[name]: {
                    key: like(parameters[name], value) if isinstance(value, Tensor) and key != "step" else value
                    for key, value in moments.items()  # torch itself puts `step` where the optimizer wants it
                }
                for name, moments in saved["state"].items()
            },
            "param_groups": [
                {**group, "params": [numbers[name] for name in group["params"]]} for group in saved["groups"]
            ],
        }
    )
    scheduler.load_state_dict(saved["scheduler"])
    set_random_state(randomness, accelerator.device)
    accelerator.wait_for_everyone()
    return state


def find_checkpoint(run_folder: Path | str, resume_from: str) -> Path | None:
    """The checkpoint that `resume_from` means: `none`, `latest` (newest whole one of the run folder), or a path.

    `latest` passes over torn checkpoints with one warning each, and is None when there is no whole one. Raises
    ValueError when a path is not a whole checkpoint.
    """
    if resume_from == "none":
        return None
    if resume_from != "latest":
        read_manifest(Path(resume_from))
        return Path(resume_from)
    return next(iter(whole_checkpoints(Path(run_folder) / "checkpoints")), None)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files all have the size it says; else ValueError with what is wrong."""
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint {path}: set resume_from to latest, none or a checkpoint folder.")
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{path} is not a whole checkpoint: it has no {MANIFEST}.")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except ValueError as error:  # undecodable bytes too
        raise ValueError(f"{path} is not a whole checkpoint: its {MANIFEST} is not JSON ({error}).") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this program: its {MANIFEST} does not say {FORMAT}.")
    for name, size in manifest["files"].items():
        if not (path / name).is_file():
            raise ValueError(f"{path} is not a whole checkpoint: {name} is missing.")
        found = (path / name).stat().st_size
        if found != size:
            raise ValueError(f"{path} is not a whole checkpoint: {name} has {found} bytes instead of {size}.")
    return manifest


def read_state(path: Path) -> dict[str, Any]:
    """The loop's own state in a checkpoint, as `save_checkpoint` was given it."""
    return json.loads((path / STATE).read_text())


def whole_checkpoints(parent: Path) -> list[Path]:
    """Whole checkpoints in `parent`, newest first by the time they were written; torn ones are named in a warning.

    Time and not step: a run that was sent back to an earlier step goes on from what it wrote last.
    """
    found = []
    for path in parent.glob("*-step*"):
        if path.name.startswith((TEMPORARY, REPLACED)):
            continue
        try:
            manifest = read_manifest(path)
        except ValueError as error:
            logger.warning("skipped: %s", error)
            continue
        found.append((manifest["saved_at"], manifest["step"], path))
    return [path for _, _, path in sorted(found, reverse=True)]


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Trainable parameters of an unwrapped model under the names they have without wrappers; tied weights once."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield WRAPPERS.sub("", name), parameter


def name_groups(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """Names of the parameters in each of the optimizer's groups, in its order."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def optimizer_class(optimizer: torch.optim.Optimizer) -> str:
    """Name of the optimizer's class, below accelerate's wrapper."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def optimizer_by_name(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """The optimizer's state dict with parameter names in place of numbers and whole tensors in place of shards."""
    plain = optimizer.state_dict()
    groups = name_groups(optimizer, parameters)
    names = [name for group in groups for name in group]
    return {
        "class": optimizer_class(optimizer),
        "groups": [{**group, "params": names} for group, names in zip(plain["param_groups"], groups, strict=True)],
        "state": {
            names[number]: {key: whole(value) if isinstance(value, Tensor) else value for key, value in moments.items()}
            for number, moments in plain["state"].items()
        },
    }


def refuse_other_parameters(path: Path, saved: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError unless names, shapes and dtypes of the saved weights are those of the model."""
    if saved.keys() != parameters.keys():
        missing, extra = sorted(parameters.keys() - saved.keys()), sorted(saved.keys() - parameters.keys())
        example = f"it lacks {missing[0]}" if missing else f"it has {extra[0]}"
        raise ValueError(
            f"{path} belongs to another model: {len(extra)} of its {len(saved)} parameters are unknown and "
            f"{len(missing)} of the model's {len(parameters)} are missing ({example}); check model_id and lora_r."
        )
    for name, parameter in parameters.items():
        have, want = saved[name], parameter
        if (have.shape, have.dtype) != (want.shape, want.dtype):
            raise ValueError(
                f"{path} belongs to another model: {name} is {tuple(have.shape)} {have.dtype} there and "
                f"{tuple(want.shape)} {want.dtype} here; check model_id, torch_dtype and lora_r."
            )


def whole(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, with its shards gathered (collective where it is sharded)."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value`, whole on every rank, on the parameter's device and sharded as the parameter is."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def random_file(rank: int) -> str:
    return f"random-{rank:05d}.pt"


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


def flush_to_disk(path: Path) -> None:
    """fsync a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
