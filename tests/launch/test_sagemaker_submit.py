"""The request of a training job: what is sent, what is refused before, and that a dry run sends nothing."""

import configparser
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.loader import load_config
from launch.sagemaker import checks, source
from launch.sagemaker.account import Account
from launch.sagemaker.entry import SECRETS
from launch.sagemaker.instances import gpus_of
from launch.sagemaker.settings import DAY, Compute, Settings, as_channels
from launch.sagemaker.submit import main, read_command, read_config, submit
from launch.sagemaker.trainer import fingerprint, metric_pattern
from loops.shared.tracking import HEADLINE

HOUSE = Path(__file__).resolve().parents[2]
ROLE = "arn:aws:iam::123456789012:role/team/training"
SDK = pytest.mark.skipif(
    importlib.util.find_spec("sagemaker") is None, reason="needs the SageMaker SDK: pip install -e '.[sagemaker]'"
)
MOTO = pytest.mark.skipif(
    importlib.util.find_spec("sagemaker") is None or importlib.util.find_spec("moto") is None,
    reason="needs the SageMaker SDK and moto[s3,sts,iam,sagemaker]",
)
HERE = Account(ROLE, "us-east-1")
BUCKET = "s3://sagemaker-us-east-1-123456789012/plumbline"


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """The commands are given in the project's folder, by someone who has no AWS settings and no secrets."""
    monkeypatch.chdir(HOUSE)
    for name in [name for name in os.environ if name.startswith(("AWS_", "SAGEMAKER_")) or name in checks.SECRETS_HERE]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


def dry(config="configs/grpo.yaml", **given):
    """The request of a dry run."""
    return submit(config, account=given.pop("account", HERE), dry_run=True, **given).request


# Refused before anything is sent


