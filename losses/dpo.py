"""Direct preference optimisation and its relatives, on log-probabilities of whole completions.

Shapes: B pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.masked import at_least_float32

LOSS_TYPES = ("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "apo_zero", "apo_down")
LENGTH_NORMALISED = ("sigmoid_norm", "ipo")
LABEL_SMOOTHED = ("sigmoid", "sigmoid_norm", "robust")


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the loss over pairs; divide it by the global number of pairs.

    With y_w chosen, y_l rejected, c = log pi(y_w|x) - log pi_ref(y_w|x), r the same of y_l,
    d = c - r, b = beta, e = label_smoothing, s the logistic function:

        sigmoid       -(1-e) log s(b d) - e log s(-b d)               e = 0: DPO [1], e > 0: [2]
        sigmoid_norm  the same with c / |y_w| and r / |y_l|           Tulu 3 [3]
        robust        (-(1-e) log s(b d) + e log s(-b d)) / (1-2e)    robust DPO [4]
        hinge         max(0, 1 - b d)                                 RSO [5]
        ipo           (c / |y_w| - r / |y_l| - 1 / (2 b))^2           IPO [6]
        apo_zero      1 - s(b c) + s(b r)                             APO [7]
        apo_down      s(b c) + 1 - s(b d)                             APO [7]

    [1] https://arxiv.org/abs/2305.18290, eq. 7    [2] conservative: ericmitchell.ai/cdpo.pdf
    [3] https://arxiv.org/abs/2411.15124           [4] https://arxiv.org/abs/2403.00409
    [5] https://arxiv.org/abs/2309.06657           [6] https://arxiv.org/abs/2310.12036, eq. 17
    [7] https://arxiv.org/abs/2408.06266

    Args:
        policy_chosen_logps: [B] summed log-probability of the whole chosen completion under the
            policy, in nats: of its assistant's tokens, with those that the rejected one begins with
            as well.
        policy_rejected_logps: [B] the same of the rejected completion.
        reference_chosen_logps: [B] under the reference; no gradient flows into it.
        reference_rejected_logps: [B] the same of the rejected completion.
        beta: strength of the pull to the reference, above 0.
        loss_type: one of the names above.
        label_smoothing: e, the assumed probability that a preference is flipped, 0 <= e < 0.5.
        chosen_lengths: [B] number of target tokens of the chosen completion, at least 1.
        rejected_lengths: [B] the same of the rejected completion.

    Returns:
        The loss sum (a scalar, at least fp32) and detached sums over pairs, each to be divided by
        the number of pairs: "reward/chosen" b c, "reward/rejected" b r, "reward/margin" b d,
        "reward/accuracy" (pairs with d > 0), "policy/chosen_logps", "policy/rejected_logps".
        Rewards are the ones the loss compares, so they are per token for ipo and sigmoid_norm; the
        logps are always those of the whole completion.

    Raises:
        ValueError: unknown loss_type, a beta or label_smoothing outside its range, label_smoothing
            with a loss that has none, ipo or sigmoid_norm without lengths, or shapes that differ.
    """
    check_options(beta, loss_type, label_smoothing)
    policy_chosen = at_least_float32(policy_chosen_logps)
    policy_rejected = at_least_float32(policy_rejected_logps)
    reference_chosen = at_least_float32(reference_chosen_logps).detach()
    reference_rejected = at_least_float32(reference_rejected_logps).detach()
    per_pair = [policy_chosen, policy_rejected, reference_chosen, reference_rejected]
    per_pair += [lengths for lengths in (chosen_lengths, rejected_lengths) if lengths is not None]
    if len({values.shape for values in per_pair}) > 1:
        shapes = ", ".join(str(tuple(values.shape)) for values in per_pair)
        raise ValueError(f"logps and lengths must have one value a pair, but they are {shapes}")

    chosen = policy_chosen - reference_chosen  # [B] c
    rejected = policy_rejected - reference_rejected  # [B] r
    if loss_type in LENGTH_NORMALISED:
        if chosen_lengths is None or rejected_lengths is None:
            needed = "pass chosen_lengths and rejected_lengths"
            raise ValueError(f"loss_type {loss_type!r} divides by length: {needed}")
        chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths
    margin = chosen - rejected  # [B] d
    logits = beta * margin
    right, wrong = F.logsigmoid(logits), F.logsigmoid(-logits)  # of preferences taken as they are

    if loss_type in ("sigmoid", "sigmoid_norm"):
        losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    elif loss_type == "robust":
        losses = -(1 - label_smoothing) * right + label_smoothing * wrong
        losses = losses / (1 - 2 * label_smoothing)
    elif loss_type == "hinge":
        losses = torch.relu(1 - logits)
    elif loss_type == "ipo":
        losses = (margin - 1 / (2 * beta)) ** 2
    elif loss_type == "apo_zero":
        losses = torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)  # 1 - s(x) is s(-x)
    else:  # apo_down
        losses = torch.sigmoid(beta * chosen) + torch.sigmoid(-logits)

    metrics = {
        "reward/chosen": beta * chosen.detach().sum(),
        "reward/rejected": beta * rejected.detach().sum(),
        "reward/margin": logits.detach().sum(),
        "reward/accuracy": (margin.detach() > 0).sum().to(margin.dtype),
        "policy/chosen_logps": policy_chosen.detach().sum(),
        "policy/rejected_logps": policy_rejected.detach().sum(),
    }
    return losses.sum(), metrics


def check_options(beta: float, loss_type: str, label_smoothing: float) -> None:
    if loss_type not in LOSS_TYPES:
        known = ", ".join(LOSS_TYPES)
        raise ValueError(f"loss_type {loss_type!r} is not a DPO loss; use one of {known}")
    if not beta > 0:
        raise ValueError(f"beta must be above 0, but it is {beta}")
    if not 0 <= label_smoothing < 0.5:
        bounds = "label_smoothing must be at least 0 and below 0.5"
        raise ValueError(f"{bounds}, but it is {label_smoothing}")
    if label_smoothing and loss_type not in LABEL_SMOOTHED:
        wrong = f"label_smoothing {label_smoothing} has no meaning in loss_type {loss_type!r}"
        raise ValueError(f"{wrong}; set it to 0 or use one of {', '.join(LABEL_SMOOTHED)}")
