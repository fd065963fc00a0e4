"""The job's entry: from the container's files to the launcher's line, and from signals and errors back to SageMaker."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.loader import load_config
from launch.sagemaker.entry import (
    EFA_INSTANCES,
    EFA_RDMA_INSTANCES,
    Cluster,
    count_processes,
    last_lines,
    launch_command,
    rank_environment,
    read_cluster,
    read_secrets,
)
from launch.sagemaker.folders import JobFolders, hyperparameter_words, loop_words
from launch.sagemaker.rank import FAILURE_LENGTH, describe, write_failure
from loops import dpo, grpo

HOUSE = Path(__file__).resolve().parents[2]
CONFIGS = {"grpo": grpo.Config, "dpo": dpo.Config}


@pytest.fixture(autouse=True)
def from_the_house(monkeypatch):
    monkeypatch.chdir(HOUSE)  # a job's working directory is its copy of the project
    for name in list(os.environ):
        if name.startswith(("SM_", "PLUMBLINE_", "SAGEMAKER_", "TRAINING_JOB_")):
            monkeypatch.delenv(name)


def cluster(hosts: int = 1, current: str = "algo-1", processes: int = 8, kind: str = "ml.p5.48xlarge") -> Cluster:
    names = tuple(sorted(f"algo-{n + 1}" for n in range(hosts)))
    return Cluster(names, current, "eth0", kind, processes)


def write_job(
    base: Path, *, hyperparameters: dict | None = None, hosts=("algo-1",), **channels: list[str]
) -> JobFolders:
    """An /opt/ml with the files of each channel (`{}` where they should hold JSON)."""
    folders = JobFolders(base)
    folders.settings.mkdir(parents=True)
    (folders.settings / "hyperparameters.json").write_text(json.dumps(hyperparameters or {}))
    resources = {"current_host": hosts[0], "hosts": list(hosts), "network_interface_name": "eth0"}
    (folders.settings / "resourceconfig.json").write_text(json.dumps(resources))
    for channel, files in channels.items():
        for name in files:
            path = base / "input/data" / channel / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
    return folders


# The launcher's line


def test_hosts_are_ranked_by_the_order_of_their_names_as_text():
    """Of 11 hosts: algo-1, algo-10, algo-11, algo-2, ...: algo-10 is rank 1, algo-2 rank 3, algo-9 rank 10."""
    ranks = {f"algo-{n}": cluster(11, f"algo-{n}").rank for n in range(1, 12)}
    assert ranks == {"algo-1": 0, "algo-10": 1, "algo-11": 2} | {f"algo-{n}": n + 1 for n in range(2, 10)}


@pytest.mark.parametrize("hosts, processes", [(1, 1), (1, 8), (2, 1), (2, 8), (11, 8)])
def test_the_launchers_own_parser_reads_the_line(hosts, processes):
    parser = pytest.importorskip("accelerate.commands.launch").launch_command_parser()
    words = ["--config", "configs/grpo.yaml", "--max_steps=3"]
    machine = cluster(hosts, f"algo-{hosts}", processes)
    command = launch_command(machine, [], ["launch.sagemaker.rank", "loops/grpo.py", *words])
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    read = parser.parse_args(command[3:])
    assert (read.num_machines, read.machine_rank) == (hosts, sorted(machine.hosts).index(f"algo-{hosts}"))
    assert read.num_processes == hosts * processes and read.multi_gpu == (hosts * processes > 1)
    assert read.main_process_ip == (None if hosts == 1 else "algo-1") and read.main_process_port == 7777
    assert read.module and read.training_script == "launch.sagemaker.rank"
    assert read.training_script_args == ["loops/grpo.py", *words]


def test_a_launchers_file_decides_what_it_is_for():
    """FSDP or DDP comes from it; hosts and processes still come from the job."""
    command = launch_command(cluster(2), ["--config_file", "launch/my.yaml"], ["launch.sagemaker.rank"])
    assert "--multi_gpu" not in command and "--mixed_precision" not in command
    assert command[command.index("--num_processes") + 1] == "16"
    assert command[command.index("--config_file") + 1] == "launch/my.yaml"


def test_one_process_a_gpu_unless_told_otherwise(tmp_path, monkeypatch):
    assert count_processes({"SM_NUM_GPUS": "8"}) == 8
    assert count_processes({"SM_NUM_GPUS": "0"}) == 1
    assert count_processes({"SM_NUM_GPUS": "8", "PLUMBLINE_PROCESSES": "2"}) == 2
    for wrong in ("two", "0", "-1", ""):
        with pytest.raises(ValueError, match="PLUMBLINE_PROCESSES"):
            count_processes({"PLUMBLINE_PROCESSES": wrong})
    monkeypatch.setenv("PATH", str(tmp_path))
    assert count_processes({}) == 1  # no nvidia-smi
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: a)'\necho 'GPU 1: H100 (UUID: b)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert count_processes({}) == 2


def test_without_its_files_the_toolkits_variables_are_read(tmp_path):
    environment = {"SM_HOSTS": '["algo-2", "algo-1"]', "SM_CURRENT_HOST": "algo-2", "SM_NUM_GPUS": "4"}
    environment |= {"SM_CURRENT_INSTANCE_TYPE": "ml.p4d.24xlarge", "SM_NETWORK_INTERFACE_NAME": "ens5"}
    found = read_cluster(JobFolders(tmp_path), environment)
    assert found == Cluster(("algo-1", "algo-2"), "algo-2", "ens5", "ml.p4d.24xlarge", 4)
    assert (found.rank, found.total) == (1, 8)
    assert read_cluster(JobFolders(tmp_path), {"SM_NUM_GPUS": "1"}).hosts == ("localhost",)


def test_efa_is_set_up_where_an_instance_has_it():
    both = {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1", "RDMAV_FORK_SAFE": "1"}
    for kind in ("p4d.24xlarge", "p5.48xlarge", "p5en.48xlarge", "p6-b200.48xlarge", "p6-b300.48xlarge"):
        assert both.items() <= rank_environment(cluster(kind=f"ml.{kind}"), {}).items()
    g5 = rank_environment(cluster(kind="ml.g5.48xlarge"), {})
    assert g5["FI_PROVIDER"] == "efa" and "FI_EFA_USE_DEVICE_RDMA" not in g5
    assert "FI_PROVIDER" not in rank_environment(cluster(kind="ml.g6e.4xlarge"), {})  # NCCL would wait for it for ever


def test_the_torchrun_drivers_lists_are_part_of_ours():
    drivers = pytest.importorskip("sagemaker.train.container_drivers.common.utils")
    assert set(drivers.SM_EFA_NCCL_INSTANCES) <= EFA_INSTANCES
    assert set(drivers.SM_EFA_RDMA_INSTANCES) <= EFA_RDMA_INSTANCES


def test_the_jobs_own_environment_is_kept_and_the_code_can_be_imported():
    own = {"NCCL_PROTO": "LL128", "PYTHONPATH": f"/mine{os.pathsep}{HOUSE}", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}
    found = rank_environment(cluster(2), own)
    assert found["NCCL_PROTO"] == "LL128" and found["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "60"
    assert found["PYTHONPATH"].split(os.pathsep) == [str(HOUSE), "/mine"]
    assert found["NCCL_SOCKET_IFNAME"] == found["GLOO_SOCKET_IFNAME"] == "eth0"
    plain = rank_environment(cluster(), {})
    assert 30 < int(plain["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < 120  # the launcher's default; SageMaker's grace period
    assert plain["NCCL_PROTO"] == "simple" and "GLOO_SOCKET_IFNAME" not in plain


# Hyperparameters


def test_both_typings_of_hyperparameters_give_the_same_config():
    """The same settings as bare text, as JSON (SDK v3, and v2 with its quotes), as Python's repr, with hyphens."""
    bare = {"run_name": "a b", "learning_rate": "2e-4", "load_in_4bit": "false", "lora_target_modules": "q_proj,v_proj"}
    bare |= {"max_steps": "7", "field_mapping": "prompt=question", "reward_functions": "length,format", "lora_r": "8"}
    quoted = {
        "run-name": '"a b"',
        "learning-rate": "0.0002",
        "load-in-4bit": "false",
        "max_steps": "7",
        "lora_rank": "8",
    }
    quoted |= {"lora-target-modules": '["q_proj", "v_proj"]', "field_mapping": '{"prompt": "question"}'}
    quoted |= {"reward_functions": '["length", "format"]', "sagemaker_program": '"entry.py"', "sagemaker_region": "x"}
    python = {"run_name": "'a b'", "learning_rate": "0.0002", "load_in_4bit": "False", "max_steps": "7", "lora_r": "8"}
    python |= {"lora_target_modules": "['q_proj', 'v_proj']", "field_mapping": "{'prompt': 'question'}"}
    python |= {"reward_functions": "['length', 'format']"}
    configs = [load_config(grpo.Config, hyperparameter_words(given), prog="x") for given in (bare, quoted, python)]
    assert configs[0].run.run_name == "a b" and configs[0].model.lora_r == 8
    assert configs[1].model.lora_target_modules == ["q_proj", "v_proj"]
    for config in configs[1:]:
        assert (config.optim, config.data) == (configs[0].optim, configs[0].data)
        assert config.reward.names == configs[0].reward.names == ["length", "format"]
        assert (config.run, config.model.load_in_4bit) == (configs[0].run, configs[0].model.load_in_4bit)


