"""A SageMaker training job on this machine, without AWS or docker: the real request, the job's own entry point.

The request is what `launch.sagemaker.submit` sends, taken from the SDK in front of moto's S3, in this process. Its
channels, source and drivers are laid out as /opt/ml in a private mount, PID, host name and network namespace, and the
container's entry point runs there unmodified, as PID 1; several hosts are joined by a veth pair. Needs Linux, root, the
SDK and moto (`pip install -e '.[sagemaker]' 'moto[s3,sts,iam,sagemaker]'`), and everything in the job's requirements.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.sagemaker.entry import children_of

REGION, ACCOUNT = "us-east-1", "123456789012"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/local"
NETWORK = "10.77.0"
# One host: the container's view of the disk, its name, its network; then nothing but the job's own command.
HOST_SCRIPT = """
set -e
mount --bind "$1/ml" /opt/ml
mount --bind "$1/hosts" /etc/hosts
hostname "$2"
cd /
ip link set lo up
touch "$1/ready"
until [ -e "$1/go" ]; do sleep 0.02; done
exec env -i "$3" -c 'import json, sys, os
job = json.load(open(sys.argv[1]))
os.execvpe(job["command"][0], job["command"], job["environment"])' "$1/job.json"
"""


def why_not() -> str | None:
    """Why a job cannot run here, None where it can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs root on Linux, for private namespaces"
    for program in ("unshare", "nsenter", "ip", "hostname"):
        if shutil.which(program) is None:
            return f"needs the program {program} (util-linux, iproute2, hostname)"
    for package in ("sagemaker", "moto"):
        if importlib.util.find_spec(package) is None:
            return f"needs {package}: pip install -e '.[sagemaker]' 'moto[s3,sts,iam,sagemaker]'"
    probe = subprocess.run(["unshare", "--mount", "--uts", "--pid", "--net", "--fork", "true"], capture_output=True)
    return None if probe.returncode == 0 else f"needs namespaces: {probe.stderr.decode().strip()}"


