"""The loops from end to end on the quickstart's rows: they run, resume to the same bytes, export, refuse bad input."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.loader import load_config
from data.chat import Example, Prompt
from loops import dpo, grpo, sft
from loops.shared.checkpoint_files import MANIFEST, STATE, checksum
from loops.shared.identity import refuse_other_run, rows_digest, settings_of_identity, weights_digest
from loops.shared.launcher import available_cpus
from loops.shared.run import RunConfig, one_sentence_errors
from loops.shared.run_folder import claim_folder
from loops.shared.weights import WrongLogits

HOUSE = Path(__file__).resolve().parents[2]
LOOPS = {"sft": sft, "dpo": dpo, "grpo": grpo}
BATCH = {"sft": 16, "dpo": 8, "grpo": 16}
BFD, BEST_FIT = (["--packing_strategy", name, "--max_tokens_per_batch", "512"] for name in ("bfd", "best_fit"))


def first_token_is_even(*, completion_ids, **_):
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


calls = []


def fails_in_the_second_step(*, completions, completion_ids, **_):
    """The evaluation before training is the first call."""
    calls.append(1)
    if len(calls) == 3:
        raise KeyError("just once")
    return first_token_is_even(completion_ids=completion_ids)


def every_other(*, completions, **_):
    """Does not apply to every second completion."""
    return [None if i % 2 else 1.0 for i in range(len(completions))]


def run(loop: str, output_dir: Path, *options: str) -> list[dict]:
    """Run a loop's main in this process on its shipped config, cut short; returns the rows of metrics.jsonl."""
    AcceleratorState._reset_state(True)
    common = ["--config", f"configs/{loop}.yaml", "--output_dir", str(output_dir), "--max_completion_length", "8"]
    common += ["--per_device_train_batch_size", str(BATCH[loop]), "--max_eval_samples", "12", "--warmup_steps", "1"]
    if loop == "grpo" and "--reward_functions" not in options:  # one that random weights earn half of the time
        common += ["--reward_functions", "tests.loops.test_runs:first_token_is_even", "--reward_weights", "1"]
    if loop == "dpo":  # the reference scores all of them first
        common += ["--max_train_samples", "96"]
    if loop != "sft":
        common += ["--model_id", "data/quickstart/scratch", "--from_scratch"]
    threads = torch.get_num_threads()
    LOOPS[loop].main(load_config(LOOPS[loop].Config, [*common, *options], prog=loop))
    torch.set_num_threads(threads)
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def from_the_house(monkeypatch):
    monkeypatch.chdir(HOUSE)  # the shipped configs name their files from there


def test_the_pipeline_runs_and_each_loop_reads_what_the_last_one_wrote(tmp_path):
    folder = None
    for loop, loss in (("sft", "loss/sft"), ("dpo", "loss/dpo"), ("grpo", "loss/policy")):
        previous = ["--model_id", str(folder / "model"), "--from_scratch", "false"] if folder else []
        folder = tmp_path / loop
        rows = run(loop, folder, "--max_steps", "3", "--learning_rate", "1e-3", *previous)
        assert [row["step"] for row in rows] == [0, 1, 2, 3]
        assert all({loss, "time/step", "tokens/computed", "optim/grad_norm"} <= row.keys() for row in rows[1:])
        assert "eval/accuracy" in rows[0] and "eval/loss" in rows[0] and "eval/accuracy" in rows[-1]
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "1 + 1 = ?"}], add_generation_prompt=True)
        assert model(torch.tensor([prompt["input_ids"]])).logits.isfinite().all()
        assert {"config.yaml", "provenance.json"} <= {p.name for p in folder.iterdir()}
    assert rows[1]["policy/mismatch_max"] < 1e-4  # sampler and trainer are the same weights


@pytest.mark.parametrize(("loop", "more"), [*((loop, []) for loop in LOOPS), ("sft", BEST_FIT)])
def test_a_resumed_run_ends_in_the_same_bytes(loop, more, tmp_path):
    """Five steps in one go; three, a checkpoint, a new start, two more. Dropout on, LoRA, so that every RNG counts."""
    lora = [] if loop == "sft" else ["--lora_r", "4", "--lora_dropout", "0.2", "--merge_weights"]
    options = ["--eval_reward", "exact_answer", "--lr_scheduler_type", "constant", "--save_steps", "3", *lora, *more]
    run(loop, tmp_path / "whole", "--max_steps", "5", *options)
    run(loop, tmp_path / "parts", "--max_steps", "3", *options)
    rows = run(loop, tmp_path / "parts", "--max_steps", "5", "--resume_from", "latest", *options)
    assert all(row["optim/grad_norm"] > 0 for row in rows[1:])
    whole, parts = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]


