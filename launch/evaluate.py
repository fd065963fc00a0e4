"""Completions for the rows of a data file, scored: exact match, ROUGE and any reward function.

    python -m launch.evaluate RUN --dataset_name data/quickstart/heldout.jsonl          # a run, as it was trained
    python -m launch.evaluate --checkpoints_dir results                # the run of the newest checkpoint below results
    python -m launch.evaluate Qwen/Qwen3-0.6B --config configs/grpo.yaml                # a model, with a loop's file
    accelerate launch --config_file launch/cpu_ddp.yaml -m launch.evaluate MODEL_OR_RUN ...     # rows shared out

Greedy unless `--do_sample true`; a `--temperature`, `--top_p`, `--top_k` or `--min_p` given here implies it. A run (or
one of its checkpoints) brings its own config.yaml, so templates, chat options and completion length are those of
training; `--config` files and keys given here go over them, and `--dataset_name` changes the rows only.
Written to `--output`: `predictions.jsonl`, one row a line with prompt,
completion, reference and every score, and `metrics.json` with the means; the trackers get the means with
`--report_to`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from configs.arguments import join_arguments, split_arguments
from configs.loader import dump_config, load_config
from configs.spellings import RENAMED
from data.chat import EncodeConfig, Prompt, encode_example, encode_prompt, encode_rows
from data.files import read_rows
from data.load import DataConfig, convert_rows, load_rows
from data.rewards import RewardConfig, RewardFn, build_reward_fn
from launch.trained import TrainedModel, find_trained, rebuild_policy, run_folder_of
from loops import dpo, grpo, sft
from loops.shared.models import ModelConfig, add_stop_tokens, build_policy, build_tokenizer, find_source, resolve_dtype
from loops.shared.rollout import Completion, RolloutConfig, build_engine
from loops.shared.run import Run, RunConfig, one_sentence_errors, start_run
from loops.shared.tracking import replace_text

PROG = "python -m launch.evaluate"
REFERENCES = ("reference", "completion", "chosen", "answer")  # columns, in the order in which they are looked for
ROUGE = ("rouge1", "rouge2", "rougeL")
OWN_NAMES = {"dataset_name": "eval_dataset_name", "dataset_split": "eval_dataset_split"}
OWN_NAMES |= {"max_samples": "max_eval_samples", "test_path": "eval_dataset_name"}
OWN_NAMES |= {"batch_size": "generation_batch_size", "max_tokens": "max_completion_length"}
OWN_NAMES |= {name: f"vllm_{name}" for name in ("tensor_parallel_size", "gpu_memory_utilization", "max_model_len")}
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}  # sampling settings that ask for no sampling


@dataclass(frozen=True, kw_only=True)
class Config:
    """Evaluation. A training file may be given: the keys that only training has do nothing."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    run: RunConfig = field(default_factory=RunConfig)

    do_sample: bool = False
    """Sample with the rollout section's temperature, top_p, top_k and min_p instead of taking the likeliest token."""
    generation_batch_size: int = 64
    """Prompts given to the engine at once, on each process."""

    def __post_init__(self) -> None:
        if self.generation_batch_size < 1:
            raise ValueError(f"generation_batch_size is {self.generation_batch_size}; give 1 or more.")


