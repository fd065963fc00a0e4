"""Evaluation: the rows of a file, answered by a model or a run, scored and written whole."""

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

from configs.text import dump_yaml
from data.chat import EncodeConfig, Prompt, encode_prompt
from launch import export
from launch.evaluate import (
    Config,
    evaluation_rows,
    main,
    mean_scores,
    read_arguments,
    reference_of,
    text_scores,
    with_reference,
)
from loops.shared.checkpoint import Saver
from loops.shared.models import ModelConfig, build_policy, build_tokenizer

HOUSE = Path(__file__).resolve().parents[2]
QUICKSTART = "data/quickstart/model"
HELDOUT = "data/quickstart/heldout.jsonl"
SHORT = ["--max_samples", "5", "--max_completion_length", "6"]
LAST_OF_ALL = """
import torch
from launch.evaluate import main

called = []
for name in ("barrier", "all_gather_object", "broadcast_object_list"):
    def noted(*words, real=getattr(torch.distributed, name), name=name, **options):
        called.append(name)
        return real(*words, **options)
    setattr(torch.distributed, name, noted)
assert main() == 0
assert "all_gather_object" in called and called[-1] == "barrier", called
"""


@pytest.fixture(autouse=True)
def house(monkeypatch) -> Iterator[None]:
    """Paths of the shipped configs start at the repository; every test has an accelerator of its own."""
    monkeypatch.chdir(HOUSE)
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(ModelConfig(model_id=str(HOUSE / QUICKSTART)))


def results(folder: Path) -> tuple[list[dict], dict]:
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return rows, json.loads((folder / "metrics.json").read_text())


def test_a_model_is_scored_with_a_loops_own_file(tmp_path, capsys):
    """configs/grpo.yaml as it stands: its evaluation rows, its rewards; its training keys do nothing."""
    assert main([QUICKSTART, "--config", "configs/grpo.yaml", *SHORT, "--output", str(tmp_path / "out")]) == 0
    rows, metrics = results(tmp_path / "out")
    heldout = [json.loads(line) for line in Path(HELDOUT).read_text().splitlines()[:5]]
    assert [row["row"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["reference"] for row in rows] == [row["completion"][0]["content"] for row in heldout]
    questions = [row["prompt"][0]["content"] for row in heldout]
    assert all(f"user\n{asked}" in row["prompt"] for asked, row in zip(questions, rows, strict=True))
    assert set(rows[0]["scores"]) == {"exact_match", "rouge1", "rouge2", "rougeL", "exact_answer"}
    assert all(row["tokens"] <= 6 for row in rows)
    for name in rows[0]["scores"]:
        assert metrics[f"eval/{name}"] == pytest.approx(sum(row["scores"][name] for row in rows) / 5)
    assert metrics["eval/rows"] == 5 and metrics["dataset"] == HELDOUT and metrics["model"] == QUICKSTART
    assert f"eval/rougeL {metrics['eval/rougeL']:.4g}" in capsys.readouterr().out
    logged = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    assert logged["eval/rougeL"] == metrics["eval/rougeL"]


def test_two_processes_write_the_same_files_as_one(tmp_path):
    """5 rows on 2 processes (3 and 2), 2 at a time, sampled: a row's noise belongs to its place in the data. Their last
    exchange has none of Python's tensors: gloo's threads would abort one process of three."""
    script = tmp_path / "last_of_all.py"
    script.write_text(LAST_OF_ALL)
    words = [QUICKSTART, "--dataset_name", HELDOUT, *SHORT, "--generation_batch_size", "2", "--do_sample", "true"]
    assert main([*words, "--output", str(tmp_path / "one")]) == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOUSE)}
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    launch += ["launch/cpu_ddp.yaml", "--main_process_port", "0", str(script)]
    command = [*launch, *words, "--output", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=HOUSE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("eval/rougeL") == 1
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert one[0] == two[0]
    assert {k: v for k, v in one[1].items() if k != "time/eval"} == {
        k: v for k, v in two[1].items() if k != "time/eval"
    }
    assert json.loads((tmp_path / "two" / "provenance.json").read_text())["processes"] == 2


def make_run(folder: Path, **data) -> Path:
    """A LoRA run of the embedded model with a checkpoint of step 3."""
    config = ModelConfig(model_id=str(HOUSE / QUICKSTART), lora_r=4)
    policy = build_policy(config, seed=0, device="cpu")
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    folder.mkdir()
    sections = {"model": asdict(config), "data": {"dataset_name": "gone.jsonl", **data}, "run": {"seed": 0}}
    sections |= {"rollout": {"max_completion_length": 6}, "loss_type": "nll", "batch": {"packing": True}}
    (folder / "config.yaml").write_text(dump_yaml(sections))
    objects = dict(model=policy, optimizer=optimizer, scheduler=scheduler)
    saver = Saver(folder, accelerator=Accelerator(cpu=True))
    saver.save(state={"step": 3, "epoch": 0, "loop": "sft", "seed": 0}, **objects)
    AcceleratorState._reset_state(True)
    return folder


def test_a_run_brings_its_templates_and_its_newest_weights(tmp_path):
    """--dataset_name names other rows than those of training, with the same columns: the run's template fills them.
    The checkpoint, the run and the exported model answer alike, and otherwise than the base."""
    run = make_run(tmp_path / "run", input_template="Sum: {question}\\n", field_mapping={"question": "q"})
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"{n} + {n} = ?", "answer": str(2 * n)}) + "\n" for n in range(100, 104)))
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert export.main([str(checkpoint), "--output", str(tmp_path / "exported")]) == 0
    found = {}
    for name in (run, checkpoint, tmp_path / "exported", HOUSE / QUICKSTART):
        extra = [] if run in (name, *name.parents) else ["--config", str(run / "config.yaml")]
        output = tmp_path / f"out-{name.name}"
        assert main([str(name), *extra, "--dataset_name", str(rows), "--output", str(output)]) == 0
        AcceleratorState._reset_state(True)
        predictions, metrics = results(output)
        assert predictions[1]["prompt"] == "Sum: 101 + 101 = ?\n"
        assert predictions[1]["reference"] == "202"
        assert metrics["step"] == (3 if run in (name, *name.parents) else 0)
        found[name.name] = [row["completion"] for row in predictions]
    assert found["run"] == found[checkpoint.name] == found["exported"] != found["model"]


