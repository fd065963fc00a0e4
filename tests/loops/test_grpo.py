"""What GRPO promises beyond its arithmetic: corrections, guards, what is refused, what is logged and shown."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from configs.loader import load_config
from data.chat import Prompt
from data.rewards import MissingRewards, RewardFn, build_reward_fn
from loops import grpo
from loops.shared import rollout
from loops.shared.rollout import Completion, RolloutConfig, Sampling, vllm_engine, vllm_setup
from loops.shared.rollout.evaluate import greedy_evaluation
from loops.shared.rollout.mismatch import check_sampler
from loops.shared.rollout.rollouts import Microbatch, build_rollouts
from loops.shared.rollout.transformers_engine import TransformersEngine
from loops.shared.run import one_sentence_errors

HOUSE = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def from_the_house(monkeypatch):
    monkeypatch.chdir(HOUSE)


calls = []


def even_lengths(*, completion_ids, **_):
    calls.append(len(completion_ids))
    return [float(sum(ids) % 2) for ids in completion_ids]


def fails_in_training(*, completions, **_):
    """The first call is the evaluation before training, the second the first step."""
    calls.append(len(completions))
    if len(calls) > 2:
        raise ConnectionError("the judge is down")
    return [float(i % 2) for i in range(len(completions))]


def run(folder: Path, *options: str) -> list[dict]:
    AcceleratorState._reset_state(True)
    calls.clear()
    common = ["--config", "configs/grpo.yaml", "--output_dir", str(folder), "--max_completion_length", "4"]
    common += ["--per_device_train_batch_size", "8", "--num_generations", "4", "--max_eval_samples", "4"]
    common += ["--model_id", "data/quickstart/scratch", "--from_scratch", "--log_completions_steps", "0"]
    own = [] if "--reward_functions" in options else ["--reward_functions", "tests.loops.test_grpo:even_lengths"]
    common += [*own, *([] if "--eval_reward" in options else ["--eval_reward", "null"])]
    threads = torch.get_num_threads()
    grpo.main(load_config(grpo.Config, [*common, *options], prog="grpo"))
    torch.set_num_threads(threads)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Elsewhere(TransformersEngine):
    """Stands for the in-process vLLM: the policy's weights through other kernels, so other log-probabilities."""

    is_off_policy = True

    def sample(self, prompts, **settings):
        groups = super().sample(prompts, **settings)
        return [[replace(one, logprobs=[p - 0.02 for p in one.logprobs]) for one in group] for group in groups]


@pytest.mark.parametrize("chosen", ["vllm", "transformers"])
def test_auto_corrects_the_tokens_of_the_engine_that_it_chose(chosen, tmp_path, monkeypatch):
    """engine: auto on a GPU with vLLM is vLLM, whatever the config says: each token counts exp(0.02) times."""
    monkeypatch.setattr(rollout.config, "resolve_engine", lambda name: chosen)
    installed = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: True))
    monkeypatch.setattr(rollout, "importlib", installed)
    monkeypatch.setattr(vllm_engine, "VllmEngine", lambda setup: Elsewhere(setup.policy, setup.tokenizer))
    monkeypatch.setattr(vllm_setup, "VllmSetup", Bare)
    rows = run(tmp_path / "run", "--max_steps", "1")
    if chosen == "vllm":
        assert rows[1]["policy/sampler_weight"] == pytest.approx(torch.tensor(0.02).exp().item(), rel=1e-4)
    else:
        assert "policy/sampler_weight" not in rows[1]


class Bare:
    """What a vLLM engine is built from."""

    def __init__(self, config, policy, tokenizer, autocast):
        self.policy, self.tokenizer = policy, tokenizer


def test_every_engine_states_whether_its_tokens_are_off_policy():
    from loops.shared.rollout.vllm_server import VllmServerEngine

    assert not TransformersEngine.is_off_policy
    assert vllm_engine.VllmEngine.is_off_policy and VllmServerEngine.is_off_policy


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kl_estimator": "k1", "beta": 0.1}, "kl_estimator is k1 and beta 0.1"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"epsilon": -0.2}, "epsilon is -0.2"),
        ({"epsilon": 1.5}, "epsilon is 1.5"),
        ({"epsilon_high": -1.0}, "epsilon_high is -1.0"),
        ({"num_iterations": 0}, "num_iterations is 0"),
        ({"prompts_per_step": -1}, "prompts_per_step is -1"),
        ({"importance_sampling_cap": -1.0}, "importance_sampling_cap is -1.0"),
        ({"scale_rewards": "loo"}, "scale_rewards 'loo' .* use one of group, batch, none"),
    ],
)
def test_options_that_disable_or_reverse_learning_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        grpo.Config(**options)