def test_the_hyperparameter_config_is_a_file_under_the_commands_own(tmp_path):
    words = hyperparameter_words({"max_steps": "3", "config": '"configs/grpo.yaml"'})
    assert words == ["--config", "configs/grpo.yaml", "--max_steps=3"]
    own = tmp_path / "own.yaml"
    own.write_text("max_steps: 5\nseed: 1\n")
    folders = write_job(tmp_path / "ml")
    line = loop_words(["--config", str(own)], {"config": "configs/grpo.yaml"}, folders, loop="grpo", log=print)
    config = load_config(grpo.Config, line, prog="x")
    assert (config.run.max_steps, config.run.seed, config.loss_type) == (5, 1, "dapo")


def test_the_command_wins_over_hyperparameters_and_these_over_files(tmp_path):
    words = ["--config", "configs/grpo.yaml", "--seed", "9"]
    line = loop_words(words, {"seed": "8", "max_steps": "8"}, write_job(tmp_path), loop="grpo", log=print)
    run = load_config(grpo.Config, line, prog="x").run
    assert (run.seed, run.max_steps, run.log_completions_steps) == (9, 8, 50)


# Channels and folders


def config_of(
    folders: JobFolders, *words: str, loop: str = "grpo", said: list[str] | None = None, **hyperparameters: str
):
    log = (said if said is not None else []).append
    line = loop_words(list(words), hyperparameters, folders, loop=loop, log=log)
    return load_config(CONFIGS[loop], line, prog=f"loops/{loop}.py")


