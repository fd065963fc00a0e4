"""Greedy completions of the evaluation prompts and their rewards: the accuracy that all three loops report."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from loops.shared.rollout.config import Sampling
from loops.shared.rollout.engine import Completion, Engine
from loops.shared.rollout.mismatch import explain_mismatch

# How far the sampler's and the trainer's log-probability of one token may lie apart, by dtype of the weights.
MISMATCH_LIMIT = {torch.float64: 0.01, torch.float32: 0.05}
LOW_PRECISION_LIMIT = 2.0


def check_sampler(
    microbatches: Sequence, scored: dict[int, torch.Tensor], policy: nn.Module, accelerator: Accelerator, limit: float
) -> None:
    """Raise RuntimeError where a step's samples were scored otherwise than they were drawn, with the worst token.

    The worst thousandth of a process's tokens (one, of fewer than 2,000) may be further apart than `limit`: rounding in
    low precision has a long tail.

    microbatches: (packed batch, advantages, sampler's log-probabilities [B, T]); scored: the trainer's [B, T] of each,
    by number. limit: in nats, 0 chooses by dtype. Not checked where dropout makes scores random.
    """
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in policy.modules()):
        return
    if not limit:
        limit = max(MISMATCH_LIMIT.get(p.dtype, LOW_PRECISION_LIMIT) for p in policy.parameters())
        limit = limit if accelerator.mixed_precision == "no" else LOW_PRECISION_LIMIT
    masks = [batch.mask for batch, _, _ in microbatches]
    sampled = torch.cat([sampled[mask] for (_, _, sampled), mask in zip(microbatches, masks, strict=True)])
    trained = torch.cat([scored[number][mask] for number, mask in enumerate(masks)])
    tokens = torch.cat([batch.scatter(batch.targets)[batch.mask] for batch, _, _ in microbatches])
    gaps = (sampled - trained).abs().nan_to_num(nan=torch.inf).sort().values
    outliers = max(1, len(gaps) // 1000) if len(gaps) > 1 else 0
    within = len(gaps) == 0 or (gaps[-1 - outliers] <= limit and bool(gaps[-1].isfinite()))
    own = None if within else explain_mismatch(sampled, trained, tokens, limit=limit)
    sentence = next((found for found in gather_object([own]) if found), None)  # all processes end with it
    if sentence:
        raise RuntimeError(f"the engine does not sample from the policy as it is trained: {sentence}")


def greedy_evaluation(
    engine: Engine,
    prompts: Sequence,
    reward_fns: dict[str, Callable],
    *,
    sampling: Sampling,
    accelerator: Accelerator,
    policy: nn.Module | None = None,
) -> dict[str, float]:
    """Means over all prompts of all processes: `eval/NAME` for each reward_fn, and `eval/completion_length`.

    prompts: objects with `prompt_ids`, `text`, `columns` (data.chat.Prompt). A reward_fn takes (prompts, completions)
    and returns a `data.rewards.RewardResult`. Completions without a reward are left out of its mean and counted in
    `eval/missing` (those that miss any of the rewards); the first failure is shown. Without reward_fns: empty.
    policy: synced with the engine first, where that has not happened; the engine is at rest afterwards.
    """
    if not reward_fns:
        return {}
    if policy is not None:
        engine.sync(policy)
    mine = list(range(accelerator.process_index, len(prompts), accelerator.num_processes))
    chosen = [prompts[i] for i in mine]
    greedy = sampling.greedy()
    samples = engine.sample([prompt.prompt_ids for prompt in chosen], n=1, sampling=greedy, seed=0, prompt_numbers=mine)
    if policy is not None:  # it is trained next
        engine.rest()
    completions: list[Completion] = [group[0] for group in samples]
    values = {"completion_length": [float(len(c.token_ids)) for c in completions]}
    failure = None
    for name, reward_fn in reward_fns.items():
        result = reward_fn(chosen, completions)
        values[name], failure = result.total, failure or result.failure
    missing = sum(any(value != value for value in row) for row in zip(*values.values(), strict=True))  # NaN
    present = {name: [value for value in column if value == value] for name, column in values.items()}
    own = ({name: (sum(column), len(column)) for name, column in present.items()}, missing, failure)
    everywhere = gather_object([own])
    failure = next((failed for _, _, failed in everywhere if failed), None)
    if failure and accelerator.is_main_process:
        warnings.warn(f"a reward of the evaluation failed; its rows count as missing:\n{failure}", stacklevel=1)
    metrics = {}
    for name in values:
        total, count = (sum(sums[name][i] for sums, _, _ in everywhere) for i in (0, 1))
        if count:
            metrics[f"eval/{name}"] = total / count
    return metrics | {"eval/missing": float(sum(count for _, count, _ in everywhere))}


def reward_evaluation(
    engine: Engine, prompts: Sequence, reward_fns: dict[str, Callable], **settings
) -> dict[str, float]:
    """`greedy_evaluation` with its time, and `eval/loss`: the negative mean reward, for who compares losses of runs."""
    began = time.perf_counter()
    metrics = greedy_evaluation(engine, prompts, reward_fns, **settings)
    if "eval/reward" in metrics:
        metrics["eval/loss"] = -metrics["eval/reward"]
    return metrics | {"time/eval": time.perf_counter() - began}
