"""One optimizer step is the same whatever the micro-batches, the accumulation and the number of processes."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from transformers import Qwen3Config, Qwen3ForCausalLM

from data.batches import BatchConfig
from data.chat import Example, Pair, Prompt
from loops import grpo, sft
from loops.shared.policy import enable_packing, is_packed, score
from loops.shared.rollout import Completion, RolloutConfig
from loops.shared.rollout.rollouts import build_rollouts
from loops.shared.run import Run
from losses.grpo import group_advantages
from losses.sft import sft_loss
from tests.conftest import make_float32_mean_float64
from tests.loops.loop_runs import LOOPS, RecordedEngine, run_loop


def tiny_policy(dtype=torch.float64, packing=True):
    torch.manual_seed(0)
    shape = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    model = Qwen3ForCausalLM(Qwen3Config(**shape, num_key_value_heads=2, head_dim=16)).to(dtype)
    if packing:
        enable_packing(model)
    return model


def draw(generator, low, high):
    return torch.randint(
        3, 96, (int(torch.randint(low, high, (1,), generator=generator)),), generator=generator
    ).tolist()


def steps_of(loop: str, folder, *options: str):
    """Weights after two SGD steps of rate 1 over eight rows each (so their change is the gradients), the second step's
    numbers (by then the policy has left its reference), and its micro-batches in this process."""
    policy, g = tiny_policy(packing=False), torch.Generator().manual_seed(3)  # the loop prepares it
    if loop == "sft":
        rows = [Example(ids, [True] * len(ids)) for ids in (draw(g, 2, 20) for _ in range(8))]
    elif loop == "dpo":
        rows = [Pair(draw(g, 1, 9), draw(g, 1, 20), draw(g, 1, 20)) for _ in range(8)]
    else:
        rows = [Prompt(draw(g, 1, 9), "", {}) for _ in range(2)]
    groups = [[draw(g, 1, 20) for _ in range(4)] for _ in range(2)]
    engine = RecordedEngine(lambda step: groups, lambda step: [[0.0, 1, 0, 1], [1, 1, 1, 0]])
    common = ["--max_steps", "2", "--gradient_accumulation_steps", "1", "--max_grad_norm", "0"]
    common += {"sft": [], "dpo": ["--precompute_ref_log_probs", "false"], "grpo": ["--num_generations", "4"]}[loop]
    if loop == "grpo":
        common += ["--max_completion_length", "20", "--prompts_per_step", "2", "--check_every", "1000"]
        common += ["--max_mismatch", "1e9"]  # the recorded log-probabilities are made up
    real, counts = LOOPS[loop].build_microbatches, []

    def build_microbatches(*given, **named):
        microbatches = real(*given, **named)
        counts.append(len(microbatches))
        return microbatches

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LOOPS[loop], "build_microbatches", build_microbatches)
        metrics, policy = run_loop(loop, folder, rows, *common, *options, policy=policy, engine=engine)
    assert is_packed(policy) == ("false" not in options)
    weights = {name.removeprefix("module."): p.detach().clone() for name, p in policy.named_parameters()}
    return weights, metrics[-1], counts[-1]


def largest_difference(a, b):
    return max((a[n] - b[n]).abs().max().item() for n in a)


def cut(rows: int = 8, *, tokens: int = 0, packing: bool = True, strategy: str = "step") -> list[str]:
    """Options for micro-batches of so many rows, or of so many tokens, of a step of eight rows."""
    words = ["--per_device_train_batch_size", str(rows), "--max_tokens_per_batch", str(tokens)]
    words += ["--packing", str(packing).lower(), "--packing_strategy", strategy]
    return [*words, "--train_batch_size", "8"]  # of rows, or of at most so many bins: all of them


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("other", [False, True], ids=["default", "other"])
def test_micro_batches_do_not_change_the_step(loop, other, tmp_path, only_float64):
    """1 x 8, 2 x 4, 4 x 2, 8 x 1, a token budget, the plain padded path and (SFT) bins, in float64."""
    options = {"sft": ["--loss_type", "dft"], "dpo": ["--loss_type", "ipo"]}
    options["grpo"] = ["--loss_type", "grpo", "--beta", "0.1"]
    options = options[loop] if other else []
    whole, numbers, count = steps_of(loop, tmp_path / "whole", *cut(), *options)
    assert count == 1
    assert largest_difference(whole, dict(tiny_policy().named_parameters())) > 1e-3  # the steps did something
    cuts = {"4": cut(4), "2": cut(2), "1": cut(1), "tokens": cut(8, tokens=40), "plain": cut(packing=False)}
    if loop == "sft":
        cuts |= {strategy: cut(8, tokens=40, strategy=strategy) for strategy in ("best_fit", "bfd")}
    for name, words in cuts.items():
        weights, again, count = steps_of(loop, tmp_path / name, *words, *options)
        assert name == "plain" or count > 1, name
        assert largest_difference(whole, weights) < 1e-12, name
        for key, value in numbers.items():  # a prompt whose group is cut is computed once per part
            if not key.startswith(("time/", "memory/", "tokens/computed", "tokens/per_second")):
                assert again[key] == pytest.approx(value, rel=1e-6, abs=1e-9), (name, key)


@pytest.mark.parametrize("loop", LOOPS)
def test_the_plain_path_frees_its_logits_with_each_micro_batch(loop, tmp_path, monkeypatch):
    """The entropy's graph holds two matrices of the logits' size, which no backward frees where no loss has it."""
    earlier = []

    def watched(*given):
        assert all(entropy.grad_fn is None for entropy in earlier)
        scores = score(*given)
        earlier.append(scores.entropy)
        return scores

    monkeypatch.setattr(LOOPS[loop], "score", watched)
    steps_of(loop, tmp_path / "run", *cut(2, packing=False))
    assert len(earlier) > 4


def test_a_mean_of_means_would_be_noticed(tmp_path, only_float64):
    """The bug that this file exists for: dividing each micro-batch by its own count moves the weights elsewhere."""
    whole, *_ = steps_of("sft", tmp_path, *cut(), "--max_steps", "1")
    policy, g = tiny_policy(), torch.Generator().manual_seed(3)
    examples = [Example(ids, [True] * len(ids)) for ids in (draw(g, 2, 20) for _ in range(8))]
    options = sft.Config(batch=BatchConfig(per_device_train_batch_size=2))
    for batch in sft.build_microbatches(range(8), [[e] for e in examples], options, Accelerator(cpu=True)):
        loss, _ = sft_loss(score(policy, batch)[0], batch.mask)
        (loss / len(batch.targets) / 4).backward()
    naive = {n: (p - p.grad).detach() for n, p in policy.named_parameters()}
    assert largest_difference(whole, naive) > 1e-3


def rollouts_of(prompts, completions):
    size = len(completions) // len(prompts)
    return build_rollouts(prompts, [completions[i : i + size] for i in range(0, len(completions), size)])


def test_groups_without_a_signal_are_left_out_but_counted():
    """Rewards 1 1 1 1: advantages 0, no forward; with a KL term every completion is computed."""
    accelerator = Accelerator(cpu=True)
    config = grpo.Config(rollout=RolloutConfig(num_generations=4))
    prompts = [Prompt([5, 6], "", {}), Prompt([7], "", {})]
    rollouts = rollouts_of(prompts, [Completion([8, 9], [-1.0, -1.0], "stop", "", 0)] * 8)
    advantages = group_advantages(torch.tensor([1.0, 1, 1, 1, 0, 1, 0, 0]), 4)
    (mb,) = grpo.build_microbatches(rollouts, advantages, config, accelerator)
    assert mb.batch.num_tokens == 1 + 4 * 2 and len(mb.advantages) == 4
    (mb,) = grpo.build_microbatches(rollouts, advantages, replace(config, beta=0.1), accelerator)
    assert mb.batch.num_tokens == 2 + 1 + 8 * 2 and len(mb.advantages) == 8
    (mb,) = grpo.build_microbatches(rollouts, advantages * 0, config, accelerator)
    assert not len(mb.advantages) and mb.batch.num_tokens == 1  # every process still runs one forward


def test_tokens_that_the_policy_did_not_sample_are_context():
    """A tool's output inside a completion: computed, never a target, and not counted."""
    config = grpo.Config(rollout=RolloutConfig(num_generations=2))
    rollouts = rollouts_of([Prompt([5, 6], "", {})], [Completion([8, 9, 10], [-1.0, 0.0, -1.0], "stop", "", 0)] * 2)
    rollouts[0].sampled = [True, False, True]
    (mb,) = grpo.build_microbatches(rollouts, torch.tensor([1.0, -1.0]), config, Accelerator(cpu=True))
    assert mb.batch.num_tokens == 2 + 2 * 3 and mb.batch.mask.tolist() == [[True, False, True], [True] * 3]


