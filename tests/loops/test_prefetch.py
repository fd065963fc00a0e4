"""Rollouts ahead of the step that trains: their order, how old their weights may be, what a checkpoint keeps."""

import io
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import torch
from accelerate import Accelerator

from data.chat import Prompt
from data.pack import pack_completions
from data.rewards import RewardConfig, build_reward_fn
from loops.shared.metrics import Metrics
from loops.shared.rollout import Completion, RolloutConfig
from loops.shared.rollout.prefetch import load_rollouts, prefetch, rollouts_to_save
from loops.shared.rollout.rollouts import (
    Microbatch,
    add_rollout_metrics,
    add_update_metrics,
    build_rollouts,
    compute_rewards,
    sample_rollouts,
)
from losses.grpo import group_advantages

PROMPT = Prompt([1], "a", {})


def of_version(version, token=1):
    return Completion([token], [-1.0], "stop", "x", version)


def rollouts(step, version):
    return build_rollouts([PROMPT], [[of_version(version, step)]])


def tokens(found):
    return [rollout.completion.token_ids for rollout in found]


class Serving:
    """An engine's weight version."""

    def __init__(self, weight_version=0):
        self.weight_version = weight_version


def until(condition):
    """Wait for another thread; no time is a bound on the law itself."""
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_rollouts_come_in_order_and_never_more_than_depth_steps_ahead(depth):
    """The weight version grows by one per step; a rollout of step s may see versions s - depth .. s."""
    seen, serving = [], Serving()

    def sample(step):
        seen.append((step, serving.weight_version))
        return rollouts(step, serving.weight_version)

    for step, found in enumerate(prefetch(sample, range(10), serving, depth=depth, ready={})):
        assert tokens(found) == [[step]]
        until(lambda step=step: len(seen) >= min(step + depth + 1, 10))  # the update, while others are sampled
        serving.weight_version += 1
    assert [step for step, _ in seen] == list(range(10))
    assert all(step - depth <= version <= step for step, version in seen)
    if depth:
        assert any(version < step for step, version in seen)


@pytest.mark.parametrize("depth", [0, 1])
def test_sampling_overlaps_with_training(depth):
    """An update that ends only when the next rollout is there: without overlap it would wait for ever."""
    sampled = [threading.Event() for _ in range(5)]

    def sample(step):
        sampled[step].set()
        return rollouts(step, 0)

    coming = prefetch(sample, range(5), Serving(), depth=depth, ready={})
    for step in range(4):
        next(coming)
        assert sampled[step + 1].wait(20 if depth else 0.05) == bool(depth)


def test_an_error_while_sampling_is_raised_where_the_rollouts_are_taken():
    def sample(step):
        if step == 1:
            raise RuntimeError("the server is gone")
        return rollouts(step, 0)

    coming = prefetch(sample, range(6), Serving(), depth=1, ready={})
    assert tokens(next(coming)) == [[0]]
    with pytest.raises(RuntimeError, match="the server is gone"):
        next(coming)


def test_a_resumed_run_takes_what_was_waiting_and_samples_the_rest():
    """Two rollouts wait when a checkpoint is made; through torch.save they are the same completions."""
    ready: dict = {}
    first = prefetch(lambda step: rollouts(step, 5), range(10), Serving(5), depth=2, ready=ready)
    next(first), next(first)
    until(lambda: len(ready) == 2)  # steps 2 and 3
    file = io.BytesIO()
    torch.save(rollouts_to_save(ready, Serving(5)), file)
    file.seek(0)
    sampled = []

    def sample(step):
        sampled.append(step)
        return rollouts(step, 1)

    engine = Serving(1)
    kept = load_rollouts(torch.load(file, weights_only=True), lambda step: [PROMPT], engine)
    assert {step: tokens(found) for step, found in kept.items()} == {2: [[2]], 3: [[3]]}
    second = prefetch(sample, range(2, 10), engine, depth=2, ready=kept)
    taken = [next(second) for _ in range(4)]
    assert [tokens(found) for found in taken] == [[[2]], [[3]], [[4]], [[5]]]
    assert [found[0].completion.weight_version for found in taken] == [1] * 4  # 5 was served then, 1 is now
    assert all(found[0].prompt is PROMPT and not found[0].rewards for found in taken)
    assert sampled[:2] == [4, 5]


def test_an_older_checkpoint_kept_groups():
    groups = [[asdict(of_version(3, token)) for token in group] for group in ((1, 2), (3, 4))]
    kept = load_rollouts({"serving": 3, "rollouts": {2: groups}}, lambda step: [PROMPT, PROMPT], Serving(3))
    assert {step: tokens(found) for step, found in kept.items()} == {2: [[1], [2], [3], [4]]}


