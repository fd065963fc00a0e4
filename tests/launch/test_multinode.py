"""Two machines train as one: two network namespaces, joined by a cable, with one `accelerate launch` in each.

Needs root and the `ip` command (namespaces are made and removed here); skipped where they are not to be had.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parents[2]
SHORT = ["--config", "configs/sft.yaml", "--max_steps", "3", "--per_device_train_batch_size", "4"]
SHORT += ["--max_eval_samples", "4", "--eval_reward", "null", "--max_completion_length", "4"]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
WIRE = "node0"  # the interface that both machines have; gloo is told its name


def ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def machines():
    """Names of two namespaces, reachable from each other as ADDRESSES and from nowhere else."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("two machines are made with `ip netns`, which needs root and iproute2")
    names = [f"plumbline{os.getpid()}{letter}" for letter in "ab"]
    made = ip("netns", "add", names[0])
    if made.returncode:
        pytest.skip(f"this machine allows no network namespaces: {made.stderr.strip()}")
    try:
        ends = [f"pl{os.getpid() % 10**8}{letter}" for letter in "ab"]  # names of interfaces have 15 letters at most
        assert ip("netns", "add", names[1]).returncode == 0
        wired = ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        if wired.returncode:
            pytest.skip(f"this machine allows no veth pairs: {wired.stderr.strip()}")
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            for words in (
                ("link", "set", end, "netns", name),
                ("-n", name, "link", "set", end, "name", WIRE),
                ("-n", name, "addr", "add", f"{address}/24", "dev", WIRE),
                ("-n", name, "link", "set", "lo", "up"),
                ("-n", name, "link", "set", WIRE, "up"),
            ):
                done = ip(*words)
                assert done.returncode == 0, done.stderr
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)  # takes its end of the cable with it


def launch(log: Path, *words: str, machine: str | None = None) -> subprocess.Popen:
    """Start `accelerate launch`, in a namespace where one is named."""
    inside = ["ip", "netns", "exec", machine] if machine else []
    command = [*inside, sys.executable, "-m", "accelerate.commands.launch", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": WIRE if machine else "lo"}
    with log.open("w") as out:
        return subprocess.Popen(
            command, cwd=HOUSE, env=environment, stdout=out, stderr=out, start_new_session=True, text=True
        )


def finish(processes: list[subprocess.Popen], logs: list[Path]) -> None:
    """Wait for all; kill what is left, with its children, when one fails or pytest's time is up."""
    try:
        while any(process.poll() is None for process in processes):
            assert not any(process.poll() for process in processes), read(logs)
            time.sleep(0.1)
        assert not any(process.returncode for process in processes), read(logs)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, 9)  # the launcher and its ranks are one session
                process.wait()


def read(logs: list[Path]) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["cpu_ddp", "cpu_fsdp2"])
def test_two_machines_train_like_two_processes_on_one(machines, tmp_path, topology):
    """The same launch file; `--num_machines 2` and the address of the first machine are all that differs. The same
    bytes: two ranks add two gradients, whose order does not matter, whatever network lies between them."""
    file = HOUSE / "launch" / f"{topology}.yaml"
    logs = [tmp_path / f"machine{rank}.log" for rank in range(2)]
    two = [
        launch(
            logs[rank], "--config_file", str(file), "--num_machines", "2", "--num_processes", "2",
            "--machine_rank", str(rank), "--main_process_ip", ADDRESSES[0], "--main_process_port", "29500",
            "loops/sft.py", *SHORT, "--output_dir", str(tmp_path / "two"), machine=name,
        )
        for rank, name in enumerate(machines)
    ]  # fmt: skip
    finish(two, logs)
    log = tmp_path / "one.log"
    one = ["--config_file", str(file)]
    finish([launch(log, *one, "loops/sft.py", *SHORT, "--output_dir", str(tmp_path / "one"))], [log])

    weights, losses = [], []
    for name in ("one", "two"):
        assert json.loads((tmp_path / name / "provenance.json").read_text())["processes"] == 2
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss/sft"] for row in rows if "loss/sft" in row])
        weights.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
    assert len(losses[0]) == 3 and losses[0][0] != losses[0][2]
    assert losses[0] == losses[1]
    assert weights[0] == weights[1]
