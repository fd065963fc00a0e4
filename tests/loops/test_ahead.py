"""Rollouts ahead of the step that trains: their order, how old their weights may be, what a checkpoint keeps."""

import threading
import time

import pytest

from loops.shared.rollout import Completion, Sampling
from loops.shared.rollout.ahead import Ahead, refuse_stale, sample_and_judge


def of_version(version):
    return Completion([1], [-1.0], "stop", "x", version)


@pytest.mark.parametrize("level", [0, 1, 3])
def test_batches_come_in_order_and_never_more_than_level_steps_ahead(level):
    """The weight version grows by one a step; a batch of step s may see versions s - level .. s."""
    version, seen = 0, []

    def sample(step):
        seen.append((step, version))
        return step

    ahead = Ahead(sample, level=level, last=9)
    for step in range(10):
        assert ahead.take(step) == step
        time.sleep(0.01)  # the update, while others are sampled
        version += 1
    ahead.close()
    assert [step for step, _ in seen] == list(range(10))
    assert all(step - level <= version <= step for step, version in seen)
    if level:
        assert any(version < step for step, version in seen)


def test_sampling_overlaps_with_training():
    """Ten steps of 30 ms sampling and 30 ms training: 330 ms where they overlap, 600 ms where not."""

    def run(level):
        ahead, began = Ahead(lambda step: time.sleep(0.03), level=level, last=9), time.perf_counter()
        for step in range(10):
            ahead.take(step)
            time.sleep(0.03)
        ahead.close()
        return time.perf_counter() - began

    assert run(1) < 0.75 * run(0)


def test_an_error_while_sampling_is_raised_where_the_batch_is_taken():
    def sample(step):
        if step == 1:
            raise RuntimeError("the server is gone")
        return step

    ahead = Ahead(sample, level=1, last=5)
    assert ahead.take(0) == 0
    with pytest.raises(RuntimeError, match="the server is gone"):
        ahead.take(1)
    ahead.close()


def test_a_resumed_run_takes_what_was_waiting_and_samples_the_rest():
    first, sampled = Ahead(lambda step: ("old", step), level=2, last=9), []
    first.take(0)
    first.take(1)
    while len(first.waiting()) < 2:  # steps 2 and 3
        time.sleep(0.001)
    kept = first.waiting()
    first.close()
    assert kept == {2: ("old", 2), 3: ("old", 3)}

    def sample(step):
        sampled.append(step)
        return ("new", step)

    second = Ahead(sample, level=2, last=9, waiting=kept)
    assert [second.take(step) for step in range(2, 6)] == [("old", 2), ("old", 3), ("new", 4), ("new", 5)]
    second.close()
    assert sampled[:2] == [4, 5]


def test_nothing_is_sampled_beyond_the_last_step():
    sampled = []
    ahead = Ahead(sampled.append, level=5, last=2)
    for step in range(3):
        ahead.take(step)
    ahead.close()
    assert sampled == [0, 1, 2]


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

    def judge(places, groups):
        judged.set()
        return [places, [group[0].text for group in groups]]

    _, verdicts = sample_and_judge(
        HandsOver(judged), [[1], [2]], judge, n=2, sampling=Sampling(), seed=0, prompt_numbers=[0, 1]
    )
    assert verdicts == [[[0], ["0"]], [[1], ["1"]]]


def test_a_completion_of_other_weights_than_expected_is_refused():
    refuse_stale([[of_version(4), of_version(3)]], newest=4, level=1)
    for version in (2, 5):
        with pytest.raises(RuntimeError, match=f"version {version}"):
            refuse_stale([[of_version(4)], [of_version(version)]], newest=4, level=1)
