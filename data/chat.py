"""Rows to token ids and targets.

A row becomes one text, and the text is tokenised once. The trained part is a set of character spans of that text; a
token is a target when any of its characters is in a span. So a mask depends on a token's position, never on its id, and
a token across the end of the prompt belongs to the completion.
"""

from __future__ import annotations

import itertools
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from data.spans import (
    FLAGS,
    SYSTEM_ROLES,
    THOUGHTS,
    Message,
    Span,
    Tokenizer,
    render,
    render_checked,
    render_turns,
    trained_spans,
    turn_ends,
)
from data.tools import parse_tool_calls, parse_tools

Row = dict[str, Any]
Encoded = TypeVar("Encoded", "Example", "Pair", "Prompt")


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How rows become tokens."""

    max_seq_length: int = 2048
    """Longest sequence in tokens: prompt and completion together; where completions are sampled (GRPO, evaluation), the
    prompt alone, and `max_completion_length` comes on top."""
    long_rows: str = "truncate"
    """What happens to longer rows: truncate (cut the completion's end), drop, or error. Counted and reported."""
    completion_only_loss: bool = True
    """SFT on prompt/completion rows: train on the completion's tokens only."""
    assistant_only_loss: bool = True
    """SFT on `messages` rows: train on the assistant's tokens only."""

    def __post_init__(self) -> None:
        if self.max_seq_length < 2:
            raise ValueError(f"max_seq_length is {self.max_seq_length}; give 2 or more.")
        if self.long_rows not in ("truncate", "drop", "error"):
            raise ValueError(f"long_rows is {self.long_rows}; give truncate, drop or error.")


@dataclass(frozen=True)
class Example:
    """One SFT sequence: `is_target[i]` says that token i is trained on (never the first: nothing predicts it)."""

    input_ids: Sequence[int]
    is_target: Sequence[int]
    number: int = 0  # of the row in its data, from 1
    num_targets: int = field(init=False)  # tokens that are trained on

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_targets", bytes(self.is_target[1:]).count(1))


@dataclass(frozen=True)
class Pair:
    """One preference pair: its prompt and its two completions, which may share a beginning. Flags mark the scored
    tokens of a completion as in `Example`; an empty list: every token."""

    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]
    number: int = 0  # of the row in its data, from 1
    chosen_is_target: Sequence[int] = field(default_factory=list)
    rejected_is_target: Sequence[int] = field(default_factory=list)
    num_shared: int = field(init=False)  # tokens in common at their beginning, ids and flags; both keep one more

    def __post_init__(self) -> None:
        tokens = [zip(*completion, strict=True) for completion in self.completions()]
        shared = min(_shared_length(*tokens), len(self.chosen_ids) - 1, len(self.rejected_ids) - 1)
        object.__setattr__(self, "num_shared", shared)

    def completions(self) -> list[tuple[Sequence[int], Sequence[int]]]:
        """(ids, which of them are targets) of the chosen and of the rejected completion."""
        return [
            (self.chosen_ids, self.chosen_is_target or [True] * len(self.chosen_ids)),
            (self.rejected_ids, self.rejected_is_target or [True] * len(self.rejected_ids)),
        ]

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed: what is shared once."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids) - self.num_shared


@dataclass(frozen=True)
class Prompt:
    """One prompt to sample from, with the row's other columns for the rewards."""

    prompt_ids: list[int]
    text: str
    columns: dict
    number: int = 0  # of the row in its data, from 1


@dataclass
class EncodeReport:
    """What became of the rows: `rows == kept + too_long + unusable + no_reply`; truncated rows are kept ones."""

    what: str = "rows"
    rows: int = 0
    kept: int = 0
    truncated: int = 0
    too_long: int = 0
    """Dropped: longer than max_seq_length (for `truncate`: already the prompt fills it)."""
    unusable: int = 0
    """Dropped: nothing to train on, or chosen and rejected do not differ or have no prompt in common."""
    no_reply: int = 0
    """Dropped: the reply is null."""
    dropped: Counter[str] = field(default_factory=Counter)
    """What the chat template left out of the rows, by kind."""
    max_seq_length: int = 0
    notes: list[str] = field(default_factory=list)
    """Of `data.files.Rows`: the files, and what was parsed, left out or found twice."""
    stop_tokens: set[str] = field(default_factory=set)
    """The tokens at which the rows' completions end: of conversations the chat template's."""

    def __str__(self) -> str:
        parts = [f"{self.what}: {self.kept} of {self.rows} rows kept"]
        if self.truncated:
            parts.append(f"{self.truncated} of them cut to {self.max_seq_length} tokens")
        if self.too_long:
            parts.append(f"{self.too_long} dropped as longer than {self.max_seq_length} tokens")
        if self.unusable:
            parts.append(f"{self.unusable} dropped with nothing to learn from")
        if self.no_reply:
            parts.append(f"{self.no_reply} dropped because their reply is null")
        ends = [f"a turn ends with {' or '.join(sorted(self.stop_tokens))}"] if self.stop_tokens else []
        if self.dropped:
            lost = " and ".join(f"{number} {kind}" for kind, number in sorted(self.dropped.items()))
            ends.append(f"the chat template drops {lost}")
        return "; ".join([", ".join(parts), *ends, *self.notes])


