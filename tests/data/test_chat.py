"""Every token that the model must write is a target, and no other."""

import copy
import functools
import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.chat import EncodeConfig, EncodeReport, encode_example, encode_pair, encode_prompt, encode_rows
from data.load import DataConfig, load_rows
from data.spans import turn_ends

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# As Qwen3's: the thinking block stands only in turns after the last question.
DROPS_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% set parts = m['content'].split('</think>') %}"
    "{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>' + (parts[0] if parts|length > 1 else '') + '</think>' }}{% endif %}"
    "{{ parts[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi \U0001f600"},
    {"role": "assistant", "content": " h\u00e9llo\u200b "},
    {"role": "user", "content": "And \u4f60\u597d?"},
    {"role": "assistant", "content": "\U0001f468\u200d\U0001f469\u200d\U0001f467 fine."},
]


def bytes_tokenizer(
    template: str | None = None, *, merges=(), bos=False, eos=False, trim=False, pad="<pad>"
) -> PreTrainedTokenizerFast:
    """Byte-level tokens and the given merges; `bos` and `eos` are added by its own post-processor."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [a + b for a, b in merges]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s?\S+|\s+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"])
    steps = [processors.ByteLevel(trim_offsets=trim)]
    if bos or eos:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
        ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        steps.append(processors.TemplateProcessing(single=single, special_tokens=ids))
    backend.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token=pad,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=template,
    )


def trained(row: dict, tokenizer, **settings) -> str:
    """The text of the targets."""
    example = encode_example(row, tokenizer, EncodeConfig(**settings))
    return tokenizer.decode([i for i, t in zip(example.input_ids, example.is_target, strict=True) if t])


@functools.cache
def shared_tokenizer(name: str):
    return AutoTokenizer.from_pretrained(str(SHARED / "tokenizers" / name))


def rows_of(name: str, **settings) -> list[dict]:
    return load_rows(DataConfig(dataset_name=str(SHARED / "data" / name), **settings), seed=0)[0]


def test_stop_token_is_trained():
    """Plain completions end with </s>, turns with <|im_end|>, and the newline after it is not written by the model."""
    tokenizer = bytes_tokenizer(UNMARKED)
    assert trained({"prompt": "a", "completion": "bc"}, tokenizer) == "bc</s>"
    assert trained({"messages": TALK[:3]}, tokenizer) == " h\u00e9llo\u200b <|im_end|>"
    assert trained({"text": "abc"}, tokenizer) == "bc</s>"  # nothing predicts the first token


def test_pad_equal_to_eos_keeps_the_stop_token():
    tokenizer = bytes_tokenizer(UNMARKED, pad="</s>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert trained({"prompt": "a", "completion": "b</s>"}, tokenizer) == "b</s>"
    assert trained({"prompt": "a</s>", "completion": "b"}, tokenizer) == "b</s>"


@pytest.mark.parametrize("kind", ["bos", "bos_eos", "none"])
def test_special_tokens_stand_exactly_once(kind):
    """`<s>ab</s>` whichever of them the tokenizer adds and whichever the text already has."""
    template = "<s>{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = bytes_tokenizer(template, bos="bos" in kind, eos="eos" in kind)
    bos, eos = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    for prompt, completion in [("a", "b"), ("<s>a", "b"), ("a", "b</s>"), ("<s>a", "b</s>")]:
        ids = encode_example({"prompt": prompt, "completion": completion}, tokenizer, EncodeConfig()).input_ids
        assert ids.count(bos) == int(kind != "none" or prompt.startswith("<s>"))
        assert ids.count(eos) == 1 and ids[-1] == eos
    assert eos not in encode_prompt({"prompt": "a"}, tokenizer, EncodeConfig()).prompt_ids
    chat = encode_prompt({"prompt": [{"role": "user", "content": "a"}]}, tokenizer, EncodeConfig())
    assert chat.prompt_ids.count(bos) == 1


def test_masks_are_equal_by_markers_and_by_prefixes():
    marked, unmarked = bytes_tokenizer(CHATML), bytes_tokenizer(UNMARKED)
    splits = [{"prompt": TALK[:cut], "completion": TALK[cut:]} for cut in (2, 4)]
    rows = [{"messages": TALK}, *splits]
    for row in rows:
        expected = encode_example(row, marked, EncodeConfig())
        assert sum(expected.is_target) > 5
        assert encode_example(row, unmarked, EncodeConfig()) == expected
    last = " ".join(trained(row, marked) for row in rows)
    assert last.count("h\u00e9llo") == 2 and last.count("fine.<|im_end|>") == 3


def test_a_marked_span_that_leaves_out_the_stop_token_is_extended():
    """Many published templates mark the content alone; a model trained so never stops."""
    template = CHATML.replace("m['content'] + '<|im_end|>' }}{% endgen", "m['content'] }}{% endgen").replace(
        "{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}"
    )
    row = {"messages": TALK}
    assert encode_example(row, bytes_tokenizer(template), EncodeConfig()) == encode_example(
        row, bytes_tokenizer(CHATML), EncodeConfig()
    )


def test_a_turn_is_trained_up_to_one_stop_token_whatever_the_template_writes_around_it():
    """More after the stop; a stop between turns alone; none at all (the end of sequence is appended). Pairs alike."""
    for template, first, last in [
        (UNMARKED + "{% if not add_generation_prompt %}{{ '</s>' }}{% endif %}", None, "a2<|im_end|>"),
        ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
         "{% if not loop.last or add_generation_prompt %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", "a1<|im_end|>", "a2<|im_end|>"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}", "a1\n", "a2\n</s>"),
    ]:  # fmt: skip
        tokenizer = bytes_tokenizer(template)
        talk = [
            {"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, ("q1", "a1", "q2", "a2"), strict=True)
        ]
        report = EncodeReport()
        if first is None:
            assert trained({"messages": talk[2:]}, tokenizer) == last
        else:
            assert trained({"messages": talk}, tokenizer) == first + last
        encode_prompt({"prompt": talk[:1]}, tokenizer, EncodeConfig(), report)
        assert report.stop_tokens == {last.removeprefix("a2").strip()}
        pair = encode_pair({"prompt": talk[2:3], "chosen": talk[3:], "rejected": "no"}, tokenizer, EncodeConfig())
        assert tokenizer.decode(pair.chosen_ids) == last
        spelled = [talk[2], {**talk[3], "content": last.replace("\n", "")}]
        assert trained({"messages": spelled}, tokenizer) == last  # not twice


def test_a_reply_flagged_as_context_is_not_trained():
    """`weight: 0` and its kin, with markers, without, with every other token trained, and in pairs."""
    for flag, value in [("weight", 0), ("train", False), ("training", False), ("loss", 0)]:
        talk = [*TALK[:2], {**TALK[2], flag: value}, TALK[3], {**TALK[4], flag: 1}]
        for tokenizer in (bytes_tokenizer(CHATML), bytes_tokenizer(UNMARKED)):
            assert trained({"messages": talk}, tokenizer) == TALK[4]["content"] + "<|im_end|>"
            every = trained({"messages": talk}, tokenizer, assistant_only_loss=False)
            assert "h\u00e9llo" not in every and "Be kind" in every and "fine.<|im_end|>" in every
            pair = encode_pair({"prompt": talk[:2], "chosen": talk[2:], "rejected": "no"}, tokenizer, EncodeConfig())
            flags = zip(pair.chosen_ids, pair.chosen_is_target, strict=True)
            assert tokenizer.decode([i for i, t in flags if t]) == TALK[4]["content"] + "<|im_end|>"
    talk[2]["loss"] = 0.5
    with pytest.raises(ValueError, match="a message with loss 0.5; give 1 or true"):
        trained({"messages": talk}, tokenizer)


@pytest.mark.parametrize("template", [CHATML, UNMARKED])
def test_a_reply_that_the_prompt_begins_is_continued(template):
    tokenizer = bytes_tokenizer(template)
    prompt = [TALK[1], {"role": "assistant", "content": "It is "}]
    sampled = encode_prompt({"prompt": prompt}, tokenizer, EncodeConfig())
    assert sampled.text.endswith("<|im_start|>assistant\nIt is ")
    example = encode_example({"prompt": prompt, "completion": "four"}, tokenizer, EncodeConfig())
    assert tokenizer.decode(example.input_ids).startswith(sampled.text + "four<|im_end|>")
    assert trained({"prompt": prompt, "completion": "four"}, tokenizer) == "four<|im_end|>"
    pair = encode_pair({"prompt": prompt, "chosen": "four", "rejected": "five"}, tokenizer, EncodeConfig())
    assert tokenizer.decode(pair.prompt_ids) == sampled.text
    assert [tokenizer.decode(ids) for ids, _ in pair.completions()] == ["four<|im_end|>", "five<|im_end|>"]
    opens = template.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
    thinking = [TALK[1], {"role": "assistant", "content": "<think>"}]
    assert encode_prompt({"prompt": thinking}, bytes_tokenizer(opens), EncodeConfig()).text.count("<think>") == 1


def test_what_a_template_drops_is_counted():
    """Thoughts, words beside calls, system texts; what stands in the text is not."""
    template = (
        "{% for m in messages if m.role != 'system' %}{{ m.role + ':' }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% else %}{{ m.content.split('</think>')[-1] }}"
        "{% endif %}{{ '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    call = {"role": "assistant", "content": "Let me look.", "tool_calls": [{"name": "f", "arguments": {}}]}
    rows = [
        {"messages": TALK},
        {"messages": [TALK[1], {"role": "assistant", "content": "<think>hmm</think>yes"}]},
        {"messages": [TALK[1], {"role": "assistant", "content": "yes", "reasoning_content": "hmm"}]},
        {"messages": [TALK[1], call]},
    ]
    _, report = encode_rows(rows, encode_example, bytes_tokenizer(template), EncodeConfig(), what="rows")
    assert report.dropped == {"system messages": 1, "thoughts": 2, "words beside tool calls": 1}
    assert "the chat template drops 1 system messages and 2 thoughts and 1 words beside tool calls" in str(report)
    _, report = encode_rows(rows[:2], encode_example, bytes_tokenizer(UNMARKED), EncodeConfig(), what="rows")
    assert not report.dropped


def test_null_replies_are_dropped_and_counted():
    good = {"prompt": "q", "completion": "a"}
    rows = [good, {"prompt": "q", "completion": None}, {"messages": [TALK[1], {"role": "assistant", "content": None}]}]
    kept, report = encode_rows(rows, encode_example, bytes_tokenizer(UNMARKED), EncodeConfig(), what="rows")
    assert (len(kept), report.no_reply) == (1, 2)
    assert "2 dropped because their reply is null" in str(report)
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": None}]
    assert encode_rows(rows, encode_pair, bytes_tokenizer(), EncodeConfig(), what="pairs")[1].no_reply == 1


def test_whatever_fails_in_a_row_is_one_sentence_with_the_rows():
    good, half, wrong = {"prompt": "q", "completion": "a"}, {"text": "\ud83d"}, {"prompt": "q"}
    for rows, said in [
        ([good, half], "rows, row 2: it holds half of a surrogate pair, which is no character; take it out."),
        ([wrong, good, half, wrong], "rows, row 1: the columns .*; rows 3, 4 cannot be used either."),
    ]:
        with pytest.raises(ValueError, match=said):
            encode_rows(rows, encode_example, bytes_tokenizer(), EncodeConfig(), what="rows")


def test_a_comment_in_a_template_marks_nothing():
    template = "{# put {% generation %} here #}" + UNMARKED
    row = {"messages": TALK}
    assert trained(row, bytes_tokenizer(template)) == trained(row, bytes_tokenizer(CHATML))


def test_a_turn_that_calls_tools_may_end_with_a_token_of_its_own():
    """As gpt-oss: `<|return|>` after a reply, `<|call|>` after a call; here `</s>` and `<|im_start|>`."""
    template = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + '<|im_start|>' }}{% endfor %}"
        "{% if m.role == 'assistant' and not m.tool_calls %}{{ '</s>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    report = EncodeReport()
    encode_prompt({"prompt": TALK[1:2]}, bytes_tokenizer(template), EncodeConfig(), report)
    assert report.stop_tokens == {"</s>", "<|im_start|>"}
    assert trained({"messages": [TALK[1], call]}, bytes_tokenizer(template)) == "f<|im_start|>"


def test_a_trimmed_space_at_the_end_of_a_marked_span_does_not_mark_the_rest():
    """transformers' own mask would train the second question here: its span's last character has no token."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + ' ' }}{% endgeneration %}"
        "{% else %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    talk = [{"role": role, "content": text} for role, text in [("user", "q"), ("assistant", "a"), ("user", "r")]]
    tokenizer = bytes_tokenizer(template, trim=True)
    theirs = tokenizer.apply_chat_template(talk, return_assistant_tokens_mask=True, return_dict=True)
    assert sum(theirs["assistant_masks"]) == 5
    assert trained({"messages": talk}, tokenizer) == "a <|im_start|>"  # what stops this template's turns


