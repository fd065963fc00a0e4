"""Optimizer, schedule and clipping against pencil numbers."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from loops.shared.optim import (
    OptimConfig,
    build_optimizer,
    build_schedule,
    clip_gradients,
    learning_rate_at,
    parameter_groups,
)


class RMSNorm(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*shape))


class TinyDecoder(nn.Module):
    """An embedding tied to the head, a biased layer, a norm with a two-dimensional weight, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layer = nn.Linear(4, 4)
        self.norm = RMSNorm(2, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.lora_magnitude_vector = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def config(**keys: object) -> OptimConfig:
    return OptimConfig(**keys)  # type: ignore[arg-type]


def test_decay_falls_on_matrices_only_and_on_tied_weights_once() -> None:
    model = TinyDecoder()
    decayed, plain = parameter_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model.embed.weight), id(model.layer.weight)]
    assert {id(p) for p in plain["params"]} == {
        id(model.layer.bias),
        id(model.norm.weight),
        id(model.lora_magnitude_vector),
    }
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_lora_matrices_decay_and_the_base_is_in_no_group() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(target_modules=["0"], r=2))
    (group,) = parameter_groups(model, 0.1)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == 2 and {id(p) for p in group["params"]} == {id(p) for p in trainable}
    assert group["weight_decay"] == 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_first_update_is_the_published_one(dtype: torch.dtype) -> None:
    """First step of AdamW: both moments are bias-corrected to g and g^2, so the update is lr * g / (|g| + eps).

    w = 1, g = 4, lr = 0.5, decay = 0.5: w <- 1 * (1 - 0.5 * 0.5) = 0.75, then 0.75 - 0.5 * 4 / 4 = 0.25. The bias
    (no decay): 1 - 0.5 = 0.5. All exact in bfloat16.
    """
    model = nn.Linear(1, 1).to(dtype)
    optimizer = build_optimizer(model, config(learning_rate=0.5, weight_decay=0.5))
    assert optimizer.defaults["fused"]
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.full_like(parameter, 4.0)
    optimizer.step()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-8}[dtype]
    assert model.weight.item() == pytest.approx(0.25, abs=tolerance)
    assert model.bias.item() == pytest.approx(0.5, abs=tolerance)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(nn.Linear(1, 1).requires_grad_(False), config())


def test_cosine_by_pencil() -> None:
    """Peak 1, floor 0.2, 4 warm-up steps of 13: 1/5 .. 4/5, the peak at step 4, then over the 8 steps to step 12.

    Step 8 is half way: cos(pi/2) = 0, the mean 0.6. Step 6 is a quarter: cos(pi/4) = 0.70711, part 0.85355,
    0.85355 + 0.14645 * 0.2 = 0.88284.
    """
    c = config(learning_rate=1.0, min_learning_rate=0.2, warmup_steps=4)
    rates = [learning_rate_at(step, c, 13) for step in range(15)]
    assert rates[:4] == [0.2, 0.4, 0.6, 0.8]
    assert rates[4] == 1.0
    assert rates[6] == pytest.approx(0.88284, abs=1e-5)
    assert rates[8] == pytest.approx(0.6, abs=1e-12)
    assert rates[12:] == [0.2, 0.2, 0.2]


def test_linear_by_pencil() -> None:
    """Peak 1, floor 0, no warm-up, 5 steps: 1, 3/4, 1/2, 1/4, 0."""
    c = config(learning_rate=1.0, min_learning_rate=0.0, lr_scheduler_type="linear")
    assert [learning_rate_at(step, c, 5) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_constant_stays_at_the_peak_after_warm_up_and_has_no_floor() -> None:
    """Warm-up of 0.07 of 100 steps is 7 (0.07 * 100 is 7.000000000000001 in floating point)."""
    c = config(learning_rate=1e-8, lr_scheduler_type="constant", warmup_ratio=0.07)
    assert learning_rate_at(6, c, 100) == pytest.approx(1e-8 * 7 / 8)
    assert {learning_rate_at(step, c, 100) for step in range(7, 101)} == {1e-8}


def test_warmup_steps_win_over_the_ratio() -> None:
    c = config(learning_rate=1.0, warmup_steps=1, warmup_ratio=0.5)
    assert [learning_rate_at(step, c, 10) for step in (0, 1)] == [0.5, 1.0]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3, 50])
def test_short_runs_and_warm_ups_longer_than_the_run_are_finite(kind: str, total: int) -> None:
    """The one step of a one-step run is at the peak, whatever the schedule."""
    for warmup in (0, 1, 60):
        c = config(learning_rate=1.0, lr_scheduler_type=kind, warmup_steps=warmup)
        assert all(0 < learning_rate_at(step, c, total) <= 1 for step in range(total + 1))
    assert learning_rate_at(0, config(learning_rate=1.0, lr_scheduler_type=kind), 1) == 1.0


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_optimizer_gets_exactly_these_rates(kind: str) -> None:
    """The group's rate equals the pure function bit for bit, at the floor too, and stays equal after a reload."""
    c = config(learning_rate=3e-4, min_learning_rate=7e-7, lr_scheduler_type=kind, warmup_steps=3, weight_decay=0.1)
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, c)
    schedule = build_schedule(optimizer, c, 11)
    seen = []
    for step in range(11):
        if step == 5:
            saved = (optimizer.state_dict(), schedule.state_dict())
            optimizer = build_optimizer(model, c)
            schedule = build_schedule(optimizer, c, 11)
            optimizer.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == [learning_rate_at(step, c, 11) for step in range(11)]
    assert seen[3] == 3e-4 and seen[10] == 7e-7