def test_running_with_the_resolved_config_reproduces_the_run(tmp_path):
    first = run("sft", tmp_path / "a", "--max_steps", "2")
    AcceleratorState._reset_state(True)
    config = load_config(
        sft.Config, ["--config", str(tmp_path / "a/config.yaml"), "--output_dir", str(tmp_path / "b")], prog="sft"
    )
    sft.main(config)
    rows = [json.loads(line) for line in (tmp_path / "b/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss/sft"] == first[-1]["loss/sft"]
    name = "model/model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("loop", LOOPS)
def test_qlora_trains_in_every_loop(loop, tmp_path):
    """Real bitsandbytes: a 4-bit base, adapters exported, the base untouched."""
    pytest.importorskip("bitsandbytes")
    run("sft", tmp_path / "base", "--max_steps", "1")
    model = ["--model_id", str(tmp_path / "base/model"), "--from_scratch", "false"]
    rows = run(loop, tmp_path / loop, *model, "--max_steps", "2", "--lora_r", "4", "--load_in_4bit")
    assert all(row["optim/grad_norm"] > 0 for row in rows[1:])
    adapter = load_file(tmp_path / loop / "model/adapter_model.safetensors")
    assert len(adapter) == 4 * 7 * 2  # layers x linear maps x (A, B)


def test_a_reward_that_raises_counts_as_missing_and_all_missing_ends_the_run(tmp_path, monkeypatch):
    """Greedy evaluation sends 12 completions, a step 16: this reward fails in training, for all rows. The other one
    does not apply to half of the rows, which are missing and not zero."""
    (tmp_path / "mine.py").write_text(
        "def small(*, completions, **_):\n    if len(completions) > 12: raise KeyError('no such thing')\n"
        "    return [1.0] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="no such thing"):
        run("grpo", tmp_path / "a", "--max_steps", "1", "--reward_functions", "mine:small")
    with pytest.warns(UserWarning, match="just once"):
        once = ["--reward_functions", "tests.loops.test_runs:fails_in_the_second_step"]
        rows = run("grpo", tmp_path / "c", "--max_steps", "3", *once)
    name = "reward/fails_in_the_second_step/failed"
    assert [row[name] for row in rows[1:]] == [0, 16, 0] and "reward/mean" not in rows[2]
    rows = run("grpo", tmp_path / "b", "--max_steps", "2", "--reward_functions", "tests.loops.test_runs:every_other")
    assert rows[1]["reward/every_other/missing"] == 8 and rows[1]["reward/mean"] == 1.0


def launch(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=HOUSE, capture_output=True, text=True)


def test_bad_input_is_one_sentence_and_exit_code_2_and_writes_nothing(tmp_path):
    base = ["loops/grpo.py", "--config", "configs/grpo.yaml", "--output_dir", str(tmp_path / "run")]
    base += ["--model_id", "data/quickstart/scratch"]
    cases = [
        (["--larning_rate", "1"], "learning_rate"),
        (["--dataset_name", str(tmp_path / "none.jsonl")], "none.jsonl"),
        (["--model_id", str(tmp_path / "none")], "model_id"),
    ]
    for options, word in cases:
        done = launch(*base, *options)
        assert done.returncode == 2, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert word in last and "Traceback" not in done.stderr
        assert not (tmp_path / "run").exists()


def test_an_existing_run_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="output_dir"):
        run("sft", tmp_path, "--max_steps", "1")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_flat_args_yaml_of_a_sagemaker_project_runs_unchanged(loop, tmp_path, capfd):
    """The keys that such a file has, spelled as there, beside the data set; LoRA, merged at the end."""
    run("sft", tmp_path / "base", "--max_steps", "1")
    rows = {"sft": "sft_train", "dpo": "preferences_train", "grpo": "train"}[loop]
    (tmp_path / "args.yaml").write_text(
        f"""
model_id: "{tmp_path / "base/model"}"
dataset_name: data/quickstart/{rows}.jsonl
output_dir: "{tmp_path / "run"}"
mlflow_uri: ""
mlflow_experiment_name: ""
lora_r: 8
lora_alpha: 16
lora_dropout: 0.1
learning_rate: 2e-4
num_train_epochs: 1
max_steps: 2
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
gradient_checkpointing: true
bf16: true
tf32: true
merge_weights: true
temperature: 0.9
top_p: 0.9
max_completion_length: 8
fsdp: "full_shard auto_wrap offload"
fsdp_config:
  backward_prefetch: "backward_pre"
  cpu_ram_efficient_loading: true
  offload_params: true
  sync_module_states: true
  use_orig_params: false
"""
    )
    AcceleratorState._reset_state(True)
    LOOPS[loop].main(load_config(LOOPS[loop].Config, ["--config", str(tmp_path / "args.yaml")], prog=loop))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert "fsdp" in capfd.readouterr().out  # one process has nothing to shard, and the run says so


@pytest.mark.parametrize("precision", [["--mixed_precision", "bf16"], ["--torch_dtype", "bfloat16"]])
def test_bf16_trains_by_autocast_and_pure(precision, tmp_path):
    rows = run("sft", tmp_path, "--max_steps", "8", "--learning_rate", "3e-3", *precision)
    assert rows[-1]["loss/nll"] < rows[1]["loss/nll"] - 0.5


@pytest.mark.parametrize("strategy", ["step", pytest.param("best_fit", marks=pytest.mark.slow)])
def test_two_launched_processes_take_the_steps_of_one(strategy, tmp_path):
    """`accelerate launch` with two processes over gloo, against one: the same losses and gradient norms. Of the 40
    rows' bins a step takes two; the last step of an epoch has one, so a process has none."""
    options = ["--config", "configs/sft.yaml", "--max_steps", "3", "--eval_reward", "null", "--max_eval_samples", "8"]
    if strategy == "best_fit":
        options += [*BEST_FIT, "--max_train_samples", "40", "--train_batch_size", "2"]
    both = {}
    for processes in (1, 2):
        topology = ["--config_file", "launch/cpu_ddp.yaml"] if processes == 2 else []
        launcher = ["-m", "accelerate.commands.launch", *topology, "loops/sft.py"]
        size = ["--per_device_train_batch_size", str(16 // processes), "--output_dir", str(tmp_path / str(processes))]
        done = launch(*launcher, *options, *size)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("packing_strategy: best_fit, 40 rows in 3 bins of 512 tokens" in done.stdout) == (strategy != "step")
        text = (tmp_path / str(processes) / "metrics.jsonl").read_text()
        both[processes] = [json.loads(line) for line in text.splitlines()]
    for one, two in zip(both[1], both[2], strict=True):
        for name in ("loss/sft", "optim/grad_norm", "eval/loss", "tokens/loss"):
            if name in one:
                assert two[name] == pytest.approx(one[name], rel=1e-4), (name, one["step"])


def test_a_step_of_all_bins_is_the_padded_step_of_all_rows(tmp_path):
    """40 rows, in three bins or as they are: the same losses and gradient norms."""
    options = ["--max_steps", "2", "--eval_reward", "null", "--max_train_samples", "40", "--train_batch_size"]
    bins = run("sft", tmp_path / "bins", *options, "3", *BEST_FIT)
    rows = run("sft", tmp_path / "rows", *options, "40", "--packing", "false")
    for one, two in zip(bins[1:], rows[1:], strict=True):
        assert one["tokens/loss"] == two["tokens/loss"]
        for name in ("loss/sft", "optim/grad_norm"):
            assert one[name] == pytest.approx(two[name], rel=1e-4), (name, one["step"])


def test_reference_scores_computed_once_are_those_of_every_step(tmp_path):
    """The same run with the reference scored before training and in every step; then a stale file is refused."""
    rows = {}
    for flag in ("true", "false"):
        options = ["--max_steps", "3", "--precompute_ref_log_probs", flag, "--max_train_samples", "32"]
        options += ["--save_steps", "3"]
        rows[flag] = run("dpo", tmp_path / flag, *options)
    for once, each in zip(rows["true"], rows["false"], strict=True):
        for name in {"loss/dpo", "reward/margin", "eval/loss"} & once.keys():
            assert once[name] == pytest.approx(each[name], abs=2e-5)
    file = tmp_path / "true/reference_train.pt"
    known = torch.load(file, weights_only=True)
    torch.save({**known, "logps": known["logps"] + 1}, file)
    with pytest.raises(ValueError, match="reference_train.pt"):
        run("dpo", tmp_path / "true", "--max_steps", "4", "--max_train_samples", "32", "--resume_from", "latest")


@pytest.mark.parametrize("loop", LOOPS)
def test_lora_can_be_asked_for_over_any_shipped_config(loop, tmp_path):
    """Also from random weights, whose base is kept nowhere but in the export: merged then, without being asked."""
    rows = run(loop, tmp_path, "--max_steps", "1", "--lora_r", "4", "--learning_rate", "1e-6")
    assert rows[1]["optim/learning_rate"] <= 1e-6  # the shipped floor does not stand in the way
    assert (tmp_path / "model/model.safetensors").exists()


def test_a_step_holds_whole_groups_whatever_the_micro_batch(tmp_path):
    """Micro-batches of 4 completions and groups of 8: one prompt a step, two micro-batches."""
    rows = run("grpo", tmp_path, "--max_steps", "1", "--per_device_train_batch_size", "4")
    assert rows[1]["rollout/completion_length"] <= 8 and rows[1]["tokens/completions"] <= 8 * 8


@pytest.mark.parametrize(
    ("loop", "options", "word"),
    [
        ("sft", ["--loss_type", "nonsense"], "nonsense"),
        ("dpo", ["--beta", "0"], "beta"),
        ("dpo", ["--label_smoothing", "0.7"], "label_smoothing"),
        ("grpo", ["--kl_estimator", "k9"], "kl_estimator"),
        ("grpo", ["--scale_rewards", "foo"], "scale"),
        ("grpo", ["--delta", "0.5"], "delta"),
        ("grpo", ["--engine", "vllm"], "engine"),
        ("sft", ["--report_to", "foo"], "foo"),
        ("sft", ["--lora_r", "4", "--lora_target_modules", "nope"], "nope"),
        ("sft", ["--packing", "false", "--max_tokens_per_batch", "64"], "max_tokens_per_batch"),
        ("sft", ["--packing", "false", "--compile"], "packing"),
        ("sft", ["--packing_strategy", "bfd"], "max_tokens_per_batch above 0"),
        ("dpo", BFD, "packing_strategy: bfd is for SFT"),
        ("grpo", BEST_FIT, "packing_strategy: best_fit is for SFT"),
    ],
)
def test_values_that_cannot_work_are_refused_before_anything_is_written(loop, options, word, tmp_path, capsys):
    with pytest.raises((ValueError, SystemExit)) as caught:
        run(loop, tmp_path / "run", "--max_steps", "1", *options)
    assert word in str(caught.value) + capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_launchers_accumulation_is_refused(tmp_path, monkeypatch):
    """accelerate would divide our gradients by it."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        run("sft", tmp_path / "run", "--max_steps", "1")


def test_a_diverged_run_exports_nothing(tmp_path):
    settings = ["--learning_rate", "1e30", "--max_grad_norm", "0", "--lr_scheduler_type", "constant"]
    with pytest.raises(FloatingPointError, match=r"step 2: the gradient's norm is nan.* rows: rank 0: \d+, "):
        run("sft", tmp_path, "--max_steps", "6", "--eval_reward", "null", *settings)
    assert not (tmp_path / "model").exists()


def test_a_run_whose_export_is_not_its_policy_does_not_call_it_its_model(tmp_path, monkeypatch):
    """The untrained base instead of what was written: no model/, and the sentence says where the files are."""
    wrong = AutoModelForCausalLM.from_pretrained("data/quickstart/model").eval()
    monkeypatch.setattr("loops.shared.weights.reload_folder", lambda *_, **__: wrong)
    model = ["--model_id", "data/quickstart/model", "--from_scratch", "false", "--lora_r", "4", "--merge_weights"]
    with pytest.raises(WrongLogits, match="not the trained one: logits of 32 tokens.* is left in .*tmp-model"):
        run("sft", tmp_path, "--max_steps", "1", "--learning_rate", "1e-2", "--eval_reward", "null", *model)
    assert not (tmp_path / "model").exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    """Its step would mean other rows: another loop, seed or number of rows; and another run's folder stays whole."""
    run("sft", tmp_path / "a", "--max_steps", "1", "--save_steps", "1")
    again = ["--max_steps", "2", "--resume_from", "latest"]
    for options in (["--seed", "7"], ["--max_train_samples", "64"]):
        with pytest.raises(ValueError, match="of another run"):
            run("sft", tmp_path / "a", *again, *options)
    checkpoint = next((tmp_path / "a/checkpoints").iterdir())
    (tmp_path / "b").mkdir()
    (tmp_path / "b/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="output_dir"):
        run("sft", tmp_path / "b", "--max_steps", "2", "--resume_from", str(checkpoint))


def test_a_checkpoint_of_other_bins_is_refused(tmp_path):
    """Whichever side has them, and of another size; one of before there were bins is of single rows."""
    run("sft", tmp_path / "bins", "--max_steps", "1", "--save_steps", "1", *BFD)
    run("sft", tmp_path / "rows", "--max_steps", "1", "--save_steps", "1")
    again = ["--max_steps", "2", "--resume_from", "latest"]
    for name, options, words in (
        ("bins", [], "packing_strategy bfd, 3072 rows in .* 512 tokens, .* and this run step: it is of another run"),
        ("bins", [*BFD[:3], "600"], "packing_strategy bfd, .* 512 tokens, .* and this run bfd, .* 600 tokens, "),
        ("bins", BEST_FIT, "packing_strategy bfd, .* and this run best_fit, "),
        ("rows", BFD, "packing_strategy step and this run bfd, "),
    ):
        with pytest.raises(ValueError, match=words):
            run("sft", tmp_path / name, *again, *options)
    (checkpoint,) = (tmp_path / "rows/checkpoints").iterdir()
    state, manifest = (json.loads((checkpoint / name).read_text()) for name in (STATE, MANIFEST))
    del state["packing_strategy"]
    (checkpoint / STATE).write_text(json.dumps(state))
    manifest["files"][STATE] = [(checkpoint / STATE).stat().st_size, checksum(checkpoint / STATE)]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    assert len(run("sft", tmp_path / "rows", *again)) == 3


def test_state_space_models_train_but_are_not_sampled_from(tmp_path):
    """Their state is not in past_key_values, so the engine would draw each token from the last one alone."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    shape = MambaConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=2, pad_token_id=0
    )
    MambaForCausalLM(shape).save_pretrained(tmp_path / "mamba")
    AutoTokenizer.from_pretrained("data/quickstart/scratch").save_pretrained(tmp_path / "mamba")
    model = ["--model_id", str(tmp_path / "mamba"), "--from_scratch", "false", "--max_steps", "1"]
    rows = run("sft", tmp_path / "sft", *model, "--eval_reward", "null")
    assert rows[1]["optim/grad_norm"] > 0
    with pytest.raises(ValueError, match="past_key_values"):
        run("grpo", tmp_path / "grpo", *model)


def test_a_run_killed_before_its_first_checkpoint_starts_anew_and_one_without_a_whole_one_does_not(tmp_path):
    """What a first save left half written is nothing to go on from; a torn checkpoint is something to ask about."""
    half = tmp_path / "run" / "checkpoints" / ".tmp-full-epoch00-step000001"
    half.mkdir(parents=True)
    assert len(run("sft", tmp_path / "run", "--max_steps", "1", "--resume_from", "latest")) == 2
    torn = tmp_path / "torn" / "checkpoints" / "full-epoch00-step000001"
    torn.mkdir(parents=True)
    with pytest.raises(ValueError, match="none is complete"):
        run("sft", tmp_path / "torn", "--max_steps", "1", "--resume_from", "latest")


# What belongs to a run: its folder, its rows, its settings

TINY = ["--max_train_samples", "32", "--eval_reward", "null", "--max_eval_samples", "2"]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Contents of all files but the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".claim"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_latest_without_a_checkpoint_overwrites_nothing_that_is_not_a_start_of_this_run(tmp_path):
    """A finished run, a folder that was never a run, and a run that ended before its first checkpoint."""
    again = ["--max_steps", "1", "--resume_from", "latest", *TINY]
    run("sft", tmp_path / "run", *again)
    (tmp_path / "foreign/model").mkdir(parents=True)
    (tmp_path / "foreign/model/weights").write_text("mine")
    for name in ("run", "foreign"):
        before = snapshot(tmp_path / name)
        with pytest.raises(ValueError, match="no checkpoint to resume from.*output_dir"):
            run("sft", tmp_path / name, *again, "--learning_rate", "1e-4")
        assert snapshot(tmp_path / name) == before
    for path in (tmp_path / "run/model").iterdir():
        path.unlink()
    (tmp_path / "run/model").rmdir()  # as if it had been killed
    with pytest.raises(ValueError, match="seed 42 and this run 7"):
        run("sft", tmp_path / "run", *again, "--seed", "7")
    assert len(run("sft", tmp_path / "run", *again)) == 2


def test_a_refused_resume_changes_nothing_and_a_finished_one_is_left_alone(tmp_path, capfd):
    """Refused for a checkpoint that is further than the settings say, for other contents, and for other parameters,
    which only the loading sees; with no step left nothing is written, and what the user put beside the export stays."""
    options = ["--save_steps", "1", "--save_total_limit", "0", *TINY]
    run("sft", tmp_path, "--max_steps", "2", *options)
    (tmp_path / "model/notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    first = str(next((tmp_path / "checkpoints").glob("*1")))
    for more, words in (
        (["--resume_from", "latest", "--max_steps", "1"], "beyond this run's 1"),
        (["--resume_from", first, "--max_steps", "3", "--loss_type", "dft"], "loss_type nll and this run dft"),
        (["--resume_from", first, "--max_steps", "3", "--optimizer", "adamw_torch_8bit"], "another optimizer"),
    ):
        with pytest.raises(ValueError, match=words):
            run("sft", tmp_path, *options, *more)
        assert snapshot(tmp_path) == before
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        run("sft", tmp_path, *options, "--max_steps", "2", "--resume_from", "latest", "--logging_steps", "2")
    assert ended.value.code == 0 and "nothing was done" in capfd.readouterr().out and snapshot(tmp_path) == before
    run("sft", tmp_path, *options, "--max_steps", "3", "--resume_from", "latest", "--weight_decay", "0.5")
    said = capfd.readouterr().out
    assert "steps in total 2 -> 3" in said and "weight_decay 0.0 -> 0.5" in said and "from step 3 on" in said
    assert (tmp_path / "model/notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "model/run.json").read_text())["step"] == 3


def test_rows_and_base_are_compared_by_content(tmp_path):
    """The same number of other rows is another run, other weights in the same folder too; the same rows in another
    file are not, nor is a setting that costs only memory."""
    lines = (HOUSE / "data/quickstart/sft_train.jsonl").read_text().splitlines()[:8]
    for name, text in (("a", lines), ("same", lines), ("other", [*lines[:-1], lines[0]])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(text) + "\n")
    base = ["--model_id", str(tmp_path / "base"), "--from_scratch", "false", "--lora_r", "4", "--save_steps", "1"]
    model = AutoModelForCausalLM.from_pretrained("data/quickstart/model")
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained("data/quickstart/model").save_pretrained(tmp_path / "base")

    def train(rows: str, *more: str) -> list[dict]:
        return run("sft", tmp_path / "run", *base, "--dataset_name", str(tmp_path / f"{rows}.jsonl"), *more)

    train("a", "--max_steps", "1", "--eval_reward", "null")
    again = ["--max_steps", "2", "--eval_reward", "null", "--resume_from", "latest"]
    with pytest.raises(ValueError, match="dataset_name .*a.jsonl and this run .*other.jsonl.*: it is of another run"):
        train("other", *again)
    with pytest.raises(ValueError, match="lora_alpha 64.0 and this run 8.0: it is of another run"):
        train("a", *again, "--lora_alpha", "8")
    with torch.no_grad():
        model.get_input_embeddings().weight += 1
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="other weights .* in model_id .*base"):
        train("a", *again)
    with torch.no_grad():
        model.get_input_embeddings().weight -= 1
    model = AutoModelForCausalLM.from_pretrained("data/quickstart/model")
    model.save_pretrained(tmp_path / "base")
    assert len(train("same", *again, "--gradient_checkpointing", "true")) == 2


@pytest.mark.parametrize(
    ("loop", "change", "other"),
    [
        ("sft", {"loss_type": "dft"}, True),
        ("sft", {"eval_reward": "exact_answer"}, False),
        ("dpo", {"beta": 0.5}, True),
        ("dpo", {"precompute_ref_log_probs": False}, False),
        ("grpo", {"scale_rewards": "none"}, True),
        ("grpo", {"reward": {"reward_functions": "format"}}, True),
        ("grpo", {"rollout": {"temperature": 0.5}}, True),
        ("grpo", {"rollout": {"max_decode_batch": 4}}, False),
        ("dpo", {"rollout": {"temperature": 0.5}}, False),  # evaluates alone
        ("sft", {"model": {"use_rslora": True}}, True),
        ("sft", {"model": {"load_in_4bit": True}}, True),
        ("sft", {"model": {"activation_offloading": True}}, False),
        ("sft", {"optim": {"weight_decay": 0.5}}, False),
        ("sft", {"batch": {"packing": False}}, False),
        ("sft", {"run": {"logging_steps": 5}}, False),
    ],
)
def test_settings_that_decide_the_result_make_another_run_and_others_do_not(loop, change, other):
    config = LOOPS[loop].Config()
    new = {k: replace(getattr(config, k), **v) if isinstance(v, dict) else v for k, v in change.items()}
    before, after = (settings_of_identity(asdict(one)) for one in (config, replace(config, **new)))
    (key,) = change.keys() if not isinstance(change[next(iter(change))], dict) else next(iter(change.values()))
    try:
        refuse_other_run("x", before, {"loop": loop, **after})
    except ValueError as error:
        assert other and f"{key} " in str(error)
    else:
        assert not other


def test_another_number_of_rows_a_step_is_told_with_the_setting_that_keeps_it():
    settings = settings_of_identity(asdict(sft.Config()))
    with pytest.raises(ValueError, match="rows_per_step 64 and this run 32.*set train_batch_size: 64 to go on"):
        refuse_other_run("x", {"rows_per_step": 64, **settings}, {"loop": "sft", "rows_per_step": 32, **settings})


def test_digests_see_order_targets_columns_and_weights():
    rows = [Example([1, 2], [False, True], 1), Example([3], [True], 2)]
    digests = [rows, rows[::-1], [replace(rows[0], is_target=[True, True]), rows[1]], [Example([1], [False]), rows[1]]]
    assert len({rows_digest(one) for one in digests}) == 4
    assert rows_digest(rows) == rows_digest([replace(row, number=9) for row in rows])
    prompt = Prompt([1], "one", {"answer": "1", "other": None})
    assert rows_digest([prompt]) != rows_digest([replace(prompt, columns={"answer": "2", "other": None})])
    model = AutoModelForCausalLM.from_pretrained("data/quickstart/model")
    before = [weights_digest(model, values) for values in (True, False)]
    with torch.no_grad():
        model.lm_head.weight += 1
    after = [weights_digest(model, values) for values in (True, False)]
    assert before[0] != after[0] and before[1] == after[1]
    model.config.rms_norm_eps *= 2
    assert weights_digest(model, False) != after[1]


CLAIM = "import sys, time; from loops.shared.run_folder import claim_folder; from pathlib import Path\n"
CLAIM += "print(claim_folder(Path(sys.argv[1])) is not None, flush=True); time.sleep(float(sys.argv[2]))"


def test_a_folder_is_claimed_by_one_process_until_it_ends(tmp_path):
    """Whether the folder is there yet or not; a process that is killed gives it back."""
    for folder in (tmp_path, tmp_path / "not/there"):
        words = [sys.executable, "-c", CLAIM, str(folder)]
        holder = subprocess.Popen([*words, "100"], cwd=HOUSE, stdout=subprocess.PIPE, text=True)
        assert holder.stdout.readline() == "True\n"
        assert claim_folder(folder) is None
        holder.kill()
        holder.wait()
        assert subprocess.run([*words, "0"], cwd=HOUSE, capture_output=True, text=True).stdout == "True\n"
    assert {path.name[:6] for path in tmp_path.iterdir()} <= {".claim"}


def test_two_runs_of_one_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda *_: "20260101-000000")
    for _ in range(2):
        AcceleratorState._reset_state(True)
        options = ["--config", "configs/sft.yaml", "--results_dir", str(tmp_path), "--max_steps", "1", *TINY]
        sft.main(load_config(sft.Config, options, prog="sft"))
    names = [path.parent.name for path in sorted(tmp_path.rglob("metrics.jsonl"))]
    assert sorted(names) == ["sft-20260101-000000", "sft-20260101-000000-2"]


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_read(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/run", tmp_path / ("n" * 300)):
        with pytest.raises(ValueError, match="output_dir .* cannot be written"):
            run("sft", folder, "--max_steps", "1")
    assert "trains" not in capfd.readouterr().out


def test_latest_passes_over_an_altered_checkpoint(tmp_path, capfd):
    """Steps 1, 2 and 3 are saved and 2, 3 kept; a bit of the third's tensors turns: 2 is resumed."""
    run("sft", tmp_path / "run", "--max_steps", "3", "--save_steps", "1", *TINY)
    newest = max((tmp_path / "run/checkpoints").iterdir())
    data = bytearray((newest / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "__0_0.distcp").write_bytes(data)
    shutil.rmtree(tmp_path / "run/model")
    AcceleratorState._reset_state(True)
    rows = run("sft", tmp_path / "run", "--max_steps", "3", "--save_steps", "1", *TINY, "--resume_from", "latest")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    said = capfd.readouterr().out
    assert f"skipped: {newest} is not a complete checkpoint: __0_0.distcp was altered" in said
    assert "step000002\n" in said


@pytest.mark.parametrize("phase", ["a step", "the batches of the first step", "the first evaluation"])
def test_an_error_in_a_step_keeps_its_traceback_and_one_before_is_a_sentence(phase, tmp_path, monkeypatch, capsys):
    """A ValueError of our own: the run's phase decides, not the functions that it came through."""
    in_a_step = phase != "the first evaluation"
    rows = ["--dataset_name", "data/quickstart/sft_train.jsonl"] if in_a_step else ["--max_eval_samples", "4"]
    options = ["--config", "configs/sft.yaml", "--output_dir", str(tmp_path / "run"), "--max_steps", "1", *rows]
    config = load_config(sft.Config, [*options, "--eval_reward", "null"], prog="sft")
    place = (sft.pack, "pack_examples") if phase == "the batches of the first step" else (sft, "sft_loss")
    monkeypatch.setattr(*place, lambda *_, **__: RunConfig(seed=-1))
    ends = ValueError if in_a_step else SystemExit
    with pytest.raises(ends) as ended, one_sentence_errors("loops/sft.py"):
        sft.main(config)
    assert in_a_step or (ended.value.code == 2 and "seed is -1" in capsys.readouterr().err)


@pytest.mark.parametrize("leave", [exit, sys.exit])
def test_user_code_that_exits_is_no_success(leave, capsys):
    with pytest.raises(SystemExit) as ended, one_sentence_errors("loops/sft.py"):
        leave()
    assert ended.value.code == 1 and "exit()" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended, one_sentence_errors("loops/sft.py"):
        load_config(sft.Config, ["--print_config"], prog="sft")
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed_precision is fp16 in the launcher"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend"),
    ],
)
def test_what_the_launcher_sets_against_the_loop_is_refused(name, value, word, tmp_path, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=word):
        run("sft", tmp_path / "run", "--max_steps", "1")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"save_best": "eval_loss", "save_steps": 1}, "eval/loss"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings, word):
    with pytest.raises(ValueError, match=word):
        RunConfig(**settings)


