"""What every loss builds on: reductions over a mask."""

from __future__ import annotations

import math

import pytest
import torch

from losses.masked import at_least_float32, keep_masked


def test_sum_counts_masked_positions_only() -> None:
    """1 + 4 + 6 = 11; the NaN and the inf beside them are not in it."""
    values = torch.tensor([[1.0, math.nan, 4.0], [math.inf, -math.inf, 6.0]])
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    assert keep_masked(values, mask).sum().item() == 11.0
    assert keep_masked(values, mask.bool()).sum().item() == 11.0
    assert keep_masked(values, mask.float()).sum().item() == 11.0


def test_gradient_outside_the_mask_is_exactly_zero() -> None:
    """exp(inf) outside the mask: its derivative would be inf, and 0 * inf NaN."""
    values = torch.tensor([[1.0, math.inf]], requires_grad=True)
    keep_masked(values, torch.tensor([[True, False]])).exp().sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor([[math.e, 0.0]]))


def test_low_precision_is_summed_in_fp32() -> None:
    """4,096 ones: a bf16 sum could not tell 256 from 257."""
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert keep_masked(ones, ones).dtype == torch.float32
    assert keep_masked(ones, ones).sum().item() == 4096
    assert at_least_float32(ones.double()).dtype == torch.float64


def test_a_mask_that_would_broadcast_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3\) and \(2, 3\)"):
        keep_masked(torch.ones(2, 3), torch.ones(1, 3))
