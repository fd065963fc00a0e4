"""The folders of a SageMaker job, and the loop's command line in it. Standard library only.

SageMaker mounts everything under /opt/ml: channels in `input/data/NAME`, and in `model`, `output/data` and
`checkpoints` what it uploads.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.arguments import join_arguments, split_arguments
from configs.channels import CHANNELS

JOBS_OWN = ("--output_dir=/opt/ml/checkpoints", "--resume_from=latest", "--run_name=JOB_NAME")
"""What `loop_words` adds where the command says nothing else."""


@dataclass(frozen=True)
class JobFolders:
    """The folders of a job, below `base` (/opt/ml)."""

    base: Path

    @property
    def settings(self) -> Path:
        return self.base / "input/config"

    @property
    def model(self) -> Path:
        """Uploaded as the job's model, once, at the end."""
        return self.base / "model"

    @property
    def checkpoints(self) -> Path:
        """Copied to S3 all the time, and back before a job starts: the loop's run folder."""
        return self.base / "checkpoints"

    @property
    def output(self) -> Path:
        """Uploaded at the end, also of a job that failed."""
        return self.base / "output/data"

    @property
    def failure(self) -> Path:
        """The first 1,024 characters of this file are the job's FailureReason."""
        return self.base / "output/failure"

    def channel(self, name: str) -> Path | None:
        """The folder of an input channel, None where the job has none of that name."""
        folder = self.base / "input/data" / name
        return folder if folder.is_dir() else None

    def read(self, name: str) -> Any:
        """One of SageMaker's own JSON files (`resourceconfig`, `hyperparameters`), None where it is not there."""
        path = self.settings / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else None


def find_folders() -> JobFolders:
    """Of this job; the older toolkit lets `SAGEMAKER_BASE_DIR` move them."""
    return JobFolders(Path(os.environ.get("SAGEMAKER_BASE_DIR", "/opt/ml")))


def hyperparameter_words(hyperparameters: dict[str, Any]) -> list[str]:
    """Command line words for hyperparameters as SageMaker hands them over: `--config FILE` first, then `--key=value`.

    Values are text: bare, as JSON (`"text"` with its quotes, `true`, `["q_proj"]`) or as Python's repr (`True`,
    `['q_proj']`). The loops read all of these as the type of the key; only quotes around a text are taken off here.
    `sagemaker_...` is what the older toolkit keeps for itself.
    """
    words: list[str] = []
    for key, value in hyperparameters.items():
        if key.startswith("sagemaker_"):
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        plain = read_literal(text)
        if key == "config":
            files = plain if isinstance(plain, list) else [plain]
            words = ["--config", *map(str, files), *words]
        else:
            words.append(f"--{key.replace('-', '_')}={plain if isinstance(plain, str) else text}")
    return words


def read_literal(text: str) -> Any:
    """A value that is written as JSON or as Python's repr; any other text is itself."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return text


def loop_words(
    words: list[str], hyperparameters: dict[str, Any], folders: JobFolders, *, loop: str, log: Callable[[str], None]
) -> list[str]:
    """The loop's command line: config files < hyperparameters < the command's own keys < the job's folders.

    words: what follows the loop's path in the job's command; loop: its name (`grpo`). What the channels mean for
    the configuration is decided by its loader (`configs/channels.py`).
    """
    pairs, options = split_arguments([*hyperparameter_words(hyperparameters), *words])
    files, job = options.get("config", []), os.environ.get("TRAINING_JOB_NAME")
    if job:  # below all files: without it the run is named after its folder, which has the same name in every job
        folders.output.mkdir(parents=True, exist_ok=True)
        named = folders.output / "job.json"
        named.write_text(json.dumps({"run_name": job}))
        files = [str(named), *files]
    output_dir = str(dict(pairs).get("output_dir", ""))
    kept = (folders.checkpoints, folders.base / "input/data")  # a channel may be a file system that is written to
    if not any(Path(output_dir).is_relative_to(folder) for folder in kept):
        if output_dir:
            log(f"output_dir is {folders.checkpoints}, the folder that SageMaker saves, and not {output_dir}")
        output_dir = str(folders.checkpoints)
    line = ["--resume_from=latest", *(word for path in files for word in ("--config", path))]
    channels = [f"{key}={folder}" for key, folder in _channels(folders, loop).items()]
    line += [*join_arguments(pairs), f"--output_dir={output_dir}"]
    return [*line, *(["--channels", *channels] if channels else [])]


def _channels(folders: JobFolders, loop: str) -> dict[str, Path]:
    """Key of the configuration -> the folder of the channel that fills it."""
    found = {}
    for key, names in CHANNELS.items():
        filled = [folder for name in names if (folder := folders.channel(name))]
        if filled:
            found[key] = filled[-1 if loop == "dpo" else 0]
    return found
