"""What a run trained: where it is on disk, and the policy rebuilt around it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from configs.text import read_file
from loops.shared.checkpoint import refuse_other_parameters, trainable_parameters
from loops.shared.checkpoint_files import (
    REPLACED,
    TEMPORARY,
    WEIGHT,
    read_manifest,
    read_state,
    read_tensors,
    read_weights,
    stored_tensors,
)
from loops.shared.models import ModelConfig, build_policy, resolve_dtype

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """TrainedModel weights on disk, and what it takes to build the model around them."""

    path: Path
    """A checkpoint, or a folder in Hugging Face's format."""
    kind: str
    """`checkpoint`, `adapter` (a peft folder) or `model` (a complete model: nothing is left to export)."""
    model: ModelConfig
    """The run's model section, with the dtype that it had in training."""
    seed: int
    """Of the random weights of a base that was never read from anywhere (`from_scratch`)."""
    step: int | None = None
    """Optimizer steps done, where known."""
    loop: str | None = None
    dataset: str | None = None
    stops: int | list[int] | None = None
    """Ids of the tokens that end a completion, where training found more than the base names."""

    def __str__(self) -> str:
        """`step 12, QLoRA of rank 32 on BASE`, for the terminal."""
        quantised = self.model.load_in_4bit or self.model.load_in_8bit
        lora = f"{'Q' if quantised else ''}LoRA of rank {self.model.lora_r}"
        what = "all weights of" if self.model.lora_r == 0 else f"{lora} on" if self.kind == "checkpoint" else f"{lora},"
        return f"{f'step {self.step}, ' if self.step is not None else ''}{what} {self.model.model_id}"


def find_trained(name: str | None, *, checkpoints_dir: str = "results", base_model: str | None = None) -> TrainedModel:
    """What `name` means: a checkpoint, a run folder (its newest weights), an adapter; None is the newest checkpoint.

    Args:
        name: a folder, or None.
        checkpoints_dir: searched, at any depth, when there is no name.
        base_model: takes the place of the run's `model_id`.

    Raises ValueError: nothing there, or a checkpoint that does not say enough about its model.
    """
    if name is None:
        path = newest_checkpoint(Path(checkpoints_dir))
        if path is None:
            raise ValueError(
                f"there is no complete checkpoint under {checkpoints_dir}: name one, or give checkpoints_dir."
            )
        return _read_checkpoint(path, base_model)
    path = Path(name).expanduser()
    if not path.is_dir():
        raise ValueError(f"there is no folder {name}: give a run, a checkpoint or an adapter.")
    if (path / "manifest.json").is_file():
        return _read_checkpoint(path, base_model)
    if (path / "adapter_config.json").is_file() or (path / "config.json").is_file():
        return _read_export(path, base_model)
    checkpoint, exported = newest_checkpoint(path), path / "model"
    written = any((exported / name).is_file() for name in ("adapter_config.json", "config.json"))
    if checkpoint and not (written and _last_step(path) > read_state(checkpoint)["step"]):
        return _read_checkpoint(checkpoint, base_model)
    if written:  # no checkpoint, or the run went on after its last one
        return _read_export(exported, base_model)
    raise ValueError(
        f"{name} holds neither a complete checkpoint nor a model folder: give a run, a checkpoint or an adapter."
    )


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint under a folder, by the time in its manifest."""
    found = []
    for file in folder.glob("**/manifest.json"):
        path = file.parent
        replaced = path.name.startswith(REPLACED) and path.with_name(path.name.removeprefix(REPLACED)).exists()
        if replaced or path.name.startswith(TEMPORARY):
            continue
        try:
            found.append((json.loads(file.read_text())["saved_at"], path))
        except (ValueError, KeyError, TypeError):  # not one of ours
            continue
    for _, path in sorted(found, reverse=True):
        try:
            read_manifest(path)
        except ValueError as error:
            print(f"passed over: {error}", file=sys.stderr)
        else:
            return path
    return None


def run_folder_of(path: Path) -> Path | None:
    """The run folder: the folder itself, or the one around a checkpoint or `model/`; None where it is not there."""
    path = path.absolute()
    candidates = [path]
    if path.parent.name == "checkpoints":
        candidates.append(path.parent.parent)
    if path.name == "model":
        candidates.append(path.parent)
    return next((folder for folder in candidates if (folder / "config.yaml").is_file()), None)


def rebuild_policy(trained: TrainedModel, *, device: torch.device | str = "cpu") -> PreTrainedModel | PeftModel:
    """The policy as it was trained, with the trained weights, in evaluation mode.

    Raises ValueError: the base model cannot be read, or the weights do not fit it.
    """
    with hint_at_base_model():
        policy = build_policy(trained.model, seed=trained.seed, device=device)
    if trained.kind == "checkpoint":
        parameters = dict(trainable_parameters(policy))
        refuse_other_parameters(trained.path, stored_tensors(trained.path, WEIGHT), parameters)
        targets = {WEIGHT + name: parameter.detach() for name, parameter in parameters.items()}
        read_tensors(trained.path, targets, read_manifest(trained.path))
    if trained.stops is not None:
        policy.generation_config.eos_token_id = trained.stops  # type: ignore[union-attr]
    return policy.eval()


@contextmanager
def hint_at_base_model() -> Iterator[None]:
    """Errors about the config's `model_id` also say which argument takes its place."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("model_id"):
            raise
        raise ValueError(f"{str(error).rstrip('.')} (base_model names another base).") from error


