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
from loops.shared.rollout.ahead import Ahead
from safetensors.torch import load_file

from configs.loader import load_config
from loops import grpo
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


class Settled(Ahead):
    """Has sampled what is under way before it is recorded, and remembers what every step was trained on."""

    taken: dict[int, list] = {}

    def take(self, step):
        share = super().take(step)
        Settled.taken[step] = share.groups
        return share

    def record(self):
        for coming in self._coming.values():
            coming.result()
        return super().record()


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


def tokens(groups) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in groups]


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
        patch.setattr(grpo, "Ahead", Settled)
        for level in (0, 1):
            folder = tmp_path_factory.mktemp(f"level-{level}") / "run"
            Settled.taken = {}
            rows = run(folder, url, "--async_level", str(level))
            assert all(row["optim/grad_norm"] > 0 for row in rows[1:])
            runs[level] = (folder, rows, Settled.taken)
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
    versions = {step: {one.weight_version for group in groups for one in group} for step, groups in taken.items()}
    assert all(found <= {step, step + 1} for step, found in versions.items())
    assert {"policy/sampler_weight", "policy/mismatch_kl", "policy/sampler_capped"} <= rows[-1].keys()


def test_a_checkpoint_at_level_1_holds_what_waits_and_the_resumed_run_trains_on_it(whole, url, tmp_path, monkeypatch):
    """What was sampled for step 2 while step 1 trained is in the checkpoint after step 1. The run that goes on trains
    on it, token for token, though its server counts versions from 1 again; step 3 it samples itself."""
    folder, _, taken = whole[1]
    recorded = read_extra(halfway(folder), 0)["rollouts"]
    assert list(recorded) == [2] and len(recorded[2]) == PROMPTS
    assert [[one["token_ids"] for one in group] for group in recorded[2]] == tokens(taken[2])
    monkeypatch.setattr(grpo, "Ahead", Settled)
    Settled.taken = {}
    rows = run(tmp_path / "run", url, "--async_level", "1", "--resume_from", str(halfway(folder)))
    assert [row["step"] for row in rows] == [3, 4]
    assert tokens(Settled.taken[2]) == tokens(taken[2]) and set(Settled.taken) == {2, 3}
    assert [one.logprobs for one in Settled.taken[2][0]] == [one.logprobs for one in taken[2][0]]


def test_at_level_1_the_first_step_is_compared_with_the_sampler(url, tmp_path, monkeypatch):
    """Its samples are of the weights that train on them; those of later steps are older, and not compared."""
    real, compared = grpo.check_sampler, []

    def check(microbatches, scored, *others):
        compared.append(sum(int(batch.mask.sum()) for batch, _, _ in microbatches))
        real(microbatches, scored, *others)

    monkeypatch.setattr(grpo, "check_sampler", check)
    rows = run(tmp_path / "run", url, "--async_level", "1", "--check_every", "1")
    assert compared == [rows[1]["tokens/scored"]] and rows[1]["rollout/lag"] == 0
    assert all(row["rollout/lag"] <= 1 and row["rollout/completions"] == PROMPTS * GENERATIONS for row in rows[1:])
