"""The layers of a config: what is understood, what wins, what is refused and how."""

from __future__ import annotations

import importlib
import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from configs.loader import dump_config, find_leaves, flat_values, format_help, load_config
from configs.spellings import COMPUTED, NOTES, REFUSED, RENAMED
from loops import sft


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The model."""

    model_id: str = "tiny"
    """Folder or hub id; about 50 % of the memory."""
    revision: str | None = None
    """Hub revision."""
    lora_r: int = 32
    """LoRA rank."""
    lora_target_modules: str | list[str] = "all-linear"
    """Module names."""
    load_in_4bit: bool = False
    """Quantise."""
    torch_dtype: str = "auto"
    """Of the weights."""

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.lora_r == 0:
            raise ValueError("load_in_4bit needs lora_r above 0.")


@dataclass(frozen=True, kw_only=True)
class OptimSection:
    """The optimizer."""

    optimizer: str = "adamw_torch"
    """Its name."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    warmup_steps: int = 0
    """Steps of warm-up."""
    warmup_ratio: float = 0.0
    """The same, as a part of all steps."""
    max_grad_norm: float = 1.0
    """Clipping."""


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """The rows."""

    dataset_name: str = "quickstart"
    """Rows for training."""
    dataset_config: str | None = None
    """Hub subset."""
    dataset_split: str = "train"
    """Split."""
    eval_dataset_name: str | None = "quickstart-eval"
    """Rows for evaluation."""
    eval_split_ratio: float = 0.0
    """Part held out."""
    max_eval_samples: int = 0
    """Evaluation rows."""
    field_mapping: dict[str, str] = field(default_factory=dict)
    """Names to columns."""
    input_template: str | None = None
    """Prompt."""
    output_template: str | None = None
    """Completion."""


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """The run."""

    report_to: str | list[str] = "none"
    """Trackers."""
    logging_steps: int = 1
    """Steps."""
    eval_steps: int = 0
    """Steps."""
    save_steps: int = 0
    """Steps."""
    mixed_precision: str = "auto"
    """no, bf16, auto."""
    fsdp: str | dict = field(default_factory=dict)
    """Sharding."""
    fsdp_config: dict = field(default_factory=dict)
    """More of it."""
    stop: list[str] = field(default_factory=list)
    """Strings."""
    weights: list[float] = field(default_factory=list)
    """Numbers."""
    max_seq_length: int = 2048
    """Tokens."""
    per_device_train_batch_size: int = 1
    """Rows."""
    gradient_accumulation_steps: int = 1
    """Micro-batches."""
    num_train_epochs: float = 1.0
    """Passes."""
    save_best: str | None = None
    """Metric."""
    save_total_limit: int = 2
    """Checkpoints."""
    resume_from: str = "none"
    """Checkpoint."""
    engine: str = "auto"
    """Sampler."""
    max_completion_length: int = 256
    """Tokens."""
    top_k: int = 0
    """Likeliest tokens; 0 is all."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A loop."""

    model: ModelSection = field(default_factory=ModelSection)
    optim: OptimSection = field(default_factory=lambda: OptimSection(warmup_steps=7))
    data: DataSection = field(default_factory=DataSection)
    run: RunSection = field(default_factory=RunSection)
    beta: float = 0.1
    """Weight of the KL."""
    epsilon_high: float | None = None
    """Upper clip."""
    eval_reward: str | None = None
    """Reward of the evaluation."""

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"beta is {self.beta}; give 0 or more.")


def load(*argv: str) -> Config:
    return load_config(Config, list(argv), prog="loop")


def values(*argv: str) -> dict:
    return flat_values(load(*argv))


def changed(*argv: str) -> dict:
    """The keys that differ from the defaults."""
    default = flat_values(Config())
    return {key: value for key, value in values(*argv).items() if value != default[key]}