def test_checkpoints_go_where_sagemaker_saves_them_and_a_restart_resumes(tmp_path):
    folders = write_job(tmp_path)
    run = config_of(folders, "--config", "configs/grpo.yaml").run
    assert (run.output_dir, run.resume_from) == (str(tmp_path / "checkpoints"), "latest")
    said: list[str] = []
    run = config_of(folders, "--resume_from", "none", said=said, output_dir="runs/mine").run
    assert (run.output_dir, run.resume_from) == (str(tmp_path / "checkpoints"), "none") and "runs/mine" in said[0]
    for inside in (str(tmp_path / "checkpoints/mine"), str(tmp_path / "input/data/fsx/run")):
        assert config_of(folders, "--output_dir", inside).run.output_dir == inside


def test_a_run_has_the_jobs_name_unless_it_is_given_one(tmp_path, monkeypatch):
    """The run's folder, whose name is the loops' default, has the same name in every job."""
    monkeypatch.setenv("TRAINING_JOB_NAME", "sums-20261128")
    folders, named = write_job(tmp_path), tmp_path / "named.yaml"
    assert config_of(folders, "--config", "configs/grpo.yaml").run.run_name == "sums-20261128"
    named.write_text("run:\n  run_name: mine\n")
    assert config_of(folders, "--config", str(named)).run.run_name == "mine"
    assert config_of(folders, run_name="theirs").run.run_name == "theirs"


