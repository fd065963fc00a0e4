"""Export: any run, checkpoint or adapter becomes a Hugging Face folder that gives the policy's logits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from configs.text import dump_yaml
from launch.export import LOGITS_TOLERANCE, WrongLogits, compare_logits, logits_of, main
from launch.trained import find_trained, rebuild_policy
from loops.shared.checkpoint import Saver
from loops.shared.models import ModelConfig, build_policy, build_tokenizer
from loops.shared.weights import export_model, iter_weights

HOUSE = Path(__file__).resolve().parents[2]
VOCABULARY = 64
TOKENS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))  # [B, T]
KINDS = {
    "full": dict(lora_r=0),
    "lora": dict(lora_r=4),
    "dora": dict(lora_r=4, use_dora=True, modules_to_save="norm"),
    "bfloat16": dict(lora_r=4, torch_dtype="bfloat16"),
    "float64": dict(lora_r=4, torch_dtype="float64"),
    "qlora": dict(lora_r=4, load_in_4bit=True),
    "int8": dict(lora_r=4, load_in_8bit=True),
}


@pytest.fixture(autouse=True)
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A tiny random Qwen3 with a tokenizer; its logits have a standard deviation of about 1."""
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=32)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, initializer_range=0.1, eos_token_id=1)
    Qwen3ForCausalLM(Qwen3Config(**shape, **heads, tie_word_embeddings=True)).save_pretrained(tmp_path / "base")
    inner = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w1").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def train(policy: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for _ in range(steps):
        policy(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def make_run(
    accelerator: Accelerator, folder: Path, model_id: str, *, name_model: bool = False, save: bool = True, **settings
) -> torch.nn.Module:
    """A run folder with config.yaml and a checkpoint of step 4, as `Run.create_folder` and `Run.save` write them."""
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        pytest.importorskip("bitsandbytes")
    config = ModelConfig(model_id=model_id, **settings)
    policy = build_policy(config, seed=3, device="cpu")
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=5e-3)
    train(policy, optimizer)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        dump_yaml({"model": asdict(config), "data": {"dataset_name": "rows.jsonl"}, "run": {"seed": 3}})
    )
    if save:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        objects = dict(model=policy, optimizer=optimizer, scheduler=scheduler)
        state = {"step": 4, "epoch": 1, "loop": "sft", "seed": 3} | ({"model": asdict(config)} if name_model else {})
        Saver(folder, accelerator=accelerator).save(state=state, **objects)
    return policy.eval()


def checkpoint_of(run: Path) -> Path:
    (path,) = (path for path in (run / "checkpoints").iterdir() if path.suffix == "")
    return path


def spread(policy, folder: Path) -> float:
    """Root mean square difference of the exported model's logits, over the standard deviation of the policy's."""
    expected = logits_of(policy)
    found = logits_of(AutoModelForCausalLM.from_pretrained(folder).eval())
    return float((found - expected).square().mean().sqrt() / expected.std())


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_becomes_a_model_with_the_policys_logits(accelerator, tmp_path, base, kind, capsys):
    policy = make_run(accelerator, tmp_path / "run", base, **KINDS[kind])
    path = checkpoint_of(tmp_path / "run")
    assert main([str(path)]) == 0
    output = Path(f"{path}.hf_model")
    said = capsys.readouterr().out
    assert "limit" in said and f"written to {output}" in said and "step 4" in said
    exported = AutoModelForCausalLM.from_pretrained(output)
    assert type(exported) is Qwen3ForCausalLM and not hasattr(exported.config, "quantization_config")
    base_dtype = getattr(torch, KINDS[kind].get("torch_dtype", "float32"))
    assert {p.dtype for p in exported.parameters()} == {base_dtype}
    assert spread(policy, output) < LOGITS_TOLERANCE[base_dtype]
    moved = logits_of(AutoModelForCausalLM.from_pretrained(base, dtype=base_dtype).eval())
    assert (moved - logits_of(policy)).std() > 0.1, "training must move what the comparison compares"
    assert AutoTokenizer.from_pretrained(output).eos_token_id == 1
    assert base in (output / "README.md").read_text()
    assert not list((tmp_path / "run" / "checkpoints").glob(".export-*"))