def test_nothing_is_sampled_beyond_the_last_step():
    sampled = []

    def sample(step):
        sampled.append(step)
        return rollouts(step, 0)

    assert len(list(prefetch(sample, range(3), Serving(), depth=5, ready={}))) == 3
    assert sampled == [0, 1, 2]


@pytest.mark.parametrize(
    ("depth", "version", "fine"), [(0, 4, True), (0, 3, False), (1, 3, True), (1, 2, False), (1, 5, False)]
)
def test_a_completion_of_other_weights_than_expected_is_refused(depth, version, fine):
    """Version 4 is served: depth 0 takes 4 alone, depth 1 also 3."""
    coming = prefetch(lambda step: rollouts(step, version), range(1), Serving(4), depth=depth, ready={})
    if fine:
        assert next(coming)[0].lag == 4 - version
    else:
        with pytest.raises(RuntimeError, match=f"weight version {version}"):
            next(coming)


def test_a_checkpoint_keeps_every_recorded_rollout_until_it_is_taken():
    """Two rollouts were recorded; while the thread is busy with a third, a new checkpoint still has the second."""
    busy = threading.Event()

    def sample(step):
        busy.wait(20)
        return rollouts(step, 0)

    ready = {step: rollouts(step, 0) for step in (0, 1)}
    coming = prefetch(sample, range(10), Serving(), depth=2, ready=ready)
    next(coming)
    assert list(rollouts_to_save(ready, Serving())["rollouts"]) == [1]
    busy.set()
    assert tokens(next(coming)) == [[1]]
    assert rollouts_to_save({}, Serving()) == {}


# Rewards


class HandsOver:
    """An engine that finishes its second prompt first, and the first only when the second has its rewards."""

    weight_version = 0

    def __init__(self, rewarded):
        self.rewarded = rewarded

    def sample(self, prompts, *, n, sampling, seed, prompt_numbers, arrived=None):
        groups = [[Completion([place], [-1.0], "stop", str(place), 0)] * n for place in range(len(prompts))]
        arrived(1, groups[1])
        assert self.rewarded.wait(5), "no reward is computed before the last completion"
        arrived(0, groups[0])
        return groups


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


def reward_fn_of(function):
    return build_reward_fn(RewardConfig(reward_functions=f"{__name__}:{function}"))


REWARDED = threading.Event()


def number_of_the_completion(*, prompts, completions):
    REWARDED.set()
    return [10 * ord(prompt) + int(text) for prompt, text in zip(prompts, completions, strict=True)]


def test_rewards_are_computed_as_groups_arrive_and_stay_in_order():
    prompts = [Prompt([1], "a", {}), Prompt([2], "b", {})]
    reward_fn = reward_fn_of("number_of_the_completion")
    REWARDED.clear()
    common = dict(n=2, sampling=RolloutConfig(), seed=0, prompt_numbers=[0, 1])
    found = sample_rollouts(HandsOver(REWARDED), prompts, reward_fn, **common)
    assert [rollout.reward for rollout in found] == [970, 970, 981, 981]
    assert [rollout.rewards for rollout in found] == [{"number_of_the_completion": r.reward} for r in found]


