"""FSDP2: settings read, an accelerator built from them, models prepared, and the shards checked.

accelerate makes the shards (`torch.distributed.fsdp.fully_shard`): one unit per decoder layer, one for the embedding,
one for final norm and head. Settings of FSDP1 are translated; those without an equivalent are named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    fsdp2_prepare_model,
)
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from loops.shared.layers import checkpoint_activations, layer_classes

if TYPE_CHECKING:
    from loops.shared.reference import Reference


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How parameters, gradients and optimizer state are split over processes."""

    reshard_after_forward: bool = True
    """Free gathered parameters after each layer's forward (FSDP1's full shard); False keeps them until backward
    (shard grad op): fewer gathers, more memory."""
    dp_replicate_size: int = 1
    """Copies of the sharded model (hybrid sharding): shards within a group, gradients averaged over groups. 0 is one
    copy per machine."""
    cpu_offload: bool = False
    """Keep shards, gradients and optimizer state in host memory, and run the optimizer there."""
    cpu_ram_efficient_loading: bool = False
    """Send every process its shards of the first process's weights; transformers 5.17 then reads on one process per
    machine alone, 5.23 on all."""
    forward_prefetch: bool = False
    """Gather the next layer while this one computes, by an explicit order (backward always does: BACKWARD_PRE)."""
    activation_checkpointing: bool = False
    """Another place to say `gradient_checkpointing`."""
    layer_classes: tuple[str, ...] = ()
    """Classes of the units; empty: found from the model."""
    ignored: tuple[str, ...] = ()
    """Sentences on settings that were given and have no effect."""


_STRATEGIES = {  # FSDP1's name -> (reshard_after_forward, hybrid)
    "full_shard": (True, False),
    "shard_grad_op": (False, False),
    "hybrid_shard": (True, True),
    "hybrid_shard_zero2": (False, True),
}
_FLAGS = {  # spelling -> field of Sharding
    "reshard_after_forward": "reshard_after_forward",
    "cpu_offload": "cpu_offload",
    "offload_params": "cpu_offload",
    "cpu_ram_efficient_loading": "cpu_ram_efficient_loading",
    "forward_prefetch": "forward_prefetch",
    "activation_checkpointing": "activation_checkpointing",
}
_WITHOUT_EFFECT = {  # FSDP1's setting -> the values that say what FSDP2 does; others are named and ignored
    "version": ("2",),
    "auto_wrap_policy": ("transformer_based_wrap",),
    "backward_prefetch": ("backward_pre",),
    "use_orig_params": (),
    "sync_module_states": (),
    "limit_all_gathers": (),
    "min_num_params": (),
    "state_dict_type": (),
}


def read_sharding(fsdp: str | Mapping[str, Any], further: Mapping[str, Any], cpu_offload: bool) -> Sharding | None:
    """The sharding that the settings mean, or None where they ask for none.

    fsdp: a mapping of settings, or transformers' string such as `full_shard auto_wrap offload`; further: transformers'
    `fsdp_config`. Keys may carry the prefix `fsdp_`, values are those of FSDP1 or FSDP2. Raises ValueError for an
    unknown word, key or value.
    """
    given = dict(fsdp) if isinstance(fsdp, Mapping) else _words(fsdp)
    if not given and not cpu_offload:
        if further:
            raise ValueError("fsdp_config is set without fsdp; add `fsdp: full_shard` (or drop fsdp_config).")
        return None
    values: dict[str, Any] = {"cpu_offload": cpu_offload}
    ignored: list[str] = []
    for spelled, value in {**given, **further}.items():
        key, text = spelled.lower().removeprefix("fsdp_"), str(value).strip().lower()
        if value is None:
            continue
        if key == "sharding_strategy":
            if text == "no_shard":
                return None
            if text not in _STRATEGIES:
                raise ValueError(f"fsdp: {key} is {value!r}; choose one of {', '.join(_STRATEGIES)} or no_shard.")
            values["reshard_after_forward"], hybrid = _STRATEGIES[text]
            if hybrid:
                values.setdefault("dp_replicate_size", 0)
        elif key in _FLAGS:
            values[_FLAGS[key]] = _flag(key, value) or (_FLAGS[key] == "cpu_offload" and values["cpu_offload"])
        elif key == "dp_replicate_size":
            values[key] = int(value)
        elif key in ("layer_classes", "transformer_layer_cls_to_wrap"):
            names = value.split(",") if isinstance(value, str) else list(value)
            values["layer_classes"] = tuple(name.strip() for name in names if name.strip())
        elif key not in _WITHOUT_EFFECT:
            known = ("sharding_strategy", *_FLAGS, "dp_replicate_size", "layer_classes", *_WITHOUT_EFFECT)
            raise ValueError(f"fsdp: there is no setting {key}; choose one of {', '.join(known)}.")
        elif text not in _WITHOUT_EFFECT[key]:
            ignored.append(f"fsdp_{key} {value}, which FSDP2 does not have (docs/sharding.md)")
    return Sharding(**values, ignored=tuple(ignored))