@pytest.mark.parametrize("kind", ["lora", "dora", "bfloat16", "qlora", "int8"])
def test_no_merge_writes_an_adapter_that_peft_loads(accelerator, tmp_path, base, kind):
    policy = make_run(accelerator, tmp_path / "run", base, **KINDS[kind])
    assert main([str(tmp_path / "run"), "--no_merge", "--output", str(tmp_path / "adapter")]) == 0
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    if kind not in ("qlora", "int8"):
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=policy.dtype)
        torch.testing.assert_close(
            logits_of(PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()),
            logits_of(policy),
            rtol=0,
            atol=2e-2,
        )


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_qlora_merges_into_the_dequantised_base(accelerator, tmp_path, base, dtype, limit):
    """The adapter was trained beside rounded weights: only on those does it give the logits it was trained to give.

    Measured here, root mean square over the spread: 7e-7 (float32) and 0.016 (bfloat16), against 0.31 for merging the
    same adapter into the original base.
    """
    policy = make_run(accelerator, tmp_path / "run", base, torch_dtype=dtype, **KINDS["qlora"])
    path = checkpoint_of(tmp_path / "run")
    assert main([str(path)]) == 0
    trained = find_trained(str(path))
    original = rebuild_policy(replace(trained, model=replace(trained.model, load_in_4bit=False)))
    export_model(original, build_tokenizer(trained.model), tmp_path / "original", merge=True, card={})
    error, other = spread(policy, Path(f"{path}.hf_model")), spread(policy, tmp_path / "original")
    print(f"{dtype}: error {error:.2g} into the dequantised base, {other:.2g} into the original one")
    assert error < limit < 0.2 < other