def test_a_token_across_the_boundary_belongs_to_the_completion():
    """With the merge ":" + "x", "ab:" + "xy" is a b :x y; ":x" must be trained, with and without offsets."""
    tokenizer = bytes_tokenizer(merges=[(":", "x")])
    row = {"prompt": "ab:", "completion": "xy"}
    assert trained(row, tokenizer) == ":xy</s>"


def test_a_tokenizer_without_offsets_is_refused(monkeypatch):
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(ValueError, match="give a tokenizer_id with a tokenizer.json"):
        trained({"prompt": "a", "completion": "b"}, bytes_tokenizer())


def test_turns_whose_thinking_is_dropped_later_are_still_found():
    """Qwen3's template renders turn 1 with an empty thinking block when it is last, and without one when it is not."""
    tokenizer = bytes_tokenizer(DROPS_THINKING)
    talk = copy.deepcopy(TALK)
    assert trained({"messages": talk}, tokenizer) == (
        " h\u00e9llo\u200b <|im_end|><think></think>\U0001f468\u200d\U0001f469\u200d\U0001f467 fine.<|im_end|>"
    )
    talk[2]["content"] = "<think>first</think>yes"
    assert trained({"messages": talk}, tokenizer).startswith("yes<|im_end|><think>")


def test_a_template_that_rewrites_earlier_turns_is_refused():
    rewriting = UNMARKED.replace("m['content'] +", "(m['content'] if loop.last else m['content']|upper) +")
    row = {"messages": [{"role": r, "content": c} for r, c in [("user", "A"), ("assistant", "b"), ("user", "C")]]}
    with pytest.raises(ValueError, match="renders message 2 differently .* assistant_only_loss: false"):
        encode_example(row, bytes_tokenizer(rewriting), EncodeConfig())