def refused(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """The one sentence on stderr of a refused config."""
    with pytest.raises(SystemExit) as stop:
        load(*argv)
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == ""
    assert output.err.startswith("loop: ") and output.err.count("\n") == 1 and "Traceback" not in output.err
    return output.err


@pytest.fixture
def write(tmp_path):
    def write_file(content, name: str = "config.yaml") -> str:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return write_file


# Layers


def test_defaults_of_the_loop_win_over_those_of_a_section():
    assert load() == Config() and load().optim.warmup_steps == 7
    assert load("--learning_rate", "1").optim == OptimSection(learning_rate=1.0, warmup_steps=7)


def test_later_files_win_and_the_command_line_wins_over_all(write):
    first = write("lora_r: 1\nbeta: 1\nwarmup_steps: 1\n", "first.yaml")
    second = write("lora_r: 2\nbeta: 2\n", "second.yaml")
    expected = {"lora_r": 3, "beta": 2.0, "warmup_steps": 1}
    assert changed("--lora_r", "3", "--config", first, "--config", second) == expected
    assert changed("--config", first, second, "--lora_r", "3") == expected


@pytest.mark.parametrize(
    "argv",
    [
        "--learning_rate 3e-4",
        "--learning-rate 3e-4",
        "--learning_rate=3e-4",
        "--optim.learning_rate 3e-4",
        "--optim.learning-rate=3e-4",
    ],
)
def test_a_key_may_have_hyphens_an_equals_sign_and_its_section(argv):
    assert changed(*argv.split()) == {"learning_rate": 3e-4}


@pytest.mark.parametrize(
    "content",
    [
        "lora_r: 4\nlearning_rate: 1e-6\nbeta: 1\n",
        "model:\n  lora_r: 4\noptim: {learning-rate: 1e-6}\nbeta: 1\n",
        "model: {lora_r: 4}\nlearning-rate: 1e-6\nbeta: 1\noptim:\n",
        "model.lora_r: 4\noptim.learning_rate: 1e-6\nbeta: 1",
    ],
)
def test_flat_and_sectioned_and_mixed_yaml_mean_the_same(write, content):
    assert changed("--config", write(content)) == {"lora_r": 4, "learning_rate": 1e-6, "beta": 1.0}


def test_sagemaker_hyperparameters_file_holds_only_strings(write):
    """hyperparameters.json is `map<string, string>`; the toolkit's own keys are in it too."""
    file = write(
        {
            "learning-rate": "5e-5",
            "load_in_4bit": "true",
            "weights": "[1, 2]",
            "field_mapping": '{"a": "b"}',
            "revision": "null",
            "lora_target_modules": '["q_proj", "v_proj"]',
            "sagemaker_program": "train.py",
        },
        "hyperparameters.json",
    )
    assert changed("--config", file) == {
        "learning_rate": 5e-5,
        "load_in_4bit": True,
        "weights": [1.0, 2.0],
        "field_mapping": {"a": "b"},
        "lora_target_modules": ["q_proj", "v_proj"],
    }


# Values


@pytest.mark.parametrize("word", ["", "true", "True", "TRUE", "1", "yes", "on"])
def test_a_boolean_works_bare_and_with_a_value(word):
    assert changed("--load_in_4bit", *filter(None, [word])) == {"load_in_4bit": True}
    assert changed("--load_in_4bit", *filter(None, [word]), "--beta", "2") == {"load_in_4bit": True, "beta": 2.0}


@pytest.mark.parametrize("word", ["false", "False", "0", "no", "off"])
def test_a_boolean_can_be_switched_off_again(write, word):
    file = write("load_in_4bit: true")
    assert values("--config", file, f"--load_in_4bit={word}") == flat_values(Config())
    assert values("--config", file, write(f"load_in_4bit: {word}", "second.yaml")) == flat_values(Config())


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--beta", "-0.5e-3", "--beta", "2"], {"beta": 2.0}),  # the last one counts on the command line
        (["--lora_target_modules", "q_proj,v_proj"], {"lora_target_modules": "q_proj,v_proj"}),
        (["--lora_target_modules", "q_proj", "v_proj"], {"lora_target_modules": ["q_proj", "v_proj"]}),
        (["--lora_target_modules", "['q_proj', 'v_proj']"], {"lora_target_modules": ["q_proj", "v_proj"]}),
        (["--weights", "1,2e-3"], {"weights": [1.0, 2e-3]}),
        (["--weights", "[1, 2]"], {"weights": [1.0, 2.0]}),
        (["--weights", "1", "2"], {"weights": [1.0, 2.0]}),
        (["--stop", "a, b"], {"stop": ["a, b"]}),  # a comma may be part of a text
        (["--stop", '["a", "b"]'], {"stop": ["a", "b"]}),
        (["--epsilon_high", "0.28"], {"epsilon_high": 0.28}),
        (["--epsilon_high", "None"], {}),
        (["--eval_dataset_name", "null"], {"eval_dataset_name": None}),
        (["--revision", "123"], {"revision": "123"}),
        (["--field_mapping", '{"a": "b"}'], {"field_mapping": {"a": "b"}}),
        (["--field_mapping", "{'a': 'b'}"], {"field_mapping": {"a": "b"}}),
        (["--field_mapping", "{a: b, c: 'd e'}"], {"field_mapping": {"a": "b", "c": "d e"}}),
        (["--fsdp", "{reshard: true}"], {"fsdp": {"reshard": True}}),
        (["--fsdp_config", "{'a': None}"], {"fsdp_config": {"a": None}}),
        (["--field_mapping", "a=b,c=d"], {"field_mapping": {"a": "b", "c": "d"}}),
        (["--fsdp", "full_shard auto_wrap"], {"fsdp": "full_shard auto_wrap"}),
        (["--fsdp", '{"reshard": true}'], {"fsdp": {"reshard": True}}),
        (["--fsdp_config", "{'eps': 1e-6, 'on': True}"], {"fsdp_config": {"eps": 1e-6, "on": True}}),
        (["--fsdp_config", "eps=1e-6,on=True,name=pre"], {"fsdp_config": {"eps": 1e-6, "on": True, "name": "pre"}}),
    ],
)
def test_text_becomes_the_type_of_its_field(argv, expected):
    assert changed(*argv) == expected