def test_every_channel_becomes_its_key(tmp_path):
    folders = write_job(tmp_path, training=["cars.json"], validation=["a.jsonl", "b.jsonl"], models=["config.json"])
    config = config_of(folders, "--config", "configs/grpo.yaml")
    data = tmp_path / "input/data"
    assert config.data.dataset_name == str(data / "training/cars.json")  # the only file
    assert config.data.eval_dataset_name == str(data / "validation")
    assert config.model.model_id == str(data / "models")
    assert config.rollout.num_generations == 8  # everything else as the file says


def test_dpo_reads_preferences_before_training(tmp_path):
    folders = write_job(tmp_path, training=["rows.jsonl"], preferences=["pairs.jsonl"])
    assert config_of(folders, loop="dpo").data.dataset_name.endswith("preferences/pairs.jsonl")
    assert config_of(folders, loop="grpo").data.dataset_name.endswith("training/rows.jsonl")


@pytest.mark.parametrize(
    "named, section",
    [
        ("dataset_name: data/mine/cars.jsonl\n", ""),
        ("dataset_name: data/mine/cars.jsonl\n", "data:\n  "),
        ("train_dataset_path: data/mine/cars.jsonl\n", ""),
        ("", ""),
        ("", "data:\n  "),
    ],
)
def test_a_channel_moves_the_rows_and_keeps_their_templates(named, section, tmp_path):
    """Whether the file names the data set, in a section or flat, by another project's word, or leaves it out."""
    own = tmp_path / "own.yaml"
    indent = section.rpartition("\n")[2]
    own.write_text(
        f"{section}{named and named + indent}input_template: 'Q: {{question}}'\n{indent}max_train_samples: 5\n"
    )
    folders = write_job(tmp_path / "ml", training=["cars.jsonl", "boats.jsonl"])
    data = config_of(folders, "--config", str(own)).data
    assert data.dataset_name == str(tmp_path / "ml/input/data/training" / ("cars.jsonl" if named else ""))
    assert (data.input_template, data.max_train_samples) == ("Q: {question}", 5)
    if named:  # and as hyperparameters
        data = config_of(folders, dataset_name="somewhere/cars.jsonl", input_template="{q} =").data
        assert (Path(data.dataset_name).name, data.input_template) == ("cars.jsonl", "{q} =")


def test_a_config_that_names_the_jobs_folders_is_left_alone(tmp_path):
    folders = write_job(tmp_path, training=["a.jsonl"], models=["one/config.json", "two/config.json"])
    rows, model = str(tmp_path / "input/data/other/b.jsonl"), str(tmp_path / "input/data/models/two")
    config = config_of(folders, "--dataset_name", rows, "--model_id", model, "--eval_dataset_name", rows)
    assert (config.data.dataset_name, config.data.eval_dataset_name, config.model.model_id) == (rows, rows, model)


def test_evaluation_rows_of_other_rows_are_not_used(tmp_path, capsys):
    """The quickstart's held-out sums say nothing about cars; a file of the same name in the channel does."""
    folders = write_job(tmp_path / "a", training=["cars.json"])
    assert config_of(folders, "--config", "configs/grpo.yaml").data.eval_dataset_name is None
    assert "validation" in capsys.readouterr().err.splitlines()[-1]
    folders = write_job(tmp_path / "b", training=["train.jsonl", "heldout.jsonl"])
    data = config_of(folders, "--config", "configs/grpo.yaml").data
    assert (Path(data.dataset_name).name, Path(data.eval_dataset_name).name) == ("train.jsonl", "heldout.jsonl")
    assert config_of(write_job(tmp_path / "c"), "--config", "configs/grpo.yaml").data.eval_dataset_name


