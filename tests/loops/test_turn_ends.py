"""The token that ends a turn in the chat template is trained, stops the engine and stands in every export."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from configs.loader import load_config
from launch.export import main as export
from loops import grpo, sft
from loops.shared.rollout import RolloutConfig, Sampling, build_engine

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny random base model whose end of sequence is `</s>` (0); its chat template ends turns with another token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["</s>", "<|im_start|>", "<|im_end|>"]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", chat_template=CHATML)
    shape = dict(vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=0, bos_token_id=None))
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "base")
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}], "answer": "yes"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps(rows[0]) + "\n" * 2)
    (tmp_path / "text.jsonl").write_text(json.dumps({"prompt": "q", "completion": "yes", "answer": "yes"}) + "\n")
    return tmp_path / "base"


def run(loop, base: Path, output: Path, rows: Path, *options: str) -> list[dict]:
    AcceleratorState._reset_state(True)
    data = str(rows)
    common = ["--model_id", str(base), "--lora_r", "0", "--dataset_name", data, "--eval_dataset_name", data]
    common += ["--max_completion_length", "12", "--eval_reward", "exact_answer", "--output_dir", str(output)]
    loop.main(load_config(loop.Config, [*common, *options], prog="test"))
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def stops_of(folder: Path) -> list[int]:
    return AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id


def test_a_model_stops_where_it_was_trained_to(base, tmp_path, capsys):
    """`</s>` is 0 and `<|im_end|>` 2: SFT learns "yes<|im_end|>", its evaluation, the engines of the exported folder
    and GRPO end there after 4 tokens, and both exports of the run name 0 and 2."""
    learn = ["--learning_rate", "3e-2", "--warmup_steps", "1", "--max_steps", "40", "--save_steps", "40"]
    rows = run(sft, base, tmp_path / "sft", tmp_path / "chat.jsonl", *learn)
    assert rows[-1]["eval/completion_length"] == 4 and rows[-1]["eval/accuracy"] == 1
    assert "training rows: 1 of 1 rows kept; a turn ends with <|im_end|>" in capsys.readouterr().out
    assert stops_of(tmp_path / "sft/model") == [0, 2]
    assert export([str(next((tmp_path / "sft/checkpoints").glob("*"))), "--output", str(tmp_path / "again")]) == 0
    assert stops_of(tmp_path / "again") == [0, 2]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
    engine = build_engine(RolloutConfig(engine="transformers"), model, tokenizer)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "q"}], add_generation_prompt=True)["input_ids"]
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("y", "e", "s", "<|im_end|>")]
    for own, expected in (((), ids), ((ids[1],), ids[:2])):  # `stop_token_ids` stop besides
        sampling = Sampling(temperature=0, max_completion_length=12, stop_token_ids=own)
        ((completion,),) = engine.sample([prompt], n=1, sampling=sampling, seed=0, prompt_numbers=[0])
        assert (completion.token_ids, completion.finish_reason) == (expected, "stop")

    options = ["--num_generations", "2", "--per_device_train_batch_size", "2", "--max_steps", "1"]
    rows = run(
        grpo, tmp_path / "sft/model", tmp_path / "grpo", tmp_path / "chat.jsonl", *options, "--temperature", "0.01"
    )
    assert rows[0]["eval/completion_length"] == 4 and rows[1]["rollout/truncated"] == 0


def test_plain_text_ends_with_the_end_of_sequence_alone(base, tmp_path, capsys):
    run(sft, base, tmp_path / "sft", tmp_path / "text.jsonl", "--max_steps", "1")
    assert stops_of(tmp_path / "sft/model") == 0
    assert "a turn ends with" not in capsys.readouterr().out


def test_an_adapter_alone_names_the_stop_too(base, tmp_path):
    options = ["--lora_r", "2", "--merge_weights", "false", "--max_steps", "1"]
    run(sft, base, tmp_path / "sft", tmp_path / "chat.jsonl", *options)
    assert json.loads((tmp_path / "sft/model/generation_config.json").read_text())["eos_token_id"] == [0, 2]
    assert export([str(tmp_path / "sft/model"), "--output", str(tmp_path / "whole")]) == 0
    assert stops_of(tmp_path / "whole") == [0, 2]