@pytest.mark.parametrize("text", ["### Question:\n{q}", "{q}", "[1, 2]", "a: b", "- a", "", "'x'", "true", "1e-3", "#"])
def test_text_stays_text_where_text_is_asked(text):
    """YAML would read `### Question` as nothing and `[1, 2]` as a list."""
    assert changed("--input_template", text) == {"input_template": text}


def test_paths_are_read_as_a_shell_reads_them(monkeypatch, write, capsys):
    """In every key that names a folder or file of the loops, from a file and from the command line."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "/runs")
    monkeypatch.delenv("NOWHERE", raising=False)
    file = write("output_dir: ~/x\ndataset_name: $RUNS/rows.jsonl\n")
    words = ["--config", file, "--resume_from=~/x/checkpoints/a", "--model_id", "${RUNS}/model"]
    run = load_config(sft.Config, words, prog="loop")
    assert (run.run.output_dir, run.run.resume_from) == ("/home/me/x", "/home/me/x/checkpoints/a")
    assert (run.data.dataset_name, run.model.model_id) == ("/runs/rows.jsonl", "/runs/model")
    with pytest.raises(SystemExit):
        load_config(sft.Config, ["--output_dir", "$NOWHERE/x"], prog="loop")
    assert "`output_dir` is $NOWHERE/x, and $NOWHERE is not set" in capsys.readouterr().err


def test_yaml_words_and_numbers_are_those_of_yaml_1_2(write):
    file = write("mixed_precision: no\nlearning_rate: 1e-6\nrevision: 2024-01-01\nfsdp_config: {eps: 1e-8, pre: off}\n")
    assert changed("--config", file) == {
        "mixed_precision": "no",
        "learning_rate": 1e-6,
        "revision": "2024-01-01",
        "fsdp_config": {"eps": 1e-8, "pre": "off"},
    }


# Spellings

EXPECTED: dict[str, list[tuple[str, dict]]] = {
    "model_name": [("--model_name a/b", {"model_id": "a/b"})],
    "model_name_or_path": [("--model_name_or_path a/b", {"model_id": "a/b"})],
    "hf_model_id": [("--hf_model_id a/b", {"model_id": "a/b"})],
    "lora_rank": [("--lora-rank 4", {"lora_r": 4}), ("--model.lora_rank 4", {"lora_r": 4})],
    "max_length": [("--max_length 9", {"max_seq_length": 9})],
    "micro_batch_size": [("--micro_batch_size 2", {"per_device_train_batch_size": 2})],
    "accumulate_grad_batches": [("--accumulate_grad_batches 8", {"gradient_accumulation_steps": 8})],
    "max_learning_rate": [("--max_learning_rate 2e-5", {"learning_rate": 2e-5})],
    "log_every_n_steps": [("--log_every_n_steps 5", {"logging_steps": 5})],
    "train_dataset_path": [("--train_dataset_path d", {"dataset_name": "d"})],
    "val_dataset_path": [("--val_dataset_path d", {"eval_dataset_name": "d"})],
    "test_dataset_path": [("--test_dataset_path d", {"eval_dataset_name": "d"})],
    "hfdc_dataset_name": [("--hfdc_dataset_name d", {"dataset_name": "d"})],
    "hfdc_dataset_config": [("--hfdc_dataset_config main", {"dataset_config": "main"})],
    "hfdc_split": [("--hfdc_split test", {"dataset_split": "test"})],
    "hfdc_input_template": [("--hfdc_input_template Q:{q}", {"input_template": "Q:{q}"})],
    "hfdc_output_template": [("--hfdc_output_template A:{a}", {"output_template": "A:{a}"})],
    "hfdc_field_mapping": [('--hfdc_field_mapping {"a":"b"}', {"field_mapping": {"a": "b"}})],
    "hfdc_train_split_ratio": [("--hfdc_train_split_ratio 0.9", {"eval_split_ratio": 0.1})],
    "base_model": [("--base_model a/b", {"model_id": "a/b"})],
    "model_revision": [("--model_revision main", {"revision": "main"})],
    "dtype": [("--dtype bfloat16", {"torch_dtype": "bfloat16"})],
    "target_modules": [("--target_modules q_proj v_proj", {"lora_target_modules": ["q_proj", "v_proj"]})],
    "lr": [("--lr 2e-5", {"learning_rate": 2e-5})],
    "epochs": [("--epochs 3", {"num_train_epochs": 3.0})],
    "gradient_clipping": [("--gradient_clipping 0.5", {"max_grad_norm": 0.5})],
    "gradient_clip_val": [("--gradient_clip_val 0.5", {"max_grad_norm": 0.5})],
    "sequence_len": [("--sequence_len 9", {"max_seq_length": 9})],
    "model_max_length": [("--model_max_length 9", {"max_seq_length": 9})],
    "max_new_tokens": [("--max_new_tokens 9", {"max_completion_length": 9})],
    "use_peft": [("--use_peft --lora_r 8", {"lora_r": 8}), ("--use_peft false --lora_r 8", {"lora_r": 0})],
    "finetuning_type": [("--finetuning_type lora", {}), ("--finetuning_type full", {"lora_r": 0})],
    "use_vllm": [("--use_vllm", {"engine": "vllm"}), ("--use_vllm false", {"engine": "transformers"})],
    "val_set_size": [("--val_set_size 0.05", {"eval_split_ratio": 0.05}), ("--val_set_size 0", {})],
    "metric_for_best_model": [
        ("--metric_for_best_model eval_loss", {"save_best": "eval/loss"}),
        ("--metric_for_best_model accuracy", {"save_best": "eval/accuracy"}),
    ],
    "resume_from_checkpoint": [
        ("--resume_from_checkpoint", {"resume_from": "latest"}),
        ("--resume_from_checkpoint false", {}),
        ("--resume_from_checkpoint a/b", {"resume_from": "a/b"}),
    ],
    "fast_inference": [("--fast_inference", {"engine": "vllm"})],
    "dataset_text_field": [
        ("--dataset_text_field text", {}),
        ("--dataset_text_field body", {"field_mapping": {"text": "body"}}),
    ],
    "use_mxfp4": [("--use_mxfp4 false", {})],
    "early_stopping": [("--early_stopping false", {})],
    "init_lora_weights": [("--init_lora_weights true", {})],
    "lora_bias": [("--lora_bias none", {})],
    "push_to_hub": [("--push_to_hub false", {})],
    "sync_ref_model": [("--sync_ref_model false", {})],
    "overwrite_output_dir": [("--overwrite_output_dir false", {})],
    "load_best_model_at_end": [("--load_best_model_at_end false", {})],
    "full_ft": [
        ("--full_ft", {"lora_r": 0}),
        ("--full_ft --lora_r 8", {"lora_r": 0}),
        ("--full_ft false", {}),
        ("--lora_r 8 --full_ft false", {"lora_r": 8}),
    ],
    "use_wandb": [
        ("--use_wandb", {"report_to": ["wandb"]}),
        ("--use_wandb false", {}),
        ("--use_wandb --report_to mlflow,tensorboard", {"report_to": ["mlflow", "tensorboard", "wandb"]}),
        ("--use_wandb false --report_to mlflow,wandb", {"report_to": ["mlflow"]}),
    ],
    "bf16": [("--bf16", {"mixed_precision": "bf16"}), ("--bf16 false", {"mixed_precision": "no"})],
    "fp16": [("--fp16 false", {})],
    "eval_strategy": [
        ("--eval_strategy no --eval_steps 9", {}),
        ("--eval_strategy steps --eval_steps 9", {"eval_steps": 9}),
    ],
    "evaluation_strategy": [("--evaluation_strategy no --eval_steps 9", {})],
    "save_strategy": [
        ("--save_strategy no --save_steps 9", {}),
        ("--save_strategy steps --save_steps 9", {"save_steps": 9}),
    ],
    "data_dir": [("--data_dir d", {"dataset_name": "d"}), ("--data_dir d --dataset_name e", {"dataset_name": "e"})],
    "limit_val_batches": [("--limit_val_batches 50", {"max_eval_samples": 50}), ("--limit_val_batches 1.0", {})],
    "val_check_interval": [("--val_check_interval 50", {"eval_steps": 50})],
}
REFUSED_COMPUTED = {
    "fp16": "--fp16 true",
    "finetuning_type": "--finetuning_type freeze",
    "val_set_size": "--val_set_size 500",
    "use_mxfp4": "--use_mxfp4",
    "early_stopping": "--early_stopping",
    "init_lora_weights": "--init_lora_weights pissa",
    "lora_bias": "--lora_bias all",
    "push_to_hub": "--push_to_hub",
    "sync_ref_model": "--sync_ref_model",
    "overwrite_output_dir": "--overwrite_output_dir",
    "load_best_model_at_end": "--load_best_model_at_end",
    "eval_strategy": "--eval_strategy epoch",
    "evaluation_strategy": "--evaluation_strategy epoch",
    "save_strategy": "--save_strategy epoch",
    "limit_val_batches": "--limit_val_batches 0",
    "val_check_interval": "--val_check_interval 0.25",
    "num_nodes": "--num_nodes 2",
    "gpus_per_node": "--gpus_per_node 8",
}


@pytest.mark.parametrize(("argv", "expected"), [case for cases in EXPECTED.values() for case in cases])
def test_a_spelling_sets_our_key(argv, expected):
    assert changed(*argv.split()) == expected


def test_every_spelling_has_a_test():
    assert set(EXPECTED) | set(REFUSED_COMPUTED) >= set(COMPUTED)


def test_another_name_is_of_a_key_that_a_loop_has_and_of_no_key_itself():
    known = {
        key for loop in ("sft", "dpo", "grpo") for key in find_leaves(importlib.import_module(f"loops.{loop}").Config)
    }
    assert set(RENAMED.values()) <= known and not known & set(RENAMED)
    assert not set(RENAMED) & (set(COMPUTED) | set(REFUSED) | set(NOTES)) and not set(REFUSED) & set(NOTES)


@pytest.mark.parametrize(("key", "argv"), REFUSED_COMPUTED.items())
def test_a_spelling_without_a_counterpart_is_refused_by_name(capsys, key, argv):
    assert f"`{key}" in refused(capsys, *argv.split())


def test_nodes_become_the_line_for_the_launcher(capsys):
    """2 nodes x 8 GPUs are 16 processes; 8 GPUs a node where nothing else is said, as in the Lightning scripts."""
    two = refused(capsys, "--num_nodes", "2", "--gpus_per_node", "8")
    assert "accelerate launch --num_machines 2 --num_processes 16 --multi_gpu --machine_rank RANK" in two
    assert "--num_machines 4 --num_processes 32" in refused(capsys, "--num_nodes=4")
    one = refused(capsys, "--gpus_per_node", "4")
    assert "`accelerate launch --num_machines 1 --num_processes 4 --multi_gpu`" in one and "RANK" not in one


@pytest.mark.parametrize("key", NOTES)
def test_a_key_that_means_something_else_here_is_said_on_stderr(capsys, key):
    load(f"--{key}", "1")
    assert capsys.readouterr().err == f"loop: the command line: `{key}` {NOTES[key]}.\n"


@pytest.mark.parametrize("key", REFUSED)
def test_a_harmful_key_is_refused(capsys, write, key):
    assert f"`{key}` {REFUSED[key]}" in refused(capsys, "--config", write(f"{key}: x"))


def test_a_spelling_of_a_key_that_the_loop_lacks_is_an_unknown_key(capsys):
    @dataclass(frozen=True, kw_only=True)
    class Small:
        beta: float = 0.1

    for argv in (["--use_wandb"], ["--full_ft"], ["--lora_rank", "4"], ["--bf16"]):
        with pytest.raises(SystemExit):
            load_config(Small, argv, prog="loop")
        assert f"unknown key `{argv[0][2:]}`" in capsys.readouterr().err


def test_optim_may_name_the_optimizer(write):
    """transformers' `optim: adamw_8bit` beside our section of that name."""
    assert changed("--config", write("optim: adamw_torch\nlearning_rate: 1")) == {"learning_rate": 1.0}
    assert changed("--config", write("optim: adamw_8bit")) == {"optimizer": "adamw_8bit"}
    assert changed("--optim", "paged_adamw_8bit") == {"optimizer": "paged_adamw_8bit"}


