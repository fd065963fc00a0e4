"""Rollouts ahead of the step that trains: their order, how old their weights may be, what a checkpoint keeps."""

import io
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import torch

from data.chat import Prompt
from data.rewards import RewardFn, join_results
from loops.shared.rollout import Completion, Sampling
from loops.shared.rollout.ahead import Ahead, Share, rollout_statistics, rollout_sums, sample_and_judge
from losses.grpo import group_advantages


def of_version(version, token=1):
    return Completion([token], [-1.0], "stop", "x", version)


class Serving:
    """An engine's weight version."""

    def __init__(self, weight_version=0):
        self.weight_version = weight_version


def share(step, version, kind="new"):
    return Share([], [[of_version(version, step)]], [kind], (0.0, 0.0))


@pytest.mark.parametrize("level", [0, 1, 3])
def test_rollouts_come_in_order_and_never_more_than_level_steps_ahead(level):
    """The weight version grows by one a step; a rollout of step s may see versions s - level .. s."""
    seen, serving = [], Serving()

    def sample(step, groups):
        seen.append((step, serving.weight_version))
        return share(step, serving.weight_version)

    ahead = Ahead(sample, serving, level=level, last=9, record={})
    for step in range(10):
        assert ahead.take(step).groups[0][0].token_ids == [step]
        until = time.monotonic() + 300
        while len(seen) < min(step + level + 1, 10):  # the update, while others are sampled
            assert time.monotonic() < until
            time.sleep(0.001)
        serving.weight_version += 1
    ahead.close()
    assert [step for step, _ in seen] == list(range(10))
    assert all(step - level <= version <= step for step, version in seen)
    if level:
        assert any(version < step for step, version in seen)


@pytest.mark.parametrize("level", [0, 1])
def test_sampling_overlaps_with_training(level):
    """An update that ends only when the next rollout is there: without overlap it would wait for ever."""
    sampled = [threading.Event() for _ in range(5)]

    def sample(step, groups):
        sampled[step].set()
        return share(step, 0)

    ahead = Ahead(sample, Serving(), level=level, last=4, record={})
    for step in range(4):
        ahead.take(step)
        assert sampled[step + 1].wait(20 if level else 0.05) == bool(level)
    ahead.close()


def test_an_error_while_sampling_is_raised_where_the_rollout_is_taken():
    def sample(step, groups):
        if step == 1:
            raise RuntimeError("the server is gone")
        return share(step, 0)

    ahead = Ahead(sample, Serving(), level=1, last=5, record={})
    assert ahead.take(0).verdicts == ["new"]
    with pytest.raises(RuntimeError, match="the server is gone"):
        ahead.take(1)
    ahead.close()


def test_a_resumed_run_takes_what_was_waiting_and_samples_the_rest():
    """Two rollouts wait when a checkpoint is made; through torch.save they are the same completions."""
    first = Ahead(lambda step, groups: share(step, 5, "old"), Serving(5), level=2, last=9, record={})
    first.take(0)
    first.take(1)
    while len(first.record().get("rollouts", {})) < 2:  # steps 2 and 3
        time.sleep(0.001)
    file = io.BytesIO()
    torch.save(first.record(), file)
    first.close()
    sampled = []

    def sample(step, groups):
        if groups is not None:
            return Share([], groups, ["judged again"], (0.0, 0.0))
        sampled.append(step)
        return share(step, 1)

    file.seek(0)
    second = Ahead(sample, Serving(1), level=2, last=9, record=torch.load(file, weights_only=True))
    taken = [second.take(step) for step in range(2, 6)]
    second.close()
    assert [one.verdicts for one in taken] == [["judged again"]] * 2 + [["new"]] * 2
    assert [one.groups for one in taken[:2]] == [
        [[of_version(1, 2)]],
        [[of_version(1, 3)]],
    ]  # 5 was served then, 1 is now
    assert sampled[:2] == [4, 5]


def test_nothing_is_sampled_beyond_the_last_step():
    sampled = []

    def sample(step, groups):
        sampled.append(step)
        return share(step, 0)

    ahead = Ahead(sample, Serving(), level=5, last=2, record={})
    for step in range(3):
        ahead.take(step)
    ahead.close()
    assert sampled == [0, 1, 2]


@pytest.mark.parametrize(
    ("level", "version", "fine"), [(0, 4, True), (0, 3, False), (1, 3, True), (1, 2, False), (1, 5, False)]
)
def test_a_completion_of_other_weights_than_expected_is_refused(level, version, fine):
    """Version 4 is served: level 0 takes 4 alone, level 1 also 3."""
    ahead = Ahead(lambda step, groups: share(step, version), Serving(4), level=level, last=0, record={})
    if fine:
        assert ahead.take(0).lag == 4 - version  # one completion
    else:
        with pytest.raises(RuntimeError, match=f"weight version {version}"):
            ahead.take(0)
    ahead.close()


