"""Conversations as text: what the chat template writes, where a turn ends, which characters are the assistant's."""

from __future__ import annotations

import functools
import os.path
import re
from collections.abc import Iterator
from typing import Any

from data.tools import with_probe_names

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None  # as `data.tools.parse_tools` returns them
Span = tuple[int, int]  # characters start .. end-1 of a text
Tokenizer = Any  # a Hugging Face tokenizer; transformers is not imported here

SYSTEM_ROLES = ("system", "developer")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
FLAGS = ("weight", "train", "training", "loss")
"""Keys of a message that say whether a reply is trained (OpenAI's, Mistral's and other frameworks')."""


def render(
    messages: list[Message],
    tools: Tools,
    tokenizer: Tokenizer,
    *,
    generation_prompt: bool = False,
    template: str | None = None,
) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=generation_prompt, chat_template=template
        )
    except Exception as error:  # templates raise whatever they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(f"the chat template of {tokenizer.name_or_path} refuses it: {reason}.") from error


def render_checked(
    messages: list[Message], tools: Tools, tokenizer: Tokenizer, *, generation_prompt: bool = False
) -> tuple[str, list[str]]:
    """(the conversation as text, the kinds of words that the template leaves out).

    Raises ValueError where there is no template, or one that leaves out tools or calls.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"it is a conversation and the tokenizer {tokenizer.name_or_path} has no chat template;"
            " give a tokenizer_id that has one, or input_template and output_template for plain text."
        )
    probed_messages, probed_tools, names = with_probe_names(messages, tools)
    if names:
        probe = render(probed_messages, probed_tools, tokenizer, generation_prompt=generation_prompt)
        dropped = [name for name in names if name not in probe]
        if dropped:
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path} drops {len(dropped)} of its {len(names)} tools and"
                " tool calls without a word; give a tokenizer_id whose template renders tools, or remove them from"
                " the rows with a converter."
            )
    text = render(messages, tools, tokenizer, generation_prompt=generation_prompt)
    return text, [kind for kind, words in _words(messages) if words.strip() not in text]


def _words(messages: list[Message]) -> Iterator[tuple[str, str]]:
    """What a template may leave out without an error, and its name in the report."""
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant":
            for key in THOUGHTS:
                if isinstance(message.get(key), str):
                    yield "thoughts", message[key]
            thought, closed, answer = content.rpartition("</think>")
            if closed:
                yield "thoughts", thought.rpartition("<think>")[2]
            yield ("words beside tool calls" if "tool_calls" in message else "replies"), answer
        elif message["role"] in SYSTEM_ROLES:
            yield "system messages", content
        elif message["role"] == "user":
            yield "questions", content


# Where a turn ends


def turn_ends(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The tokens with which the chat template ends an assistant's turn; of a plain reply the first of them.

    That is the token that it writes after the last reply, else the one that follows a reply when a question
    comes after it, else (`render_turns` appends it) the tokenizer's end of sequence. A turn that calls tools may end
    with another one.
    """
    return _turn_ends(tokenizer, str(tokenizer.chat_template))


@functools.lru_cache(maxsize=16)
def _turn_ends(tokenizer: Tokenizer, template: str) -> tuple[str, ...]:
    probe = "probe_of_plumbline"
    talk: list[Message] = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": probe}]
    call = {"type": "function", "function": {"name": probe, "arguments": {}}}
    calling: list[Message] = [talk[0], {"role": "assistant", "content": "", "tool_calls": [call]}]

    def after(messages: list[Message]) -> str:
        """What follows the probe; nothing where the template refuses or drops it."""
        try:
            return render(messages, None, tokenizer).partition(probe)[2] if template != "None" else ""
        except ValueError:
            return ""

    added = [token for added in tokenizer.added_tokens_decoder.values() if (token := str(added)).strip()]
    added.sort(key=len, reverse=True)
    last, followed, called = after(talk).lstrip(), after([*talk, talk[0]]).lstrip(), after(calling).rstrip()
    stops = [token for token in added if last.startswith(token)][:1]
    stops = stops or [token for token in added if followed.startswith(token)][:1] or [tokenizer.eos_token]
    if stops == [None]:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} writes no token at the end of a reply and the tokenizer has"
            " no end-of-sequence token, so no reply would ever end; give a tokenizer_id that has one of them."
        )
    if stops[0] not in called:
        stops += [token for token in _special_tokens(tokenizer) if called.endswith(token)][:1]
    return tuple(stops)


@functools.lru_cache(maxsize=16)
def _special_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def render_turns(messages: list[Message], tools: Tools, tokenizer: Tokenizer) -> tuple[list[Message], str, list[str]]:
    """The messages, and `render_checked` of them, in which each assistant turn ends with exactly one stop token: one
    that a reply spells itself is removed, and one that the template does not write after the last reply is appended."""
    stops = turn_ends(tokenizer)
    messages = [dict(message) for message in messages]
    ends = (*stops, tokenizer.eos_token or stops[0])  # rows made for another template, or for none, spell the latter
    for message in messages:
        while message["role"] == "assistant" and message["content"].rstrip().endswith(ends):
            content = message["content"].rstrip()
            message["content"] = content[: -len(next(end for end in ends if content.endswith(end)))]
    text, dropped = render_checked(messages, tools, tokenizer)
    if messages[-1]["role"] == "assistant" and not text.rstrip().endswith((*stops, *_special_tokens(tokenizer))):
        text += stops[0]
    return messages, text, dropped


# Which characters are the assistant's