def test_all_tokens_are_trained_when_asked():
    tokenizer = bytes_tokenizer(UNMARKED)
    for row in ({"messages": TALK}, {"prompt": "ab", "completion": "c"}, {"prompt": TALK[:2], "completion": TALK[2:]}):
        example = encode_example(row, tokenizer, EncodeConfig(completion_only_loss=False, assistant_only_loss=False))
        assert example.is_target == [False] + [True] * (len(example.input_ids) - 1)


def scored(pair, tokenizer):
    """A pair as texts: its prompt, and what is scored of chosen and rejected."""
    sides = [tokenizer.decode([i for i, t in zip(*side, strict=True) if t]) for side in pair.completions()]
    return [tokenizer.decode(pair.prompt_ids), *sides]


def test_a_pairs_prompt_ends_where_its_prompt_ends():
    """What "ab" and "ac" begin with is theirs; both end with the stop token. Texts without a prompt column have no
    other end of it than where they part."""
    tokenizer = bytes_tokenizer(UNMARKED)
    pair = encode_pair({"prompt": "q", "chosen": "ab", "rejected": "ac"}, tokenizer, EncodeConfig())
    assert scored(pair, tokenizer) == ["q", "ab</s>", "ac</s>"] and pair.num_shared == 1 and pair.num_tokens == 6
    pair = encode_pair({"chosen": "qab", "rejected": "qac"}, tokenizer, EncodeConfig())
    assert scored(pair, tokenizer) == ["qa", "b</s>", "c</s>"]
    whole = {"chosen": TALK[1:3], "rejected": [TALK[1], {"role": "assistant", "content": " no"}]}
    split = {"prompt": [TALK[1]], "chosen": [TALK[2]], "rejected": " no"}
    first, second = (encode_pair(row, tokenizer, EncodeConfig()) for row in (whole, split))
    assert first == second
    assert tokenizer.decode(first.rejected_ids) == " no<|im_end|>"


