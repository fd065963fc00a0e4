"""Parameter groups, optimizer, learning-rate schedule and gradient clipping.

Step numbers count optimizer steps from 0: `learning_rate_at(0, ...)` is the rate of the first update.

Weights in bfloat16 are rounded stochastically. Rounding to nearest loses every update below half a unit in the last
place (most are, at a rate of 1e-5); rounded up with the right probability, the expected update is that in float32. The
noise depends on (seed, step, parameter, element) alone, so ranks, shards and resumed runs round alike.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from accelerate import Accelerator

SCHEDULES = ("cosine", "linear", "constant")
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")  # where torch has one kernel for the whole AdamW update
TORCH = ("adamw_torch", "adamw_torch_fused")  # one and the same here: fused wherever it can be
TORCHAO = ("adamw_torch_8bit",)
BITSANDBYTES = {  # transformers' name -> name in bitsandbytes.optim
    "adamw_8bit": "AdamW8bit",
    "adamw_bnb_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "lion_8bit": "Lion8bit",
    "lion_32bit": "Lion32bit",
    "paged_lion_8bit": "PagedLion8bit",
    "paged_lion_32bit": "PagedLion32bit",
}


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule."""

    optimizer: str = "adamw_torch"
    """adamw_torch, adamw_torch_8bit (torchao; also under FSDP), or of bitsandbytes (one process or DDP) adamw_8bit,
    paged_adamw_8bit, paged_adamw_32bit, lion_8bit, lion_32bit, paged_lion_8bit, paged_lion_32bit. 8 bits make the
    moments a quarter as large; paged moments move to host memory when the GPU's is short."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    min_learning_rate: float = 1e-7
    """Floor that the cosine and linear schedules end on."""
    lr_scheduler_type: str = "cosine"
    """cosine, linear or constant (each after warm-up)."""
    warmup_steps: int = 0
    """Steps at the start whose rates rise linearly; the step after them is the first at the peak."""
    warmup_ratio: float = 0.0
    """Warm-up as a part of all steps; used when `warmup_steps` is 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay; never on norms, biases and one-dimensional parameters."""
    adam_beta1: float = 0.9
    """Decay rate of the first moment."""
    adam_beta2: float = 0.999
    """Decay rate of the second moment (Lion's second rate, which its authors set to 0.99)."""
    adam_epsilon: float = 1e-8
    """Added to the root of the second moment (Lion has none)."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        known = (*TORCH, *TORCHAO, *BITSANDBYTES)
        if self.optimizer not in known:
            raise ValueError(f"optimizer is {self.optimizer!r}: choose one of {', '.join(known)}.")
        if self.lr_scheduler_type not in SCHEDULES:
            raise ValueError(f"lr_scheduler_type is {self.lr_scheduler_type!r}: choose one of {', '.join(SCHEDULES)}.")
        at_least_zero = ("learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "max_grad_norm")
        for key in at_least_zero:
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key} is {getattr(self, key)}: it must be a finite number of at least 0.")
        for key in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}: it must be at least 0 and below 1.")
        if not 0 < self.adam_epsilon < math.inf:
            raise ValueError(f"adam_epsilon is {self.adam_epsilon}: it must be a finite number above 0.")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}: it is a part of all steps, between 0 and 1.")
        if self.lr_scheduler_type != "constant" and self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate ({self.min_learning_rate}) is above learning_rate ({self.learning_rate}): "
                f"lower min_learning_rate, or set lr_scheduler_type to constant, which has no floor."
            )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in one group with decay and one without, in the model's order; empty groups are left out.

    Decay falls on matrices: linear weights, embeddings (as in the published Llama and Qwen recipes), LoRA matrices
    (which pulls towards the base model). It never falls on biases, on anything a norm owns, or on parameters with
    fewer than two dimensions (DoRA's magnitudes). Tied weights are counted once. Frozen parameters are in no group.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()  # parameters hash by identity
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()  # RMSNorm, LayerNorm, Qwen3RMSNorm, FSDPQwen3RMSNorm, ...
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            decays = parameter.ndim >= 2 and not is_norm and not name.endswith("bias")
            (decayed if decays else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, seed: int = 0, sharded: bool = False
) -> torch.optim.Optimizer:
    """The optimizer that `config.optimizer` names, over the trainable parameters in `parameter_groups`.

    AdamW: Loshchilov and Hutter 2019, algorithm 2; Lion: Chen et al. 2023, algorithm 2; moments of 8 bits: Dettmers et
    al. 2022. seed: of the stochastic rounding of bfloat16 weights. sharded: the parameters are, or will be, shards of
    FSDP2 (DTensors are recognised by themselves).

    Raises ValueError when the model has no trainable parameter, the optimizer's library is missing, or the optimizer
    does not work on this model's parameters.
    """
    groups = parameter_groups(model, config.weight_decay)
    if not groups:
        raise ValueError("the model has no trainable parameter: set lora_r above 0 (LoRA) or to 0 (all weights).")
    parameters = [parameter for group in groups for parameter in group["params"]]
    if config.optimizer not in TORCH and any(parameter.dtype == torch.float64 for parameter in parameters):
        raise ValueError(
            f"optimizer {config.optimizer} computes in float32, not float64: set optimizer to adamw_torch."
        )
    if config.optimizer in BITSANDBYTES:
        if sharded or any(isinstance(parameter, DTensor) for parameter in parameters):
            raise ValueError(
                f"optimizer {config.optimizer} (bitsandbytes) cannot update the shards of fsdp: use adamw_torch_8bit, "
                "or adamw_torch with cpu_offload: true."
            )
        with _installed(config.optimizer, "bitsandbytes"):
            return _bitsandbytes(model, groups, config, seed)
    if config.optimizer in TORCHAO:
        with _installed(config.optimizer, "torchao"):
            return _torchao(groups, config, seed)
    fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters)
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True if fused else None,  # None lets torch choose between foreach and a plain loop
    )
    if any(parameter.dtype == torch.bfloat16 for parameter in parameters):
        optimizer.rounding_seed = seed
        optimizer.step = MethodType(_step_rounded, optimizer)  # a method still: LambdaLR wraps it
    return optimizer


@torch.no_grad()
def _step_rounded(optimizer: Any, closure: Any = None) -> None:
    """AdamW (algorithm 2) in float32; bfloat16 weights and moments are stored by stochastic rounding.

    Moments too: the second moment moves by a thousandth of itself per step, less than its last place.
    """
    assert closure is None
    named = [(number, group, parameter) for number, (group, parameter) in enumerate(_parameters(optimizer))]
    named = [entry for entry in named if entry[2].grad is not None]
    for _, group, parameter in named:
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device if group["fused"] else None)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
    steps = torch.stack([optimizer.state[parameter]["step"] for *_, parameter in named]).tolist() if named else []
    for (number, group, parameter), step in zip(named, steps, strict=True):
        (beta1, beta2), lr, state = group["betas"], float(group["lr"]), optimizer.state[parameter]
        keys = [rounding_key(optimizer.rounding_seed, int(step), number, place) for place in range(3)]
        offset = 0  # elements of other shards before these
        if isinstance(parameter, DTensor):
            _, first = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            offset = first[0] * (parameter.numel() // parameter.shape[0]) if first else 0
        tensors = [_local(t) for t in (parameter, state["exp_avg"], state["exp_avg_sq"], parameter.grad)]
        for rows, start in _blocks(tensors[0]):
            weight, mean, square, gradient = (t[rows] for t in tensors)
            wide = torch.promote_types(weight.dtype, torch.float32)
            new_mean = mean.to(wide).lerp(gradient.to(wide), 1 - beta1)
            new_square = square.to(wide).lerp(gradient.to(wide).square(), 1 - beta2)
            denominator = (new_square / (1 - beta2**step)).sqrt_().add_(group["eps"])
            new_weight = weight.to(wide).mul_(1 - lr * group["weight_decay"])
            new_weight.addcdiv_(new_mean, denominator, value=-lr / (1 - beta1**step))
            for old, new, key in zip((weight, mean, square), (new_weight, new_mean, new_square), keys, strict=True):
                old.copy_(round_stochastically(new, key, offset + start) if old.dtype == torch.bfloat16 else new)


def _parameters(optimizer: Any) -> list[tuple[dict[str, Any], Tensor]]:
    return [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, with at least one dimension."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach() if local.ndim else local.detach().view(1)


def _blocks(tensor: Tensor, elements: int = 1 << 24) -> list[tuple[slice, int]]:
    """(rows, elements before them) of parts of about `elements` each, so that float32 copies stay small."""
    row = tensor[0].numel() if len(tensor) else 1
    height = max(1, elements // max(1, row))
    return [(slice(first, first + height), first * row) for first in range(0, len(tensor), height)]


def rounding_key(*numbers: int | str) -> int:
    """A 64-bit key of the noise, from what it depends on."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little", signed=True)