def _words(fsdp: str) -> dict[str, Any]:
    """transformers' string as a mapping."""
    given: dict[str, Any] = {}
    for word in str(fsdp or "").lower().replace(",", " ").split():
        if word in _STRATEGIES or word == "no_shard":
            given["sharding_strategy"] = word
        elif word == "offload":
            given["cpu_offload"] = True
        elif word in ("auto_wrap", "true"):
            given["auto_wrap_policy"] = "transformer_based_wrap"
        elif word != "false":
            raise ValueError(f"fsdp says {word!r}; it knows {', '.join(_STRATEGIES)}, no_shard, auto_wrap and offload.")
    return given


def read_launcher_sharding(environment: Mapping[str, str]) -> Sharding | None:
    """The sharding that `accelerate launch` puts into the environment for a config file with an `fsdp_config`."""
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    # Of the launcher's variables those that FSDP2 knows: it sets the others for everyone, asked or not.
    keys = ["OFFLOAD_PARAMS", "TRANSFORMER_CLS_TO_WRAP", "CPU_RAM_EFFICIENT_LOADING", "ACTIVATION_CHECKPOINTING"]
    keys += ["FORWARD_PREFETCH", "VERSION"]
    keys += ["SHARDING_STRATEGY" if environment.get("FSDP_VERSION") == "1" else "RESHARD_AFTER_FORWARD"]
    given: dict[str, Any] = {key: environment[f"FSDP_{key}"] for key in keys if environment.get(f"FSDP_{key}")}
    copies = environment.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE")
    if copies:
        given["dp_replicate_size"] = copies
    return read_sharding(given or {"reshard_after_forward": True}, {}, False)


def _flag(key: str, value: Any) -> bool:
    """A value of YAML, or of a command line, as true or false."""
    text = str(value).strip().lower()
    if text not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError(f"fsdp: {key} is {value!r}; give true or false.")
    return text in ("true", "1", "yes")


