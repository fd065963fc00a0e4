"""The SDK's ModelTrainer for a loop, and a session in which nothing is sent."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from launch.sagemaker.checks import encode_hyperparameters, split_s3
from launch.sagemaker.folders import find_folders
from launch.sagemaker.settings import Compute, Settings
from launch.sagemaker.source import REQUIREMENTS

if TYPE_CHECKING:
    import boto3
    from sagemaker.train import ModelTrainer

IMAGE = {"framework": "pytorch-amzn2023", "version": "2.13"}  # torch 2.13, Python 3.12, EFA and NCCL, flash-attn


def sdk_session(session: boto3.Session, output: str | None) -> tuple[Any, str]:
    """The SDK's session, and the S3 folder that holds everything of ours.

    The user's own SDK defaults (network, keys, tags) are kept. Telemetry is off unless they say otherwise.
    """
    from sagemaker.core.config.config import load_sagemaker_config
    from sagemaker.core.helper.session_helper import Session

    defaults = load_sagemaker_config()
    defaults.setdefault("SchemaVersion", "1.0")
    modules = defaults.setdefault("SageMaker", {}).setdefault("PythonSDK", {}).setdefault("Modules", {})
    modules.setdefault("TelemetryOptOut", True)
    bucket, prefix = split_s3(output, "output") if output else (None, "plumbline")
    sdk = Session(
        boto_session=session, default_bucket=bucket, default_bucket_prefix=prefix or None, sagemaker_config=defaults
    )
    return sdk, "/".join(["s3:/", bucket or sdk.default_bucket(), *([prefix] if prefix else [])])


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """A training job before it is sent."""

    loop: str
    folder: str  # the staged code
    configs: Sequence[str]  # paths in it
    hyperparameters: Mapping[str, Any]
    channels: Mapping[str, Any]
    environment: Mapping[str, str]
    compute: Compute
    settings: Settings


def build_trainer(job: JobSpec, role: str, session: boto3.Session) -> ModelTrainer:
    """The SDK's trainer. Without `settings.output`, the SDK asks AWS for the account's default bucket, and creates it
    where it is missing."""
    # The SDK's check of the role wants iam:SimulatePrincipalPolicy, and the rights of a role of its own making.
    os.environ.setdefault("SAGEMAKER_VALIDATE_ROLE", "false")
    from sagemaker.core import image_uris
    from sagemaker.core.training.configs import (
        CheckpointConfig,
        MetricDefinition,
        Networking,
        OutputDataConfig,
        SourceCode,
        StoppingCondition,
        Tag,
    )
    from sagemaker.core.training.configs import Compute as Machines
    from sagemaker.train import ModelTrainer

    from loops.shared.tracking import HEADLINE

    for name in ("sagemaker", "sagemaker.core", "sagemaker.train"):  # they warn that a command gets no hyperparameters
        logging.getLogger(name).setLevel(logging.ERROR)
    settings, compute = job.settings, job.compute
    sdk, root = sdk_session(session, settings.output)
    image = settings.image or image_uris.retrieve(
        **IMAGE, region=session.region_name, image_scope="training", instance_type=compute.instance_type
    )
    run = settings.run_name or f"{job.loop}-{time.strftime('%Y%m%d-%H%M%S')}"
    network = settings.subnets or settings.encrypt_traffic
    tags = {"plumbline": job.loop, "run": run, **settings.tags}
    trainer = ModelTrainer(
        sagemaker_session=sdk,
        role=role,
        base_job_name=settings.run_name or f"plumbline-{job.loop}",
        training_image=image,
        source_code=SourceCode(
            source_dir=job.folder,
            command=entry_command(job.loop, job.configs),
            requirements=None if settings.requirements == "none" else REQUIREMENTS,
        ),
        compute=Machines(
            instance_type=compute.instance_type,
            instance_count=compute.instance_count,
            volume_size_in_gb=compute.volume_size_in_gb,
            keep_alive_period_in_seconds=compute.keep_alive_period_in_seconds or None,
            enable_managed_spot_training=compute.enable_managed_spot_training,
        ),
        stopping_condition=StoppingCondition(
            max_runtime_in_seconds=compute.max_runtime_in_seconds,
            **({"max_wait_time_in_seconds": compute.max_wait} if compute.max_wait else {}),
        ),
        output_data_config=OutputDataConfig(s3_output_path=f"{root}/output", compression_type="NONE"),
        # the state of a run of the same name and settings, and never that of another one
        checkpoint_config=CheckpointConfig(
            s3_uri=f"{root}/checkpoints/{run}-"
            + fingerprint(job.loop, job.folder, job.configs, job.hyperparameters, job.channels, settings.include),
            local_path=str(find_folders().checkpoints),
        ),
        networking=Networking(
            subnets=list(settings.subnets) or None,
            security_group_ids=list(settings.security_group_ids) or None,
            enable_inter_container_traffic_encryption=settings.encrypt_traffic or None,
        )
        if network
        else None,
        environment=dict(job.environment),
        hyperparameters=dict(job.hyperparameters),
        tags=[Tag(key=key, value=value) for key, value in tags.items()],
    )
    return trainer.with_metric_definitions(
        [MetricDefinition(name=name, regex=metric_pattern(name)) for name in HEADLINE]
    )


def entry_command(loop: str, configs: Sequence[str]) -> str:
    """exec makes our entry process 1, the only one that SIGTERM is sent to."""
    words = " ".join(f"--config {path}" for path in configs)
    return f"exec $SM_PYTHON_CMD -m launch.sagemaker.entry -- loops/{loop}.py {words}"


def metric_pattern(name: str) -> str:
    """Finds a metric's number in the loops' lines: `step 3/100 loss/nll=1.25`, `step 3: eval/loss 0.5`."""
    return f"{name}[= ]([-+]?[0-9.]+(?:e[-+]?[0-9]+)?)"


def fingerprint(
    loop: str,
    folder: str,
    configs: Sequence[str],
    hyperparameters: Mapping[str, Any],
    channels: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
) -> str:
    """Eight characters, from the loop, its config files, hyperparameters, channels and included files.

    Files of this machine count by their contents.
    """
    digest = hashlib.sha256(loop.encode())
    for path in configs:
        digest.update(Path(folder, path).read_bytes())
    digest.update(repr(sorted(encode_hyperparameters(hyperparameters).items())).encode())
    sources = [*sorted((channels or {}).items()), *((Path(own).resolve().name, str(own)) for own in sorted(include))]
    for name, source in sources:
        local = isinstance(source, str) and not source.startswith("s3://")
        root = Path(source).expanduser() if local else Path()
        files = [path for path in sorted(root.rglob("*")) if path.is_file()] if local else []
        files = [root] if local and root.is_file() else files
        digest.update(f"{name} {'' if local else source}".encode())
        for path in files:
            if "__pycache__" not in path.parts:
                digest.update(str(path.relative_to(root)).encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:8]


class DryRun(Exception):
    """Stops the SDK where it would create something."""


def dry_session(region: str, role: str) -> boto3.Session:
    """A session with made-up credentials that answers every call itself; creating a training job raises `DryRun`."""
    import boto3

    session = boto3.Session(aws_access_key_id="dry-run", aws_secret_access_key="dry-run", region_name=region)
    account = role.split(":")[4]

    def answer(model: Any, **_: Any) -> tuple[Any, dict[str, Any]]:
        if model.name == "CreateTrainingJob":
            raise DryRun
        # The SDK asks whose account this is, and whether its default bucket is there.
        reply = {"Account": account, "Arn": role, "UserId": "dry-run", "Buckets": []}
        return SimpleNamespace(status_code=200, headers={}), {**reply, "ResponseMetadata": {"HTTPStatusCode": 200}}

    session.events.register("before-call", answer)
    return session
