"""One optimizer step is the same whatever the micro-batches, the accumulation and the number of processes."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from data.batches import BatchConfig, build_bins
from data.chat import Example, Pair, Prompt
from loops import dpo, grpo, sft
from loops.shared.failures import FiniteGuard
from loops.shared.models import build_reference
from loops.shared.policy import enable_packing
from loops.shared.rollout import Completion, RolloutConfig
from losses.grpo import group_advantages, loss_denominator
from tests.conftest import make_float32_mean_float64

LOOPS = ("sft", "dpo", "grpo")


def tiny_policy(dtype=torch.float64):
    torch.manual_seed(0)
    shape = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    model = Qwen3ForCausalLM(Qwen3Config(**shape, num_key_value_heads=2, head_dim=16)).to(dtype)
    enable_packing(model)
    return model


def draw(generator, low, high):
    return torch.randint(
        3, 96, (int(torch.randint(low, high, (1,), generator=generator)),), generator=generator
    ).tolist()


def one_step(
    loop: str,
    accelerator,
    *,
    max_rows: int = 8,
    max_tokens: int = 0,
    packing: bool = True,
    strategy: str = "step",
    **settings,
):
    """Weights after one SGD step of rate 1 over eight rows (so their change is the gradient), and the step's sums."""
    policy = tiny_policy()
    module = {"sft": sft, "dpo": dpo, "grpo": grpo}[loop]
    config = module.Config(
        batch=BatchConfig(
            per_device_train_batch_size=max_rows,
            max_tokens_per_batch=max_tokens,
            packing=packing,
            packing_strategy=strategy,
        ),
        **settings,
    )
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    reference = build_reference(policy)
    with torch.no_grad():  # away from the reference, so that its terms have a gradient
        for p in policy.parameters():
            p.mul_(1.1)
    wrapped, optimizer = accelerator.prepare(policy, optimizer)
    g = torch.Generator().manual_seed(3)
    common = (optimizer, scheduler)
    if loop == "sft":
        examples = [Example(ids, [True] * len(ids)) for ids in (draw(g, 2, 20) for _ in range(8))]
        bins, _ = build_bins(examples, config.batch, seed=0)
        micro = sft.build_microbatches(range(len(bins)), bins, config, accelerator)
        count = sum(len(e.input_ids) - 1 for e in examples)
        sums = sft.train_step(wrapped, *common, micro, count, config, accelerator, packing, FiniteGuard(accelerator))
    elif loop == "dpo":
        pairs = [Pair(draw(g, 1, 9), draw(g, 1, 20), draw(g, 1, 20)) for _ in range(8)]
        micro = dpo.build_microbatches(range(8), pairs, None, config, accelerator)
        sums = dpo.train_step(
            wrapped, reference, *common, micro, 8, config, accelerator, packing, FiniteGuard(accelerator)
        )
    else:
        config = replace(config, rollout=RolloutConfig(num_generations=4, max_completion_length=20))
        prompts = [Prompt(draw(g, 1, 9), "", {}) for _ in range(2)]
        completions = [Completion(ids, [-4.5] * len(ids), "stop", "", 0) for ids in (draw(g, 1, 20) for _ in range(8))]
        advantages = group_advantages(torch.tensor([0.0, 1, 0, 1, 1, 1, 1, 0]), 4)
        share = slice(
            accelerator.process_index * 8 // accelerator.num_processes,
            (accelerator.process_index + 1) * 8 // accelerator.num_processes,
        )
        mine = prompts[share.start // 4 : share.stop // 4]
        micro = grpo.build_microbatches(mine, completions[share], advantages[share], config, accelerator)
        tokens = sum(len(c.token_ids) for c in completions)
        denominator = loss_denominator(config.loss_type, num_tokens=tokens, num_sequences=8, max_completion_length=20)
        sums, _ = grpo.train_step(
            wrapped,
            reference if config.beta else None,
            *common,
            micro,
            denominator,
            config,
            accelerator,
            packing,
            FiniteGuard(accelerator),
        )
    weights = {n: p.detach().clone() for n, p in policy.named_parameters()}
    return weights, sums, len(micro)


def largest_difference(a, b):
    return max((a[n] - b[n]).abs().max().item() for n in a)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("settings", [{}, {"loss": "other"}], ids=["default", "other"])
def test_micro_batches_do_not_change_the_step(loop, settings, only_float64):
    """1 x 8, 2 x 4, 4 x 2, 8 x 1, a token budget, the plain padded path and (SFT) bins, in float64."""
    other = {"sft": {"loss_type": "dft"}, "dpo": {"loss_type": "ipo"}, "grpo": {"loss_type": "grpo", "beta": 0.1}}
    settings = other[loop] if settings else {}
    accelerator = Accelerator(cpu=True)
    whole, sums, count = one_step(loop, accelerator, **settings)
    assert count == 1
    moved = largest_difference(whole, {n: p.detach() * 1.1 for n, p in tiny_policy().named_parameters()})
    assert moved > 1e-3  # the step did something
    cuts = [{"max_rows": 4}, {"max_rows": 2}, {"max_rows": 1}, {"max_tokens": 40}, {"packing": False}]
    if loop == "sft":
        cuts += [{"max_tokens": 40, "strategy": strategy} for strategy in ("best_fit", "bfd")]
    for cut in cuts:
        weights, other_sums, count = one_step(loop, accelerator, **cut, **settings)
        assert cut == {"packing": False} or count > 1
        assert largest_difference(whole, weights) < 1e-12
        for name, value in sums.items():
            if name != "tokens/computed":  # a prompt whose group is cut is computed once a part
                assert float(other_sums[name]) == pytest.approx(float(value), rel=1e-6, abs=1e-9), name


def test_a_mean_of_means_would_be_noticed():
    """The bug that this file exists for: dividing each micro-batch by its own count moves the weights elsewhere."""
    accelerator = Accelerator(cpu=True)
    whole, _, _ = one_step("sft", accelerator)
    policy = tiny_policy()
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.1)
    g = torch.Generator().manual_seed(3)
    examples = [Example(ids, [True] * len(ids)) for ids in (draw(g, 2, 20) for _ in range(8))]
    config = sft.Config(batch=BatchConfig(per_device_train_batch_size=2))
    for batch in sft.build_microbatches(range(8), [[e] for e in examples], config, accelerator):
        loss, _ = sft.score_batch(policy, batch, config, True)
        (loss / len(batch.targets) / 4).backward()
    naive = {n: (p - p.grad).detach() for n, p in policy.named_parameters()}
    assert largest_difference(whole, naive) > 1e-3


