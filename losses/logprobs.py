"""The fused head: token log-probabilities and entropies from hidden states and the head's weight.

The logits of N tokens are an [N, V] matrix, by far the largest thing a plain training step would
hold. Here they exist only as tiles [C, V] of C tokens; the backward pass computes each tile again
(or, for a frozen head, needs none).

Shapes: N tokens, C tokens of one tile, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_BYTES_CPU = 64 * 2**20
TILE_BYTES_GPU = 512 * 2**20  # a wider product per pass over the weight


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution, without [N, V] logits.

        u = hidden @ weight^T + bias                              (the head)
        z = softcap * tanh(scale * u / softcap) / temperature     (else: scale * u / temperature)
        logprob = z[target] - log sum_v exp(z_v)
        entropy = -sum_v p_v log p_v,  p = softmax(z)

    The logits are fp32 straight from the product, never rounded to bf16 (float64 inputs stay
    float64), also under autocast, which is switched off inside. Hidden and weight of different
    dtypes are multiplied in the wider one.

    Both results are differentiable in hidden, weight and bias; no entropy gradient, no cost. The
    weight's gradient is accumulated in at least fp32. When neither weight nor bias needs a gradient
    (a frozen head, LoRA), forward stores d logprob / d hidden, which is as large as `hidden`, and
    backward is one elementwise product.

    Memory beside the results: up to three tiles, one of which lives on until backward when the head
    is trained, the weight's gradient, and for low-precision inputs on CPU a copy of the weight in
    fp32.

    Args:
        hidden: [N, H] final hidden states of positions whose next token is a target; N may be 0.
        weight: [V, H] the head's weight.
        targets: [N] int64 token ids in 0 .. V-1.
        bias: [V] or None.
        temperature: the one that sampled, above 0.
        softcap: soft cap of the logits (Gemma 2, https://arxiv.org/abs/2408.00118, section 2),
            above 0, or None.
        scale: factor of the logits (Cohere's logit_scale, the inverse of Granite's logits_scaling).
        chunk_tokens: C; None chooses it from V, so that a tile is about 64 MiB on CPU and 512 MiB
            on a GPU.

    Returns:
        (logprobs [N], entropy [N]) in nats, fp32, or float64 when an input is float64.

    Raises ValueError: shapes that do not fit, or a temperature, softcap or chunk_tokens that is not
    above 0.
    """
    vocabulary = weight.shape[0]
    is_matrix = hidden.dim() == weight.dim() == 2
    if not is_matrix or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        shapes = f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        names = "hidden [N, H], weight [V, H] and targets [N]"
        raise ValueError(f"{names} do not fit together: they are {shapes}")
    if bias is not None and bias.shape != (vocabulary,):
        shapes = f"({vocabulary},) as weight has rows, but it has {tuple(bias.shape)}"
        raise ValueError(f"bias must have shape {shapes}")
    numbers = {"temperature": temperature, "softcap": softcap, "chunk_tokens": chunk_tokens}
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, but it is {value}")

    widest = torch.promote_types(hidden.dtype, weight.dtype)
    dtype = torch.promote_types(widest, torch.float32)
    if chunk_tokens is None:
        tile_bytes = TILE_BYTES_CPU if hidden.device.type == "cpu" else TILE_BYTES_GPU
        chunk_tokens = max(1, tile_bytes // (vocabulary * dtype.itemsize))
    # Only CUDA's bf16 product can return fp32 from bf16 operands; everywhere else the operands are
    # widened first.
    operand_dtype = widest if widest == torch.bfloat16 and hidden.device.type == "cuda" else dtype
    factors = (float(temperature), softcap, float(scale))
    settings = _Settings(*factors, chunk_tokens, dtype, operand_dtype)
    tensors = (hidden, weight, bias, targets)
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs, entropy = _TokenLogprobs.apply(*tensors, settings, torch.is_grad_enabled())
    return logprobs, entropy


class _Settings(NamedTuple):
    temperature: float
    softcap: float | None
    scale: float
    chunk_tokens: int
    dtype: torch.dtype  # of tiles, sums and results: fp32 or float64
    operand_dtype: torch.dtype  # of what is multiplied: the same, or bf16 if its product is fp32

    @property
    def gain(self) -> float:
        """dz/du, but for the factor that a soft cap adds."""
        return self.scale / self.temperature


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        settings: _Settings,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad[:3] if grad_enabled else (False, False, False)
        needs_hidden, needs_weight, needs_bias = needs
        head_is_trained = needs_weight or needs_bias
        logprobs = torch.empty(hidden.shape[0], dtype=settings.dtype, device=hidden.device)  # [N]
        entropy = torch.empty_like(logprobs)  # [N]
        stores = needs_hidden and not head_is_trained
        jacobian = torch.empty_like(hidden) if stores else None  # [N, H]
        last_slope = None  # [C, V]

        operand = weight.to(settings.operand_dtype)  # [V, H]
        buffers = _new_buffers(hidden, weight, settings)
        for rows in _chunks(hidden, settings):
            target = targets[rows].unsqueeze(1)  # [C, 1]
            z, p, log_normaliser = _distribution(hidden[rows], operand, bias, settings, buffers)
            logprobs[rows] = (z.gather(1, target) - log_normaliser).squeeze(1)
            # H = log sum exp(z) - E[z]. Only a soft cap needs z once more; otherwise the product
            # may overwrite it.
            expected = torch.mul(p, z, out=z if settings.softcap is None else None).sum(dim=1)
            entropy[rows] = log_normaliser.squeeze(1) - expected
            if jacobian is not None:
                slope = _slope(z, p, target, settings)
                jacobian[rows] = _product(slope, operand, settings).mul_(-settings.gain)
            elif head_is_trained and rows.stop == hidden.shape[0]:
                # The last tile stands in memory anyway. Kept until backward it need not be computed
                # again, and a batch that fits into one tile never is.
                last_slope = _slope(z, p, target, settings)

        ctx.save_for_backward(hidden, weight, bias, targets, entropy, jacobian, last_slope)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropy, jacobian, last_slope = ctx.saved_tensors
        settings: _Settings = ctx.settings
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(entropy)
        if jacobian is not None and grad_entropy is None:
            hidden_grad = (jacobian * grad_logprobs.unsqueeze(1)).to(hidden.dtype)
            return hidden_grad, None, None, None, None, None

        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=settings.dtype) if needs_weight else None
        bias_grad = torch.zeros_like(bias, dtype=settings.dtype) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            operand = weight.to(settings.operand_dtype)  # [V, H]
            buffers = _new_buffers(hidden, weight, settings)
            for rows in _chunks(hidden, settings):
                # A row's factor goes onto [C, H] and not onto the tile, where that can be: fewer
                # passes over V.
                factor = -settings.gain * grad_logprobs[rows].unsqueeze(1)  # [C, 1]
                if grad_entropy is None and last_slope is not None and rows.stop == hidden.shape[0]:
                    slope = last_slope
                else:
                    target = targets[rows].unsqueeze(1)  # [C, 1]
                    known = (hidden[rows], operand, bias, settings, buffers)
                    z, p, log_normaliser = _distribution(*known)
                    if grad_entropy is None:
                        slope = _slope(z, p, target, settings)
                    else:
                        expected = log_normaliser - entropy[rows].unsqueeze(1)  # E[z], [C, 1]
                        weights = (grad_logprobs[rows, None], grad_entropy[rows, None])  # [C, 1]
                        slope = _weighted_slope(z, p, target, settings, *weights, expected)
                        factor = torch.full_like(factor, -settings.gain)
                if hidden_grad is not None:
                    hidden_grad[rows] = _product(slope, operand, settings).mul_(factor)
                if weight_grad is not None:
                    _add_product(weight_grad, slope.t(), hidden[rows] * factor, settings)
                if bias_grad is not None:
                    bias_grad.addmv_(slope.t(), factor.squeeze(1))
        weight_grad = None if weight_grad is None else weight_grad.to(weight.dtype)
        bias_grad = None if bias_grad is None else bias_grad.to(bias.dtype)
        return hidden_grad, weight_grad, bias_grad, None, None, None