def read_arguments(argv: Sequence[str], prints: bool = True) -> tuple[str | None, str | None, Config]:
    """(model or run, output folder, settings) of the command line.

    Keys that only training has do nothing in files, and are unknown on the command line. Without a model, a config file
    and `model_id`, the model is the newest checkpoint below `--checkpoints_dir` (results).
    """
    loops = (sft.Config, dpo.Config, grpo.Config)
    if {"--help", "-h"} & set(argv):
        load_config(Config, ["--help"], prog=PROG)
    pairs, options = split_arguments(argv, ("source",))
    own: dict[str, str] = {}  # what only this command has
    keys: set[str] = set()
    rest: list[tuple[str, Any]] = []
    for key, value in pairs:
        plain = key.rpartition(".")[2]
        keys.add(RENAMED.get(plain, plain))
        if plain in ("source", "output", "output_dir", "checkpoints_dir"):
            if not isinstance(value, str):
                raise ValueError(f"the command line: `--{plain}` needs a folder.")
            own[plain.removesuffix("_dir")] = value
        elif plain == "temperature" and re.fullmatch(r"0+\.?0*|\.0+", str(value)):
            keys = keys - {plain} | {"greedy"}
        else:
            rest.append((OWN_NAMES.get(plain, key), value))
    name = own.get("source")
    if name is None and ("checkpoints" in own or not (options or "model_id" in keys)):
        name = str(find_trained(None, checkpoints_dir=own.get("checkpoints", "results")).path)
        if prints:
            print(f"{PROG}: the newest checkpoint is {name}", file=sys.stderr)
    run = run_folder_of(Path(name).expanduser()) if name else None
    files = [*([str(run / "config.yaml")] if run else []), *options.pop("config", [])]
    words = [f"--{option}" for option in options] + [word for path in files for word in ("--config", path)]
    config: Config = load_config(Config, [*words, *join_arguments(rest)], prog=PROG, also_in_files=loops, prints=prints)
    return name, own.get("output"), with_sampling(config, keys)


def with_sampling(config: Config, given: set[str]) -> Config:
    """`do_sample` as the command line's keys imply it. Raises ValueError where one of them would do nothing."""
    greedy = "greedy" in given or ("do_sample" in given and not config.do_sample)
    sampled = [key for key, off in GREEDY.items() if key in given and getattr(config.rollout, key) != off]
    sampled += ["do_sample"] * ("do_sample" in given and config.do_sample)
    if sampled and greedy:
        raise ValueError(f"temperature 0, or do_sample false, is greedy: leave it out, or {', '.join(sampled)}.")
    return replace(config, do_sample=(config.do_sample or bool(sampled)) and not greedy)


def find_model(name: str | None, config: Config) -> TrainedModel | ModelConfig:
    """What is evaluated: trained weights of a run, or the settings that load a model folder or a hub id."""
    if name and Path(name).expanduser().is_dir():
        trained = find_trained(name)
        if trained.kind != "model":
            return trained
        name = str(trained.path)
    model = replace(config.model, compile=False, gradient_checkpointing=False)
    if name:
        model = replace(model, model_id=name, from_scratch=False)
    if model.load_in_4bit or model.load_in_8bit or find_source(model).adapter:
        return model
    return replace(model, lora_r=0, use_dora=False, use_rslora=False, modules_to_save=None)


def build_model(found: TrainedModel | ModelConfig, tokenizer: Any, device: torch.device) -> torch.nn.Module:
    """The model in evaluation mode; one without adapters has bfloat16 on a GPU unless `torch_dtype` says otherwise."""
    if isinstance(found, TrainedModel):
        return rebuild_policy(found, device=device)
    dtype = resolve_dtype(replace(found, lora_r=max(found.lora_r, 1)), device)  # the dtype of a frozen base
    found = replace(found, torch_dtype=str(dtype).removeprefix("torch."))
    return build_policy(found, tokenizer, seed=0, device=device).eval()


def evaluation_rows(config: Config) -> list[dict[str, Any]]:
    """The evaluation rows of the data section; where it names none, its rows."""
    data = config.data
    if not data.eval_dataset_name and data.eval_split_ratio > 0:
        return (load_rows(data, seed=config.run.seed)[1] or [])[: data.max_eval_samples or None]
    name, split = data.dataset_name, data.dataset_split
    if data.eval_dataset_name:
        name, split = data.eval_dataset_name, data.eval_dataset_split
    subset = data.dataset_config if name == data.dataset_name else None
    rows = read_rows(name, split, subset, key="eval_dataset_name" if data.eval_dataset_name else "dataset_name")
    return convert_rows(rows, data, name, limit=data.max_eval_samples)


def build_scores(config: RewardConfig, prompts: Sequence[Prompt]) -> RewardFn:
    """The reward functions; `exact_answer`, the default, is left out where no row has the answer that it asks for."""
    rows = [prompt.columns for prompt in prompts]
    answered = any(row.get("answer") is not None for row in rows)
    names = [name for name in config.names if answered or name != "exact_answer"]
    return build_reward_fn(RewardConfig(reward_functions=names), rows) if names else RewardFn()