def _read_checkpoint(path: Path, base_model: str | None) -> TrainedModel:
    """A checkpoint with the settings of its run folder, else with those in its own state."""
    manifest, state = read_manifest(path), read_state(path)
    run = run_folder_of(path)
    settings = dict(read_file(str(run / "config.yaml"))) if run else {}
    model = state.get("model") or settings.get("model")
    if model is None and base_model is None:
        raise ValueError(f"{path} has no run folder around it: name its base with base_model.")
    if model is None and manifest["kind"] != "full":
        raise ValueError(
            f"{path} holds an adapter without its settings (alpha, rank, modules): put it back into its run folder, "
            f"whose config.yaml has them."
        )
    config = _model_config(model, path) if model else ModelConfig(lora_r=0)
    if base_model:
        if Path(config.model_id, "adapter_config.json").is_file():
            raise ValueError(
                f"{path} continues the adapter {config.model_id}: leave out base_model, and correct "
                f"base_model_name_or_path in its adapter_config.json where its base has moved."
            )
        config = replace(config, model_id=base_model, revision=None)
    if model is None:
        return _trained(path, "checkpoint", config, state, {}, dtype=_main_dtype(read_weights(path)))
    return _trained(path, "checkpoint", config, state, settings, dtype=resolve_dtype(config, manifest["device"]))


def _read_export(path: Path, base_model: str | None) -> TrainedModel:
    """A folder in Hugging Face's format: an adapter with the settings of its run, else as it says itself."""
    if base_model and (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{path} names its base itself: leave out base_model, and correct base_model_name_or_path in its "
            f"adapter_config.json where the base has moved."
        )
    run = run_folder_of(path)
    settings = dict(read_file(str(run / "config.yaml"))) if run else {}
    config = _model_config(settings["model"], run) if run and "model" in settings else ModelConfig()
    adapter = path / "adapter_config.json"
    kind = "adapter" if adapter.is_file() else "model"
    device = "cpu"
    if run and (run / "provenance.json").is_file():
        device = json.loads((run / "provenance.json").read_text())["device"]
    dtype = resolve_dtype(config, device)
    rank = json.loads(adapter.read_text())["r"] if kind == "adapter" else 0
    if rank:
        config = replace(config, model_id=str(path), from_scratch=False, lora_r=rank)
    else:
        config = ModelConfig(model_id=str(path), lora_r=0, trust_remote_code=config.trust_remote_code)
    generation = path / "generation_config.json"
    stops = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
    return _trained(path, kind, config, {"stops": stops}, settings, dtype=dtype)


def _trained(
    path: Path, kind: str, config: ModelConfig, state: Mapping, settings: Mapping, *, dtype: torch.dtype
) -> TrainedModel:
    config = replace(
        config,
        torch_dtype=str(dtype).removeprefix("torch."),
        attn_implementation="auto",  # the kernels of the machine that trained may not be here
        compile=False,
        gradient_checkpointing=False,
    )
    return TrainedModel(
        path=path,
        kind=kind,
        model=config,
        seed=state.get("seed", settings.get("run", {}).get("seed", 0)),
        step=state.get("step"),
        loop=state.get("loop"),
        dataset=settings.get("data", {}).get("dataset_name"),
        stops=state.get("stops"),
    )


def _model_config(section: Mapping[str, Any], where: Path) -> ModelConfig:
    known = {field.name for field in fields(ModelConfig)}
    unknown = sorted(set(section) - known)
    if unknown:
        raise ValueError(f"{where} was written by another version: its model section has {unknown[0]}, unknown here.")
    return ModelConfig(**section)


def _main_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that most numbers have."""
    counts: dict[torch.dtype, int] = {}
    for tensor in weights.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=counts.__getitem__)


def _last_step(run: Path) -> int:
    """The last step in the run's metrics.jsonl; -1 where there is none."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=-1)
