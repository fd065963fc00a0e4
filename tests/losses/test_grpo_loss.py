"""The GRPO loss, its advantages and denominators. Shapes: B sequences, T tokens."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from losses.grpo import group_advantages, grpo_loss, kl_estimate, loss_denominator

NAN = math.nan
METRICS = ["policy/approx_kl", "policy/clip_high", "policy/clip_low", "policy/kl"]


def batch(rows: int = 6, tokens: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Ratios well on both sides of the clip range, lengths 0 .. tokens, both signs of advantage."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(rows, tokens, generator=generator, dtype=torch.float64)

    logprobs = -2 + 0.5 * normal()
    return {
        "logprobs": logprobs,
        "old_logprobs": logprobs + 0.4 * normal(),
        "advantages": torch.tensor([1.5, -1.0, 0.0, 0.3, -0.2, 2.0], dtype=torch.float64)[:rows],
        "mask": torch.arange(tokens) < torch.tensor([[5], [3], [4], [1], [5], [0]])[:rows],
        "ref_logprobs": logprobs + 0.3 * normal(),
    }


def reference(
    data: dict[str, Tensor],
    *,
    loss_type: str,
    importance_sampling_level: str = "token",
    low: float = 0.2,
    high: float = 0.2,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    delta: float = math.inf,
) -> tuple[float, dict[str, float]]:
    """The papers' sums, one token at a time."""
    total = 0.0
    metrics = dict.fromkeys([*METRICS, "policy/ratio_max"], 0.0)
    for i, a in enumerate(data["advantages"].tolist()):
        positions = [t for t in range(data["mask"].shape[1]) if data["mask"][i, t]]
        log_ratios = [(data["logprobs"][i, t] - data["old_logprobs"][i, t]).item() for t in positions]
        sequence_loss = 0.0
        for t, log_ratio in zip(positions, log_ratios, strict=True):
            ratio = math.exp(log_ratio)
            if importance_sampling_level == "sequence":
                ratio = math.prod(math.exp(x) for x in log_ratios) ** (1 / len(log_ratios))
            x = (data["ref_logprobs"][i, t] - data["logprobs"][i, t]).item()
            kl = {"k1": -x, "k2": x * x / 2, "k3": math.exp(x) - 1 - x}[kl_estimator]
            clipped = min(max(ratio, 1 - low), 1 + high)
            sequence_loss += -min(min(ratio, delta) * a, clipped * a) + beta * kl
            metrics["policy/kl"] += kl
            metrics["policy/approx_kl"] += math.exp(log_ratio) - 1 - log_ratio
            metrics["policy/clip_low"] += ratio < 1 - low and a < 0
            metrics["policy/clip_high"] += ratio > 1 + high and a > 0
            metrics["policy/ratio_max"] = max(metrics["policy/ratio_max"], ratio)
        total += sequence_loss / len(positions) if loss_type == "grpo" and positions else sequence_loss
    return total, metrics


# Advantages


