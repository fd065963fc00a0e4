"""Rows from JSON, JSONL, Parquet, CSV, a folder or the hub, brought to the columns that the loops read.

JSON, JSONL and CSV are read with Python's own parsers, value for value: `datasets` would merge the schemas of nested
columns, change floats inside tool arguments (0.95 becomes 0.9500000000000001) and guess the types of CSV cells (007, NA
and True are text here). Everything else goes through `datasets`, whose structs hold the keys of all rows: a None inside
tools and tool calls is taken for a key that this row lacks. A null that is meant there has to be JSON text.
"""

from __future__ import annotations

import ast
import csv
import glob
import importlib
import io
import json
import os
import random
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

Row = dict[str, Any]

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
DATASETS_READERS = {".parquet": "parquet", ".arrow": "arrow"}  # suffix -> reader of `datasets`
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "zstd"}  # suffix -> module, or codec of Arrow
SUFFIXES = (*JSON_LINES, ".json", *DELIMITERS, *DATASETS_READERS)
# Rows that nothing here reads; and files beside rows that hold none.
UNREAD = (
    *(".7z", ".avro", ".feather", ".lz4", ".npy", ".npz", ".orc", ".pickle", ".pkl", ".rar", ".tar", ".tgz"),
    *(".xls", ".xlsx", ".zip", *COMPRESSED),
)
NO_ROWS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
SPLIT_WORDS = {  # split -> the words that name it in a file name
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "heldout"),
}
COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected")  # those that may hold conversations
ROLES = {  # names of speakers -> chat roles
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "function", "ipython")},
    **dict.fromkeys(("human", "prompter", "instruction", "question"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "chatbot", "ai", "llm", "claude", "bard", "bing"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool_response", "tool_result"), "tool"),
}
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")  # a row's own system message
# Letters after a backslash that make a command of TeX and no line break before a word.
_TEX = re.compile(
    "n(abla|atural|cong|e|earrow|eg|eq|ewline|ewcommand|ewenvironment|ewpage|ewtheorem|exists|geqq?|geqslant|gtr|i"
    "|icefrac|leqq?|leqslant|less|mid|ocite|obreak|obreakspace|oindent|olimits|olinebreak|onumber|opagebreak|orm"
    "|ormalfont|ormalsize|ot|otag|otin|parallel|prec|preceq|shortmid|shortparallel|sim|subseteqq?|subset|succ|succeq"
    "|supseteqq?|supset|triangle(left|right)(eq)?|u|umber|warrow|[vV][dD]ash|(left|right|leftright)arrow"
    "|(Left|Right|Leftright)arrow)"
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows, and how their columns become prompts and completions.

    A `dataset_name` given in a later layer (command line over file) replaces all keys of this group together.
    """

    dataset_name: str = "data/quickstart/train.jsonl"
    """A local file (.jsonl, .json, .csv, .tsv, also with .gz, .bz2, .xz or .zst; .parquet, .arrow), a folder of such
    files, or a hub id."""
    dataset_config: str | None = None
    """Hub configuration (subset)."""
    dataset_split: str = "train"
    """Split to read where the source has several; a slice such as train[:500] or train[10%:20%] reads part of any."""
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
    """System message put in front of every conversational prompt that has none of its own (in the conversation, or in a
    column `system`). \\n as in input_template."""
    input_template: str | None = None
    """Prompt text, with {columns}; a brace is doubled. Backslash and n are a newline, unless they begin a TeX command
    (\\neq, \\nabla, \\nu ...); \\\\n stays a backslash and n."""
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

    Raises ValueError: one sentence naming the file, line or row, and the key to change.
    """
    rows = read_rows(config.dataset_name, config.dataset_split, config.dataset_config, key="dataset_name")
    eval_rows: Rows | None = None
    if config.eval_dataset_name:
        subset = config.dataset_config if config.eval_dataset_name == config.dataset_name else None
        eval_rows = read_rows(config.eval_dataset_name, config.eval_dataset_split, subset, key="eval_dataset_name")
    elif config.eval_split_ratio > 0:
        if len(rows) < 2:
            raise ValueError(f"eval_split_ratio cannot split the one row of {config.dataset_name}; set it to 0.")
        count = min(max(round(len(rows) * config.eval_split_ratio), 1), len(rows) - 1)
        held_out = set(random.Random(seed).sample(range(len(rows)), count))
        eval_rows = Rows((row for index, row in enumerate(rows) if index in held_out), rows.notes)
        rows = Rows((row for index, row in enumerate(rows) if index not in held_out), rows.notes)
    train = convert_rows(rows, config, config.dataset_name, limit=config.max_train_samples)
    if eval_rows is None:
        return train, None
    eval_source = config.eval_dataset_name or config.dataset_name
    evaluation = convert_rows(eval_rows, config, eval_source, limit=config.max_eval_samples)
    seen = set(map(_identity, train))
    again = sum(_identity(row) in seen for row in evaluation)
    if again:
        train.notes.append(f"{again} of the {len(evaluation)} evaluation rows are training rows too")
    return train, evaluation


def _identity(row: Row) -> int:
    """A number for what a loop reads of a row: rows of one number are the same to it."""
    read = {name: row[name] for name in (*COLUMNS, "text", "tools") if row.get(name) is not None}
    return hash(json.dumps(read or row, sort_keys=True, default=str))


# Reading


class Rows(list[Row]):
    """Rows, and what the run says of them: the files they are from, what was left out, parsed or met twice."""

    def __init__(self, rows: Iterable[Row] = (), notes: Iterable[str] = ()) -> None:
        super().__init__(rows)
        self.notes = list(notes)


def read_rows(name: str, split: str, subset: str | None, *, key: str) -> Rows:
    """The raw rows of a file, a folder or a hub data set; `key` is the config key that named it, for the errors.

    The same rules hold for training, evaluation and test rows. `split` may be a slice (`train[:500]`, `test[10%:20%]`)
    or a sum (`train+validation`).
    """
    path = Path(name).expanduser()
    if not path.exists():
        suffixes = {*SUFFIXES, *COMPRESSED}
        if path.suffix.lower() in suffixes or name.startswith((".", "/", "~")) or name.count("/") > 1:
            where = f"working directory: {os.getcwd()}"
            raise ValueError(f"{key} names {name}, and there is no such file or folder ({where}).")
        rows = Rows(_read_hub(name, split, subset, key), [f"read from the hub's {name}, split {split}"])
    else:
        rows = Rows()
        for part in split.split("+"):
            found = _SPLIT.fullmatch(part.strip())
            if not found:
                raise ValueError(
                    f"{key.replace('name', 'split')} is {split}; give the name of a split, or a slice of one such as"
                    " train[:500] or train[10%:20%]."
                )
            read = _read_folder(path, found[1], key) if path.is_dir() else Rows(_read_file(path, found[1], key))
            bounds = [_place(bound, len(read), part, name) for bound in (found[2], found[3])]
            rows += read[slice(*bounds)]
            rows.notes += [note for note in read.notes or [f"read from {name}"] if note not in rows.notes]
    if not rows:
        raise ValueError(f"{key} names {name}, which holds no rows{f' in {split}' if '[' in split else ''}.")
    return rows


_SPLIT = re.compile(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


def _place(bound: str | None, count: int, part: str, name: str) -> int | None:
    if not bound:
        return None
    place = round(int(bound[:-1]) * count / 100) if bound.endswith("%") else int(bound)
    if abs(place) > count:
        raise ValueError(f"the split {part} reaches past the {count} rows of {name}; give a slice within them.")
    return place


def _suffixes(path: Path) -> tuple[str, str]:
    """(suffix of the rows' format, suffix of the compression or '')."""
    packed = path.suffix.lower() if path.suffix.lower() in COMPRESSED else ""
    return Path(path.stem if packed else path.name).suffix.lower(), packed


def _is_read(path: Path) -> bool:
    suffix, packed = _suffixes(path)
    return suffix in SUFFIXES and not (packed and suffix in DATASETS_READERS)


def _read_file(path: Path, split: str, key: str, *, chosen: bool = False) -> list[Row]:
    """The rows of one file; `chosen`: as one of a folder's files of this split."""
    suffix = _suffixes(path)[0]
    if not _is_read(path):
        raise ValueError(
            f"{key} names {path}; its suffix must be one of .jsonl, .json, .parquet, .arrow, .csv or .tsv"
            " (all but .parquet and .arrow also with .gz, .bz2, .xz or .zst)."
        )
    rows, by_name = _read_json(path, split, key) if suffix == ".json" else ([], False)
    default = "test" if key.startswith("eval") else "train"
    if not (chosen or by_name) and _split_name(split) not in ("train", default, _split_of(Path(path.name), split)):
        raise ValueError(
            f"{key} names {path}, a single file, and {key.replace('name', 'split')} is {split}, which it does not have;"
            " leave the split out, or name the file that holds it."
        )
    if suffix == ".json":
        return rows
    if suffix in DELIMITERS:
        return _read_csv(path, DELIMITERS[suffix])
    if suffix not in DATASETS_READERS:
        return _read_json_lines(path)
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    try:
        found = load_dataset(DATASETS_READERS[suffix], data_files=glob.escape(str(path)), split="train")
        return [_without_filled(row) for row in found]
    except Exception as error:  # every reader of `datasets` has its own exceptions
        raise ValueError(f"{path} cannot be read as {suffix[1:]}: {_first_line(error)}.") from error


def _read_text(path: Path) -> str:
    packed = _suffixes(path)[1]
    try:
        if packed == ".zst":
            from datasets.table import pa  # Arrow, which `datasets` brings: Python has no zstd before 3.14

            with pa.input_stream(str(path), compression=COMPRESSED[packed]) as file:
                content = file.read()
        else:
            with importlib.import_module(COMPRESSED[packed]).open(path) if packed else path.open("rb") as file:
                content = file.read()
    except Exception as error:  # every kind of compression has its own exceptions
        raise ValueError(f"{path} cannot be read: {_first_line(error)}.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} line {line} is not UTF-8: {error.reason} at byte {error.start} of the file; save it as UTF-8."
        ) from error


def _read_csv(path: Path, delimiter: str) -> list[Row]:
    """Cells as they are written: no types, no missing values; an empty cell is empty text."""
    csv.field_size_limit(2**31 - 1)  # a cell may hold a document
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    header: list[str] = []
    try:
        for cells in filter(None, reader):
            if not header:
                header = cells
                if len(set(header)) < len(header):
                    raise ValueError(f"{path} has two columns of one name in its header: {', '.join(header)}.")
            elif len(cells) != len(header):
                raise ValueError(
                    f"{path} line {reader.line_num} has {len(cells)} cells and the header has {len(header)};"
                    " put a cell that contains the delimiter in double quotes."
                )
            else:
                rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise ValueError(
            f"{path} line {reader.line_num} is not {path.suffix[1:].upper()}: {error}; a cell with quotes is put in"
            " double quotes, and its own are doubled."
        ) from error
    return rows


def _parse_json(text: str, path: Path, line: int | None = None) -> Any:
    where = f"{path} line {line}" if line else str(path)
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        where = f"{path} line {line or error.lineno}"
        raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from error
    except UnicodeEncodeError as error:
        near = error.object[max(error.start - 20, 0) : error.end]
        raise ValueError(f"{where} holds half of a surrogate pair, which is no character, in {near!r}.") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; brackets 2,000 deep
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else _first_line(error)
        raise ValueError(f"{where} cannot be read as JSON: {reason}.") from error


def _read_json_lines(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = _parse_json(line, path, number)
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} holds a {type(row).__name__}; every line must be a JSON object.")
        rows.append(row)
    return rows


def _read_json(path: Path, split: str, key: str) -> tuple[list[Row], bool]:
    """The rows, and whether they were chosen by the split's name.

    A list of objects; one object of columns; an object that holds the rows as a list under any name, or as several
    lists by split; lines of objects in a file with the wrong suffix. Any other object is one row.
    """
    text = _read_text(path)
    try:
        content = _parse_json(text, path) if text.strip() else []
    except ValueError as error:
        if getattr(error.__cause__, "msg", None) == "Extra data":
            return _read_json_lines(path), False
        raise
    if isinstance(content, dict):
        lists = {name: value for name, value in content.items() if _is_rows(value)}
        cells = list(content.values())
        if all(isinstance(value, dict) and value and all(map(str.isdigit, value)) for value in cells):
            cells = [list(value.values()) for value in cells]  # as pandas writes them: column, row number, value
        if all(isinstance(value, list) and len(value) == len(cells[0]) for value in cells) and (
            len(lists) < len(content) and not any(map(_is_conversation, cells))
        ):
            content = [dict(zip(content, row, strict=True)) for row in zip(*cells, strict=True)]
        elif not lists or content.keys() & {*COLUMNS, "text", "conversations", "instruction", "input", "question"}:
            content = [content]
        else:
            name = _find_split(list(lists), split)
            if name is None:
                raise ValueError(f"{key} names {path}, which has no split {split}; it has {', '.join(lists)}.")
            return lists[name], _split_name(name) == _split_name(split)
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError(f"{path} must hold a list of JSON objects, one a row.")
    return content, False


def _is_rows(value: Any) -> bool:
    objects = isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
    return objects and not _is_conversation(value)


def _is_conversation(value: Any) -> bool:
    """A list of messages, of which at least one has a speaker that is known."""
    turns = value if isinstance(value, list) else []
    speakers: list[Any] = [isinstance(turn, dict) and (turn.get("role") or turn.get("from")) for turn in turns]
    return bool(speakers) and all(isinstance(name, str) for name in speakers) and any(map(_role, speakers))


def _find_split(found: list[str], split: str, own: str = "") -> str | None:
    """The one of `found` that is `split`: of this name, of a name of the same meaning, or the only one.

    The only one may not be of another split, unless the folder's own name (`own`) says `split`; but `validation` will
    do for `test`, which is the default.
    """
    wanted = _split_name(split)
    named = [name for name in found if name == split] or [name for name in found if _split_name(name) == wanted]
    if named or len(found) != 1:
        return named[0] if named else None
    name = own if own in SPLIT_WORDS else _split_name(found[0])
    other = name in SPLIT_WORDS and name != wanted and (name, wanted) != ("validation", "test")
    return found[0] if found[0] == "" or not other else None


def _without_filled(row: Row) -> Row:
    """An Arrow row without the keys that other rows' tools and tool calls have: Arrow fills them with None."""
    for column, value in row.items():
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, dict) for item in items):
            continue
        if column in _CALLS or all("function" in item or {"name", "parameters"} <= item.keys() for item in items):
            row[column] = _drop_none(value)
            continue
        for item in items:
            item.update({name: _drop_none(item[name]) for name in _CALLS if name in item})
    return row


_CALLS = ("tools", "functions", "tool_calls", "function_call")


def _drop_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _drop_none(item) for name, item in value.items() if item is not None}
    return [_drop_none(item) for item in value] if isinstance(value, list) else value


