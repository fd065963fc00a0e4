"""The loops from end to end on the quickstart's rows: they run, resume to the same bytes, export, refuse bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.loader import load_config
from loops import dpo, grpo, sft
from loops.shared.checkpoint_folder import MANIFEST, STATE, checksum
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
    if loop == "grpo":  # a reward that random weights earn half of the time
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
    return subprocess.run([sys.executable, *words], cwd=HOUSE, capture_output=True, text=True, timeout=120)


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


@pytest.mark.parametrize("strategy", ["step", "best_fit"])
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
    with pytest.raises(ValueError, match="none is whole"):
        run("sft", tmp_path / "torn", "--max_steps", "1", "--resume_from", "latest")