USER, YES, NO = ({"role": "user", "content": "ok?"}, *({"role": "assistant", "content": c} for c in ("yes", "yep")))
SYSTEM = {"role": "system", "content": "Short."}


@pytest.mark.parametrize("template", [UNMARKED, CHATML], ids=["unmarked", "marked"])
def test_a_prompt_that_the_replies_contain_is_taken_once(template):
    """UltraFeedback's layout: the prompt as text or messages, chosen and rejected whole; every way gives the same."""
    tokenizer = bytes_tokenizer(template)
    for system in ([], [SYSTEM]):
        expected = encode_pair(
            {"prompt": [*system, USER], "chosen": [YES], "rejected": [NO]}, tokenizer, EncodeConfig()
        )
        assert tokenizer.decode(expected.prompt_ids).count("ok?") == 1
        for prompt in (None, "ok?", [USER], [*system, USER]):
            for shown in ([*system, USER], [USER], []):
                if (not system or SYSTEM in shown or prompt == [SYSTEM, USER]) and (prompt or shown):
                    row = {"chosen": [*shown, YES], "rejected": [*shown, NO], **({"prompt": prompt} if prompt else {})}
                    assert encode_pair(row, tokenizer, EncodeConfig()) == expected, row
                    if prompt:
                        whole = encode_example({"messages": [*system, USER, YES]}, tokenizer, EncodeConfig())
                        sft = {"prompt": prompt, "completion": row["chosen"]}
                        assert encode_example(sft, tokenizer, EncodeConfig()) == whole
                        asked = encode_prompt({"prompt": [*system, USER]}, tokenizer, EncodeConfig()).prompt_ids
                        assert encode_prompt(row, tokenizer, EncodeConfig()).prompt_ids == asked
                        assert encode_prompt(sft, tokenizer, EncodeConfig()).prompt_ids == asked
    blanks = encode_pair({"prompt": " ok?\n", "chosen": [USER, YES], "rejected": [NO]}, tokenizer, EncodeConfig())
    assert tokenizer.decode(blanks.prompt_ids).count("ok?") == 1
    history = [USER, YES, {"role": "user", "content": "sure?"}]
    row = {"prompt": history, "chosen": [history[2], YES], "rejected": [*history, NO]}
    assert encode_pair(row, tokenizer, EncodeConfig()) == encode_pair(
        {"prompt": history, "chosen": [YES], "rejected": [NO]}, tokenizer, EncodeConfig()
    )


