"""Parameter groups, optimizer, learning-rate schedule and gradient clipping.

Step numbers count optimizer steps from 0: `learning_rate_at(0, ...)` is the rate of the first update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from accelerate import Accelerator

SCHEDULES = ("cosine", "linear", "constant")
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")  # where torch has one kernel for the whole AdamW update


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

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
    """Decay rate of the second moment."""
    adam_epsilon: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
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


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) over the trainable parameters; fused where torch can.

    Raises ValueError when the model has no trainable parameter.
    """
    groups = parameter_groups(model, config.weight_decay)
    if not groups:
        raise ValueError("the model has no trainable parameter: set lora_r above 0 (LoRA) or to 0 (all weights).")
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True if fused else None,  # None lets torch choose between foreach and a plain loop
    )


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


def global_norm(gradients: list[Tensor]) -> Tensor:
    """Two-norm over all elements of `gradients`, accumulated and returned in at least float32 (float64 stays).

    Sharded gradients (DTensor) give the norm over all shards, so every rank must call this.
    """
    total: Tensor | None = None
    for is_sharded in (False, True):  # torch refuses to stack plain tensors with DTensors
        norms = [
            torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
            for gradient in gradients
            if isinstance(gradient, DTensor) == is_sharded
        ]
        if not norms:
            continue
        widest = max((norm.dtype for norm in norms), key=lambda dtype: dtype.itemsize)
        part = torch.linalg.vector_norm(torch.stack([norm.to(widest) for norm in norms]))
        part = part.full_tensor() if isinstance(part, DTensor) else part
        total = part if total is None else torch.hypot(total, part)
    return torch.zeros(()) if total is None else total


def clip_gradients(accelerator: Accelerator | None, model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients of `model` in place so that their global norm is at most `max_norm`.

    Returns the norm BEFORE clipping, a detached scalar tensor of at least float32, equal on every rank. `max_norm` 0
    only measures. The accelerator is needed where gradients are scaled (fp16); None means they are not.
    """
    if accelerator is not None:
        accelerator.unscale_gradients()
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = global_norm([parameter.grad for parameter in parameters if parameter.grad is not None]).detach()
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