@contextlib.contextmanager
def pretended_aws() -> Iterator[Any]:
    """moto in this process: a boto3 session whose services are in memory, with made-up credentials."""
    made_up = {"AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local", "AWS_EC2_METADATA_DISABLED": "true"}
    made_up |= {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    made_up |= {"AWS_DEFAULT_REGION": REGION, "AWS_REGION": REGION, "SAGEMAKER_VALIDATE_ROLE": "false"}
    before = {name: os.environ.pop(name, None) for name in (*made_up, "AWS_ENDPOINT_URL", "AWS_PROFILE")}
    os.environ.update(made_up)
    try:
        import boto3
        from moto import mock_aws

        with mock_aws():
            trust = json.dumps({"Version": "2012-10-17", "Statement": []})
            boto3.client("iam").create_role(RoleName="local", AssumeRolePolicyDocument=trust)
            session = boto3.Session(region_name=REGION)
            session.client("s3").create_bucket(Bucket=f"sagemaker-{REGION}-{ACCOUNT}")  # the SDK's default
            yield session
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({name: value} if value is not None else {})


@dataclass(frozen=True)
class Captured:
    """A job that was submitted to nobody."""

    request: dict[str, Any]
    """What CreateTrainingJob was given."""
    channels: Path
    """Folder with one folder a channel, `code` and `sm_drivers` among them, as they arrived in S3."""


def capture(folder: Path, config: str | Path | Sequence[str | Path], **options: Any) -> Captured:
    """Submit a job to moto and fetch its channels from there; `options` are those of `launch.sagemaker.submit.submit`.

    Raises ValueError where submit does.
    """
    from launch.sagemaker.account import Account
    from launch.sagemaker.submit import submit

    with pretended_aws() as session:
        job = submit(config, account=Account(ROLE, REGION, session), **options)
        store = session.client("s3")
        for channel in job.request["InputDataConfig"]:
            bucket, _, prefix = channel["DataSource"]["S3DataSource"]["S3Uri"].removeprefix("s3://").partition("/")
            target = folder / channel["ChannelName"]
            target.mkdir(parents=True)
            for page in store.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
                for item in page.get("Contents", []):
                    path = target / (item["Key"].removeprefix(prefix).lstrip("/") or Path(item["Key"]).name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    store.download_file(bucket, item["Key"], str(path))
    return Captured(job.request, folder)


@dataclass
class Host:
    """One machine of a job; `folder/ml` is its /opt/ml."""

    name: str
    folder: Path
    process: subprocess.Popen | None = None

    @property
    def ml(self) -> Path:
        return self.folder / "ml"

    @property
    def log(self) -> str:
        """What the container has written so far."""
        return (self.folder / "log").read_text(errors="replace")


@dataclass
class LocalJob:
    """A captured job on one or several hosts of this machine; use it in a `with`, so that nothing outlives it."""

    captured: Captured
    folder: Path
    processes: int
    """Of one host."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Further variables, as a container image would set them."""
    checkpoints: Path | None = None
    """What S3 has under the job's checkpoint prefix: copied to every host before the start, as SageMaker does."""
    hosts: list[Host] = field(default_factory=list)

    def __enter__(self) -> LocalJob:
        names = [f"algo-{n + 1}" for n in range(self.captured.request["ResourceConfig"]["InstanceCount"])]
        self.hosts = [Host(name, self.folder / name) for name in names]
        for host in self.hosts:
            self._lay_out(host, names)
        Path("/opt/ml").mkdir(parents=True, exist_ok=True)  # the place to mount on; it stays empty
        try:
            for host in self.hosts:
                self._start(host)
            if len(self.hosts) > 1:
                self._connect()
            for host in self.hosts:
                (host.folder / "go").touch()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait(self, seconds: float) -> list[int]:
        """Exit codes of the hosts' PID 1. Raises TimeoutError, with the ends of the logs, when it takes longer."""
        deadline = time.monotonic() + seconds
        try:
            return [host.process.wait(max(0.0, deadline - time.monotonic())) for host in self.hosts if host.process]
        except subprocess.TimeoutExpired:
            logs = "\n".join(f"{host.name}:\n{host.log[-3000:]}" for host in self.hosts)
            raise TimeoutError(f"the job has not ended after {seconds:.0f} s\n{logs}") from None

    def wait_for_step(self, step: int, seconds: float) -> None:
        """Until the run has logged a step. Raises TimeoutError where it ends before, or takes longer."""
        deadline = time.monotonic() + seconds
        rows = self.hosts[0].ml / "checkpoints/metrics.jsonl"
        while not rows.exists() or not any(json.loads(row)["step"] >= step for row in _whole_lines(rows)):
            ended = [host for host in self.hosts if host.process is None or host.process.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise TimeoutError(f"the job has not reached step {step}\n{(ended or self.hosts)[0].log[-3000:]}")
            time.sleep(0.05)

    def terminate(self) -> None:
        """SIGTERM to PID 1 of every container and to nothing else, as `docker stop` does."""
        for host in self.hosts:
            if host.process is not None and host.process.poll() is None:
                for pid in children_of(host.process.pid):
                    os.kill(pid, signal.SIGTERM)

    def kill(self) -> None:
        """End everything; PID 1 takes its namespace with it, and the network goes with the last process in it."""
        for host in self.hosts:
            if host.process is not None and host.process.poll() is None:
                host.process.kill()  # unshare's --kill-child does the rest
                host.process.wait()

    def _lay_out(self, host: Host, names: list[str]) -> None:
        request, ml = self.captured.request, host.ml
        for place in ("input/config", "model", "output/data"):
            (ml / place).mkdir(parents=True)
        shutil.copytree(self.captured.channels, ml / "input/data")
        if self.checkpoints:
            shutil.copytree(self.checkpoints, ml / "checkpoints")
        (ml / "checkpoints").mkdir(exist_ok=True)
        kind = request["ResourceConfig"]["InstanceType"]
        group = {"instance_group_name": "homogeneousCluster", "instance_type": kind, "hosts": names}
        resources = {"current_host": host.name, "current_instance_type": kind, "hosts": names}
        resources |= {"current_group_name": "homogeneousCluster", "instance_groups": [group]}
        resources["network_interface_name"] = "eth0" if len(names) > 1 else "lo"
        inputs = {
            channel["ChannelName"]: {
                "TrainingInputMode": channel.get("InputMode", "File"),
                "S3DistributionType": channel["DataSource"]["S3DataSource"].get("S3DataDistributionType"),
                "RecordWrapperType": "None",
            }
            for channel in request["InputDataConfig"]
        }
        settings = {"hyperparameters": request.get("HyperParameters", {}), "resourceconfig": resources}
        for name, content in {**settings, "inputdataconfig": inputs}.items():
            (ml / f"input/config/{name}.json").write_text(json.dumps(content))
        addresses = [
            f"{NETWORK}.{n + 1} {name}" if len(names) > 1 else f"127.0.0.1 {name}" for n, name in enumerate(names)
        ]
        (host.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *addresses, ""]))
        name = request["TrainingJobName"]
        environment = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin"]),
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "PIP_NO_INDEX": "1",  # there is no network: the requirements have to be there
            "OMP_NUM_THREADS": "1",
            "PLUMBLINE_PROCESSES": str(self.processes),
            "TRAINING_JOB_NAME": name,
            "TRAINING_JOB_ARN": f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:training-job/{name}",
            "AWS_REGION": REGION,
            **self.environment,
            **request.get("Environment", {}),
        }
        container = request["AlgorithmSpecification"]
        command = [*container["ContainerEntrypoint"], *container["ContainerArguments"]]
        (host.folder / "job.json").write_text(json.dumps({"command": command, "environment": environment}))

    def _start(self, host: Host) -> None:
        spaces = ["--mount", "--uts", "--pid", "--net", "--fork", "--kill-child=SIGKILL", "--mount-proc"]
        words = ["bash", "-c", HOST_SCRIPT, "host", str(host.folder), host.name, sys.executable]
        with open(host.folder / "log", "wb") as log:
            host.process = subprocess.Popen(
                ["unshare", *spaces, "--propagation", "private", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        while not (host.folder / "ready").exists():
            if host.process.poll() is not None:
                raise RuntimeError(f"{host.name} did not start: {host.log}")
            time.sleep(0.02)

    def _connect(self) -> None:
        """A veth pair called eth0 at both ends."""
        if len(self.hosts) != 2:
            raise ValueError(f"{len(self.hosts)} hosts cannot be joined here: give an instance_count of 1 or 2.")
        first, second = (str(host.process.pid) for host in self.hosts if host.process)
        _ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for number, process in enumerate((first, second), start=1):
            _ip("addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0", within=process)
            _ip("link", "set", "eth0", "up", within=process)


def _ip(*words: str, within: str | None = None) -> None:
    prefix = ["nsenter", "--target", within, "--net"] if within else []
    subprocess.run([*prefix, "ip", *words], check=True)


def _whole_lines(path: Path) -> list[str]:
    return path.read_text().split("\n")[:-1]
