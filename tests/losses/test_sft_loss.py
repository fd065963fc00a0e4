"""The SFT loss. Shapes: B sequences, T tokens."""

from __future__ import annotations

import math

import pytest
import torch

from losses.sft import sft_loss


def test_nll_by_hand() -> None:
    """Target tokens of probability 1/2, 1/4 and 1/8: -log 1/2 - log 1/4 - log 1/8 = (1 + 2 + 3) log 2."""
    logprobs = -math.log(2) * torch.tensor([[1.0, 2.0, 100.0], [3.0, 100.0, 100.0]])
    loss, metrics = sft_loss(logprobs, torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert loss.item() == pytest.approx(6 * math.log(2))
    assert metrics == {"loss/nll": loss}


def test_dft_by_hand() -> None:
    """Weights 1/2, 1/4, 1/8: (1/2 + 2/4 + 3/8) log 2 = 11/8 log 2; each gradient is -p_t, as if p were a constant."""
    logprobs = (-math.log(2) * torch.tensor([[1.0, 2.0, 3.0]])).requires_grad_()
    loss, metrics = sft_loss(logprobs, torch.ones(1, 3), loss_type="dft")
    loss.backward()
    assert loss.item() == pytest.approx(11 / 8 * math.log(2))
    assert metrics["loss/nll"].item() == pytest.approx(6 * math.log(2))
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, -torch.tensor([[1 / 2, 1 / 4, 1 / 8]]))


def test_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.rand(3, 4, generator=generator) < 0.6
    assert torch.autograd.gradcheck(lambda logprobs: sft_loss(logprobs, mask)[0], (logprobs,))


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_sum_over_the_batch_is_the_sum_over_its_microbatches(loss_type: str) -> None:
    """Rows of 1 and of 9 targets: a mean of means would weigh the first nine times too much."""
    logprobs = -torch.rand(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[1], [9]])
    whole, metrics = sft_loss(logprobs, mask, loss_type=loss_type)
    parts = [sft_loss(logprobs[i : i + 1], mask[i : i + 1], loss_type=loss_type) for i in range(2)]
    torch.testing.assert_close(whole, sum(loss for loss, _ in parts))
    torch.testing.assert_close(metrics["loss/nll"], sum(part["loss/nll"] for _, part in parts))


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("garbage", [0.0, 7.0, math.inf, -math.inf, math.nan])
def test_padding_does_not_matter(loss_type: str, garbage: float) -> None:
    logprobs = torch.tensor([[-1.0, garbage], [-0.5, -2.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, True]])
    kept = logprobs.detach().clone(), mask.clone()
    loss, _ = sft_loss(logprobs, mask, loss_type=loss_type)
    loss.backward()
    assert loss.item() == pytest.approx(
        {"nll": 3.5, "dft": 1 * math.exp(-1) + 0.5 * math.exp(-0.5) + 2 * math.exp(-2)}[loss_type]
    )
    assert logprobs.grad is not None and logprobs.grad[0, 1] == 0 and logprobs.grad.isfinite().all()
    assert torch.equal(logprobs.detach().nan_to_num(), kept[0].nan_to_num()) and torch.equal(mask, kept[1])


def test_no_targets_still_run_backward() -> None:
    logprobs = torch.full((2, 3), math.nan, requires_grad=True)
    loss, _ = sft_loss(logprobs, torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logprobs.grad, torch.zeros(2, 3))


def test_dtypes() -> None:
    for given, result in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert sft_loss(torch.zeros(1, 2, dtype=given), torch.ones(1, 2))[0].dtype == result


def test_unknown_loss_type_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'nl' is not an SFT loss; use one of nll, dft"):
        sft_loss(torch.zeros(1, 2), torch.ones(1, 2), loss_type="nl")
