"""Greedy completions of the evaluation prompts, judged: the accuracy that all three loops report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from loops.shared.rollout.contract import Completion, Engine, Sampling
from loops.shared.rollout.mismatch import explain_mismatch

# How far the sampler's and the trainer's log-probability of one token may lie apart, by dtype of the weights.
MISMATCH_LIMIT = {torch.float64: 0.01, torch.float32: 0.05}
LOW_PRECISION_LIMIT = 2.0


def check_sampler(
    microbatches: Sequence, scored: dict[int, torch.Tensor], policy: nn.Module, accelerator: Accelerator, limit: float
) -> None:
    """Raise RuntimeError where a step's samples were scored otherwise than they were drawn, with the worst token.

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
    own = explain_mismatch(sampled, trained, tokens, limit=limit) if len(tokens) else None
    sentence = next((found for found in gather_object([own]) if found), None)  # all processes end with it
    if sentence:
        raise RuntimeError(f"the engine does not sample from the policy as it is trained: {sentence}")


def greedy_evaluation(
    engine: Engine,
    prompts: Sequence,
    judges: dict[str, Callable],
    *,
    sampling: Sampling,
    accelerator: Accelerator,
    policy: nn.Module | None = None,
) -> dict[str, float]:
    """Means over all prompts, shared out over the processes: `eval/NAME` for each judge, and `eval/completion_length`.

    prompts: objects with `prompt_ids`, `text`, `columns` (data.chat.Prompt). A judge takes (prompts, completions) and
    returns one float a completion, NaN where it cannot say; such rows are left out of its mean. Without judges: empty.
    policy: synced with the engine first, where that has not happened.
    """
    if not judges:
        return {}
    if policy is not None:
        engine.sync(policy)
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