def encode_rows(
    rows: list[Row],
    encode_fn: Callable[[Row, Tokenizer, EncodeConfig, EncodeReport], Encoded | None],
    tokenizer: Tokenizer,
    config: EncodeConfig,
    *,
    what: str,
) -> tuple[list[Encoded], EncodeReport]:
    """All rows through `encode_example`, `encode_pair` or `encode_prompt`; `what` names them ("train rows").

    Raises ValueError: a row cannot be used (the message begins with its number, counting from 1), or no row was kept.
    """
    notes = list(getattr(rows, "notes", ()))  # of data/files.py's Rows
    report = EncodeReport(what=what, rows=len(rows), max_seq_length=config.max_seq_length, notes=notes)
    kept: list[Encoded] = []
    bad: dict[int, Exception] = {}
    for number, row in enumerate(rows, start=1):
        if bad and (len(bad) == 10 or number > min(bad) + 1000):  # enough to correct the file
            break
        try:
            encoded = encode_fn(row, tokenizer, config, report)
        except NoReply:
            report.no_reply += 1
        except Exception as error:  # tokenizers and templates raise whatever they like
            bad[number] = error
        else:
            if encoded is not None:
                kept.append(_stored(encoded, number))
    if bad:
        (number, first), *others = bad.items()
        reason = str(first)
        if not isinstance(first, ValueError):
            reason = f"it cannot be encoded ({type(first).__name__}: {reason.rstrip('.')})."
            if re.search("[\ud800-\udfff]", _texts(rows[number - 1])):
                reason = "it holds half of a surrogate pair, which is no character; take it out."
        if others:
            numbers = ", ".join(str(other) for other, _ in others)
            reason = f"{reason.rstrip('.')}; row{'s' * (len(others) > 1)} {numbers} cannot be used either."
        raise ValueError(f"{what}, row {number}: {reason}") from first
    report.kept = len(kept)
    if rows and not kept:
        raise ValueError(f"{report}: raise max_seq_length or look at the columns {', '.join(rows[0])}.")
    return kept, report


def _stored(encoded: Encoded, number: int) -> Encoded:
    """The same with its row's number, and arrays instead of lists: 5 bytes per token, not 40 (prompts stay lists, which
    engines take)."""
    if isinstance(encoded, Prompt):
        return replace(encoded, number=number)
    sequences = [one.name for one in fields(encoded) if one.init and one.name != "number"]
    arrays: dict[str, Any] = {
        name: array("b" if "is_target" in name else "i", getattr(encoded, name)) for name in sequences
    }
    return replace(encoded, number=number, **arrays)


def _texts(value: Any) -> str:
    """All text in a value, one piece a line."""
    if isinstance(value, dict | list | tuple):
        return "\n".join(map(_texts, value.values() if isinstance(value, dict) else value))
    return value if isinstance(value, str) else ""


def encode_example(
    row: Row, tokenizer: Tokenizer, config: EncodeConfig, report: EncodeReport | None = None
) -> Example | None:
    """An SFT row (`prompt` and `completion`, or `messages`, or `text`) as tokens and targets; None drops it.

    Plain text: the end-of-sequence token is appended unless the text ends with it, and trained. Conversations: every
    assistant turn is trained up to and including its stop token; of prompt/completion rows those in the completion.
    """
    report = report or EncodeReport()
    if row.get("prompt") is not None and row.get("completion") is not None:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            start = len(prompt) if config.completion_only_loss else 0
            ids, is_target = _encode_plain(prompt + completion, tokenizer, start)
        else:
            context, reply = _continued(*_join(prompt, completion, "completion"))
            first = len(context) if config.completion_only_loss else None
            ids, is_target = _encode_conversation(context + reply, row, tokenizer, first, report)
    elif row.get("messages") is not None:
        messages = _as_messages(row["messages"], "user", "messages")
        first = 0 if config.assistant_only_loss else None
        ids, is_target = _encode_conversation(messages, row, tokenizer, first, report)
    elif isinstance(row.get("text"), str):
        ids, is_target = _encode_plain(row["text"], tokenizer, 0)
    elif row.get("prompt") is not None and "completion" in row:
        raise NoReply("its completion is null; give text.")
    else:
        raise ValueError(_missing("prompt and completion, messages, or text", "output_template", row))

    if not any(is_target):
        report.unusable += 1
        return None
    if not _may_stay(len(ids), config, report):
        return None
    if len(ids) > config.max_seq_length:
        ids, is_target = ids[: config.max_seq_length], is_target[: config.max_seq_length]
        if not any(is_target):
            report.too_long += 1
            return None
        report.truncated += 1
    return Example(ids, is_target)


