"""Whole SageMaker jobs on this machine: the SDK's request, its own entry point as PID 1, quickstart GRPO on two ranks.

The jobs share one setting of eight steps, so that their weights can be compared.
"""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch import local_job as local

REASON = local.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"{REASON}")

HOUSE = Path(__file__).resolve().parents[2]
STEPS = 8
KEYS = {"max_steps": STEPS, "per_device_train_batch_size": 32, "max_eval_samples": 16, "log_completions_steps": 0}
PATIENCE = 200  # seconds for one job on a busy machine; about 20 on an idle one


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("jobs")


def capture(folder: Path, *, hosts=1, requirements="none", input_data=None, include=(), **keys) -> local.Captured:
    from launch.sagemaker.settings import Settings

    return local.capture(
        folder,
        HOUSE / "configs/grpo.yaml",
        hyperparameters=KEYS | keys,
        input_data=input_data,
        compute={"instance_type": "ml.m5.xlarge", "instance_count": hosts},
        settings=Settings(requirements=requirements, include=include),
    )


def weights_hash(ml: Path) -> str:
    return hashlib.sha256((ml / "model/model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(folder):
    """The uninterrupted job: rows and model from channels, and pip over its requirements where they are met here."""
    shipped = HOUSE / "data/quickstart"
    few = folder / "few.jsonl"
    few.write_text("".join((shipped / "heldout.jsonl").read_text().splitlines(keepends=True)[:3]))
    channels = {"training": shipped / "train.jsonl", "validation": shipped / "heldout.jsonl", "inference_testing": few}
    channels = {name: str(path) for name, path in {**channels, "models": shipped / "model"}.items()}
    listed = ["install", "--dry-run", "--no-index", "--quiet", "-r", str(HOUSE / "launch/sagemaker/requirements.txt")]
    met = subprocess.run([sys.executable, "-m", "pip", *listed], capture_output=True).returncode == 0
    captured = capture(folder / "whole-channels", requirements=None if met else "none", input_data=channels)
    with local.LocalJob(captured, folder / "whole", processes=2) as job:
        assert job.wait(PATIENCE) == [0], job.hosts[0].log[-3000:]
    return job.hosts[0]


@pytest.fixture(scope="module")
def stopped(folder):
    """The same job, sent SIGTERM after step 2; it saves at no other time. Seconds from the signal to its end."""
    captured = capture(folder / "stopped-channels")
    with local.LocalJob(captured, folder / "stopped", processes=2) as job:
        job.wait_for_step(2, PATIENCE)
        job.terminate()
        began = time.monotonic()
        codes = job.wait(60)
    return captured, job.hosts[0], codes, time.monotonic() - began


def test_a_job_trains_on_two_processes_and_leaves_a_model_that_loads(whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert "exec /" in whole.log and "-m launch.sagemaker.entry -- loops/grpo.py" in whole.log  # the SDK's script did
    assert "not PID 1" not in whole.log
    rows = [json.loads(row) for row in (whole.ml / "output/data/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS + 1)) and "eval/accuracy" in rows[-1]
    assert json.loads((whole.ml / "output/data/provenance.json").read_text())["processes"] == 2
    predictions = (whole.ml / "output/data/inference_testing/predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 3 and all("completion" in json.loads(row) for row in predictions)
    assert "dataset_name: /opt/ml/input/data/training/train.jsonl" in (whole.ml / "output/data/config.yaml").read_text()
    model = AutoModelForCausalLM.from_pretrained(whole.ml / "model")
    assert all(tensor.isfinite().all() for tensor in model.parameters())
    assert AutoTokenizer.from_pretrained(whole.ml / "model").chat_template
    assert not (whole.ml / "output/failure").exists()


def test_sigterm_to_pid_1_ends_the_job_with_a_whole_checkpoint_in_time(stopped):
    from loops.shared.checkpoint_files import find_checkpoint, read_state

    _, host, codes, seconds = stopped
    print(f"SIGTERM to PID 1 -> exit: {seconds:.1f} s")
    assert codes == [143] and seconds < 20, host.log[-3000:]
    checkpoint = find_checkpoint(host.ml / "checkpoints", "latest")
    assert checkpoint is not None, host.log[-3000:]
    assert 2 <= read_state(checkpoint)["step"] < STEPS
    assert not list((host.ml / "model").iterdir()) and not (host.ml / "output/failure").exists()


def test_a_new_job_goes_on_from_it_to_the_same_bytes(stopped, whole, folder):
    captured, before, _, _ = stopped
    with local.LocalJob(captured, folder / "resumed", processes=2, checkpoints=before.ml / "checkpoints") as job:
        assert job.wait(PATIENCE) == [0], job.hosts[0].log[-3000:]
    host = job.hosts[0]
    assert "resuming from /opt/ml/checkpoints/checkpoints/" in host.log
    rows = [json.loads(row)["step"] for row in (host.ml / "checkpoints/metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(STEPS + 1))
    assert weights_hash(host.ml) == weights_hash(whole.ml)


def test_two_hosts_train_the_weights_of_one_with_two_processes(whole, folder):
    captured = capture(folder / "two-channels", hosts=2)
    with local.LocalJob(captured, folder / "two", processes=1) as job:
        assert job.wait(PATIENCE) == [0, 0], "\n".join(host.log[-3000:] for host in job.hosts)
    first, second = job.hosts
    assert "--num_machines 2 --machine_rank 1 --num_processes 2" in second.log
    assert "--main_process_ip algo-1" in second.log
    assert weights_hash(first.ml) == weights_hash(whole.ml)
    assert not list((second.ml / "model").iterdir())  # one host uploads the model


def test_a_failing_reward_ends_with_its_own_traceback_in_the_failure_file(folder):
    own = folder / "own_reward.py"
    own.write_text("def count(*, completions):\n    return [1 / (len(text) * 0) for text in completions]\n")
    captured = capture(folder / "failing-channels", include=[str(own)], reward_functions="own_reward:count")
    with local.LocalJob(captured, folder / "failing", processes=1) as job:
        assert job.wait(PATIENCE) == [1], job.hosts[0].log[-3000:]
    failure = (job.hosts[0].ml / "output/failure").read_text()
    assert failure.startswith("rank 0 of 1 on algo-1: RuntimeError: all ") and len(failure) <= 1024
    assert 'own_reward.py", line 2, in ' in failure and "ZeroDivisionError: division by zero" in failure
    assert "own_reward.py" in job.hosts[0].log