def reference_of(prompt: Prompt, tokenizer: Any, config: EncodeConfig) -> str | None:
    """A row's reference text: the first of the columns REFERENCES that it has, or the last reply of `messages`.

    A reply with tool calls is the text that the chat template writes for it.
    """
    row = prompt.columns
    found = next((row[name] for name in REFERENCES if row.get(name) is not None), None)
    if found is None and row.get("messages"):
        found = row["messages"][-1:] if row["messages"][-1].get("role") == "assistant" else None
    if found is None or isinstance(found, (str, int, float)):
        return None if found is None else str(found)
    reply = found[-1] if isinstance(found, list) and found else found
    if not isinstance(reply, dict):
        return None
    if not reply.get("tool_calls"):
        return reply.get("content") if isinstance(reply.get("content"), str) else None
    example = encode_example(row, tokenizer, replace(config, max_seq_length=10**9))
    if example is None:
        return None
    shared = 0
    while shared < len(prompt.prompt_ids) and example.input_ids[shared : shared + 1] == [prompt.prompt_ids[shared]]:
        shared += 1
    return tokenizer.decode(example.input_ids[shared:], skip_special_tokens=True).strip()


def with_reference(prompt: Prompt, reference: str | None) -> Prompt:
    """The prompt for the scores: with a column `reference`, where none of its own columns is one."""
    if reference is None or any(prompt.columns.get(name) is not None for name in REFERENCES):
        return prompt
    return replace(prompt, columns={**prompt.columns, "reference": reference})


def text_scores(completion: str, reference: str | None) -> dict[str, float | None]:
    """`exact_match` (the same words in the same order, white space aside) and ROUGE F-measures, in [0, 1].

    None without a reference; ROUGE is left out where the package is not installed. Lin 2004.
    """
    scores: dict[str, float | None] = dict.fromkeys(("exact_match", *ROUGE))
    if importlib.util.find_spec("rouge_score") is None:
        scores = {"exact_match": None}
    if reference is None:
        return scores
    scores["exact_match"] = float(completion.split() == reference.split())
    if "rougeL" in scores:
        from rouge_score.rouge_scorer import RougeScorer

        found = RougeScorer(list(ROUGE), use_stemmer=False).score(reference, completion)
        scores |= {name: found[name].fmeasure for name in ROUGE}
    return scores


def predict(engine: Any, prompts: Sequence[Prompt], numbers: Sequence[int], config: Config, tokenizer: Any, run: Run):
    """This process's predictions, as rows of predictions.jsonl.

    numbers: each prompt's row in the data, from 1. A prompt's random numbers depend on its index, so the completions
    are the same on any number of processes.
    """
    sampling = config.rollout if config.do_sample else config.rollout.greedy()
    accelerator, size = run.accelerator, config.generation_batch_size
    reward_fn = build_scores(config.reward, prompts)
    mine = range(accelerator.process_index, len(prompts), accelerator.num_processes)
    predictions: list[dict[str, Any]] = []
    for start in range(0, math.ceil(len(prompts) / accelerator.num_processes), size):  # as often on every process
        indices = list(mine[start : start + size])
        chosen = [prompts[index] for index in indices]
        ids = [prompt.prompt_ids for prompt in chosen]
        groups = engine.sample(ids, n=1, sampling=sampling, seed=config.run.seed, prompt_numbers=indices)
        completions: list[Completion] = [group[0] for group in groups]
        result = reward_fn(chosen, completions)
        if result.failure:  # Python shows a warning once
            warnings.warn(f"a score failed; its rows count as missing:\n{result.failure}", stacklevel=1)
        for row_index, (index, prompt, completion) in enumerate(zip(indices, chosen, completions, strict=True)):
            reference = reference_of(prompt, tokenizer, config.encode)
            scores = text_scores(completion.text, reference)
            scores |= {name: values[row_index] for name, values in result.by_name.items()}
            row: dict[str, Any] = {"row": numbers[index], "prompt": prompt.text, "completion": completion.text}
            row |= {"reference": reference, "scores": scores, "tokens": len(completion.token_ids)}
            predictions.append(row | {"finish_reason": completion.finish_reason})
    return predictions


