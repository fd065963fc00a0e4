"""Submit a loop as a SageMaker training job; with --dry_run, print the request that would be sent.

    python -m launch.sagemaker.submit --config configs/grpo.yaml --instance_type ml.p5.48xlarge --instance_count 2 \\
        --role arn:aws:iam::123456789012:role/training --region us-east-1 --input_data training=s3://bucket/rows/ --wait

Every `--key value` that is no option of this command is a key of the loop's configuration, and travels as a
hyperparameter. What would end the job later is refused here. In the job, `launch/sagemaker/entry.py` starts
`accelerate launch`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from configs.arguments import split_arguments
from configs.loader import flat_values, load_config
from launch.sagemaker.entry import SECRETS, Cluster, launch_command
from launch.sagemaker.failures import NO_SDK, aws_errors, find_region, one_sentence_errors, sentence_of
from launch.sagemaker.limits import (
    check_addresses,
    check_environment,
    check_no_secrets,
    check_role,
    encode_hyperparameters,
)
from launch.sagemaker.places import JOBS_OWN, hyperparameter_words
from launch.sagemaker.settings import Compute, Settings, as_channels, as_compute
from launch.sagemaker.source import check_sources, loop_of, stage_source, with_places
from launch.sagemaker.trainer import DryRun, build_trainer, dry_session, entry_command

CODE = "/opt/ml/input/data/code"


@dataclass(frozen=True)
class Job:
    """A submitted job; with `dry_run`, one that would have been."""

    name: str
    model: str  # S3 folder of the trained model, once the job is done
    checkpoints: str  # S3 folder of the run: checkpoints, metrics.jsonl, completions.jsonl
    request: dict[str, Any]  # what CreateTrainingJob was given
    command: str  # what the job executes, and what that starts
    files: Sequence[str]  # what travels as the job's code


def submit(
    config: str | Path | Sequence[str | Path],
    *,
    hyperparameters: Mapping[str, Any] | None = None,
    input_data: Mapping[str, Any] | Sequence[Any] | None = None,
    compute: Compute | Mapping[str, Any] | None = None,
    role: str | None = None,
    region: str | None = None,
    settings: Settings | None = None,
    dry_run: bool = False,
    wait: bool = False,
    session: Any = None,
) -> Job:
    """Send a training job; with `dry_run` nothing leaves this machine and no credentials are needed.

    Args:
        config: YAML file (or several, later ones over earlier ones) of the loop, by section or flat.
        hyperparameters: keys of the configuration over the file, by leaf name.
        input_data: channel -> `s3://` folder, local file or folder (uploaded), or a data source of the SDK; or a
            list of the SDK's `InputData`. `training`, `validation`, `preferences`, `models` and `inference_testing`
            become the configuration's rows, model and inference tests.
        compute: `Compute`, a mapping of its fields, or the SDK's object of that name.
        role: ARN of the execution role; default SAGEMAKER_ROLE_ARN.
        region: default AWS_REGION, AWS_DEFAULT_REGION, or the AWS profile's.
        wait: follow the logs until the job ends.
        session: boto3 session; default: this machine's credentials.

    Raises ValueError: one sentence, before the job is sent, for everything that would be refused or end it later;
    RuntimeError: with `wait`, where the job failed.
    """
    settings, machines, channels = settings or Settings(), as_compute(compute), as_channels(input_data)
    files = [Path(path) for path in ([config] if isinstance(config, str | Path) else config)]
    for path in files:
        if not path.is_file():
            raise ValueError(f"config `{path}` does not exist.")
    loop, role = loop_of(files[0], settings.loop), check_role(role, dry_run)
    chosen = with_places(with_settings(hyperparameters or {}, settings), settings.include)
    whole = read_config(loop, files, encode_hyperparameters(chosen))
    check_addresses({**settings.environment, **flat_values(whole)})
    check_sources(flat_values(whole), channels, settings.include)
    environment = {"PYTHONPATH": CODE, **settings.environment}
    for name, secret in (("WANDB_API_KEY", settings.wandb_secret), ("HF_TOKEN", settings.hf_secret)):
        if secret:
            environment[SECRETS[name]] = secret
    try:
        import sagemaker.train  # noqa: F401  here, so that its absence is told before anything is done
    except ImportError:
        raise ValueError(f"{NO_SDK}.") from None
    session = _session(session, region, role, dry_run)
    _request.clear()
    _taken.clear()
    for event, handler in {"provide-client-params": _look, "after-call": _answered}.items():
        session.events.register(f"{event}.sagemaker.CreateTrainingJob", handler, unique_id=f"plumbline-{event}")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        own = settings.requirements not in (None, "none")
        places = stage_source(
            Path(folder),
            configs=files,
            include=[Path(path) for path in settings.include],
            requirements=Path(str(settings.requirements)) if own else None,
        )
        travels = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
        check_environment({name: value for name, value in environment.items() if name not in SECRETS.values()})
        try:
            from sagemaker.core.training.configs import InputData

            trainer = build_trainer(
                loop,
                folder=folder,
                configs=places,
                hyperparameters=chosen,
                compute=machines,
                settings=settings,
                environment=environment,
                role=role,
                session=session,
                channels=channels,
            )
            inputs = [InputData(channel_name=name, data_source=place) for name, place in channels.items()]
            trainer.train(input_data_config=inputs, wait=False, logs=False)
        except DryRun:
            pass
        except aws_errors() as error:
            if not any(_taken):  # the SDK goes on to ask for the job's state once it is taken
                lost = f"AWS may have taken job {_request.get('TrainingJobName')}: look before you submit again"
                refused = "AWS refused" if _taken or not _request else lost
                raise ValueError(f"{refused}: {sentence_of(error)}") from None
            print(f"its state could not be read: {sentence_of(error)}", file=sys.stderr)
    sent = dict(_request)
    name, checkpoints = sent["TrainingJobName"], sent["CheckpointConfig"]["S3Uri"]
    model = f"{sent['OutputDataConfig']['S3OutputPath']}/{name}/output/model/"
    if not dry_run:
        print(f"submitted as {name}", file=sys.stderr, flush=True)
    if wait and not dry_run:
        from launch.sagemaker.follow import follow

        follow(name, session=session)
    command = command_of(loop, places, chosen, machines)
    return Job(name, model, checkpoints, sent, command, travels)


def command_of(loop: str, configs: Sequence[str], chosen: Mapping[str, Any], machines: Compute) -> str:
    """The job's own command and, below it, the launcher's line of the first host; channels add to the latter."""
    words = [f"loops/{loop}.py", *(word for path in configs for word in ("--config", path))]
    each = machines.processes // machines.instance_count
    hosts = tuple(sorted(f"algo-{n + 1}" for n in range(machines.instance_count)))
    cluster = Cluster(hosts, hosts[0], "eth0", machines.instance_type, each)
    ends = [*hyperparameter_words(encode_hyperparameters(chosen)), *JOBS_OWN]
    line = launch_command(cluster, [], ["launch.sagemaker.rank", *words, *ends])
    return f"{entry_command(loop, configs)}\n  accelerate launch {shlex.join(line[3:])}"


# The SDK keeps a client for each session, with the handlers of its first job: these serve all jobs of this process.
_request: dict[str, Any] = {}
_taken: list[bool] = []


def _look(params: dict[str, Any], **_: Any) -> None:
    check_no_secrets(params)
    _request.update(params)


def _answered(http_response: Any, **_: Any) -> None:
    _taken.append(http_response.status_code < 300)


def with_settings(hyperparameters: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The hyperparameters, with those that settings stand for where they are not given."""
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


