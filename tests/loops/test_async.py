"""Whole runs of GRPO whose rollouts come from a real vLLM server: what a resumed run goes on with, ahead or not."""

import importlib.util
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from configs.loader import load_config
from loops import grpo
from loops.shared import rollout
from loops.shared.checkpoint_files import read_extra
from loops.shared.rollout.weight_transfer import free_port

HOUSE = Path(__file__).resolve().parents[2]
SERVER = HOUSE / "launch/vllm_server.py"
STEPS = 4
PROMPTS, GENERATIONS = 4, 4

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """One server for all runs, as a user would start it."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    options = ["--model", str(HOUSE / "data/quickstart/model"), "--port", str(port), "--dtype", "float32"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, SERVER, *options], cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except (OSError, urllib.error.URLError):
                assert process.poll() is None, (folder / "log").read_text()[-2000:]
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(autouse=True)
def from_the_house(monkeypatch):
    monkeypatch.chdir(HOUSE)  # the shipped config names its files from there


class Taken:
    """Remembers what every step was trained on, and has sampled what is under way before it is recorded."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.steps: dict[int, list] = {}
        real_prefetch, real_save = rollout.prefetch, rollout.rollouts_to_save

        def prefetch(sample, steps, engine, *, depth, ready):
            self.depth, self.last = depth, steps[-1]
            coming = real_prefetch(sample, steps, engine, depth=depth, ready=ready)
            for step, rollouts in zip(steps, coming, strict=True):
                self.steps[step] = rollouts
                yield rollouts

        def rollouts_to_save(ready, engine):
            step = max(self.steps)
            while any(coming not in ready for coming in range(step + 1, min(step + self.depth, self.last) + 1)):
                time.sleep(0.01)
            return real_save(ready, engine)

        patch.setattr(rollout, "prefetch", prefetch)
        patch.setattr(rollout, "rollouts_to_save", rollouts_to_save)

    def tokens(self, step: int) -> list[list[int]]:
        return [one.completion.token_ids for one in self.steps[step]]


def run(folder: Path, url: str, *options: str) -> list[dict]:
    """GRPO on the quickstart in this process; the rows of metrics.jsonl."""
    AcceleratorState._reset_state(True)
    common = ["--config", "configs/grpo.yaml", "--output_dir", str(folder), "--engine", "vllm-server"]
    common += ["--server_urls", json.dumps([url]), "--max_steps", str(STEPS), "--max_completion_length", "24"]
    common += ["--per_device_train_batch_size", str(PROMPTS * GENERATIONS), "--num_generations", str(GENERATIONS)]
    common += ["--max_eval_samples", "4", "--learning_rate", "1e-3", "--warmup_steps", "0", "--save_steps", "2"]
    common += ["--log_completions_steps", "0", "--reward_functions", "tests.loops.test_async:share_of_even_tokens"]
    threads = torch.get_num_threads()
    grpo.main(load_config(grpo.Config, [*common, *options], prog="grpo"))
    torch.set_num_threads(threads)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def share_of_even_tokens(*, completion_ids, **_):
    """A reward that differs from completion to completion."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in load_file(folder / "model/model.safetensors").values()])


def halfway(folder: Path) -> Path:
    return next(folder.glob("checkpoints/*2"))


@pytest.fixture(scope="module")
def whole(url, tmp_path_factory):
    """Runs that nobody interrupted, by level: their folder and what each step was trained on."""
    runs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(HOUSE)
        for level in (0, 1):
            folder = tmp_path_factory.mktemp(f"level-{level}") / "run"
            patch.undo()
            patch.chdir(HOUSE)
            taken = Taken(patch)
            rows = run(folder, url, "--async_level", str(level))
            assert all(row["optim/grad_norm"] > 0 for row in rows[1:])
            runs[level] = (folder, rows, taken)
    return runs


def test_at_level_0_a_resumed_run_ends_in_the_same_bytes(whole, url, tmp_path):
    """Steps 0 and 1, a checkpoint, a new start, steps 2 and 3. The server gives the same tokens with the same
    log-probabilities to the last bit, although prompts reach it at other times: seeds belong to prompts."""
    folder, rows, _ = whole[0]
    again = run(tmp_path / "run", url, "--resume_from", str(halfway(folder)))
    assert torch.equal(weights(tmp_path / "run"), weights(folder))
    assert [row["loss/policy"] for row in again] == [row["loss/policy"] for row in rows[-len(again) :]]


def test_at_level_1_weights_are_at_most_one_version_old_and_tokens_are_weighted(whole):
    """Step s is trained by weights of version s + 1 (the first sync is version 1), and sampled from s or s + 1."""
    _, rows, taken = whole[1]
    versions = {step: {one.completion.weight_version for one in found} for step, found in taken.steps.items()}
    assert all(found <= {step, step + 1} for step, found in versions.items())
    assert {"policy/sampler_weight", "policy/mismatch_kl", "policy/sampler_capped"} <= rows[-1].keys()


def test_a_checkpoint_at_level_1_holds_what_waits_and_the_resumed_run_trains_on_it(whole, url, tmp_path, monkeypatch):
    """What was sampled for step 2 while step 1 trained is in the checkpoint after step 1. The run that goes on trains
    on it, token for token, though its server counts versions from 1 again; step 3 it samples itself."""
    folder, _, taken = whole[1]
    recorded = read_extra(halfway(folder), 0)["rollouts"]
    assert list(recorded) == [2] and len(recorded[2]) == PROMPTS * GENERATIONS
    assert [one["token_ids"] for one in recorded[2]] == taken.tokens(2)
    again = Taken(monkeypatch)
    rows = run(tmp_path / "run", url, "--async_level", "1", "--resume_from", str(halfway(folder)))
    assert [row["step"] for row in rows] == [3, 4]
    assert again.tokens(2) == taken.tokens(2) and set(again.steps) == {2, 3}
    logprobs = [[one.completion.logprobs for one in found.steps[2]] for found in (again, taken)]
    assert logprobs[0] == logprobs[1]


def test_at_level_1_the_first_step_is_compared_with_the_sampler(url, tmp_path, monkeypatch):
    """Its samples are of the weights that train on them; those of later steps are older, and not compared."""
    real, compared = rollout.check_sampler, []

    def check(microbatches, *others):
        compared.append(sum(int(mb.batch.mask.sum()) for mb in microbatches))
        real(microbatches, *others)

    monkeypatch.setattr(rollout, "check_sampler", check)
    rows = run(tmp_path / "run", url, "--async_level", "1", "--check_every", "1")
    assert compared == [rows[1]["tokens/scored"]] and rows[1]["rollout/lag"] == 0
    assert all(row["rollout/lag"] <= 1 and row["rollout/completions"] == PROMPTS * GENERATIONS for row in rows[1:])