def _read_folder(folder: Path, split: str, key: str) -> Rows:
    """The rows of the files of a split, from subfolders of any depth too; names of what was read are its note."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        from datasets import DatasetDict, disable_progress_bars, load_from_disk

        disable_progress_bars()
        saved = load_from_disk(str(folder))
        if isinstance(saved, DatasetDict):
            name = _find_split(list(saved), split, _split_name(folder.name))
            if name is None:
                raise ValueError(f"{key} names {folder}, which has no split {split}; it has {', '.join(saved)}.")
            saved = saved[name]
        return Rows(map(_without_filled, saved))
    wanted = _split_name(split)
    splits: dict[str, list[Path]] = {}
    unread: list[Path] = []
    for path in _files_of(folder):
        name = _split_of(path.relative_to(folder), split)
        if _is_read(path):
            splits.setdefault(name, []).append(path)
        elif name in ("", wanted):
            unread.append(path)
    if unread:
        raise ValueError(
            f"{key} names the folder {folder}, which holds {_shortened(unread, folder)}: files of this type are not"
            " read; unpack them, or move them out of the folder."
        )
    name = _find_split(list(splits), split, _split_name(folder.name))
    if name is None:
        found = ", ".join(name or "files without a split in their names" for name in splits)
        raise ValueError(
            f"{key} names the folder {folder}, which has no files of split {split}"
            f" (such as {split}.jsonl); it has {found or 'no .jsonl, .json, .parquet or .csv file'}."
        )
    chosen, rest = splits[name], splits.get("", []) if name else []
    # train.jsonl beside preferences_train.jsonl is the training split; the other is a data set of its own.
    top = [path for path in chosen if path.parent == folder]
    others = [path for path in top if _split_name(re.split(r"[-_. ]", path.name)[0]) != wanted]
    if len(others) < len(top):
        chosen, rest = [path for path in chosen if path not in others], others + rest
    unnamed = [path for path in rest if path not in others and _suffixes(path)[0] != ".json"]
    if unnamed:
        raise ValueError(
            f"{key} names the folder {folder}, which holds {_shortened(unnamed, folder)} without a split in the name"
            f" beside files of split {split}; put {split} into the name, or move them out of the folder."
        )
    kinds = {_suffixes(path)[0] for path in chosen}
    plain = {path.with_suffix("") if _suffixes(path)[1] else path for path in chosen}
    if len(kinds) > 1 or len(plain) < len(chosen):
        names = ", ".join(path.name for path in chosen)
        fault = "differ in type" if len(kinds) > 1 else "hold one file twice"
        raise ValueError(f"{key} names the folder {folder}, where {names} {fault}; name one of them.")
    note = f"read from {folder}: {_shortened(chosen, folder)}"
    if rest:
        note += f" (not read: {_shortened(rest, folder)})"
    return Rows((row for path in chosen for row in _read_file(path, split, key, chosen=True)), [note])


def _files_of(folder: Path) -> list[Path]:
    """Files that may hold rows, of all depths, in order; hidden and unfinished ones (.cache, _temporary) do not."""
    files: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        inside = os.path.realpath(place)  # a link to a folder around itself would never end
        around = {inside, *map(str, Path(inside).parents)}
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "_")) and os.path.realpath(os.path.join(place, name)) not in around
        ]
        files += [Path(place, name) for name in names if not name.startswith(".") and name not in NO_ROWS]
    return sorted(path for path in files if _is_read(path) or path.suffix.lower() in UNREAD)


def _shortened(paths: list[Path], folder: Path) -> str:
    names = [str(path.relative_to(folder)) for path in paths]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _split_name(word: str) -> str:
    return next((split for split, words in SPLIT_WORDS.items() if word.lower() in words), word.lower())


def _split_of(path: Path, split: str) -> str:
    """The split that a file's name (`train-00000-of-00002.parquet`) or one of its folders' names, or ''."""
    known = {split.lower(), *(word for words in SPLIT_WORDS.values() for word in words)}
    for part in reversed(path.parts):
        for word in re.split(r"[-_. ]", part.lower()):
            if word in known:
                return _split_name(word)
    return ""


def _read_hub(name: str, split: str, subset: str | None, key: str) -> list[Row]:
    from datasets import disable_progress_bars, load_dataset

    if not sys.stderr.isatty():  # a terminal shows how far a download is
        disable_progress_bars()
    try:
        return [_without_filled(row) for row in load_dataset(name, subset, split=split)]
    except Exception as error:  # network, missing repository, gated, unknown split: the hub's own words say which
        raise ValueError(
            f"{key} names {name}, which is no file or folder here and was not read from the hub"
            f" (split {split}): {_first_line(error)}."
        ) from error


def _first_line(error: BaseException) -> str:
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__:  # its cover says nothing
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


# Converting


def convert_rows(rows: list[Row], config: DataConfig, source: str, *, limit: int = 0) -> Rows:
    """Rows with the loops' columns added, up to `limit` of them (0: all); rows count from 1 in errors."""
    converter = import_function(config.converter, key="converter") if config.converter else None
    converted = Rows(notes=getattr(rows, "notes", ()))
    found: Counter[str] = Counter()
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
        try:
            converted.append(_convert_row(row, config, where, found))
        except ValueError as error:
            raise error if where in str(error) else ValueError(f"{where}: {error}") from error
        except Exception as error:  # values of types that nobody thought of
            raise ValueError(f"{where} cannot be converted: {type(error).__name__} {_first_line(error)}.") from error
    if not converted:
        raise ValueError(f"converter {config.converter} dropped every row of {source}.")
    converted.notes += [f"{count} {what}" for what, count in found.items() if count]
    return converted