def test_a_best_checkpoint_needs_evaluations_that_measure_it(tmp_path):
    options = ["--max_steps", "1", "--save_steps", "1", "--save_best"]
    with pytest.raises(ValueError, match="no evaluation rows: set eval_dataset_name"):
        run("sft", tmp_path / "a", *options, "eval/loss", "--dataset_name", "data/quickstart/sft_train.jsonl")
    with pytest.raises(ValueError, match="eval/los, which evaluations do not measure: there are .*eval/loss"):
        run("sft", tmp_path / "b", *options, "eval/los", *TINY)


def test_a_containers_quota_bounds_the_threads(tmp_path):
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert available_cpus(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    free = available_cpus(tmp_path)
    (tmp_path / "cpu.max").unlink()
    assert free == available_cpus(tmp_path)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("150000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert available_cpus(tmp_path) == 1


@pytest.mark.parametrize(("engine", "loop", "reward", "set_"), [
    ("vllm", "grpo", "exact_answer", False),
    ("transformers", "grpo", "exact_answer", True),
    ("vllm-server", "grpo", "exact_answer", True),
    ("vllm", "sft", "exact_answer", False),
    ("vllm", "sft", None, True),
])  # fmt: skip
def test_an_allocator_that_vllms_sleep_cannot_use_is_not_set_beside_it(engine, loop, reward, set_, monkeypatch):
    asked = []

    def start_run(*_, expandable_segments, **__):
        asked.append(expandable_segments)
        raise InterruptedError

    monkeypatch.setattr(LOOPS[loop], "start_run", start_run)
    words = ["--config", f"configs/{loop}.yaml", "--engine", engine, "--eval_reward", reward or "null"]
    with pytest.raises(InterruptedError):
        LOOPS[loop].main(load_config(LOOPS[loop].Config, words, prog=loop))
    assert asked == [set_]


def test_threads_that_the_user_chose_stay(tmp_path):
    """With OMP_NUM_THREADS=1 a run on one process has one thread, whatever the machine has."""
    words = ["loops/sft.py", "--config", "configs/sft.yaml", "--max_steps", "1", *TINY, "--output_dir", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=HOUSE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "provenance.json").read_text())["threads"] == 1


def test_a_reward_of_the_same_name_and_other_code_is_told_on_resume(tmp_path, capfd):
    name = f"reward_{os.getpid()}"
    file, folder = tmp_path / f"{name}.py", tmp_path / "run"
    options = ["--save_steps", "1", "--reward_functions", f"{name}:score", "--max_completion_length", "4"]
    words = ["-m", "loops.grpo", "--config", "configs/grpo.yaml", "--output_dir", str(folder), *options, *TINY]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(HOUSE)])}
    for steps, resume, body in (("1", "none", "[1.0] * len(completions)"), ("2", "latest", "[0.0] * len(completions)")):
        file.write_text(f"def score(*, completions, **_):\n    return {body}\n")
        more = ["--max_steps", steps, "--resume_from", resume]
        done = subprocess.run(
            [sys.executable, *words, *more], cwd=HOUSE, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert f"changed: steps in total 1 -> 2, code of {name}:score " in done.stdout


def test_other_evaluation_rows_are_told_on_resume(tmp_path, capfd):
    options = ["--save_steps", "1", *TINY]
    run("sft", tmp_path, "--max_steps", "1", *options)
    run("sft", tmp_path, "--max_steps", "2", *options, "--eval_split_ratio", "0", "--resume_from", "latest")
    assert "eval_" not in capfd.readouterr().out.partition("changed: ")[2].partition("\n")[0]
    data = "data/quickstart/sft_train.jsonl"
    run("sft", tmp_path, "--max_steps", "3", *options, "--eval_dataset_name", data, "--resume_from", "latest")
    assert f"-> {data}" in capfd.readouterr().out