@pytest.mark.parametrize(
    ("hyperparameters", "sentence"),
    [
        ({"system_prompt": "it's"}, "hyperparameter `system_prompt`: a single quote in a value ends the job"),
        (
            {"optim.learning_rate": 1},
            "hyperparameter `optim.learning_rate`: a dot ends the job at its start; write `lear",
        ),
    ],
)
def test_a_hyperparameter_that_would_end_the_job_is_refused(hyperparameters, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        submit("configs/grpo.yaml", hyperparameters=hyperparameters, account=HERE, dry_run=True)


def test_values_are_text_as_it_is_and_json_otherwise():
    given = {"a": "1e-5", "b": 1e-5, "c": True, "d": ["q_proj"], "e": None, "f": {"x": 1}}
    expected = {"a": "1e-5", "b": "1e-05", "c": "true", "d": '["q_proj"]', "e": "null", "f": '{"x": 1}'}
    assert checks.encode_hyperparameters(given) == expected


@pytest.mark.parametrize("name", ["my-rows", "my.rows", ""])
def test_a_channel_name_that_the_job_cannot_have_is_refused(name):
    with pytest.raises(ValueError, match=f"channel `{re.escape(name)}`"):
        as_channels({name: "s3://bucket/rows/"})


def test_a_channel_has_to_be_somewhere(tmp_path):
    with pytest.raises(ValueError, match="neither an s3:// address nor a file or folder here"):
        as_channels({"training": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match="is no S3 address"):
        as_channels({"training": "s3://Not_A_Bucket/rows"})


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"wandb_secret": "not a name"}, "names or ARNs of secrets"),
        ({"environment": {"WANDB_API_KEY": "x"}}, "environment `WANDB_API_KEY` would stand in clear text"),
        ({"environment": {"HF_TOKEN": "x"}}, "environment `HF_TOKEN` would stand in clear text"),
    ],
)
def test_a_secret_in_clear_text_is_refused(given, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Settings(**given)


def test_a_region_and_a_role_are_needed(monkeypatch):
    with pytest.raises(ValueError, match="no role: give --role, or set SAGEMAKER_ROLE_ARN"):
        submit("configs/grpo.yaml", account=Account(region="us-east-1"))
    with pytest.raises(ValueError, match="`admin` is no ARN of a role"):
        submit("configs/grpo.yaml", account=Account("admin", "us-east-1"), dry_run=True)


@SDK
def test_role_and_region_come_from_the_environment(monkeypatch):
    with pytest.raises(ValueError, match="no region: give --region, or set AWS_DEFAULT_REGION"):
        submit("configs/grpo.yaml", account=Account(ROLE), dry_run=True)
    assert dry(account=Account(region="us-east-1"))["RoleArn"].endswith(":role/ROLE")
    monkeypatch.setenv("SAGEMAKER_ROLE_ARN", ROLE)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    request = submit("configs/grpo.yaml", dry_run=True).request
    assert request["RoleArn"] == ROLE
    assert request["AlgorithmSpecification"]["TrainingImage"].startswith("763104351884.dkr.ecr.eu-west-1.")


def test_a_key_that_the_loop_does_not_know_is_refused_in_the_loops_own_words():
    with pytest.raises(ValueError, match="unknown key `learning_rat`: did you mean `learning_rate`"):
        read_config("grpo", [Path("configs/grpo.yaml")], {"learning_rat": "1"})


def test_rows_and_functions_that_only_this_machine_has_are_refused(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "my_rewards.py").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="give it as a channel, training=rows.jsonl"):
        source.check_sources({"dataset_name": "rows.jsonl"}, {}, [])
    source.check_sources({"dataset_name": "rows.jsonl"}, {"training": "s3://b/r/"}, [])
    with pytest.raises(ValueError, match="no channel is named `train`"):
        source.check_sources({"dataset_name": "/opt/ml/input/data/train/"}, {"training": "s3://b/r/"}, [])
    with pytest.raises(ValueError, match="add --include my_rewards.py"):
        source.check_sources({"reward_functions": ["length", "my_rewards:score"]}, {}, [])
    source.check_sources({"reward_functions": "length,my_rewards:score"}, {}, ["my_rewards.py"])


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("dataset_name", "rows/typo.jsonl", "no file or folder here and can be no hub id"),
        ("eval_dataset_name", "held.csv", "no file or folder here and can be no hub id"),
        ("model_id", "runs/no/such", "no file or folder here and can be no hub id"),
        ("tokenizer_id", "/models/tokenizer", "no file or folder here and can be no hub id"),
        ("tokenizer_id", "mine", "add --include mine"),
        ("model_id", "mine", "give it as a channel, models=mine"),
        ("resume_from", "mine", "a job goes on from the checkpoints of its run_name"),
        ("dataset_name", str(HOUSE / "data/quickstart/train.jsonl"), "write data/quickstart/train.jsonl"),
    ],
)
def test_a_path_that_the_job_does_not_have_is_refused(key, value, sentence, tmp_path, monkeypatch):
    """Whichever key names it, in a file as on the command line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=f"{key} is .*{re.escape(sentence)}"):
        source.check_sources({key: value}, {}, [])


def test_hub_ids_shipped_paths_and_the_jobs_folders_pass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/tokenizer.json").touch()
    source.check_sources({"model_id": "Qwen/Qwen3-0.6B", "dataset_name": "data/quickstart/train.jsonl"}, {}, [])
    source.check_sources({"tokenizer_id": "mine", "resume_from": "latest"}, {}, ["mine"])
    source.check_sources({"resume_from": "/opt/ml/checkpoints/checkpoints/a", "model_id": "gpt2"}, {}, [])
    source.check_sources({"eval_dataset_name": "held.jsonl"}, {"training": "s3://bucket/rows/"}, [])


def test_what_is_not_sent_has_no_path_in_the_job(tmp_path):
    (tmp_path / "rows").mkdir()
    assert source.path_in_job(str(tmp_path / "rows"), [str(tmp_path / "rows")]) == "rows"
    assert source.path_in_job(str(HOUSE / "data/.hidden"), []) is None
    assert source.path_in_job(str(tmp_path / "rows"), []) is None


@pytest.mark.parametrize(
    "given",
    [
        {"settings": Settings(mlflow="http://alice:PASSWORD@host")},
        {"hyperparameters": {"mlflow_uri": "postgresql://alice:PASSWORD@host/db"}},
        {"settings": Settings(environment={"JUDGE": "https://alice:PASSWORD@host"})},
    ],
)
def test_a_password_in_an_address_is_refused_unsaid(given):
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") as refused:
        submit("configs/grpo.yaml", account=HERE, dry_run=True, **given)
    assert "PASSWORD@" not in str(refused.value)


def test_without_the_sdk_one_sentence_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sagemaker", None)
    monkeypatch.setitem(sys.modules, "sagemaker.train", None)
    with pytest.raises(SystemExit) as stop:
        main(["--config", "configs/grpo.yaml", "--role", ROLE, "--region", "us-east-1", "--dry_run"])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "submit: the SageMaker SDK is not installed: pip install -e '.[sagemaker]'.\n"


@pytest.mark.parametrize("option", ["--input_data", "--tags", "--environment", "--include", "--subnets"])
def test_a_list_option_takes_several_values_and_is_given_once(option, capsys):
    """As the loops' own lists."""
    words = ["--config", "base.yaml", option, "a=1", "b=2"]
    command, files, rest = read_command([*words, "--config", "other.yaml", "--lora_r", "8"])
    assert (files, rest) == (["base.yaml", "other.yaml"], {"lora_r": "8"})
    values = {**vars(command), **vars(command.settings)}[option[2:]]
    assert values in (["a=1", "b=2"], {"a": "1", "b": "2"})
    with pytest.raises(SystemExit):
        read_command([*words, option, "c=3"])
    assert f"`{option[2:]}` is given twice: write its values after one" in capsys.readouterr().err


