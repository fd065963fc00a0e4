"""Other names for our settings: in SageMaker's `args.yaml`, transformers, TRL and Lightning scripts.

A name here only counts where the loop's Config has no key of that name. Every entry has a test.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_NAMES = {
    "model_id": "model_name model_name_or_path hf_model_id base_model",
    "revision": "model_revision",
    "tokenizer_id": "tokenizer_name tokenizer_name_or_path tokenizer_path",
    "torch_dtype": "dtype",
    "compile": "torch_compile",
    "lora_r": "lora_rank",
    "lora_target_modules": "target_modules lora_target",
    "modules_to_save": "lora_modules_to_save",
    "learning_rate": "lr max_learning_rate",
    "min_learning_rate": "min_lr",
    "lr_scheduler_type": "lr_scheduler",
    "max_grad_norm": "gradient_clipping gradient_clip_val",
    "num_train_epochs": "epochs num_epochs",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "accumulate_grad_batches",
    "logging_steps": "log_every_n_steps",
    "max_seq_length": "max_length sequence_len seq_length max_seq_len model_max_length cutoff_len",
    "max_completion_length": "max_new_tokens",
    "reward_functions": "reward_funcs",
    "num_iterations": "num_ppo_epochs",
    "dataset_name": "train_dataset_path dataset dataset_path train_file hfdc_dataset_name",
    "dataset_config": "dataset_config_name hfdc_dataset_config",
    "dataset_split": "dataset_train_split hfdc_split",
    "eval_dataset_name": "val_dataset_path test_dataset_path eval_dataset val_dataset validation_file",
    "eval_dataset_split": "dataset_test_split",
    "input_template": "hfdc_input_template",
    "output_template": "hfdc_output_template",
    "field_mapping": "hfdc_field_mapping",
    "run_name": "wandb_name wandb_run_name mlflow_run_name",
    "mlflow_experiment_name": "experiment_name wandb_project",
    "mlflow_uri": "mlflow_tracking_uri",
    "collective_timeout": "ddp_timeout",
}
RENAMED = {other: ours for ours, others in _NAMES.items() for other in others.split()}
"""Another name for one of our keys, with the same values."""

_NOTES = {
    "is read as `dataset_name`, or not at all where the file also has `dataset_name`": "data_dir",
    "is read as `max_eval_samples`: rows over all processes, not batches": "limit_val_batches",
    "is read as `eval_steps`: optimizer steps, not micro-batches": "val_check_interval",
    "is not used: all rows that are held out are evaluation rows": "hfdc_val_test_split_ratio",
    "is not used: evaluation takes the micro-batches of training, and samples `max_decode_batch` at once": (
        "per_device_eval_batch_size eval_batch_size eval_accumulation_steps"
    ),
    "is not used: checkpoints are in `checkpoints` of `output_dir`": "checkpoint_dir",
    "is not used: `max_seq_length` is for prompt and completion together": "max_prompt_length",
    "is not used: models are fetched completely, into HF_HOME": "use_snapshot_download cache_dir",
    "is not used: `seed` draws the rows, anew in each epoch, and a resumed run goes on with the rows that come next": (
        "data_seed shuffle shuffle_dataset ignore_data_skip"
    ),
    "is not used: the launcher says where each process runs": "local_rank use_cpu no_cuda ddp_backend",
    "is not used: every trained parameter has a gradient, and checkpointing is non-reentrant": (
        "ddp_find_unused_parameters gradient_checkpointing_kwargs use_reentrant"
    ),
    "is not used: each process reads and encodes the rows before training; conversations may be JSON text": (
        "hfdc_num_proc dataset_num_proc preprocessing_num_workers num_workers dataloader_num_workers "
        "dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers remove_unused_columns "
        "deserialize_messages"
    ),
    "is not used: rows are packed, none sees another, and nothing is padded": (
        "group_by_length pad_token padding_free sample_packing eval_packing pad_to_sequence_len label_pad_token_id"
    ),
    "is not used: the loss never holds the logits of all tokens, and is divided by one count over all processes": (
        "use_liger_kernel use_liger average_tokens_across_devices"
    ),
    "is not used: a loop trains, and evaluates where evaluation rows are named; `launch.evaluate` evaluates alone": (
        "do_train do_eval eval_on_start"
    ),
    "is not used: the first process logs into the run's folder, the first step and then every `logging_steps`": (
        "log_on_each_node logging_dir logging_first_step logging_strategy disable_tqdm include_tokens_per_second "
        "include_num_input_tokens_seen"
    ),
    "is not used: weights are written as safetensors, and pushed by `hf upload`, of the run's `model` folder": (
        "save_safetensors hub_model_id hub_strategy"
    ),
    "is not used: `mixed_precision` says how matrix products are computed": "tf32 bf16_full_eval",
}
NOTES = {name: note for note, names in _NOTES.items() for name in names.split()}
"""Accepted, with a note on stderr that it means something else here, or nothing."""

_SECRET = "would be written to the run folder: set {} in the environment instead"
_REFUSED = {
    "is no key: give several files as `--config base.yaml --config other.yaml`": "config",
    _SECRET.format("HF_TOKEN"): "hf_token token hf_auth_token hub_token",
    _SECRET.format("WANDB_API_KEY"): "wandb_token wandb_api_key",
    _SECRET.format("VLLM_API_KEY"): "server_api_key",
    "has no counterpart: leave it out, and set `fsdp: full_shard` to shard with FSDP2": "deepspeed deepspeed_config",
    "has no counterpart: leave it out, and set `save_best: eval/loss`, `eval_steps` and `save_steps`": (
        "early_stopping_patience early_stopping_threshold"
    ),
    "has no counterpart: put chat_template.jinja into the tokenizer's folder, named by `tokenizer_id`": "chat_template",
    "has no counterpart: the reference is the model that training begins with; leave it out": (
        "ref_model ref_model_id reference_model"
    ),
    "has no counterpart: leave it out": "cache_implementation",
    "has no counterpart: leave it out; a step is `prompts_per_step` prompts, used `num_iterations` times": (
        "steps_per_generation generation_batch_size"
    ),
}
REFUSED = {name: reason for reason, names in _REFUSED.items() for name in names.split()}
"""Keys that would do harm, or ask for what does not exist here, and what to do instead."""

MEANS: dict[str, dict[str, Any]] = {
    "report_to": {"null": "none"},
    "max_grad_norm": {"null": 0.0},
    **dict.fromkeys(("save_total_limit", "eval_steps", "save_steps"), {"null": 0}),
    "top_k": {"-1": 0},
    "lora_target_modules": {"all": "all-linear"},
}
"""Key -> values, as text, that others write in it, and ours: no tracker, no clipping, all, never, off."""

SECTION_VALUES = {"optim": "optimizer"}
"""Section -> the key in it that a bare text means (transformers' `optim: adamw_8bit`)."""

OVERRIDES = (
    *("full_ft", "use_peft", "finetuning_type", "use_wandb"),
    *("eval_strategy", "evaluation_strategy", "save_strategy"),
)
"""These win over our own key in the same file; any other two names for one key are refused."""

Values = dict[str, Any]


def _full_ft(layer: Values, current: Values) -> Values:
    """`full_ft: true` is LoRA rank 0, also with a `lora_r` in the same file; `false` undoes a lower layer's rank 0."""
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


def _resume_from_checkpoint(layer: Values, current: Values) -> Values:
    given = layer["resume_from_checkpoint"]
    return {"resume_from": {"true": "latest", "false": "none", "": "none"}.get(str(given or "").lower(), given)}


ONE_VALUE = {
    "fp16": ("false", "set `bf16: true`, which needs no loss scaling"),
    "use_mxfp4": ("false", "set `load_in_4bit` or `load_in_8bit`"),
    "early_stopping": ("false", "leave it out, and set `save_best: eval/loss`, `eval_steps` and `save_steps`"),
    "init_lora_weights": ("true", "adapters begin as the base model; leave it out"),
    "lora_bias": ("none", "biases are not trained; leave it out"),
    "push_to_hub": ("false", "push the run's `model` folder with `hf upload`"),
    "sync_ref_model": ("false", "the reference stays as it is; leave it out"),
    "overwrite_output_dir": ("false", "give another `output_dir`, or `resume_from: latest`"),
    "load_best_model_at_end": ("false", "set `save_best`, and export that checkpoint with launch.export"),
}
"""Key -> the one value that says what happens anyway, and what to do instead of any other."""


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


def _limit_val_batches(layer: Values, current: Values) -> Values:
    """N batches become N rows: exact for micro-batches of one row on one process, fewer rows elsewhere. 1.0 is all."""
    limit = layer["limit_val_batches"]
    if isinstance(limit, float) and limit == 1.0:
        return {"max_eval_samples": 0}
    if limit < 1 or limit != int(limit):
        raise ValueError(
            f"`limit_val_batches: {limit}` has no counterpart: set `max_eval_samples` to a number of rows."
        )
    return {"max_eval_samples": int(limit)}


def _val_check_interval(layer: Values, current: Values) -> Values:
    interval = layer["val_check_interval"]
    if isinstance(interval, float):
        raise ValueError(f"`val_check_interval: {interval}` is a part of an epoch: set `eval_steps` in steps.")
    return {"eval_steps": interval}


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
    "fast_inference": (bool, lambda layer, _: {"engine": "vllm" if layer["fast_inference"] else "transformers"}),
    "dataset_text_field": (  # `text` is TRL's default, also where rows have other columns
        str,
        lambda layer, _: {} if (at := layer["dataset_text_field"]) == "text" else {"field_mapping": {"text": at}},
    ),
    "val_set_size": (int | float, _val_set_size),
    "metric_for_best_model": (  # `eval_loss` or `loss` is our `eval/loss`
        str,
        lambda layer, _: {"save_best": "eval/" + re.sub("^eval[_/]", "", layer["metric_for_best_model"])},
    ),
    "resume_from_checkpoint": (str | bool | None, _resume_from_checkpoint),
    **{key: (str | bool, _one_value(key)) for key in ONE_VALUE},
    "use_wandb": (bool, _use_wandb),
    "bf16": (bool, lambda layer, _: {"mixed_precision": "bf16" if layer["bf16"] else "no"}),
    "eval_strategy": (str, _strategy("eval_strategy", "eval_steps")),
    "evaluation_strategy": (str, _strategy("evaluation_strategy", "eval_steps")),
    "save_strategy": (str, _strategy("save_strategy", "save_steps")),
    "data_dir": (str, lambda layer, _: {} if "dataset_name" in layer else {"dataset_name": layer["data_dir"]}),
    "limit_val_batches": (int | float, _limit_val_batches),
    "val_check_interval": (int | float, _val_check_interval),
    "hfdc_train_split_ratio": (
        float,
        lambda layer, _: {"eval_split_ratio": round(1 - layer["hfdc_train_split_ratio"], 12)},
    ),
    "num_nodes": (int, _launcher),
    "gpus_per_node": (int, _launcher),
}
"""Name -> its type, and the function (this layer, this layer over the lower ones and the defaults) -> our keys."""
