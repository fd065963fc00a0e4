"""The settings of a training job: the machines, and everything else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from launch.sagemaker.checks import check_channel, check_environment, split_s3

DAY = 86400


@dataclass(frozen=True, kw_only=True)
class Compute:
    """The machines; names are the SDK's."""

    instance_type: str = "ml.g6e.4xlarge"
    """Kind of machine; the default has one L40S of 48 GB."""
    instance_count: int = 1
    """Machines; above 1 they train together."""
    volume_size_in_gb: int = 100
    """Disk; instances with disks of their own use those, which are larger."""
    keep_alive_period_in_seconds: int = 0
    """Warm pool: the machines wait (and are paid for) so long for the next job, at most 3600."""
    enable_managed_spot_training: bool = False
    """Spare capacity at a discount; the job is interrupted at times and goes on from its checkpoint. Also --spot."""
    max_runtime_in_seconds: int = DAY
    """The job is stopped after so long, at most 28 days."""
    max_wait_time_in_seconds: int | None = None
    """Spot: running and waiting together; left out, it is max_runtime_in_seconds and a day."""

    @property
    def max_wait(self) -> int | None:
        """Seconds of running and waiting together; None without spot."""
        if not self.enable_managed_spot_training:
            return None
        return self.max_wait_time_in_seconds or self.max_runtime_in_seconds + DAY


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything else about a job."""

    loop: str | None = None
    """sft, dpo or grpo; left out, what the config's first line (`# loop: NAME`) or its name says."""
    output: str | None = None
    """S3 folder for code, results and checkpoints; left out, s3://sagemaker-REGION-ACCOUNT/plumbline."""
    run_name: str | None = None
    """Name of job and run. The same name with the same settings goes on from its checkpoints."""
    image: str | None = None
    """Your own training image; left out, AWS's PyTorch image of the region."""
    requirements: str | None = None
    """Requirements file in the place of launch/sagemaker/requirements.txt, or `none` where the image has everything."""
    include: list[str] = field(default_factory=list)
    """Files and folders of yours that the job can import, such as reward functions."""
    environment: dict[str, str] = field(default_factory=dict)
    """Further variables of the job, NAME=VALUE."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of the job, NAME=VALUE."""
    subnets: list[str] = field(default_factory=list)
    """VPC subnets; they need a route to S3, and to the hub where models come from there."""
    security_group_ids: list[str] = field(default_factory=list)
    """VPC security groups; those of several machines must let all traffic through among themselves."""
    encrypt_traffic: bool = False
    """Encrypt the traffic between machines (slower)."""
    mlflow: str | None = None
    """MLflow: ARN of a tracking server or app of SageMaker, or a URI. The same as the key mlflow_uri."""
    wandb_secret: str | None = None
    """Name or ARN of the secret that holds the W&B key; the job fetches it. Adds wandb to report_to."""
    hf_secret: str | None = None
    """Name or ARN of the secret that holds the Hugging Face token; the job fetches it."""

    def __post_init__(self) -> None:
        for name in (self.wandb_secret, self.hf_secret):
            if name is not None and not re.fullmatch(r"[A-Za-z0-9/_+=.@:-]{1,512}", name):
                raise ValueError("wandb_secret and hf_secret are names or ARNs of secrets in AWS Secrets Manager.")
        check_environment(self.environment)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A training job. Other keys are those of the loop's configuration."""

    compute: Compute = field(default_factory=Compute)
    settings: Settings = field(default_factory=Settings)

    input_data: dict[str, str] = field(default_factory=dict)
    """Channels, NAME=PLACE: an s3:// folder, or a local file or folder."""
    role: str | None = None
    """ARN of the execution role; left out, SAGEMAKER_ROLE_ARN."""
    region: str | None = None
    """Left out, AWS_REGION, AWS_DEFAULT_REGION, or the AWS profile's."""
    dry_run: bool = False
    """Print the request as JSON, and on stderr what would run and which files; send nothing, need no credentials."""
    wait: bool = False
    """Follow the logs until the job ends."""


def as_compute(compute: Any) -> Compute:
    """A `Compute` from itself, a mapping of its fields, the SDK's object of that name, or None for the defaults."""
    if compute is None or isinstance(compute, Compute):
        return compute or Compute()
    if isinstance(compute, Mapping):
        return Compute(**compute)
    given = {entry.name: getattr(compute, entry.name, None) for entry in fields(Compute)}
    # the SDK has objects of its own for what is not set
    return Compute(**{name: value for name, value in given.items() if isinstance(value, str | int)})


def as_channels(input_data: Mapping[str, Any] | Sequence[Any] | None) -> dict[str, Any]:
    """Channel -> source, from a mapping or a list of the SDK's `InputData`; local paths become text."""
    if input_data is None or isinstance(input_data, Mapping):
        channels = dict(input_data or {})
    else:
        channels = {channel.channel_name: channel.data_source for channel in input_data}
    for name, place in channels.items():
        check_channel(name)
        if isinstance(place, str) and place.startswith("s3://"):
            split_s3(place, f"channel `{name}`")
        elif isinstance(place, str | Path):
            if not Path(place).exists():
                raise ValueError(f"channel `{name}`: {place} is neither an s3:// address nor a file or folder here.")
            channels[name] = str(place)
    return channels
