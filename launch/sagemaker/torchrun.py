"""The same job under the SDK's own launcher: what our entry does inside the job is done before, in the config sent.

torchrun starts the loop's file and reads no accelerate config. So the loop gets one whole config with the job's folders
in it, and the sharding that the config asks for becomes the variables that `accelerate launch` would have set.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.sagemaker.places import find_places

if TYPE_CHECKING:
    from loops.shared.sharding import Sharding


def job_config(config: Any, channels: Mapping[str, Any], loop: str) -> Any:
    """The loop's config as it is inside a job with these channels; its `fsdp` section left to the launcher."""
    places = find_places()
    rows = ("preferences", "training") if loop == "dpo" else ("training", "preferences")
    values: dict[str, Any] = {
        "output_dir": str(places.checkpoints),
        "resume_from": "latest",
        "run_name": config.run.run_name or f"{loop}-{time.strftime('%Y%m%d-%H%M%S')}",  # else the folder's
        "fsdp": {},
        "fsdp_config": {},
        "cpu_offload": False,
    }
    for key, names in {"model_id": ("models",), "dataset_name": rows, "eval_dataset_name": ("validation",)}.items():
        for name in [name for name in names if name in channels][:1]:
            folder = places.base / "input/data" / name
            local = isinstance(channels[name], str) and Path(channels[name]).is_file()
            values[key] = str(folder / Path(channels[name]).name if local else folder)
    if "dataset_name" in values:  # the config's evaluation rows go with its training rows
        values.setdefault("eval_dataset_name", None)
    return _with(config, values)


def sharding_environment(sharding: Sharding | None, *, machines: int) -> dict[str, str]:
    """The variables that mean this sharding to a loop: `read_launcher_sharding` is its inverse. Empty for None."""
    if sharding is None:
        return {}
    flags = {
        "RESHARD_AFTER_FORWARD": sharding.reshard_after_forward,
        "OFFLOAD_PARAMS": sharding.cpu_offload,
        "CPU_RAM_EFFICIENT_LOADING": sharding.cpu_ram_efficient_loading,
        "FORWARD_PREFETCH": sharding.forward_prefetch,
        "ACTIVATION_CHECKPOINTING": sharding.activation_checkpointing,
    }
    variables = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",  # accelerate's default wraps nothing
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        **{f"FSDP_{name}": str(value).lower() for name, value in flags.items()},
    }
    if sharding.layer_classes:
        variables["FSDP_TRANSFORMER_CLS_TO_WRAP"] = ",".join(sharding.layer_classes)
    copies = sharding.dp_replicate_size or machines  # 0 is one copy a machine
    if copies > 1:
        variables["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] = str(copies)
    return variables


def _with(config: Any, values: Mapping[str, Any]) -> Any:
    """The config with some leaves replaced, in whichever section they are."""
    changes = {}
    for entry in fields(config):
        current = getattr(config, entry.name)
        if is_dataclass(current):
            changes[entry.name] = _with(current, values)
        elif entry.name in values:
            changes[entry.name] = values[entry.name]
    return replace(config, **changes)