def test_replies_to_another_prompt_are_refused_with_the_row():
    tokenizer = bytes_tokenizer(UNMARKED)
    rows = [
        {"prompt": "ok?", "chosen": [YES], "rejected": [NO]},
        {"prompt": "why?", "chosen": [USER, YES], "rejected": [NO]},
    ]
    with pytest.raises(
        ValueError, match="pairs, row 2: its chosen begins with the user's words 'ok[?]', which are not"
    ):
        encode_rows(rows, encode_pair, tokenizer, EncodeConfig(), what="pairs")
    with pytest.raises(ValueError, match="its completion begins with the user's words"):
        encode_example(
            {"prompt": [SYSTEM, USER], "completion": [{**USER, "content": "b"}, YES]}, tokenizer, EncodeConfig()
        )
    with pytest.raises(ValueError, match="its rejected ends where its prompt ends"):
        encode_pair({"prompt": "ok?", "chosen": [USER, YES], "rejected": [USER]}, tokenizer, EncodeConfig())
    with pytest.raises(ValueError, match="different system messages"):
        encode_pair({"prompt": "ok?", "chosen": [SYSTEM, USER, YES], "rejected": [USER, NO]}, tokenizer, EncodeConfig())
    turns = [USER, YES, {"role": "user", "content": "more"}, NO]  # a conversation that goes on is no other prompt
    going_on = encode_example({"prompt": turns[:2], "completion": turns[2:]}, tokenizer, EncodeConfig())
    assert (
        tokenizer.decode([i for i, t in zip(going_on.input_ids, going_on.is_target, strict=True) if t])
        == "yep<|im_end|>"
    )


@pytest.mark.parametrize("template", [UNMARKED, CHATML], ids=["unmarked", "marked"])
def test_only_the_assistants_words_of_a_completion_are_scored(template):
    """Users' turns, tool output and headers are context; without a prompt column the common messages are the prompt."""
    tokenizer = bytes_tokenizer(template)
    more, tool = {"role": "user", "content": "and?"}, {"role": "tool", "content": "42"}
    row = {"prompt": [USER], "chosen": [YES, more, NO], "rejected": [YES, tool, YES]}
    ok = tokenizer.decode(encode_prompt(row, tokenizer, EncodeConfig()).prompt_ids)
    stop = "<|im_end|>"
    pair = encode_pair(row, tokenizer, EncodeConfig())
    assert scored(pair, tokenizer) == [ok, f"yes{stop}yep{stop}", f"yes{stop}yes{stop}"]
    assert "and?" in tokenizer.decode(pair.chosen_ids) and "42" in tokenizer.decode(pair.rejected_ids)
    pair = encode_pair(
        {"chosen": [USER, *row["chosen"]], "rejected": [USER, *row["rejected"]]}, tokenizer, EncodeConfig()
    )
    assert scored(pair, tokenizer)[1:] == [f"yep{stop}", f"yes{stop}"]
    pair = encode_pair({"chosen": [USER, YES], "rejected": [USER, YES, more, NO]}, tokenizer, EncodeConfig())
    assert scored(pair, tokenizer) == [ok, f"yes{stop}", f"yes{stop}yep{stop}"]