def encode_pair(
    row: Row, tokenizer: Tokenizer, config: EncodeConfig, report: EncodeReport | None = None
) -> Pair | None:
    """A preference row (`chosen`, `rejected`, and `prompt` unless both contain it) as tokens; None drops it.

    Prompt and completion are tokenised together. The prompt is the column's; without that column it is the messages
    (or, of texts, the tokens) that both sides begin with. A beginning that both completions share belongs to both. In
    conversations the assistant turns are scored, each with its stop token.
    """
    report = report or EncodeReport()
    if row.get("chosen") is None or row.get("rejected") is None:
        if "chosen" in row and "rejected" in row:
            raise NoReply("its chosen or its rejected is null; give text.")
        raise ValueError(_missing("chosen and rejected", "chosen_template, rejected_template", row))
    prompt, replies = row.get("prompt"), (row["chosen"], row["rejected"])
    if all(isinstance(reply, str) for reply in replies) and isinstance(prompt, str | None):
        text = prompt or ""
        sides = [_encode_plain(text + reply, tokenizer, len(text)) for reply in replies]
        if prompt is None:
            shared = _shared_length(sides[0][0], sides[1][0])
            sides = [(ids, [False] * shared + [True] * (len(ids) - shared)) for ids, _ in sides]
    else:
        messages = _pair_messages(prompt, *replies)
        if any(_asks_nothing(context, reply) for context, reply in messages):
            report.unusable += 1
            return None
        sides = [
            _encode_conversation(context + reply, row, tokenizer, len(context), report, cut=True)
            for context, reply in messages
        ]

    (chosen, _), (rejected, _) = sides
    starts = [is_target.index(True) if any(is_target) else 0 for _, is_target in sides]
    start = min(_shared_length(chosen, rejected), *starts)
    if start == 0 or chosen == rejected:
        report.unusable += 1
        return None
    longest = max(len(chosen), len(rejected))
    if not _may_stay(longest, config, report):
        return None
    end = config.max_seq_length
    if chosen[:end] == rejected[:end] or not all(any(is_target[:end]) for _, is_target in sides):
        report.too_long += 1
        return None
    report.truncated += longest > end
    flags = [is_target[start:end] for _, is_target in sides]
    flags = [[] if all(is_target) else is_target for is_target in flags]
    return Pair(chosen[:start], chosen[start:end], rejected[start:end], 0, *flags)


def encode_prompt(
    row: Row, tokenizer: Tokenizer, config: EncodeConfig, report: EncodeReport | None = None
) -> Prompt | None:
    """A row's `prompt` (or its `messages` up to the last reply) as tokens to sample from; None drops it.

    A conversation ends with the template's generation prompt, and with the beginning of the reply where the prompt has
    one as its last message. A prompt is never cut.
    """
    report = report or EncodeReport()
    tools = parse_tools(row.get("tools"))
    prompt = row.get("prompt")
    replies = [name for name in ("completion", "chosen") if row.get(name) and not isinstance(row[name], str)]
    if isinstance(prompt, str) and not replies:
        text = prompt
        ids = _tokenise(text, [], tokenizer, special=True)[0]
    elif prompt is not None or row.get("messages") is not None:
        name = "messages" if prompt is None else "prompt"
        if prompt is not None and replies:  # as training joins them
            messages = _join(prompt, row[replies[0]], replies[0])[0]
        else:
            messages = _as_messages(row[name], "user", name)
        while name == "messages" and messages and messages[-1]["role"] == "assistant":
            messages.pop()
        begun = messages.pop()["content"] if _is_begun(messages) else ""
        text, dropped = render_checked(messages, tools, tokenizer, generation_prompt=True)
        report.dropped.update(dropped)
        if begun.lstrip().startswith("<think>") and text.rstrip().endswith("<think>"):  # of the generation prompt
            text = text.rstrip().removesuffix("<think>")
        elif begun:  # a template may put a blank in front of a reply
            whole = render([*messages, {"role": "assistant", "content": begun}], tools, tokenizer)
            start = whole.rfind(begun.strip())
            if start > 0 and whole[:start].rstrip() == text.rstrip():
                text, begun = whole[:start], begun.lstrip()
        text += begun
        ids = _tokenise(text, [], tokenizer, special=False)[0]
        report.stop_tokens.update(turn_ends(tokenizer))
    else:
        raise ValueError(_missing("prompt or messages", "input_template", row))
    if not ids:
        report.unusable += 1
        return None
    if len(ids) > config.max_seq_length:
        if _may_stay(len(ids), config, report):
            report.too_long += 1
        return None
    return Prompt(ids, text, row)


