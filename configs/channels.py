"""Folders that hold what a config only names: the input channels of a SageMaker job. Standard library only.

A channel says where rows or a model are. What the config says about rows (templates, columns, splits) stays in force.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHANNELS = {
    "dataset_name": ("training", "preferences"),
    "eval_dataset_name": ("validation",),
    "model_id": ("models",),
}
"""Key of the configuration -> the channels that fill it, the first that a job has; DPO prefers `preferences`."""


def use_channels(values: dict[str, Any], folders: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Key -> the path in its channel's folder, and what to tell the user about it.

    A value that is already a path in a channel stays. Evaluation rows that are not in the channel of the training rows
    belong to other rows, so they are dropped.

    Args:
        values: what the config says, by key.
        folders: key -> folder of its channel.

    Raises ValueError where the model's folder does not say which model is meant.
    """
    found: dict[str, Any] = {}
    notes = []
    for key, name in folders.items():
        folder, current = Path(name), values.get(key)
        if current and Path(current).is_relative_to(folder.parent):
            continue
        found[key] = str(_find_model(folder, current) if key == "model_id" else _find_rows(folder, current))
        replaced = f" (the config has {current})" if current else ""
        notes.append(f"{key} is {found[key]}: channel {folder.name}{replaced}")
    evaluation = values.get("eval_dataset_name")
    if "dataset_name" in folders and "eval_dataset_name" not in folders and evaluation:
        rows = Path(folders["dataset_name"])
        if not Path(evaluation).is_relative_to(rows.parent):
            same_name = rows / Path(evaluation).name
            found["eval_dataset_name"] = str(same_name) if same_name.exists() else None
            if not same_name.exists():
                notes.append(
                    f"eval_dataset_name {evaluation} belongs to other rows: no evaluation without a validation channel"
                )
    return found, notes


def _find_rows(folder: Path, named: str | None) -> Path:
    """The channel's file of the name that the config gives, else its only file, else the folder."""
    if named and (folder / Path(named).name).exists():
        return folder / Path(named).name
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return files[0] if len(files) == 1 else folder


def _find_model(folder: Path, named: str | None) -> Path:
    """The channel's model: its root, or the one folder in it, or the one that the config names."""
    models = {path.parent for name in ("config.json", "adapter_config.json") for path in folder.rglob(name)}
    if folder in models:
        return folder
    by_name = [path for path in models if named and path.relative_to(folder).as_posix() in (named, Path(named).name)]
    if by_name or len(models) == 1:
        return (by_name or list(models))[0]
    if not models:
        raise ValueError(f"the channel {folder.name} holds no model: no config.json below {folder}.")
    names = ", ".join(sorted(path.relative_to(folder).as_posix() for path in models))
    raise ValueError(f"the channel {folder.name} holds several models ({names}): say which one with model_id.")
