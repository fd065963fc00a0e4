"""Greedy completions of the evaluation prompts, judged: the accuracy that all three loops report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import nn

from loops.shared.rollout.contract import Completion, Engine, Sampling

# How far the sampler's and the trainer's log-probability of one token may lie apart, by dtype of the weights.
MISMATCH_LIMIT = {torch.float64: 0.01, torch.float32: 0.05}
LOW_PRECISION_LIMIT = 2.0


def check_sampler(mismatch: float, policy: nn.Module, accelerator: Accelerator) -> None:
    """Raise RuntimeError where the first step's samples were scored otherwise than they were drawn.

    mismatch: largest difference of a token's log-probability in nats. Not checked where dropout makes scores random.
    """
    dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in policy.modules())
    limit = max(MISMATCH_LIMIT.get(p.dtype, LOW_PRECISION_LIMIT) for p in policy.parameters())
    if accelerator.mixed_precision != "no":
        limit = LOW_PRECISION_LIMIT
    if mismatch > limit and not dropout:
        raise RuntimeError(
            f"sampler and trainer give one token log-probabilities {mismatch:.2g} nats apart (limit {limit}): the "
            f"engine does not sample from {type(policy).__name__} as it is trained."
        )


def greedy_evaluation(
    engine: Engine,
    prompts: Sequence,
    judges: dict[str, Callable],
    *,
    sampling: Sampling,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Means over all prompts, shared out over the processes: `eval/NAME` for each judge, and `eval/completion_length`.

    prompts: objects with `prompt_ids`, `text`, `columns` (data.chat.Prompt). A judge takes (prompts, completions) and
    returns one float a completion, NaN where it cannot say; such rows are left out of its mean. Without judges: empty.
    """
    if not judges:
        return {}
    mine = list(range(accelerator.process_index, len(prompts), accelerator.num_processes))
    chosen = [prompts[i] for i in mine]
    greedy = replace(sampling, temperature=0.0)
    samples = engine.sample([prompt.prompt_ids for prompt in chosen], n=1, sampling=greedy, seed=0, prompt_numbers=mine)
    completions: list[Completion] = [group[0] for group in samples]
    sums = {"completion_length": float(sum(len(c.token_ids) for c in completions))}
    counts = {"completion_length": float(len(completions))}
    for name, judge in judges.items():
        values = [value for value in judge(chosen, completions) if value == value]  # NaN is not equal to itself
        sums[name], counts[name] = sum(values), float(len(values))
    table = torch.tensor([list(sums.values()), list(counts.values())], dtype=torch.float64)
    total, count = accelerator.reduce(table.to(accelerator.device), "sum").tolist()
    return {f"eval/{name}": total[i] / count[i] for i, name in enumerate(sums) if count[i]}


def reward_evaluation(engine: Engine, prompts: Sequence, judges: dict[str, Callable], **settings) -> dict[str, float]:
    """`greedy_evaluation` with its time, and `eval/loss`: what GRPO minimises, the negative mean reward."""
    began = time.perf_counter()
    metrics = greedy_evaluation(engine, prompts, judges, **settings)
    if "eval/reward" in metrics:
        metrics["eval/loss"] = -metrics["eval/reward"]
    return metrics | {"time/eval": time.perf_counter() - began}
