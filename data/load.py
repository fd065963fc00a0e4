"""Rows from JSON, JSONL, Parquet, CSV, a folder or the hub, brought to the columns that the loops read.

JSON and JSONL are read with Python's own parser, value for value: `datasets` would merge the schemas of nested columns
and change floats inside tool arguments (0.95 becomes 0.9500000000000001). Everything else goes through `datasets`.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import string
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

Row = dict[str, Any]

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
DATASETS_READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}  # suffix -> reader of `datasets`
SPLIT_WORDS = {  # split -> the words that name it in a file name
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "heldout"),
}
ROLES = {  # ShareGPT's speakers -> chat roles
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows, and how their columns become prompts and completions.

    A `dataset_name` given in a later layer (command line over file) replaces all keys of this group together.
    """

    dataset_name: str = "data/quickstart/train.jsonl"
    """A local file (.jsonl, .json, .parquet, .csv), a folder, or a hub id."""
    dataset_config: str | None = None
    """Hub configuration (subset)."""
    dataset_split: str = "train"
    """Split to read where the source has several."""
    eval_dataset_name: str | None = None
    """Rows for evaluation, from another file, folder or hub id."""
    eval_dataset_split: str = "test"
    """Split of `eval_dataset_name`, where it has several."""
    eval_split_ratio: float = 0.0
    """Part of the training rows held out for evaluation (drawn with the seed) when `eval_dataset_name` is not given."""
    max_train_samples: int = 0
    """Use the first N training rows; 0 uses all."""
    max_eval_samples: int = 0
    """Use the first N evaluation rows; 0 uses all."""
    field_mapping: dict[str, str] = field(default_factory=dict)
    """Name used here or in a template -> column of the data set."""
    system_prompt: str | None = None
    """System message put in front of every conversational prompt that has none of its own."""
    input_template: str | None = None
    """Prompt text, with {columns}; a brace is doubled, \\n is a newline."""
    output_template: str | None = None
    """Completion text, with {columns} (SFT)."""
    chosen_template: str | None = None
    """Preferred completion, with {columns} (DPO)."""
    rejected_template: str | None = None
    """Rejected completion, with {columns} (DPO)."""
    apply_chat_template: bool = False
    """Wrap plain-text prompts and completions as chat messages (user, assistant)."""
    converter: str | None = None
    """Your own `module:function`, row -> row (or None to drop it), called before mapping and templates."""

    def __post_init__(self) -> None:
        if not 0 <= self.eval_split_ratio < 1:
            raise ValueError(f"eval_split_ratio is {self.eval_split_ratio}; give a part from 0 (off) to below 1.")
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 (all) or more.")


def load_rows(config: DataConfig, *, seed: int) -> tuple[list[Row], list[Row] | None]:
    """The training rows and the evaluation rows (None where the config names none).

    A row keeps all its columns; mapping, templates and conversions add the columns that the loops read: `prompt`,
    `completion`, `chosen`, `rejected`, `messages`, `text`. The held-out part depends on `seed` and the number of rows
    alone, and shares no row with the training part.

    Raises:
        ValueError: one sentence naming the file, line or row, and the key to change.
    """
    rows = read_rows(config.dataset_name, config.dataset_split, config.dataset_config, key="dataset_name")
    eval_rows: list[Row] | None = None
    if config.eval_dataset_name:
        subset = config.dataset_config if config.eval_dataset_name == config.dataset_name else None
        eval_rows = read_rows(config.eval_dataset_name, config.eval_dataset_split, subset, key="eval_dataset_name")
    elif config.eval_split_ratio > 0:
        if len(rows) < 2:
            raise ValueError(f"eval_split_ratio cannot split the one row of {config.dataset_name}; set it to 0.")
        count = min(max(round(len(rows) * config.eval_split_ratio), 1), len(rows) - 1)
        held_out = set(random.Random(seed).sample(range(len(rows)), count))
        eval_rows = [row for index, row in enumerate(rows) if index in held_out]
        rows = [row for index, row in enumerate(rows) if index not in held_out]
    train = convert_rows(rows, config, config.dataset_name, limit=config.max_train_samples)
    if eval_rows is None:
        return train, None
    eval_source = config.eval_dataset_name or config.dataset_name
    return train, convert_rows(eval_rows, config, eval_source, limit=config.max_eval_samples)


# Reading


def read_rows(name: str, split: str, subset: str | None, *, key: str) -> list[Row]:
    """The raw rows of a file, a folder or a hub data set; `key` is the config key that named it, for the errors."""
    path = Path(name).expanduser()
    if path.is_file():
        rows = _read_file(path, split, key)
    elif path.is_dir():
        rows = _read_folder(path, split, key)
    elif path.suffix in (*JSON_SUFFIXES, *DATASETS_READERS) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"{key} names {name}, and there is no such file or folder (working directory: {os.getcwd()}).")
    else:
        rows = _read_hub(name, split, subset, key)
    if not rows:
        raise ValueError(f"{key} names {name}, which holds no rows.")
    return rows