def test_pairs_that_teach_nothing_are_dropped_and_counted():
    tokenizer = bytes_tokenizer()
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"chosen": "a", "rejected": "b"},
    ]
    pairs, report = encode_rows(rows, encode_pair, tokenizer, EncodeConfig(), what="train pairs")
    assert (len(pairs), report.unusable) == (1, 2)
    assert str(report) == "train pairs: 1 of 3 rows kept, 2 dropped with nothing to learn from"


def test_long_rows_are_cut_dropped_or_refused():
    """8 places: 3 + 4 + </s> fits; 3 + 9 is cut to 3 + 5; a prompt of 8 leaves no place."""
    rows = [{"prompt": "abc", "completion": "defg"}, {"prompt": "abc", "completion": "defghijkl"}]
    rows.append({"prompt": "abcdefgh", "completion": "i"})
    tokenizer = bytes_tokenizer()
    kept, report = encode_rows(rows, encode_example, tokenizer, EncodeConfig(max_seq_length=8), what="rows")
    assert [len(example.input_ids) for example in kept] == [8, 8]
    assert tokenizer.decode(kept[1].input_ids) == "abcdefgh"
    assert (report.kept, report.truncated, report.too_long) == (2, 1, 1)
    config = EncodeConfig(max_seq_length=8, long_rows="drop")
    kept, report = encode_rows(rows, encode_example, tokenizer, config, what="rows")
    assert (len(kept), report.truncated, report.too_long) == (1, 0, 2)
    config = EncodeConfig(max_seq_length=8, long_rows="error")
    with pytest.raises(ValueError, match="rows, row 2: it has 13 tokens and max_seq_length is 8"):
        encode_rows(rows, encode_example, tokenizer, config, what="rows")
    with pytest.raises(ValueError, match="rows: 0 of 1 rows kept, 1 dropped as longer than 4 tokens"):
        encode_rows(rows[2:], encode_example, tokenizer, EncodeConfig(max_seq_length=4), what="rows")


def test_long_pairs_and_prompts():
    tokenizer = bytes_tokenizer()
    row = {"prompt": "abcd", "chosen": "1234", "rejected": "5"}
    pair = encode_pair(row, tokenizer, EncodeConfig(max_seq_length=6))
    assert (len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) == (4, 2, 2)
    assert encode_pair(row, tokenizer, EncodeConfig(max_seq_length=4)) is None
    assert encode_pair(row, tokenizer, EncodeConfig(max_seq_length=6, long_rows="drop")) is None
    prompts, report = encode_rows(
        [row, {"prompt": "ab"}], encode_prompt, tokenizer, EncodeConfig(max_seq_length=3), what="prompts"
    )
    assert [prompt.text for prompt in prompts] == ["ab"] and report.too_long == 1


def test_prompts_end_with_the_generation_prompt_and_keep_the_row():
    tokenizer = bytes_tokenizer(UNMARKED)
    row = {"messages": TALK, "answer": "7"}
    prompt = encode_prompt(row, tokenizer, EncodeConfig())
    assert prompt.text.endswith("And \u4f60\u597d?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(prompt.prompt_ids) == prompt.text
    assert prompt.columns["answer"] == "7"


def test_a_conversation_without_a_template_says_what_to_give():
    for encode, row in [(encode_example, {"messages": TALK}), (encode_prompt, {"prompt": TALK[:2]})]:
        with pytest.raises(ValueError, match="no chat template; give a tokenizer_id"):
            encode(row, bytes_tokenizer(), EncodeConfig())


@pytest.mark.parametrize("encode", [encode_example, encode_pair, encode_prompt])
def test_missing_columns_are_named_with_the_row(encode):
    with pytest.raises(ValueError, match="rows, row 1: the columns .* it has question, answer; give field_mapping"):
        encode_rows([{"question": "q", "answer": "a"}], encode, bytes_tokenizer(), EncodeConfig(), what="rows")


def test_messages_are_normalised():
    """None keys of merged schemas, text parts, tools and arguments as JSON text."""
    template = (
        "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}"
        "{% for m in messages %}{{ m.role + ':' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{{ c.function.arguments.level }}{% endfor %}|{% endfor %}"
    )
    row = {
        "tools": json.dumps([{"name": "f", "parameters": {}}]),
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}], "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": '{"level": 0.95}'}]},
        ],
    }
    example = encode_example(row, bytes_tokenizer(template), EncodeConfig(assistant_only_loss=False))
    assert bytes_tokenizer().decode(example.input_ids) == "f;user:q|assistant:f0.95|</s>"  # no stop of its own
    row["messages"][1]["tool_calls"][0]["arguments"] = "{"
    with pytest.raises(ValueError, match="text of f's arguments is not JSON"):
        encode_example(row, bytes_tokenizer(template), EncodeConfig())