def _convert_row(row: Row, config: DataConfig, where: str, found: Counter[str]) -> Row:
    """`found` counts what the run says of the rows."""
    row = dict(row)
    mapped = {}
    for name, column in config.field_mapping.items():
        if column not in row:
            raise ValueError(f"field_mapping {name}: {column} names no column of {where}; it has {', '.join(row)}.")
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
    parsed = {name: _parse_conversation(row[name], name, where) for name in COLUMNS if name in row.keys() - filled}
    parsed = {name: value for name, value in parsed.items() if value is not None}
    found["rows with conversations parsed from JSON text"] += bool(parsed)
    row.update(parsed)
    for name in COLUMNS:
        if isinstance(row.get(name), dict) and name != "prompt":
            row[name] = [row[name]]
        if isinstance(row.get(name), list):
            row[name] = [_read_turn(turn, name, where, found) for turn in row[name]]

    if config.apply_chat_template:
        wrappable = [name for name in templates if name in row]
        plain = [name for name in wrappable if isinstance(row[name], str)]
        if not {"prompt", "messages"} & row.keys() and (plain or not wrappable):
            raise ValueError(
                f"apply_chat_template needs a prompt and {where} has none (its columns: {', '.join(row)});"
                " give input_template or field_mapping."
            )
        for name in plain:
            row[name] = [{"role": "user" if name == "prompt" else "assistant", "content": row[name]}]
    if not filled or mapped.keys() & {*SYSTEM_COLUMNS, "history"}:
        _add_own_beginning(row, where, found)
    else:
        for name in SYSTEM_COLUMNS:
            unused = bool(row.get(name)) and not any(f"{{{name}}}" in (text or "") for _, text in templates.values())
            found[f"rows whose column {name} no template names, so it is not used"] += unused
    if config.system_prompt is not None:
        if not _add_messages(row, [{"role": "system", "content": _unescape(config.system_prompt)}]):
            raise ValueError(
                f"system_prompt needs conversations and {where} is plain text;"
                " set apply_chat_template: true or write it into input_template."
            )
    return row


