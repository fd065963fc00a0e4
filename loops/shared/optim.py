"""Parameter groups, optimizer, learning-rate schedule and gradient clipping.

Step numbers count optimizer steps from 0: `learning_rate_at(0, ...)` is the rate of the first update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
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


def build_optimizer(model: nn.Module, config: OptimConfig, *, sharded: bool = False) -> torch.optim.Optimizer:
    """The optimizer that `config.optimizer` names, over the trainable parameters in `parameter_groups`.

    AdamW: Loshchilov and Hutter 2019, algorithm 2; Lion: Chen et al. 2023, algorithm 2; moments of 8 bits: Dettmers et
    al. 2022. sharded: the parameters are, or will be, shards of FSDP2 (DTensors are recognised by themselves).

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
        return _bitsandbytes(model, groups, config)
    if config.optimizer in TORCHAO:
        return _torchao(groups, config)
    fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True if fused else None,  # None lets torch choose between foreach and a plain loop
    )


def _bitsandbytes(model: nn.Module, groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """An optimizer of bitsandbytes; parameters below 4,096 elements, and embeddings, keep moments of 32 bits.

    Gradients of embeddings are uneven over rows, which blocks of 8 bits round badly (Dettmers et al. 2022, section
    2.3; transformers does the same).
    """
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise ValueError(
            f"optimizer {config.optimizer} needs bitsandbytes, which is not installed: pip install plumbline[quant]."
        ) from error
    overrides = optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            overrides.override_config(module.weight, "optim_bits", 32)
    keys: dict[str, Any] = {"lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2)}
    if "adam" in config.optimizer:
        keys["eps"] = config.adam_epsilon
    return getattr(optim, BITSANDBYTES[config.optimizer])(groups, **keys)


def _torchao(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """torchao's AdamW; of a shard whose elements are not at least 4,096 and a multiple of 256 it keeps whole moments.

    Its learning rate is a float32 tensor. torchao compiles the update once for each shape of a parameter, which costs
    about half a minute and needs a C++ compiler on a CPU: there the same update runs as it is written.
    """
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"optimizer {config.optimizer} needs torchao, which is not installed: pip install plumbline[quant]."
        ) from error
    optimizer = AdamW8bit(
        groups, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon
    )
    if all(parameter.device.type == "cpu" for group in groups for parameter in group["params"]):
        optimizer.step = MethodType(_step_uncompiled, optimizer)  # a method still: LambdaLR wraps it
    return optimizer


def _step_uncompiled(optimizer: torch.optim.Optimizer, closure: Any = None) -> Any:
    with torch.compiler.set_stance("force_eager"):
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
    ones beside them, which every rank holds whole, count once.
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
