"""Group relative policy optimisation: advantages of groups, the clipped loss, its denominators.

Shapes: P prompts, G generations a prompt, B = P * G sequences (row-major by prompt), T tokens of a
completion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losses.masked import at_least_float32, keep_masked

LOSS_TYPES = ("grpo", "dapo", "dr_grpo")
SCALES = ("group", "batch", "none")
RATIO_LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")
STD_EPSILON = 1e-4


def group_advantages(rewards: Tensor, num_generations: int, *, scale: str = "group") -> Tensor:
    """How much better each completion did than the others of its prompt.

        A_i = (R_i - mean of its group) / (std + 1e-4)

    DeepSeekMath, https://arxiv.org/abs/2402.03300, section 4.1.2.

    The standard deviation has ddof 1. NaN means a missing reward: it is left out of mean and std,
    and its advantage is 0. A group whose rewards are all equal, or that has fewer than two of them,
    gets exactly 0: the rounding error of its mean must not be blown up by the division.

    Args:
        rewards: [B] rewards of the whole step (every rank's, for "batch"); rows p*G .. p*G+G-1
            belong to prompt p.
        num_generations: G.
        scale: what to divide by. "group": the group's std; "batch": the std of all rewards given;
            "none": 1, as in Dr. GRPO, https://arxiv.org/abs/2503.20783.

    Returns:
        [B] advantages, at least fp32, without gradient.

    Raises ValueError: unknown scale, or B not a multiple of num_generations.
    """
    if scale not in SCALES:
        known = ", ".join(SCALES)
        what = "does not name a divisor of advantages"
        raise ValueError(f"scale_rewards {scale!r} {what}; use one of {known}")
    if rewards.dim() != 1 or num_generations < 1 or rewards.numel() % num_generations:
        shape, size = tuple(rewards.shape), f"{num_generations=}"
        raise ValueError(f"rewards of shape {shape} cannot be cut into groups of {size}")
    groups = at_least_float32(rewards.detach()).view(-1, num_generations)  # [P, G]
    present = ~groups.isnan()
    deviations = groups - groups.nanmean(dim=1, keepdim=True)

    highest = torch.where(present, groups, -torch.inf).amax(dim=1, keepdim=True)
    lowest = torch.where(present, groups, torch.inf).amin(dim=1, keepdim=True)
    informative = present & (highest > lowest)  # false for all of an equal, single or empty group

    if scale == "group":
        deviations = deviations / (_present_std(groups, dim=(1,)) + STD_EPSILON)
    elif scale == "batch":
        deviations = deviations / (_present_std(groups, dim=(0, 1)) + STD_EPSILON)
    return torch.where(informative, deviations, 0.0).view(-1)


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """KL(policy || reference) of each token, estimated from the token that the policy sampled.

    http://joschu.net/blog/kl-approx.html, with x = log reference - log policy:

        k1   -x                 unbiased, can be negative; as a loss its gradient has mean zero
        k2   x^2 / 2            biased, and as a loss its on-policy gradient is the KL's
        k3   exp(x) - x - 1     unbiased, never negative; https://arxiv.org/abs/2402.03300, eq. 4

    Args:
        logprobs: any shape, in nats, under the policy.
        reference_logprobs: the same shape, under the reference.
        estimator: one of "k1", "k2", "k3".

    Returns:
        The same shape. Raises ValueError for an unknown estimator.
    """
    x = reference_logprobs - logprobs
    if estimator == "k1":
        return -x
    if estimator == "k2":
        return x.square() / 2
    if estimator == "k3":
        return x.expm1() - x
    known = ", ".join(KL_ESTIMATORS)
    raise ValueError(f"kl_estimator {estimator!r} is not known; use one of {known}")


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    delta: float | None = None,
    sampler_logprobs: Tensor | None = None,
    importance_sampling_cap: float = 2.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the clipped policy loss; divide it by `loss_denominator` of global counts.

    With r_t = pi(y_t) / pi_old(y_t), A the sequence's advantage, and clip to
    [1 - epsilon, 1 + epsilon_high]:

        l_t = -min(r_t A, clip(r_t) A) + beta * KL_t      https://arxiv.org/abs/2402.03300, eq. 3

        grpo     sum over sequences of (1/|y|) sum_t l_t  DeepSeekMath, the same paper
        dapo     sum over tokens of l_t                   https://arxiv.org/abs/2503.14476, eq. 8
        dr_grpo  sum over tokens of l_t                   https://arxiv.org/abs/2503.20783

    dapo and dr_grpo differ in their denominator. importance_sampling_level "sequence" replaces
    every r_t by the length-normalised ratio of its sequence, s = exp((1/|y|) sum_t log r_t), which
    carries the gradient of all its tokens (GSPO, https://arxiv.org/abs/2507.18071, eq. 5 and 7; its
    objective is loss_type "grpo"). delta, when given, also caps the ratio where the advantage is
    negative: -min(min(r_t, delta) A, clip(r_t) A), the two-sided clip of INTELLECT-2,
    https://arxiv.org/abs/2505.07291.

    sampler_logprobs tell pi_old, the trainer's policy before the step, from what really sampled: an
    engine with other kernels, or with older weights. Each token's policy term (not its KL) is then
    weighted by min(pi_old / pi_sampler, importance_sampling_cap): truncated importance sampling,
    Ionides 2008, https://doi.org/10.1198/106186008X320456; the split into the two ratios is that of
    AReaL, https://arxiv.org/abs/2505.24298, eq. 5.

    Args:
        logprobs: [B, T] under the policy being trained, in nats.
        old_logprobs: [B, T] under the policy that sampled; no gradient flows into it. On policy,
            `logprobs.detach()`.
        advantages: [B] one per sequence, or [B, T] one per token (process rewards); no gradient
            flows into it.
        mask: [B, T] true (or 1) on the completion's tokens, the stop token included. It is not
            modified. Outside it, the three log-probabilities may hold anything, inf and NaN
            included.
        ref_logprobs: [B, T] under the reference; no gradient flows into it. Needed with a beta.
        loss_type: "grpo", "dapo" or "dr_grpo".
        importance_sampling_level: "token" or "sequence".
        epsilon: how far the ratio may fall below 1.
        epsilon_high: how far it may rise above 1; None means the same as epsilon.
        beta: weight of the KL to the reference.
        kl_estimator: "k1", "k2" or "k3", see `kl_estimate`.
        delta: cap of the ratio, above 1 + epsilon_high, or None for no cap.
        sampler_logprobs: [B, T] as the sampler gave them; no gradient flows into it. None: it was
            pi_old itself.
        importance_sampling_cap: largest weight of a token, above 0.

    Returns:
        The loss sum (a scalar, at least fp32) and detached sums over tokens, whatever the
        loss_type, each to be divided by the number of tokens in the mask: "policy/approx_kl" (k3
        estimate of KL(old || policy)), "policy/clip_low" and "policy/clip_high" (tokens whose
        gradient the clip range took away, delta not counted), and with ref_logprobs "policy/kl"
        (the estimator, before beta), with sampler_logprobs "policy/sampler_weight" (the weights)
        and "policy/sampler_capped" (tokens at the cap). "policy/ratio_max" is a maximum, of the
        ratio in use; 0 where there is no token.

    Raises ValueError: an unknown name, a number outside its range, a beta without ref_logprobs, or
    shapes that differ.
    """
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    names = (loss_type, importance_sampling_level, kl_estimator)
    check_options(*names, epsilon, epsilon_high, beta, delta)
    if beta != 0 and ref_logprobs is None:
        raise ValueError(f"beta {beta} needs ref_logprobs: pass them, or set beta to 0")
    if advantages.shape not in (mask.shape[:1], mask.shape):
        shapes = f"{tuple(advantages.shape)} and the mask's is {tuple(mask.shape)}"
        raise ValueError(f"advantages must be [B] or [B, T], but their shape is {shapes}")

    logprobs = keep_masked(logprobs, mask)  # [B, T]
    log_ratio = logprobs - keep_masked(old_logprobs.detach(), mask)  # [B, T]
    advantages = at_least_float32(advantages.detach())
    advantages = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)  # or [B, 1]
    advantages = keep_masked(advantages.expand(mask.shape), mask)  # [B, T]
    lengths = mask.bool().sum(dim=1, keepdim=True).clamp(min=1)  # [B, 1]; empty: 0 / 1

    if importance_sampling_level == "sequence":
        ratio = (log_ratio.sum(dim=1, keepdim=True) / lengths).exp().expand_as(log_ratio)  # [B, T]
    else:
        ratio = log_ratio.exp()  # [B, T]
    capped = ratio if delta is None else ratio.clamp(max=delta)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    losses = -torch.min(capped * advantages, clipped * advantages)  # [B, T]

    ratios, bounds = (ratio.detach(), log_ratio.detach()), (1 - epsilon, 1 + epsilon_high)
    metrics = _ratio_metrics(*ratios, advantages, mask, *bounds)
    if sampler_logprobs is not None:
        if not importance_sampling_cap > 0:
            cap = importance_sampling_cap
            raise ValueError(f"importance_sampling_cap is {cap}; give a number above 0")
        drift = keep_masked(old_logprobs.detach(), mask)  # [B, T]
        drift = drift - keep_masked(sampler_logprobs.detach(), mask)
        weights = keep_masked(drift.exp().clamp(max=importance_sampling_cap), mask)
        losses, at_cap = losses * weights, weights == importance_sampling_cap
        metrics["policy/sampler_weight"] = weights.sum()
        metrics["policy/sampler_capped"] = at_cap.sum().to(ratio.dtype)
    if ref_logprobs is not None:
        ref_logprobs = keep_masked(ref_logprobs.detach(), mask)
        kl = kl_estimate(logprobs, ref_logprobs, kl_estimator)  # [B, T], 0 outside the mask
        metrics["policy/kl"] = kl.detach().sum()
        if beta != 0:
            losses = losses + beta * kl

    losses = keep_masked(losses, mask)
    if loss_type == "grpo":
        losses = losses / lengths
    return losses.sum(), metrics


