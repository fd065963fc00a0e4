"""A model below its wrappers, and its decoder layers: found, checkpointed, offloaded to host memory, resharded."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves

# How far logits of the same weights may differ, computed in two ways: root mean square of the difference over the
# standard deviation of the logits, by the coarsest dtype on the way. Measured on 28 to 36 random layers, adapter merged
# or not: 1e-6 in float32, 3e-3 to 5e-3 in float16, 0.02 to 0.04 in bfloat16.
LOGITS_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.1}
WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")  # in names: of activation checkpointing and torch.compile
MIN_BYTES = 2**16  # smaller tensors are not worth a copy
INDICES = (torch.int32, torch.int64)  # dtypes of what says where tokens are: small, and the same for all layers


def unwrap(model: nn.Module) -> Any:
    """The policy without DDP's wrapper: a transformers model, or peft's model around one."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def base_model(model: nn.Module) -> Any:
    """The causal LM below DDP and peft."""
    model = unwrap(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def plain_name(name: str) -> str:
    """A parameter's name without the parts that wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def largest_list(model: nn.Module) -> nn.ModuleList:
    """The `nn.ModuleList` with the most parameters, which is that of the decoder layers; empty without one."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=nn.ModuleList())


def layer_classes(model: nn.Module) -> list[str]:
    """Class names of the decoder layers: those that the model declares and has, else that of `largest_list`."""
    present = {type(module).__name__ for module in model.modules()}
    declared = set(getattr(model, "_no_split_modules", None) or ()) & present
    return sorted(declared or {type(block).__name__ for block in largest_list(model)})


def parameter_counts(model: nn.Module) -> tuple[int, int, int]:
    """(trainable parameters, all parameters, bytes that all of them take); 4-bit weights count unpacked."""
    trainable, total, size = 0, 0, 0
    for parameter in model.parameters():
        quant_state = getattr(parameter, "quant_state", None)
        count = quant_state.shape.numel() if quant_state is not None else parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
        size += parameter.numel() * parameter.element_size()
    return trainable, total, size


def checkpoint_activations(model: Any) -> None:
    """Recompute the decoder layers' activations in backward.

    Checkpoints without reentrance need no input that requires a gradient, so frozen embeddings stay frozen; and
    transformers' own put no wrapper between a module and its name.
    """
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.2x renamed it
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def reshard(model: nn.Module) -> None:
    """Back to the shards: after a forward without backward FSDP2 leaves its last units gathered. Inert elsewhere."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def offload_activations(model: nn.Module) -> None:
    """Keep what the decoder layers save for backward in host memory, in place; the numbers stay the same to the bit.

    With gradient checkpointing that is one tensor [N, H] per layer, otherwise every activation inside it. Weights, and
    what all layers share (positions, masks), stay on the GPU. Costs two copies over the bus per tensor, in the GPU's
    queue, so nothing waits on the host.

    The layers' class is replaced by a subclass of the same name. Call before sharding, before or after peft wraps the
    model; not with compiled layers. Raises ValueError where no repeated layer is found.
    """
    names = layer_classes(model)
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(f"activation_offloading finds no decoder layers in {type(model).__name__}: set it to false.")
    for original in {type(layer) for layer in layers if not isinstance(layer, _Offloaded)}:
        # same name, so that whoever looks for the layers' class (sharding, transformers) finds it
        members = {"__module__": original.__module__, "__qualname__": original.__qualname__}
        offloaded = type(original.__name__, (_Offloaded, original), members)
        for layer in layers:
            if type(layer) is original:
                layer.__class__ = offloaded


class _Offloaded(nn.Module):
    """Mixed into a decoder layer's class. Checkpointing wraps `forward`, what it keeps has to move: so `__call__`."""

    def __call__(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        shared = {_identity(leaf) for leaf in tree_leaves(kwargs) if type(leaf) is Tensor}
        copies: dict[tuple[int, int], tuple[_HostCopy, torch.UntypedStorage]] = {}

        def pack(tensor: Tensor) -> Any:
            if type(tensor) is not Tensor or tensor.untyped_storage().nbytes() < MIN_BYTES:
                return tensor
            if _identity(tensor) in shared or tensor.dtype in INDICES:
                return tensor
            # Looked up now, not once: FSDP puts whole weights in the place of its shards while the layer runs.
            if any(_identity(weight) == _identity(tensor) for weight in (*self.parameters(), *self.buffers())):
                return tensor
            # One copy for all tensors in a storage (an input that three projections save, views, transposes). Holding
            # the storage until the layer ends keeps its address from being reused; a write in between is a new version.
            key = (_identity(tensor), tensor._version)
            if key not in copies:
                storage = tensor.untyped_storage()
                copies[key] = (_HostCopy(storage), storage)
            return _Saved(copies[key][0], tensor.dtype, int(tensor.storage_offset()), tensor.size(), tensor.stride())

        with saved_tensors_hooks(pack, _unpack):
            output = super().__call__(*args, **kwargs)
        copies.clear()  # autograd keeps `pack` itself for as long as what it packed
        return output


class _HostCopy:
    """The bytes of one storage in host memory."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.device = storage.device
        source = torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)  # type: ignore[call-overload]
        # Pinned memory makes the copy one more piece of work in the GPU's queue: the source may be freed at once,
        # since whatever takes its place is queued behind.
        self.host = torch.empty(source.numel(), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        self.host.copy_(source, non_blocking=True)
        self.restored: Tensor | None = None

    def restore(self) -> torch.UntypedStorage:
        """The storage on its device again; kept for the others that saved it, and freed with the last of them."""
        if self.restored is None:
            self.restored = self.host.to(self.device, non_blocking=True)
        return self.restored.untyped_storage()


class _Saved(NamedTuple):
    """One saved tensor: its place in a storage that was copied."""

    copy: _HostCopy
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


def _unpack(saved: Any) -> Tensor:
    if not isinstance(saved, _Saved):
        return saved
    empty = torch.empty(0, dtype=saved.dtype, device=saved.copy.device)
    return empty.set_(saved.copy.restore(), saved.offset, saved.size, saved.stride)  # type: ignore[call-overload]


def _identity(tensor: Tensor) -> int:
    """What two tensors in one storage have in common, and no two storages that live at the same time."""
    return tensor.untyped_storage()._cdata