def test_a_value_may_have_commas_and_a_section_its_name():
    words = ["--config", "a", "--environment", "NCCL_DEBUG_SUBSYS=INIT,NET", "--compute.instance_count", "2", "--spot"]
    command, _, rest = read_command(words)
    assert command.settings.environment == {"NCCL_DEBUG_SUBSYS": "INIT,NET"} and rest == {}
    assert command.compute.instance_count == 2 and command.compute.enable_managed_spot_training


def test_a_name_given_twice_is_refused(capsys):
    with pytest.raises(SystemExit):
        read_command(["--config", "a", "--tags", "team=a", "team=b"])
    assert "`tags` gives team twice" in capsys.readouterr().err


# What travels


def test_the_jobs_requirements_are_those_of_setup_cfg():
    """All of the project's own but torch, which is the image's; the extras of a job; and sagemaker-mlflow."""
    setup = configparser.ConfigParser()
    setup.read(HOUSE / "setup.cfg")
    extras = setup["options.extras_require"]
    wanted = setup["options"]["install_requires"] + extras["quant"] + extras["tracking"] + extras["eval"]
    expected = {line for line in wanted.split("\n") if line and not line.startswith("torch>")}
    lines = (HOUSE / source.REQUIREMENTS).read_text().splitlines()
    shipped = {line for line in lines if line and not line.startswith(("#", "sagemaker-mlflow"))}
    assert shipped == expected


@pytest.mark.parametrize(
    ("name", "text", "loop"),
    [
        ("grpo.yaml", "", "grpo"),
        ("llama_dpo_qlora.yaml", "", "dpo"),
        ("args.yaml", "# loop: sft\n", "sft"),
        ("grpo.yaml", "# loop: dpo\n", "dpo"),
    ],
)
def test_a_config_says_which_loop_it_is_for(tmp_path, name, text, loop):
    (tmp_path / name).write_text(text)
    assert source.loop_of(tmp_path / name) == loop
    assert source.loop_of(tmp_path / name, "sft") == "sft"


@pytest.mark.parametrize("name", ["args.yaml", "sft_then_dpo.yaml", "grpoish.yaml"])
def test_a_config_that_does_not_say_its_loop_is_refused(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match="give --loop sft, dpo or grpo"):
        source.loop_of(tmp_path / name)