def test_the_models_channel_says_which_model(tmp_path, capsys):
    inside = tmp_path / "ml/input/data/models"
    folders = write_job(tmp_path / "ml", models=["qwen3/config.json", "qwen3/model.safetensors"])
    assert config_of(folders, model_name="Qwen/Qwen3-0.6B").model.model_id == str(inside / "qwen3")
    (inside / "llama").mkdir()
    (inside / "llama/adapter_config.json").write_text("{}")
    assert config_of(folders, model_id="some/llama").model.model_id == str(inside / "llama")
    for place, sentence in {
        folders: "several models .llama, qwen3.*model_id",
        write_job(tmp_path / "none", models=["weights.bin"]): "holds no model",
    }.items():
        with pytest.raises(SystemExit):
            config_of(place)
        assert re.search(sentence, capsys.readouterr().err)


def test_a_config_that_cannot_be_read_is_one_sentence(tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("a: 1\na: 2\n")
    folders = write_job(tmp_path / "ml", training=["a.jsonl"])
    message = "^loops/grpo.py: .*own.yaml: the YAML cannot be read: `a` stands there twice in line 1 and in line 2.$"
    with pytest.raises(SystemExit):
        config_of(folders, "--config", str(tmp_path / "own.yaml"))
    assert re.search(message, capsys.readouterr().err)


# The failure file


def run_rank(base: Path, script: str, **environment: str) -> subprocess.CompletedProcess:
    (base / "loop.py").write_text(script)
    variables = {**os.environ, "SAGEMAKER_BASE_DIR": str(base), "PYTHONPATH": str(HOUSE), **environment}
    words = [sys.executable, "-m", "launch.sagemaker.rank", "loop.py", "--key=value"]
    return subprocess.run(words, env=variables, capture_output=True, text=True, cwd=base)


def test_the_failure_file_has_the_scripts_own_traceback(tmp_path):
    script = "def reward():\n    return 1 / 0  # the user's line\n"
    script += "import sys\nassert sys.argv == ['loop.py', '--key=value']\nreward()\n"
    done = run_rank(tmp_path, script, RANK="3", WORLD_SIZE="8", SM_CURRENT_HOST="algo-2")
    text = (tmp_path / "output/failure").read_text()
    assert text.startswith("rank 3 of 8 on algo-2: ZeroDivisionError: division by zero\nTraceback")
    assert "loop.py\", line 2, in reward\n    return 1 / 0  # the user's line" in text
    assert "runpy" not in text and "rank.py" not in text  # not ours
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_one_sentence_errors_are_that_sentence(tmp_path):
    script = "try:\n    raise ValueError('max_steps is -1; give 1 or more.')\n"
    script += "except ValueError:\n    raise SystemExit(2) from None\n"
    assert run_rank(tmp_path, script).returncode == 2
    text = (tmp_path / "output/failure").read_text()
    assert text.endswith("ValueError: max_steps is -1; give 1 or more.")


@pytest.mark.parametrize("code", [0, 143])
def test_a_run_that_ended_or_was_stopped_is_no_failure(code, tmp_path):
    assert run_rank(tmp_path, f"raise SystemExit({code})").returncode == code
    assert not (tmp_path / "output/failure").exists()


def test_the_first_error_stays(tmp_path):
    write_failure("first", tmp_path / "failure")
    write_failure("second", tmp_path / "failure")
    assert (tmp_path / "failure").read_text().endswith("first")


def test_a_long_traceback_keeps_its_beginning_and_its_end(tmp_path):
    def deep(n: int):
        return 1 / 0 if n == 0 else deep(n - 1) if n % 2 else deep(n - 1) + 1

    try:
        deep(200)
    except ZeroDivisionError as error:
        write_failure(describe(error), tmp_path / "failure")
    text = (tmp_path / "failure").read_text()
    assert len(text) <= FAILURE_LENGTH and text.rstrip().endswith("ZeroDivisionError: division by zero")
    assert "return 1 / 0" in text and text.partition("\n")[0].endswith("ZeroDivisionError: division by zero")


SEVERAL = """W1121 00:39:20.926000 17116 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 17127
E1121 00:39:20.938000 17116 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: {code}) \
local_rank: 0 (pid: 17126) of binary: /usr/bin/python
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
"""
ALONE = """Traceback (most recent call last):
  File "<frozen runpy>", line 88, in _run_code
  File "/site-packages/accelerate/commands/launch.py", line 999, in simple_launcher
    raise subprocess.CalledProcessError(returncode=process.returncode, cmd=cmd)
subprocess.CalledProcessError: Command '['python', 'loop.py']' died with <Signals.{name}: 9>.
"""


def test_the_launchers_report_does_not_hide_the_ranks_last_words():
    """Both as torch 2.13 and accelerate 1.15 write them; a rank's own warning with a traceback stays."""
    rank = 'a warning\nTraceback (most recent call last):\n  File "reward.py", line 2\nKeyError: 1\nrank 3 is gone\n'
    said = last_lines(rank + SEVERAL.format(code=7))
    assert said == "(failed (exitcode: 7) local_rank: 0) the last lines were:\n" + rank.strip()
    for report in (SEVERAL.format(code=-9), ALONE.format(name="SIGKILL")):
        said = last_lines(rank + report)
        assert "out of memory" in said and said.endswith("rank 3 is gone") and "launch.py" not in said
    assert last_lines("").strip() == ""


def test_a_rank_that_only_lost_another_says_so():
    text = describe(RuntimeError("[gloo] Connection closed by peer [10.0.0.2]:3391"))
    assert text.startswith("lost contact with another rank")


# The whole entry, in front of a launcher that starts one rank as accelerate's does: it waits, and hands no signal on

LAUNCHER = """
import os, pathlib, subprocess, sys
words = sys.argv[sys.argv.index("--module") + 1:]
if words[0] == "launch.evaluate":
    assert sys.argv[sys.argv.index("--num_processes") + 1] == "1"
    pathlib.Path(words[1], "evaluated").write_text(" ".join(words))
    sys.exit(int(os.environ.get("EVALUATION_CODE", "0")))
sys.exit(subprocess.run([sys.executable, "-m", *words]).returncode)
"""
LOOP = """
import pathlib, signal, sys, time
folder = pathlib.Path([word for word in sys.argv if word.startswith("--output_dir=")][-1].partition("=")[2])
folder.mkdir(parents=True, exist_ok=True)
got = []
def stop(*_):
    got.append(1)
    (folder / "signals").write_text(str(len(got)))
signal.signal(signal.SIGTERM, stop)
(folder / "config.yaml").write_text(" ".join(sys.argv))
"""
ENDS = '(folder / "model/part").mkdir(parents=True)\n(folder / "model/config.json").write_text("{}")\n'
WAITS = "for _ in range(100):\n    time.sleep(0.1)\n    if got: break\ntime.sleep(0.5)\nsys.exit(143)\n"
NEVER = "while len(got) < 2:\n    time.sleep(0.1)\nsys.exit(143)\n"
SECRETS_MANAGER = """
class client:
    def __init__(self, service, region_name):
        assert (service, region_name) == ("secretsmanager", "us-east-1")
    def get_secret_value(self, SecretId):
        return {"SecretString": {"wandb": '{"WANDB_API_KEY": "k-123"}'}[SecretId]}
"""


def start_entry(base: Path, loop: str, *words: str, by_path: bool = False, **environment: str) -> subprocess.Popen:
    package = base / "fake/accelerate/commands"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "launch.py").write_text(LAUNCHER)
    (base / "fake/boto3.py").write_text(SECRETS_MANAGER)
    (base / "grpo.py").write_text(LOOP + loop)
    entry = [str(HOUSE / "launch/sagemaker/entry.py")] if by_path else ["-m", "launch.sagemaker.entry"]
    variables = {"SAGEMAKER_BASE_DIR": str(base), "PYTHONPATH": str(base / "fake"), "SM_NUM_GPUS": "0", **environment}
    return subprocess.Popen(
        [sys.executable, *entry, *words],
        env={**os.environ, **variables},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_job_that_trains_to_its_end_leaves_a_model_and_its_records(tmp_path):
    write_job(tmp_path, hyperparameters={"max-steps": "3"})
    job = start_entry(tmp_path, ENDS, "--", str(tmp_path / "grpo.py"), "--config", "configs/grpo.yaml")
    said = job.communicate()[1]
    assert job.returncode == 0, said
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "part"}
    assert not (tmp_path / "checkpoints/model").exists()  # else it would be uploaded twice
    arguments = (tmp_path / "output/data/config.yaml").read_text()
    assert "--config configs/grpo.yaml --max_steps=3 --output_dir=" in arguments and not (tmp_path / "failure").exists()
    assert "accelerate launch --num_machines 1 --machine_rank 0 --num_processes 1" in said and "PID 1" not in said