def test_full_ft_wins_in_its_layer_and_loses_to_a_later_one(write):
    file = write("full_ft: true\nlora_rank: 8\n")
    assert changed("--config", file) == {"lora_r": 0}
    assert changed("--config", file, "--lora_r", "8") == {"lora_r": 8}
    assert changed("--config", file, "--full_ft", "false") == {}  # rank 32 again
    assert changed("--config", write("lora_r: 8"), "--full_ft", "false") == {"lora_r": 8}


def test_use_wandb_adds_to_the_trackers_of_lower_layers(write):
    file = write("report_to: [mlflow, tensorboard]")
    assert changed("--config", file, "--use_wandb") == {"report_to": ["mlflow", "tensorboard", "wandb"]}
    assert changed("--config", write("use_wandb: true"), "--use_wandb", "false") == {}


SAGEMAKER_ARGS = """
model_id: "meta-llama/Llama-3.1-8B"
mlflow_uri: ""
mlflow_experiment_name: ""
output_dir: "/opt/ml/model"
lora_r: 8
lora_alpha: 16
lora_dropout: 0.1
learning_rate: 2e-4
num_train_epochs: 1
per_device_train_batch_size: 2
per_device_eval_batch_size: 1
gradient_accumulation_steps: 2
gradient_checkpointing: true
bf16: true
tf32: true
fsdp: "full_shard auto_wrap offload"
fsdp_config:
  backward_prefetch: "backward_pre"
  cpu_ram_efficient_loading: true
  offload_params: true
merge_weights: true
temperature: 0.9
top_p: 1.0
"""