def build_accelerator(
    sharding: Sharding | None,
    *,
    precision: str,
    on_cpu: bool,
    processes: int,
    per_machine: int,
    timeout: timedelta | None = None,
) -> Accelerator:
    """accelerate's object for one process, DDP, or FSDP2 where `sharding` is given and there are several processes.

    processes: of the whole run; per_machine: of one machine. timeout: of the process group; None leaves torch's own.
    Raises ValueError where the copies of hybrid sharding do not divide the processes.
    """
    if processes == 1:
        return Accelerator(cpu=on_cpu, mixed_precision=precision)
    group = InitProcessGroupKwargs(timeout=timeout)
    if sharding is not None and sharding.cpu_offload and not on_cpu:
        group = InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo", timeout=timeout)  # norms of shards on the host
    if sharding is None:
        return Accelerator(cpu=on_cpu, mixed_precision=precision, kwargs_handlers=[group])
    copies = sharding.dp_replicate_size or max(1, processes // per_machine)
    if processes % copies or copies >= processes > 1 and copies != 1:
        raise ValueError(
            f"fsdp: dp_replicate_size is {copies}, which does not split {processes} processes into groups of several; "
            "give a divisor below their number."
        )
    policy = None
    if precision == "bf16":  # accelerate's own would also reduce, and give log-probabilities back, in bf16
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
        )
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=sharding.reshard_after_forward,
        cpu_offload=CPUOffloadPolicy(pin_memory=not on_cpu) if sharding.cpu_offload else False,
        mixed_precision_policy=policy,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=sharding.cpu_ram_efficient_loading,
        state_dict_type="SHARDED_STATE_DICT",
        activation_checkpointing=False,  # its wrappers hide adapters from peft; `prepare` uses transformers' own
    )
    if on_cpu:
        # accelerate shards on accelerators only. It decides by the kind of launch that PartialState found; device,
        # backend and ranks are fixed by then.
        state = PartialState(cpu=True, **group.to_kwargs())
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU
            state.device = torch.device("cpu")
    grid = ParallelismConfig(dp_replicate_size=copies, dp_shard_size=processes // copies) if copies > 1 else None
    accelerator = Accelerator(
        cpu=on_cpu, mixed_precision=precision, fsdp_plugin=plugin, parallelism_config=grid, kwargs_handlers=[group]
    )
    # FSDP2 computes in its policy's dtype by itself; autocast around some forwards and not others would make a
    # reference differ from the policy that it is a copy of.
    accelerator.native_amp = False
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the accelerator shards models over processes."""
    return accelerator.distributed_type == DistributedType.FSDP


def prepare(
    accelerator: Accelerator,
    policy: Any,
    optimizer: torch.optim.Optimizer,
    *,
    reference: Reference | None = None,
    sharding: Sharding | None = None,
) -> tuple[Any, Any]:
    """(policy, optimizer) made ready by accelerate; a reference that is a copy is sharded in the same way, in place.

    Under FSDP2 the result is checked: every layer a unit, every trainable element on exactly one process of a group,
    the dtype as asked. Raises ValueError where the model cannot be sharded so.
    """
    if sharding is not None and sharding.activation_checkpointing:
        checkpoint_activations(policy)
    if not is_sharded(accelerator):
        return accelerator.prepare(policy, optimizer)
    sharding = sharding or Sharding()
    narrow = [p for p in policy.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if narrow and accelerator.mixed_precision != "no":  # accelerate would widen them, and nobody else
        raise ValueError(
            "torch_dtype is bfloat16 and mixed_precision bf16, which under fsdp would train float32 copies; set "
            "mixed_precision: no, or torch_dtype: float32."
        )
    classes = list(sharding.layer_classes) or layer_classes(policy)
    present = {type(module).__name__ for module in policy.modules()}
    missing = [name for name in classes if name not in present]
    if missing or not classes:
        found = ", ".join(layer_classes(policy)) or "none: train this model with DDP"
        raise ValueError(f"fsdp: the model has no layer class {', '.join(missing)}; its layers are {found}.")
    plugin = accelerator.state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap = classes
    compute = getattr(plugin.mixed_precision_policy, "param_dtype", None)
    packed = next((p.dtype for p in policy.parameters() if type(p).__name__ == "Params4bit"), None)
    if packed and not (packed.is_floating_point and compute in (None, packed)):  # a cast would change the packed bits
        raise ValueError(
            f"bnb_4bit_quant_storage is {packed} and fsdp computes in {compute or packed}: make them one float dtype."
        )
    models = [policy] + ([reference.model] if reference is not None and reference.kind == "copy" else [])
    layers = [[module for module in model.modules() if type(module).__name__ in classes] for model in models]
    whole = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    prepared = accelerator.prepare(policy, optimizer)
    for model, units, elements in zip(models, layers, whole, strict=True):
        fsdp2_prepare_model(accelerator, model)  # the policy is ready; accelerate prepares no model without optimizer
        _check_shards(accelerator, model, units, elements)
        if sharding.forward_prefetch:
            for unit, following in zip(units, units[1:], strict=False):
                unit.set_modules_to_forward_prefetch([following])
    return prepared


def _check_shards(accelerator: Accelerator, model: nn.Module, layers: list, whole: int) -> None:
    """Assert that the model is what was asked for: sharding fails silently more often than loudly."""
    assert layers and all(isinstance(layer, FSDPModule) for layer in layers), "a decoder layer is no FSDP unit"
    rules = layers[0]._get_fsdp_state()._mp_policy
    wanted = (torch.bfloat16, torch.float32, torch.float32) if accelerator.mixed_precision == "bf16" else (None,) * 3
    assert (rules.param_dtype, rules.reduce_dtype, rules.output_dtype) == wanted, rules
    loose = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    assert not loose, f"{loose[0]} is not sharded"
    copies = 1 if accelerator.parallelism_config is None else accelerator.parallelism_config.dp_replicate_size
    here = torch.tensor(local_elements(model), dtype=torch.float64, device=accelerator.device)
    everywhere = accelerator.reduce(here, "sum").item()
    assert everywhere == whole * copies, f"{everywhere:.0f} elements in all shards of {copies} copies of {whole}"


def local_elements(model: nn.Module) -> int:
    """Elements of the model's parameters that this process holds."""
    return sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())


def sharding_line(accelerator: Accelerator, policy: nn.Module, sharding: Sharding | None) -> str:
    """One line for the log: what the run got, such as `sharded over 2 processes: 1,024 of 2,048 elements here`."""
    processes = accelerator.num_processes
    if not is_sharded(accelerator):
        unused = "; fsdp and cpu_offload have no effect on one process" if sharding is not None else ""
        return f"{processes} process{'es, each with a whole copy' if processes > 1 else ''}{unused}"
    grid = accelerator.parallelism_config
    copies = 1 if grid is None else grid.dp_replicate_size
    policy_dtype = getattr(accelerator.state.fsdp_plugin.mixed_precision_policy, "param_dtype", None)
    whole = sum(parameter.numel() for parameter in policy.parameters())
    return (
        f"sharded over {processes // copies} processes" + (f" in {copies} copies" if copies > 1 else "") + ": "
        f"{local_elements(policy):,} of {whole:,} elements here, "
        f"compute in {str(policy_dtype or next(policy.parameters()).dtype).removeprefix('torch.')}"
    )


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """All parameters unsharded inside the block, like FSDP1's `summon_full_params`; inert where nothing is sharded.

    Sampling needs it: processes decode different numbers of tokens, and a gather per layer and token would be slow
    even if they did not. Costs the memory of the whole model. Every process must enter.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not units:
        yield
        return
    groups = [unit._get_fsdp_state()._fsdp_param_groups for unit in units]  # torch has a setter and no getter
    before = [any(group.post_forward_mesh_info is not None for group in of_unit) for of_unit in groups]
    units[0].set_reshard_after_forward(False, recurse=True)
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit, reshards in zip(units, before, strict=True):
            unit.set_reshard_after_forward(reshards, recurse=False)
            unit.reshard()
