"""When sampler and trainer disagree on a token's log-probability: which token is worst, and what is behind it."""

from __future__ import annotations

import torch


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