def _read_file(path: Path, split: str, key: str) -> list[Row]:
    if path.suffix == ".json":
        return _read_json(path, split, key)
    if path.suffix in JSON_SUFFIXES:
        return _read_json_lines(path)
    if path.suffix not in DATASETS_READERS:
        raise ValueError(f"{key} names {path}; its suffix must be one of .jsonl, .json, .parquet, .csv or .tsv.")
    from datasets import load_dataset

    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    try:
        return list(load_dataset(DATASETS_READERS[path.suffix], data_files=str(path), split="train", **options))
    except Exception as error:  # every reader of `datasets` has its own exceptions
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {_first_line(error)}.") from error


def _read_json_lines(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} line {number} is not UTF-8: {error.reason} at byte {error.start}.") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error.msg} at column {error.colno}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} holds a {type(row).__name__}; every line must be a JSON object.")
        rows.append(row)
    return rows


def _read_json(path: Path, split: str, key: str) -> list[Row]:
    """A list of objects, an object of such lists by split, or lines of objects in a file with the wrong suffix."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    except json.JSONDecodeError as error:
        if not path.read_bytes().strip():
            return []
        if error.msg == "Extra data":
            return _read_json_lines(path)
        raise ValueError(f"{path} line {error.lineno} is not JSON: {error.msg} at column {error.colno}.") from error
    if isinstance(content, dict) and content and all(isinstance(value, list) for value in content.values()):
        if split not in content:
            raise ValueError(f"{key} names {path}, which has no split {split}; it has {_listed(content)}.")
        content = content[split]
    elif isinstance(content, dict):
        content = [content]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError(f"{path} must hold a list of JSON objects, one a row.")
    return content


def _read_folder(folder: Path, split: str, key: str) -> list[Row]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        from datasets import DatasetDict, load_from_disk

        saved = load_from_disk(str(folder))
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise ValueError(f"{key} names {folder}, which has no split {split}; it has {_listed(saved)}.")
            saved = saved[split]
        return list(saved)
    suffixes = (*JSON_SUFFIXES, *DATASETS_READERS)
    files = sorted(path for path in [*folder.glob("*"), *folder.glob("*/*")] if path.suffix in suffixes)
    splits: dict[str, list[Path]] = {}
    for path in files:
        splits.setdefault(_split_of(path, folder, split), []).append(path)
    wanted = _split_name(split)
    if wanted not in splits and not (wanted == "train" and list(splits) == [""]):
        found = _listed(name or "files without a split in their names" for name in splits)
        raise ValueError(
            f"{key} names the folder {folder}, which has no files of split {split}"
            f" (such as {split}.jsonl); it has {found or 'no .jsonl, .json, .parquet or .csv file'}."
        )
    chosen = splits.get(wanted) or splits[""]
    # train.jsonl beside preferences_train.jsonl is the training split; the other is a data set of its own.
    chosen = [path for path in chosen if _split_name(re.split(r"[-_. ]", path.name)[0]) == wanted] or chosen
    if len({path.suffix for path in chosen}) > 1:
        names = _listed(path.name for path in chosen)
        raise ValueError(f"{key} names the folder {folder}, where {names} differ in type; name one of them.")
    return [row for path in chosen for row in _read_file(path, split, key)]


def _split_name(word: str) -> str:
    return next((split for split, words in SPLIT_WORDS.items() if word.lower() in words), word.lower())


def _split_of(path: Path, folder: Path, split: str) -> str:
    """The split that a file's name (`train-00000-of-00002.parquet`) or its subfolder's names, or ''."""
    known = {split.lower(), *(word for words in SPLIT_WORDS.values() for word in words)}
    for part in reversed(path.relative_to(folder).with_suffix("").parts):
        for word in re.split(r"[-_. ]", part.lower()):
            if word in known:
                return _split_name(word)
    return ""


def _read_hub(name: str, split: str, subset: str | None, key: str) -> list[Row]:
    from datasets import load_dataset

    try:
        return list(load_dataset(name, subset, split=split))
    except Exception as error:  # network, missing repository, gated, unknown split: the hub's own words say which
        raise ValueError(
            f"{key} names {name}, which is no file or folder here and was not read from the hub"
            f" (split {split}): {_first_line(error)}."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


# Converting


def convert_rows(rows: list[Row], config: DataConfig, source: str, *, limit: int = 0) -> list[Row]:
    """Rows with the loops' columns added, up to `limit` of them (0: all); rows count from 1 in errors."""
    converter = import_function(config.converter, key="converter") if config.converter else None
    converted: list[Row] = []
    for number, row in enumerate(rows, start=1):
        if limit and len(converted) == limit:
            break
        where = f"row {number} of {source}"
        if converter:
            try:
                row = converter(dict(row))
            except (Exception, SystemExit) as error:
                said = f"{type(error).__name__} {str(error).strip()}".strip()
                raise ValueError(f"converter {config.converter} failed on {where}: {said}.") from error
            if row is None:
                continue
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise ValueError(f"converter {config.converter} returned a {kind} for {where}; return a dict or None.")
        converted.append(_convert_row(row, config, where))
    if not converted:
        raise ValueError(f"converter {config.converter} dropped every row of {source}.")
    return converted