def test_a_run_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="0 steps"):
        build_schedule(build_optimizer(nn.Linear(1, 1), config()), config(), 0)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type.*cosine, linear, constant"),
        ({"learning_rate": 1e-8}, "min_learning_rate.*learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"learning_rate": -1.0, "lr_scheduler_type": "constant"}, "learning_rate is -1.0"),
        ({"warmup_ratio": 3.0}, "warmup_ratio is 3.0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"adam_beta2": 1.0}, "adam_beta2 is 1.0"),
        ({"adam_epsilon": 0.0}, "adam_epsilon"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
    ],
)
def test_impossible_settings_are_refused_by_name(keys: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**keys)


def gradients(dtype: torch.dtype) -> nn.Linear:
    """Weight gradient (3, 0) and bias gradient 4: the global norm is 5."""
    model = nn.Linear(2, 1).to(dtype)
    model.weight.grad = torch.tensor([[3.0, 0.0]], dtype=dtype)
    model.bias.grad = torch.tensor([4.0], dtype=dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_clipping_returns_the_norm_before_and_scales_to_the_limit(dtype: torch.dtype) -> None:
    """3-4-5: the norm is 5; clipped to 1 the gradients are 0.6 and 0.8. bfloat16 is measured in float32."""
    model = gradients(dtype)
    norm = clip_gradients(None, model, 1.0)
    assert norm.item() == 5.0 and norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert model.weight.grad is not None and model.weight.grad.dtype == dtype
    assert model.weight.grad[0, 0].item() == pytest.approx(0.6, rel=4e-3)
    assert model.bias.grad.item() == pytest.approx(0.8, rel=4e-3)


@pytest.mark.parametrize("limit", [0.0, 5.5])
def test_no_limit_and_a_high_limit_leave_the_gradients_alone(limit: float) -> None:
    model = gradients(torch.float32)
    assert clip_gradients(None, model, limit).item() == 5.0
    assert model.weight.grad.tolist() == [[3.0, 0.0]] and model.bias.grad.tolist() == [4.0]


def test_bfloat16_norm_is_not_rounded_to_bfloat16() -> None:
    """Norm of 1001 ones is sqrt(1001) = 31.638584; the nearest bfloat16 is 31.625."""
    model = nn.Linear(1001, 1, bias=False).to(torch.bfloat16)
    model.weight.grad = torch.ones_like(model.weight)
    assert clip_gradients(None, model, 0.0).item() == pytest.approx(math.sqrt(1001), abs=1e-5)


def test_float64_keeps_its_digits_beside_float32() -> None:
    """1 in float64 and 1e-6 in float32: the norm 1 + 5e-13 exists only in float64."""
    model = nn.ModuleList([nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False)])
    model[0].weight.grad = torch.ones(1, 1, dtype=torch.float64)
    model[1].weight.grad = torch.full((1, 1), 1e-6)
    assert clip_gradients(None, model, 0.0).item() - 1 == pytest.approx(5e-13, rel=1e-2)


def test_without_gradients_the_norm_is_zero() -> None:
    assert clip_gradients(None, nn.Linear(1, 1), 1.0).item() == 0.0


def test_clipped_step_on_shards_equals_the_whole_model() -> None:
    """FSDP2 over two processes, plain and hybrid mesh; in a process of its own, since forked children of a threaded
    parent hang."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, __file__]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


def sharded_step_equals_whole() -> None:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    accelerator = Accelerator(cpu=True)
    for shape in ((2,), (2, 1)):  # (replicas, shards) in the hybrid mesh: every rank holds the whole gradient
        torch.manual_seed(0)
        whole = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).double()
        sharded = copy.deepcopy(whole)
        fully_shard(sharded, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[: len(shape)]))
        rows = torch.randn(6, 5, dtype=torch.float64)
        norms = []
        for model in (whole, sharded):
            optimizer = build_optimizer(model, config(learning_rate=0.1))
            model(rows).pow(2).sum().backward()
            norms.append(clip_gradients(accelerator, model, 0.5))
            optimizer.step()
        assert norms[0] > 0.5 and type(norms[1]) is torch.Tensor
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-14, atol=0)
        for one, other in zip(whole.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(one, other.full_tensor(), rtol=1e-13, atol=1e-14)


if __name__ == "__main__":
    from accelerate import debug_launcher

    torch.set_num_threads(1)
    debug_launcher(sharded_step_equals_whole, num_processes=2)
