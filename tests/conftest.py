"""What several tests need."""

import pytest
import torch


def make_float32_mean_float64(setattr_=setattr) -> None:
    """transformers computes norms, routers and eager softmax in fp32 whatever the model's dtype. With this it means
    float64 by that, so that a difference above 1e-12 is a difference of the algorithm."""
    setattr_(torch, "float32", torch.float64)
    setattr_(torch, "float", torch.float64)
    setattr_(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture
def only_float64(monkeypatch):
    make_float32_mean_float64(monkeypatch.setattr)