def test_group_advantages_by_hand() -> None:
    """Rewards 0, 0, 1, 1: mean 1/2, variance (4 * 1/4) / 3 = 1/3, std 0.577350; 0.5 / (0.577350 + 1e-4) = 0.865875."""
    got = group_advantages(torch.tensor([0.0, 0.0, 1.0, 1.0]), 4)
    torch.testing.assert_close(got, 0.865875 * torch.tensor([-1.0, -1.0, 1.0, 1.0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_the_definition(scale: str) -> None:
    """Three groups of four in row-major order, with gaps; the standard library's stdev has ddof 1."""
    rows = [[0.5, 1.0, NAN, 3.0], [0.0, 7.0, 0.0, -2.0], [NAN, NAN, 1.0, 1.5]]
    everything = [r for row in rows for r in row if not math.isnan(r)]
    want = []
    for row in rows:
        present = [r for r in row if not math.isnan(r)]
        divisor = {
            "group": statistics.stdev(present) + 1e-4,
            "batch": statistics.stdev(everything) + 1e-4,
            "none": 1.0,
        }[scale]
        want += [0.0 if math.isnan(r) else (r - statistics.mean(present)) / divisor for r in row]
    got = group_advantages(torch.tensor(rows, dtype=torch.float64).flatten(), 4, scale=scale)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("dull", [[0.1] * 7, [NAN] * 7, [NAN] * 6 + [3.0], [0.1] * 5 + [NAN] * 2, [1e6 / 3] * 7])
def test_dull_groups_get_exactly_zero(scale: str, dull: list[float]) -> None:
    """Seven times 0.1 in fp32 has a mean that is not 0.1; an interesting group beside it keeps its advantages."""
    got = group_advantages(torch.tensor([*dull, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]), 7, scale=scale)
    assert torch.equal(got[:7], torch.zeros(7))
    assert got[13] > 0 and (got[7:13] < 0).all()


def test_missing_rewards_do_not_move_the_others() -> None:
    """A missing reward counted as 0 would make the two answers of reward 1 and 2 both look good."""
    got = group_advantages(torch.tensor([1.0, NAN, 2.0, NAN]), 4)
    assert got[1] == got[3] == 0
    assert got[0] == -got[2] and got[2].item() == pytest.approx(0.5 / (math.sqrt(0.5) + 1e-4))


def test_rewards_are_left_as_they_were_and_widened() -> None:
    rewards = torch.tensor([1, 2, 3, 5])
    assert group_advantages(rewards, 2).dtype == torch.float32
    assert group_advantages(rewards.double(), 2).dtype == torch.float64
    assert rewards.tolist() == [1, 2, 3, 5]
    assert group_advantages(torch.zeros(0), 4).shape == (0,)


def test_advantages_refuse_what_cannot_be_grouped() -> None:
    with pytest.raises(ValueError, match="'std' does not name a divisor of advantages; use one of group, batch, none"):
        group_advantages(torch.zeros(4), 2, scale="std")
    with pytest.raises(ValueError, match="num_generations=3"):
        group_advantages(torch.zeros(4), 3)


# Loss


def test_clipping_by_hand() -> None:
    """epsilon 0.2, epsilon_high 0.5; ratios 2, 1/2, 2, 1/2 with advantages 1, 1, -1, -1.

    -min(2, 1.5) = -1.5, -min(0.5, 0.8) = -0.5, -min(-2, -1.5) = 2, -min(-0.5, -0.8) = 0.8: together 0.8. Clipped, so
    without gradient: the first (high) and the last (low). The others have gradient -ratio * advantage: -0.5 and 2.
    approx_kl is 2 (2 - 1 - log 2) + 2 (1/2 - 1 + log 2) = 1.
    """
    logprobs = torch.tensor([[2.0], [0.5], [2.0], [0.5]], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    loss, metrics = grpo_loss(
        logprobs, torch.zeros(4, 1).double(), advantages, torch.ones(4, 1), epsilon=0.2, epsilon_high=0.5
    )
    loss.backward()
    assert loss.item() == pytest.approx(0.8)
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad.flatten(), torch.tensor([0.0, -0.5, 2.0, 0.0], dtype=torch.float64))
    got = {name: value.item() for name, value in metrics.items()}
    assert got == pytest.approx(
        {"policy/approx_kl": 1.0, "policy/clip_low": 1, "policy/clip_high": 1, "policy/ratio_max": 2.0}
    )


def test_reductions_by_hand() -> None:
    """On policy, so every ratio is 1: advantages 1 and -2 over 1 and 3 tokens.

    grpo: -1 + 2 = 1. dapo and dr_grpo: -1 * 1 + 2 * 3 = 5. Denominators with a cap of 10 tokens: 2 sequences, 4 tokens,
    2 * 10 = 20.
    """
    logprobs = torch.full((2, 3), -1.0)
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    for loss_type, want, denominator in (("grpo", 1.0, 2), ("dapo", 5.0, 4), ("dr_grpo", 5.0, 20)):
        loss, _ = grpo_loss(logprobs, logprobs, torch.tensor([1.0, -2.0]), mask, loss_type=loss_type)
        assert loss.item() == want
        counts = {"num_tokens": 4, "num_sequences": 2, "max_completion_length": 10}
        assert loss_denominator(loss_type, **counts) == denominator


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("delta", [None, 1.4])
def test_values_equal_the_papers_sums(loss_type: str, level: str, kl_estimator: str, delta: float | None) -> None:
    data = batch()
    loss, metrics = grpo_loss(
        **data,
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon=0.1,
        epsilon_high=0.15,
        beta=0.05,
        kl_estimator=kl_estimator,
        delta=delta,
    )
    want, want_metrics = reference(
        data,
        loss_type=loss_type,
        importance_sampling_level=level,
        low=0.1,
        high=0.15,
        beta=0.05,
        kl_estimator=kl_estimator,
        delta=delta or math.inf,
    )
    assert want_metrics["policy/clip_low"] > 0 and want_metrics["policy/clip_high"] > 0
    assert loss.item() == pytest.approx(want, rel=1e-12)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(want_metrics, rel=1e-12)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_gradient(loss_type: str, level: str, kl_estimator: str) -> None:
    """Numerical derivatives in logprobs; the old, the reference and the advantages get none."""
    data = {name: values if name == "mask" else values.requires_grad_() for name, values in batch().items()}
    fixed = {name: values for name, values in data.items() if name != "logprobs"}
    options: dict[str, Any] = {"loss_type": loss_type, "importance_sampling_level": level, "kl_estimator": kl_estimator}

    def function(logprobs: Tensor) -> Tensor:
        return grpo_loss(logprobs, **fixed, **options, beta=0.05, delta=1.4)[0]

    assert torch.autograd.gradcheck(function, (data["logprobs"],))
    function(data["logprobs"]).backward()
    assert all(fixed[name].grad is None for name in ("old_logprobs", "ref_logprobs", "advantages"))


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    """With old = logprobs the gradient of token t is -A, divided by the length in grpo, at either level."""
    data = batch()
    lengths = data["mask"].sum(dim=1, keepdim=True).clamp(min=1)
    for level in ("token", "sequence"):
        for loss_type, divisor in (("dapo", torch.ones_like(lengths)), ("grpo", lengths)):
            leaf = data["logprobs"].clone().requires_grad_()
            loss, metrics = grpo_loss(
                leaf,
                leaf,
                data["advantages"],
                data["mask"],
                loss_type=loss_type,
                importance_sampling_level=level,
            )
            loss.backward()
            torch.testing.assert_close(leaf.grad, -data["advantages"].unsqueeze(1) * data["mask"] / divisor)
            assert metrics["policy/ratio_max"] == 1 and metrics["policy/approx_kl"] == 0


def test_sequence_ratio_has_the_gspo_gradient() -> None:
    """GSPO's gradient, without clipping: d/d logprob_t of -s A is -s A / |y|, the same for every token."""
    data = batch()
    leaf = data["logprobs"].requires_grad_()
    arguments = (leaf, data["old_logprobs"], data["advantages"], data["mask"])
    wide: dict[str, Any] = {"epsilon": 0.999, "epsilon_high": 1e9}
    grpo_loss(*arguments, loss_type="grpo", importance_sampling_level="sequence", **wide)[0].backward()
    for i, length in enumerate(data["mask"].sum(dim=1).tolist()):
        log_ratios = (data["logprobs"] - data["old_logprobs"])[i, :length].detach()
        s = math.exp(log_ratios.mean()) if length else 1.0
        want = torch.full((length,), -s * data["advantages"][i].item() / max(length, 1), dtype=torch.float64)
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad[i, :length], want)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sum_over_the_batch_is_the_sum_over_its_microbatches(loss_type: str, level: str) -> None:
    """Rows of 5, 3, 4, 1, 5 and 0 tokens cut unevenly, and each part cut to its own longest row."""
    data = batch()
    options: dict[str, Any] = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.05}
    whole, metrics = grpo_loss(**data, **options)
    parts = []
    for rows, tokens in ((slice(0, 1), 5), (slice(1, 4), 4), (slice(4, 6), 5)):
        part = {name: v[rows] if v.dim() == 1 else v[rows, :tokens] for name, v in data.items()}
        parts.append(grpo_loss(**part, **options))
    torch.testing.assert_close(whole, sum(loss for loss, _ in parts))
    for name in METRICS:
        torch.testing.assert_close(metrics[name], sum(part[name] for _, part in parts))
    assert metrics["policy/ratio_max"] == max(part["policy/ratio_max"] for _, part in parts)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("garbage", [0.0, 1e4, math.inf, -math.inf, NAN])
def test_padding_does_not_matter(loss_type: str, level: str, garbage: float) -> None:
    """Whatever stands outside the mask: the same value, metrics and gradient, and no input is written to."""
    options: dict[str, Any] = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.05}
    clean, dirty = batch(), batch()
    for name in ("logprobs", "old_logprobs", "ref_logprobs"):
        dirty[name] = torch.where(dirty["mask"], dirty[name], garbage if name != "old_logprobs" else -garbage)
    before = {name: values.clone() for name, values in dirty.items()}
    results = []
    for data in (clean, dirty):
        data["logprobs"].requires_grad_()
        loss, metrics = grpo_loss(**data, **options)
        loss.backward()
        results.append((loss, metrics, data["logprobs"].grad))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert all(torch.equal(dirty[name].nan_to_num(), before[name].nan_to_num()) for name in dirty)