def test_the_code_that_travels_is_whole_and_nothing_else(tmp_path):
    """What git would ship of the rooms is there, but for notebooks; the user's files stand at the top."""
    outside = tmp_path / "mine"
    (outside / "pkg").mkdir(parents=True)
    (outside / "pkg/.env").write_text("WANDB_API_KEY=x")
    (outside / "pkg/reward.py").write_text("")
    (outside / "args.yaml").write_text("max_steps: 1\n")
    places = source.stage_source(
        tmp_path / "staged", configs=[HOUSE / "configs/grpo.yaml", outside / "args.yaml"], include=[outside / "pkg"]
    )
    assert places == ["configs/grpo.yaml", "configs/args.yaml"]
    files = {str(path.relative_to(tmp_path / "staged")) for path in (tmp_path / "staged").rglob("*") if path.is_file()}
    assert {"loops/grpo.py", "configs/args.yaml", "data/quickstart/model/model.safetensors", "pkg/reward.py"} <= files
    assert {"launch/sagemaker/entry.py", source.REQUIREMENTS} <= files
    assert {file.split("/")[0] for file in files} == {*source.PACKAGES, "pkg"}
    assert not [file for file in files if "/." in file or file.endswith((".pyc", ".ipynb"))]


def test_two_files_of_one_name_are_refused(tmp_path):
    (tmp_path / "grpo.yaml").write_text("")
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="the project has a configs/grpo.yaml already"):
        source.stage_source(tmp_path / "a", configs=[tmp_path / "grpo.yaml"])
    with pytest.raises(ValueError, match="the project has a data already"):
        source.stage_source(tmp_path / "b", configs=[], include=[tmp_path / "data"])


@pytest.mark.parametrize(
    ("instance_type", "gpus"),
    [("ml.p5.48xlarge", 8), ("ml.g6e.4xlarge", 1), ("ml.g5.12xlarge", 4), ("ml.p5en.48xlarge", 8), ("ml.m5.xlarge", 0)],
)
def test_gpus_of_an_instance(instance_type, gpus):
    assert gpus_of(instance_type) == gpus and gpus_of("ml.p9.48xlarge") is None


# The request, from the SDK


@SDK
def test_the_request_of_the_acceptance_command():
    """Every field of it. A change here is a change of what is sent to AWS."""
    request = dry(compute={"instance_type": "ml.p5.48xlarge", "instance_count": 2})
    name = request.pop("TrainingJobName")
    assert re.fullmatch(r"plumbline-grpo-\d{14}", name)
    run = re.fullmatch(
        rf"{BUCKET}/checkpoints/(grpo-\d{{8}}-\d{{6}})-[0-9a-f]{{8}}", request["CheckpointConfig"]["S3Uri"]
    )
    assert run and request.pop("CheckpointConfig")["LocalPath"] == "/opt/ml/checkpoints"
    metrics = request["AlgorithmSpecification"].pop("MetricDefinitions")
    assert [metric["Name"] for metric in metrics] == list(HEADLINE)

    def channel(name_):
        place = f"{BUCKET}/plumbline-grpo/{name}/input/{name_}"
        where = {"S3DataType": "S3Prefix", "S3Uri": place, "S3DataDistributionType": "FullyReplicated"}
        return {"ChannelName": name_, "DataSource": {"S3DataSource": where}, "InputMode": "File"}

    script = "/opt/ml/input/data/sm_drivers/sm_train.sh"
    assert request == {
        "HyperParameters": {},
        "AlgorithmSpecification": {
            "TrainingInputMode": "File",
            "TrainingImage": "763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch:2.13-cu133-amzn2023-sagemaker",
            "ContainerEntrypoint": ["/bin/bash"],
            "ContainerArguments": ["-c", f"chmod +x {script} && {script}"],
        },
        "RoleArn": ROLE,
        "InputDataConfig": [channel("code"), channel("sm_drivers")],
        "OutputDataConfig": {"S3OutputPath": f"{BUCKET}/output", "CompressionType": "NONE"},
        "ResourceConfig": {"InstanceType": "ml.p5.48xlarge", "InstanceCount": 2, "VolumeSizeInGB": 100},
        "StoppingCondition": {"MaxRuntimeInSeconds": DAY},
        "Tags": [{"Key": "plumbline", "Value": "grpo"}, {"Key": "run", "Value": run[1]}],
        "EnableManagedSpotTraining": False,
        "Environment": {"PYTHONPATH": "/opt/ml/input/data/code"},
    }


