"""The files that are sent as the job's code: this project, the config files, and what the user adds."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.channels import CHANNELS
from launch.sagemaker.folders import find_folders

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = ("loops", "losses", "data", "configs", "launch")
LOOPS = ("sft", "dpo", "grpo")
REQUIREMENTS = "launch/sagemaker/requirements.txt"
PATHS = {**CHANNELS, "tokenizer_id": (), "resume_from": ()}
"""All keys that may name a file or folder to read."""
FILE = re.compile(r"\.(jsonl?|csv|tsv|parquet|arrow|txt|ya?ml|gz|zst)$")
NOT_SHIPPED = shutil.ignore_patterns(
    "__pycache__", "*.pyc", ".*", "*.ipynb", "results", "runs", "wandb", "mlruns", "*.egg-info"
)


def loop_of(config: Path, given: str | None = None) -> str:
    """The loop that a config file is for: `given`, else its first line `# loop: NAME`, else a word of its name.

    Raises ValueError where none of them says it.
    """
    if given is None:
        first = config.read_text(encoding="utf-8").partition("\n")[0]
        stated = re.match(r"#\s*loop:\s*(\w+)", first)
        words = [stated[1]] if stated else re.split(r"[^a-z]+", config.stem.lower())
        named = [loop for loop in LOOPS if loop in words]
        given = named[0] if len(named) == 1 else None
    if given is None:
        raise ValueError(f"{config} does not say which loop it is for: give --loop sft, dpo or grpo.")
    if given not in LOOPS:
        raise ValueError(f"loop `{given}` is none: give sft, dpo or grpo.")
    return given


def stage_source(
    folder: Path, *, configs: Sequence[Path], include: Sequence[Path] = (), requirements: Path | None = None
) -> list[str]:
    """Copy everything that the job needs into `folder`; returns the configs' paths in it.

    A config of the project keeps its path, any other goes to `configs/`. Files and folders of `include` (your own
    rewards, converters) go to the top, from where the job imports them. `requirements` replaces the shipped list.
    Hidden files, results and caches are left out.

    Raises ValueError for what does not exist, and for names that two files would share.
    """
    for package in PACKAGES:
        shutil.copytree(PROJECT / package, folder / package, ignore=NOT_SHIPPED)
    staged = []
    for config in configs:
        inside = config.resolve().is_relative_to(PROJECT) and config.resolve().relative_to(PROJECT).parts[0] in PACKAGES
        place = config.resolve().relative_to(PROJECT) if inside else Path("configs", config.name)
        if not re.fullmatch(r"[\w./-]+", str(place)):
            raise ValueError(f"config `{config}`: rename the file to letters, digits, `_`, `-` and `.`.")
        if not inside:
            if (folder / place).exists():
                raise ValueError(f"config `{config}`: the project has a {place} already; rename the file.")
            shutil.copyfile(config, folder / place)
        staged.append(str(place))
    for path in include:
        target = folder / path.resolve().name
        if not path.exists():
            raise ValueError(f"include `{path}` does not exist.")
        if target.exists():
            raise ValueError(f"include `{path}`: the project has a {target.name} already; rename yours.")
        if path.is_dir():
            shutil.copytree(path, target, ignore=NOT_SHIPPED)
        else:
            shutil.copyfile(path, target)
    if requirements is not None:
        shutil.copyfile(requirements, folder / REQUIREMENTS)
    return staged


def path_in_job(value: str, include: Sequence[str]) -> str | None:
    """The job's path of this file or folder, None where it is not sent or does not exist."""
    path = Path(os.path.expandvars(value)).expanduser()
    found = (path if path.exists() else PROJECT / value).resolve()
    roots = {Path(own).resolve(): Path(own).resolve().parent for own in include} | {
        PROJECT / r: PROJECT for r in PACKAGES
    }
    for root, above in roots.items():
        if found.exists() and found.is_relative_to(root):
            place = found.relative_to(above)
            return None if NOT_SHIPPED("", place.parts) else place.as_posix()
    return None


def check_sources(values: Mapping[str, Any], channels: Mapping[str, Any], include: Sequence[str]) -> None:
    """Raises ValueError where a value of the configuration names a file or a module that the job would not find."""
    base = find_folders().base
    for key, given in PATHS.items():
        value = str(values.get(key) or "")
        if not value or (key == "resume_from" and value in ("none", "latest", "best")):
            continue
        place = path_in_job(value, include)
        if Path(value).is_relative_to(base / "input/data"):  # a channel's folder
            channel = Path(value).relative_to(base / "input/data").parts[0]
            if channel not in channels:
                raise ValueError(f"{key} is {value}, and no channel is named `{channel}`: add {channel}=s3://... .")
        elif any(name in channels for name in given) or Path(value).is_relative_to(base):
            continue
        elif place is not None:
            if place != Path(value).as_posix():
                raise ValueError(f"{key} is {value}, which the job has as {place}: write {place}.")
        elif Path(os.path.expandvars(value)).expanduser().exists():
            cure = f"give it as a channel, {given[0]}={value}" if given else f"add --include {value}"
            if key == "resume_from":
                cure = "leave it out, for a job goes on from the checkpoints of its run_name"
            raise ValueError(f"{key} is {value}, which the job does not have: {cure}.")
        elif key == "eval_dataset_name" and any(name in channels for name in CHANNELS["dataset_name"]):
            continue  # looked for in the channel of the training rows
        elif key == "resume_from" or FILE.search(value) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
            raise ValueError(f"{key} is {value}, which is no file or folder here and can be no hub id: correct it.")
    functions = [values.get(key) or [] for key in ("reward_functions", "eval_reward", "converter")]
    for name in [name for value in functions for name in ([value] if isinstance(value, str) else value)]:
        for module in [part.partition(":")[0].strip() for part in name.split(",") if ":" in part]:
            top = module.partition(".")[0]
            here = [path for path in (Path(f"{top}.py"), Path(top)) if path.exists()]
            if here and top not in PACKAGES and not any(Path(path).resolve().stem == top for path in include):
                raise ValueError(f"`{name}` is in {here[0]}, which the job does not have: add --include {here[0]}.")