def on_two_processes(loop: str, folder: str, words: list[str]):
    make_float32_mean_float64()
    torch.set_num_threads(1)
    weights, _, count = steps_of(loop, Path(folder) / "two", *words)
    assert torch.distributed.get_world_size() == 2 and count > 1
    if torch.distributed.get_rank() == 0:
        save_file(weights, f"{folder}/w.safetensors")


@pytest.mark.parametrize("loop", [*LOOPS, pytest.param("sft in bins", marks=pytest.mark.slow)])
def test_two_processes_take_the_same_step(loop, tmp_path, only_float64):
    """Two real processes over gloo against one; uneven shares (of three bins one process has one), several
    micro-batches, after the last of which DDP exchanges the gradients."""
    words = cut(8, tokens=40, strategy="bfd") if loop == "sft in bins" else cut(3)
    loop = loop.split()[0]
    code = (
        "from accelerate import debug_launcher; from tests.loops.test_steps import on_two_processes;"
        f"debug_launcher(on_two_processes, ({loop!r}, {str(tmp_path)!r}, {words!r}), num_processes=2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, *_ = steps_of(loop, tmp_path / "one", *cut())
    assert largest_difference(whole, load_file(tmp_path / "w.safetensors")) < 1e-12


def count_exchanges(folder: str, micro_batches: int):
    torch.set_num_threads(1)
    real, counted = Run.prepare, []

    def prepare(run, policy, *others):
        policy, optimizer = real(run, policy, *others)
        policy.register_comm_hook(None, count)
        return policy, optimizer

    def count(_, bucket):
        counted.append(1)
        return default_hooks.allreduce_hook(None, bucket)

    Run.prepare = prepare
    steps_of("sft", Path(folder) / str(micro_batches), *cut(4 // micro_batches))
    if torch.distributed.get_rank() == 0:
        Path(folder, f"{micro_batches}.txt").write_text(str(len(counted)))


def test_ddp_exchanges_gradients_once_per_step(tmp_path):
    """Four micro-batches per process and step cost as many all-reduces as one."""
    for micro_batches in (1, 4):
        code = (
            "from accelerate import debug_launcher; from tests.loops.test_steps import count_exchanges;"
            f"debug_launcher(count_exchanges, ({str(tmp_path)!r}, {micro_batches}), num_processes=2)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    one, four = ((tmp_path / f"{n}.txt").read_text() for n in (1, 4))
    assert int(one) == int(four) > 0