# Real rows and tokenizers


@needs_shared
def test_real_tool_rows_render_every_call():
    """All 300 rows with minimind: the targets hold each call's name and each assistant's words."""
    tokenizer = shared_tokenizer("minimind-6400")
    rows = rows_of("tool_calls.jsonl")
    examples, report = encode_rows(rows, encode_example, tokenizer, EncodeConfig(max_seq_length=40000), what="tools")
    assert (report.kept, report.truncated) == (300, 0)
    calls = 0
    for row, example in zip(rows, examples, strict=True):
        pairs = zip(example.input_ids, example.is_target, strict=True)
        text = tokenizer.decode([i for i, target in pairs if target])
        replies = [message for message in row["messages"] if message["role"] == "assistant"]
        assert text.count("<|im_end|>") == len(replies)
        for message in replies:
            assert message["content"].strip("\n") in text
            for call in message.get("tool_calls", []):
                arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                assert f'{{"name": "{call["function"]["name"]}", "arguments": {arguments}}}' in text
                calls += 1
        assert not any(m["content"] in text for m in row["messages"] if m["role"] == "user" and len(m["content"]) > 40)
    assert calls > 200


@needs_shared
def test_a_template_that_drops_tools_is_refused_by_name():
    with pytest.raises(ValueError, match="tools, row 1: the chat template of .*smollm2.* drops 2 of its 2 tools and"):
        rows = rows_of("tool_calls.jsonl")
        encode_rows(rows, encode_example, shared_tokenizer("smollm2-135m-instruct"), EncodeConfig(), what="tools")


@needs_shared
@pytest.mark.parametrize("name", ["minimind-6400", "smollm2-135m-instruct"])
def test_real_chats_train_the_replies_alone(name):
    """Scripts, emoji and zero-width characters included: the targets decode to the replies, each with its stop."""
    tokenizer = shared_tokenizer(name)
    think = "" if name.startswith("smol") else "<think>\n\n</think>\n\n"
    for row in rows_of("chat_train.jsonl"):
        example = encode_example(row, tokenizer, EncodeConfig(max_seq_length=10000))
        pairs = zip(example.input_ids, example.is_target, strict=True)
        replies = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        if think:  # in the generation prompt already; the template strips newlines in front
            replies = [reply.lstrip("\n") for reply in replies]
        assert tokenizer.decode([i for i, t in pairs if t]) == "".join(reply + "<|im_end|>" for reply in replies)


@needs_shared
def test_real_reasoning_starts_where_it_leaves_the_generation_prompt():
    """minimind's generation prompt holds an empty thinking block; a turn that thinks is trained from its thought on."""
    row = {"messages": [TALK[1], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}]}
    assert trained(row, shared_tokenizer("minimind-6400")) == "hm\n</think>\n\nyes<|im_end|>"


@needs_shared
@pytest.mark.parametrize("name", ["preferences_math.jsonl", "preferences_helpful.jsonl"])
def test_real_pairs_share_their_prompt_and_end_with_the_stop_token(name):
    tokenizer = shared_tokenizer("smollm2-135m-instruct")
    rows = rows_of(name)
    config = EncodeConfig(max_seq_length=20000)
    pairs, report = encode_rows(rows, encode_pair, tokenizer, config, what="pairs")
    assert report.kept == len(rows)
    for row, pair in zip(rows, pairs, strict=True):
        prompt = encode_prompt(row, tokenizer, config)
        assert list(pair.prompt_ids) == prompt.prompt_ids
        assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(pair.prompt_ids + pair.chosen_ids).endswith(row["chosen"][0]["content"] + "<|im_end|>")


@needs_shared
def test_real_instructions_train_the_output_and_the_stop_token():
    tokenizer = shared_tokenizer("minimind-6400")
    templates = {"input_template": "{instruction}\\n{input}\\n", "output_template": "{output}"}
    for row in rows_of("instructions_train.jsonl", **templates):
        example = encode_example(row, tokenizer, EncodeConfig(max_seq_length=10000))
        pairs = zip(example.input_ids, example.is_target, strict=True)
        written = tokenizer.decode([i for i, target in pairs if target])
        assert written.lstrip("\n") == (row["output"] + "<|im_end|>").lstrip("\n")