def _chunks(hidden: Tensor, settings: _Settings) -> list[slice]:
    count, step = hidden.shape[0], settings.chunk_tokens
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _new_buffers(hidden: Tensor, weight: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
    """Memory of two tiles [C, V] for all chunks: fresh pages cost more than a chunk's softmax."""
    shape = (min(settings.chunk_tokens, hidden.shape[0]), weight.shape[0])
    logits = torch.empty(shape, dtype=settings.dtype, device=hidden.device)
    return logits, torch.empty_like(logits)


def _distribution(
    hidden: Tensor,
    operand: Tensor,
    bias: Tensor | None,
    settings: _Settings,
    buffers: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """z [C, V], p = softmax(z) [C, V] and log sum exp(z) [C, 1] of hidden [C, H]."""
    z, p = (buffer[: hidden.shape[0]] for buffer in buffers)
    _product(hidden, operand.t(), settings, out=z)
    if bias is not None:
        z.add_(bias)
    if settings.softcap is None:
        if settings.gain != 1:
            z.mul_(settings.gain)
    else:
        z.mul_(settings.scale / settings.softcap).tanh_()
        z.mul_(settings.softcap / settings.temperature)
    torch.softmax(z, dim=1, out=p)
    # The likeliest token has p = exp(max z) / sum exp(z) >= 1 / V, so its logarithm is accurate.
    log_normaliser = z.amax(dim=1, keepdim=True) - p.amax(dim=1, keepdim=True).log()
    return z, p, log_normaliser


def _slope(z: Tensor, p: Tensor, target: Tensor, settings: _Settings) -> Tensor:
    """-(d logprob / d u) / gain = (p - onehot(target)) * (1 - tanh^2) [C, V], written over p.

    A soft cap overwrites z. 1 is subtracted before anything is multiplied or rounded, else the
    gradient of a confident token would drown.
    """
    p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
    return _through_softcap(z, p, settings)


def _weighted_slope(
    z: Tensor,
    p: Tensor,
    target: Tensor,
    settings: _Settings,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    expected: Tensor,
) -> Tensor:
    """The same for grad_logprob * logprob + grad_entropy * entropy; d entropy / d z_v is
    -p_v (z_v - E[z])."""
    p.mul_((z - expected).mul_(grad_entropy).add_(grad_logprob))
    p.scatter_add_(1, target, -grad_logprob)
    return _through_softcap(z, p, settings)


def _through_softcap(z: Tensor, slope: Tensor, settings: _Settings) -> Tensor:
    if settings.softcap is None:
        return slope
    factor = (settings.temperature / settings.softcap) ** 2
    return slope.addcmul_(slope, z.square_(), value=-factor)


def _product(left: Tensor, right: Tensor, settings: _Settings, out: Tensor | None = None) -> Tensor:
    """left @ right in settings.dtype, from operands of settings.operand_dtype."""
    left = left.to(settings.operand_dtype)
    if settings.operand_dtype == settings.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=settings.dtype, out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor, settings: _Settings) -> None:
    """total += left @ right, accumulated in settings.dtype."""
    left, right = left.to(settings.operand_dtype), right.to(settings.operand_dtype)
    if settings.operand_dtype == settings.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=settings.dtype, out=total)