@SDK
def test_everything_that_can_be_asked_for_is_in_the_request():
    mlflow = "arn:aws:sagemaker:us-east-1:123456789012:mlflow-tracking-server/team"
    request = dry(
        hyperparameters={"learning_rate": 1e-5, "lora_target_modules": ["q_proj", "v_proj"]},
        compute=Compute(
            instance_type="ml.c5.xlarge",
            volume_size_in_gb=50,
            enable_managed_spot_training=True,
            max_runtime_in_seconds=3600,
            max_wait_time_in_seconds=7200,
        ),
        settings=Settings(
            output="s3://mine/below/",
            run_name="sums-1",
            environment={"NCCL_DEBUG": "INFO"},
            tags={"team": "a"},
            subnets=["subnet-1"],
            security_group_ids=["sg-1"],
            encrypt_traffic=True,
            mlflow=mlflow,
            wandb_secret="team/wandb",
            hf_secret="team/hub",
        ),
    )
    assert request["HyperParameters"] == {
        "learning_rate": "1e-05",
        "lora_target_modules": '["q_proj", "v_proj"]',
        "mlflow_uri": mlflow,
        "use_wandb": "true",
        "run_name": "sums-1",
    }
    assert request["Environment"] == {
        "PYTHONPATH": "/opt/ml/input/data/code",
        "NCCL_DEBUG": "INFO",
        SECRETS["WANDB_API_KEY"]: "team/wandb",
        SECRETS["HF_TOKEN"]: "team/hub",
    }
    assert re.fullmatch(r"sums-1-\d{14}", request["TrainingJobName"])
    assert request["AlgorithmSpecification"]["TrainingImage"].endswith("/pytorch:2.13-cpu-amzn2023-sagemaker")
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 3600, "MaxWaitTimeInSeconds": 7200}
    assert request["EnableManagedSpotTraining"] is True
    assert request["VpcConfig"] == {"SecurityGroupIds": ["sg-1"], "Subnets": ["subnet-1"]}
    assert request["EnableInterContainerTrafficEncryption"] is True
    assert request["OutputDataConfig"]["S3OutputPath"] == "s3://mine/below/output"
    assert request["CheckpointConfig"]["S3Uri"].startswith("s3://mine/below/checkpoints/sums-1-")
    assert request["ResourceConfig"]["VolumeSizeInGB"] == 50
    assert {"Key": "team", "Value": "a"} in request["Tags"]
    warm = dry(compute=Compute(keep_alive_period_in_seconds=600))
    assert warm["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 600


def test_a_run_finds_its_own_checkpoints_and_no_other_runs(tmp_path):
    """The prefix is the run's name and this: alike for the same settings, different for any other."""
    (tmp_path / "a.yaml").write_text("seed: 1")
    (tmp_path / "b.yaml").write_text("seed: 2")

    def mark(loop, file, **hyperparameters):
        return fingerprint(loop, str(tmp_path), [file], hyperparameters)

    same = mark("sft", "a.yaml", lora_r=8, seed=1)
    assert re.fullmatch("[0-9a-f]{8}", same) and same == mark("sft", "a.yaml", seed=1, lora_r=8)
    others = [mark("dpo", "a.yaml", lora_r=8, seed=1), mark("sft", "b.yaml", lora_r=8, seed=1), mark("sft", "a.yaml")]
    assert len({same, *others}) == 4
    own, rows = tmp_path / "own.py", tmp_path / "rows"
    rows.mkdir()

    def fed(training: str, text: str, row: str) -> str:
        own.write_text(text)
        (rows / "a.jsonl").write_text(row)
        return fingerprint("sft", str(tmp_path), ["a.yaml"], {}, {"training": training}, [str(own)])

    assert all(fed(place, "1", "") == fed(place, "1", "") for place in ("s3://b/one/", str(rows)))
    cases = [("s3://b/one/", "1", ""), ("s3://b/two/", "1", ""), ("s3://b/one/", "2", "")]
    cases += [(str(rows), "1", "x"), (str(rows), "1", "y")]
    assert len({fed(*case) for case in cases}) == 5


@SDK
def test_a_secret_of_this_machine_never_stands_in_a_request(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    with pytest.raises(ValueError, match="the value of WANDB_API_KEY would stand in clear text"):
        dry(settings=Settings(tags={"note": "key 0123456789abcdef"}))


@SDK
def test_the_worked_example_and_a_flat_args_file():
    channels = {
        "training": "s3://mine/training_data/",
        "models": "s3://mine/models/",
        "inference_testing": "s3://mine/inference_test/",
    }
    request = dry(
        "launch/sagemaker/args.example.yaml", input_data=channels, compute={"instance_type": "ml.g6e.4xlarge"}
    )
    found = {
        channel["ChannelName"]: channel["DataSource"]["S3DataSource"]["S3Uri"] for channel in request["InputDataConfig"]
    }
    assert list(found) == [*channels, "code", "sm_drivers"]
    assert {name: found[name] for name in channels} == channels
    assert request["ResourceConfig"]["InstanceType"] == "ml.g6e.4xlarge"
    with pytest.raises(ValueError, match="no channel is named `training`"):
        dry("launch/sagemaker/args.example.yaml")


@SDK
def test_the_sdks_own_objects_are_understood():
    from sagemaker.core.training.configs import Compute as SdkCompute
    from sagemaker.core.training.configs import InputData

    request = dry(
        input_data=[InputData(channel_name="training", data_source="s3://mine/rows/")],
        compute=SdkCompute(instance_type="ml.g5.12xlarge", instance_count=3, volume_size_in_gb=70),
    )
    assert request["InputDataConfig"][0]["ChannelName"] == "training"
    expected = {"InstanceType": "ml.g5.12xlarge", "InstanceCount": 3, "VolumeSizeInGB": 70}
    assert request["ResourceConfig"] == expected


@MOTO
def test_what_is_sent_is_what_the_dry_run_shows_and_its_code_arrives(tmp_path):
    """Against moto: the same request; the SDK's script has our command, unchanged; a local channel is uploaded."""
    from tests.launch.local_job import capture

    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    given = {"hyperparameters": {"max_steps": 3}, "input_data": {"training": str(tmp_path / "rows.jsonl")}}
    captured = capture(tmp_path / "channels", "configs/grpo.yaml", **given)
    shown = dry(**given, account=Account(captured.request["RoleArn"], "us-east-1"))

    def stable(request):
        text = re.sub(r"-\d{14}|-\d{8}-\d{6}", "-TIME", json.dumps(request))
        return json.loads(re.sub(r"TIME-[0-9a-f]{8}", "TIME-HASH", text))

    assert stable(captured.request) == stable(shown)
    assert (tmp_path / "channels/training/rows.jsonl").read_text().startswith('{"prompt"')
    script = (tmp_path / "channels/sm_drivers/sm_train.sh").read_text()
    command = "exec $SM_PYTHON_CMD -m launch.sagemaker.entry -- loops/grpo.py --config configs/grpo.yaml"
    assert f"\n{command}\n" in script
    assert f"install_requirements.py {source.REQUIREMENTS}" in script
    assert (tmp_path / "channels/code/loops/grpo.py").read_bytes() == (HOUSE / "loops/grpo.py").read_bytes()


@MOTO
def test_a_job_that_aws_took_is_not_called_refused(capsys):
    """The SDK asks for the state of the job that it has just made, and AWS is busy."""
    from tests.launch.local_job import pretended_aws

    def busy(**_):
        answer = {"Error": {"Code": "ThrottlingException", "Message": "Rate exceeded"}}
        return SimpleNamespace(status_code=400, headers={}), {**answer, "ResponseMetadata": {"HTTPStatusCode": 400}}

    with pretended_aws() as session:
        session.events.register("before-call.sagemaker.DescribeTrainingJob", busy)
        job = submit("configs/grpo.yaml", account=Account(ROLE, "us-east-1", session))
        said = capsys.readouterr().err
        assert "its state could not be read" in said and f"submitted as {job.name}" in said
        second = submit("configs/sft.yaml", account=Account(ROLE, "us-east-1", session))  # the SDK's client is old
        taken = session.client("sagemaker").list_training_jobs()["TrainingJobSummaries"]
    assert {found["TrainingJobName"] for found in taken} == {job.name, second.name}
    with pretended_aws() as session:
        session.events.register("before-call.sagemaker.CreateTrainingJob", busy)
        with pytest.raises(ValueError, match="AWS refused: .*Rate exceeded"):
            submit("configs/grpo.yaml", account=Account(ROLE, "us-east-1", session))


@SDK
def test_the_dry_run_prints_json_alone_without_credentials_or_network(tmp_path):
    """The command of the acceptance checks, in a process that can reach nobody and knows no AWS settings."""
    offline = (
        "import socket, runpy, sys\n"
        "def refuse(*_): raise OSError('this test has no network')\n"
        "socket.socket.connect = socket.create_connection = refuse\n"
        "sys.argv[0] = 'submit'\n"
        "runpy.run_module('launch.sagemaker.submit', run_name='__main__')\n"
    )
    words = ["--config", "configs/grpo.yaml", "--instance_type", "ml.p5.48xlarge", "--instance_count", "2"]
    words += ["--role", ROLE, "--region", "us-east-1", "--dry_run", "--learning_rate", "1e-4", "--lora_r=8"]
    keep = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    keep |= {"HOME": str(tmp_path), "PYTHONPATH": str(HOUSE)}
    done = subprocess.run([sys.executable, "-c", offline, *words], cwd=HOUSE, env=keep, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    request = json.loads(done.stdout)
    assert request["HyperParameters"] == {"learning_rate": "1e-4", "lora_r": "8"}
    assert request["ResourceConfig"]["InstanceCount"] == 2
    assert "dry-run" not in done.stdout  # the made-up credentials
    command, line, _, *files = done.stderr.splitlines()
    own = "exec $SM_PYTHON_CMD -m launch.sagemaker.entry -- loops/grpo.py --config configs/grpo.yaml"
    assert command == f"the job executes: {own}"
    assert "accelerate launch --num_machines 2" in line and "--learning_rate=1e-4 --lora_r=8" in line
    assert {"  loops/grpo.py", "  configs/grpo.yaml", "  data/quickstart/train.jsonl"} <= set(files)


# The page and the image


def commands_of(page, module):
    """The arguments of every `python -m MODULE ...` in the page's shell blocks."""
    shell = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.S)).replace("\\\n", " ")
    return [shlex.split(line)[3:] for line in shell.splitlines() if line.startswith(f"python -m {module} ")]


def test_the_pages_commands_and_policies_can_be_read():
    from launch.sagemaker import deploy, invoke

    page = (HOUSE / "docs/sagemaker.md").read_text()
    assert [json.loads(block)["Version"] for block in re.findall(r"```json\n(.*?)```", page, re.S)] == [
        "2012-10-17"
    ] * 2
    submits = commands_of(page, "launch.sagemaker.submit")
    assert len(submits) == 3
    for words in submits:
        command, files, hyperparameters = read_command(words)
        loop = source.loop_of(Path(files[0]), command.settings.loop)
        read_config(loop, [Path(path) for path in files], checks.encode_hyperparameters(hyperparameters))
    for module, positional in ((deploy, ("source",)), (invoke, ("endpoint", "prompt"))):
        found = commands_of(page, module.__name__)
        assert found
        for words in found:
            load_config(module.Command, words, prog="x", positional=positional)


def test_the_dockerfile_copies_what_there_is():
    text = (HOUSE / "launch/Dockerfile").read_text()
    copied = [words.split()[:-1] for words in re.findall(r"^COPY (.*)$", text, re.M)]
    assert all((HOUSE / name).exists() for names in copied for name in names)
    assert set(source.PACKAGES) <= {name for names in copied for name in names}
    setup = configparser.ConfigParser()
    setup.read(HOUSE / "setup.cfg")
    (extras,) = re.findall(r"'\.\[(.*?)\]'", text)
    assert set(extras.split(",")) <= set(setup["options.extras_require"])


def test_the_metrics_are_found_in_the_loops_own_lines():
    """The two kinds of lines that `loops/shared/tracking.py` and `Run.log` write, with the numbers of `.4g`."""
    lines = [
        "step 3/100 loss/nll=1.25 reward/mean=-0.5 optim/learning_rate=1e-05",
        "step 3: eval/loss -0.99, eval/accuracy 1",
    ]
    found = {}
    for name in HEADLINE:
        for line in lines:
            for value in re.findall(metric_pattern(name), line):
                found[name] = float(value)
    expected = {"loss/nll": 1.25, "reward/mean": -0.5, "optim/learning_rate": 1e-5}
    assert found == {**expected, "eval/loss": -0.99, "eval/accuracy": 1.0}