@needs_shared
def test_dirty_rows_give_clear_results(tmp_path):
    """Rows 1 (mojibake, ShareGPT pair), 3 (end marker in the text) and 4-6 (long) encode; the others lack columns."""
    tokenizer = shared_tokenizer("minimind-6400")
    raw = [row["row"] for row in rows_of("dirty_rows.jsonl")]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raw), encoding="utf-8")
    rows = load_rows(DataConfig(dataset_name=str(tmp_path / "raw.jsonl")), seed=0)[0]
    pairs, report = encode_rows(rows[:1], encode_pair, tokenizer, EncodeConfig(max_seq_length=9000), what="pairs")
    assert len(pairs) == 1
    marker = encode_example(rows[2], tokenizer, EncodeConfig(max_seq_length=9000))
    assert marker.input_ids[-2:] == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    long_rows = [{**row, "completion": row["response"]} for row in rows[3:6]]
    _, report = encode_rows(long_rows, encode_example, tokenizer, EncodeConfig(max_seq_length=1500), what="long")
    assert report.kept == 3 and report.truncated > 0
    with pytest.raises(ValueError, match="functions, row 1: the columns .* it has id, question, function"):
        encode_rows(rows[6:], encode_example, tokenizer, EncodeConfig(), what="functions")
    empty = {"prompt": rows[1]["question"], "completion": ""}
    assert trained(empty, tokenizer) == "<|im_end|>"


@needs_shared
def test_real_verifiable_prompts_keep_their_answers():
    rows = rows_of("verifiable_tasks.jsonl")
    tokenizer = shared_tokenizer("smollm2-135m-instruct")
    prompts, _ = encode_rows(rows, encode_prompt, tokenizer, EncodeConfig(), what="tasks")
    assert [prompt.columns["answer"] for prompt in prompts] == [row["answer"] for row in rows]
    assert all(prompt.text.endswith("<|im_start|>assistant\n") for prompt in prompts)


# Siblings of faults that people met


def test_a_reply_is_its_content_its_thoughts_or_its_calls_and_null_without_them():
    """Other keys make no reply; one call may stand in `function_call`; arguments in `parameters`, and are an object."""
    call = {"name": "f", "parameters": {"level": 0.95}}
    template = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{{ '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = bytes_tokenizer(template)
    for nothing in ({"name": "bot"}, {"refusal": "no"}, {"tool_calls": []}, {"function_call": None}):
        rows = [{"messages": [TALK[1], {"role": "assistant", "content": None, **nothing}]}, {"messages": TALK[1:3]}]
        assert encode_rows(rows, encode_example, tokenizer, EncodeConfig(), what="rows")[1].no_reply == 1
    for key, value in (("tool_calls", [call]), ("function_call", call)):
        reply = {"role": "assistant", "content": None, key: value}
        assert trained({"messages": [TALK[1], reply]}, tokenizer) == 'f{"level": 0.95}</s>'
    for arguments in ([1], json.dumps('{"level": 0.95}')):
        reply["function_call"] = {"name": "f", "arguments": arguments}
        with pytest.raises(ValueError, match="the arguments of f are .*; give an object"):
            trained({"messages": [TALK[1], reply]}, tokenizer)


def test_every_turn_ends_with_the_token_at_which_sampling_stops():
    """Also where a line break stands before the next turn's token, and where a reply spells the end of sequence."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    talk = [TALK[1], {"role": "assistant", "content": "a1"}, TALK[3], {"role": "assistant", "content": "a2</s>"}]
    assert turn_ends(bytes_tokenizer(template)) == ("<|im_start|>",)
    assert trained({"messages": talk}, bytes_tokenizer(template)) == "a1\n<|im_start|>a2\n<|im_start|>"
    assert trained({"messages": talk}, bytes_tokenizer(UNMARKED)) == "a1<|im_end|>a2<|im_end|>"


@pytest.mark.parametrize("written", ["m.content", "m.content | trim", "' ' + m.content | trim"])
def test_a_begun_reply_is_sampled_from_the_text_that_is_trained_on(written):
    template = (
        "{% for m in messages %}{{ m.role + ':' }}{{ WRITTEN }}{{ '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    ).replace("WRITTEN", written)
    tokenizer = bytes_tokenizer(template)
    row = {"prompt": [TALK[1], {"role": "assistant", "content": " It is "}], "completion": "four"}
    sampled = encode_prompt({"prompt": row["prompt"]}, tokenizer, EncodeConfig()).text
    assert tokenizer.decode(encode_example(row, tokenizer, EncodeConfig()).input_ids) == sampled + "four</s>"
    assert trained(row, tokenizer) == "four</s>"
