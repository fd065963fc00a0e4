"""Where things lie inside a SageMaker job, and which config values follow from that. Standard library only.

SageMaker mounts everything under /opt/ml: channels in `input/data/NAME`, and in `model`, `output/data` and
`checkpoints` what is to be uploaded. A channel does not change what the config says about rows (templates, columns,
splits); it changes where `dataset_name` points, in the very file or argument that gives it.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ALIASES = {  # other spellings of the keys that a channel fills; `configs/spellings.py` has them all
    "dataset_name": ("train_dataset_path", "hfdc_dataset_name", "data_dir"),
    "eval_dataset_name": ("val_dataset_path", "test_dataset_path"),
    "model_id": ("model_name", "model_name_or_path", "hf_model_id"),
}
KEY_OF = {alias: key for key, aliases in ALIASES.items() for alias in (key, *aliases)}
JOBS_OWN = ("--output_dir=/opt/ml/checkpoints", "--resume_from=latest", "--run_name=JOB_NAME")
"""What `loop_words` adds where nobody says otherwise."""
# Our parser of config files, in a process of its own: YAML is not in the standard library.
READ_FILES = (
    "import json, sys\nfrom configs.text import read_file\n"
    "try:\n    print(json.dumps([dict(read_file(path)) for path in sys.argv[1:]]))\n"
    "except ValueError as error:\n    sys.exit(' '.join(str(error).split()))\n"
)


@dataclass(frozen=True)
class Places:
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
        """Copied to S3 all the time, and back before a job starts: the run folder of the loop."""
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


def find_places() -> Places:
    """Of this job; the older toolkit lets `SAGEMAKER_BASE_DIR` move them."""
    return Places(Path(os.environ.get("SAGEMAKER_BASE_DIR", "/opt/ml")))


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
    words: list[str], hyperparameters: dict[str, Any], places: Places, *, loop: str, say: Callable[[str], None]
) -> list[str]:
    """The loop's whole command line: config files < hyperparameters < the command's own keys < what channels decide.

    words: what stands behind the loop's path in the job's command; loop: its name (`grpo`). Files that name a data set
    which a channel holds are rewritten, as JSON, into the output folder. Raises ValueError in one sentence where a
    config file cannot be read or the `models` channel leaves open which model is meant.
    """
    own_files, own = split_words(words)
    given_files, given = split_words(hyperparameter_words(hyperparameters))
    files, pairs = [*given_files, *own_files], [{key: value} for key, value in [*given, *own]]
    channels = _channels(places, loop)
    job = os.environ.get("TRAINING_JOB_NAME")
    layers: list[dict[str, Any]] = _read_files(files) if channels or job else []
    every = [place for layer in [*layers, *pairs] for place in _places_in(layer)]
    ends: list[dict[str, Any]] = []
    rewritten = False

    for key, folder in channels.items():
        named = [place for place in every if KEY_OF.get(place.key) == key and place.value]
        current = str(named[-1].value) if named else None
        if current and _is_within(current, places.base):
            continue  # the config already speaks of the job's folders
        found = str(_find_model(folder, current) if key == "model_id" else _find_rows(folder, current))
        say(f"{key} is {found}: channel {folder.name}" + (f" (the config has {current})" if current else ""))
        if key == "model_id" or (key == "eval_dataset_name" and not named):
            ends.append({key: found})
        elif named:
            for place in named:
                place.value = found
            rewritten = True
        else:  # below all files: a data set named in a layer takes nothing about rows from the layers under it
            files, layers, rewritten = ["channels", *files], [{key: found}, *layers], True

    if "dataset_name" in channels and "eval_dataset_name" not in channels:
        for place in [place for place in every if KEY_OF.get(place.key) == "eval_dataset_name" and place.value]:
            current = str(place.value)
            if not _is_within(current, places.base):
                beside = channels["dataset_name"] / Path(current).name
                place.value, rewritten = str(beside) if beside.exists() else None, True
                if not place.value:
                    say(f"eval_dataset_name {current} goes with other rows: no evaluation without a validation channel")

    output_dirs = [str(pair["output_dir"]) for pair in pairs if "output_dir" in pair]
    kept = (places.checkpoints, places.base / "input/data")  # a channel may be a file system that is written to
    if not output_dirs or not any(_is_within(output_dirs[-1], folder) for folder in kept):
        if output_dirs:
            say(f"output_dir is {places.checkpoints}, the folder that SageMaker saves, and not {output_dirs[-1]}")
        ends.append({"output_dir": str(places.checkpoints)})
    if not any("resume_from" in pair for pair in pairs):
        ends.append({"resume_from": "latest"})
    if job and not any(place.key == "run_name" and place.value for place in every):
        ends.append({"run_name": job})  # the run's folder, the loops' own default, has the same name in every job

    if rewritten:
        files = _write_files(files, layers, places.output / "config")
    line = [word for path in files for word in ("--config", path)]
    for pair in [*pairs, *ends]:
        for key, value in pair.items():
            line.append(f"--{key}" if value is True else f"--{key}={'null' if value is None else value}")
    return line


def split_words(words: list[str]) -> tuple[list[str], list[tuple[str, Any]]]:
    """Config files, and (key, value) pairs, of a command line as the loops read one; several values are a JSON list."""
    files: list[str] = []
    pairs: list[tuple[str, Any]] = []
    position = 0
    while position < len(words):
        key, equals, value = words[position].partition("=")
        if not key.startswith("--"):
            raise ValueError(f"the command has `{words[position]}` without a key: write `--key value`.")
        values = [value] if equals else []
        position += 1
        while not equals and position < len(words) and not words[position].startswith("--"):
            values.append(words[position])
            position += 1
        key = key[2:].replace("-", "_")
        if key == "config":
            files += values
        else:
            pairs.append((key, json.dumps(values) if len(values) > 1 else values[0] if values else True))
    return files, pairs


class _Place:
    """One `key: value` of a config file (flat or in a section) or of the command line, to be read and set."""

    def __init__(self, holder: dict[str, Any], name: str) -> None:
        self.holder, self.name, self.key = holder, name, name.replace("-", "_").rpartition(".")[2]

    @property
    def value(self) -> Any:
        return self.holder[self.name]

    @value.setter
    def value(self, value: Any) -> None:
        self.holder[self.name] = value


def _places_in(layer: dict[str, Any]) -> list[_Place]:
    sections = [value for value in layer.values() if isinstance(value, dict)]
    return [_Place(holder, name) for holder in (layer, *sections) for name in holder]


def _channels(places: Places, loop: str) -> dict[str, Path]:
    """Config key -> the channel's folder that fills it."""
    rows = ("preferences", "training") if loop == "dpo" else ("training", "preferences")
    names = {"dataset_name": rows, "eval_dataset_name": ("validation",), "model_id": ("models",)}
    found = {key: [folder for name in channels if (folder := places.channel(name))] for key, channels in names.items()}
    return {key: folders[0] for key, folders in found.items() if folders}


