"""Submit a loop as a SageMaker training job; with --dry_run, print the request that would be sent.

    python -m launch.sagemaker.submit --config configs/grpo.yaml --instance_type ml.p5.48xlarge --instance_count 2 \\
        --role arn:aws:iam::123456789012:role/training --region us-east-1 --input_data training=s3://bucket/rows/ --wait

Every `--key value` that is no option of this command is a key of the loop's configuration, and is sent as a
hyperparameter. In the job, `launch/sagemaker/entry.py` starts `accelerate launch`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.arguments import join_arguments, split_arguments
from configs.loader import find_leaves, flat_values, load_config
from launch.sagemaker.account import Account, check_sdk
from launch.sagemaker.checks import check_addresses, check_no_secrets, encode_hyperparameters
from launch.sagemaker.entry import SECRETS, Cluster, launch_command
from launch.sagemaker.failures import aws_errors, one_sentence_errors, sentence_of
from launch.sagemaker.folders import JOBS_OWN, hyperparameter_words
from launch.sagemaker.instances import gpus_of
from launch.sagemaker.settings import Command, Compute, Settings, as_channels, as_compute
from launch.sagemaker.source import check_sources, loop_of, stage_source
from launch.sagemaker.trainer import DryRun, JobSpec, build_trainer, dry_session, entry_command

CODE = "/opt/ml/input/data/code"


@dataclass(frozen=True)
class Job:
    """A submitted job; with `dry_run`, one that would have been."""

    name: str
    model: str  # S3 folder of the trained model, once the job is done
    checkpoints: str  # S3 folder of the run: checkpoints, metrics.jsonl, completions.jsonl
    request: dict[str, Any]  # what CreateTrainingJob was given
    command: str  # what the job executes, and what that starts
    files: Sequence[str]  # the job's code


def submit(
    config: str | Path | Sequence[str | Path],
    *,
    hyperparameters: Mapping[str, Any] | None = None,
    input_data: Mapping[str, Any] | Sequence[Any] | None = None,
    compute: Compute | Mapping[str, Any] | None = None,
    settings: Settings | None = None,
    account: Account | None = None,
    dry_run: bool = False,
) -> Job:
    """Send a training job; with `dry_run` nothing leaves this machine and no credentials are needed.

    Args:
        config: YAML file (or several, later ones over earlier ones) of the loop, by section or flat.
        hyperparameters: keys of the configuration over the file, by leaf name.
        input_data: channel -> `s3://` folder, local file or folder (uploaded), or a data source of the SDK; or a
            list of the SDK's `InputData`. `training`, `validation`, `preferences`, `models` and `inference_testing`
            become the configuration's rows, model and inference tests.
        compute: `Compute`, a mapping of its fields, or the SDK's object of that name.

    Raises ValueError: one sentence, before the job is sent, for what would end it later.
    """
    settings, machines, channels = settings or Settings(), as_compute(compute), as_channels(input_data)
    account = account or Account()
    files = [Path(path) for path in ([config] if isinstance(config, str | Path) else config)]
    for path in files:
        if not path.is_file():
            raise ValueError(f"config `{path}` does not exist.")
    loop, role = loop_of(files[0], settings.loop), account.find_role(dry_run)
    chosen = with_settings(hyperparameters or {}, settings)
    values = flat_values(read_config(loop, files, encode_hyperparameters(chosen)))
    check_addresses({**settings.environment, **values})
    check_sources(values, channels, settings.include)
    environment = {"PYTHONPATH": CODE, **settings.environment}
    for name, secret in (("WANDB_API_KEY", settings.wandb_secret), ("HF_TOKEN", settings.hf_secret)):
        if secret:
            environment[SECRETS[name]] = secret
    check_sdk()
    session = account.find_session()
    session = dry_session(session.region_name, role) if dry_run else session
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        own = settings.requirements not in (None, "none")
        staged = stage_source(
            Path(folder),
            configs=files,
            include=[Path(path) for path in settings.include],
            requirements=Path(str(settings.requirements)) if own else None,
        )
        sent = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
        job = JobSpec(
            loop=loop,
            folder=folder,
            configs=staged,
            hyperparameters=chosen,
            channels=channels,
            environment=environment,
            compute=machines,
            settings=settings,
        )
        request = send(job, role, session)
    name, checkpoints = request["TrainingJobName"], request["CheckpointConfig"]["S3Uri"]
    model = f"{request['OutputDataConfig']['S3OutputPath']}/{name}/output/model/"
    if not dry_run:
        print(f"submitted as {name}", file=sys.stderr, flush=True)
    return Job(name, model, checkpoints, request, command_of(job), sent)


# The SDK keeps a client for each session, with the handlers of its first job: these serve all jobs of this process.
_request: dict[str, Any] = {}
_taken: list[bool] = []


def send(job: JobSpec, role: str, session: Any) -> dict[str, Any]:
    """Create the job, and return the request. Raises ValueError where AWS refuses it."""
    from sagemaker.core.training.configs import InputData

    _request.clear()
    _taken.clear()
    for event, handler in {"provide-client-params": _look, "after-call": _answered}.items():
        session.events.register(f"{event}.sagemaker.CreateTrainingJob", handler, unique_id=f"plumbline-{event}")
    try:
        inputs = [InputData(channel_name=name, data_source=place) for name, place in job.channels.items()]
        build_trainer(job, role, session).train(input_data_config=inputs, wait=False, logs=False)
    except DryRun:
        pass
    except aws_errors() as error:
        if not any(_taken):  # the SDK goes on to ask for the job's state once it is taken
            lost = f"AWS may have taken job {_request.get('TrainingJobName')}: look before you submit again"
            refused = "AWS refused" if _taken or not _request else lost
            raise ValueError(f"{refused}: {sentence_of(error)}") from None
        print(f"its state could not be read: {sentence_of(error)}", file=sys.stderr)
    return dict(_request)


def _look(params: dict[str, Any], **_: Any) -> None:
    check_no_secrets(params)
    _request.update(params)


def _answered(http_response: Any, **_: Any) -> None:
    _taken.append(http_response.status_code < 300)


def command_of(job: JobSpec) -> str:
    """The job's own command and, below it, the launcher's line of the first host; channels add to the latter.

    There is no such line for a machine whose number of GPUs is not known here.
    """
    command, gpus = entry_command(job.loop, job.configs), gpus_of(job.compute.instance_type)
    if gpus is None:
        return command
    words = [f"loops/{job.loop}.py", *(word for path in job.configs for word in ("--config", path))]
    hosts = tuple(sorted(f"algo-{n + 1}" for n in range(job.compute.instance_count)))
    cluster = Cluster(hosts, hosts[0], "eth0", job.compute.instance_type, max(1, gpus))
    ends = [*hyperparameter_words(encode_hyperparameters(job.hyperparameters)), *JOBS_OWN]
    line = launch_command(cluster, [], ["launch.sagemaker.rank", *words, *ends])
    return f"{command}\n  accelerate launch {shlex.join(line[3:])}"


def with_settings(hyperparameters: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The hyperparameters, and those that the settings imply where they are not given."""
    chosen = dict(hyperparameters)
    if settings.mlflow:
        chosen.setdefault("mlflow_uri", settings.mlflow)
    if settings.wandb_secret and "report_to" not in chosen:
        chosen.setdefault("use_wandb", True)
    if settings.run_name:
        chosen.setdefault("run_name", settings.run_name)
    return chosen