def round_stochastically(values: Tensor, key: int, first: int = 0) -> Tensor:
    """float32 `values` as bfloat16, up or down with the probability that the expected result is the value.

    16 random bits are added below the last place that is kept, then cut off. Element i takes those of place `first` + i
    in the sequence of `key` (splitmix64: Steele, Lea, Flood 2014; four elements share 64 bits).
    """
    skip = first % 4
    counters = torch.arange((values.numel() + skip + 3) // 4, device=values.device) + (first // 4 + 1)
    bits = counters * (0x9E3779B97F4A7C15 - 2**64) + key  # products and sums wrap modulo 2^64
    for places, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ ((bits >> places) & ((1 << (64 - places)) - 1))) * (factor - 2**64)
    bits ^= (bits >> 31) & ((1 << 33) - 1)
    noise = bits.view(torch.int16)[skip : skip + values.numel()].view(values.shape).int() & 0xFFFF
    rounded = ((values.view(torch.int32) + noise) & -0x10000).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()


@contextmanager
def accumulate(accelerator: Accelerator, policy: nn.Module, *, last: bool) -> Iterator[None]:
    """Around the forward and backward of a micro-batch: without `last`, DDP only adds gradients up and exchanges none.

    FSDP exchanges in every backward all the same: to wait, each process would hold gradients of the whole model.
    """
    with nullcontext() if last or accelerator.is_fsdp2 else accelerator.no_sync(policy):
        yield


