"""Supervised fine-tuning: the negative log-likelihood of the target tokens.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from torch import Tensor

from losses.masked import keep_masked

LOSS_TYPES = ("nll", "dft")


def sft_loss(
    logprobs: Tensor,
    mask: Tensor,
    *,
    loss_type: str = "nll",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the loss over target tokens; divide it by the global number of target tokens.

    With p_t the policy's probability of target token t and sg(.) a factor without gradient:

        nll   sum_t -log p_t
        dft   sum_t -sg(p_t) log p_t        dynamic fine-tuning, https://arxiv.org/abs/2508.05629

    Args:
        logprobs: [B, T] log-probability of each target token, in nats. Outside the mask it may hold
            anything.
        mask: [B, T] true (or 1) on target tokens. It is not modified.
        loss_type: one of "nll", "dft".

    Returns:
        The loss sum (a scalar, at least fp32) and detached sums, each to be divided by the number
        of target tokens: "loss/nll", the plain negative log-likelihood whatever the loss_type.

    Raises ValueError: unknown loss_type, or shapes that differ.
    """
    logprobs = keep_masked(logprobs, mask)  # [B, T]
    nll = -logprobs.sum()
    if loss_type == "nll":
        loss = nll
    elif loss_type == "dft":
        loss = -(logprobs.detach().exp() * logprobs).sum()  # log p = 0 outside the mask
    else:
        known = ", ".join(LOSS_TYPES)
        raise ValueError(f"loss_type {loss_type!r} is not an SFT loss; use one of {known}")
    return loss, {"loss/nll": nll.detach()}