def _adopt_known_layouts(row: Row) -> None:
    """ShareGPT's `conversations`, Alpaca's instruction/input/output, Orca's question beside a pair, and input/output,
    where the row has none of our columns."""
    known = {"prompt", "completion", "messages", "text"} & row.keys()
    if "conversations" in row and "messages" not in row and "prompt" not in row:
        row["prompt" if "chosen" in row else "messages"] = row["conversations"]
    elif "instruction" in row and not known:
        added = row.get("input") or row.get("context")  # Alpaca's, Dolly's
        request = "\n\n".join(str(part) for part in (row["instruction"], added) if part)
        row["prompt"] = [{"role": "user", "content": request}]
        if "output" in row or "response" in row:
            row["completion"] = [{"role": "assistant", "content": row.get("output", row.get("response"))}]
    elif "question" in row and {"chosen", "rejected"} <= row.keys() and not known:
        row["prompt"] = [{"role": "user", "content": row["question"]}]
    elif {"input", "output"} <= row.keys() and not known:
        row["prompt"], row["completion"] = row["input"], row["output"]


def _parse_conversation(value: Any, column: str, where: str) -> list[Any] | None:
    """The messages that a file format (CSV, a text column) had to make text of; None where it is no such text.

    JSON, or Python's own spelling, which pandas writes. `messages` has to be one; other columns are where they look so.
    """
    if not isinstance(value, str) or column != "messages" and not value.lstrip().startswith(("[", "{")):
        return None
    messages: Any = None
    reason = "it is empty"
    if value.strip():
        try:
            messages = json.loads(value)
        except (ValueError, RecursionError) as error:
            reason = _first_line(error)
            try:
                messages = ast.literal_eval(value.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                pass
        else:
            reason = "it is another value"
    messages = [messages] if isinstance(messages, dict) else messages

    def says(turns: Any) -> bool:
        return _is_conversation(turns) and all({"content", "value", "tool_calls"} & turn.keys() for turn in turns)

    if says(messages):
        return messages
    items = messages if isinstance(messages, list) else []
    inside = [part for item in items for part in (item.values() if isinstance(item, dict) else [item])]
    if column == "messages" or messages is None and _MESSAGE_TEXT.match(value) or any(map(says, inside)):
        raise ValueError(
            f"the {column} of {where} is text that is no JSON list of messages ({reason}): {value[:60]!r};"
            " give a list of objects with role and content (or name the column in a template, which takes it as text)."
        )
    return None


_MESSAGE_TEXT = re.compile(r"\s*\[\s*\{\s*(['\"])(role|from|content|value)\1\s*:")


def _role(speaker: str) -> str | None:
    """The chat role of a speaker's name, or None for a name that is not known."""
    name = speaker.strip().lower()
    return "assistant" if re.match(r"(chat)?gpt[-\d]", name) else ROLES.get(name)


def _read_turn(turn: Any, column: str, where: str, found: Counter[str]) -> Any:
    """A message with role and content, from ShareGPT's from and value too; its other keys stay."""
    if not isinstance(turn, dict):
        return turn  # refused where it is encoded
    speaker = turn.get("from") or turn.get("role")
    if not isinstance(speaker, str):
        return turn
    role = _role(speaker)
    if role == turn.get("role") and not turn.keys() & {"from", "value"}:
        return turn
    if role is None and turn.get("from"):
        raise ValueError(
            f"the {column} of {where} has the speaker {speaker!r}, which is none of {', '.join(ROLES)};"
            " rename it with a converter."
        )
    if role is None:
        found[f"messages of the role {speaker}, which is not known and never trained"] += 1
    message = {name: value for name, value in turn.items() if name not in ("from", "value")} | {"role": role or speaker}
    if "value" in turn and message.get("content") is None:
        message["content"] = turn["value"]
    if speaker.lower().strip() in ("function_call", "tool_call", "tool_calls") and "tool_calls" not in turn:
        message |= {"content": "", "tool_calls": message.get("content")}
    return message


def _add_own_beginning(row: Row, where: str, found: Counter[str]) -> None:
    """The row's own system message and earlier turns (Alpaca's `history`), put in front of its conversation."""
    column = next((name for name in SYSTEM_COLUMNS if row.get(name)), "history")
    system, pairs = row[column] if column in SYSTEM_COLUMNS else "", row.get("history") or []
    if isinstance(pairs, str) and pairs.lstrip().startswith("["):
        pairs = json.loads(pairs)
    if isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        turns = [{"role": role, "content": text} for pair in pairs for role, text in zip(_TURN, pair, strict=True)]
    elif "instruction" in row:
        raise ValueError(f"the history of {where} is {pairs!r:.80}; give a list of [question, answer].")
    else:
        turns = []  # a column of another meaning
    if not isinstance(system, str):
        raise ValueError(f"the column {column} of {where} is {system!r:.80}; give text.")
    if system.strip():
        begins = [row[name][0].get("content") for name in _system_messages(row)]
        found[f"rows with another system message in the conversation, so the column {column} is not used"] += bool(
            begins and system.strip() not in begins
        )
        turns = [{"role": "system", "content": system}, *turns]
    if turns and {*COLUMNS} & row.keys() and not _add_messages(row, turns):
        raise ValueError(
            f"{where} is plain text and its column {column} belongs in front of a conversation; set"
            " apply_chat_template: true, or name the columns that make the prompt in input_template."
        )


_TURN = ("user", "assistant")


def _add_messages(row: Row, turns: list[dict[str, Any]]) -> bool:
    """Puts messages in front of the row's conversation, after its own system message; False where it is plain text.

    A conversation starts in `messages` or `prompt`; a pair without a prompt starts in both of its completions.
    """
    starts = [name for name in ("messages", "prompt") if row.get(name) is not None] or ["chosen", "rejected"]
    conversations = [name for name in COLUMNS if isinstance(row.get(name), list)]
    if isinstance(row.get("prompt"), str) and conversations:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    own = _system_messages(row)
    turns = [turn for turn in turns if not own or turn["role"] != "system"]
    for name in starts:
        if isinstance(row.get(name), list):
            begin = int(name in own)
            row[name] = [*row[name][:begin], *turns, *row[name][begin:]]
    return any(isinstance(row.get(name), list) for name in starts)


def _system_messages(row: Row) -> list[str]:
    """The columns whose conversation begins with a system message."""
    begun = [name for name in COLUMNS if isinstance(row.get(name), list) and row[name]]
    return [name for name in begun if row[name][0].get("role") in ("system", "developer")]


def _unescape(template: str) -> str:
    r"""A shell passes `\n` as two characters; here they mean a newline, unless they begin a TeX command (`\neq`).

    `\\n` means the two characters `\n`; more backslashes stay.
    """

    def read(match: re.Match[str]) -> str:
        slashes, word = match.groups()
        if len(slashes) > 2:
            return match[0]
        if len(slashes) == 2:
            return "\\" + word
        return match[0] if _TEX.fullmatch(word) else "\n" + word[1:]

    return re.sub(r"(\\+)(n[A-Za-z]*)", read, template)


def _fill(template: str, row: Row, key: str, where: str) -> str | None:
    """None for a reply of which every column is null."""
    parts = []
    nulls = []
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
                f" the columns are {', '.join(row)} (write a literal brace twice)."
            )
        value = row[name]
        nulls.append(value is None)
        if value is None:
            value = ""
        parts.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
    return None if key != "input_template" and nulls and all(nulls) else "".join(parts)


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
