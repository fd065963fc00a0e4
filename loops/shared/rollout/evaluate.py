"""Greedy completions of the evaluation prompts and their rewards: the accuracy that all three loops report."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from loops.shared.rollout.config import Sampling
from loops.shared.rollout.engine import Completion, Engine


def greedy_evaluation(
    engine: Engine,
    prompts: Sequence,
    reward_fns: dict[str, Callable[[list[Any], list[Completion]], Any]],
    *,
    sampling: Sampling,
    accelerator: Accelerator,
    policy: nn.Module | None = None,
) -> dict[str, float]:
    """Means over all prompts, divided among the processes: `eval/NAME` for each reward, and `eval/completion_length`.

    prompts: objects with `prompt_ids`, `text`, `columns` (data.chat.Prompt). reward_fns: each takes (prompts,
    completions) and returns a `data.rewards.RewardResult`; without any the result is empty. Completions without a
    reward are left out of its mean and counted in `eval/missing` (those that miss any); the first failure is shown.
    policy: synced with the engine first, where that has not happened; the engine sleeps afterwards.
    """
    if not reward_fns:
        return {}
    if policy is not None:
        engine.sync(policy)
    mine = list(range(accelerator.process_index, len(prompts), accelerator.num_processes))
    chosen = [prompts[i] for i in mine]
    ids = [prompt.prompt_ids for prompt in chosen]
    groups = engine.sample(ids, n=1, sampling=sampling.greedy(), seed=0, prompt_numbers=mine)
    if policy is not None:  # it is trained next
        engine.sleep()
    completions = [group[0] for group in groups]
    values = {"completion_length": [float(len(completion.token_ids)) for completion in completions]}
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
    engine: Engine, prompts: Sequence, reward_fns: dict[str, Callable], **settings: Any
) -> dict[str, float]:
    """`greedy_evaluation` with its time, and `eval/loss`: the negative mean reward, for who compares losses of runs."""
    began = time.perf_counter()
    metrics = greedy_evaluation(engine, prompts, reward_fns, **settings)
    if "eval/reward" in metrics:
        metrics["eval/loss"] = -metrics["eval/reward"]
    return metrics | {"time/eval": time.perf_counter() - began}
