"""Rollouts of coming steps, sampled while the present one trains; rewards are computed in the main thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, TypeVar

import torch

from loops.shared.rollout.config import Sampling
from loops.shared.rollout.engine import Completion, Engine
from losses.grpo import group_advantages

Verdict = TypeVar("Verdict")


@dataclass(frozen=True)
class Share(Generic[Verdict]):
    """What a process sampled for a step, and what was said of it."""

    prompts: list[Any]
    """Of this process (data.chat.Prompt)."""
    groups: list[list[Completion]]
    """One list of completions a prompt, in the order of the prompts."""
    verdicts: list[Verdict]
    """Of the judge, in the same order; one where it saw all groups at once, none where it has not seen them yet."""
    seconds: tuple[float, float]
    """Of sampling, and of the judging that was left when sampling ended."""
    lag: int = 0
    """Updates that the engine has taken since, added up over the completions."""


class Ahead(Generic[Verdict]):
    """The rollouts of a run in the order of its steps, each sampled at most `level` steps before it is taken.

    Level 0 samples a step when it is taken, in the caller's thread: weights are never older than the step. At level n
    one thread samples the steps up to n ahead, so a rollout is made of weights at most n updates old (some tokens of
    newer ones, where the engine takes updates in flight). The order of rollouts, and the seeds in them, are the same at
    every level. Users' rewards run in the caller's thread at every level: the thread only samples, and `take` judges.
    What is sampled and not taken yet can be put into a checkpoint: `record`.
    """

    def __init__(
        self,
        sample: Callable[[int, list[list[Completion]] | None], Share[Verdict]],
        engine: Engine,
        *,
        level: int,
        last: int,
        record: Mapping[str, Any],
    ):
        """sample: makes the rollout of a step (from 0), without any exchange between processes; given groups that were
        sampled before, it only judges them; without them it may leave that to a second call. engine: whose weight
        version tells how old they are. last: the last step.
        record: `record()` of a checkpoint, whose weights the engine serves now, or empty."""
        self._engine = engine
        self._sample, self._level, self._last = sample, level, last
        shift = engine.weight_version - record.get(
            "serving", engine.weight_version
        )  # versions of a restarted engine start anew
        self._recorded = {
            step: [
                [replace(Completion(**one), weight_version=one["weight_version"] + shift) for one in group]
                for group in groups
            ]
            for step, groups in record.get("rollouts", {}).items()
        }
        self._coming: dict[int, Future[Share[Verdict]]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout") if level else None

    def take(self, step: int) -> Share[Verdict]:
        """The rollout of `step`; those of the `level` steps after it are under way when it returns.

        Raises what sampling it raised, and RuntimeError where a completion is not of the last `level + 1` weight
        versions.
        """
        if self._thread is not None:
            for coming in range(step, min(step + self._level, self._last) + 1):
                if coming not in self._coming and coming not in self._recorded:
                    self._coming[coming] = self._thread.submit(self._sample, coming, None)
        if step in self._coming:
            share = self._coming.pop(step).result()
            if not share.verdicts:
                judged = self._sample(step, share.groups)
                share = replace(judged, seconds=(share.seconds[0], judged.seconds[1]))
        else:
            share = self._sample(step, self._recorded.pop(step, None))
        versions = {completion.weight_version for group in share.groups for completion in group}
        newest = self._engine.weight_version
        wrong = sorted(version for version in versions if not newest - self._level <= version <= newest)
        if wrong:
            raise RuntimeError(
                f"a completion was sampled from weight version {wrong[0]}, but the engine serves {newest} and "
                f"async_level is {self._level}: the engine did not take an update."
            )
        return replace(share, lag=sum(newest - one.weight_version for group in share.groups for one in group))

    def record(self) -> dict[str, Any]:
        """What is sampled and not taken, in types of a checkpoint; what is still under way is sampled again."""
        done = {
            step: future.result().groups
            for step, future in self._coming.items()
            if future.done() and not future.cancelled() and future.exception() is None
        }
        rollouts = {**self._recorded, **done}
        if not rollouts:
            return {}
        return {
            "serving": self._engine.weight_version,
            "rollouts": {
                step: [[asdict(completion) for completion in group] for group in groups]
                for step, groups in rollouts.items()
            },
        }

    def close(self) -> None:
        """Let go of what was not taken; waits for the rollout under way."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._coming.clear()


def sample_and_judge(
    engine: Engine,
    prompts: list[Any],
    judge: Callable[[list[Any], list[Completion]], Verdict] | None,
    *,
    n: int,
    sampling: Sampling,
    seed: int,
    prompt_numbers: list[int],
    groups: list[list[Completion]] | None = None,
) -> Share[Verdict]:
    """`n` completions of each prompt (an object with `prompt_ids`), and the verdicts on them.

    judge: takes prompts and completions, one of each a row, whole groups in each call; None leaves the verdicts out. It
    runs in the caller's thread, whatever the engine: a group that is handed over there is judged while the others are
    still sampled, all else in one call at the end. groups: completions that are there already, and are only judged.
    """
    began = time.perf_counter()
    verdicts: dict[int, Verdict] = {}
    caller = threading.get_ident()

    def judge_places(places: list[int], found: list[list[Completion]]) -> Verdict:
        asked = [prompts[place] for place, group in zip(places, found, strict=True) for _ in group]
        return judge(asked, [completion for group in found for completion in group])  # type: ignore[misc]

    def arrived(place: int, group: list[Completion]) -> None:
        if judge and threading.get_ident() == caller:
            verdicts[place] = judge_places([place], [group])

    if groups is None:
        ids = [prompt.prompt_ids for prompt in prompts]
        groups = engine.sample(ids, n=n, sampling=sampling, seed=seed, prompt_numbers=prompt_numbers, arrived=arrived)
    sampled = time.perf_counter()
    found = []
    if judge and verdicts:
        found = [verdicts[i] if i in verdicts else judge_places([i], [group]) for i, group in enumerate(groups)]
    elif judge:
        found = [judge_places(list(range(len(groups))), groups)]
    return Share(prompts, groups, found, (sampled - began, time.perf_counter() - sampled))


def rollout_sums(share: Share, totals: list[float]) -> dict[str, float]:
    """Counts of a process's rollouts, to be added over processes. totals: rewards, one per completion.

    Equal groups are those whose advantages are all 0: fewer than two different rewards, missing ones left aside.
    """
    completions = [completion for group in share.groups for completion in group]
    size = len(share.groups[0]) if share.groups else 1
    advantages = group_advantages(torch.tensor(totals, dtype=torch.float64), size, scale="none")  # the loss's own rule
    return {
        "rollout/completions": len(completions),
        "rollout/lag": share.lag,
        "rollout/groups": len(share.groups),
        "rollout/equal_groups": int((advantages.view(-1, size) == 0).all(dim=1).sum()),
        "rollout/truncated": sum(completion.finish_reason == "length" for completion in completions),
        "tokens/completions": sum(len(completion.token_ids) for completion in completions),
    }


def rollout_statistics(sums: dict[str, float]) -> dict[str, float]:
    """Shares and means from added-up `rollout_sums`, and the number of completions."""
    return {
        "rollout/completions": sums["rollout/completions"],
        "rollout/lag": sums["rollout/lag"] / sums["rollout/completions"],
        "rollout/equal_groups": sums["rollout/equal_groups"] / sums["rollout/groups"],
        "rollout/truncated": sums["rollout/truncated"] / sums["rollout/completions"],
        "rollout/completion_length": sums["tokens/completions"] / sums["rollout/completions"],
    }