def test_a_sharded_checkpoint_gives_the_runs_own_adapter_byte_for_byte(tmp_path):
    """Two processes with FSDP2: half of every adapter matrix lies in each of the checkpoint's two files."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    command += ["launch/cpu_fsdp2.yaml", "--main_process_port", "0", "loops/sft.py", "--config", "configs/sft.yaml"]
    command += ["--model_id", "data/quickstart/model", "--from_scratch", "false", "--lora_r", "4", "--max_steps", "2"]
    command += ["--eval_dataset_name", "null", "--eval_reward", "null", "--save_steps", "2"]
    command += ["--output_dir", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOUSE)}
    done = subprocess.run(command, cwd=HOUSE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    path = checkpoint_of(tmp_path / "run")
    assert len(list(path.glob("*.distcp"))) == 2
    assert main([str(path), "--base_model", str(HOUSE / "data/quickstart/model"), "--no_merge"]) == 0
    exported, own = Path(f"{path}.hf_peft"), tmp_path / "run" / "model"
    name = "adapter_model.safetensors"
    assert (exported / name).read_bytes() == (own / name).read_bytes()
    assert main([str(path), "--base_model", str(HOUSE / "data/quickstart/model")]) == 0


def test_the_newest_checkpoint_is_by_time_not_by_step_or_name(accelerator, tmp_path, base, capsys):
    make_run(accelerator, tmp_path / "results" / "b", base, lora_r=4)
    make_run(accelerator, tmp_path / "results" / "deep" / "a", base, lora_r=0)
    torn = tmp_path / "results" / "deep" / "a" / "checkpoints" / "full-epoch01-step000009"
    shutil.copytree(checkpoint_of(tmp_path / "results" / "deep" / "a"), torn)
    manifest = json.loads((torn / "manifest.json").read_text())
    (torn / "manifest.json").write_text(json.dumps(manifest | {"saved_at": manifest["saved_at"] + 1}))
    next(path for path in torn.rglob("*") if path.is_file() and path.name != "manifest.json").unlink()
    assert main(["--checkpoints_dir", str(tmp_path / "results"), "--output", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "results/deep/a/checkpoints/full-epoch01-step000004: step 4, all weights" in out
    assert "passed over" in err and "step000009" in err


def test_a_runs_adapter_is_merged_where_it_has_no_checkpoint(accelerator, tmp_path, base):
    """`model/` of a QLoRA run: its config.yaml says that the base was quantised, the adapter does not."""
    policy = make_run(accelerator, tmp_path / "run", base, save=False, **KINDS["qlora"])
    tokenizer = build_tokenizer(ModelConfig(model_id=base))
    export_model(policy, tokenizer, tmp_path / "run" / "model", merge=False, card={})
    assert main([str(tmp_path / "run")]) == 0
    assert spread(policy, tmp_path / "run" / "model.hf_model") < 1e-4


def test_a_run_that_went_on_after_its_last_checkpoint_gives_what_it_has_newest(accelerator, tmp_path, base):
    """The checkpoint is of step 4; metrics.jsonl says that the model in `model/` is of step 6."""
    policy = make_run(accelerator, tmp_path / "run", base, lora_r=4)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=5e-3)
    train(policy, optimizer, steps=2)
    export_model(policy, build_tokenizer(ModelConfig(model_id=base)), tmp_path / "run" / "model", merge=False, card={})
    for step, kind in ((4, "checkpoint"), (6, "adapter")):
        with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step}) + "\n")
        assert find_trained(str(tmp_path / "run")).kind == kind
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    assert spread(policy, tmp_path / "out") < 1e-4


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_checkpoint_without_its_run_needs_only_a_base(accelerator, tmp_path, base, kind):
    policy = make_run(accelerator, tmp_path / "run", base, name_model=kind == "lora", **KINDS[kind])
    moved = tmp_path / "elsewhere" / "checkpoint"
    shutil.copytree(checkpoint_of(tmp_path / "run"), moved)
    shutil.move(base, tmp_path / "moved-base")
    assert main([str(moved), "--base_model", str(tmp_path / "moved-base")]) == 0
    assert spread(policy, tmp_path / "elsewhere" / "checkpoint.hf_model") < 1e-4


def test_random_bases_are_drawn_again_from_the_runs_seed(accelerator, tmp_path, base):
    """LoRA on weights that were never in a file; only the merged model can be written."""
    policy = make_run(accelerator, tmp_path / "run", base, lora_r=4, from_scratch=True)
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    assert spread(policy, tmp_path / "out") < 1e-4


def test_auto_means_the_dtype_of_the_machine_that_trained(accelerator, tmp_path, base):
    """`torch_dtype: auto` is bfloat16 for LoRA on a GPU and float32 on a CPU; the export runs on a CPU either way."""
    make_run(accelerator, tmp_path / "run", base, lora_r=4)
    path = checkpoint_of(tmp_path / "run")
    manifest = json.loads((path / "manifest.json").read_text())
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
        (path / "manifest.json").write_text(json.dumps(manifest | {"device": device}))
        assert find_trained(str(path)).model.torch_dtype == dtype
    assert main([str(path)]) == 0
    assert AutoModelForCausalLM.from_pretrained(f"{path}.hf_model").dtype == torch.bfloat16


def test_the_written_dtype_is_rounded_once(accelerator, tmp_path, base):
    """A bfloat16 base merged and written in float32: the sum is W + 16 B A, not that sum rounded to bfloat16."""
    policy = make_run(accelerator, tmp_path / "run", base, **KINDS["bfloat16"])
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layer = policy.base_model.model.model.layers[0].self_attn.q_proj
    weight = layer.base_layer.weight.float() + 16.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(exported.model.layers[0].self_attn.q_proj.weight, weight, rtol=0, atol=1e-6)
    assert {tensor.dtype for _, tensor in iter_weights(policy, dtype=torch.float32)} == {torch.float32}


def test_wrong_logits_keep_nothing_and_exit_1(accelerator, tmp_path, base, monkeypatch, capsys):
    """A reload that gives another model (here: the untrained base) is caught."""
    make_run(accelerator, tmp_path / "run", base, lora_r=4)
    wrong = AutoModelForCausalLM.from_pretrained(base).eval()
    monkeypatch.setattr("launch.export.reload_folder", lambda *_, **__: wrong)
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 1
    assert "nothing was kept" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".export-*"))


def test_logits_that_are_not_numbers_are_no_agreement():
    """Of 1 and 3 the spread is sqrt(2); a shift by 0.1 is 0.0707 of it."""
    expected = torch.tensor([[[1.0, 3.0]]])
    assert "difference 0.071 " in compare_logits(expected, expected + 0.1, 0.08, torch.float32)
    for found in (expected + 0.2, expected * float("nan")):
        with pytest.raises(WrongLogits):
            compare_logits(expected, found, 0.08, torch.float32)


def error_of(capsys, *argv: object) -> str:
    assert main([str(word) for word in argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("python -m launch.export: error: ")
    return error


def test_what_cannot_be_exported_is_one_sentence(accelerator, tmp_path, base, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    make_run(accelerator, run, base, lora_r=0)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    assert "there is no complete checkpoint under results" in error_of(capsys)
    assert "there is no folder nowhere" in error_of(capsys, "nowhere")
    assert "neither a complete checkpoint nor a model folder" in error_of(capsys, tmp_path / "empty")
    assert "taken already holds files" in error_of(capsys, run, "--output", tmp_path / "taken")
    assert (tmp_path / "taken" / "file").read_text() == "mine"
    assert "no adapter: leave out no_merge" in error_of(capsys, run, "--no_merge")
    assert "whole Hugging Face model already" in error_of(capsys, base)
    moved = tmp_path / "moved"
    shutil.copytree(checkpoint_of(run), moved)
    assert "name its base with base_model" in error_of(capsys, moved)
    assert "(base_model names another base)" in error_of(capsys, moved, "--base_model", tmp_path / "nowhere")
    other = Qwen3ForCausalLM(Qwen3Config(vocab_size=8, hidden_size=8, num_hidden_layers=1))
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "other")
    assert "belongs to another model" in error_of(capsys, moved, "--base_model", tmp_path / "other")
    make_run(accelerator, tmp_path / "adapter-run", base, lora_r=4)
    lora = tmp_path / "lora"
    shutil.copytree(checkpoint_of(tmp_path / "adapter-run"), lora)
    assert "without its settings (alpha, rank, modules)" in error_of(capsys, lora, "--base_model", base)
    make_run(accelerator, tmp_path / "random", base, lora_r=4, from_scratch=True)
    assert "random and kept nowhere" in error_of(capsys, tmp_path / "random", "--no_merge")