@pytest.mark.parametrize(("given", "meant"), [(True, "group"), (False, "none"), ("False", "none"), ("batch", "batch")])
def test_scale_rewards_takes_the_older_spellings(given, meant):
    assert grpo.Config(scale_rewards=given).scale_rewards == meant
    text = f"--scale_rewards={str(given).lower()}"
    assert load_config(grpo.Config, [text], prog="grpo").scale_rewards == meant


def test_a_step_is_a_set_of_rollouts_for_every_key_that_counts_steps(tmp_path):
    """Warm-up over 4 steps to a rate of 1e-3: row s has s/5 of it (the schedule's first rate is not 0), whatever
    num_iterations is."""
    options = ["--max_steps", "3", "--warmup_steps", "4", "--learning_rate", "1e-3"]
    once = run(tmp_path / "once", *options)
    twice = run(tmp_path / "twice", *options, "--num_iterations", "2")
    assert [row["step"] for row in twice] == [0, 1, 2, 3]
    assert [row["optim/learning_rate"] for row in twice[1:]] == [row["optim/learning_rate"] for row in once[1:]]


def test_completions_outside_the_loss_are_not_computed():
    """Group 1: completions 0 and 2 are truncated; they count in the group's mean, and cost nothing."""
    reasons = ["length", "stop", "length", "stop"]
    completions = [Completion([8, 9], [-1.0, -1.0], reason, "", 0) for reason in reasons]
    rollouts = build_rollouts([Prompt([5, 6], "", {})], [completions])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    for beta in (0.0, 0.1):
        config = grpo.Config(rollout=RolloutConfig(num_generations=4), mask_truncated_completions=True, beta=beta)
        (mb,) = grpo.build_microbatches(rollouts, advantages, config, Accelerator(cpu=True))
        assert mb.advantages.tolist() == [-1.0, -1.0]
        assert mb.batch.num_tokens == 2 + 2 * 2 and int(mb.batch.mask.sum()) == 4


def test_means_over_no_token_are_left_out(tmp_path):
    """Equal rewards in all groups: nothing is scored, so nothing is known of the policy's entropy."""
    rows = run(tmp_path / "run", "--max_steps", "1", "--reward_functions", "tests.loops.test_grpo:constant")
    assert rows[1]["tokens/scored"] == 0 and rows[1]["rollout/equal_groups"] == 1.0
    assert not [name for name in rows[1] if name.startswith("policy/")] and rows[1]["loss/policy"] == 0


def constant(*, completions, **_):
    return [1.0] * len(completions)


def test_a_reward_that_fails_step_after_step_ends_the_run(tmp_path, monkeypatch, capsys):
    """As on_non_finite: ten steps in a row; until then the step's line says how many rewards are missing."""
    flaky = ["--reward_functions", "tests.loops.test_grpo:fails_in_training", "--max_steps", "30"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"in each of the last 10 steps(.|\n)*the judge is down"):
            run(tmp_path / "run", *flaky)
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(rows) == 1 + 1 + 9  # the evaluation, one step with rewards, nine of ten without
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("step 5/30 ") and "reward/missing=8" in line for line in lines)
    assert not any(line.startswith("step 1/30 ") and "reward/missing" in line for line in lines)


def on_two_processes(folder):
    torch.set_num_threads(1)
    run(Path(folder) / "run", "--reward_functions", "tests.loops.test_grpo:fails_on_rank_1", "--max_steps", "1")


def fails_on_rank_1(*, completion_ids):
    if torch.distributed.get_rank() == 1:
        raise TimeoutError("the grader did not answer")
    return [float(ids[0] % 2) for ids in completion_ids]