def _may_stay(length: int, config: EncodeConfig, report: EncodeReport) -> bool:
    """False drops (and counts) a row of `length` tokens; True keeps it, to be cut where it is longer."""
    if length <= config.max_seq_length or config.long_rows == "truncate":
        return True
    if config.long_rows == "error":
        raise ValueError(
            f"it has {length} tokens and max_seq_length is {config.max_seq_length};"
            " raise that, or set long_rows to truncate or drop."
        )
    report.too_long += 1
    return False


def _missing(needed: str, template: str, row: Row) -> str:
    return f"the columns {needed} are needed and it has {', '.join(row)}; give field_mapping or {template}."


# Text to tokens


def _encode_plain(text: str, tokenizer: Tokenizer, start: int) -> tuple[list[int], list[bool]]:
    """Ids and targets of plain text trained from character `start` on, ended by the end-of-sequence token."""
    ids, is_target = _tokenise(text, [(start, len(text))], tokenizer, special=True)
    stop = tokenizer.eos_token_id
    if stop is not None and ids[-1:] != [stop]:
        ids.append(stop)
        is_target.append(True)
    if is_target:
        is_target[0] = False
    return ids, is_target


def _encode_conversation(
    messages: list[Message],
    row: Row,
    tokenizer: Tokenizer,
    first: int | None,
    report: EncodeReport,
    *,
    cut: bool = False,
) -> tuple[list[int], list[bool]]:
    """Ids and targets: the assistant turns from message `first` on, or with None every token. `cut` leaves out what
    follows the last of them."""
    tools = parse_tools(row.get("tools"))
    messages, text, dropped = render_turns(messages, tools, tokenizer)
    report.dropped.update(dropped)
    report.stop_tokens.update(turn_ends(tokenizer))
    spans = trained_spans(text, messages, tools, tokenizer, first)
    if cut and spans:
        text = text[: spans[-1][1]]
    ids, is_target = _tokenise(text, spans, tokenizer, special=False)
    if is_target:
        is_target[0] = False
    return ids, is_target


def _tokenise(text: str, spans: list[Span], tokenizer: Tokenizer, *, special: bool) -> tuple[list[int], list[bool]]:
    """Ids, and for each whether any of its characters is in a span (spans in ascending order).

    special: the tokenizer adds its own special tokens in front, unless the text begins with one, so there is exactly
    one beginning-of-sequence token. A stop token that it adds at the end is removed: the caller adds it.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} does not tell which characters a token stands for; give a"
            " tokenizer_id with a tokenizer.json (a fast tokenizer)."
        )
    special = special and not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    # verbose=False: no warning about model_max_length, the length is dealt with by max_seq_length.
    encoding = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ids = list(encoding["input_ids"])
    stop = tokenizer.eos_token_id
    if special and stop is not None and ids[-1:] == [stop]:
        if not text.endswith(tokenizer.eos_token) or ids[-2:] == [stop, stop]:
            ids.pop()
    is_target = [False] * len(ids)
    offsets = encoding["offset_mapping"][: len(ids)]
    pending = list(reversed(spans))
    for index, (begin, end) in enumerate(offsets):
        if begin == end:  # a space that the tokenizer trimmed from its offsets reaches to the next token
            end = offsets[index + 1][0] if index + 1 < len(ids) else len(text)
        while pending and pending[-1][1] <= begin:
            pending.pop()
        is_target[index] = bool(pending) and end > pending[-1][0]
    return ids, is_target


def _shared_length(left: Iterable[Any], right: Iterable[Any]) -> int:
    """How many ids (or flagged ids, or messages) two sequences share from the start."""
    equal = (a == b for a, b in zip(left, right, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, equal))


# Conversations to text


def _as_messages(value: Any, role: str, key: str) -> list[Message]:
    """A list of messages with text content and parsed tool calls; a plain string becomes one message of `role`."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"its {key} is {_shown(value)}; give text or a list of messages with role and content.")
    return [_as_message(message, key) for message in value]