@pytest.mark.parametrize("loop", ["sft", "dpo", "grpo"])
def test_a_sagemaker_args_file_runs_unchanged(write, loop):
    module = importlib.import_module(f"loops.{loop}")
    content = SAGEMAKER_ARGS
    fields = flat_values(module.Config())
    if "temperature" not in fields:
        content = content[: content.index("temperature")]
    config = load_config(module.Config, ["--config", write(content, "args.yaml")], prog=loop)
    got = flat_values(config)
    assert (got["model_id"], got["learning_rate"], got["lora_alpha"], got["merge_weights"]) == (
        "meta-llama/Llama-3.1-8B",
        2e-4,
        16.0,
        True,
    )
    assert got["fsdp"] == "full_shard auto_wrap offload" and got["fsdp_config"]["offload_params"] is True
    assert got["mixed_precision"] == "bf16" and got["per_device_train_batch_size"] == 2


def test_the_lightning_command_line_is_understood():
    argv = [
        "--hf_model_id",
        "meta-llama/Llama-3-8B",
        "--data_dir",
        "datasets/custom",
        "--micro_batch_size",
        "1",
        "--accumulate_grad_batches",
        "16",
        "--max_seq_length",
        "4096",
        "--lora_rank",
        "16",
        "--lora_target_modules",
        "q_proj,k_proj,v_proj,o_proj",
        "--hfdc_dataset_name",
        "timdettmers/openassistant-guanaco",
        "--hfdc_split",
        "train",
        "--hfdc_train_split_ratio",
        "0.95",
        "--hfdc_val_test_split_ratio",
        "0.5",
        "--hfdc_input_template",
        "### Human:\\n{text}\\n",
        "--hfdc_output_template",
        "### Assistant:\\n{text}",
        "--hfdc_num_proc",
        "8",
        "--use_wandb",
    ]
    assert changed(*argv) == {
        "model_id": "meta-llama/Llama-3-8B",
        "lora_r": 16,
        "lora_target_modules": "q_proj,k_proj,v_proj,o_proj",
        "dataset_name": "timdettmers/openassistant-guanaco",
        "eval_split_ratio": 0.05,
        "report_to": ["wandb"],
        "input_template": "### Human:\\n{text}\\n",
        "output_template": "### Assistant:\\n{text}",
        "gradient_accumulation_steps": 16,
        "max_seq_length": 4096,
    }


