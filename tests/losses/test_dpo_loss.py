"""The DPO losses. Shapes: B pairs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from losses.dpo import LOSS_TYPES, dpo_loss


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def reference(loss_type: str, c: float, r: float, n_w: int, n_l: int, b: float, e: float) -> float:
    """The papers' equations for one pair; c and r are the log-ratios of policy to reference of y_w and y_l."""
    return {
        "sigmoid": -(1 - e) * math.log(sigmoid(b * (c - r))) - e * math.log(sigmoid(-b * (c - r))),
        "sigmoid_norm": -(1 - e) * math.log(sigmoid(b * (c / n_w - r / n_l)))
        - e * math.log(sigmoid(-b * (c / n_w - r / n_l))),
        "robust": (-(1 - e) * math.log(sigmoid(b * (c - r))) + e * math.log(sigmoid(-b * (c - r)))) / (1 - 2 * e),
        "hinge": max(0.0, 1 - b * (c - r)),
        "ipo": (c / n_w - r / n_l - 1 / (2 * b)) ** 2,
        "apo_zero": 1 - sigmoid(b * c) + sigmoid(b * r),
        "apo_down": sigmoid(b * c) + 1 - sigmoid(b * (c - r)),
    }[loss_type]


def pairs(count: int = 6, seed: int = 0) -> tuple[list[Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    logps = [-20 * torch.rand(count, generator=generator, dtype=torch.float64) for _ in range(4)]
    lengths = [torch.randint(1, 9, (count,), generator=generator) for _ in range(2)]
    return logps, {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}


def smoothing_for(loss_type: str) -> float:
    return 0.1 if loss_type in ("sigmoid", "sigmoid_norm", "robust") else 0.0


def test_sigmoid_by_hand() -> None:
    """beta = 1, margins 0, 1, 2: -log sigmoid(0, 1, 2) = 0.693147, 0.313262, 0.126928; sum 1.133337.

    The margins are (chosen 0, 2, 1) - (rejected 0, 1, -1); reference log-probabilities are all -5.
    """
    policy_chosen, policy_rejected = torch.tensor([-5.0, -3.0, -4.0]), torch.tensor([-5.0, -4.0, -6.0])
    five = torch.full((3,), -5.0)
    loss, metrics = dpo_loss(policy_chosen, policy_rejected, five, five, beta=1.0)
    assert loss.item() == pytest.approx(0.693147 + 0.313262 + 0.126928, abs=1e-6)
    assert {name: value.item() for name, value in metrics.items()} == {
        "reward/chosen": 3.0,
        "reward/rejected": 0.0,
        "reward/margin": 3.0,
        "reward/accuracy": 2.0,  # a margin of 0 is not a win
        "policy/chosen_logps": -12.0,
        "policy/rejected_logps": -15.0,
    }


def test_policy_equal_to_reference_by_hand() -> None:
    """c = r = 0, b = 0.1: log 2; robust log 2 (1 - 2e) / (1 - 2e); hinge 1; ipo (1 / 0.2)^2 = 25; apo 1 - 1/2 + 1/2."""
    logps, lengths = pairs(1)
    chosen, rejected = logps[:2]
    for loss_type, want in (
        ("sigmoid", math.log(2)),
        ("sigmoid_norm", math.log(2)),
        ("robust", math.log(2)),
        ("hinge", 1.0),
        ("ipo", 25.0),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
    ):
        smoothing = smoothing_for(loss_type)
        loss, metrics = dpo_loss(
            chosen, rejected, chosen, rejected, loss_type=loss_type, label_smoothing=smoothing, **lengths
        )
        assert loss.item() == pytest.approx(want)
        assert metrics["reward/margin"] == metrics["reward/accuracy"] == 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_values_equal_the_papers_equation(loss_type: str) -> None:
    logps, lengths = pairs()
    e = smoothing_for(loss_type)
    loss, metrics = dpo_loss(*logps, beta=0.3, loss_type=loss_type, label_smoothing=e, **lengths)
    want = 0.0
    rewards: list[tuple[float, float]] = []
    for pw, pl, rw, rl, n_w, n_l in zip(*(t.tolist() for t in (*logps, *lengths.values())), strict=True):
        want += reference(loss_type, pw - rw, pl - rl, n_w, n_l, 0.3, e)
        per_token = loss_type in ("ipo", "sigmoid_norm")
        rewards.append((0.3 * (pw - rw) / (n_w if per_token else 1), 0.3 * (pl - rl) / (n_l if per_token else 1)))
    assert loss.item() == pytest.approx(want, rel=1e-12)
    assert metrics["reward/chosen"].item() == pytest.approx(sum(c for c, _ in rewards))
    assert metrics["reward/rejected"].item() == pytest.approx(sum(r for _, r in rewards))
    assert metrics["reward/margin"].item() == pytest.approx(sum(c - r for c, r in rewards))
    assert metrics["reward/accuracy"].item() == sum(c > r for c, r in rewards)
    assert metrics["policy/chosen_logps"].item() == pytest.approx(logps[0].sum().item())
    assert metrics["policy/rejected_logps"].item() == pytest.approx(logps[1].sum().item())


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradient(loss_type: str) -> None:
    """Numerical derivatives in both policy log-probabilities; the reference gets none and metrics carry none."""
    logps, lengths = pairs()
    options: dict[str, Any] = {"beta": 0.3, "loss_type": loss_type, "label_smoothing": smoothing_for(loss_type)}
    policy = [values.requires_grad_() for values in logps[:2]]
    frozen = [values.requires_grad_() for values in logps[2:]]

    def function(chosen: Tensor, rejected: Tensor) -> Tensor:
        return dpo_loss(chosen, rejected, *frozen, **options, **lengths)[0]

    assert torch.autograd.gradcheck(function, policy)
    loss, metrics = dpo_loss(*policy, *frozen, **options, **lengths)
    loss.backward()
    assert all(values.grad is None for values in frozen)
    assert not any(value.requires_grad for value in metrics.values())


def test_gradient_weighs_pairs_by_how_wrong_they_are() -> None:
    """DPO, below eq. 7: the gradient of log pi(y_w) is -beta * sigmoid(-beta * d)."""
    logps, _ = pairs()
    chosen = logps[0].requires_grad_()
    dpo_loss(chosen, *logps[1:], beta=0.3)[0].backward()
    d = (chosen - logps[1] - logps[2] + logps[3]).detach()
    torch.testing.assert_close(chosen.grad, -0.3 * torch.sigmoid(-0.3 * d))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_sum_over_the_batch_is_the_sum_over_its_microbatches(loss_type: str) -> None:
    logps, lengths = pairs()
    options: dict[str, Any] = {"loss_type": loss_type, "label_smoothing": smoothing_for(loss_type)}
    whole, metrics = dpo_loss(*logps, **options, **lengths)
    parts = [
        dpo_loss(*(v[rows] for v in logps), **options, **{name: v[rows] for name, v in lengths.items()})
        for rows in (slice(0, 1), slice(1, 6))
    ]
    torch.testing.assert_close(whole, sum(loss for loss, _ in parts))
    for name, value in metrics.items():
        torch.testing.assert_close(value, sum(part[name] for _, part in parts))


def test_large_margins_stay_finite() -> None:
    """-log sigmoid(-1000) is 1000, not inf: a pair the policy has quite wrong still gives a gradient of size beta."""
    zero = torch.zeros(1)
    chosen = torch.full((1,), -1000.0, requires_grad=True)
    loss, _ = dpo_loss(chosen, zero, zero, zero, beta=1.0)
    loss.backward()
    assert loss.item() == 1000.0
    assert chosen.grad is not None and chosen.grad.item() == -1.0


def test_no_pairs_still_run_backward() -> None:
    empty = torch.zeros(0, requires_grad=True)
    loss, metrics = dpo_loss(empty, empty, empty, empty)
    loss.backward()
    assert loss.item() == 0.0 and metrics["reward/accuracy"] == 0


def test_dtypes() -> None:
    for given, result in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert dpo_loss(*(torch.zeros(2, dtype=given) for _ in range(4)))[0].dtype == result


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss_type": "sigmoyd"}, "'sigmoyd' is not a DPO loss; use one of sigmoid, "),
        ({"loss_type": "ipo"}, "'ipo' divides by length: pass chosen_lengths and rejected_lengths"),
        ({"loss_type": "sigmoid_norm"}, "divides by length"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "has no meaning in loss_type 'hinge'"),
        ({"loss_type": "ipo", "chosen_lengths": torch.ones(3), "rejected_lengths": torch.ones(1)}, "one value a pair"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        dpo_loss(*(torch.zeros(3) for _ in range(4)), **options)