def _join(prompt: Any, reply: Any, name: str) -> tuple[list[Message], list[Message]]:
    """The messages of `prompt` and those that column `name` adds to them.

    A reply may repeat the prompt, or its last turns (UltraFeedback's chosen and rejected are complete conversations):
    repeated messages are taken once. A system message may be in either.
    """
    context, reply = _as_messages(prompt, "user", "prompt"), _as_messages(reply, "assistant", name)
    if reply[0]["role"] in SYSTEM_ROLES:
        if context[0]["role"] not in SYSTEM_ROLES:
            context = [reply[0], *context]
        elif not _same(context[:1], reply[:1]):
            raise ValueError(f"its prompt and its {name} begin with different system messages; keep one of them.")
        reply = reply[1:]
    for begin, message in enumerate(context):
        if message["role"] == "user" and _same(context[begin:], reply[: len(context) - begin]):
            reply = reply[len(context) - begin :]
            break
    if not reply:
        raise ValueError(f"its {name} ends where its prompt ends; give it a reply.")
    asked = [message for message in context if message["role"] == "user"][:1]
    if reply[0]["role"] == "user" and (context[-1]["role"] == "user" or _same(asked, reply[:1])):
        raise ValueError(
            f"its {name} begins with the user's words {_shown(reply[0]['content'])}, which are not its prompt;"
            f" take them out of {name}, or take the column prompt out of rows whose {name} is the whole conversation."
        )
    return context, reply


def _continued(context: list[Message], reply: list[Message]) -> tuple[list[Message], list[Message]]:
    """A reply that the prompt has begun as one turn; the prompt's part is kept under the key `begun`."""
    if not _is_begun(context) or reply[0]["role"] != "assistant":
        return context, reply
    begun = context[-1]["content"]
    return context[:-1], [{**reply[0], "content": begun + reply[0]["content"], "begun": begun}, *reply[1:]]


def _is_begun(context: list[Message]) -> bool:
    last = context[-1]
    return len(context) > 1 and last["role"] == "assistant" and bool(last["content"]) and "tool_calls" not in last


def _same(left: list[Message], right: list[Message]) -> bool:
    """Whether two lists of messages are equal, white space at the ends of contents aside."""
    said = [[(m["role"], m["content"].strip(), m.get("tool_calls")) for m in messages] for messages in (left, right)]
    return said[0] == said[1]


def _pair_messages(prompt: Any, chosen: Any, rejected: Any) -> list[tuple[list[Message], list[Message]]]:
    """(prompt, completion) of both sides of a pair; without a prompt it is the messages that both sides begin with."""
    if prompt is None:
        whole = [_as_messages(side, "assistant", name) for side, name in ((chosen, "chosen"), (rejected, "rejected"))]
        shared = _shared_length(whole[0][:-1], whole[1][:-1])
        return [(messages[:shared], messages[shared:]) for messages in whole]
    sides = [_continued(*_join(prompt, side, name)) for side, name in ((chosen, "chosen"), (rejected, "rejected"))]
    if sides[0][0] != sides[1][0]:
        raise ValueError("its chosen and rejected have different system messages; give both the same.")
    return sides


def _asks_nothing(context: list[Message], reply: list[Message]) -> bool:
    """Whether the question is part of the completion, so that the two completions may answer different questions."""
    return not context or (reply[0]["role"] == "user" and all(message["role"] in SYSTEM_ROLES for message in context))


class NoReply(ValueError):
    """A row whose reply is null: `encode_rows` drops and counts it."""


def _as_message(message: Any, key: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"its {key} holds {_shown(message)}, which is no message with role and content.")
    # Files with one schema for all messages fill the keys that a message lacks with None.
    message = {name: value for name, value in message.items() if value is not None}
    content = message.get("content", "")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ValueError(f"its {key} holds content that is not text: {_shown(content)}.")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"its {key} holds the content {_shown(content)}; give text.")
    for name in FLAGS:
        if name in message and message[name] not in (0, 1):
            raise ValueError(
                f"its {key} holds a message with {name} {_shown(message[name])}; give 1 or true to train on it, 0 or"
                " false to keep it as context."
            )
    calls = message.pop("tool_calls", None) or message.pop("function_call", None)  # one call, in OpenAI's older rows
    if message["role"] == "assistant" and not (calls or message.keys() & {"content", *THOUGHTS}):
        raise NoReply(f"its {key} holds a reply that is null; give text.")
    return {**message, "content": content, **({"tool_calls": parse_tool_calls(calls)} if calls else {})}


def _shown(value: Any) -> str:
    return f"{value!r:.80}"