def _session(session: Any, region: str | None, role: str, dry_run: bool) -> Any:
    import boto3

    region = find_region(region, session)
    if dry_run:
        return dry_session(region, role)
    return session or boto3.Session(region_name=region)


def pairs_of(words: Sequence[str], option: str) -> dict[str, str]:
    """`a=b c=d` of an option as a mapping. Raises ValueError for a name that stands there twice."""
    found: dict[str, str] = {}
    for name, equals, value in [word.partition("=") for word in words]:
        if not equals:
            raise ValueError(f"--{option} {name}: write NAME=VALUE.")
        if name in found:
            raise ValueError(f"--{option} gives {name} twice, {found[name]} and {value}: keep one of them.")
        found[name] = value
    return found


def add_list(parser: argparse.ArgumentParser, *flags: str, **settings: Any) -> None:
    """An option that takes several values; given again, it takes more of them, as the loops' own `--config` does."""
    parser.add_argument(*flags, nargs="+", action="extend", **settings)


def build_parser() -> argparse.ArgumentParser:
    """Options of the command; those of `Compute` and `Settings` are their fields."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.sagemaker.submit",
        description="Submit a loop as a SageMaker training job. Other --key value pairs are keys of its configuration.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add_list(parser, "--config", required=True, metavar="FILE", help="YAML of the loop; later files over earlier ones")
    channels = "channels: s3:// folder, local file or folder"
    add_list(parser, "--input_data", default=[], metavar="NAME=PLACE", help=channels)
    add("--role", help="ARN of the execution role; default SAGEMAKER_ROLE_ARN")
    add("--region", help="default AWS_REGION, AWS_DEFAULT_REGION, or the AWS profile's")
    dry = "print the request as JSON, and on stderr what would run and travel; send nothing, need no credentials"
    add("--dry_run", action="store_true", help=dry)
    add("--wait", action="store_true", help="follow the logs until the job ends")
    for settings in (Compute, Settings):
        add_fields(parser, settings, Path(__file__).with_name("settings.py"))
    return parser


def add_fields(parser: argparse.ArgumentParser, settings: Any, source: Path) -> None:
    """An option for each field of a dataclass that `source` defines, with the line under it as its help."""
    text = source.read_text(encoding="utf-8")
    docs = dict(re.findall(r'^    (\w+): .*\n    """(.*)"""$', text, re.M))
    for entry in fields(settings):
        kind, flags, line = str(entry.type), [f"--{entry.name}"], docs[entry.name].replace("%", "%%")
        if entry.name == "enable_managed_spot_training":
            flags.insert(0, "--spot")
        if kind == "bool":
            parser.add_argument(*flags, action="store_true", dest=entry.name, help=line)
        elif kind.startswith(("Sequence", "Mapping")):
            of = "NAME=VALUE" if kind.startswith("Mapping") else "VALUE"
            add_list(parser, *flags, default=[], metavar=of, help=line)
        else:
            shown = "" if entry.default is None else f" Default {entry.default}."
            type_ = int if "int" in kind else str
            parser.add_argument(*flags, type=type_, default=entry.default, help=line + shown)


def main(argv: Sequence[str] | None = None) -> None:
    options, rest = build_parser().parse_known_args(argv)
    given = vars(options)
    with one_sentence_errors("submit"):
        pairs, others = split_arguments(rest)
        for name in ("input_data", "environment", "tags"):
            given[name] = pairs_of(given[name], name)
        job = submit(
            [*given["config"], *others.get("config", [])],
            hyperparameters=dict(pairs),
            input_data=given["input_data"],
            compute=Compute(**{entry.name: given[entry.name] for entry in fields(Compute)}),
            role=given["role"],
            region=given["region"],
            settings=Settings(**{entry.name: given[entry.name] for entry in fields(Settings)}),
            dry_run=given["dry_run"],
            wait=given["wait"],
        )
    if given["dry_run"]:
        print(f"the job executes: {job.command}", file=sys.stderr)
        print("\n  ".join(["these files travel:", *job.files]), file=sys.stderr)
        print(json.dumps(job.request, indent=2, default=str))
        return
    print(f"{job.name}\nmodel, once it is done: {job.model}")
    if not given["wait"]:
        print(f"follow it: python -m launch.sagemaker.follow {job.name}")


if __name__ == "__main__":
    main()
