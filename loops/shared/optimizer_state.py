"""An optimizer's state by parameter name, as plain tensors that can be sharded over another number of ranks.

The state is three things: `tensors` under keys NAME/KEY (shards where the parameter is sharded), a `record` of
everything else (class, groups, plain values, how each tensor is loaded), and `local`, what only this rank can load
again: torchao's 8-bit moments of a shard, since blocks of 256 elements share a scale and do not fit another shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def optimizer_class(optimizer: torch.optim.Optimizer) -> str:
    """Name of the optimizer's class, below accelerate's wrapper, with the library in front where it is not torch's."""
    kind = type(_inner(optimizer))
    library = kind.__module__.partition(".")[0]
    return kind.__name__ if library == "torch" else f"{library}.{kind.__name__}"


def state_to_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """(tensors, record, local) of an optimizer over `parameters`. Nothing is copied and no rank waits for another.

    The record of rank 0 stands for all: its shards are never the empty ones. Raises ValueError for a sharded state
    tensor that is not shaped as its parameter.
    """
    tensors: dict[str, Tensor] = {}
    local: dict[str, Any] = {}
    entries: dict[str, dict[str, tuple]] = {}
    groups = _name_groups(optimizer, parameters)
    for name in (name for group in groups for name in group):
        parameter = parameters[name]
        entries[name] = {}
        for key, value in optimizer.state.get(parameter, {}).items():
            path = f"{name}/{key}"
            if not isinstance(value, Tensor):
                entries[name][key] = ("value", value)
            elif isinstance(value, DTensor) and optimizer_class(optimizer).startswith("torchao."):
                local[path] = _shard_to_tensors(value.to_local())
                entries[name][key] = ("local",)
            elif _is_eight_bit(value):
                moment: Any = value
                tensors |= {f"{path}.codes": moment.codes, f"{path}.scale": moment.scale}
                entries[name][key] = ("8bit", moment.signed, moment.block_size, moment.dtype)
            else:
                if isinstance(value, DTensor) and value.shape != parameter.shape:
                    raise ValueError(
                        f"{optimizer_class(optimizer)} has {key} of shape {tuple(value.shape)} for the shards of "
                        f"{name} {tuple(parameter.shape)}, which cannot be stored: set optimizer to adamw_torch."
                    )
                entries[name][key] = ("tensor", tuple(value.shape), value.dtype)
                tensors[path] = value.detach()
    plain = optimizer.state_dict()["param_groups"]
    record = {
        "class": optimizer_class(optimizer),
        "groups": [{**group, "params": names} for group, names in zip(plain, groups, strict=True)],
        "state": {name: entry for name, entry in entries.items() if entry},
    }
    return tensors, record, local


def load_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    record: Mapping[str, Any],
    local: Mapping[str, Any],
) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """(targets, load): empty tensors for the stored ones, sharded as `parameters` are, and what loads them once filled.

    local: of the same rank, where as many ranks wrote it, else empty. The optimizer is not touched before `load()`.
    Raises ValueError, without a subject, where the state belongs to another optimizer, other groups or other shards.
    """
    names = _name_groups(optimizer, parameters)
    if record["class"] != optimizer_class(optimizer) or [group["params"] for group in record["groups"]] != names:
        raise ValueError(
            f"belongs to another optimizer ({record['class']} over {len(record['groups'])} parameter groups, not "
            f"{optimizer_class(optimizer)} over {len(names)}): resume with the settings it was written with."
        )
    targets: dict[str, Tensor] = {}
    state: dict[str, dict[str, Any]] = {}
    for name, entries in record["state"].items():
        state[name] = {}
        for key, (kind, *details) in entries.items():
            path, parameter = f"{name}/{key}", parameters[name]
            sharded = isinstance(parameter, DTensor)
            if kind == "value":
                state[name][key] = details[0]
            elif kind == "tensor":
                state[name][key] = targets[path] = _empty(parameter, key, *details)
            elif kind == "8bit" and not sharded:
                moment = _eight_bit(parameter, *details)
                targets |= {f"{path}.codes": moment.codes, f"{path}.scale": moment.scale}
                state[name][key] = moment
            elif kind == "local" and sharded and _fits(parameter.to_local(), local.get(path)):
                state[name][key] = _shard_from_tensors(parameter, local[path])
            else:
                raise ValueError(
                    f"has 8-bit moments of {name} whose blocks fit only the shards that they were made for: resume on "
                    "as many processes as wrote it, with the same fsdp settings."
                )

    def load() -> None:
        numbers = {name: number for number, name in enumerate(name for group in names for name in group)}
        # Rates, decays and betas are this run's own: the schedule puts the rate of its step in.
        current = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        groups = [
            {**group, **now, "params": [numbers[name] for name in group["params"]]}
            for group, now in zip(record["groups"], current, strict=True)
        ]
        numbered = {numbers[name]: values for name, values in state.items()}
        optimizer.load_state_dict({"state": numbered, "param_groups": groups})
        _page_again(_inner(optimizer))

    return targets, load


def _name_groups(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """Names of the parameters in each of the optimizer's groups, in its order."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _inner(optimizer: torch.optim.Optimizer) -> Any:
    """The optimizer below accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _empty(parameter: Tensor, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty state tensor: shards where the parameter has them and the shape is its own, else a whole tensor."""
    if tuple(parameter.shape) == tuple(shape) and key != "step":  # a scalar parameter's moments look like `step`
        return torch.empty_like(parameter.detach(), dtype=dtype)
    if isinstance(parameter, DTensor) and math.prod(shape) > 1:
        raise ValueError(
            f"has {key} of shape {tuple(shape)} for a parameter of {tuple(parameter.shape)}, which cannot be cut into "
            f"shards: resume without fsdp."
        )
    return torch.empty(shape, dtype=dtype)  # torch itself puts `step` where the optimizer wants it


def _page_again(optimizer: Any) -> None:
    """bitsandbytes' paged optimizers load their moments into GPU memory proper: move them to pages, as when new."""
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for key in ("state1", "state2"):
            if key in state and parameter.device.type != "cpu":
                state[key] = optimizer.get_state_buffer(parameter, dtype=state[key].dtype).copy_(state[key])


# torchao's moments: 8-bit codes with one scale per block, or plain tensors where a shard has few elements


def _is_eight_bit(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "OptimState8bit"


def _eight_bit(like: Tensor, signed: bool, block: int, dtype: torch.dtype) -> Any:
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit.zeros(like.shape, signed, block, like.device, dtype)


def _shard_to_tensors(moment: Any) -> dict[str, Any]:
    """A rank's moment in types that `torch.load(weights_only=True)` reads."""
    if not _is_eight_bit(moment):
        return {"plain": moment}
    kind = (moment.signed, moment.block_size, moment.dtype)
    return {"codes": moment.codes, "scale": moment.scale, "kind": kind}


def _fits(shard: Tensor, tensors: Mapping[str, Any] | None) -> bool:
    return tensors is not None and tensors["plain" if "plain" in tensors else "codes"].shape == shard.shape


def _shard_from_tensors(parameter: DTensor, shard: Mapping[str, Any]) -> Tensor:
    """What `_shard_to_tensors` took, on the parameter's device and sharded like it."""
    if "plain" in shard:
        moment = shard["plain"].to(parameter.device)
    else:
        moment = _eight_bit(parameter.to_local(), *shard["kind"])
        moment.codes.copy_(shard["codes"])
        moment.scale.copy_(shard["scale"])
    mesh, placements = parameter.device_mesh, parameter.placements
    made = DTensor.from_local(
        moment, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return made.to(parameter.device)  # from_local moves to the mesh's device, which offloaded shards have left