@pytest.mark.parametrize("code", ["0", "1"])
def test_inference_tests_follow_the_training_and_cannot_lose_the_model(code, tmp_path):
    write_job(tmp_path, inference_testing=["rows.jsonl"])
    job = start_entry(tmp_path, ENDS, "--", str(tmp_path / "grpo.py"), EVALUATION_CODE=code)
    said = job.communicate()[1]
    assert job.returncode == 0 and ("exit code 1" in said) == (code == "1"), said
    run, rows, output = (tmp_path / name for name in ("checkpoints", "input/data/inference_testing", "output/data"))
    words = (run / "evaluated").read_text()
    assert words == f"launch.evaluate {run} --dataset_name {rows} --output {output}/inference_testing"
    assert (tmp_path / "model/config.json").exists() and not (tmp_path / "output/failure").exists()


def test_one_sigterm_reaches_a_rank_alone_in_its_launcher_once(tmp_path):
    write_job(tmp_path)
    job = start_entry(tmp_path, WAITS, "--", str(tmp_path / "grpo.py"), TRAINING_JOB_NAME="job")
    wait_for(tmp_path / "checkpoints/config.yaml")
    job.send_signal(signal.SIGTERM)
    began = time.monotonic()
    said = job.communicate()[1]
    assert job.returncode == 143 and time.monotonic() - began < 10, said
    assert (tmp_path / "checkpoints/signals").read_text() == "1"
    assert not (tmp_path / "output/failure").exists()
    assert "not PID 1" in said and "exec" in said
    assert (tmp_path / "output/data/config.yaml").exists()


