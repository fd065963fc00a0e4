"""What a SageMaker training job runs: from the container's files to `accelerate launch`, and back to SageMaker.

    exec $SM_PYTHON_CMD -m launch.sagemaker.entry [accelerate's options] -- loops/grpo.py --config configs/grpo.yaml

`exec` makes this the container's PID 1, the only process that SageMaker sends SIGTERM to. Standard library only; it
reads resourceconfig.json and hyperparameters.json, which both the SDK v3 and the older toolkit have, and the SM_...
variables where a file is missing. As a toolkit's entry point (no `--`), the hyperparameter `loop` names the loop.

Environment of the job: PLUMBLINE_PROCESSES (processes of one host, where it is not one a GPU), PLUMBLINE_WANDB_SECRET
and PLUMBLINE_HF_SECRET (names in Secrets Manager; the values go into the ranks' environment and nowhere else).

Exit codes: 0 trained to the end; 143 stopped by SIGTERM; else as the launcher's.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started by its path, as the toolkit does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.sagemaker.folders import JobFolders, find_folders, loop_words, read_literal
from launch.sagemaker.rank import write_failure

MASTER_PORT = 7777
# The Torchrun driver's lists, with p5en and p6, which it does not have yet.
EFA_RDMA_INSTANCES = {
    *("ml.p4d.24xlarge", "ml.p4de.24xlarge", "ml.p5.48xlarge", "ml.p5e.48xlarge", "ml.trn1.32xlarge"),
    *("ml.p5en.48xlarge", "ml.p6-b200.48xlarge", "ml.p6-b300.48xlarge", "ml.p6e-gb200.36xlarge"),
}
EFA_INSTANCES = EFA_RDMA_INSTANCES | {*("ml.g4dn.8xlarge", "ml.g4dn.12xlarge", "ml.g5.48xlarge", "ml.p3dn.24xlarge")}
STOPPED = 143  # 128 + SIGTERM
SHUTDOWN_SECONDS = 100  # of the 120 that SageMaker gives; the launcher's own default would kill the ranks after 30
SECRETS = {"WANDB_API_KEY": "PLUMBLINE_WANDB_SECRET", "HF_TOKEN": "PLUMBLINE_HF_SECRET"}
READ_SECRET = (
    "import boto3, sys\n"
    "client = boto3.client('secretsmanager', region_name=sys.argv[2] or None)\n"
    "sys.stdout.write(client.get_secret_value(SecretId=sys.argv[1])['SecretString'])\n"
)
# Where the launcher's own report begins on standard error, and its word for how a rank ended.
LAUNCHERS_OWN = re.compile(
    r"^[EW]\d{4} \S+ \d+ torch/distributed/elastic"
    r'|^Traceback \(most recent call last\):\n(?:  .*\n)*?  File "\S*accelerate/commands/launch\.py"',
    re.MULTILINE,
)
RANK_ENDED = re.compile(r"failed \(exitcode: [-\d]+\) local_rank: \d+|died with <Signals\.\w+: \d+>")


@dataclass(frozen=True)
class Cluster:
    """The job's hosts, and this one among them."""

    hosts: tuple[str, ...]  # in lexical order: algo-1, algo-10, algo-11, algo-2
    current: str
    interface: str
    instance_type: str
    processes: int  # of one host

    @property
    def rank(self) -> int:
        """Place of this host; never the number in its name."""
        return self.hosts.index(self.current)

    @property
    def total(self) -> int:
        """Processes of all hosts."""
        return len(self.hosts) * self.processes


def read_cluster(folders: JobFolders, environment: Mapping[str, str]) -> Cluster:
    """From resourceconfig.json, else from SM_HOSTS and SM_CURRENT_HOST, else this machine alone."""
    found = folders.read("resourceconfig") or {
        "hosts": json.loads(environment.get("SM_HOSTS", '["localhost"]')),
        "current_host": environment.get("SM_CURRENT_HOST", "localhost"),
        "current_instance_type": environment.get("SM_CURRENT_INSTANCE_TYPE", ""),
        "network_interface_name": environment.get("SM_NETWORK_INTERFACE_NAME", "eth0"),
    }
    return Cluster(
        hosts=tuple(sorted(found["hosts"])),
        current=found["current_host"],
        interface=found.get("network_interface_name") or "eth0",
        instance_type=found.get("current_instance_type", ""),
        processes=count_processes(environment),
    )


def count_processes(environment: Mapping[str, str]) -> int:
    """PLUMBLINE_PROCESSES, else one a GPU (SM_NUM_GPUS, or what nvidia-smi lists), else one.

    Raises ValueError where PLUMBLINE_PROCESSES is no number above 0.
    """
    asked = environment.get("PLUMBLINE_PROCESSES")
    if asked is not None:
        if not asked.isdecimal() or int(asked) == 0:
            raise ValueError(f"PLUMBLINE_PROCESSES is {asked!r}: give the number of processes of one host, 1 or more.")
        return int(asked)
    if "SM_NUM_GPUS" in environment:
        return int(environment["SM_NUM_GPUS"]) or 1
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    except OSError:
        return 1
    return sum(line.startswith("GPU ") for line in listed.splitlines()) or 1


