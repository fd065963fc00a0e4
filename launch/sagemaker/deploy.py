"""Put a trained model behind a SageMaker endpoint, and take it away again.

    python -m launch.sagemaker.deploy JOB_NAME --instance_type ml.g6e.2xlarge --tool_call_parser hermes
    python -m launch.sagemaker.deploy s3://bucket/run/output/model/ --quantization fp8 --container lmi
    python -m launch.sagemaker.deploy runs/sft/model --base_model Qwen/Qwen3-8B     # a LoRA adapter on its base
    python -m launch.sagemaker.deploy NAME --delete

An endpoint costs its machines by the second from its start until it is deleted, used or not.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from configs.loader import load_config
from launch.sagemaker.account import Account, check_sdk
from launch.sagemaker.checks import check_no_secrets, split_s3
from launch.sagemaker.containers import IMAGES, Options, container_environment
from launch.sagemaker.failures import aws_errors, is_gone, one_sentence_errors, sentence_of

METHODS = {"Model": "{}_model", "EndpointConfig": "{}_endpoint_config", "Endpoint": "{}_endpoint"}
"""What an endpoint is made of, in the order of making, and boto3's methods for it."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """An endpoint for a trained model."""

    options: Options = field(default_factory=Options)

    source: str = ""
    """A training job, an s3:// folder or a local folder; with --delete, an endpoint's name."""
    delete: bool = False
    """Delete the endpoint, its configuration and model."""
    role: str | None = None
    """ARN of the execution role; left out, SAGEMAKER_ROLE_ARN."""
    region: str | None = None
    """Left out, AWS_REGION, AWS_DEFAULT_REGION, or the AWS profile's."""
    dry_run: bool = False
    """Print the requests as JSON; send nothing."""
    no_wait: bool = False
    """Return before the endpoint answers."""


@dataclass(frozen=True)
class Weights:
    """A model folder in S3, or one that goes there, and what its files say."""

    place: str  # `s3://` folder with a slash at its end, or a local folder
    config: Mapping[str, Any]  # config.json, or {}
    adapter: Mapping[str, Any] | None  # adapter_config.json of a LoRA adapter, None for a whole model


def deploy(
    source: str | Path,
    *,
    options: Options | None = None,
    account: Account | None = None,
    wait: bool = True,
    dry_run: bool = False,
) -> tuple[str, dict[str, dict[str, Any]]]:
    """Create model, endpoint configuration and endpoint; returns the endpoint's name and the three requests.

    source: name of a finished training job, an `s3://` folder, or a local folder. A folder with an adapter_config.json
    is a LoRA adapter (a dry run does not look into S3: there `base_model` and `lora_rank` say it). Local folders and
    adapters are copied to the account's default bucket. With `dry_run` nothing is sent and no credentials are needed.

    Raises ValueError for what would not be served, RuntimeError where the endpoint fails to come up.
    """
    options, account = options or Options(), account or Account()
    role = account.find_role(dry_run)
    check_sdk()
    from sagemaker.core import image_uris

    session = account.find_session()
    region = session.region_name
    session = None if dry_run else session
    image = options.image or image_uris.retrieve(
        **IMAGES[options.container], region=region, image_scope="inference", instance_type=options.instance_type
    )
    options = replace(options, name=options.name or f"plumbline-{time.strftime('%Y%m%d-%H%M%S')}")
    weights = find_weights(str(source), session, options)
    options = fit_options(weights, options)
    name, folder = options.name, weights.place
    if options.lora_rank or not folder.startswith("s3://"):
        # a bucket that the SDK makes for every account and region
        folder = f"s3://sagemaker-{region}-{role.split(':')[4]}/plumbline/endpoints/{name}/"
        inside = f"adapters/{name}/" if options.lora_rank and options.container == "lmi" else ""  # where LMI looks
        if session is not None:
            place_weights(weights.place, folder + inside, session)
            if options.lora_rank and options.container == "vllm":
                put_file(Path(__file__).with_name("serve_adapter.py"), folder, session)
    requests = build_requests(options, image=image, role=role, folder=folder)
    check_no_secrets(requests)
    if session is None:
        return name, requests
    client = session.client("sagemaker")
    create(requests, client)
    if wait:
        print(f"endpoint {name} is being created, and costs from now on: --delete removes it", file=sys.stderr)
        wait_for(name, client)
    return name, requests


def create(requests: Mapping[str, Mapping[str, Any]], client: Any) -> None:
    """Send the three requests. Where one is refused, what the ones before it made is deleted again.

    Raises ValueError with AWS's words, and with what could not be taken back.
    """
    made: list[tuple[str, str]] = []
    try:
        for kind, method in METHODS.items():
            getattr(client, method.format("create"))(**requests[f"Create{kind}"])
            made.append((kind, requests[f"Create{kind}"][f"{kind}Name"]))
    except BaseException as error:
        left = []
        for kind, name in reversed(made):
            try:
                getattr(client, METHODS[kind].format("delete"))(**{f"{kind}Name": name})
            except aws_errors():
                left.append(f"{kind} {name}")
        if not isinstance(error, aws_errors()):
            raise
        name = requests["CreateEndpoint"]["EndpointName"]
        how = f"{' and '.join(left)} stay: remove them with `{name} --delete`" if left else "nothing of it stays"
        raise ValueError(f"AWS refused the endpoint {name} ({sentence_of(error)}); {how}.") from None


