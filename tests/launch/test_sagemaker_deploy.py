"""Endpoints: the three requests, both containers' variables, the client, and vLLM behind a loopback runtime."""

import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.sagemaker.account import Account
from launch.sagemaker.containers import MODEL, Options, container_environment
from launch.sagemaker.deploy import (
    Weights,
    build_requests,
    create,
    delete,
    deploy,
    find_weights,
    fit_options,
    wait_for,
)
from launch.sagemaker.invoke import invoke, split_events, stream
from loops.shared.adapters import served_rank
from tests.launch.loopback import forward, runtime

HOUSE = Path(__file__).resolve().parents[2]
ROLE = "arn:aws:iam::123456789012:role/serving"
HERE = Account(ROLE, "us-east-1")
BOTO = pytest.mark.skipif(
    importlib.util.find_spec("boto3") is None, reason="needs boto3: pip install -e '.[sagemaker]'"
)
MOTO = pytest.mark.skipif(
    importlib.util.find_spec("sagemaker") is None or importlib.util.find_spec("moto") is None,
    reason="needs the SageMaker SDK and moto[s3,sts,iam,sagemaker]",
)
VLLM_PYTHON = os.environ.get("VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else "")


@pytest.fixture(autouse=True)
def nobodys_settings(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("AWS_", "SAGEMAKER_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


@pytest.fixture
def aws(monkeypatch):
    """moto with the instance types of today, and its session."""
    from moto.sagemaker import models

    from tests.launch.local_job import pretended_aws

    monkeypatch.setattr(models.FakeEndpointConfig, "validate_instance_type", lambda self, instance_type: None)
    with pretended_aws() as session:
        yield session


def refuse(session, operation, code, message):
    """From now on AWS answers this operation so, to every client of the session."""
    answer = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": 400}}
    session.events.register(
        f"before-call.sagemaker.{operation}", lambda **_: (SimpleNamespace(status_code=400, headers={}), answer)
    )


# The requests


@MOTO
def test_the_requests_of_an_endpoint():
    """Every field of them. A change here is a change of what is sent to AWS."""
    options = Options(
        name="sums", quantization="fp8", max_model_len=8192, tool_call_parser="hermes", instance_type="ml.g6e.12xlarge"
    )
    name, requests = deploy("s3://mine/run/output/model", options=options, account=HERE, dry_run=True)
    tags = [{"Key": "plumbline", "Value": "endpoint"}]
    image = "763104351884.dkr.ecr.us-east-1.amazonaws.com/vllm:0.30.0-gpu-py312-cu130-ubuntu24.04-sagemaker"
    assert name == "sums"
    assert requests == {
        "CreateModel": {
            "ModelName": "sums",
            "ExecutionRoleArn": ROLE,
            "PrimaryContainer": {
                "Image": image,
                "Environment": {
                    "SM_VLLM_SERVED_MODEL_NAME": "sums",
                    "SM_VLLM_TENSOR_PARALLEL_SIZE": "4",
                    "SM_VLLM_MAX_MODEL_LEN": "8192",
                    "SM_VLLM_QUANTIZATION": "fp8",
                    "SM_VLLM_TOOL_CALL_PARSER": "hermes",
                    "SM_VLLM_ENABLE_AUTO_TOOL_CHOICE": "true",
                },
                "ModelDataSource": {
                    "S3DataSource": {
                        "S3Uri": "s3://mine/run/output/model/",
                        "S3DataType": "S3Prefix",
                        "CompressionType": "None",
                    }
                },
            },
            "Tags": tags,
        },
        "CreateEndpointConfig": {
            "EndpointConfigName": "sums",
            "ProductionVariants": [
                {
                    "VariantName": "AllTraffic",
                    "ModelName": "sums",
                    "InstanceType": "ml.g6e.12xlarge",
                    "InitialInstanceCount": 1,
                    "ModelDataDownloadTimeoutInSeconds": 1800,
                    "ContainerStartupHealthCheckTimeoutInSeconds": 1800,
                    "InferenceAmiVersion": "al2023-ami-sagemaker-inference-gpu-4-1",
                    "RoutingConfig": {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"},
                }
            ],
            "Tags": tags,
        },
        "CreateEndpoint": {"EndpointName": "sums", "EndpointConfigName": "sums", "Tags": tags},
    }


@BOTO
@pytest.mark.parametrize("container", ["vllm", "lmi"])
def test_the_requests_are_what_the_service_takes(container):
    """Against botocore's own description of each operation, with everything that can be asked for."""
    import boto3
    from botocore.validate import ParamValidator

    options = Options(
        name="sums",
        container=container,
        base_model="a/b",
        subnets=["subnet-1"],
        security_group_ids=["sg-1"],
        environment={"A": "b"},
    )
    options = fit_options(Weights("s3://mine/adapter/", {}, {"r": 8}), options)
    requests = build_requests(options, image="i", role=ROLE, folder="s3://mine/adapter/")
    model = boto3.Session(region_name="us-east-1").client("sagemaker").meta.service_model
    for operation, request in requests.items():
        report = ParamValidator().validate(request, model.operation_model(operation).input_shape)
        assert not report.has_errors(), report.generate_report()


def test_both_containers_are_told_the_same():
    given = dict(max_model_len=4096, quantization="fp8", tool_call_parser="hermes", instance_type="ml.g6e.12xlarge")
    options = Options(name="e", tensor_parallel=2, **given)
    assert container_environment(options) == {
        "SM_VLLM_SERVED_MODEL_NAME": "e",
        "SM_VLLM_TENSOR_PARALLEL_SIZE": "2",
        "SM_VLLM_MAX_MODEL_LEN": "4096",
        "SM_VLLM_QUANTIZATION": "fp8",
        "SM_VLLM_TOOL_CALL_PARSER": "hermes",
        "SM_VLLM_ENABLE_AUTO_TOOL_CHOICE": "true",
    }
    assert container_environment(replace(options, container="lmi")) == {
        "HF_MODEL_ID": MODEL,
        "TENSOR_PARALLEL_DEGREE": "2",
        "OPTION_SERVED_MODEL_NAME": "e",
        "OPTION_MAX_MODEL_LEN": "4096",
        "OPTION_QUANTIZE": "fp8",
        "OPTION_TOOL_CALL_PARSER": "hermes",
        "OPTION_ENABLE_AUTO_TOOL_CHOICE": "true",
    }


def test_an_adapter_takes_the_endpoints_name_and_its_base_another():
    weights = Weights("s3://mine/adapter/", {}, {"r": 24, "base_model_name_or_path": "Qwen/Qwen3-4B"})
    options = fit_options(weights, Options(name="e"))
    found = container_environment(options)
    assert found["SM_VLLM_MODEL"] == "Qwen/Qwen3-4B" and found["SM_VLLM_SERVED_MODEL_NAME"] == "e-base"
    assert json.loads(found["SM_VLLM_LORA_MODULES"]) == [{"name": "e", "path": MODEL}]
    assert (found["SM_VLLM_ENABLE_LORA"], found["SM_VLLM_MAX_LORA_RANK"]) == ("true", "32")
    assert (found["SM_VLLM_MIDDLEWARE"], found["PYTHONPATH"]) == ("serve_adapter.ServeAdapter", MODEL)
    assert found["PLUMBLINE_ADAPTER"] == "e"
    found = container_environment(replace(options, container="lmi"))
    assert found["HF_MODEL_ID"] == "Qwen/Qwen3-4B" and found["OPTION_MAX_LORA_RANK"] == "32"


@pytest.mark.parametrize(("rank", "room"), [(1, 8), (8, 8), (9, 16), (32, 32), (512, 512)])
def test_room_for_an_adapter(rank, room):
    assert served_rank(rank) == room


@pytest.mark.parametrize(
    ("config", "adapter", "options", "sentence"),
    [
        ({"num_attention_heads": 14}, None, {"instance_type": "ml.g6e.12xlarge"}, "14 attention heads, which 4 GPUs"),
        ({"max_position_embeddings": 4096}, None, {"max_model_len": 8192}, "made for 4096 tokens"),
        ({}, None, {"base_model": "a/b"}, "the model is no adapter"),
        ({}, {"r": 8, "use_dora": True, "base_model_name_or_path": "a/b"}, {}, "a DoRA adapter"),
        ({}, {"r": 8, "modules_to_save": ["lm_head"], "base_model_name_or_path": "a/b"}, {}, "whole modules"),
        ({}, {"r": 8, "base_model_name_or_path": "/home/me/base"}, {}, "give base_model"),
        ({}, {"r": 8, "base_model_name_or_path": "a/b"}, {"base_model": "s3://mine/base"}, "merge it first"),
        ({}, {"base_model_name_or_path": "a/b"}, {}, "give lora_rank"),
    ],
)
def test_a_model_that_would_not_be_served_is_refused(config, adapter, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        fit_options(Weights("s3://mine/m/", config, adapter), Options(**options))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"container": "tgi"}, "give vllm or lmi"),
        ({"instance_type": "ml.m5.xlarge"}, "has no GPU"),
        ({"tensor_parallel": 8}, "ml.g6e.2xlarge has 1 GPU"),
        ({"environment": {"HF_TOKEN": "x"}}, "in clear text"),
        ({"instance_type": "ml.p9.48xlarge"}, "is not known here: give tensor_parallel"),
    ],
)
def test_options_that_make_no_sense_are_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        Options(**given)


def test_an_adapter_of_too_high_a_rank_is_refused():
    with pytest.raises(ValueError, match="rank is 600"):
        container_environment(Options(name="e", base_model="a/b", lora_rank=600))


# Against moto


@MOTO
def test_an_endpoint_from_a_local_run_comes_up_and_is_deleted_whole(aws, tmp_path):
    """A run's folder is uploaded from its `model/`; after `delete` nothing is left that costs."""
    shutil.copytree(HOUSE / "data/quickstart/model", tmp_path / "run/model")
    name, requests = deploy(
        tmp_path / "run", options=Options(name="sums", max_model_len=512), account=Account(ROLE, session=aws)
    )
    client = aws.client("sagemaker")
    assert client.describe_endpoint(EndpointName="sums")["EndpointStatus"] == "InService"
    place = requests["CreateModel"]["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]["S3Uri"]
    bucket, prefix = "sagemaker-us-east-1-123456789012", "plumbline/endpoints/sums/"
    assert place == f"s3://{bucket}/{prefix}"
    keys = {item["Key"] for item in aws.client("s3").list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]}
    assert {f"{prefix}config.json", f"{prefix}model.safetensors", f"{prefix}tokenizer.json"} <= keys
    assert delete("sums", Account(session=aws)) == ["endpoint sums", "configuration sums", "model sums"]
    assert not client.list_endpoints()["Endpoints"] and not client.list_models()["Models"]
    assert not client.list_endpoint_configs()["EndpointConfigs"]
    with pytest.raises(ValueError, match="endpoint sums: Could not find"):
        delete("sums", Account(session=aws))


@MOTO
@pytest.mark.parametrize(("container", "inside"), [("vllm", ""), ("lmi", "adapters/sums/")])
def test_an_adapter_lies_where_the_container_looks(aws, container, inside):
    s3 = aws.client("s3")
    s3.create_bucket(Bucket="mine")
    config = {"r": 8, "base_model_name_or_path": "Qwen/Qwen3-4B"}
    s3.put_object(Bucket="mine", Key="run/model/adapter_config.json", Body=json.dumps(config).encode())
    s3.put_object(Bucket="mine", Key="run/model/adapter_model.safetensors", Body=b"weights")
    options = Options(name="sums", container=container)
    _, requests = deploy("s3://mine/run", options=options, account=Account(ROLE, session=aws))
    primary = requests["CreateModel"]["PrimaryContainer"]
    assert "Qwen/Qwen3-4B" in (primary["Environment"].get("HF_MODEL_ID"), primary["Environment"].get("SM_VLLM_MODEL"))
    bucket, _, prefix = primary["ModelDataSource"]["S3DataSource"]["S3Uri"].removeprefix("s3://").partition("/")
    assert (bucket, prefix) == ("sagemaker-us-east-1-123456789012", "plumbline/endpoints/sums/")
    keys = {item["Key"].removeprefix(prefix) for item in s3.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]}
    beside = {"serve_adapter.py"} if container == "vllm" else set()
    assert keys == {f"{inside}adapter_config.json", f"{inside}adapter_model.safetensors"} | beside


