"""An optimizer's state by parameter name, as plain tensors that can be cut anew for another number of ranks.

Taken apart, the state is three things: `tensors` under keys NAME/KEY (shards where the parameter is sharded), a
`record` of everything else (class, groups, plain values, and how each tensor is put back), and `own`, what only this
rank can put back. torchao's 8-bit moments are a tensor subclass, codes and one scale per block of 256; they are stored
as codes and scales, so that a checkpoint holds plain tensors only and cutting them anew rounds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

_EIGHT_BIT_FROM = 4096  # torchao: fewer elements (of a rank's shard) keep their own precision


def optimizer_class(optimizer: torch.optim.Optimizer) -> str:
    """Name of the optimizer's class, below accelerate's wrapper, with the library in front where it is not torch's."""
    kind = type(_inner(optimizer))
    library = kind.__module__.partition(".")[0]
    return kind.__name__ if library == "torch" else f"{library}.{kind.__name__}"


def name_groups(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """Names of the parameters in each of the optimizer's groups, in its order."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def take_apart(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """(tensors, record, own) of an optimizer over `parameters`. Nothing is copied and no rank waits for another.

    The record of rank 0 stands for all: its shards are never the empty ones. Raises ValueError for a sharded state
    tensor that is not shaped as its parameter.
    """
    tensors: dict[str, Tensor] = {}
    own: dict[str, Any] = {}
    entries: dict[str, dict[str, tuple]] = {}
    groups = name_groups(optimizer, parameters)
    for name in (name for group in groups for name in group):
        parameter = parameters[name]
        entries[name] = {}
        for key, value in optimizer.state.get(parameter, {}).items():
            place = f"{name}/{key}"
            if not isinstance(value, Tensor):
                entries[name][key] = ("value", value)
                continue
            local: Any = value.to_local() if isinstance(value, DTensor) else value
            if isinstance(value, DTensor) and _cut_across_blocks(optimizer, parameter):
                own[place] = _parts(local)
                entries[name][key] = ("own",)
            elif _is_eight_bit(local):
                scale = _scale_shape(parameter, local.block_size)
                tensors |= _codes_and_scale(place, parameter, local, scale)
                entries[name][key] = ("8bit", local.signed, local.block_size, scale, value.dtype)
            else:
                if isinstance(value, DTensor) and value.shape != parameter.shape:
                    raise ValueError(
                        f"{optimizer_class(optimizer)} has {key} of shape {tuple(value.shape)} for the shards of "
                        f"{name} {tuple(parameter.shape)}, which cannot be stored: set optimizer to adamw_torch."
                    )
                entries[name][key] = ("tensor", tuple(value.shape), value.dtype)
                tensors[place] = value.detach()
    plain = optimizer.state_dict()["param_groups"]
    record = {
        "class": optimizer_class(optimizer),
        "groups": [{**group, "params": names} for group, names in zip(plain, groups, strict=True)],
        "state": {name: entry for name, entry in entries.items() if entry},
    }
    return tensors, record, own


def put_back(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    record: Mapping[str, Any],
    own: Mapping[str, Any],
) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """(targets, put): room for the stored tensors, cut as `parameters` are now, and what loads them once filled.

    own: what the same rank of as many took apart, else empty. The optimizer is not touched before `put()`. Raises
    ValueError, without a subject, where the state belongs to another optimizer, other groups, or fits no such cut.
    """
    names = name_groups(optimizer, parameters)
    if record["class"] != optimizer_class(optimizer) or [group["params"] for group in record["groups"]] != names:
        raise ValueError(
            f"belongs to another optimizer ({record['class']} over {len(record['groups'])} parameter groups, not "
            f"{optimizer_class(optimizer)} over {len(names)}): resume with the settings it was written with."
        )
    targets: dict[str, Tensor] = {}
    values: dict[tuple[str, str], Callable[[], Any]] = {}  # each makes one value of the state, after the reading
    for name, entries in record["state"].items():
        for key, (kind, *details) in entries.items():
            place, parameter = f"{name}/{key}", parameters[name]
            if kind == "value":
                values[name, key] = partial(_same, details[0])
            elif kind == "own":
                if place not in own:
                    raise ValueError(
                        f"has 8-bit moments of {name} whose blocks fit only the cut they were made in: resume on as "
                        f"many processes as wrote it."
                    )
                values[name, key] = partial(_joined, parameter, own[place])
            elif kind == "tensor":
                targets[place] = _room(parameter, key, *details)
                values[name, key] = partial(_same, targets[place])
            else:
                parts, values[name, key] = _eight_bit_room(place, parameter, *details)
                targets |= parts

    def put() -> None:
        numbers = {name: number for number, name in enumerate(name for group in names for name in group)}
        state: dict[int, dict[str, Any]] = {}
        for (name, key), value in values.items():
            state.setdefault(numbers[name], {})[key] = value()
        # Rates, decays and betas are this run's own: the schedule puts the rate of its step in.
        current = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        groups = [
            {**group, **now, "params": [numbers[name] for name in group["params"]]}
            for group, now in zip(record["groups"], current, strict=True)
        ]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        _page_again(_inner(optimizer))

    return targets, put


def _inner(optimizer: torch.optim.Optimizer) -> Any:
    """The optimizer below accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _same(value: Any) -> Any:
    return value


def _room(parameter: Tensor, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Room for a state tensor: shards where the parameter has them and the shape is its own, else a whole tensor."""
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


def _like(parameter: Tensor, local: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """This rank's part of a tensor (of `shape`, the parameter's by default) that is cut like the parameter."""
    if not isinstance(parameter, DTensor):
        return local
    whole = torch.Size(shape if shape is not None else parameter.shape)
    stride = torch.empty(whole, device="meta").stride()
    mesh, placements = parameter.device_mesh, parameter.placements
    moved = DTensor.from_local(local, mesh, placements, run_check=False, shape=whole, stride=stride)
    return moved.to(parameter.device)  # from_local moves to the mesh's device, which offloaded shards have left


# torchao's 8-bit moments


def _is_eight_bit(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "OptimState8bit"


def _shards(parameter: Tensor) -> int:
    """Number of parts a parameter's rows are cut into; 0 where it is cut in any other way."""
    if not isinstance(parameter, DTensor):
        return 1
    cuts = [(p, n) for p, n in zip(parameter.placements, parameter.device_mesh.shape, strict=True) if p.is_shard()]
    if not cuts:
        return 1
    return cuts[0][1] if len(cuts) == 1 and cuts[0][0] == Shard(0) else 0


def _cut_across_blocks(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    """Whether torchao's moments of this parameter cannot be told as one whole: not every (non-empty) shard has 8 bits,
    or blocks do not lie at the same places as in a whole. Every rank finds the same, from sizes alone."""
    block = getattr(_inner(optimizer), "block_size", None)
    if block is None or not optimizer_class(optimizer).startswith("torchao."):
        return False
    count = _shards(parameter)
    if count == 0:
        return True
    rows, row = parameter.shape[0], parameter.numel() // parameter.shape[0]
    most = -(-rows // count)  # rows of all shards but the last ones, as torch.chunk cuts
    sizes = [row * max(0, min(most, rows - rank * most)) for rank in range(count)]
    eight = {size >= _EIGHT_BIT_FROM and size % block == 0 for size in sizes if size}
    return len(eight) > 1 or (True in eight and not _blocks_fit(parameter, block))


def _blocks_fit(parameter: Tensor, block: int) -> bool:
    """Whether each shard is whole blocks of the whole tensor."""
    count, rows, row = _shards(parameter), parameter.shape[0], parameter.numel() // parameter.shape[0]
    return count > 0 and (row % block == 0 or (rows % count == 0 and rows // count * row % block == 0))


def _scale_shape(parameter: Tensor, block: int) -> tuple[int, ...]:
    """Shape of the scales of a whole moment: by row where rows are whole blocks, so that they are cut as rows are."""
    rows, row = parameter.shape[0], parameter.numel() // parameter.shape[0]
    return (rows, row // block) if row % block == 0 else (parameter.numel() // block,)


def _codes_and_scale(place: str, parameter: Tensor, moment: Any, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The two tensors of an 8-bit moment, cut like the parameter; they share its memory."""
    scale = moment.scale.view(-1, *shape[1:])
    return {f"{place}.codes": _like(parameter, moment.codes), f"{place}.scale": _like(parameter, scale, shape)}


def _eight_bit_room(
    place: str, parameter: Tensor, signed: bool, block: int, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
    """Room for an 8-bit moment, and what makes it once filled; where its blocks do not fit this cut, what it stands
    for is kept in the parameter's own precision."""
    from torchao.optim.subclass_8bit import OptimState8bit

    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if local.numel() == 0:
        return {}, lambda: torch.empty_like(parameter.detach())
    if _blocks_fit(parameter, block):
        moment = OptimState8bit.zeros(local.shape, signed, block, local.device, dtype)
        parts = _codes_and_scale(place, parameter, moment, shape)

        def filled() -> Tensor:  # a copy onto itself, except where offloaded shards made `_like` copy
            for tensor, source in zip((moment.codes, moment.scale), parts.values(), strict=True):
                tensor.copy_((source.to_local() if isinstance(source, DTensor) else source).view(tensor.shape))
            return _like(parameter, moment)

        return parts, filled
    whole = OptimState8bit.zeros(parameter.shape, signed, block, "cpu", dtype)
    parts = {f"{place}.codes": whole.codes, f"{place}.scale": whole.scale.view(shape)}

    def dequantised() -> Tensor:
        values = whole.dequantize(dtype).to(local.device)
        if not isinstance(parameter, DTensor):
            return values
        return distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)

    return parts, dequantised


def _parts(local: Any) -> dict[str, Any]:
    """A rank's moment in types that `torch.load(weights_only=True)` reads."""
    if not _is_eight_bit(local):
        return {"plain": local}
    return {"codes": local.codes, "scale": local.scale, "signed": local.signed, "dtype": local.dtype}


def _joined(parameter: Tensor, parts: Mapping[str, Any]) -> Tensor:
    """What `_parts` took apart, on the parameter's device and as its shard."""
    if "plain" in parts:
        return _like(parameter, parts["plain"].to(parameter.device))
    from torchao.optim.subclass_8bit import OptimState8bit

    codes, scale = parts["codes"], parts["scale"]
    block = codes.numel() // scale.numel()
    moment = OptimState8bit.zeros(codes.shape, parts["signed"], block, parameter.device, parts["dtype"])
    moment.codes.copy_(codes)
    moment.scale.copy_(scale)
    return _like(parameter, moment)