def read_config(loop: str, files: Sequence[Path], hyperparameters: Mapping[str, str]) -> Any:
    """The loop's config as the job will read it, by the loop's own rules.

    Raises ValueError with the sentence that the job would have ended with.
    """
    module = importlib.import_module(f"loops.{loop}")
    words = [f"--{key}={text}" for key, text in hyperparameters.items()]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return load_config(module.Config, ["--config", *map(str, files), *words], prog=f"loops/{loop}.py")
    except SystemExit:
        raise ValueError(said.getvalue().strip().splitlines()[-1]) from None


def read_command(argv: Sequence[str]) -> tuple[Command, list[str], dict[str, Any]]:
    """The command's own options, the config files, and the keys of the loop's configuration."""
    if {"--help", "-h"} & set(argv):
        load_config(Command, ["--help"], prog="submit")
    pairs, options = split_arguments(argv)
    pairs = [("enable_managed_spot_training" if key == "spot" else key, value) for key, value in pairs]
    known = {name for key, leaf in find_leaves(Command).items() for name in (key, f"{leaf.section}.{key}")}
    command = load_config(Command, join_arguments([pair for pair in pairs if pair[0] in known]), prog="submit")
    files = options.get("config", [])
    if not files:
        raise ValueError("there is no config: give --config FILE.")
    return command, files, {key: value for key, value in pairs if key not in known}


def main(argv: Sequence[str] | None = None) -> None:
    with one_sentence_errors("submit"):
        command, files, hyperparameters = read_command(sys.argv[1:] if argv is None else argv)
        account = Account(command.role, command.region)
        job = submit(
            files,
            hyperparameters=hyperparameters,
            input_data=command.input_data,
            compute=command.compute,
            settings=command.settings,
            account=account,
            dry_run=command.dry_run,
        )
        if command.wait and not command.dry_run:
            from launch.sagemaker.follow import follow

            follow(job.name, account)
    if command.dry_run:
        print(f"the job executes: {job.command}", file=sys.stderr)
        print("\n  ".join(["these files are sent:", *job.files]), file=sys.stderr)
        print(json.dumps(job.request, indent=2, default=str))
        return
    print(f"{job.name}\nmodel, once it is done: {job.model}")
    if not command.wait:
        print(f"follow it: python -m launch.sagemaker.follow {job.name}")


if __name__ == "__main__":
    main()