def _is_within(path: str, folder: Path) -> bool:
    return Path(path).is_absolute() and Path(path).is_relative_to(folder)


def _find_rows(folder: Path, named: str | None) -> Path:
    """The channel's file of the name that the config gives, else its only file, else the folder."""
    if named and (folder / Path(named).name).exists():
        return folder / Path(named).name
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return files[0] if len(files) == 1 else folder


def _find_model(folder: Path, named: str | None) -> Path:
    """The channel's model: its root, or the one folder in it, or the one that the config names."""

    def holds_a_model(path: Path) -> bool:
        return (path / "config.json").is_file() or (path / "adapter_config.json").is_file()

    inside = sorted({path.parent for path in folder.rglob("*config.json") if holds_a_model(path.parent)})
    if holds_a_model(folder):
        return folder
    by_name = [path for path in inside if named and path.relative_to(folder).as_posix() in (named, Path(named).name)]
    if by_name or len(inside) == 1:
        return (by_name or inside)[0]
    names = ", ".join(path.relative_to(folder).as_posix() for path in inside)
    if not inside:
        raise ValueError(f"the channel {folder.name} holds no model: no config.json below {folder}.")
    raise ValueError(f"the channel {folder.name} holds several models ({names}): say which one with model_id.")


def _read_files(files: list[str]) -> list[dict[str, Any]]:
    if not files:
        return []
    done = subprocess.run([sys.executable, "-c", READ_FILES, *files], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout)


def _write_files(files: list[str], layers: list[dict[str, Any]], folder: Path) -> list[str]:
    """The layers as JSON files `NUMBER-NAME.json`, which the loops read like YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, (path, layer) in enumerate(zip(files, layers, strict=True)):
        target = folder / f"{number}-{Path(path).stem}.json"
        target.write_text(json.dumps(layer, indent=1) + "\n")
        written.append(str(target))
    return written
