"""Rows out of files: JSON, JSONL, Parquet, CSV, a folder of them, or the hub.

JSON, JSONL and CSV are read with Python's own parsers, value for value: `datasets` would merge the schemas of nested
columns, change floats inside tool arguments (0.95 becomes 0.9500000000000001) and guess the types of CSV cells (007, NA
and True are text here). Everything else goes through `datasets`, whose structs hold the keys of all rows: a None inside
tools and tool calls is taken for a key that this row lacks. A null that is meant there has to be JSON text.
"""

from __future__ import annotations

import csv
import glob
import importlib
import io
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
DATASETS_READERS = {".parquet": "parquet", ".arrow": "arrow"}  # suffix -> reader of `datasets`
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "zstd"}  # suffix -> module, or codec of Arrow
SUFFIXES = (*JSON_LINES, ".json", *DELIMITERS, *DATASETS_READERS)
# Formats that are not read; and files in data folders that hold no rows.
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


class Rows(list[Row]):
    """Rows with notes for the log: the files they are from; what was left out, parsed or found twice."""

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
            bounds = [_bound(bound, len(read), part, name) for bound in (found[2], found[3])]
            rows += read[slice(*bounds)]
            rows.notes += [note for note in read.notes or [f"read from {name}"] if note not in rows.notes]
    if not rows:
        raise ValueError(f"{key} names {name}, which holds no rows{f' in {split}' if '[' in split else ''}.")
    return rows


_SPLIT = re.compile(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


def _bound(bound: str | None, count: int, part: str, name: str) -> int | None:
    if not bound:
        return None
    index = round(int(bound[:-1]) * count / 100) if bound.endswith("%") else int(bound)
    if abs(index) > count:
        raise ValueError(f"the split {part} reaches past the {count} rows of {name}; give a slice within them.")
    return index


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
    except Exception as error:  # readers of `datasets` raise many types
        raise ValueError(f"{path} cannot be read as {suffix[1:]}: {first_line(error)}.") from error


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
    except Exception as error:  # each compression raises other types
        raise ValueError(f"{path} cannot be read: {first_line(error)}.") from error
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
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else first_line(error)
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
            len(lists) < len(content) and not any(map(is_conversation, cells))
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
        raise ValueError(f"{path} must hold a list of JSON objects, one per row.")
    return content, False


def _is_rows(value: Any) -> bool:
    objects = isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
    return objects and not is_conversation(value)


def is_conversation(value: Any) -> bool:
    """A list of messages, of which at least one has a speaker that is known."""
    turns = value if isinstance(value, list) else []
    speakers: list[Any] = [isinstance(turn, dict) and (turn.get("role") or turn.get("from")) for turn in turns]
    return bool(speakers) and all(isinstance(name, str) for name in speakers) and any(map(role_of, speakers))


def role_of(speaker: str) -> str | None:
    """The chat role of a speaker's name, or None for a name that is not known."""
    name = speaker.strip().lower()
    return "assistant" if re.match(r"(chat)?gpt[-\d]", name) else ROLES.get(name)


def _find_split(found: list[str], split: str, own: str = "") -> str | None:
    """The one of `found` that is `split`: of this name, of a name of the same meaning, or the only one.

    The only one may not name another split, unless the folder's name (`own`) is `split`; `validation` is accepted for
    `test`, which is the default.
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
    """The rows of a split's files, from subfolders of any depth too; the note names the files."""
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
    # Of train.jsonl and preferences_train.jsonl the first is the training split; the second is another data set.
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
    """Files that may hold rows, of all depths, in order, without hidden and unfinished ones (.cache, _temporary)."""
    files: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        inside = os.path.realpath(place)  # a link to a parent folder would never end
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
    except Exception as error:  # network, missing repository, gated, unknown split
        raise ValueError(
            f"{key} names {name}, which is no file or folder here and was not read from the hub"
            f" (split {split}): {first_line(error)}."
        ) from error


def first_line(error: BaseException) -> str:
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__:  # the outer error has no cause in it
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