def _convert_row(row: Row, config: DataConfig, where: str) -> Row:
    row = dict(row)
    mapped = {}
    for name, column in config.field_mapping.items():
        if column not in row:
            raise ValueError(f"field_mapping {name}: {column} names no column of {where}; it has {_listed(row)}.")
        mapped[name] = row[column]
    row.update(mapped)

    templates = {
        "prompt": ("input_template", config.input_template),
        "completion": ("output_template", config.output_template),
        "chosen": ("chosen_template", config.chosen_template),
        "rejected": ("rejected_template", config.rejected_template),
    }
    filled = {name: _fill(text, row, key, where) for name, (key, text) in templates.items() if text is not None}
    row.update(filled)
    if not filled:
        _adopt_known_layouts(row)

    if config.apply_chat_template:
        wrappable = [name for name in templates if name in row]
        if not wrappable and "messages" not in row:
            raise ValueError(
                f"apply_chat_template needs a prompt and {where} has none (its columns: {_listed(row)});"
                " give input_template or field_mapping."
            )
        for name in wrappable:
            if isinstance(row[name], str):
                row[name] = [{"role": "user" if name == "prompt" else "assistant", "content": row[name]}]
    if config.system_prompt is not None:
        _add_system_prompt(row, _unescape(config.system_prompt), where)
    return row


def _adopt_known_layouts(row: Row) -> None:
    """ShareGPT's `conversations` and Alpaca's instruction/input/output, where the row has none of our columns."""
    if isinstance(row.get("conversations"), list) and "messages" not in row and "prompt" not in row:
        turns = [_from_sharegpt(turn) for turn in row["conversations"]]
        row["prompt" if "chosen" in row else "messages"] = turns
        for name in ("chosen", "rejected"):
            if isinstance(row.get(name), dict):
                row[name] = [_from_sharegpt(row[name])]
    elif "instruction" in row and not {"prompt", "completion", "messages", "text"} & row.keys():
        request = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        row["prompt"] = [{"role": "user", "content": request}]
        if "output" in row:
            row["completion"] = [{"role": "assistant", "content": row["output"]}]


def _from_sharegpt(turn: dict[str, Any]) -> dict[str, Any]:
    if "from" not in turn:
        return turn
    role = ROLES.get(turn["from"], turn["from"])
    if turn["from"] == "function_call":
        return {"role": role, "content": "", "tool_calls": turn.get("value")}
    return {"role": role, "content": turn.get("value")}


def _add_system_prompt(row: Row, system_prompt: str, where: str) -> None:
    # A conversation starts in `messages` or `prompt`; without a prompt, or with one that is text, in the replies.
    replies = [name for name in ("completion", "chosen", "rejected") if isinstance(row.get(name), list)]
    conversations = [name for name in ("messages", "prompt") if isinstance(row.get(name), list)] or replies
    if not conversations:
        raise ValueError(
            f"system_prompt needs conversations and {where} is plain text;"
            " set apply_chat_template: true or write it into input_template."
        )
    if any(row[name] and row[name][0].get("role") == "system" for name in replies):
        return
    for name in conversations:
        if not row[name] or row[name][0].get("role") != "system":
            row[name] = [{"role": "system", "content": system_prompt}, *row[name]]


def _unescape(template: str) -> str:
    r"""A shell passes `\n` as two characters; here they mean a newline, and `\\n` means the two characters."""
    return re.sub(r"\\(\\?)n", lambda match: "\\n" if match[1] else "\n", template)


def _fill(template: str, row: Row, key: str, where: str) -> str:
    parts = []
    try:
        fields = list(string.Formatter().parse(_unescape(template)))
    except ValueError as error:
        raise ValueError(f"{key} is no template ({error}); write a literal brace twice, {{{{ or }}}}.") from error
    for literal, name, specification, conversion in fields:
        parts.append(literal)
        if name is None:
            continue
        if name not in row or specification or conversion:
            shown = name + (f"!{conversion}" if conversion else "") + (f":{specification}" if specification else "")
            raise ValueError(
                f"{key} has the placeholder {{{shown}}}, which is no column of {where};"
                f" the columns are {_listed(row)} (write a literal brace twice)."
            )
        value = row[name]
        if value is None:
            value = ""
        parts.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return "".join(parts)


def import_function(name: str, *, key: str) -> Callable[..., Any]:
    """A user's `module:function`, found among the installed packages and in the working directory."""
    module_name, separator, function_name = name.partition(":")
    if not separator or not module_name or not function_name:
        raise ValueError(f"{key} is {name}; write module:function.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that a file there never shadows an installed package
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the module does when it is read
        reason = "it calls exit()" if isinstance(error, SystemExit) else _first_line(error)
        raise ValueError(f"{key} names {name}, which cannot be imported: {reason}.") from error
    if not hasattr(module, function_name):
        near = get_close_matches(function_name, dir(module), 1)
        hint = f"; did you mean {module_name}:{near[0]}?" if near else "."
        raise ValueError(f"{key} names {name}, which cannot be imported: {module_name} has no {function_name}{hint}")
    function = getattr(module, function_name)
    if not callable(function):
        raise ValueError(f"{key} names {name}, which is not a function.")
    return function