def mean_scores(predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
    """`eval/NAME` for every score (mean over the rows that have it), and `eval/NAME/missing` where some have none."""
    metrics: dict[str, float] = {}
    for name in predictions[0]["scores"]:
        values = [row["scores"][name] for row in predictions]
        present = [value for value in values if value is not None]
        if present:
            metrics[f"eval/{name}"] = math.fsum(present) / len(present)
        if len(present) < len(values):
            metrics[f"eval/{name}/missing"] = float(len(values) - len(present))
    metrics["eval/completion_length"] = sum(row["tokens"] for row in predictions) / len(predictions)
    metrics["eval/truncated"] = sum(row["finish_reason"] == "length" for row in predictions) / len(predictions)
    return metrics | {"eval/rows": float(len(predictions))}


def evaluate(name: str | None, output: str | None, config: Config) -> dict[str, float]:
    """Generate, score, write; returns the means (on every process)."""
    found = find_model(name, config)
    model = found.model if isinstance(found, TrainedModel) else found
    step = (found.step or 0) if isinstance(found, TrainedModel) else 0
    tokenizer = build_tokenizer(model)
    rows = evaluation_rows(config)
    prompts, report = encode_rows(rows, encode_prompt, tokenizer, config.encode, what="rows")
    numbers = {id(row): number for number, row in enumerate(rows, start=1)}
    lines = [numbers[id(prompt.columns)] for prompt in prompts]
    prompts = [with_reference(prompt, reference_of(prompt, tokenizer, config.encode)) for prompt in prompts]
    build_scores(config.reward, prompts)  # unknown rewards and columns are refused before the model is read

    folder = run_folder_of(Path(name).expanduser()) if name else None
    if output is None and folder:
        output = str(folder / "evaluations" / time.strftime("%Y%m%d-%H%M%S"))
    own = {key: getattr(config.run, key) for key in ("results_dir", "run_name", "seed", "report_to", "mixed_precision")}
    own |= {key: getattr(config.run, key) for key in ("mlflow_uri", "mlflow_experiment_name")}
    settings = asdict(config) | {"model": asdict(model)}
    run = start_run(
        RunConfig(output_dir=output, **own),
        loop="evaluate",
        resolved=dump_config(config),
        settings=settings,
        expandable_segments=not config.rollout.vllm_in_process,
    )
    run.print_main(str(report))
    policy = build_model(found, tokenizer, run.accelerator.device)
    add_stop_tokens(policy, tokenizer, report.stop_tokens)
    engine = build_engine(
        config.rollout,
        policy,
        tokenizer,
        autocast=run.accelerator.autocast,
        api_key=run.server_key,
    )
    run.create_folder(max(step, 1), rows=prompts)
    engine.sync(policy)
    began = time.perf_counter()
    predictions = gather_object(predict(engine, prompts, lines, config, tokenizer, run))
    predictions.sort(key=lambda row: row["row"])
    seconds = time.perf_counter() - began
    metrics = mean_scores(predictions) | {"time/eval": seconds}
    if run.accelerator.is_main_process:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
        replace_text(run.folder / "predictions.jsonl", text)
        data = config.data.eval_dataset_name or config.data.dataset_name
        summary = {"model": name or model.model_id, "dataset": data, "step": step, **metrics}
        replace_text(run.folder / "metrics.json", json.dumps(summary, indent=1) + "\n")
    run.log(metrics, step)
    none = [key for key in metrics if key.endswith("/missing") and key.removesuffix("/missing") not in metrics]
    if none:
        names = ", ".join(key.removesuffix("/missing") for key in none)
        run.print_main(f"no row has {names}: none has the columns that they need, or they failed")
    run.close(ok=True)
    run.print_main(f"predictions and metrics written to {run.folder}")
    return metrics


def main(argv: list[str] | None = None) -> int:
    """The command; 0 when the files are written, 2 for what the user can correct."""
    try:
        with one_sentence_errors(PROG) as prints:
            evaluate(*read_arguments(sys.argv[1:] if argv is None else argv, prints))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
