"""Rollouts of coming steps, sampled while the present one trains, and judged as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from loops.shared.rollout.contract import Completion, Engine, Sampling

Batch = TypeVar("Batch")
Verdict = TypeVar("Verdict")


class Ahead(Generic[Batch]):
    """The batches of a run in the order of its steps, each sampled at most `level` steps before it is taken.

    Level 0 samples a step when it is taken, in the caller's thread: weights are never older than the step. At level n
    one thread samples the steps up to n ahead, so a batch is made of weights at most n updates old (some tokens of
    newer ones, where the engine takes updates in flight). The order of batches, and the seeds in them, are the same at
    every level. What is sampled and not taken yet can be put into a checkpoint: `waiting`.
    """

    def __init__(
        self, sample: Callable[[int], Batch], *, level: int, last: int, waiting: Mapping[int, Batch] | None = None
    ):
        """sample: makes the batch of a step (from 0), without any exchange between processes; last: the last step;
        waiting: batches by step that a resumed run takes before it samples."""
        self._sample, self._level, self._last = sample, level, last
        self._coming: dict[int, Future[Batch]] = {}
        for step, batch in (waiting or {}).items():
            self._coming[step] = Future()
            self._coming[step].set_result(batch)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout") if level else None

    def take(self, step: int) -> Batch:
        """The batch of `step`; those of the `level` steps after it are under way when it returns. Raises what sampling
        it raised."""
        if self._thread is not None:
            for coming in range(step, min(step + self._level, self._last) + 1):
                if coming not in self._coming:
                    self._coming[coming] = self._thread.submit(self._sample, coming)
        return self._coming.pop(step).result() if step in self._coming else self._sample(step)

    def waiting(self) -> dict[int, Batch]:
        """Batches by step that are sampled and not taken; those still under way would be sampled again."""
        return {
            step: future.result()
            for step, future in self._coming.items()
            if future.done() and not future.cancelled() and future.exception() is None
        }

    def close(self) -> None:
        """Let go of what was not taken; waits for the batch under way."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._coming.clear()


def sample_and_judge(
    engine: Engine,
    prompts: list[list[int]],
    judge: Callable[[list[int], list[list[Completion]]], Verdict],
    *,
    n: int,
    sampling: Sampling,
    seed: int,
    prompt_numbers: list[int],
) -> tuple[list[list[Completion]], list[Verdict]]:
    """(`engine.sample`'s groups, verdicts on them in the order of the prompts).

    judge: takes places in `prompts` and their groups. An engine that hands groups over one by one has each judged while
    the others are still sampled, one after the other in a thread of their own; one that returns all at once has them
    judged in one call.
    """
    verdicts: dict[int, Future[Any]] = {}
    with ThreadPoolExecutor(1, thread_name_prefix="judge") as thread:

        def arrived(place: int, group: list[Completion]) -> None:
            verdicts[place] = thread.submit(judge, [place], [group])

        groups = engine.sample(
            prompts, n=n, sampling=sampling, seed=seed, prompt_numbers=prompt_numbers, arrived=arrived
        )
        if not verdicts:
            return groups, [judge(list(range(len(groups))), groups)]
        return groups, [verdicts[place].result() for place in range(len(groups))]


def refuse_stale(groups: list[list[Completion]], *, newest: int, level: int) -> None:
    """Raise RuntimeError where a completion is not of the last `level + 1` weight versions, `newest` being served."""
    versions = {completion.weight_version for group in groups for completion in group}
    wrong = sorted(version for version in versions if not newest - level <= version <= newest)
    if wrong:
        raise RuntimeError(
            f"a completion was sampled from weight version {wrong[0]}, but the engine serves {newest} and async_level "
            f"is {level}: the engine did not take an update."
        )