def loss_denominator(
    loss_type: str,
    *,
    num_tokens: float,
    num_sequences: float,
    max_completion_length: int,
) -> float:
    """The number that the sum of `grpo_loss` over a whole step, all ranks together, is divided by.

        grpo      num_sequences
        dapo      num_tokens
        dr_grpo   num_sequences * max_completion_length

    Args:
        loss_type: "grpo", "dapo" or "dr_grpo".
        num_tokens: tokens inside the masks of the step, over all ranks.
        num_sequences: completions of the step, over all ranks: truncated, masked and left-out ones
            count too.
        max_completion_length: the longest completion the sampler may return, in tokens.

    Returns:
        At least 1, so that a step in which every token is masked divides 0 by 1.

    Raises ValueError: unknown loss_type.
    """
    if loss_type == "grpo":
        return max(num_sequences, 1)
    if loss_type == "dapo":
        return max(num_tokens, 1)
    if loss_type == "dr_grpo":
        return max(num_sequences * max_completion_length, 1)
    known = ", ".join(LOSS_TYPES)
    raise ValueError(f"loss_type {loss_type!r} is not a GRPO loss; use one of {known}")


def _present_std(values: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Standard deviation (ddof 1) of what is not NaN; NaN where that is fewer than two values."""
    deviations = values - values.nanmean(dim=dim, keepdim=True)
    squares = deviations.square().nansum(dim=dim, keepdim=True)
    count = (~values.isnan()).sum(dim=dim, keepdim=True)
    return (squares / (count - 1)).sqrt()


def _ratio_metrics(
    ratio: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    lowest: float,
    highest: float,
) -> dict[str, Tensor]:
    # elsewhere the minimum takes the unclipped side
    clipped_low = (ratio < lowest) & (advantages < 0) & mask.bool()
    clipped_high = (ratio > highest) & (advantages > 0) & mask.bool()
    kept = keep_masked(ratio, mask)
    divergence = kl_estimate(torch.zeros_like(log_ratio), log_ratio)  # [B, T], 0 outside the mask
    return {
        "policy/approx_kl": divergence.sum(),
        "policy/clip_low": clipped_low.sum().to(ratio.dtype),
        "policy/clip_high": clipped_high.sum().to(ratio.dtype),
        "policy/ratio_max": kept.max() if kept.numel() else kept.sum(),
    }


def check_options(
    loss_type: str,
    importance_sampling_level: str,
    kl_estimator: str,
    epsilon: float,
    epsilon_high: float | None,
    beta: float,
    delta: float | None,
) -> None:
    """Raise ValueError for options of `grpo_loss` with an unknown name or outside their range."""
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    for name, value, known in (
        ("loss_type", loss_type, LOSS_TYPES),
        ("importance_sampling_level", importance_sampling_level, RATIO_LEVELS),
        ("kl_estimator", kl_estimator, KL_ESTIMATORS),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r} is not known; use one of {', '.join(known)}")
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon is {epsilon}; give a number from 0 to 1")
    for name, number in (("epsilon_high", epsilon_high), ("beta", beta)):
        if not 0 <= number < float("inf"):
            raise ValueError(f"{name} is {number}; give a finite number of 0 or more")
    if delta is not None and not delta > 1 + epsilon_high:
        lowest = 1 + epsilon_high
        raise ValueError(f"delta {delta} must be above 1 + epsilon_high = {lowest}, or None")