# One data set at a time


def test_a_data_set_of_a_later_layer_replaces_all_about_rows(write):
    """Templates, columns and the evaluation rows of the file go; what is no part of the section stays."""
    file = write(
        "input_template: '{a}'\nfield_mapping: {a: b}\ndataset_config: main\nmax_eval_samples: 5\n"
        "dataset_name: first\neval_dataset_name: first-eval\neval_reward: exact\nbeta: 2\n"
    )
    default = DataSection()
    got = load("--config", file, "--dataset_name", "second", "--output_template", "{o}")
    assert got.data == DataSection(dataset_name="second", output_template="{o}")
    assert got.eval_reward == "exact" and got.beta == 2.0
    third = write("dataset_name: third\ninput_template: '{t}'", "third.yaml")
    assert load("--config", file, third).data == DataSection(dataset_name="third", input_template="{t}")
    assert load("--config", third, file).data.input_template == "{a}"
    assert load("--config", file, "--data_dir", "d").data == DataSection(dataset_name="d")
    assert load("--config", file, "--max_eval_samples", "6").data.input_template == "{a}" != default.input_template


def test_values_chosen_to_go_with_another_leave_with_it():
    """The shipped GRPO file's floor belongs to its rate; weights belong to the reward functions they were given for."""
    from loops.grpo import Config

    shipped = ["--config", "configs/grpo.yaml"]
    default = Config()
    got = load_config(Config, [*shipped, "--learning_rate", "1e-6"], prog="grpo")
    assert got.optim.min_learning_rate == default.optim.min_learning_rate
    both = ["--learning_rate", "1e-5", "--min_learning_rate", "1e-6"]
    assert load_config(Config, [*shipped, *both], prog="grpo").optim.min_learning_rate == 1e-6
    weighted = ["--reward_functions", "exact_answer,format", "--reward_weights", "1,2"]
    assert load_config(Config, [*shipped, *weighted], prog="grpo").reward.reward_weights == [1.0, 2.0]


def test_a_json_schema_is_a_mapping_in_a_file_and_json_on_the_command_line(write):
    from loops.grpo import Config

    schema = {"type": "object", "properties": {"yes": {"enum": [1, "1", None, True]}}, "required": ["yes"]}
    file = write(
        "engine: vllm\nstructured_outputs_json:\n  type: object\n  required: [yes]\n"
        "  properties: {yes: {enum: [1, '1', null, true]}}\n"
    )
    for arguments in (["--config", file], ["--engine", "vllm", "--structured_outputs_json", json.dumps(schema)]):
        got = load_config(Config, arguments, prog="grpo")
        assert got.rollout.structured_outputs_json == schema
        again = load_config(Config, ["--config", write(dump_config(got), "again.yaml")], prog="grpo")
        assert again == got


@pytest.mark.parametrize(
    ("content", "key", "value"),
    [
        ("report_to: null", "report_to", "none"),
        ("max_grad_norm: null", "max_grad_norm", 0.0),
        ("save_total_limit: null", "save_total_limit", 0),
        ("top_k: -1", "top_k", 0),
        ("lora_target: all", "lora_target_modules", "all-linear"),
    ],
)
def test_a_value_that_means_off_elsewhere_is_ours(write, content, key, value):
    assert values("--config", write(content))[key] == value