def test_a_second_sigterm_reaches_it_too(tmp_path):
    write_job(tmp_path)
    job = start_entry(tmp_path, NEVER, "--", str(tmp_path / "grpo.py"))
    wait_for(tmp_path / "checkpoints/config.yaml")
    for number in ("1", "2"):
        job.send_signal(signal.SIGTERM)
        wait_for(tmp_path / "checkpoints/signals", number)
    job.communicate()
    assert job.returncode == 143


def test_a_rank_that_dies_without_a_word_is_told_by_its_last_lines(tmp_path):
    write_job(tmp_path)
    script = "print('out of luck', file=sys.stderr, flush=True)\nimport os\nos._exit(9)\n"
    job = start_entry(tmp_path, script, "--", str(tmp_path / "grpo.py"))
    assert "out of luck" in job.communicate()[1] and job.returncode == 9
    text = (tmp_path / "output/failure").read_text()
    assert "exit code 9" in text and text.endswith("out of luck") and len(text) <= FAILURE_LENGTH


def test_a_job_without_a_model_is_no_success(tmp_path):
    """Such as one whose reward calls exit()."""
    write_job(tmp_path)
    job = start_entry(tmp_path, "print('bye', file=sys.stderr)\nsys.exit(0)\n", "--", str(tmp_path / "grpo.py"))
    assert job.communicate() and job.returncode == 1
    assert "left no model" in (tmp_path / "output/failure").read_text()


