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
    "base_model": "model_id",
    "model_revision": "revision",
    "dtype": "torch_dtype",
    "target_modules": "lora_target_modules",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "gradient_clipping": "max_grad_norm",
    "gradient_clip_val": "max_grad_norm",
    "sequence_len": "max_seq_length",
    "model_max_length": "max_seq_length",
    "max_new_tokens": "max_completion_length",
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
    "per_device_eval_batch_size": "is not used: evaluation takes the micro-batches of training, and what it samples "
    "`max_decode_batch` at once",
    "checkpoint_dir": "is not used: checkpoints are in `checkpoints` of the run's folder, which is `output_dir`",
    "max_prompt_length": "is not used: `max_seq_length` is for prompt and completion together",
    "deserialize_messages": "is not used: conversations are read as JSON text, too",
    "use_snapshot_download": "is not used: models are always fetched whole",
    "ignore_data_skip": "is not used: a resumed run goes on with the rows that come next",
    "log_on_each_node": "is not used: the first process speaks for all",
    "ddp_find_unused_parameters": "is not used: a loss reaches all trained parameters",
    "gradient_checkpointing_kwargs": "is not used: checkpointing is non-reentrant",
    **dict.fromkeys(
        ("dataloader_num_workers", "dataloader_pin_memory"), "is not used: rows are encoded before training"
    ),
    **dict.fromkeys(("dataset_num_proc", "preprocessing_num_workers"), "is not used: rows are read by one process"),
    "group_by_length": "is not used: rows are packed, so nothing is padded",
    "remove_unused_columns": "is not used: columns that nobody asks for stay out of the way",
    "pad_token": "is not used: nothing is padded",
    "use_liger_kernel": "is not used: the loss never holds the logits of all tokens",
    "do_train": "is not used: a loop trains; `launch.evaluate` evaluates",
    "do_eval": "is not used: naming evaluation rows asks for it",
    "logging_dir": "is not used: logs are in the run's folder",
    "logging_first_step": "is not used: the first step is always logged",
    "disable_tqdm": "is not used: the bar is for terminals only",
    "logging_strategy": "is not used: `logging_steps` says when",
    "tf32": "is not used: `mixed_precision` says how matrix products are computed",
}
"""Accepted, and said on stderr that it means something else here, or nothing."""

REFUSED = {
    "config": "is no key: give several files as `--config base.yaml --config other.yaml`",
    **dict.fromkeys(
        ("hf_token", "token", "hf_auth_token"),
        "would be written to the run folder: set HF_TOKEN in the environment instead",
    ),
    **dict.fromkeys(
        ("wandb_token", "wandb_api_key"),
        "would be written to the run folder: set WANDB_API_KEY in the environment instead",
    ),
    "deepspeed": "has no counterpart: leave it out, and set `fsdp: full_shard` to shard with FSDP2",
    "steps_per_generation": "has no counterpart: leave it out; `prompts_per_step` rollouts make one step, used "
    "`num_iterations` times",
    "server_api_key": "would be written to the run folder: set VLLM_API_KEY in the environment instead",
}
"""Keys that would do harm, or ask for what is not here; the sentence says what to do instead."""

MEANS: dict[str, dict[str, Any]] = {
    "report_to": {"null": "none"},
    "max_grad_norm": {"null": 0.0},
    **dict.fromkeys(("save_total_limit", "eval_steps", "save_steps"), {"null": 0}),
    "top_k": {"-1": 0},
}
"""Values that others write in keys of the same name, as text, and ours: no tracker, no clipping, all, never, off."""

SECTION_VALUES = {"optim": "optimizer"}
"""Keys that are sections here, and the key in them that a bare text means (transformers' `optim: adamw_8bit`)."""

OVERRIDES = (
    *("full_ft", "use_peft", "finetuning_type", "use_wandb"),
    *("eval_strategy", "evaluation_strategy", "save_strategy"),
)
"""These win over our key beside them in the same file; any other two names for one key are refused."""

Values = dict[str, Any]


def _full_ft(layer: Values, current: Values) -> Values:
    """`full_ft: true` is LoRA rank 0, over a `lora_r` beside it; `false` brings LoRA back where a lower layer had 0."""
    if layer["full_ft"]:
        return {"lora_r": 0}
    return {"lora_r": 32} if current.get("lora_r") == 0 and "lora_r" not in layer else {}


def _finetuning_type(layer: Values, current: Values) -> Values:
    if layer["finetuning_type"] not in ("lora", "full"):
        raise ValueError(f"`finetuning_type: {layer['finetuning_type']}` has no counterpart: give lora or full.")
    return _full_ft({**layer, "full_ft": layer["finetuning_type"] == "full"}, current)


def _val_set_size(layer: Values, current: Values) -> Values:
    if not 0 <= layer["val_set_size"] < 1:
        raise ValueError("`val_set_size` in rows has no counterpart: give `eval_split_ratio`, a part of the rows.")
    return {"eval_split_ratio": float(layer["val_set_size"])}


def _metric_for_best_model(layer: Values, current: Values) -> Values:
    """transformers' `eval_loss` or `loss` is our `eval/loss`."""
    return {"save_best": "eval/" + layer["metric_for_best_model"].removeprefix("eval_").removeprefix("eval/")}


def _resume_from_checkpoint(layer: Values, current: Values) -> Values:
    given = layer["resume_from_checkpoint"]
    return {"resume_from": {"true": "latest", "false": "none", "": "none"}.get(str(given or "").lower(), given)}


ONE_VALUE = {
    "use_mxfp4": ("false", "set `load_in_4bit` or `load_in_8bit`"),
    "early_stopping": ("false", "leave it out, and set `save_best: eval/loss`, `eval_steps` and `save_steps`"),
    "init_lora_weights": ("true", "adapters begin as the base model; leave it out"),
    "lora_bias": ("none", "biases are not trained; leave it out"),
    "push_to_hub": ("false", "push the run's `model` folder with `hf upload`"),
    "sync_ref_model": ("false", "the reference stays as it is; leave it out"),
    "overwrite_output_dir": ("false", "give another `output_dir`, or `resume_from: latest`"),
    "load_best_model_at_end": ("false", "set `save_best`, and export that checkpoint with launch.export"),
}
"""Keys of which one value says what happens anyway, and any other asks for what is not here; what to do instead."""


def _one_value(key: str) -> Callable[[Values, Values], Values]:
    def read(layer: Values, current: Values) -> Values:
        given = str(layer[key]).lower()
        if given != ONE_VALUE[key][0]:
            raise ValueError(f"`{key}: {given}` has no counterpart: {ONE_VALUE[key][1]}.")
        return {}

    return read


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
    "use_peft": (bool, lambda layer, current: _full_ft({**layer, "full_ft": not layer["use_peft"]}, current)),
    "finetuning_type": (str, _finetuning_type),
    "use_vllm": (bool, lambda layer, _: {"engine": "vllm" if layer["use_vllm"] else "transformers"}),
    "val_set_size": (int | float, _val_set_size),
    "metric_for_best_model": (str, _metric_for_best_model),
    "resume_from_checkpoint": (str | bool | None, _resume_from_checkpoint),
    **{key: (str | bool, _one_value(key)) for key in ONE_VALUE},
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
