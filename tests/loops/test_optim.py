"""Optimizer, schedule and clipping against pencil numbers."""

from __future__ import annotations

import copy
import io
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from loops.shared.optim import (
    BITSANDBYTES,
    TORCHAO,
    OptimConfig,
    build_optimizer,
    build_schedule,
    clip_gradients,
    learning_rate_at,
    parameter_groups,
    round_stochastically,
    sample_weights,
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


EIGHT_BITS = ("adamw_8bit", "paged_adamw_8bit", "lion_8bit", "adamw_torch_8bit")


def library_of(optimizer: str) -> None:
    pytest.importorskip("torchao" if optimizer in TORCHAO else "bitsandbytes")


class Words(nn.Module):
    """An embedding and two linear layers with biases; the matrices have at least 4,096 elements in whole blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 64)
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layers(self.embed(ids)) @ self.embed.weight.T


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> float:
    """Fit a fixed permutation of 64 words; each step takes 32 of them. Returns the last step's loss."""
    loss = torch.zeros(())
    for step in steps:
        g = torch.Generator().manual_seed(step)
        ids = torch.randperm(64, generator=g)[:32].to(next(model.parameters()).device)
        loss = nn.functional.cross_entropy(model(ids), (ids * 7 + 3) % 64)
        loss.backward()
        clip_gradients(None, model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("optimizer", [*BITSANDBYTES, *TORCHAO])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_first_update_of_the_others_is_the_published_one_too(optimizer: str, dtype: torch.dtype) -> None:
    """As above; and Lion's first step is lr * sign(g), the same 0.5 here. Moments of 8 bits hold a constant exactly."""
    library_of(optimizer)
    model = nn.Linear(64, 64).to(dtype)
    step = build_optimizer(model, config(optimizer=optimizer, learning_rate=0.5, weight_decay=0.5)).step
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.full_like(parameter, 4.0)
    step()
    for parameter, right in ((model.weight, 0.25), (model.bias, 0.5)):
        off = (parameter - right).abs()
        if dtype == torch.bfloat16:
            # float32 may be 1e-5 beside the right value and one of its places, at most 2^-8 here and at least 2^-10, is
            # drawn with the probability of that part: n * 1e-2 of n elements, and five times the root of it
            n = off.numel()
            assert off.max() <= 2**-8 and (off > 1e-5).sum() <= 0.01 * n + 5 * math.sqrt(0.01 * n)
        else:
            assert off.max() < 1e-5


@pytest.mark.parametrize(("optimizer", "moments"), [("adamw_8bit", 2), ("lion_8bit", 1), ("adamw_torch_8bit", 2)])
def test_moments_take_one_byte_an_element(optimizer: str, moments: int) -> None:
    """128 x 64 elements: a byte for each, 4 for the scale of every 256, and a table of 256 floats: 9,344 bytes a moment
    instead of 32,768. Biases are too small; an embedding stays at 4 bytes in bitsandbytes."""
    library_of(optimizer)
    model = Words()
    built = build_optimizer(model, config(optimizer=optimizer))
    train(model, built, range(1))

    def size(parameter: nn.Parameter) -> int:
        tensors = []
        for value in built.state[parameter].values():
            if isinstance(value, torch.Tensor) and value.ndim:
                tensors += [value.codes, value.scale, value.qmap] if hasattr(value, "codes") else [value]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    assert size(model.layers[0].weight) == moments * (8192 + 4 * 32 + 4 * 256)
    assert size(model.layers[0].bias) == moments * 128 * 4
    embedding = moments * (4096 + 4 * 16 + 4 * 256 if optimizer in TORCHAO else 4 * 4096)
    assert size(model.embed.weight) == embedding


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_32bit", "adamw_torch_8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_rounded_moments_learn_as_whole_ones_do(optimizer: str) -> None:
    """60 steps: from log 64 to a thousandth of it, as AdamW does. By then a step takes an eighth off the loss: 1e-2 is
    a twelfth of one (another CPU moves it by 3e-4); float32's 6e-8 add up to less than 1e-4."""
    library_of(optimizer)
    losses = []
    for name in ("adamw_torch", optimizer):
        model = Words()
        built = build_optimizer(model, config(optimizer=name, learning_rate=1e-3, weight_decay=0.01))
        losses.append([train(model, built, range(20)), train(model, built, range(20, 60))])
    assert losses[0][1] < 1e-3 * math.log(64) < 0.1 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if "32bit" in optimizer else 1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", [*BITSANDBYTES, *TORCHAO])
def test_on_a_gpu_they_learn_as_on_a_cpu(optimizer: str) -> None:
    library_of(optimizer)
    losses = []
    for device in ("cpu", "cuda"):
        with torch.device(device):
            model = Words()
        model.load_state_dict(Words().state_dict())  # generators differ between devices
        built = build_optimizer(model, config(optimizer=optimizer, learning_rate=1e-3, weight_decay=0.01))
        losses.append(train(model, built, range(20)))
    assert losses[1] == pytest.approx(losses[0], rel=0.1) and losses[1] < 0.5


@pytest.mark.parametrize("optimizer", ["adamw_torch", "paged_adamw_32bit", *EIGHT_BITS])
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_saved_state_continues_to_the_same_bits(optimizer: str, by_name: bool, tmp_path: Path) -> None:
    """Through `torch.save`, as torch numbers parameters, and as distributed checkpoints name them; schedule on top."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    if optimizer != "adamw_torch":
        library_of(optimizer)
    c = config(optimizer=optimizer, learning_rate=1e-2, weight_decay=0.01, warmup_steps=2)
    model = Words()
    built = build_optimizer(model, c)
    schedule = build_schedule(built, c, 10)
    train(model, built, range(3))
    schedule.step()
    state = get_optimizer_state_dict(model, built) if by_name else built.state_dict()
    torch.save([model.state_dict(), state, schedule.state_dict()], tmp_path / "state.pt")
    train(model, built, range(3, 6))

    weights, state, rates = torch.load(tmp_path / "state.pt", weights_only=False)
    again = Words()
    again.load_state_dict(weights)
    built = build_optimizer(again, c)
    schedule = build_schedule(built, c, 10)
    if by_name:
        set_optimizer_state_dict(again, built, state)
    else:
        built.load_state_dict(state)
    schedule.load_state_dict(rates)
    train(again, built, range(3, 6))
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_stochastic_rounding_has_the_value_as_its_mean() -> None:
    """bfloat16's neighbours of 1 + f/128 are 1 and 1 + 1/128. Of n draws f n go up, give or take sqrt(f (1 - f) n):
    five times that holds but for one in a million."""
    n = 1 << 16
    for fraction in (0.0, 0.08, 0.5, 0.9):
        for sign in (1, -1):
            rounded = round_stochastically(torch.full((n,), sign * (1 + fraction / 128)), key=7)
            assert set(rounded.tolist()) <= {sign * 1.0, sign * (1 + 1 / 128)}
            ups = (rounded.abs() > 1).sum().item()
            assert abs(ups - fraction * n) <= 5 * math.sqrt(fraction * (1 - fraction) * n)
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # a GPU's; all bits are set
    assert round_stochastically(torch.tensor([math.inf, -math.inf]), key=7).tolist() == [math.inf, -math.inf]
    assert round_stochastically(nan, key=7).isnan().all()


def test_rounding_noise_belongs_to_the_element_whatever_the_shard() -> None:
    values = torch.randn(103)
    whole = round_stochastically(values, key=3)
    for first, last in ((0, 50), (1, 4), (50, 103)):
        assert torch.equal(round_stochastically(values[first:last], key=3, first=first), whole[first:last])
    assert not torch.equal(round_stochastically(values, key=4), whole)


def of_one_value(optimizer: str, dtype: torch.dtype, steps: int) -> torch.Tensor:
    """4 x 16,384 weights of 0.02 after steps of 1e-5 along a gradient that all of them share."""
    layer = nn.Linear(16384, 4, bias=False).to(dtype)
    nn.init.constant_(layer.weight, 0.02)
    built = build_optimizer(layer, config(optimizer=optimizer, learning_rate=1e-5))
    for step in range(steps):
        layer.weight.grad = torch.full_like(layer.weight, 1.0 + 0.5 * (step % 3))
        before = sample_weights(built)
        built.step()
        assert dtype != torch.float32 or (sample_weights(built) != before).all()
    return layer.weight.detach().float()


@pytest.mark.parametrize(
    "optimizer", ["adamw_torch", "adamw_8bit", "adamw_torch_8bit", "lion_8bit", "paged_adamw_32bit"]
)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_bfloat16_weights_move_as_float32_ones_do_on_average(optimizer: str) -> None:
    """The last place of 0.02 is 2^-13: an update of 1e-5, a twelfth of it, would never be made by rounding to nearest.

    After s steps the mean over n weights lies within 5 sqrt(s p (1 - p) / n) places, p = 1e-5 * 2^13, of float32's; the
    second moment, rounded too, has a relative error of at most 2^-8 per step, whose square alone biases its root: 1 %.
    """
    if optimizer != "adamw_torch":
        library_of(optimizer)
    start, p = torch.tensor(0.02).bfloat16().float(), 1e-5 * 2**13
    for steps in (1, 60):
        exact = (of_one_value(optimizer, torch.float32, steps) - torch.tensor(0.02)).mean().item()
        moved = (of_one_value(optimizer, torch.bfloat16, steps) - start).mean().item()
        noise = 5 * math.sqrt(steps * p * (1 - p) / 65536) * 2**-13
        assert abs(moved - exact) <= noise + 0.01 * abs(exact) and exact < -0.9e-5 * steps


def test_the_share_of_unchanged_weights_is_counted() -> None:
    """Of 1,024 weights, those with a gradient move."""
    layer = nn.Linear(1024, 1, bias=False)
    built = build_optimizer(layer, config(learning_rate=0.1))
    layer.weight.grad = (torch.arange(1024) < 256).float()[None]
    before = sample_weights(built)
    built.step()
    assert (sample_weights(built) == before).double().mean() == 0.75


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "adamw_torch_8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_stochastic_rounding_goes_on_to_the_same_bits(optimizer: str) -> None:
    """From weights and optimizer state alone: no random state is saved, and none of the global one is used up."""
    if optimizer != "adamw_torch":
        library_of(optimizer)
    c = config(optimizer=optimizer, learning_rate=1e-4, weight_decay=0.01)
    model = Words().bfloat16()
    built = build_optimizer(model, c, seed=5)
    train(model, built, range(3))
    saved = io.BytesIO()
    torch.save([model.state_dict(), built.state_dict()], saved)
    before = torch.get_rng_state()
    train(model, built, range(3, 6))
    ends = []
    for seed in (5, 6):
        again = Words().bfloat16()
        saved.seek(0)
        weights, state = torch.load(saved, weights_only=False)
        again.load_state_dict(weights)
        built = build_optimizer(again, c, seed=seed)
        built.load_state_dict(state)
        torch.manual_seed(99)
        train(again, built, range(3, 6))
        ends.append(
            [torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True)]
        )
    assert all(ends[0]) and not all(ends[1])
    torch.set_rng_state(before)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_torch_8bit"])
def test_the_others_get_the_schedules_rates_too(optimizer: str) -> None:
    """torchao keeps the rate as a float32 tensor."""
    library_of(optimizer)
    c = config(optimizer=optimizer, learning_rate=3e-4, warmup_steps=3)
    built = build_optimizer(Words(), c)
    schedule = build_schedule(built, c, 11)
    for step in range(11):
        for group in built.param_groups:
            assert float(group["lr"]) == pytest.approx(learning_rate_at(step, c, 11), rel=1e-7)
        built.step()
        schedule.step()


@pytest.mark.parametrize("optimizer", BITSANDBYTES)
def test_bitsandbytes_is_refused_for_shards(optimizer: str) -> None:
    with pytest.raises(ValueError, match=f"optimizer {optimizer}.*fsdp.*adamw_torch_8bit"):
        build_optimizer(Words(), config(optimizer=optimizer), sharded=True)


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "adamw_torch_8bit"])
def test_float32_optimizers_are_refused_for_float64_models(optimizer: str) -> None:
    with pytest.raises(ValueError, match=f"optimizer {optimizer}.*adamw_torch"):
        build_optimizer(Words().double(), config(optimizer=optimizer))


@pytest.mark.parametrize(
    ("optimizer", "library"), [("adamw_8bit", "bitsandbytes"), ("adamw_torch_8bit", "torchao.optim")]
)
def test_a_missing_library_is_named(optimizer: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=f"optimizer {optimizer} needs {library.split('.')[0]}.*plumbline\\[quant\\]"):
        build_optimizer(Words(), config(optimizer=optimizer))


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
        ({"optimizer": "adamw_9bit"}, "optimizer is 'adamw_9bit'.*adamw_torch, .*adamw_8bit"),
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


@pytest.mark.slow
def test_steps_of_two_processes_equal_one() -> None:
    """FSDP2 (plain, hybrid, offloaded, with parameters it leaves alone, 8-bit) and DDP; in a process of its own, since
    forked children of a threaded parent hang."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), *sys.path[1:]])}
    command = [sys.executable, __file__]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


def clipped_step_on_shards() -> None:
    """float64; on the hybrid mesh of (replicas, shards) every rank holds the whole gradient; offloaded shards lie in
    host memory, which on a CPU is where they lie anyway, and take another path through FSDP2."""
    from accelerate import Accelerator
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    accelerator = Accelerator(cpu=True)
    in_memory, in_host = OffloadPolicy(), CPUOffloadPolicy(pin_memory=False)
    for shape, policy in (((2,), in_memory), ((2, 1), in_memory), ((2,), in_host)):
        torch.manual_seed(0)
        whole = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).double()
        sharded = copy.deepcopy(whole)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[: len(shape)])
        for unit in (sharded[0], sharded):
            fully_shard(unit, mesh=mesh, offload_policy=policy)
        rows = torch.randn(6, 5, dtype=torch.float64)
        optimizers = [build_optimizer(model, config(learning_rate=0.1)) for model in (whole, sharded)]
        for _ in range(3):
            norms = []
            for model, optimizer in zip((whole, sharded), optimizers, strict=True):
                model(rows).pow(2).sum().backward()
                norms.append(clip_gradients(accelerator, model, 0.5))
                optimizer.step()
                optimizer.zero_grad()
            assert norms[0] > 0.5 and type(norms[1]) is torch.Tensor
            torch.testing.assert_close(norms[0], norms[1], rtol=1e-13, atol=0)
        for one, other in zip(whole.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(one, other.full_tensor(), rtol=1e-12, atol=1e-13)


def clipping_beside_plain_parameters() -> None:
    """A part that FSDP leaves alone (its gradients are the same on every rank) counts once, and is scaled as well."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    mixed = copy.deepcopy(whole)
    fully_shard(mixed, mesh=init_device_mesh("cpu", (2,)), ignored_params=set(mixed[1].parameters()))
    rows = torch.randn(6, 5, dtype=torch.float64)
    norms = []
    for model in (whole, mixed):
        model(rows).pow(2).sum().backward()
        norms.append(clip_gradients(None, model, 0.5))
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-13, atol=0)
    kinds = set()
    for one, other in zip(whole.parameters(), mixed.parameters(), strict=True):
        kinds.add(type(other.grad))
        gradient = other.grad.full_tensor() if hasattr(other.grad, "full_tensor") else other.grad
        torch.testing.assert_close(one.grad, gradient, rtol=1e-12, atol=1e-14)
    assert len(kinds) == 2


def rounded_steps_on_shards() -> None:
    """Weights in bfloat16: shards of 4 and 3 rows round as the whole does, to the bit."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).bfloat16()
    start, sharded = copy.deepcopy(whole), copy.deepcopy(whole)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    for model in (whole, sharded):
        optimizer = build_optimizer(model, config(learning_rate=1e-3, weight_decay=0.1), seed=2)
        for step in range(4):
            g = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                gradient = torch.randn(parameter.shape, generator=g).bfloat16()
                if model is sharded:
                    gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
                parameter.grad = gradient
            optimizer.step()
    for one, other, first in zip(whole.parameters(), sharded.parameters(), start.parameters(), strict=True):
        assert torch.equal(one, other.full_tensor()) and not torch.equal(one, first)


def assert_equal_but_for_codes(one: torch.Tensor, other: torch.Tensor, rate: float) -> None:
    """Moments of 8 bits that are rounded at a boundary fall to one side or the other: gradients summed in another order
    (1e-6 of them) do that to about 1e-6 of a code's width, a hundredth, an element and moment a step. So fewer than
    one element in a hundred may differ, and those by less than an update, which is about the rate."""
    off = (one - other).abs()
    assert off.max() < rate and (off > 1e-3 * rate).double().mean() < 0.01, (off.max(), (off > 1e-3 * rate).sum())


def eight_bit_steps_on_shards() -> None:
    """Whole blocks of 256 on each rank, at least 4,096 elements: shards round as the whole does."""
    try:
        import torchao  # noqa: F401
    except ImportError:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 128))
    sharded = copy.deepcopy(whole)
    for unit in (sharded[0], sharded):
        fully_shard(unit, mesh=init_device_mesh("cpu", (2,)))
    for model in (whole, sharded):
        optimizer = build_optimizer(model, config(optimizer="adamw_torch_8bit", learning_rate=1e-2), sharded=True)
        for step in range(5):
            rows = torch.randn(8, 128, generator=torch.Generator().manual_seed(step))
            model(rows).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    codes = optimizer.state[sharded[0].weight]["exp_avg"].to_local().codes
    assert codes.shape == (64, 128) and codes.dtype == torch.uint8
    for one, other in zip(whole.parameters(), sharded.parameters(), strict=True):
        assert_equal_but_for_codes(one, other.full_tensor(), 1e-2)


def eight_bit_steps_under_ddp() -> None:
    """bitsandbytes, each rank with half of the rows, against one process with all; and no shards for it."""
    from torch.distributed import get_rank
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 128))
    each = copy.deepcopy(whole)
    for model in (whole, DistributedDataParallel(each)):
        optimizer = build_optimizer(model, config(optimizer="adamw_8bit", learning_rate=1e-2))
        for step in range(5):
            rows = torch.randn(8, 128, generator=torch.Generator().manual_seed(step))
            rows = rows if model is whole else rows[get_rank() :: 2]
            model(rows).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(whole.parameters(), each.parameters(), strict=True):
        assert_equal_but_for_codes(one, other, 1e-2)
    fully_shard(whole, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match="adamw_8bit.*fsdp"):
        build_optimizer(whole, config(optimizer="adamw_8bit"))


def all_of_them() -> None:
    clipped_step_on_shards()
    clipping_beside_plain_parameters()
    rounded_steps_on_shards()
    eight_bit_steps_on_shards()
    eight_bit_steps_under_ddp()


if __name__ == "__main__":
    from accelerate import debug_launcher

    torch.set_num_threads(1)
    debug_launcher(all_of_them, num_processes=2)
