"""Rollouts: what passes from sampling to training; a step is a flat list of them, group by group."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from loops.shared.metrics import Metrics
from loops.shared.rollout.config import Sampling
from loops.shared.rollout.engine import Completion, Engine
from losses.grpo import group_advantages

RewardFn = Callable[[Sequence[Any], Sequence[Completion]], Any]
"""(prompts, completions) -> data.rewards.RewardResult, one entry per completion."""


@dataclass(kw_only=True, eq=False)
class Rollout:
    """One completion of one prompt, from the sampler to the loss."""

    prompt: Any
    """The row's prompt (data.chat.Prompt: prompt_ids, text, columns, number), one object for its whole group."""
    completion: Completion
    """Token ids, the sampler's log-probabilities, finish reason, text, version of the weights."""
    sampled: Sequence[bool]
    """[T] which of the completion's tokens the policy sampled: others (a tool's output) are context, never targets."""
    reward: float = math.nan
    """Weighted sum of the reward functions; NaN where it is missing (not computed, failed, or none applies)."""
    rewards: dict[str, float | None] = field(default_factory=dict)
    """Each reward function's value; empty until rewards are computed."""
    failed: tuple[str, ...] = ()
    """Reward functions that failed on it."""
    failure: str | None = None
    """The first failure's traceback or sentence."""
    lag: int = 0
    """Updates of the weights between sampling and the step that trains on it."""
    seconds: float = 0.0
    """Duration of the call that sampled it, with others."""


@dataclass(eq=False)
class Microbatch:
    """Rollouts packed for one forward. B rollouts, T tokens of the longest completion."""

    batch: Any  # data.pack.PackedBatch
    advantages: torch.Tensor  # [B], or [B, T] of a process reward
    sampler_logprobs: torch.Tensor  # [B, T]
    old_logprobs: torch.Tensor | None = None  # [B, T] of the policy before the step's first update
    ref_logprobs: torch.Tensor | None = None  # [B, T] of the reference


def build_rollouts(prompts: Sequence[Any], groups: Sequence[Sequence[Completion]]) -> list[Rollout]:
    """One rollout per completion; groups in the order of the prompts."""
    return [
        Rollout(prompt=prompt, completion=completion, sampled=[True] * len(completion.token_ids))
        for prompt, group in zip(prompts, groups, strict=True)
        for completion in group
    ]


def sample_rollouts(
    engine: Engine,
    prompts: Sequence[Any],
    reward_fn: RewardFn | None,
    *,
    n: int,
    sampling: Sampling,
    seed: int,
    prompt_numbers: list[int],
) -> list[Rollout]:
    """`n` rollouts of each prompt; without any exchange between processes, so it may run in a thread.

    reward_fn: computes the rewards of groups that the engine hands over in this thread while it samples others; all
    other rollouts get theirs from `compute_rewards`. None: all do.
    """
    began, caller = time.perf_counter(), threading.get_ident()
    early: dict[int, list[Rollout]] = {}

    def arrived(place: int, group: list[Completion]) -> None:
        if reward_fn and threading.get_ident() == caller:
            early[place] = build_rollouts([prompts[place]], [group])
            compute_rewards(early[place], reward_fn)

    ids = [prompt.prompt_ids for prompt in prompts]
    groups = engine.sample(ids, n=n, sampling=sampling, seed=seed, prompt_numbers=prompt_numbers, arrived=arrived)
    rollouts: list[Rollout] = []
    for place, group in enumerate(groups):
        rollouts += early[place] if place in early else build_rollouts([prompts[place]], [group])
    for rollout in rollouts:
        rollout.seconds = time.perf_counter() - began
    return rollouts


def compute_rewards(rollouts: Sequence[Rollout], reward_fn: RewardFn) -> None:
    """Fill in the rewards of all rollouts that have none yet, in one call of each reward function."""
    missing = [rollout for rollout in rollouts if not rollout.rewards]
    result = reward_fn([r.prompt for r in missing], [r.completion for r in missing])
    for i, rollout in enumerate(missing):
        rollout.reward = result.total[i]
        rollout.rewards = {name: values[i] for name, values in result.by_name.items()}
        rollout.failure = result.failure
        rollout.failed = tuple(name for name, rows in result.failed.items() if i in rows)


def add_rollout_metrics(metrics: Metrics, rollouts: Sequence[Rollout], num_generations: int) -> None:
    """Rewards, lengths, ages and equal groups of this process's rollouts.

    Equal groups are those whose advantages are all 0: fewer than two different rewards, missing ones left aside.
    """
    count = len(rollouts)
    rewards = [rollout.reward for rollout in rollouts]
    metrics.mean_and_std("reward", [reward for reward in rewards if not math.isnan(reward)])
    metrics.sum("reward/missing", sum(map(math.isnan, rewards)))
    for name in dict.fromkeys(name for rollout in rollouts for name in rollout.rewards):
        values = [rollout.rewards[name] for rollout in rollouts]
        metrics.mean_and_std(f"reward/{name}", [value for value in values if value is not None])
        metrics.sum(f"reward/{name}/missing", values.count(None))
        metrics.sum(f"reward/{name}/failed", sum(name in rollout.failed for rollout in rollouts))
    advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64), num_generations, scale="none")
    equal = (advantages.view(-1, num_generations) == 0).all(dim=1)
    lengths = [len(rollout.completion.token_ids) for rollout in rollouts]
    metrics.sum("rollout/completions", count)
    metrics.sum("tokens/completions", sum(lengths))
    metrics.mean("rollout/equal_groups", equal.sum(), len(equal))
    metrics.mean("rollout/lag", sum(rollout.lag for rollout in rollouts), count)
    metrics.mean("rollout/truncated", sum(r.completion.finish_reason == "length" for r in rollouts), count)
    metrics.mean("rollout/completion_length", sum(lengths), count)
    metrics.set("time/rollout", max((rollout.seconds for rollout in rollouts), default=0.0))


def add_update_metrics(
    metrics: Metrics, microbatch: Microbatch, terms: dict[str, torch.Tensor], entropy: torch.Tensor
) -> None:
    """What the update says of the policy's tokens: means over the tokens that are scored.

    terms: what `losses.grpo.grpo_loss` returned; entropy: [B, T], of which nothing but the values is kept.
    """
    batch = microbatch.batch
    gap = (microbatch.old_logprobs - microbatch.sampler_logprobs)[batch.mask]
    count = len(gap)
    largest = terms.pop("policy/ratio_max", None)  # a loss of your own may have none
    metrics.means(terms, count)
    metrics.mean("policy/entropy", entropy.detach_().sum(), count)
    metrics.mean("policy/mismatch_kl", (gap.expm1() - gap).sum(), count)
    if count:
        metrics.max("policy/mismatch_max", gap.abs().max())
        if largest is not None:
            metrics.max("policy/ratio_max", largest)
    metrics.sum("tokens/scored", count)
    metrics.sum("tokens/computed", batch.num_tokens)