def find_weights(source: str, session: Any, options: Options) -> Weights:
    """Where the model's files are: at the source, or in `model/` below it. Raises ValueError where there are none."""
    if Path(source).is_dir():
        places, read = [source, f"{source}/model"], _read_file
    elif session is None:  # a dry run looks nothing up in AWS
        split_s3(source, "model")
        return Weights(source.rstrip("/") + "/", {}, {"r": options.lora_rank} if options.base_model else None)
    else:
        roots = [source] if source.startswith("s3://") else _places_of_job(source, session)
        places = [root.rstrip("/") + part for root in roots for part in ("/", "/model/", "/output/model/")]
        read = partial(_read_object, session.client("s3"))
    for place in places:
        config, adapter = (read(place, name) for name in ("config.json", "adapter_config.json"))
        if config is not None or adapter is not None:
            return Weights(place, config or {}, adapter)
    raise ValueError(f"{source} holds no model: neither config.json nor adapter_config.json is in {places[0]}.")


def _read_file(place: str, name: str) -> Any:
    path = Path(place, name)
    return json.loads(path.read_text()) if path.is_file() else None


def _read_object(s3: Any, place: str, name: str) -> Any:
    bucket, prefix = split_s3(place, "model")
    key = f"{prefix}/{name}".lstrip("/")
    if s3.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", [{}])[0].get("Key") != key:
        return None
    return json.loads(s3.get_object(Bucket=bucket, Key=key)["Body"].read())


def _places_of_job(name: str, session: Any) -> list[str]:
    client = session.client("sagemaker")
    try:
        job = client.describe_training_job(TrainingJobName=name)
    except client.exceptions.ClientError as error:
        if not is_gone(error):
            raise
        raise ValueError(f"{name} is neither a folder, an s3:// address nor a training job of this region.") from None
    if job["TrainingJobStatus"] != "Completed":
        raise ValueError(f"training job {name} is {job['TrainingJobStatus']}: deploy a completed one.")
    artifacts = job["ModelArtifacts"]["S3ModelArtifacts"]
    if artifacts.endswith(".tar.gz"):
        raise ValueError(f"{artifacts} is compressed: submit with our command, which asks for a folder.")
    checkpoints = job.get("CheckpointConfig", {}).get("S3Uri")
    return [artifacts, *([checkpoints] if checkpoints else [])]


def fit_options(weights: Weights, options: Options) -> Options:
    """The options with what the model's files say: its adapter's rank and base.

    Raises ValueError for adapters that vLLM does not serve, and for sizes that do not fit the model.
    """
    heads, longest = weights.config.get("num_attention_heads"), weights.config.get("max_position_embeddings")
    if heads and heads % options.parallel:
        raise ValueError(
            f"the model has {heads} attention heads, which {options.parallel} GPUs cannot share: set tensor_parallel."
        )
    if longest and (options.max_model_len or 0) > longest:
        raise ValueError(f"max_model_len is {options.max_model_len} and the model was made for {longest} tokens.")
    if weights.adapter is None:
        if options.base_model:
            raise ValueError("base_model is given, but the model is no adapter: leave it out.")
        return options
    for key, what in {"use_dora": "a DoRA adapter", "modules_to_save": "an adapter with whole modules"}.items():
        if weights.adapter.get(key):
            raise ValueError(f"this is {what}, which vLLM does not serve: merge it first (merge_weights: true).")
    rank = options.lora_rank or weights.adapter.get("r")
    if not rank:
        raise ValueError("the adapter's rank is not known: give lora_rank.")
    base = options.base_model or weights.adapter.get("base_model_name_or_path")
    if not base or base.startswith(("/", "s3://")):
        raise ValueError(
            f"the adapter's base is {base}, which no endpoint has: give base_model, a hub id, or merge it first "
            "(merge_weights: true)."
        )
    return replace(options, base_model=base, lora_rank=rank)


def place_weights(place: str, folder: str, session: Any) -> None:
    """Copy all files of a local or `s3://` folder into an `s3://` folder."""
    s3 = session.client("s3")
    if not place.startswith("s3://"):
        for path in sorted(path for path in Path(place).rglob("*") if path.is_file()):
            put_file(path, folder + "/".join(path.relative_to(place).parts[:-1]), session)
        return
    (source, start), (bucket, prefix) = split_s3(place, "model"), split_s3(folder, "folder")
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=source, Prefix=f"{start}/"):
        for item in page.get("Contents", []):
            s3.copy({"Bucket": source, "Key": item["Key"]}, bucket, f"{prefix}/{item['Key'].removeprefix(f'{start}/')}")