def test_a_reward_that_fails_on_one_process_is_told_once(tmp_path):
    code = (
        "from accelerate import debug_launcher; from tests.loops.test_grpo import on_two_processes;"
        f"debug_launcher(on_two_processes, ({str(tmp_path)!r},), num_processes=2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HOUSE)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("UserWarning: a reward failed") == 1 and "the grader did not answer" in done.stderr
    (row,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()][1:]
    half = row["rollout/completions"] / 2
    assert row["reward/missing"] == row["reward/fails_on_rank_1/failed"] == half and 0 <= row["reward/mean"] <= 1


def test_one_step_with_rewards_starts_the_count_anew():
    guard = MissingRewards()
    for step in range(30):
        guard.check([1.0 if step % 10 == 0 else math.nan], None)
    with pytest.raises(RuntimeError, match="all 1 rewards are missing"):
        MissingRewards().check([math.nan], None)  # the run's first step


class Greedy:
    """Samples one token, and remembers what it was asked to do."""

    weight_version, is_off_policy = 0, True

    def __init__(self):
        self.log = []

    def sample(self, prompts, *, n, **_):
        self.log.append("sample")
        return [[Completion([1], [-1.0], "stop", "x", 0)] * n for _ in prompts]

    def sync(self, policy):
        self.log.append("sync")

    def sleep(self):
        self.log.append("sleep")


def test_an_evaluation_counts_and_shows_what_has_no_reward():
    """One of four is right, one wrong, one fails, one has no answer: 1/2 of those that have a reward, and 2 missing."""

    def half(*, completions, answer):
        return [None if one is None else float("nan") if one == "?" else float(one == "x") for one in answer]

    prompts = [Prompt([1], "", {"answer": answer}) for answer in ("x", "y", "?", None)]
    reward_fns = {"accuracy": RewardFn({"half": half}, [1.0])}
    settings = {"sampling": Sampling(), "accelerator": Accelerator(cpu=True)}
    with pytest.warns(UserWarning, match="returned nan for completion 2 of 4"):
        metrics = greedy_evaluation(Greedy(), prompts, reward_fns, **settings)
    assert metrics == {"eval/completion_length": 1.0, "eval/accuracy": 0.5, "eval/missing": 2.0}

    def broken(*, completions):
        raise TimeoutError("the grader did not answer")

    reward_fns = {"accuracy": RewardFn({"broken": broken}, [1.0])}
    with pytest.warns(UserWarning, match="the grader did not answer"):
        metrics = greedy_evaluation(Greedy(), prompts, reward_fns, **settings)
    assert metrics == {"eval/completion_length": 1.0, "eval/missing": 4.0}


def test_an_engine_sleeps_after_an_evaluation_between_two_updates_of_sft_and_dpo():
    """GRPO samples from the same weights next, and lets it sleep itself."""
    reward_fns = {"accuracy": RewardFn({"constant": constant}, [1.0])}
    for policy, asked in ((torch.nn.Linear(1, 1), ["sync", "sample", "sleep"]), (None, ["sample"])):
        engine = Greedy()
        settings = {"sampling": Sampling(), "accelerator": Accelerator(cpu=True), "policy": policy}
        greedy_evaluation(engine, [Prompt([1], "", {})], reward_fns, **settings)
        assert engine.log == asked


class Batch:
    """One row of tokens with their mask, as `check_sampler` reads a packed batch."""

    def __init__(self, count):
        self.mask, self.targets = torch.ones(1, count, dtype=torch.bool), torch.arange(count)

    def scatter(self, values):
        return values[None]


@pytest.mark.parametrize("count", [2, 400, 100_000])
def test_the_sampler_is_judged_by_its_tokens_and_not_by_the_worst_of_them(count):
    """bf16 has a heavy tail: one token that is 3 nats off is only reported, two in a hundred end the run, and so does
    one NaN."""
    check = partial(check_sampler, policy=torch.nn.Linear(1, 1), accelerator=Accelerator(cpu=True), limit=0.05)
    scored = torch.full((1, count), -1.0)
    off = scored.clone()
    off[0, count // 2] -= 3.0
    check([Microbatch(Batch(count), None, off, scored)])
    off[0, :: max(1, min(50, count // 2))] -= 3.0
    with pytest.raises(RuntimeError, match="further apart than 0.05"):
        check([Microbatch(Batch(count), None, off, scored)])
    off = scored.clone()
    off[0, 1] = torch.nan
    with pytest.raises(RuntimeError, match="not finite"):
        check([Microbatch(Batch(count), None, off, scored)])


class Stale(TransformersEngine):
    """Reports what other weights would have given."""

    def sample(self, prompts, **settings):
        groups = super().sample(prompts, **settings)
        return [[replace(one, logprobs=[p - 3 for p in one.logprobs]) for one in group] for group in groups]


def test_the_numbers_of_the_step_that_fails_the_comparison_are_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(rollout, "build_engine", lambda config, policy, tokenizer, **_: Stale(policy, tokenizer))
    with pytest.raises(RuntimeError, match="does not sample from the policy"):
        run(tmp_path / "run", "--max_steps", "2")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1] and rows[1]["policy/mismatch_max"] == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--reward_functions", "exact_answer"], "reward_functions: exact_answer needs the column answer and the rows"),
        (["--eval_reward", "exact_answer"], "eval_reward: exact_answer needs the column answer.*or set eval_reward"),
        (["--reward_functions", "tests.loops.test_grpo:later"], "reward_functions names later, which is async"),
        (["--reward_functions", "tests.loops.test_grpo:of_trl"], "of_trl needs the column trainer_state.*nothing"),
        (["--eval_reward", "exact"], "eval_reward names exact; known are"),
    ],
)
def test_what_a_reward_needs_is_checked_before_the_model_is_read(options, words, tmp_path):
    """Nothing was sampled or written, and only columns of the rows are named."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "p", "gold": "1"}) + "\n")
    data = ["--dataset_name", str(rows), "--eval_dataset_name", str(rows)]
    with pytest.raises(ValueError, match=words) as caught:
        run(tmp_path / "run", *data, *options)
    assert "completion_ids" not in str(caught.value) and not (tmp_path / "run").exists()


async def later(*, completions, **_):
    return [0.0 for _ in completions]


def of_trl(completions, trainer_state, **_):
    return [0.0 for _ in completions]


class AsyncJudge:
    async def __call__(self, *, completions):
        return [0.0 for _ in completions]


def by_position(completions, /):
    return [0.0 for _ in completions]


@pytest.mark.parametrize("name", ["async_judge", "by_position"])
def test_signatures_that_cannot_work_are_refused(name, monkeypatch):
    monkeypatch.setitem(globals(), "async_judge", AsyncJudge())
    from data.rewards import RewardConfig

    with pytest.raises(ValueError, match="async|by position"):
        build_reward_fn(RewardConfig(reward_functions=f"tests.loops.test_grpo:{name}"))


def test_the_table_of_completions_has_rewards_and_how_each_ended(tmp_path, capsys):
    two = ["--reward_functions", "tests.loops.test_grpo:even_lengths,length", "--log_completions_steps", "1"]
    run(tmp_path / "run", "--max_steps", "1", *two)
    rows = [json.loads(line) for line in (tmp_path / "run/completions.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    for row in rows:
        assert row["reward"] == pytest.approx(row["reward/even_lengths"] + row["reward/length"])
        assert row["finish_reason"] in ("stop", "length") and 1 <= row["tokens"] <= 4 and "advantage" in row


def test_an_evaluation_is_shown_once_and_never_as_a_negative_loss(tmp_path, capsys):
    """It stays in metrics.jsonl under its name, for save_best."""
    rows = run(tmp_path / "run", "--max_steps", "1", "--save_steps", "1", "--save_best", "eval/reward")
    shown = capsys.readouterr()
    assert rows[0]["eval/loss"] == -rows[0]["eval/reward"]
    text = shown.out + shown.err
    assert text.count("step 0") == 1 and "eval/loss" not in text and text.count("eval/reward") == 2


def with_an_alarm(*, completion_ids, **_):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # in the main thread only
    return even_lengths(completion_ids=completion_ids)


class Serving(TransformersEngine):
    """Stands for a server: it samples in the thread that asks, hands groups over, and its samples of step 2 (the one
    after the evaluation is step 0) come only when it is closed."""

    is_off_policy = True
    closed = None
    calls = 0

    def sample(self, prompts, *, arrived=None, **settings):
        self.calls += 1
        if self.closed is not None and self.calls == 4:
            assert self.closed.wait(30), "the rollout under way was not ended"
            raise RuntimeError("the engine was closed while it sampled")
        groups = super().sample(prompts, **settings)
        for place, group in enumerate(groups if arrived else ()):
            arrived(place, group)
        return groups

    def close(self):
        if self.closed is not None:
            self.closed.set()


def serve(monkeypatch, closed=None):
    def build(config, policy, tokenizer, **_):
        engine = Serving(policy, tokenizer)
        engine.closed = closed
        return engine

    monkeypatch.setattr(rollout, "build_engine", build)
    return ["--engine", "vllm-server", "--reward_functions", "tests.loops.test_grpo:with_an_alarm"]


@pytest.mark.parametrize("level", [0, 1])
def test_a_reward_with_an_alarm_works_in_a_run_at_every_level(level, tmp_path, monkeypatch):
    options = serve(monkeypatch)
    rows = run(tmp_path / "run", *options, "--async_level", str(level), "--max_steps", "3")
    assert [row["reward/missing"] for row in rows[1:]] == [0, 0, 0]


def test_an_error_in_a_step_ends_the_rollout_under_way(tmp_path, monkeypatch):
    """Python waits for the threads of a pool before anything else at its end: the run would hang."""
    options = serve(monkeypatch, closed=threading.Event())
    real = grpo.group_advantages

    def breaks(rewards, *others, **options):
        if len(rewards) == 8:  # of a step
            calls.append("step")
            if calls.count("step") == 2:
                raise KeyError("a mistake in the second step")
        return real(rewards, *others, **options)

    monkeypatch.setattr(grpo, "group_advantages", breaks)
    with pytest.raises(KeyError, match="second step"), one_sentence_errors("loops/grpo.py"):
        run(tmp_path / "run", *options, "--async_level", "1", "--max_steps", "5")
    for thread in threading.enumerate():
        if thread.name == "rollout":
            thread.join(30)
            assert not thread.is_alive()


def test_a_servers_groups_are_handed_over_in_the_callers_thread(monkeypatch):
    from loops.shared.rollout import vllm_server

    monkeypatch.setattr(vllm_server, "build_completions", lambda tokenizer, rows: rows)

    class Drawn(vllm_server.VllmServerEngine):
        def __init__(self):
            same = SimpleNamespace(check=lambda *_: None, sampling_parameters=lambda *_: None, tokenizer=None)
            self._has_weights, self._setup, self._servers, self.max_model_len = True, same, [None], 8
            self._config = RolloutConfig(engine="vllm-server")

        def _draw(self, prompt, parameters):
            return [threading.get_ident()]

    seen = {}
    settings = {"sampling": Sampling(), "seed": 0, "prompt_numbers": [0, 1, 2]}
    groups = Drawn().sample(
        [[1], [2], [3]], n=1, **settings, arrived=lambda place, group: seen.update({place: threading.get_ident()})
    )
    assert seen == dict.fromkeys(range(3), threading.get_ident())
    assert all(thread != threading.get_ident() for (thread,) in groups)


def test_killing_a_server_reaches_what_it_started_and_nothing_after_it_was_waited_for(tmp_path):
    """The server's own process has ended, its worker has not; once both are gone the number may be somebody else's."""
    from loops.shared.rollout.server import Server
    from loops.shared.rollout.weight_transfer import Transport

    server = Server(0, "http://127.0.0.1:1", Transport(), 1.0)
    assert not server.ended()
    command = f"sleep 600 & echo $! > {tmp_path}/worker"
    server.process = subprocess.Popen(["sh", "-c", command], start_new_session=True)
    while not server.ended():
        time.sleep(0.01)
    worker = int((tmp_path / "worker").read_text())
    os.kill(worker, 0)  # it lives
    server.kill()
    while (Path("/proc") / str(worker)).exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text():
        time.sleep(0.01)
    assert server.ended()
    other = subprocess.Popen(["sleep", "600"], start_new_session=True)
    server.process.pid = other.pid  # the number is somebody else's by now
    server.kill()
    assert other.poll() is None
    other.kill()
    other.wait()
