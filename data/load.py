"""The rows of a run, brought to the columns that the loops read: mapping, templates, known layouts, conversations."""

from __future__ import annotations

import ast
import importlib
import json
import os
import random
import re
import string
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from data.files import COLUMNS, ROLES, Row, Rows, first_line, is_conversation, read_rows, role_of

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
    """A hash of the columns that a loop reads."""
    read = {name: row[name] for name in (*COLUMNS, "text", "tools") if row.get(name) is not None}
    return hash(json.dumps(read or row, sort_keys=True, default=str))


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
        try:
            converted.append(_convert_row(row, config, where, found))
        except ValueError as error:
            raise error if where in str(error) else ValueError(f"{where}: {error}") from error
        except Exception as error:  # a value of an unexpected type
            raise ValueError(f"{where} cannot be converted: {type(error).__name__} {first_line(error)}.") from error
    if not converted:
        raise ValueError(f"converter {config.converter} dropped every row of {source}.")
    converted.notes += [f"{count} {what}" for what, count in found.items() if count]
    return converted


def _convert_row(row: Row, config: DataConfig, where: str, found: Counter[str]) -> Row:
    """found: counts for the notes."""
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
    """ShareGPT's `conversations`, Alpaca's instruction/input/output, Orca's question with a pair, and input/output,
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

    JSON, or Python's own spelling, which pandas writes. `messages` must be a conversation; other columns are parsed
    where they look like one.
    """
    if not isinstance(value, str) or column != "messages" and not value.lstrip().startswith(("[", "{")):
        return None
    messages: Any = None
    reason = "it is empty"
    if value.strip():
        try:
            messages = json.loads(value)
        except (ValueError, RecursionError) as error:
            reason = first_line(error)
            try:
                messages = ast.literal_eval(value.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                pass
        else:
            reason = "it is another value"
    messages = [messages] if isinstance(messages, dict) else messages

    def has_content(turns: Any) -> bool:
        return is_conversation(turns) and all({"content", "value", "tool_calls"} & turn.keys() for turn in turns)

    if has_content(messages):
        return messages
    items = messages if isinstance(messages, list) else []
    inside = [part for item in items for part in (item.values() if isinstance(item, dict) else [item])]
    if column == "messages" or messages is None and _MESSAGE_TEXT.match(value) or any(map(has_content, inside)):
        raise ValueError(
            f"the {column} of {where} is text that is no JSON list of messages ({reason}): {value[:60]!r};"
            " give a list of objects with role and content (or name the column in a template, which takes it as text)."
        )
    return None


_MESSAGE_TEXT = re.compile(r"\s*\[\s*\{\s*(['\"])(role|from|content|value)\1\s*:")


def _read_turn(turn: Any, column: str, where: str, found: Counter[str]) -> Any:
    """A message with role and content, from ShareGPT's from and value too; its other keys stay."""
    if not isinstance(turn, dict):
        return turn  # refused where it is encoded
    speaker = turn.get("from") or turn.get("role")
    if not isinstance(speaker, str):
        return turn
    role = role_of(speaker)
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
    """Puts the row's system column and its earlier turns (Alpaca's `history`) in front of its conversation."""
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
    """Puts messages in front of the row's conversation, after its system message; False where it is plain text.

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
        reason = "it calls exit()" if isinstance(error, SystemExit) else first_line(error)
        raise ValueError(f"{key} names {name}, which cannot be imported: {reason}.") from error
    if not hasattr(module, function_name):
        near = get_close_matches(function_name, dir(module), 1)
        hint = f"; did you mean {module_name}:{near[0]}?" if near else "."
        raise ValueError(f"{key} names {name}, which cannot be imported: {module_name} has no {function_name}{hint}")
    function = getattr(module, function_name)
    if not callable(function):
        raise ValueError(f"{key} names {name}, which is not a function.")
    return function