def test_no_tokens_still_run_backward() -> None:
    for shape in ((2, 3), (0, 0), (2, 0)):
        logprobs = torch.full(shape, NAN, requires_grad=True)
        loss, metrics = grpo_loss(
            logprobs, torch.zeros(shape), torch.ones(shape[0]), torch.zeros(shape), loss_type="grpo"
        )
        loss.backward()
        assert loss.item() == 0.0 and all(value == 0 for value in metrics.values())
        assert torch.equal(logprobs.grad, torch.zeros(shape))
    counts = {"num_tokens": 0, "num_sequences": 0, "max_completion_length": 8}
    assert {loss_denominator(loss_type, **counts) for loss_type in ("grpo", "dapo", "dr_grpo")} == {1}


def test_kl_estimators_by_hand() -> None:
    """Policy 1/2, reference 1/4, so x = log(1/4 / 1/2) = -log 2: k1 log 2, k2 (log 2)^2 / 2, k3 1/2 - 1 + log 2."""
    logprobs, reference_logprobs = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    for estimator, want in (("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", math.log(2) - 0.5)):
        assert kl_estimate(logprobs, reference_logprobs, estimator).item() == pytest.approx(want)


def test_kl_estimators_agree_in_expectation() -> None:
    """Over all tokens of a small vocabulary: sum_v p_v k1_v = sum_v p_v k3_v = KL(p || q) exactly.

    As a loss, k2 has the KL's gradient: sum_v p_v d k2_v (p a constant, as the sampler's is) = d KL.
    """
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy = logits[0].clone().requires_grad_()
    logp, logq = torch.log_softmax(policy, 0), torch.log_softmax(logits[1], 0)
    kl = (logp.exp() * (logp - logq)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((logp.exp() * kl_estimate(logp, logq, estimator)).sum(), kl)
    as_loss = (logp.detach().exp() * kl_estimate(logp, logq, "k2")).sum()
    torch.testing.assert_close(*(torch.autograd.grad(value, policy, retain_graph=True) for value in (as_loss, kl)))


def test_dtypes() -> None:
    for given, result in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        values = torch.zeros(2, 3, dtype=given)
        loss, metrics = grpo_loss(values, values, torch.ones(2, dtype=given), torch.ones(2, 3), ref_logprobs=values)
        assert {loss.dtype} | {value.dtype for value in metrics.values()} == {result}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss_type": "ppo"}, "loss_type 'ppo' is not known; use one of grpo, dapo, dr_grpo"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level 'word' is not known; use one of token, seq"),
        ({"kl_estimator": "k4"}, "kl_estimator 'k4' is not known; use one of k1, k2, k3"),
        ({"beta": 0.1}, "beta 0.1 needs ref_logprobs"),
        ({"beta": -0.1}, "beta is -0.1; give a finite number of 0 or more"),
        ({"epsilon": -0.2}, "epsilon is -0.2; give a number from 0 to 1"),
        ({"epsilon": 1.2}, "epsilon is 1.2; give a number from 0 to 1"),
        ({"epsilon_high": -0.1}, "epsilon_high is -0.1; give a finite number of 0 or more"),
        ({"delta": 1.2}, "delta 1.2 must be above 1 \\+ epsilon_high = 1.2"),
        ({"advantages": torch.zeros(2, 1)}, r"advantages must be \[B\] or \[B, T\]"),
        ({"ref_logprobs": torch.zeros(1, 3)}, "mask must have the shape"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], sentence: str) -> None:
    zeros = torch.zeros(2, 3)
    arguments: dict[str, Any] = {"advantages": torch.zeros(2), "mask": torch.ones(2, 3)} | options
    with pytest.raises(ValueError, match=sentence):
        grpo_loss(zeros, zeros, **arguments)