def test_a_runs_evaluation_lies_in_the_run_unless_said_otherwise(tmp_path):
    run = make_run(tmp_path / "run")
    assert main([str(run), "--dataset_name", HELDOUT, "--max_samples", "1"]) == 0
    (folder,) = (run / "evaluations").iterdir()
    assert len(results(folder)[0]) == 1


def test_trackers_get_the_means_when_asked(tmp_path):
    pytest.importorskip("tensorboard")
    words = [QUICKSTART, "--dataset_name", HELDOUT, "--max_samples", "1", "--max_completion_length", "2"]
    assert main([*words, "--report_to", "tensorboard", "--output", str(tmp_path / "out")]) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (tmp_path / "out" / "tb_logs").glob("events.*")
    seen = EventAccumulator(str(file)).Reload()
    metrics = results(tmp_path / "out")[1]
    (point,) = seen.Scalars("eval/rougeL")
    assert point.value == pytest.approx(metrics["eval/rougeL"], abs=1e-6)


def test_means_leave_out_what_is_missing_and_count_it():
    """Scores 1, none, 0: the mean of the two that are there is 1/2, one is missing."""
    rows = [
        {"scores": {"a": a}, "tokens": 2, "finish_reason": end}
        for a, end in ((1.0, "stop"), (None, "length"), (0.0, "stop"))
    ]
    means = mean_scores(rows)
    assert means["eval/a"] == 0.5 and means["eval/a/missing"] == 1.0
    assert means["eval/truncated"] == pytest.approx(1 / 3) and means["eval/completion_length"] == 2.0


