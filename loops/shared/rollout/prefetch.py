"""Rollouts of coming steps, sampled in a thread while the present step trains."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from loops.shared.rollout.engine import Completion, Engine
from loops.shared.rollout.rollouts import Rollout


def prefetch(
    sample: Callable[[int], list[Rollout]],
    steps: Sequence[int],
    engine: Engine,
    *,
    depth: int,
    ready: dict[int, list[Rollout]],
) -> Iterator[list[Rollout]]:
    """The rollouts of each step in turn, sampled at most `depth` steps before they are taken.

    Depth 0 samples a step when it is taken, in the caller's thread: weights are never older than the step. At depth n
    one thread samples the steps up to n ahead, so a rollout is made of weights at most n updates old (some tokens of
    newer ones, where the engine takes updates in flight). The order of rollouts, and the seeds in them, are the same at
    every depth. The thread is a daemon: a run that fails does not wait for it, but has to close the engine.

    Args:
        sample: samples a step's rollouts, without any exchange between processes.
        engine: whose weight version says how old rollouts are (`Rollout.lag`).
        ready: rollouts by step that are sampled and not taken; it may hold some of a checkpoint (`load_rollouts`) from
            the start, and is what a checkpoint keeps (`rollouts_to_save`).

    Raises what `sample` raised, and RuntimeError where a completion is not of the last `depth + 1` weight versions.
    """
    steps, missing = list(steps), [step for step in steps if step not in ready]
    errors: dict[int, BaseException] = {}
    changed, horizon = threading.Condition(), -1  # the last step that may be sampled now

    def work() -> None:
        for step in missing:
            with changed:
                changed.wait_for(lambda step=step: step <= horizon)
            try:
                found, error = sample(step), None
            except BaseException as raised:  # again where the step's rollouts are taken
                found, error = [], raised
            with changed:
                if error is None:
                    ready[step] = found
                else:
                    errors[step] = error
                changed.notify_all()
            if error is not None:
                return

    if depth:
        threading.Thread(target=work, name="rollout", daemon=True).start()
    for step in steps:
        if depth:
            with changed:
                horizon = step + depth
                changed.notify_all()
                changed.wait_for(lambda step=step: step in ready or step in errors)
            if step in errors:
                raise errors[step]
        rollouts = ready.pop(step) if step in ready else sample(step)
        newest = engine.weight_version
        for rollout in rollouts:
            rollout.lag = newest - rollout.completion.weight_version
            if not 0 <= rollout.lag <= depth:
                raise RuntimeError(
                    f"a completion was sampled from weight version {rollout.completion.weight_version}, but the engine "
                    f"serves {newest} and async_level is {depth}: the engine did not take an update."
                )
        yield rollouts


def rollouts_to_save(ready: Mapping[int, list[Rollout]], engine: Engine) -> dict[str, Any]:
    """`ready` in the types of a checkpoint; empty where nothing waits. What is being sampled is sampled again."""
    waiting = {step: [asdict(rollout.completion) for rollout in rollouts] for step, rollouts in list(ready.items())}
    return {"serving": engine.weight_version, "rollouts": waiting} if waiting else {}


def load_rollouts(
    saved: Mapping[str, Any], prompts_of: Callable[[int], Sequence[Any]], engine: Engine
) -> dict[int, list[Rollout]]:
    """The rollouts by step that `rollouts_to_save` saved, their weight versions counted as this engine counts them.

    prompts_of: step -> this process's prompts; the engine serves the weights of the checkpoint.
    """
    shift = engine.weight_version - saved.get("serving", engine.weight_version)
    ready = {}
    for step, completions in saved.get("rollouts", {}).items():
        if completions and isinstance(completions[0], list):  # groups, in older checkpoints
            completions = sum(completions, [])
        prompts = prompts_of(step)
        size = len(completions) // max(len(prompts), 1)
        ready[step] = [
            Rollout(prompt=prompts[i // size], completion=completion, sampled=[True] * len(completion.token_ids))
            for i, completion in enumerate(
                replace(Completion(**one), weight_version=one["weight_version"] + shift) for one in completions
            )
        ]
    return ready
