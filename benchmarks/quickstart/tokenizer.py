"""The quickstart's tokenizer, written out as plain JSON: byte-level BPE, 320 tokens, any text round-trips.

The vocabulary is 256 bytes, the merges of the few words below, the chat markers (special, so decoding may skip them)
and the tags that rewards read (ordinary added tokens, so decoding keeps them). Digits are always tokens of their own.
"""

from __future__ import annotations

PAD_TOKEN = "<|endoftext|>"
START_TOKEN = "<|im_start|>"
STOP_TOKEN = "<|im_end|>"
SPECIAL_TOKENS = (PAD_TOKEN, START_TOKEN, STOP_TOKEN)  # ids 0, 1, 2
TAGS = (
    *("<think>", "</think>", "<answer>", "</answer>", "<tools>", "</tools>", "<tool_call>", "</tool_call>"),
    *("<tool_response>", "</tool_response>"),
)  # ids 3 to 12
MODEL_MAX_LENGTH = 1024

# Each word is merged from its left end; earlier words win. Roles and operators come first: prompts stay short.
MERGED_WORDS = (
    *("user", "assistant", "system", "tool", " +", " =", " ?", " the", " of", " and", " to", " in", " is", " you"),
    *("ing", "er", "re", "on", "en", "at", "or", "ed", "al", "es", "it", "ar", "le"),
)

CHAT_TEMPLATE = """\
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content -%}
            {%- if part.type != 'text' -%}{{- raise_exception('This template renders text only.') -}}{%- endif -%}
            {{- part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set first = 0 -%}
{%- if tools -%}
    {{- '<|im_start|>system\\n' -}}
    {%- if messages[0].role == 'system' -%}
        {%- set first = 1 -%}
        {{- text(messages[0].content) + '\\n\\n' -}}
    {%- endif -%}
    {{- '<tools>\\n' -}}
    {%- for tool in tools -%}{{- tool | tojson + '\\n' -}}{%- endfor -%}
    {{- '</tools><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages[first:] -%}
    {%- if message.role in ['system', 'user'] -%}
        {{- '<|im_start|>' + message.role + '\\n' + text(message.content) + '<|im_end|>\\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>tool\\n<tool_response>\\n' + text(message.content) + '\\n</tool_response><|im_end|>\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- generation -%}
            {%- if message.reasoning_content -%}
                {{- '<think>' + message.reasoning_content + '</think>\\n' -}}
            {%- endif -%}
            {{- text(message.content) -}}
            {%- for call in message.tool_calls or [] -%}
                {%- set function = call.function or call -%}
                {%- if message.content or not loop.first -%}{{- '\\n' -}}{%- endif -%}
                {{- '<tool_call>\\n{"name": ' + function.name | tojson + ', "arguments": ' -}}
                {{- function.arguments if function.arguments is string else function.arguments | tojson -}}
                {{- '}\\n</tool_call>' -}}
            {%- endfor -%}
            {{- '<|im_end|>' -}}
        {%- endgeneration -%}
        {{- '\\n' -}}
    {%- else -%}
        {{- raise_exception('The roles are system, user, assistant and tool, not ' + message.role + '.') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each of the 256 bytes (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]


def merges_of(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Merges that build each word from its left end, without repeats, in the words' order."""
    characters = byte_characters()
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        pieces = [characters[byte] for byte in word.encode()]
        for end in range(1, len(pieces)):
            merges["".join(pieces[:end]), pieces[end]] = None
    return list(merges)


def build_tokenizer() -> dict:
    """The content of `tokenizer.json`."""
    merges = merges_of(MERGED_WORDS)
    tokens = [*SPECIAL_TOKENS, *TAGS, *sorted(byte_characters()), *(left + right for left, right in merges)]
    if len(tokens) % 64 or len(set(tokens)) != len(tokens):
        raise ValueError(f"The vocabulary has {len(tokens)} tokens; change MERGED_WORDS to make it a multiple of 64.")
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                **{"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False},
                **{"normalized": False, "special": token in SPECIAL_TOKENS},
            }
            for number, token in enumerate([*SPECIAL_TOKENS, *TAGS])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            **{"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None},
            **{"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False},
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }


def build_tokenizer_config() -> dict:
    """The content of `tokenizer_config.json`; the chat template stands beside it in `chat_template.jinja`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD_TOKEN,
        "eos_token": STOP_TOKEN,
        "model_max_length": MODEL_MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
    }