def test_bad_settings_end_the_job_before_anything_starts(tmp_path):
    write_job(tmp_path)
    job = start_entry(tmp_path, ENDS, "--", str(tmp_path / "grpo.py"), PLUMBLINE_PROCESSES="many")
    assert job.communicate() and job.returncode == 2
    assert "PLUMBLINE_PROCESSES is 'many'" in (tmp_path / "output/failure").read_text()
    assert not (tmp_path / "checkpoints").exists()


def test_the_toolkit_starts_it_by_its_path_with_hyperparameters_as_arguments(tmp_path):
    """sagemaker-training runs `python ENTRY --key value ...`; the same stands in hyperparameters.json."""
    script = str(tmp_path / "grpo.py")
    write_job(tmp_path, hyperparameters={"loop": json.dumps(script), "use_dora": "true", "sagemaker_program": '"e.py"'})
    job = start_entry(tmp_path, ENDS, "--loop", script, "--use_dora", "True", by_path=True)
    said = job.communicate()[1]
    assert job.returncode == 0, said
    arguments = (tmp_path / "output/data/config.yaml").read_text()
    assert "--use_dora=true" in arguments and "--loop" not in arguments and "sagemaker_program" not in arguments


def test_without_its_file_hyperparameters_come_from_the_toolkits_variable(tmp_path):
    write_job(tmp_path)
    (tmp_path / "input/config/hyperparameters.json").unlink()
    given = json.dumps({"learning-rate": 2e-4, "lora_target_modules": ["q_proj"], "use_dora": True})
    job = start_entry(tmp_path, ENDS, "--", str(tmp_path / "grpo.py"), SM_HPS=given)
    assert job.communicate() and job.returncode == 0
    arguments = (tmp_path / "output/data/config.yaml").read_text()
    assert '--learning_rate=0.0002 --lora_target_modules=["q_proj"] --use_dora=true' in arguments


def test_a_secret_reaches_the_ranks_and_no_log(tmp_path):
    write_job(tmp_path)
    script = "import os\n(folder / 'key').write_text(os.environ['WANDB_API_KEY'])\n" + ENDS
    words = ["--", str(tmp_path / "grpo.py")]
    job = start_entry(tmp_path, script, *words, PLUMBLINE_WANDB_SECRET="wandb", AWS_REGION="us-east-1")
    out, said = job.communicate()
    assert job.returncode == 0 and "k-123" not in out + said, said
    assert (tmp_path / "checkpoints/key").read_text() == "k-123"


def test_a_secret_that_cannot_be_read_is_one_sentence_without_values(monkeypatch, tmp_path):
    (tmp_path / "boto3.py").write_text("def client(*a, **k): raise RuntimeError('AccessDenied')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ValueError, match="PLUMBLINE_HF_SECRET names the secret hub, .*AccessDenied"):
        read_secrets({"PLUMBLINE_HF_SECRET": "hub"})
    assert read_secrets({"PLUMBLINE_HF_SECRET": "hub", "HF_TOKEN": "set already"}) == {}


def test_what_runs_before_the_ranks_needs_the_standard_library_only():
    files = (
        "launch/sagemaker/entry",
        "launch/sagemaker/rank",
        "launch/sagemaker/folders",
        "configs/channels",
        "configs/arguments",
    )
    for name in files:
        tree = ast.parse((HOUSE / f"{name}.py").read_text())
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for module in modules:
                ours = module.replace(".", "/") in files
                assert ours or module.partition(".")[0] in sys.stdlib_module_names, (name, module)


def wait_for(path: Path, content: str | None = None, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() or (content and path.read_text() != content):
        assert time.monotonic() < deadline, path
        time.sleep(0.05)