@MOTO
@pytest.mark.parametrize("refused", ["CreateModel", "CreateEndpointConfig", "CreateEndpoint"])
def test_an_endpoint_that_aws_refuses_leaves_nothing_behind(aws, refused):
    refuse(aws, refused, "ResourceLimitExceeded", "the limit is 0")
    with pytest.raises(ValueError, match="AWS refused the endpoint sums .*the limit is 0.*nothing of it stays"):
        deploy(
            HOUSE / "data/quickstart/model",
            options=Options(name="sums"),
            account=Account(ROLE, session=aws),
            wait=False,
        )
    client = aws.client("sagemaker")
    assert client.list_models()["Models"] == client.list_endpoint_configs()["EndpointConfigs"] == []


@MOTO
def test_a_model_that_was_there_before_is_not_taken_back(aws):
    """CreateModel itself is refused: the model of that name is somebody else's."""
    requests = deploy("s3://bucket/model", options=Options(name="sums"), account=HERE, dry_run=True)[1]
    aws.client("sagemaker").create_model(**requests["CreateModel"])
    refuse(aws, "CreateModel", "ValidationException", "Cannot create already existing model")
    with pytest.raises(ValueError, match="already existing model.*nothing of it stays"):
        create(requests, aws.client("sagemaker"))
    assert [model["ModelName"] for model in aws.client("sagemaker").list_models()["Models"]] == ["sums"]