def test_a_reward_that_fails_is_missing_and_not_zero(tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text(
        "def breaks(*, completions):\n    raise KeyError('no such thing')\n\ndef size(*, completions):\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = [QUICKSTART, "--dataset_name", HELDOUT, *SHORT, "--output", str(tmp_path / "out")]
    with pytest.warns(UserWarning, match="a score failed"):
        assert main([*words, "--reward_functions", "my_scores:breaks,my_scores:size"]) == 0
    rows, metrics = results(tmp_path / "out")
    assert metrics["eval/breaks/missing"] == 5.0 and "eval/breaks" not in metrics
    assert metrics["eval/size"] == sum(len(row["completion"]) for row in rows) / 5


def test_the_columns_of_rewards_are_checked_before_the_model_is_read(tmp_path, monkeypatch, capsys):
    """Here of a folder without weights; a reward may ask for the `reference` that rows of messages have."""
    (tmp_path / "my_prices.py").write_text("def dear(*, completions, reference, price):\n    return price\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    shutil.copytree(QUICKSTART, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    turns = [{"role": role, "content": "4"} for role in ("user", "assistant")]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    words = [str(tmp_path / "model"), "--dataset_name", str(tmp_path / "rows.jsonl")]
    assert main([*words, "--reward_functions", "my_prices:dear"]) == 2
    assert "dear needs the column price and the rows have messages, reference;" in capsys.readouterr().err


def test_text_scores_are_exact_match_and_rouge():
    """Reference `a b c d`, completion `a b  x d`: 3 of 4 words shared, so rouge1 = rougeL = 3/4 (precision = recall);
    of 3 pairs of neighbours 1 is shared: rouge2 = 1/3."""
    pytest.importorskip("rouge_score")
    assert text_scores("a  b\nc d", "a b c d")["exact_match"] == 1.0
    scores = text_scores("a b  x d", "a b c d")
    assert scores == {"exact_match": 0.0, "rouge1": 0.75, "rouge2": pytest.approx(1 / 3), "rougeL": 0.75}
    assert set(text_scores("a", None).values()) == {None}


TOOL_TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }}\n{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_reference_is_what_the_row_wants(tokenizer, monkeypatch):
    def reference(row: dict) -> str | None:
        prompt = encode_prompt(row, tokenizer, EncodeConfig())
        return reference_of(prompt, tokenizer, EncodeConfig())

    assert reference({"prompt": "1 + 1", "answer": 2}) == "2"
    assert reference({"prompt": "1 + 1", "completion": " = 2", "answer": "2"}) == " = 2"
    assert reference({"prompt": "1 + 1", "reference": "two", "completion": " = 2"}) == "two"
    assert reference({"prompt": "1", "chosen": "2", "rejected": "3"}) == "2"
    assert reference({"prompt": "1 + 1"}) is None
    ask, reply = {"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}
    assert reference({"messages": [ask, reply, ask, {"role": "assistant", "content": "two"}]}) == "two"
    assert reference({"messages": [ask]}) is None
    monkeypatch.setattr(tokenizer, "chat_template", TOOL_TEMPLATE)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    row = {"messages": [ask, {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": tools}
    wanted = tokenizer.decode(tokenizer('<tool_call>add {"a": 1}</tool_call>')["input_ids"], skip_special_tokens=True)
    assert "add" in wanted and reference(row) == wanted
    assert (
        reference_of(Prompt([1], "1", {"messages": [ask, {"role": "tool", "content": "x"}]}), tokenizer, EncodeConfig())
        is None
    )


@pytest.mark.parametrize("loop", ["sft", "dpo", "grpo"])
def test_a_loops_file_loads_and_its_training_keys_do_nothing(loop):
    name, output, config = read_arguments(["--config", f"configs/{loop}.yaml", "--output=here", "--seed", "7"])
    assert (name, output, config.run.seed) == (None, "here", 7)
    assert isinstance(config, Config)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", (False, 1.0, 0)),
        ("--temperature 0.1", (True, 0.1, 0)),
        ("--temperature=0", (False, 1.0, 0)),
        ("--temperature 0.0 --top_k -1 --top_p 1.0", (False, 1.0, 0)),
        ("--top_k 20", (True, 1.0, 20)),
        ("--do_sample true --top_k -1", (True, 1.0, 0)),
    ],
)
def test_sampling_keys_given_by_hand_sample(words, expected):
    _, _, config = read_arguments(["m", *words.split()])
    assert (config.do_sample, config.rollout.temperature, config.rollout.top_k) == expected


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--temperature 0 --top_p 0.9", "is greedy: leave it out, or top_p."),
        (
            "--do_sample false --temperature 0.7",
            "is greedy: leave it out, or temperature.",
        ),
        ("--train_batch_size 8", "unknown key `train_batch_size`"),
        ("--max_tokens_per_batch 512", "unknown key `max_tokens_per_batch`"),
        ("--loss_type dapo", "unknown key `loss_type`"),
    ],
)
def test_a_key_without_effect_is_refused(words, sentence, capsys):
    assert main(["m", *words.split()]) == 2
    assert sentence in capsys.readouterr().err


def test_the_testers_own_flags_are_understood():
    words = "--batch_size 8 --max_tokens 512 --max-samples 9 --test_path rows.jsonl --tensor_parallel_size 2"
    _, _, config = read_arguments(["m", *words.split(), "--gpu_memory_utilization", "0.5", "--max_model_len", "4096"])
    assert (config.generation_batch_size, config.rollout.max_completion_length) == (8, 512)
    assert (config.data.max_eval_samples, config.data.eval_dataset_name) == (9, "rows.jsonl")
    vllm = config.rollout
    assert vllm.vllm_tensor_parallel_size == 2 and vllm.vllm_max_model_len == 4096
    assert vllm.vllm_gpu_memory_utilization == 0.5


def test_without_a_model_it_is_the_newest_checkpoint_or_an_error(tmp_path, capsys):
    """And not the embedded model, which nobody asked for."""
    run = make_run(tmp_path / "r")
    name, _, _ = read_arguments(["--checkpoints_dir", str(tmp_path)])
    assert Path(name).is_relative_to(run / "checkpoints") and "newest checkpoint" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no complete checkpoint"):
        read_arguments(["--checkpoints_dir", str(tmp_path / "none")])
    assert read_arguments(["--model_id", "a/b"])[0] is None


def test_a_score_sees_the_reference_that_the_row_has_in_its_conversation():
    """`rouge_l_precision` on chat rows, beside ROUGE, which finds the last reply."""
    prompt = Prompt(prompt_ids=[1], text="q", columns={"messages": [{"role": "assistant", "content": "four"}]})
    assert with_reference(prompt, "four").columns["reference"] == "four" and "reference" not in prompt.columns
    own = Prompt(prompt_ids=[1], text="q", columns={"answer": "4"})
    assert with_reference(own, "four") is own and with_reference(prompt, None) is prompt


def test_a_mistyped_run_is_told_its_neighbour(tmp_path, monkeypatch, capsys):
    """As a hub id could be (two names), and as none can."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/chat").mkdir(parents=True)
    for name in ("runs/chta", "./runs/chta"):
        assert main([name, "--dataset_name", "rows.jsonl"]) == 2
        assert "did you mean runs/chat?" in capsys.readouterr().err


def test_dataset_name_changes_the_rows_and_nothing_else(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "dataset_name: a.jsonl\ninput_template: '{q}'\nsystem_prompt: be short\neval_dataset_name: b.jsonl\n"
    )
    (tmp_path / "channel").mkdir()
    (tmp_path / "channel" / "anything.jsonl").write_text('{"q": "1"}\n{"q": "2"}\n{"q": "3"}\n')
    words = ["m", "--config", str(file), "--dataset-name", str(tmp_path / "channel"), "--max_samples=2"]
    _, _, config = read_arguments(words)
    assert config.data.input_template == "{q}" and config.data.system_prompt == "be short"
    config = replace(config, data=replace(config.data, system_prompt=None))
    assert [row["prompt"] for row in evaluation_rows(config)] == ["1", "2"]


def test_rows_held_out_by_ratio_are_those_of_training():
    _, _, config = read_arguments(["--config", "configs/grpo.yaml"])
    data = replace(config.data, eval_dataset_name=None, eval_split_ratio=0.01)
    rows = evaluation_rows(replace(config, data=data))
    total = len(Path(data.dataset_name).read_text().splitlines())
    assert len(rows) == round(total / 100)


def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    cases = {
        "unknown key `bogus`": [QUICKSTART, "--bogus", "1"],
        "dataset_name names nowhere.jsonl": [QUICKSTART, "--dataset_name", "nowhere.jsonl"],
        "model_id: there is no folder no/such/model": ["no/such/model", "--dataset_name", HELDOUT],
        "reward_functions names nothing": [QUICKSTART, "--dataset_name", HELDOUT, "--reward_functions", "nothing"],
        "generation_batch_size is 0": [QUICKSTART, "--generation_batch_size", "0"],
        "neither a complete checkpoint nor a model": [str(tmp_path), "--dataset_name", HELDOUT],
    }
    for message, words in cases.items():
        assert main([*words, *output]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert main([QUICKSTART, "--output"]) == 2
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    assert main([QUICKSTART, "--dataset_name", HELDOUT, *output]) == 2
    assert "already holds files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_help_and_settings_are_printed(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "generation_batch_size" in shown and "loss_type" not in shown
    assert main(["--config", "configs/sft.yaml", "--print_config"]) == 0
    assert "eval_dataset_name: data/quickstart/heldout.jsonl" in capsys.readouterr().out
