"""The quickstart's files: reproducible, right where they claim to be, wrong where they claim to be, and apart."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.quickstart import generate

FOLDER = Path(__file__).resolve().parents[2] / "data/quickstart"
TRAINING_FILES = ("sft_train.jsonl", "train.jsonl", "preferences_train.jsonl")
HELDOUT_FILES = ("heldout.jsonl", "preferences_heldout.jsonl")


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


def operands(row: dict) -> tuple[int, int]:
    """The two numbers of the question, read with an expression of the test's own."""
    (turn,) = row["prompt"]
    assert turn["role"] == "user"
    left, right = re.fullmatch(r"(\d+) \+ (\d+) = \?", turn["content"]).groups()
    return int(left), int(right)


def content(turns: list[dict]) -> str:
    (turn,) = turns
    assert turn["role"] == "assistant"
    return turn["content"]


def answer_of(text: str) -> int:
    """The number between the answer tags of a well-formed completion."""
    return int(re.fullmatch(r"<think>[^<]*</think>\n<answer>(\d+)</answer>", text).group(1))


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER / "scratch")


def test_generator_reproduces_the_shipped_files_byte_for_byte(tmp_path):
    generate.main(tmp_path)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(written) == len(TRAINING_FILES) + len(HELDOUT_FILES) + 5
    for name in written:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name


def test_no_heldout_problem_is_trained_on_in_either_order():
    trained = {frozenset(operands(row)) for name in TRAINING_FILES for row in read(name)}
    for name in HELDOUT_FILES:
        problems = [frozenset(operands(row)) for row in read(name)]
        assert len(problems) == len(set(problems)) >= 500
        assert trained.isdisjoint(problems)


def test_every_answer_is_the_sum():
    for name in TRAINING_FILES + HELDOUT_FILES:
        for row in read(name):
            assert row["answer"] == str(sum(operands(row)))


def test_demonstrations_and_chosen_are_right_and_rejected_are_wrong():
    for name in ("sft_train.jsonl", "heldout.jsonl"):
        for row in read(name):
            assert answer_of(content(row["completion"])) == sum(operands(row))
    for name in ("preferences_train.jsonl", "preferences_heldout.jsonl"):
        for row in read(name):
            assert answer_of(content(row["chosen"])) == sum(operands(row))
            assert answer_of(content(row["rejected"])) != sum(operands(row))


def test_worked_columns_of_right_completions_add_up():
    """Units first; `a+b+1` when the column before came to ten or more: 347 + 685 -> 7+5=12 4+8+1=13 3+6+1=10."""
    worked = 0
    for name, column in (("sft_train.jsonl", "completion"), ("preferences_train.jsonl", "chosen")):
        for row in read(name):
            work = content(row[column]).removeprefix("<think>").split("</think>")[0]
            if not work:
                continue
            worked += 1
            carried, total = False, 0
            for place, step in enumerate(work.split(" ")):
                terms, result = step.split("=")
                digits = [number // 10**place % 10 for number in operands(row)]
                assert [int(term) for term in terms.split("+")] == digits + [1] * carried
                assert int(result) == sum(digits) + carried
                carried, total = int(result) > 9, total + int(result) % 10 * 10**place
            assert total + carried * 10 ** (place + 1) == sum(operands(row))
    assert worked > 1000


def test_files_stay_small():
    assert sum(len(content.encode()) for content in generate.build_files().values()) < 1.5e6


@pytest.mark.parametrize(
    "text",
    [
        "347 + 685 = ?",
        "Grüße, 你好, مرحبا ٣٤, 🙂👩‍🚀\u200b\u00a0\t\r\n  two  spaces and a trailing one ",
        "<think>1+1=2</think>\n<answer>2</answer><tool_call>{}</tool_call>",
        "".join(map(chr, range(256))),
    ],
)
def test_any_text_round_trips_and_keeps_its_tags(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_digits_are_single_tokens_and_tags_are_one(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("<think>12+345</think>")["input_ids"])
    assert tokens == ["<think>", "1", "2", "+", "3", "4", "5", "</think>"]


def test_prompts_stay_short(tokenizer):
    """3 (start, user, newline) + 3 + 1 (" +") + 1 (space) + 3 + 2 (" =", " ?") + 2 (stop, newline) + 3 = 18 tokens."""
    for row in read("heldout.jsonl")[:50]:
        encoded = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)
        assert len(encoded["input_ids"]) == 18


def test_assistant_mask_is_the_assistants_text_and_its_stop_token(tokenizer):
    messages = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "assistant user 1 + 1 = ?"},
        {"role": "assistant", "content": "<think></think>\n<answer>2</answer>"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes 🙂"},
    ]
    encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    spans, previous = [], 0
    for token, marked in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        if marked and not previous:
            spans.append([])
        if marked:
            spans[-1].append(token)
        previous = marked
    texts = [tokenizer.decode(span) for span in spans]
    assert texts == ["<think></think>\n<answer>2</answer><|im_end|>", "Yes 🙂<|im_end|>"]


def test_prompt_is_a_token_prefix_of_prompt_and_completion(tokenizer):
    for row in read("sft_train.jsonl")[:50]:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        assert whole[: len(prompt)] == prompt


def test_template_renders_tools_calls_and_results(tokenizer):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 0.95, "city": "Zürich"}}}
    as_text = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": [call, as_text]},
        {"role": "tool", "name": "add", "content": "2"},
        {"role": "assistant", "reasoning_content": "Two.", "content": "2"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert rendered == (
        "<|im_start|>system\nBe brief.\n\n<tools>\n"
        '{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}\n'
        "</tools><|im_end|>\n<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 0.95, "city": "Zürich"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>Two.</think>\n2<|im_end|>\n"
    )


def test_unknown_roles_and_parts_are_refused(tokenizer):
    with pytest.raises(Exception, match="roles are system, user, assistant and tool, not critic"):
        tokenizer.apply_chat_template([{"role": "critic", "content": "no"}], tokenize=False)
    with pytest.raises(Exception, match="renders text only"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)


def test_model_config_loads_and_its_widths_are_multiples_of_64(tokenizer):
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(FOLDER / "scratch")
    assert config.head_dim == 32
    for width in (config.vocab_size, config.hidden_size, config.intermediate_size):
        assert width % 64 == 0
    assert len(tokenizer) == config.vocab_size
    stops = GenerationConfig.from_pretrained(FOLDER / "scratch")
    assert config.eos_token_id == stops.eos_token_id == tokenizer.eos_token_id
    assert config.pad_token_id == stops.pad_token_id == tokenizer.pad_token_id
    assert 0.8e6 < AutoModelForCausalLM.from_config(config).num_parameters() < 1.2e6