def put_file(path: Path, folder: str, session: Any) -> None:
    """Upload one file into an `s3://` folder."""
    bucket, prefix = split_s3(folder, "folder")
    session.client("s3").upload_file(str(path), bucket, f"{prefix}/{path.name}")


def build_requests(options: Options, *, image: str, role: str, folder: str) -> dict[str, dict[str, Any]]:
    """The three requests of an endpoint, by operation. `folder` is mounted as the model."""
    container: dict[str, Any] = {
        "Image": image,
        "Environment": {**container_environment(options), **options.environment},
        "ModelDataSource": {
            "S3DataSource": {"S3Uri": folder, "S3DataType": "S3Prefix", "CompressionType": "None"},
        },
    }
    model: dict[str, Any] = {"ModelName": options.name, "ExecutionRoleArn": role, "PrimaryContainer": container}
    if options.subnets:
        model["VpcConfig"] = {"Subnets": list(options.subnets), "SecurityGroupIds": list(options.security_group_ids)}
    variant = {
        "VariantName": "AllTraffic",
        "ModelName": options.name,
        "InstanceType": options.instance_type,
        "InitialInstanceCount": options.instance_count,
        "ModelDataDownloadTimeoutInSeconds": 1800,
        "ContainerStartupHealthCheckTimeoutInSeconds": 1800,  # weights are read and kernels compiled before it answers
        "InferenceAmiVersion": options.ami,
        "RoutingConfig": {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"},
    }
    tags = [{"Key": key, "Value": value} for key, value in {"plumbline": "endpoint", **options.tags}.items()]
    return {
        "CreateModel": {**model, "Tags": tags},
        "CreateEndpointConfig": {"EndpointConfigName": options.name, "ProductionVariants": [variant], "Tags": tags},
        "CreateEndpoint": {"EndpointName": options.name, "EndpointConfigName": options.name, "Tags": tags},
    }


def wait_for(name: str, client: Any) -> None:
    """Return when the endpoint answers. Raises RuntimeError with SageMaker's reason where it failed."""
    from botocore.exceptions import WaiterError

    try:
        client.get_waiter("endpoint_in_service").wait(EndpointName=name)
    except WaiterError as error:
        status = error.last_response.get("EndpointStatus", error)
        reason = error.last_response.get("FailureReason", f"see the log group /aws/sagemaker/Endpoints/{name}")
        raise RuntimeError(f"endpoint {name} is {status}: {reason}; `{name} --delete` removes it") from None


def delete(name: str, account: Account | None = None) -> list[str]:
    """Delete an endpoint, its configuration and its models, or what there is of them; returns what was deleted.

    Weights in S3 stay. Raises ValueError where nothing of that name exists.
    """
    client = (account or Account()).find_session().client("sagemaker")

    def ask(call: Any, **names: str) -> Any:
        """The answer, None where there is no such thing."""
        try:
            return call(**names)
        except client.exceptions.ClientError as error:
            if not is_gone(error):
                raise
            return None

    endpoint = ask(client.describe_endpoint, EndpointName=name) or {"EndpointConfigName": name}
    config = ask(client.describe_endpoint_config, EndpointConfigName=endpoint["EndpointConfigName"]) or {}
    models = [variant["ModelName"] for variant in config.get("ProductionVariants", [])] or [name]
    parts = [("Endpoint", name), ("EndpointConfig", endpoint["EndpointConfigName"]), *(("Model", m) for m in models)]
    deleted = [
        f"{'configuration' if kind == 'EndpointConfig' else kind.lower()} {part}"
        for kind, part in parts
        if ask(getattr(client, METHODS[kind].format("delete")), **{f"{kind}Name": part}) is not None
    ]
    if not deleted:
        raise ValueError(f"endpoint {name}: Could not find it, nor a configuration or model of that name.")
    return deleted


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    command: Command = load_config(Command, words, prog="deploy", positional=("source",))
    account = Account(command.role, command.region)
    with one_sentence_errors("deploy"):
        if not command.source:
            raise ValueError("give a training job, an s3:// folder or a local folder; with --delete, an endpoint.")
        if command.delete:
            print("\n".join(f"deleted {what}" for what in delete(command.source, account)))
            return
        name, requests = deploy(
            command.source,
            options=command.options,
            account=account,
            wait=not command.no_wait,
            dry_run=command.dry_run,
        )
    if command.dry_run:
        print(json.dumps(requests, indent=2))
        return
    adapter = f" --adapter {name}" if command.options.container == "lmi" and "ENABLE_LORA" in str(requests) else ""
    print(f"{name}\nask it:    python -m launch.sagemaker.invoke {name} 'Hello'{adapter}")
    print(f"delete it: python -m launch.sagemaker.deploy {name} --delete    (it costs until then)")


if __name__ == "__main__":
    main()
