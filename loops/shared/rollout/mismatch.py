"""Comparing the sampler's log-probabilities with the trainer's: which token is furthest apart, and the likely cause."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from loops.shared.rollout.rollouts import Microbatch

# How far the sampler's and the trainer's log-probability of one token may lie apart, by dtype of the weights.
MISMATCH_LIMIT = {torch.float64: 0.01, torch.float32: 0.05}
LOW_PRECISION_LIMIT = 2.0


def check_sampler(
    microbatches: Sequence[Microbatch], policy: nn.Module, accelerator: Accelerator, limit: float
) -> None:
    """Raise RuntimeError, naming the worst token, where the trainer scores a step's samples differently.

    The worst thousandth of a process's tokens (one, of fewer than 2,000) may be further apart than `limit`: rounding in
    low precision has a long tail.

    limit: in nats, 0 chooses by dtype. Not checked where dropout makes scores random.
    """
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in policy.modules()):
        return
    if not limit:
        limit = max(MISMATCH_LIMIT.get(p.dtype, LOW_PRECISION_LIMIT) for p in policy.parameters())
        limit = limit if accelerator.mixed_precision == "no" else LOW_PRECISION_LIMIT
    sampled = torch.cat([mb.sampler_logprobs[mb.batch.mask] for mb in microbatches])
    trained = torch.cat([mb.old_logprobs[mb.batch.mask] for mb in microbatches])
    tokens = torch.cat([mb.batch.scatter(mb.batch.targets)[mb.batch.mask] for mb in microbatches])
    gaps = (sampled - trained).abs().nan_to_num(nan=torch.inf).sort().values
    outliers = max(1, len(gaps) // 1000) if len(gaps) > 1 else 0
    within = len(gaps) == 0 or (gaps[-1 - outliers] <= limit and bool(gaps[-1].isfinite()))
    own = None if within else explain_mismatch(sampled, trained, tokens, limit=limit)
    sentence = next((found for found in gather_object([own]) if found), None)  # all processes end with it
    if sentence:
        raise RuntimeError(f"the engine does not sample from the policy as it is trained: {sentence}")


def explain_mismatch(sampled: torch.Tensor, scored: torch.Tensor, tokens: torch.Tensor, *, limit: float) -> str | None:
    """One sentence on the worst token and the likely cause; None where all lie within `limit`.

    Args:
        sampled: [N] log-probabilities that the engine reported, of all compared tokens.
        scored: [N] those that the trainer computes for the same tokens.
        tokens: [N] their ids.
        limit: largest difference in nats that passes.
    """
    gap = (sampled - scored).double()
    worst = int(gap.abs().nan_to_num(nan=torch.inf).argmax())
    if gap[worst].abs() <= limit:
        return None
    return (
        f"token {int(tokens[worst])} (number {worst} of {len(gap)}) has log-probability {float(sampled[worst]):.6f} in "
        f"the sampler and {float(scored[worst]):.6f} in the trainer, further apart than {limit:g} (max_mismatch); "
        f"likely {likely_cause(sampled.double(), scored.double(), limit)}."
    )


def likely_cause(sampled: torch.Tensor, scored: torch.Tensor, limit: float) -> str:
    """The cause that the pattern of differences of [N] tokens speaks for, the surest signs first."""
    gap = sampled - scored
    if not gap.isfinite().all():
        return "weights that are not finite"
    if (gap > -limit / 10).all() and float(gap.median()) > limit / 20:
        return "truncated sampling: the sampler's numbers are never smaller, as if renormalised over fewer tokens"
    centred = scored - scored.mean()
    slope = float((centred * (sampled - sampled.mean())).sum() / centred.square().sum().clamp(min=1e-12))
    residual = gap - gap.mean() - (slope - 1) * centred
    if abs(slope - 1) > 0.1 and residual.square().mean() < 0.2 * gap.var(unbiased=False):
        return f"another temperature: the sampler's numbers move {slope:.2f} times as far as the trainer's"
    if float(gap.abs().median()) < limit / 20:
        return "the dtype: most tokens agree and a few do not, as rounding does"
    if float(gap.abs().mean()) > 2.0:
        return "another tokenizer, prompt or model: hardly any token agrees"
    return "stale weights: the sampler serves an older policy than the one that is trained"