def test_unknown_denominator_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'ppo' is not a GRPO loss; use one of grpo, dapo, dr_grpo"):
        loss_denominator("ppo", num_tokens=1, num_sequences=1, max_completion_length=1)
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_tokens_of_another_sampler_are_weighted_up_to_a_cap():
    """One sequence, A = 1, on policy, log-probabilities -1, -1, -1 against the sampler's -1, -1.5, -3: weights
    min(exp(0), 2), min(exp(0.5), 2), min(exp(2), 2), so the loss is -(1 + 1.6487 + 2), its gradient the weights."""
    logprobs = torch.full((1, 4), -1.0, dtype=torch.float64, requires_grad=True)
    sampler = torch.tensor([[-1.0, -1.5, -3.0, math.inf]], dtype=torch.float64)  # the last one stands outside the mask
    mask = torch.tensor([[True, True, True, False]])
    weights = torch.tensor([1.0, math.exp(0.5), 2.0, 0.0], dtype=torch.float64)
    loss, metrics = grpo_loss(logprobs, logprobs.detach(), torch.ones(1), mask, sampler_logprobs=sampler)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert loss.item() == pytest.approx(-weights.sum().item())
    assert torch.allclose(gradient, -weights[None])
    assert metrics["policy/sampler_weight"] == pytest.approx(weights.sum().item())
    assert metrics["policy/sampler_capped"] == 1


def test_the_kl_term_is_not_weighted():
    """A = 0 leaves beta * KL alone: the same with and without the sampler's log-probabilities."""
    data = batch() | {"advantages": torch.zeros(6, dtype=torch.float64)}
    plain, _ = grpo_loss(**data, beta=0.3)
    weighted, _ = grpo_loss(**data, beta=0.3, sampler_logprobs=data["old_logprobs"] - 1)
    assert weighted == plain != 0


def test_a_sampler_that_is_the_old_policy_changes_nothing():
    data = batch()
    assert grpo_loss(**data, sampler_logprobs=data["old_logprobs"])[0] == grpo_loss(**data)[0]


def test_a_cap_must_be_above_zero():
    data = batch()
    with pytest.raises(ValueError, match="importance_sampling_cap"):
        grpo_loss(**data, sampler_logprobs=data["old_logprobs"], importance_sampling_cap=0.0)