@MOTO
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_delete_removes_what_there_is(aws, parts):
    requests = deploy("s3://bucket/model", options=Options(name="sums"), account=HERE, dry_run=True)[1]
    client = aws.client("sagemaker")
    methods = (client.create_model, client.create_endpoint_config, client.create_endpoint)
    for method, request in list(zip(methods, requests.values(), strict=True))[:parts]:
        method(**request)
    assert len(delete("sums", Account(session=aws))) == parts
    assert client.list_models()["Models"] == client.list_endpoint_configs()["EndpointConfigs"] == []
    with pytest.raises(ValueError, match="endpoint sums: Could not find"):
        delete("sums", Account(session=aws))


@BOTO
@pytest.mark.parametrize(
    "words",
    [["invoke", "nope", "hi"], ["deploy", "nope", "--delete"], pytest.param(["follow", "nope"], marks=MOTO)],
)
def test_what_aws_says_is_one_sentence(words, capsys, monkeypatch):
    """Each command without a region, and then with one and without credentials."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    module = importlib.import_module(f"launch.sagemaker.{words[0]}")
    for more, code, sentence in (([], 2, "no region"), (["--region", "us-east-1"], 1, "Unable to locate credentials")):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        with pytest.raises(SystemExit) as stop:
            module.main()
        assert stop.value.code == code
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(f"{words[0]}: ") and sentence in said


@MOTO
def test_a_training_job_is_deployed_by_its_name(aws):
    """moto has finished jobs at once, and calls their model compressed; ours are folders."""
    client, s3 = aws.client("sagemaker"), aws.client("s3")
    request = {
        "TrainingJobName": "done",
        "RoleArn": ROLE,
        "AlgorithmSpecification": {"TrainingImage": "i", "TrainingInputMode": "File"},
        "OutputDataConfig": {"S3OutputPath": "s3://sagemaker-us-east-1-123456789012/out"},
        "ResourceConfig": {"InstanceType": "ml.m5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 1},
        "StoppingCondition": {"MaxRuntimeInSeconds": 60},
    }
    client.create_training_job(**request)
    with pytest.raises(ValueError, match="is compressed"):
        find_weights("done", aws, Options())
    with pytest.raises(ValueError, match="nobody is neither a folder, an s3:// address nor a training job"):
        find_weights("nobody", aws, Options())

    def as_folder(parsed, **_):
        parsed["ModelArtifacts"] = {"S3ModelArtifacts": "s3://sagemaker-us-east-1-123456789012/out/done/output/model"}

    aws.events.register("after-call.sagemaker.DescribeTrainingJob", as_folder)
    with pytest.raises(ValueError, match="done holds no model"):
        find_weights("done", aws, Options())
    s3.put_object(Bucket="sagemaker-us-east-1-123456789012", Key="out/done/output/model/config.json", Body=b"{}")
    assert find_weights("done", aws, Options()).place == "s3://sagemaker-us-east-1-123456789012/out/done/output/model/"


@MOTO
def test_an_endpoint_that_fails_says_why(aws, monkeypatch):
    answer = {"EndpointStatus": "Failed", "FailureReason": "no capacity"}
    answer |= {"ResponseMetadata": {"HTTPStatusCode": 200}}
    aws.events.register(
        "before-call.sagemaker.DescribeEndpoint", lambda **_: (SimpleNamespace(status_code=200), answer)
    )
    with pytest.raises(RuntimeError, match="endpoint e is Failed: no capacity"):
        wait_for("e", aws.client("sagemaker"))


# The client


def chunk(**delta):
    return {"choices": [{"index": 0, "delta": delta}]}


def sse(chunks, newline="\n"):
    lines = [f"data: {json.dumps(item, ensure_ascii=False)}{newline}{newline}" for item in chunks]
    return "".join([*lines, f"data: [DONE]{newline}{newline}"]).encode()


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_events_survive_being_split_anywhere(newline):
    """Cut after every byte, also inside a character and inside a line end; comments and empty parts are passed over."""
    chunks = [chunk(role="assistant"), chunk(content="4€"), chunk(content="2")]
    text = b": ping" + newline.encode() * 2 + sse(chunks, newline)
    for size in (1, 2, 3, 7, len(text)):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert list(split_events([b"", *pieces])) == chunks, size
    for cut in range(len(text)):
        assert list(split_events([text[:cut], text[cut:]])) == chunks


def test_a_stream_that_stops_or_fails_is_an_error_and_not_a_short_answer():
    with pytest.raises(RuntimeError, match="stopped inside an event"):
        list(split_events([sse([chunk(content="4")])[:20]]))
    with pytest.raises(RuntimeError, match="the container reports: .*out of memory"):
        list(split_events([sse([{"error": {"message": "out of memory"}}])]))


def text_of(chunks):
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


class Container:
    """Speaks chat completions: adds with its tool where it has one, otherwise says which model was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, body):
        request = json.loads(body)
        self.asked.append(request)
        if "messages" not in request:
            return 400, [b"no messages"]
        last = request["messages"][-1]
        message = {"role": "assistant", "content": f"{request['model']} heard {last['content']}"}
        if last["role"] == "tool":
            message["content"] = f"It is {json.loads(last['content'])}."
        elif request.get("tools"):
            function = {"name": "add", "arguments": '{"x": 17, "y": 25}'}
            message = {"role": "assistant", "content": None}
            message["tool_calls"] = [{"id": "call-1", "type": "function", "function": function}]
        if request.get("stream"):
            text = sse([chunk(content=part) for part in re.findall(r"\S+\s*", message["content"])])
            return 200, [text[at : at + 5] for at in range(0, len(text), 5)]
        return 200, [json.dumps({"choices": [{"message": message}]}).encode()]