class HandsOver:
    """An engine that finishes its second prompt first, and the first only when the second has been judged."""

    weight_version = 0

    def __init__(self, judged):
        self.judged = judged

    def sample(self, prompts, *, n, sampling, seed, prompt_numbers, arrived=None):
        groups = [[Completion([place], [-1.0], "stop", str(place), 0)] * n for place in range(len(prompts))]
        arrived(1, groups[1])
        assert self.judged.wait(5), "nothing is judged before the last completion"
        arrived(0, groups[0])
        return groups


def test_groups_are_judged_as_they_arrive_and_verdicts_stay_in_order():
    judged = threading.Event()

    def judge(prompts, completions):
        judged.set()
        return [(prompt.text, completion.text) for prompt, completion in zip(prompts, completions, strict=True)]

    prompts = [Prompt([1], "a", {}), Prompt([2], "b", {})]
    common = dict(n=2, sampling=Sampling(), seed=0, prompt_numbers=[0, 1])
    found = sample_and_judge(HandsOver(judged), prompts, judge, **common)
    assert found.verdicts == [[("a", "0")] * 2, [("b", "1")] * 2]
    again = sample_and_judge(None, prompts, judge, **common, groups=found.groups)
    assert again.verdicts == [found.verdicts[0] + found.verdicts[1]]


def alarmed(*, completions):
    """A reward with a limit of time, as verifiers have: Python takes signal handlers in the main thread only."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return [1.0] * len(completions)


class FromThreads(HandsOver):
    """Hands its groups over from threads of its own."""

    def sample(self, prompts, *, n, sampling, seed, prompt_numbers, arrived=None):
        groups = [[of_version(0, place)] * n for place in range(len(prompts))]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(arrived, range(len(prompts)), groups))
        return groups


class AllAtOnce(HandsOver):
    def sample(self, prompts, *, n, sampling, seed, prompt_numbers, arrived=None):
        return [[of_version(0, place)] * n for place in range(len(prompts))]


@pytest.mark.parametrize("engine", [HandsOver, FromThreads, AllAtOnce])
@pytest.mark.parametrize("level", [0, 2])
def test_rewards_run_in_the_main_thread_with_every_engine_at_every_level(engine, level):
    """Also those of rollouts that a checkpoint kept."""
    judged = threading.Event()
    judged.set()
    prompts = [Prompt([1], "a", {}), Prompt([2], "b", {})]
    judge = RewardFn({"alarmed": alarmed}, [1.0])

    def sample(step, groups):
        return sample_and_judge(
            engine(judged), prompts, judge if groups is not None or not level else None, n=2, sampling=Sampling(),
            seed=step, prompt_numbers=[0, 1], groups=groups,
        )  # fmt: skip

    kept = {3: [[asdict(of_version(0, 7))] * 2] * 2}
    ahead = Ahead(sample, Serving(), level=level, last=3, record={"serving": 0, "rollouts": kept})
    for step in range(4):
        result = join_results(ahead.take(step).verdicts)
        assert result.total == [1.0] * 4 and result.failure is None
    ahead.close()


def test_a_process_without_prompts_calls_no_reward():
    def of_the_longest(*, completions, answer):
        return [len(text) / max(map(len, completions)) for text in completions]

    judge = RewardFn({"of_the_longest": of_the_longest}, [1.0])
    share = sample_and_judge(
        AllAtOnce(None), [], judge, n=2, sampling=Sampling(), seed=0, prompt_numbers=[], groups=None
    )
    result = join_results(share.verdicts)
    assert result.failure is None and result.total == [] and result.failed == {"of_the_longest": 0}
    assert rollout_sums(share, result.total)["rollout/equal_groups"] == 0


def test_a_checkpoint_keeps_every_recorded_rollout_until_it_is_taken():
    """Two rollouts were recorded; while the thread is busy with a third, a new checkpoint still has the second."""
    busy = threading.Event()

    def sample(step, groups):
        if groups is None:
            busy.wait(20)
            return share(step, 0)
        return Share([], groups, ["judged"], (0.0, 0.0))

    kept = {step: [[asdict(of_version(0, step))]] for step in (0, 1)}
    ahead = Ahead(sample, Serving(), level=2, last=9, record={"serving": 0, "rollouts": kept})
    ahead.take(0)
    assert list(ahead.record()["rollouts"]) == [1]
    busy.set()
    ahead.take(1)
    ahead.close()


def test_groups_of_equal_rewards_are_counted():
    """Groups of two: 1 1, 0 1, nan nan, 1 nan. All but the second have no gradient, by the advantages that the loss
    takes (a missing reward is left out of its group)."""
    nan = float("nan")
    rewards = [1.0, 1.0, 0.0, 1.0, nan, float("nan"), 1.0, nan]
    rollout = Share([], [[of_version(0)] * 2] * 4, [], (0.0, 0.0), lag=4)
    sums = rollout_sums(rollout, rewards)
    assert sums["rollout/equal_groups"] == 3 and sums["rollout/completions"] == 8 and sums["rollout/groups"] == 4
    assert int((group_advantages(torch.tensor(rewards), 2).view(4, 2) == 0).all(1).sum()) == 3
    assert rollout_statistics(sums | {"rollout/lag": 4.0})["rollout/lag"] == 0.5