def launch_command(cluster: Cluster, options: list[str], module: list[str]) -> list[str]:
    """The launcher's line for this host: `options` are the caller's own for `accelerate launch`, `module` is the module
    that each rank runs, with its arguments."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--num_machines", str(len(cluster.hosts)), "--machine_rank", str(cluster.rank)]
    command += ["--num_processes", str(cluster.total), "--main_process_port", str(MASTER_PORT)]
    if len(cluster.hosts) > 1:
        command += ["--main_process_ip", cluster.hosts[0]]
    if not any(word.partition("=")[0] == "--config_file" for word in options):
        command += ["--multi_gpu"] if cluster.total > 1 else []  # also on CPUs: the launcher's word for several
        command += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # the loop decides; this only quietens
    return [*command, *options, "--module", *module]


def rank_environment(cluster: Cluster, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of the launcher and its ranks. What the job's own environment says is kept."""
    settings = {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS),
        "PYTHONUNBUFFERED": "1",
        "SM_CURRENT_HOST": cluster.current,
        "NCCL_SOCKET_IFNAME": cluster.interface,
        "NCCL_PROTO": "simple",
    }
    if len(cluster.hosts) > 1:
        settings["GLOO_SOCKET_IFNAME"] = cluster.interface
    if cluster.instance_type in EFA_INSTANCES:
        settings["FI_PROVIDER"] = "efa"
    if cluster.instance_type in EFA_RDMA_INSTANCES:
        settings |= {"FI_EFA_USE_DEVICE_RDMA": "1", "RDMAV_FORK_SAFE": "1"}
    paths = [os.getcwd(), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    return settings | dict(environment) | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def read_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The values of the secrets whose names the job's environment has; a secret is text, or JSON with that one key.

    Raises ValueError, without any value in it, where one cannot be read.
    """
    found = {}
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION", "")
    for name, variable in SECRETS.items():
        if variable not in environment or name in environment:
            continue
        done = subprocess.run(
            [sys.executable, "-c", READ_SECRET, environment[variable], region], capture_output=True, text=True
        )
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1]
            raise ValueError(f"{variable} names the secret {environment[variable]}, which cannot be read: {reason}")
        value = read_literal(done.stdout)
        if isinstance(value, dict):
            if name not in value:
                raise ValueError(f"the secret {environment[variable]} is JSON without the key {name}.")
            value = value[name]
        else:
            value = done.stdout
        found[name] = str(value).strip()
    return found


@dataclass
class Outcome:
    """How the launcher ended."""

    code: int
    signals: int  # SIGTERMs and SIGINTs that came meanwhile
    tail: str  # end of its standard error


def run_launcher(command: list[str], environment: dict[str, str], *, several: bool) -> Outcome:
    """Start the launcher, forward signals to its ranks, wait.

    Each rank must get the first signal once: a second one makes it quit without a checkpoint. torch's agent, which
    starts several ranks, forwards it and waits; the launcher of a single rank does not, so it is sent to the rank.
    """
    signals: list[int] = []
    launcher: subprocess.Popen | None = None

    def forward(number: int, _frame: Any) -> None:
        signals.append(number)
        log(f"{signal.Signals(number).name}: asking the ranks for a checkpoint" if len(signals) == 1 else "quitting")
        if launcher is not None:
            ranks = children_of(launcher.pid) if len(signals) > 1 or not several else []
            for process in ranks or [launcher.pid]:
                try:
                    os.kill(process, signal.SIGTERM)
                except ProcessLookupError:
                    continue

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    launcher = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    tail = bytearray()

    def pass_on() -> None:
        assert launcher.stderr is not None
        while chunk := os.read(launcher.stderr.fileno(), 1 << 16):
            sys.stderr.buffer.write(chunk)
            sys.stderr.buffer.flush()
            tail.extend(chunk)
            del tail[: -(1 << 14)]

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    if signals:
        launcher.terminate()  # a signal came before the launcher was there
    code = launcher.wait()
    reader.join(5)  # a grandchild that is still there may hold the pipe open
    return Outcome(code if code >= 0 else 128 - code, len(signals), tail.decode(errors="replace"))


def last_lines(tail: str) -> str:
    """How a rank ended that left no error: the launcher's word for it, then the ranks' last lines.

    The launcher's traceback and table are left out: they say nothing more and take all the room.
    """
    own = LAUNCHERS_OWN.search(tail)
    ended = RANK_ENDED.search(tail)
    how = f"({ended[0]}) " if ended else ""
    if ended and re.search("-9|SIGKILL", ended[0]):
        how = "(killed with SIGKILL: often the machine was out of memory) "
    ranks = (tail[: own.start()] if own else tail).strip()
    return f"{how}the last lines were:\n{ranks[-600:]}" if ranks else how.strip()


def children_of(parent: int) -> list[int]:
    """Process ids of a process's children."""
    try:
        return [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except OSError:
        return []  # it has ended


def keep_results(run: Path, folders: JobFolders) -> None:
    """Copy what a run wrote, all but weights, to the output folder, which SageMaker uploads of a failed job too."""
    weights = shutil.ignore_patterns("checkpoints", "model", "reference_*", "*.sagemaker-*")
    if run.is_dir():
        shutil.copytree(
            run,
            folders.output,
            ignore=lambda folder, names: weights(folder, names) if Path(folder) == run else [],
            dirs_exist_ok=True,
        )


def move_model(run: Path, folders: JobFolders) -> bool:
    """Move the exported model to the folder that SageMaker uploads; False where this host has none."""
    model = run / "model"
    if not model.is_dir():
        return False
    folders.model.mkdir(parents=True, exist_ok=True)
    for item in model.iterdir():
        target = folders.model / item.name
        if target.is_dir():
            shutil.rmtree(target)
        shutil.move(str(item), target)
    model.rmdir()
    return True


def run_inference_tests(
    cluster: Cluster, options: list[str], run: Path, folders: JobFolders, environment: dict[str, str]
) -> None:
    """Completions and scores for the rows of the channel `inference_testing`, into a folder of that name in the output.

    On the host that has the model, by all its processes. A failure is logged and ends nothing: the job has its model.
    """
    rows = folders.channel("inference_testing")
    if rows is None or not (run / "model").is_dir():
        return
    alone = replace(cluster, hosts=(cluster.current,))
    output = folders.output / "inference_testing"
    words = ["launch.evaluate", str(run), "--dataset_name", str(rows), "--output", str(output)]
    command = launch_command(alone, options, words)
    log(shlex.join(["accelerate", "launch", *command[3:]]))
    outcome = run_launcher(command, environment, several=alone.total > 1)
    if outcome.code:
        log(f"the inference tests ended with exit code {outcome.code}; the model does not depend on them")


def log(text: str) -> None:
    print(f"entry: {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    folders = find_folders()
    try:
        hyperparameters = folders.read("hyperparameters") or json.loads(os.environ.get("SM_HPS", "{}"))
        options: list[str] = []
        if "--" in words:
            options, (script, *words) = words[: words.index("--")], words[words.index("--") + 1 :]
        else:  # the toolkit passes the hyperparameters as arguments too
            script, words = read_literal(hyperparameters.pop("loop", "")), []
            if not script:
                raise ValueError("nothing to run: write `-- loops/grpo.py ...`, or give the hyperparameter `loop`.")
        hyperparameters.pop("loop", None)
        cluster = read_cluster(folders, os.environ)
        arguments = loop_words(words, hyperparameters, folders, loop=Path(script).stem, log=log)
        environment = rank_environment(cluster, os.environ) | read_secrets(os.environ)
    except ValueError as error:
        log(f"error: {error}")
        write_failure(str(error), folders.failure)
        return 2
    if os.getpid() != 1 and "TRAINING_JOB_NAME" in os.environ:
        log("this is not PID 1, so SageMaker's SIGTERM will not come here: begin the job's command with `exec`")
    run = Path([word for word in arguments if word.startswith("--output_dir=")][-1].partition("=")[2])
    command = launch_command(cluster, options, ["launch.sagemaker.rank", script, *arguments])
    if len(cluster.hosts) > 1 and run.is_relative_to(folders.checkpoints):
        log("several hosts: to save and resume, give output_dir on storage that all share, such as a channel from FSx")
    log(f"{cluster.current}, host {cluster.rank + 1} of {len(cluster.hosts)}, {cluster.processes} process(es) each")
    log(shlex.join(["accelerate", "launch", *command[3:]]))

    began = time.monotonic()
    outcome = run_launcher(command, environment, several=cluster.total > 1)
    seconds = time.monotonic() - began
    keep_results(run, folders)
    if outcome.code == 0 and not outcome.signals:
        run_inference_tests(cluster, options, run, folders, environment)
    if outcome.code == 0 and move_model(run, folders):
        log(f"model moved to {folders.model} after {seconds:.0f} s")
        return 0
    if outcome.signals:
        log(f"stopped by a signal after {seconds:.0f} s; the next job with these checkpoints goes on from there")
        return STOPPED
    if outcome.code == 0 and cluster.rank == 0:  # the other hosts have no model
        text = f"{script} ended with exit code 0 and left no model in {run / 'model'}; {last_lines(outcome.tail)}"
        write_failure(text, folders.failure)
        log(f"failed after {seconds:.0f} s: {text.splitlines()[0]}")
        return 1
    if outcome.code:
        text = f"{script} ended with exit code {outcome.code} and no error of its own; {last_lines(outcome.tail)}"
        write_failure(text, folders.failure)
        log(f"failed with exit code {outcome.code} after {seconds:.0f} s; the first error is in {folders.failure}")
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