def client_of(url):
    import boto3

    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x"}
    return boto3.Session(region_name="us-east-1", **keys).client("sagemaker-runtime", endpoint_url=url)


@BOTO
def test_the_client_asks_for_the_endpoints_own_model_whole_and_as_a_stream():
    container = Container()
    asked = [{"role": "user", "content": "seventeen and twenty-five"}]
    with runtime(container) as url:
        client = client_of(url)
        whole = invoke("sums", asked, {"max_tokens": 9}, client=client)["choices"][0]["message"]["content"]
        pieces = list(stream("sums", asked, client=client))
    assert whole == "sums heard seventeen and twenty-five" == text_of(pieces)
    assert len(pieces) == 5
    assert container.asked[0] == {"model": "sums", "messages": asked, "max_tokens": 9}
    assert container.asked[1]["stream"] is True


@BOTO
def test_what_a_container_refuses_is_said_in_its_words():
    with runtime(lambda body: (400, [b"context length exceeded"])) as url:
        client = client_of(url)
        with pytest.raises(RuntimeError, match="endpoint e: context length exceeded"):
            invoke("e", [], client=client)
        with pytest.raises(RuntimeError, match="endpoint e: context length exceeded"):
            list(stream("e", [], client=client))


def server_words(environment):
    """Arguments of vLLM's server, as the image's entry point reads them from the variables."""
    words = []
    for name, value in sorted(environment.items()):
        if name.startswith("SM_VLLM_"):
            words.append(f"--{name.removeprefix('SM_VLLM_').lower().replace('_', '-')}")
            if value.startswith("["):
                words += [json.dumps(item) for item in json.loads(value)]
            elif value != "true":
                words.append(value)
    return words


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory):
    """vLLM's own server on the quickstart's model and a random adapter, with what our variables become in the image."""
    if not VLLM_PYTHON or importlib.util.find_spec("boto3") is None:
        pytest.skip("needs boto3, and vLLM here or in the interpreter that VLLM_PYTHON names")
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder, base = tmp_path_factory.mktemp("adapter"), str(HOUSE / "data/quickstart/model")
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    shutil.copy(HOUSE / "launch/sagemaker/serve_adapter.py", folder)
    options = Options(name="sums", base_model="a/b", max_model_len=1024, tool_call_parser="hermes")
    adapter = Weights("s3://mine/adapter/", {}, json.loads((folder / "adapter_config.json").read_text()))
    options = replace(fit_options(adapter, options), base_model=base)
    environment = container_environment(options, adapter=str(folder))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "67108864"]
    # an untrained caller would fill the room between two words with spaces
    command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    command += server_words(environment)
    keep = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | environment
    with open(folder / "log", "wb") as file:
        server = subprocess.Popen(command, env=keep, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2)
                break
            except OSError:
                log = (folder / "log").read_text()[-3000:]
                assert server.poll() is None and time.monotonic() < deadline, log
                time.sleep(0.5)
        yield port
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def test_vllm_answers_boto3_through_the_runtime(vllm_server):
    """Whole and streamed answers agree; a named tool comes back as a call; and it is the adapter that answers."""
    asked = [{"role": "user", "content": "17 + 25 ="}]
    settings = {"max_tokens": 12, "temperature": 0}

    def directly(model):
        body = json.dumps({"model": model, "messages": asked, **settings}).encode()
        address = f"http://127.0.0.1:{vllm_server}/v1/chat/completions"
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["message"]["content"]

    with runtime(forward(vllm_server)) as url:
        client = client_of(url)
        whole = invoke("sums", asked, settings, client=client)["choices"][0]["message"]["content"]
        assert whole and whole == text_of(stream("sums", asked, settings, client=client))
        assert whole == directly("sums") != directly("sums-base")
        shape = {"type": "object", "properties": {"unit": {"enum": ["g"]}}, "required": ["unit"]}
        tool = {"name": "weigh", "strict": True, "parameters": {**shape, "additionalProperties": False}}
        named = {"tools": [{"type": "function", "function": tool}], "max_tokens": 300, "temperature": 1, "seed": 1}
        named["tool_choice"] = {"type": "function", "function": {"name": "weigh"}}
        message = invoke("sums", asked, {**settings, **named}, client=client)["choices"][0]["message"]
        assert "tool_calls" in message, message
        (call,) = message["tool_calls"]
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("weigh", {"unit": "g"})
        with pytest.raises(RuntimeError, match="maximum context length"):
            invoke("sums", [{"role": "user", "content": "1" * 5000}], client=client)
