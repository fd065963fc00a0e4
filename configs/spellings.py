"""What people call our settings elsewhere: SageMaker's `args.yaml`, transformers, TRL, and Lightning scripts.

A name here only counts where the loop's Config has no key of that name. Every entry has a test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

RENAMED = {
    "model_name": "model_id",
    "model_name_or_path": "model_id",
    "hf_model_id": "model_id",
    "lora_rank": "lora_r",
    "max_length": "max_seq_length",
    "micro_batch_size": "per_device_train_batch_size",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "max_learning_rate": "learning_rate",
    "log_every_n_steps": "logging_steps",
    "train_dataset_path": "dataset_name",
    "val_dataset_path": "eval_dataset_name",
    "test_dataset_path": "eval_dataset_name",
    "hfdc_dataset_name": "dataset_name",
    "hfdc_dataset_config": "dataset_config",
    "hfdc_split": "dataset_split",
    "hfdc_input_template": "input_template",
    "hfdc_output_template": "output_template",
    "hfdc_field_mapping": "field_mapping",
}
"""Another name for one of our keys, with the same values."""

NOTES = {
    "data_dir": "is read as `dataset_name`, or not at all where `dataset_name` stands beside it",
    "limit_val_batches": "is read as `max_eval_samples`: rows over all processes, not batches",
    "val_check_interval": "is read as `eval_steps`: optimizer steps, not micro-batches",
    "hfdc_val_test_split_ratio": "is not used: all rows that are held out are evaluation rows",
    "hfdc_num_proc": "is not used: rows are read by one process",
    "per_device_eval_batch_size": "is not used: evaluation takes the micro-batches of training",
    "logging_strategy": "is not used: `logging_steps` says when",
    "tf32": "is not used: `mixed_precision` says how matrix products are computed",
}
"""Accepted, and said on stderr that it means something else here, or nothing."""

REFUSED = {
    "config": "is no key: give several files as `--config base.yaml --config other.yaml`",
    "hf_token": "would be written to the run folder: set HF_TOKEN in the environment instead",
    "server_api_key": "would be written to the run folder: set VLLM_API_KEY in the environment instead",
}
"""Keys that would do harm; the sentence says what to do instead."""

SECTION_VALUES = {"optim": "optimizer"}
"""Keys that are sections here, and the key in them that a bare text means (transformers' `optim: adamw_8bit`)."""

OVERRIDES = ("full_ft", "use_wandb", "eval_strategy", "evaluation_strategy", "save_strategy")
"""These win over our key beside them in the same file; any other two names for one key are refused."""

Values = dict[str, Any]


def _full_ft(layer: Values, current: Values) -> Values:
    """`full_ft: true` is LoRA rank 0, over a `lora_r` beside it; `false` brings LoRA back where a lower layer had 0."""
    if layer["full_ft"]:
        return {"lora_r": 0}
    return {"lora_r": 32} if current.get("lora_r") == 0 and "lora_r" not in layer else {}


def _use_wandb(layer: Values, current: Values) -> Values:
    """Adds `wandb` to `report_to`, or takes it out."""
    trackers = current.get("report_to", "none")
    if isinstance(trackers, str):
        trackers = [name.strip() for name in trackers.split(",")]
    others = [name for name in trackers if name not in ("none", "wandb")]
    return {"report_to": (others + ["wandb"] if layer["use_wandb"] else others) or "none"}


def _bf16(layer: Values, current: Values) -> Values:
    """transformers' flag: false asks for full precision."""
    return {"mixed_precision": "bf16" if layer["bf16"] else "no"}


def _fp16(layer: Values, current: Values) -> Values:
    if layer["fp16"]:
        raise ValueError("`fp16` needs loss scaling, which these loops do not have: set `bf16: true`.")
    return {}


def _data_dir(layer: Values, current: Values) -> Values:
    """The Lightning scripts' folder for processed rows: the rows themselves, unless the same layer names a data set
    (which is then read straight from its source, and cached by `datasets`)."""
    return {} if "dataset_name" in layer else {"dataset_name": layer["data_dir"]}


def _limit_val_batches(layer: Values, current: Values) -> Values:
    """N batches become N rows: exact for micro-batches of one row on one process, fewer rows elsewhere. 1.0 is all."""
    limit = layer["limit_val_batches"]
    if isinstance(limit, float) and limit == 1.0:
        return {"max_eval_samples": 0}
    if limit < 1 or limit != int(limit):
        raise ValueError(
            f"`limit_val_batches: {limit}` has no counterpart: set `max_eval_samples` to a number of rows, or leave "
            "out the evaluation rows."
        )
    return {"max_eval_samples": int(limit)}


def _val_check_interval(layer: Values, current: Values) -> Values:
    interval = layer["val_check_interval"]
    if isinstance(interval, float):
        raise ValueError(
            f"`val_check_interval: {interval}` is a part of an epoch: set `eval_steps` to a number of steps."
        )
    return {"eval_steps": interval}


def _train_split_ratio(layer: Values, current: Values) -> Values:
    return {"eval_split_ratio": round(1.0 - layer["hfdc_train_split_ratio"], 12)}


def _strategy(key: str, steps: str) -> Callable[[Values, Values], Values]:
    """transformers' `no`, `steps` or `epoch`; everything here is counted in steps, and 0 is off."""

    def read(layer: Values, current: Values) -> Values:
        if layer[key] not in ("no", "steps"):
            raise ValueError(f"`{key}: {layer[key]}` has no counterpart: set `{steps}` to a number of steps.")
        return {steps: 0} if layer[key] == "no" else {}

    return read


def _launcher(layer: Values, current: Values) -> Values:
    """How many processes there are is decided before any loop starts."""
    nodes, per_node = layer.get("num_nodes", 1), layer.get("gpus_per_node", 8)
    line = f"accelerate launch --num_machines {nodes} --num_processes {nodes * per_node}"
    if nodes * per_node > 1:
        line += " --multi_gpu"
    if nodes > 1:
        line += " --machine_rank RANK --main_process_ip FIRST_NODE --main_process_port 29500"
    raise ValueError(
        f"`num_nodes` and `gpus_per_node` belong to the launcher: leave them out and put `{line}` in the place of "
        f"`python`{', on every node with its own RANK' if nodes > 1 else ''}."
    )


COMPUTED: dict[str, tuple[Any, Callable[[Values, Values], Values]]] = {
    "full_ft": (bool, _full_ft),
    "use_wandb": (bool, _use_wandb),
    "bf16": (bool, _bf16),
    "fp16": (bool, _fp16),
    "eval_strategy": (str, _strategy("eval_strategy", "eval_steps")),
    "evaluation_strategy": (str, _strategy("evaluation_strategy", "eval_steps")),
    "save_strategy": (str, _strategy("save_strategy", "save_steps")),
    "data_dir": (str, _data_dir),
    "limit_val_batches": (int | float, _limit_val_batches),
    "val_check_interval": (int | float, _val_check_interval),
    "hfdc_train_split_ratio": (float, _train_split_ratio),
    "num_nodes": (int, _launcher),
    "gpus_per_node": (int, _launcher),
}
"""Name -> its type, and the function (this layer, this layer over the lower ones and the defaults) -> our keys."""