def test_groups_without_a_signal_are_left_out_but_counted():
    """Rewards 1 1 1 1: advantages 0, no forward; with a KL term every completion is computed."""
    accelerator = Accelerator(cpu=True)
    config = grpo.Config(rollout=RolloutConfig(num_generations=4))
    prompts = [Prompt([5, 6], "", {}), Prompt([7], "", {})]
    completions = [Completion([8, 9], [-1.0, -1.0], "stop", "", 0)] * 8
    advantages = group_advantages(torch.tensor([1.0, 1, 1, 1, 0, 1, 0, 0]), 4)
    ((batch, kept, _),) = grpo.build_microbatches(prompts, completions, advantages, config, accelerator)
    assert batch.num_tokens == 1 + 4 * 2 and len(kept) == 4
    ((batch, kept, _),) = grpo.build_microbatches(
        prompts, completions, advantages, replace(config, beta=0.1), accelerator
    )
    assert batch.num_tokens == 2 + 1 + 8 * 2 and len(kept) == 8
    ((batch, kept, _),) = grpo.build_microbatches(prompts, completions, advantages * 0, config, accelerator)
    assert not len(kept) and batch.num_tokens == 1  # every process still runs one forward


def on_two_processes(loop: str, path: str, cut: dict):
    make_float32_mean_float64()
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    weights, _, count = one_step(loop, accelerator, **cut)
    assert count > 1
    if accelerator.is_main_process:
        save_file(weights, path)


@pytest.mark.parametrize("loop", [*LOOPS, "sft in bins"])
def test_two_processes_take_the_same_step(loop, tmp_path, only_float64):
    """Two real processes over gloo against one; uneven shares (a rank may run an idle micro-batch: of three bins one
    process has one)."""
    cut = {"max_tokens": 40, "strategy": "bfd"} if loop == "sft in bins" else {"max_rows": 3}
    loop = loop.split()[0]
    code = (
        "from accelerate import debug_launcher; from tests.loops.test_steps import on_two_processes;"
        f"debug_launcher(on_two_processes, ({loop!r}, {str(tmp_path / 'w.pt')!r}, {cut!r}), num_processes=2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, _, _ = one_step(loop, Accelerator(cpu=True))
    assert largest_difference(whole, load_file(tmp_path / "w.pt")) < 1e-12
