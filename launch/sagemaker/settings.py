"""What a training job is asked for: the machines, and everything else. Values are checked as they are given."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from launch.sagemaker.instances import gpus_of
from launch.sagemaker.limits import MAX_CHANNELS, check_channel, check_environment, check_name, check_s3, check_tags

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
    """Spare capacity at a discount; the job is interrupted at times and goes on from its checkpoint."""
    max_runtime_in_seconds: int = DAY
    """The job is stopped after so long, at most 28 days."""
    max_wait_time_in_seconds: int | None = None
    """Spot: running and waiting together; left out, it is max_runtime_in_seconds and a day."""
    gpus: int | None = None
    """GPUs of one instance, for a type that launch/sagemaker/instances.py does not know."""

    def __post_init__(self) -> None:
        gpus_of(self.instance_type, self.gpus)
        if self.instance_count < 1:
            raise ValueError(f"instance_count is {self.instance_count}; give 1 or more.")
        if self.volume_size_in_gb < 1:
            raise ValueError(f"volume_size_in_gb is {self.volume_size_in_gb}; give 1 or more.")
        if not 0 <= self.keep_alive_period_in_seconds <= 3600:
            raise ValueError(f"keep_alive_period_in_seconds is {self.keep_alive_period_in_seconds}; give 0 to 3600.")
        if not 60 <= self.max_runtime_in_seconds <= 28 * DAY:
            raise ValueError(f"max_runtime_in_seconds is {self.max_runtime_in_seconds}; give 60 to {28 * DAY}.")
        if self.enable_managed_spot_training and self.keep_alive_period_in_seconds:
            raise ValueError("keep_alive_period_in_seconds does not go with enable_managed_spot_training: drop one.")
        if self.max_wait_time_in_seconds is not None:
            if not self.enable_managed_spot_training:
                raise ValueError("max_wait_time_in_seconds is set without enable_managed_spot_training: drop it.")
            if self.max_wait_time_in_seconds < self.max_runtime_in_seconds:
                raise ValueError("max_wait_time_in_seconds is below max_runtime_in_seconds: make it larger.")

    @property
    def processes(self) -> int:
        """Of all machines: one a GPU, or one on a machine without."""
        return self.instance_count * max(1, gpus_of(self.instance_type, self.gpus))

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
    include: Sequence[str] = ()
    """Files and folders of yours that the job can import, such as reward functions."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Further variables of the job."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tags of the job."""
    subnets: Sequence[str] = ()
    """VPC subnets; they need a route to S3, and to the hub where models come from there."""
    security_group_ids: Sequence[str] = ()
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
        if bool(self.subnets) != bool(self.security_group_ids):
            raise ValueError("subnets and security_group_ids belong together: give both, or none.")
        for name in (self.wandb_secret, self.hf_secret):
            if name is not None and not re.fullmatch(r"[A-Za-z0-9/_+=.@:-]{1,512}", name):
                raise ValueError("wandb_secret and hf_secret are names or ARNs of secrets in AWS Secrets Manager.")
        if self.run_name is not None:
            check_name(self.run_name, "run_name", 38)  # the SDK appends the date; 63 are allowed
        if self.output is not None:
            check_s3(self.output, "output")
        check_environment(self.environment)
        check_tags(self.tags)
        if self.requirements not in (None, "none") and not Path(str(self.requirements)).is_file():
            raise ValueError(f"requirements `{self.requirements}` does not exist.")


def as_compute(compute: Any) -> Compute:
    """A `Compute` from itself, a mapping of its fields, the SDK's object of that name, or None for the defaults."""
    if compute is None or isinstance(compute, Compute):
        return compute or Compute()
    known = [entry.name for entry in fields(Compute)]
    if isinstance(compute, Mapping):
        for key in compute:
            if key not in known:
                raise ValueError(f"compute has no `{key}`; its keys are {', '.join(known)}.")
        return replace(Compute(), **compute)
    given: dict[str, Any] = {}
    for key in known:
        if isinstance(getattr(compute, key, None), str | int):  # the SDK has objects of its own for what is not set
            given[key] = getattr(compute, key)
    return replace(Compute(), **given)


def as_channels(input_data: Mapping[str, Any] | Sequence[Any] | None) -> dict[str, Any]:
    """Channel -> source, from a mapping or a list of the SDK's `InputData`; local paths become text."""
    if input_data is None or isinstance(input_data, Mapping):
        channels = dict(input_data or {})
    else:
        channels = {channel.channel_name: channel.data_source for channel in input_data}
    if len(channels) > MAX_CHANNELS:
        raise ValueError(f"{len(channels)} channels are given and SageMaker takes {MAX_CHANNELS}: drop some.")
    for name, place in channels.items():
        check_channel(name)
        if isinstance(place, str) and place.startswith("s3://"):
            check_s3(place, f"channel `{name}`")
        elif isinstance(place, str | Path):
            if not Path(place).exists():
                raise ValueError(f"channel `{name}`: {place} is neither an s3:// address nor a file or folder here.")
            channels[name] = str(place)
    return channels