def test_warmup_may_be_a_part_of_all_steps_in_either_key(write):
    """And then the steps of a lower layer, or of the loop's defaults (7), do not hold any more."""
    for content in ("warmup_steps: 0.1", "warmup_steps: '0.1'"):
        got = values("--config", write(content))
        assert (got["warmup_steps"], got["warmup_ratio"]) == (0, 0.1)
    got = values("--config", write("warmup_steps: 20"), "--warmup_ratio", "0.1")
    assert got["warmup_ratio"] == 0.1 and got["warmup_steps"] != 20
    assert values("--warmup_steps", "3")["warmup_steps"] == 3


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_the_seeds_own_files_load_with_a_note_for_what_is_not_used(capsys, name):
    path = Path(__file__).resolve().parents[3] / f"shared/cases/seeds/{name}_args.yaml"
    if not path.is_file():
        pytest.skip("the seeds' files are not here")
    module = importlib.import_module(f"loops.{name}")
    config = load_config(module.Config, ["--config", str(path)], prog=name)
    assert flat_values(config)["lora_r"] in (8, 32)
    notes = capsys.readouterr().err
    for key in ("checkpoint_dir", "deserialize_messages", "max_prompt_length", "log_on_each_node"):
        assert (f"`{key}` is not used" in notes) == (f"{key}:" in path.read_text())


# Errors


@pytest.mark.parametrize("key", ["deepspeed", "clipping_norm", "padding_side", "weights_of_init", "kl_type"])
def test_a_far_name_is_not_guessed(capsys, key):
    assert "did you mean" not in refused(capsys, f"--{key}", "1")


def test_all_unknown_keys_of_a_file_are_told_at_once(capsys, write):
    sentence = refused(capsys, "--config", write("larning_rate: 1\nhf_token: x\nxyzzy: 2\nearly_stopping: true\n"))
    for part in ("`larning_rate`: did you mean `learning_rate`?;", "`xyzzy`: see --help", "set HF_TOKEN", "eval/loss"):
        assert part in sentence


def test_an_unknown_key_names_the_nearest_one_and_the_place(capsys, write):
    sentence = refused(capsys, "--larning_rate", "1")
    assert "the command line" in sentence and "`larning_rate`" in sentence and "`learning_rate`" in sentence
    file = write("model:\n  lora_rr: 1\n")
    sentence = refused(capsys, "--config", file)
    assert file in sentence and "`model.lora_rr`" in sentence and "`lora_r`" in sentence
    assert "--help" in refused(capsys, "--xyzzy", "1")


