"""Reductions over the positions that count, shared by the three losses.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """`values` in fp32, or untouched where they are fp32 or float64 (as in the proofs) already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def keep_masked(values: Tensor, mask: Tensor) -> Tensor:
    """A copy of `values` [B, T] in at least fp32, zero wherever `mask` [B, T] is false.

    Losses call this on what they are given, before any arithmetic: what stands outside the mask
    (padding, even inf or NaN) then reaches neither the value nor the gradient. Multiplying by the
    mask would not do: 0 * inf is NaN.

    Raises ValueError when the shapes differ, because broadcasting would count some tokens twice.
    """
    if values.shape != mask.shape:
        shapes = f"{tuple(mask.shape)} and {tuple(values.shape)}"
        raise ValueError(f"the mask must have the shape of what it masks, but they are {shapes}")
    return torch.where(mask.bool(), at_least_float32(values), 0.0)