def trained_spans(
    text: str, messages: list[Message], tools: Tools, tokenizer: Tokenizer, first: int | None
) -> list[Span]:
    """The trained characters: the assistant turns from message `first` on (None: the whole text).

    Without turns whose flag is 0, and without the part of a turn that the prompt holds (key `begun`).
    """
    spans = [(0, len(text))] if first is None else _assistant_spans(text, messages, tools, tokenizer, first)
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and index >= (first or 0) and not all(message.get(flag, 1) for flag in FLAGS):
            span = _to_stop_token(text, _turn_span(text, messages, index, tools, tokenizer), tokenizer)
            spans = _without(spans, span)
        if spans and first is not None and (begun := message.get("begun", "").lstrip()):  # which a template may trim
            found = text.find(begun, spans[0][0])
            spans = _without(spans, (0, found + len(begun) if found >= 0 else spans[0][0]))
    return spans


def _without(spans: list[Span], hole: Span) -> list[Span]:
    pieces = [piece for start, end in spans for piece in ((start, min(end, hole[0])), (max(start, hole[1]), end))]
    return [(start, end) for start, end in pieces if start < end]


def _assistant_spans(text: str, messages: list[Message], tools: Tools, tokenizer: Tokenizer, first: int) -> list[Span]:
    """The characters of the assistant turns from message `first` on, each with its stop token.

    Taken from the template's `{% generation %}` markers where it has them, else from what each turn adds to the text.
    An assistant turn that opens the conversation answers nothing and stays context in the second way.
    """
    template = tokenizer.get_chat_template(tools=tools)
    if any(match[1] for match in _MARKER.finditer(template)):
        begin = 0
        if first > 0:
            context = render(messages[:first], tools, tokenizer, generation_prompt=True)
            begin = len(os.path.commonprefix([context, text]))
        marked = _marked_spans(text, messages, tools, tokenizer, template)
        spans = [(max(start, begin), end) for start, end in marked if end > begin]
    else:
        spans = [
            _turn_span(text, messages, index, tools, tokenizer)
            for index, message in enumerate(messages)
            if message["role"] == "assistant" and index >= max(first, 1)
        ]
    return [_to_stop_token(text, span, tokenizer) for span in spans]


_MARKER = re.compile(r"\{#.*?#\}|(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})", re.DOTALL)  # comments mark nothing
_OPEN, _CLOSE = "\ue0f0plumbline(", ")plumbline\ue0f1"


def _marked_spans(text: str, messages: list[Message], tools: Tools, tokenizer: Tokenizer, template: str) -> list[Span]:
    """The spans inside `{% generation %}`: each marker becomes a call of a macro that writes brackets around its body.

    (transformers' assistant mask marks the rest of the conversation where a marked span ends with a space that the
    tokenizer trims from its offsets.)
    """
    macro = f"{{% macro plumbline_turn() %}}{_OPEN}{{{{ caller() }}}}{_CLOSE}{{% endmacro %}}{{{{ '' }}}}"
    bracketed = _MARKER.sub(
        lambda m: m[1] + ("endcall" if m[2] else "call plumbline_turn()") + m[3] if m[1] else m[0], template
    )
    rendered = render(messages, tools, tokenizer, template=macro + bracketed)
    spans: list[Span] = []
    plain = ""
    for piece in rendered.split(_OPEN):
        inside, closed, outside = piece.partition(_CLOSE)
        if closed and inside:
            spans.append((len(plain), len(plain) + len(inside)))
        plain += inside + outside
    if not text.startswith(plain):
        raise ValueError(
            f"the {{% generation %}} markers of {tokenizer.name_or_path}'s chat template change what it renders;"
            " remove them from the template."
        )
    return spans


def _turn_span(text: str, messages: list[Message], index: int, tools: Tools, tokenizer: Tokenizer) -> Span:
    """The characters that assistant message `index` adds after its generation prompt."""
    prompt = render(messages[:index], tools, tokenizer, generation_prompt=True)
    turn = text if index == len(messages) - 1 else render(messages[: index + 1], tools, tokenizer)
    start = len(os.path.commonprefix([prompt, text]))
    context = 0
    if start < len(prompt):
        # A generation prompt may hold text that the turn lacks (an empty thinking block where the turn thinks): the
        # turn then starts where they differ, if they still share the turn's header.
        context = len(render(messages[:index], tools, tokenizer))
    if start >= len(prompt) or start > context:
        if text.startswith(turn):
            return start, len(turn)
        # Templates such as Qwen3's drop the reasoning of earlier turns: the text then has the turn without its
        # beginning, so the longest ending of the turn that follows the prompt is taken.
        visible = messages[index]["content"].split("</think>")[-1].strip()
        for cut in range(start, len(turn)):
            ending = turn[cut:]
            if text.startswith(ending, start) and ending.strip() and visible in ending:
                return start, start + len(ending)
    raise ValueError(
        f"the chat template of {tokenizer.name_or_path} renders message {index + 1} differently once more messages"
        " follow, so its tokens cannot be told apart; put {% generation %} markers into the template, cut the"
        " conversation after that message, or set assistant_only_loss: false."
    )


def _to_stop_token(text: str, span: Span, tokenizer: Tokenizer) -> Span:
    """The span ended right after the token that stops the turn: the model writes nothing after it."""
    start, end = span
    trimmed = start + len(text[start:end].rstrip())
    stops = turn_ends(tokenizer)
    for markers, gap in ((stops, r"\s*"), (_special_tokens(tokenizer), "")):
        if text.endswith(tuple(markers), start, trimmed):
            return start, trimmed
        followed = re.compile(f"{gap}({'|'.join(map(re.escape, markers))})").match(text, end)
        if followed:
            return start, followed.end()
        # A template may write more after the stop token of the last turn, such as the end of sequence.
        inside = max((text.rfind(stop, start, end) + len(stop) for stop in stops if stop in text[start:end]), default=0)
        if inside:
            return start, inside
    return span