def test_a_key_in_the_wrong_section_is_told_its_own(capsys):
    assert "`optim.learning_rate`" in refused(capsys, "--model.learning_rate", "1")
    assert "`beta`" in refused(capsys, "--model.beta", "1")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("lora_r: abc", "`lora_r` is 'abc': it must be a whole number"),
        ("lora_r: 1.5", "`lora_r` is 1.5: it must be a whole number"),
        ("lora_r:", "`lora_r` is empty: it must be a whole number"),
        ("learning_rate: fast", "`learning_rate` is 'fast': it must be a number"),
        ("learning_rate: true", "`learning_rate` is true or has no value: it must be a number"),
        ("load_in_4bit: maybe", "`load_in_4bit` is 'maybe': it must be true or false"),
        ("revision: 12", "`revision` is 12: it must be text (in quotes"),
        ("optim: {learning_rate: [1]}", "`optim.learning_rate` is [1]"),
        ("weights: [a]", "`weights` is ['a']: it must be a list, each item a number"),
        ("field_mapping: a", "`field_mapping` is 'a': it must be a mapping of names to values, as in '{name: value}'"),
        ("field_mapping: '{a:b}'", "`field_mapping` is '{a:b}': it must be a mapping"),
        ("field_mapping: 'a,b=c'", "`field_mapping` is 'a,b=c': it must be a mapping"),
        ("model: 3", "`model` is a section"),
        ("lora_r: 1\nbeta: 2\nlora_r: 2", "`lora_r` stands there twice in line 1 and in line 3"),
        ("input_template: {{q}}", "the YAML cannot be read: found unhashable key in line 1"),
        ("lora_r: 1\nlora_rank: 2", "`lora_r` and `lora_rank` both set `lora_r`"),
        ("lora_r: 1\nmodel: {lora_r: 2}", "`lora_r` and `model.lora_r` both set `lora_r`"),
        ("bf16: true\nmixed_precision: no", "`mixed_precision` and `bf16` both set `mixed_precision`"),
        ("lora_r: [1", "cannot be read"),
        ("- lora_r", "holds a list"),
        ("load_in_4bit: true\nlora_r: 0", "load_in_4bit needs lora_r above 0 (load_in_4bit from"),
        ("beta: -1", "beta is -1.0; give 0 or more (beta from"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence_with_the_file(capsys, write, content, words):
    file = write(content)
    sentence = refused(capsys, "--config", file)
    assert words in sentence and file in sentence


def test_json_mistakes_are_sentences_too(capsys, write):
    assert "`a` stands there twice" in refused(capsys, "--config", write('{"a": 1, "a": 2}', "a.json"))
    assert "cannot be read" in refused(capsys, "--config", write('{"a": ', "b.json"))


def test_files_that_cannot_be_read_are_named(capsys, tmp_path):
    assert "missing.yaml" in refused(capsys, "--config", str(tmp_path / "missing.yaml"))
    assert str(tmp_path) in refused(capsys, "--config", str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml" in refused(capsys, "--config", str(tmp_path / "binary.yaml"))
    assert "`--config` needs" in refused(capsys, "--config")


def test_a_word_without_a_key_is_refused(capsys):
    assert "`config.yaml`" in refused(capsys, "config.yaml")
    assert "`-lr`" in refused(capsys, "-lr", "1")
    assert "`lora_r` is ['1', '2']" in refused(capsys, "--lora_r", "1", "2")


def test_an_impossible_combination_says_where_its_keys_come_from(capsys, write):
    file = write("load_in_4bit: true")
    sentence = refused(capsys, "--config", file, "--full_ft")
    assert f"load_in_4bit from {file}" in sentence and "lora_r from the command line" in sentence


def test_notes_are_not_printed_beside_an_error(capsys):
    assert "tf32" not in refused(capsys, "--tf32", "true", "--lora_r", "x")


def test_two_sections_with_one_key_are_a_mistake_of_the_programmer():
    @dataclass(frozen=True, kw_only=True)
    class Other:
        lora_r: int = 1

    Clash = type("Clash", (), {"__annotations__": {"model": ModelSection, "other": Other}})
    Clash.model, Clash.other = field(default_factory=ModelSection), field(default_factory=Other)
    with pytest.raises(AssertionError, match="lora_r"):
        load_config(dataclass(frozen=True, kw_only=True)(Clash), [], prog="loop")


# Printing


def test_help_shows_every_key_with_its_docstring_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        load("--lora_r", "not a number", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for key in flat_values(Config()):
        assert re.search(rf"--(\w+\.)?{key}[ ,]", text), key  # a comma follows where Python 3.13 lists two spellings
    for words in (
        "The optimizer",
        "Peak learning rate.",
        "default: 1e-05",
        "about 50 % of the memory",
        "default: 7",
        "Weight of the KL.",
        "lora_rank -> lora_r",
    ):
        assert words in text, words
    assert "--model CONFIG" not in text and text == " ".join(format_help(Config, "loop").split())


def test_print_config_prints_what_would_run(capsys, write):
    with pytest.raises(SystemExit) as stop:
        load("--print-config", "--lora_r", "4")
    output = capsys.readouterr()
    assert stop.value.code == 0 and output.err == ""
    assert changed("--config", write(output.out)) == {"lora_r": 4}


TEXTS = [
    "",
    "a",
    "no",
    "1e-6",
    "1",
    "null?",
    "# x",
    "a: b",
    "é\n\t'\"",
    "{q}\n### A",
    "2024-01-01",
    "~x",
    " x ",
    "<<",
    "=",
    "0o7",
    "1:30",
    "-",
    ".5",
    "null",
    "true",
    "[1, 2]",
    "{'a': 1}",
    "👍",
    "x\\ny",
    "@x",
    "%x",
    "*x",
    "&x",
    "!x",
]
NUMBERS = [0.0, 1e-6, 1e22, -1.5, 3.0, 1e-300, 0.1 + 0.2]


def random_values(rng: random.Random) -> dict:
    """Any values that the types allow, for some of the keys."""
    some = {
        "model_id": rng.choice(TEXTS),
        "revision": rng.choice([*TEXTS, None]),
        "lora_r": rng.randrange(1, 10**9),
        "lora_target_modules": rng.choice([rng.choice(TEXTS), rng.sample(TEXTS, 3)]),
        "load_in_4bit": rng.random() < 0.5,
        "learning_rate": rng.choice(NUMBERS),
        "dataset_name": rng.choice(TEXTS),
        "field_mapping": {text: rng.choice(TEXTS) for text in rng.sample(TEXTS, 4)},
        "input_template": rng.choice([*TEXTS, None]),
        "fsdp": rng.choice([rng.choice(TEXTS), {"a": {"b": [1, None]}}]),
        "fsdp_config": {
            text: rng.choice([*TEXTS, *NUMBERS, None, True, 7, ["no", 1e-6]]) for text in rng.sample(TEXTS, 5)
        },
        "stop": rng.sample(TEXTS, 3),
        "weights": rng.sample(NUMBERS, 3),
        "beta": abs(rng.choice(NUMBERS)),
        "epsilon_high": rng.choice([*NUMBERS, None]),
        "eval_reward": rng.choice([*TEXTS, None]),
    }
    return {key: some[key] for key in rng.sample(list(some), rng.randrange(len(some) + 1))}


@pytest.mark.parametrize("seed", range(30))
def test_loading_a_dumped_config_gives_an_equal_one(write, seed):
    config = load("--config", write(random_values(random.Random(seed)), "random.json"))
    assert load("--config", write(dump_config(config))) == config
    assert dump_config(load("--config", write(dump_config(config)))) == dump_config(config)


def test_a_list_given_twice_on_the_command_line_is_refused(capsys):
    """Of a number the last one counts; of a list it would drop what stands in the first."""
    sentence = refused(capsys, "--report_to", "mlflow", "--report_to", "tensorboard")
    assert "`report_to` is given twice: write its values after one, `--report_to a b`" in sentence
