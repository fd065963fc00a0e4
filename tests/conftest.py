"""What several tests need."""

import os

import pytest
import torch

# For the processes that tests start: threads of several processes that wait for each other on few cores take five times
# as long. (This process has read it already.)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test reaches a hub: without a network it would be asked again and again for a minute and a half.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


def make_float32_mean_float64(setattr_=setattr) -> None:
    """transformers computes norms, routers and eager softmax in fp32 whatever the model's dtype. With this it means
    float64 by that, so that a difference above 1e-12 is a difference of the algorithm."""
    setattr_(torch, "float32", torch.float64)
    setattr_(torch, "float", torch.float64)
    setattr_(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture
def only_float64(monkeypatch):
    make_float32_mean_float64(monkeypatch.setattr)