def alarmed(*, completions):
    """A reward with a limit of time, as verifiers have: Python takes signal handlers in the main thread only."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return [1.0] * len(completions)


@pytest.mark.parametrize("engine", [HandsOver, FromThreads, AllAtOnce])
@pytest.mark.parametrize("depth", [0, 2])
def test_rewards_run_in_the_main_thread_with_every_engine_at_every_depth(engine, depth):
    """Also those of rollouts that a checkpoint kept."""
    rewarded = threading.Event()
    rewarded.set()
    prompts = [Prompt([1], "a", {}), Prompt([2], "b", {})]
    reward_fn = reward_fn_of("alarmed")
    engine = engine(rewarded)

    def sample(step):
        common = dict(n=2, sampling=RolloutConfig(), seed=step, prompt_numbers=[0, 1])
        return sample_rollouts(engine, prompts, None if depth else reward_fn, **common)

    ready = {3: build_rollouts(prompts, [[of_version(0, 7)] * 2] * 2)}
    for found in prefetch(sample, range(4), engine, depth=depth, ready=ready):
        compute_rewards(found, reward_fn)
        assert [rollout.reward for rollout in found] == [1.0] * 4 and not any(rollout.failure for rollout in found)


CALLS: list[int] = []


def counted(*, completions):
    CALLS.append(len(completions))
    return [1.0] * len(completions)


@pytest.mark.parametrize(("engine", "calls"), [(HandsOver, [2, 2]), (FromThreads, [4]), (AllAtOnce, [4])])
def test_what_has_no_reward_when_sampling_ends_gets_it_in_one_call(engine, calls):
    rewarded, prompts, reward_fn = (
        threading.Event(),
        [Prompt([1], "a", {}), Prompt([2], "b", {})],
        reward_fn_of("counted"),
    )
    rewarded.set()
    CALLS.clear()
    common = dict(n=2, sampling=RolloutConfig(), seed=0, prompt_numbers=[0, 1])
    found = sample_rollouts(engine(rewarded), prompts, reward_fn, **common)
    compute_rewards(found, reward_fn)
    compute_rewards(found, reward_fn)
    assert calls == CALLS and [rollout.reward for rollout in found] == [1.0] * 4


def test_a_process_without_prompts_calls_no_reward():
    CALLS.clear()
    common = dict(n=2, sampling=RolloutConfig(), seed=0, prompt_numbers=[])
    found = sample_rollouts(AllAtOnce(None), [], reward_fn_of("counted"), **common)
    compute_rewards(found, reward_fn_of("counted"))
    assert CALLS == []
    metrics = Metrics()
    add_rollout_metrics(metrics, found, 2)
    assert found == [] and metrics.reduce(Accelerator(cpu=True))["rollout/completions"] == 0


def test_groups_of_equal_rewards_are_counted():
    """Groups of two: 1 1, 0 1, nan nan, 1 nan. All but the second have no gradient, by the advantages that the loss
    takes (a missing reward is left out of its group)."""
    nan = float("nan")
    rewards = [1.0, 1.0, 0.0, 1.0, nan, float("nan"), 1.0, nan]
    found = build_rollouts([PROMPT] * 4, [[of_version(0)] * 2] * 4)
    for i, (rollout, reward) in enumerate(zip(found, rewards, strict=True)):
        rollout.reward, rollout.lag = reward, i % 2
    metrics = Metrics()
    add_rollout_metrics(metrics, found, 2)
    numbers = metrics.reduce(Accelerator(cpu=True))
    assert numbers["rollout/equal_groups"] == 3 / 4 and numbers["rollout/completions"] == 8
    assert int((group_advantages(torch.tensor(rewards), 2).view(4, 2) == 0).all(1).sum()) == 3
    assert numbers["rollout/lag"] == 0.5 and numbers["reward/missing"] == 3 and numbers["reward/mean"] == 4 / 5


@pytest.mark.parametrize("terms", [{"policy/ratio": torch.tensor(2.0)}, {"policy/ratio_max": torch.tensor(1.5)}])
def test_the_metrics_of_an_update_are_those_of_the_loss(terms):
    """One rollout of two tokens. A loss without a largest ratio logs none: no value is better than a wrong 0."""
    batch = pack_completions([[5, 6]], [[8, 9]], is_target=[[True, True]], numbers=[0])
    logprobs = torch.tensor([[-1.0, -2.0]])
    microbatch = Microbatch(batch, torch.ones(1), logprobs - 0.5, old_logprobs=logprobs)
    metrics = Metrics()
    add_update_metrics(metrics, microbatch, dict(terms), torch.ones(1, 2))
    numbers = metrics.reduce(Accelerator(cpu=True))
    assert numbers["policy/mismatch_max"] == 0.5 and numbers["policy/entropy"] == 1 and numbers["tokens/scored"] == 2
    assert numbers.get("policy/ratio") == (1.0 if "policy/ratio" in terms else None)
    assert numbers.get("policy/ratio_max") == (1.5 if "policy/ratio_max" in terms else None)


def test_means_are_formed_from_global_sums():
    """Two parts with 1, 1, 0 and 0 (and a missing one): mean 2/4 and std 1/2, not the mean of 2/3 and 0."""
    metrics = Metrics()
    for values in ([1.0, 1.0, 0.0, None], [0.0, None]):
        found = build_rollouts([PROMPT], [[of_version(0)] * len(values)])
        for rollout, value in zip(found, values, strict=True):
            rollout.rewards, rollout.reward = {"f": value}, float("nan") if value is None else value
        add_rollout_metrics(metrics, found, len(values))
    numbers = metrics.reduce(Accelerator(cpu=True))
    for path in ("reward", "reward/f"):
        assert (numbers[f"{path}/mean"], numbers[f"{path}/std"], numbers[f"{path}/missing"]) == (0.5, 0.5, 2)
    assert numbers["reward/f/failed"] == 0