def take_step(optimizer: Any) -> Tensor:
    """`optimizer.step()`; returns the share of the trained weights (a sample of them) that it left as they were.

    In bf16 that is the updates which rounding lost.
    """
    before = sample_weights(optimizer)
    optimizer.step()
    return (sample_weights(optimizer) == before).double().mean()


def sample_weights(optimizer: Any) -> Tensor:
    """About a thousand elements of each trained weight (of this process's part)."""
    parts = [_local(parameter).flatten() for _, parameter in _parameters(optimizer)]
    return torch.cat([part[:: max(1, part.numel() // 1024)] for part in parts])


@contextmanager
def _installed(optimizer: str, library: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"optimizer {optimizer} needs {library}, which is not installed: pip install plumbline[quant]."
        ) from error


def _bitsandbytes(
    model: nn.Module, groups: list[dict[str, Any]], config: OptimConfig, seed: int
) -> torch.optim.Optimizer:
    """An optimizer of bitsandbytes; parameters below 4,096 elements, and embeddings, keep moments of 32 bits.

    Gradients of embeddings are uneven over rows, which blocks of 8 bits round badly (Dettmers et al. 2022, section
    2.3; transformers does the same).
    """
    from bitsandbytes import optim

    overrides = optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            overrides.override_config(module.weight, "optim_bits", 32)
    keys: dict[str, Any] = {"lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2)}
    if "adam" in config.optimizer:
        keys["eps"] = config.adam_epsilon
    optimizer = getattr(optim, BITSANDBYTES[config.optimizer])(groups, **keys)
    optimizer.rounding_seed = seed
    optimizer.update_step = MethodType(_update_rounded, optimizer)
    return optimizer


def _update_rounded(optimizer: Any, group: dict[str, Any], parameter: nn.Parameter, *place: int) -> None:
    """bitsandbytes' update of one parameter; a bfloat16 one is updated in float32, then rounded stochastically."""
    if parameter.dtype != torch.bfloat16:
        return type(optimizer).update_step(optimizer, group, parameter, *place)
    narrow, gradient = parameter.data, parameter.grad
    parameter.grad = None  # a gradient has its parameter's dtype
    parameter.data = narrow.float()
    parameter.grad = gradient.float()
    type(optimizer).update_step(optimizer, group, parameter, *place)
    key = rounding_key(optimizer.rounding_seed, optimizer.state[parameter]["step"], *place)
    narrow.copy_(round_stochastically(parameter.data, key))
    parameter.grad = None
    parameter.data = narrow
    parameter.grad = gradient


def _torchao(groups: list[dict[str, Any]], config: OptimConfig, seed: int) -> torch.optim.Optimizer:
    """torchao's AdamW. Shards below 4,096 elements, or not a multiple of 256, keep moments in full precision.

    Its learning rate is a float32 tensor. On a GPU it compiles the update once per shape, in about half a minute; on a
    CPU, where that needs a C++ compiler, the update runs uncompiled.
    """
    from torchao.optim import AdamW8bit

    optimizer = AdamW8bit(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        bf16_stochastic_round=True,
    )
    optimizer.rounding_seed = seed
    optimizer.uncompiled = all(parameter.device.type == "cpu" for _, parameter in _parameters(optimizer))
    optimizer.step = MethodType(_step_torchao, optimizer)  # a method still: LambdaLR wraps it
    return optimizer


def _step_torchao(optimizer: Any, closure: Any = None) -> Any:
    """torchao's step, with its rounding drawn from (seed, step) instead of the global random state."""
    step = max((float(state["step"]) for state in optimizer.state.values()), default=0.0)
    device = _parameters(optimizer)[0][1].device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.compiler.set_stance("force_eager") if optimizer.uncompiled else nullcontext(),
    ):
        torch.manual_seed(rounding_key(optimizer.rounding_seed, int(step)) % 2**63)
        return type(optimizer).step(optimizer, closure)


def learning_rate_at(step: int, config: OptimConfig, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (counted from 0) in a run of `total_steps`.

    With W warm-up steps, step s < W takes peak * (s + 1) / (W + 1): no update is wasted on a rate of 0, and step W is
    the first at the peak. From there to the last step the rate falls to exactly `min_learning_rate`, and stays there.
    A run that ends inside its warm-up never reaches the peak.
    """
    peak, floor = config.learning_rate, config.min_learning_rate
    warmup = config.warmup_steps or round(config.warmup_ratio * total_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if config.lr_scheduler_type == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))  # 0 at the peak, 1 at the last step
    part = 1.0 - progress if config.lr_scheduler_type == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return part * peak + (1.0 - part) * floor  # written so that both ends are exact in floating point


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int) -> LambdaLR:
    """The schedule of `learning_rate_at`, one `.step()` per optimizer step.

    Do not give it to `accelerator.prepare`: accelerate would step it once per process.
    """
    if total_steps < 1:
        raise ValueError(f"the run has {total_steps} steps: give more rows, num_train_epochs or max_steps.")
    for group in optimizer.param_groups:
        group["initial_lr"] = 1.0  # LambdaLR multiplies by this; with 1 the lambda is the rate itself, without rounding
    return LambdaLR(optimizer, lambda step: learning_rate_at(step, config, total_steps))


def _by_mesh(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Plain tensors, and those on each mesh of devices: torch refuses to put one with another into one operation."""
    meshes: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        meshes.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(meshes.values())


def global_norm(gradients: list[Tensor]) -> Tensor:
    """Two-norm over all elements of `gradients`, accumulated and returned in at least float32 (float64 stays).

    Sharded gradients (DTensor) give the norm over all shards, in one exchange, so every rank must call this. Plain
    gradients are the same on every rank and count once.
    """
    total: Tensor | None = None
    for part in _by_mesh(gradients):
        norms = [
            torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
            for gradient in part
        ]
        widest = max((norm.dtype for norm in norms), key=lambda dtype: dtype.itemsize)
        norm = torch.linalg.vector_norm(torch.stack([norm.to(widest) for norm in norms]))
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        total = norm if total is None else torch.hypot(total, norm.to(total.device))
    return torch.zeros(()) if total is None else total


def clip_gradients(accelerator: Accelerator | None, model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients of `model` in place so that their global norm is at most `max_norm`.

    Returns the norm BEFORE clipping, a detached scalar tensor of at least float32, equal on every rank. `max_norm` 0
    only measures. The accelerator is needed where gradients are scaled (fp16); None means they are not.
    """
    if accelerator is not None:
        accelerator.unscale_gradients()
    parameters: list[Tensor] = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = global_norm([parameter.grad for parameter in parameters if parameter.grad is not None]).detach()
    if max_norm > 0:
        for part in _by_mesh(parameters):
            torch.nn.utils.clip_grads_with_norm_(part, max_norm, norm)
    return norm
