"""What a run writes about itself, read back from the files and from real trackers."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from configs.loader import load_config
from loops import sft
from loops.shared.tracking import (
    SilentTracker,
    Tracker,
    TrackerSettings,
    check_trackers,
    print_completions,
    start_tracking,
    tracker_names,
    without_passwords,
)

CONFIG = {"optim": {"learning_rate": 1e-5, "betas": [0.9, 0.99]}, "model": {"model_id": "m" * 7000, "revision": None}}


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


def start(accelerator: object, folder: Path, report_to: str = "none", **more: object) -> Tracker:
    names = {"run_name": "trial", "project": "laws", "report_to": report_to}
    names |= {key: more.pop(key) for key in TrackerSettings.__dataclass_fields__ if key in more}
    keys: dict = {"config": CONFIG, **more}
    return start_tracking(accelerator, TrackerSettings(**names), folder=folder, **keys)  # type: ignore[arg-type, return-value]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_row_is_on_disk_as_soon_as_it_is_logged(accelerator: Accelerator, tmp_path: Path) -> None:
    """No finish, no close: what a kill would leave. Tensors and numpy numbers become plain ones."""
    tracker = start(accelerator, tmp_path / "new" / "run", logging_steps=10)
    tracker.log({"loss/nll": torch.tensor(0.5), "tokens/total": 7, "time/step": numpy.float32(0.25)}, 1)
    assert (tmp_path / "new/run/metrics.jsonl").read_text() == (
        '{"step": 1, "loss/nll": 0.5, "tokens/total": 7, "time/step": 0.25}\n'
    )
    tracker.log({"loss/nll": 0.1 + 0.2}, 2)
    assert rows_of(tmp_path / "new/run/metrics.jsonl")[1] == {"step": 2, "loss/nll": 0.1 + 0.2}
    tracker.finish(ok=True)


def test_nonfinite_numbers_stay_valid_json_and_keep_their_name(accelerator: Accelerator, tmp_path: Path) -> None:
    tracker = start(accelerator, tmp_path)
    tracker.log({"a": math.nan, "b": math.inf, "c": torch.tensor(-math.inf), "d": 1.0}, 3)
    tracker.finish(ok=False)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {
        "step": 3, "a": None, "b": None, "c": None, "d": 1.0, "nonfinite": {"a": "nan", "b": "inf", "c": "-inf"}
    }  # fmt: skip


def test_rows_past_the_checkpoint_are_cut_on_resume(accelerator: Accelerator, tmp_path: Path) -> None:
    """Rows 0..4 and half of row 5 (a kill while writing); resumed at 2, the file says 0 1 2, then what comes."""
    tracker = start(accelerator, tmp_path)
    for step in range(5):
        tracker.log({"a": step}, step)
        tracker.completions([{"prompt": "p", "completion": "line\u2028é", "reward": 1.0}], step)
    tracker.finish(ok=False)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "a')
    tracker = start(accelerator, tmp_path, resume_step=2)
    tracker.log({"a": 33}, 3)
    tracker.finish(ok=True)
    assert [(row["step"], row["a"]) for row in rows_of(tmp_path / "metrics.jsonl")] == [(0, 0), (1, 1), (2, 2), (3, 33)]
    kept = (tmp_path / "completions.jsonl").read_text().strip().split("\n")
    assert [json.loads(line)["step"] for line in kept] == [0, 1, 2]


def test_a_new_start_in_a_used_folder_begins_with_empty_files(accelerator: Accelerator, tmp_path: Path) -> None:
    start(accelerator, tmp_path).log({"a": 1}, 1)
    start(accelerator, tmp_path).log({"a": 2}, 1)
    assert rows_of(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 2}]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    tracker = start(SimpleNamespace(is_main_process=False), tmp_path / "run", report_to="tensorboard")
    assert isinstance(tracker, SilentTracker)
    tracker.log({"a": 1.0}, 1)
    tracker.completions([{"prompt": "p"}], 1)
    tracker.progress(1, {"a": 1.0})
    tracker.finish(ok=True)
    assert not (tmp_path / "run").exists()


def test_the_two_trackers_have_the_same_calls() -> None:
    def calls(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert calls(Tracker) == calls(SilentTracker)


def test_completions_are_shown_short_and_stored_whole(
    accelerator: Accelerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1000 characters: 200 + [... 600 characters ...] + 200. Brackets in a prompt are text, not markup."""
    tracker = start(accelerator, tmp_path)
    row = {"prompt": "[bold]2+2[/bold]", "completion": "x" * 1000, "reward": 0.123456}
    tracker.completions([row], 4)
    tracker.completions([], 5)
    tracker.finish(ok=True)
    shown = capsys.readouterr().out
    assert "[bold]2+2[/bold]" in shown and "[... 600 characters ...]" in shown and "0.1235" in shown
    assert shown.count("x") == 400 and "step 4" in shown and "step 5" not in shown
    assert rows_of(tmp_path / "completions.jsonl") == [{"step": 4, **row}]


def test_progress_off_a_terminal_is_a_line_every_logging_steps(
    accelerator: Accelerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = start(accelerator, tmp_path, logging_steps=2, total_steps=5)
    for step in range(1, 6):
        tracker.progress(step, {"loss/nll": step / 3, "policy/kl": 1.0})
    tracker.finish(ok=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["step 2/5 loss/nll=0.6667", "step 4/5 loss/nll=1.333", "step 5/5 loss/nll=1.667"]


def test_progress_on_a_terminal_is_a_bar(
    accelerator: Accelerator, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed at 3 of 4, one step more ends it."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    tracker = start(accelerator, tmp_path, resume_step=3, total_steps=4)
    tracker.progress(4, {"loss/nll": 0.25})
    tracker.completions([{"prompt": "p", "completion": "c", "reward": None}], 4)
    tracker.finish(ok=True)
    shown = capsys.readouterr().err
    assert "4/4" in shown and "loss/nll=0.25" in shown


def test_report_to_is_a_list_or_a_comma_list_and_a_uri_implies_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert tracker_names("none") == tracker_names("") == tracker_names([]) == []
    assert tracker_names("wandb, TensorBoard,wandb") == ["wandb", "tensorboard"]
    assert tracker_names(["mlflow", "wandb"], "http://h") == ["mlflow", "wandb"]
    assert tracker_names("none", "http://h") == ["mlflow"]
    with pytest.raises(ValueError, match="report_to names 'wandbb': choose from mlflow, wandb, tensorboard"):
        tracker_names("wandbb")


def test_a_tracker_that_is_not_installed_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb, which is not installed: pip install plumbline\[tracking\]"):
        tracker_names("wandb")


class RecordingTracker:
    """Takes rows until step `dies_at`, then fails as a server that went away."""

    def __init__(self, name: str, dies_at: float = math.inf) -> None:
        self.name, self.dies_at, self.calls, self.steps, self.finished = name, dies_at, 0, [], False

    def log(self, values: dict, step: int) -> None:
        self.calls += 1
        if step >= self.dies_at:
            raise ConnectionError("server gone\nand a long traceback")
        self.steps.append(step)

    def finish(self) -> None:
        self.finished = True


def test_a_tracker_that_fails_is_dropped_with_one_warning_and_the_run_goes_on(
    accelerator: Accelerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(accelerator, tmp_path)
    bad, good = RecordingTracker("bad", dies_at=2), RecordingTracker("good")
    tracker.trackers = [bad, good]
    with caplog.at_level(logging.WARNING):
        for step in range(1, 5):
            tracker.log({"a": 1.0}, step)
    tracker.finish(ok=True)
    (record,) = caplog.records
    assert "bad failed at step 2" in record.message and record.message.endswith("server gone")
    assert (bad.steps, bad.calls, bad.finished) == ([1], 2, True)
    assert (good.steps, good.finished) == ([1, 2, 3, 4], True)
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_trackers_get_thinned_rows_the_last_one_and_every_evaluation(accelerator: Accelerator, tmp_path: Path) -> None:
    tracker = start(accelerator, tmp_path, logging_steps=4, total_steps=9)
    tracker.trackers = [only := RecordingTracker("only")]
    for step in range(1, 10):
        tracker.log({"eval/loss": 1.0} if step == 6 else {"loss/nll": 1.0}, step)
    tracker.finish(ok=True)
    assert only.steps == [4, 6, 8, 9]
    assert len(rows_of(tmp_path / "metrics.jsonl")) == 9


def test_tensorboard_events_read_back_and_the_cut_rows_are_hidden(accelerator: Accelerator, tmp_path: Path) -> None:
    """Steps 1 2 3 with value 1, resumed at 1: step 2 again with value 2. The reader shows 1 then 2, no step 3."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = start(accelerator, tmp_path, "tensorboard")
    for step in (1, 2, 3):
        tracker.log({"loss/nll": 1.0}, step)
    tracker.finish(ok=False)
    time.sleep(1.1)  # the name of an events file has the second it was opened; the reader takes them in that order
    tracker = start(accelerator, tmp_path, "tensorboard", resume_step=1)
    tracker.log({"loss/nll": 2.0}, 2)
    tracker.finish(ok=True)
    events = EventAccumulator(str(tmp_path / "tb_logs")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/nll")] == [(1, 1.0), (2, 2.0)]
    (settings,) = (tmp_path / "tb_logs").glob("*/hparams.yml")
    assert "optim.betas: '[0.9, 0.99]'" in settings.read_text() and "model.revision: None" in settings.read_text()


def wandb_records(folder: Path) -> list:
    """Records of a finished offline run. W&B's own process writes the file up to a moment after `finish` returns."""
    deadline = time.monotonic() + 300
    while True:
        records = read_wandb_file(folder)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < deadline, f"no end of the run among {len(records)} records"
        time.sleep(0.05)


def read_wandb_file(folder: Path) -> list:
    """An offline run's file is a LevelDB log: blocks of 32 KiB, each record crc(4) length(2) type(1) data."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb_logs/wandb/offline-run-*/run-*.wandb")
    data, at, parts, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + length > len(data):
            break
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


@pytest.mark.tracking
def test_wandb_offline_has_rows_settings_and_the_exit_code(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = start(accelerator, tmp_path, "wandb")
    tracker.log({"loss/nll": 0.5}, 1)
    tracker.log({"loss/nll": 0.25}, 2)
    tracker.finish(ok=False)
    records = wandb_records(tmp_path)
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(row["_step"], row["loss/nll"]) for row in rows] == [(1, 0.5), (2, 0.25)]
    (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("laws", "trial")
    assert run.run_id == json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    (end,) = [r.exit for r in records if r.WhichOneof("record_type") == "exit"]
    assert end.exit_code == 1
    settings = [item.key or item.nested_key[0] for r in records for item in r.config.update]
    assert {"optim", "model"} <= set(settings)


@pytest.mark.tracking
def test_a_tracker_that_cannot_be_reached_is_told_before_weights_are_read(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is dead, and a W&B without a key: nothing but a sentence, in seconds, and no folder. What stays on
    this machine is asked nothing."""
    mlflow = pytest.importorskip("mlflow")
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it keeps the first environment that it has seen
    for key in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_ALLOW_FILE_STORE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(key, "to be put back")
        monkeypatch.delenv(key)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("HOME", str(tmp_path))  # where W&B would find a key
    monkeypatch.setenv("WANDB_MODE", "online")
    shutil.copytree("data/quickstart/model", tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    words = ["--config", "configs/sft.yaml", "--from_scratch", "false", "--model_id", str(tmp_path / "m")]
    words += ["--output_dir", str(tmp_path / "run")]
    with socket.socket() as taken:  # a port on which nobody listens
        taken.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for more, name in ((["--mlflow_uri", dead], "mlflow"), (["--report_to", "wandb"], "wandb")):
            with pytest.raises(ValueError, match=f"{name} could not be started"):
                sft.main(load_config(sft.Config, [*words, *more], prog="sft"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    mlflow.set_tracking_uri(None)
    check_trackers("wandb, mlflow, tensorboard", None)
    check_trackers("none", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(None)
    assert not any((tmp_path / name).exists() for name in ("run", "mlflow.db"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, subprocess.Popen]]:
    """A real MLflow server on a free port, with its rows in sqlite; the client's settings are put back afterwards."""
    mlflow = pytest.importorskip("mlflow")
    for key in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(key, "to be put back")
        monkeypatch.delenv(key)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path / "server"
    home.mkdir()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{home}/mlflow.db"]
    command += ["--artifacts-destination", str(home), "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with open(home / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=1).close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, (home / "log").read_text()[-2000:]
                time.sleep(0.2)
        yield uri, process
    finally:
        stop(process)
        mlflow.end_run()
        mlflow.set_tracking_uri(None)


def stop(process: subprocess.Popen) -> None:
    """End the server and the workers it started (they share its session)."""
    if process.poll() is None:
        os.killpg(process.pid, 9)
        process.wait()


@pytest.mark.tracking
def test_mlflow_server_keeps_one_run_over_a_resume_and_training_outlives_the_server(
    accelerator: Accelerator, tmp_path: Path, server: tuple[str, subprocess.Popen], caplog: pytest.LogCaptureFixture
) -> None:
    """Two parts of a run are one MLflow run with its parameters; then the server dies and the run does not."""
    import mlflow

    uri, process = server
    run_folder = tmp_path / "run"
    tracker = start(accelerator, run_folder, mlflow_uri=uri)
    tracker.log({"loss/nll": 1.0, "eval/pass@8": 0.5}, 1)
    tracker.log({"loss/nll": math.nan}, 2)
    tracker.finish(ok=False)
    client = mlflow.MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'laws'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("trial", "FAILED")
    assert run.data.params["optim.learning_rate"] == "1e-05" and run.data.params["model.revision"] == "None"
    assert run.data.params["model.model_id"] == "m" * 6000
    assert run.data.metrics["eval/pass_8"] == 0.5

    changed = {**CONFIG, "optim": {"learning_rate": 2e-5}}
    tracker = start(accelerator, run_folder, mlflow_uri=uri, resume_step=1, config=changed)
    tracker.log({"loss/nll": 0.5}, 2)
    tracker.finish(ok=True)
    (again,) = client.search_runs([experiment.experiment_id])
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")
    history = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss/nll")]
    assert history[0] == (1, 1.0) and history[-1] == (2, 0.5)

    tracker = start(accelerator, run_folder, mlflow_uri=uri, resume_step=2)
    stop(process)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="loops.shared.tracking"):
        for step in (3, 4):
            tracker.log({"loss/nll": 0.25}, step)
        tracker.finish(ok=True)
    assert time.monotonic() - began < 60
    (record,) = [record for record in caplog.records if record.name == "loops.shared.tracking"]
    assert "mlflow failed at step 3" in record.message
    assert [row["step"] for row in rows_of(run_folder / "metrics.jsonl")] == [1, 2, 3, 4]

    with pytest.raises(ValueError, match="mlflow could not be started.*take mlflow out of report_to"):
        start(accelerator, tmp_path / "other", mlflow_uri=uri)


@pytest.mark.tracking
def test_mlflow_without_a_uri_writes_into_the_run_folder_and_a_file_store_is_taken(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run id that a store does not know (the folder was moved to another server) starts a new run there."""
    mlflow = pytest.importorskip("mlflow")
    for key in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(key, "to be put back")
        monkeypatch.delenv(key)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow.set_tracking_uri(None)
    try:
        for uri, resume_step, file in ((None, None, "mlflow.db"), (f"file:{tmp_path}/store", 0, "../store")):
            tracker = start(accelerator, tmp_path / "run", "mlflow", mlflow_uri=uri, resume_step=resume_step)
            tracker.log({"loss/nll": 0.5}, 1)
            tracker.finish(ok=True)
            run_id = json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]
            assert mlflow.MlflowClient().get_run(run_id).data.metrics["loss/nll"] == 0.5
            assert (tmp_path / "run" / file).exists()
    finally:
        mlflow.set_tracking_uri(None)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store of MLflow's in a file, and nobody's settings."""
    mlflow = pytest.importorskip("mlflow")
    for key in ("URI", "EXPERIMENT_NAME", "EXPERIMENT_ID", "RUN_ID"):
        name = f"MLFLOW_{'TRACKING_' if key == 'URI' else ''}{key}"
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    yield f"sqlite:///{tmp_path}/store.db"
    mlflow.set_tracking_uri(None)


@pytest.mark.tracking
def test_what_is_given_wins_over_the_environment_and_that_over_our_defaults(
    accelerator: Accelerator, tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's experiment and run; a run that MLFLOW_RUN_ID names keeps its name; a quote is a letter."""
    import mlflow

    client = mlflow.MlflowClient(store)

    def run_of(folder: str, **given: object) -> tuple[str, str, str]:
        start(accelerator, tmp_path / folder, mlflow_uri=store, **given).finish(ok=True)
        run = client.get_run(json.loads((tmp_path / folder / "trackers.json").read_text())["mlflow"])
        return client.get_experiment(run.info.experiment_id).name, run.info.run_name, run.info.run_id

    assert run_of("a", project=None, run_name=None)[:2] == ("plumbline", "a")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    other = run_of("b", project=None, run_name=None)
    assert other[:2] == ("theirs", "b")
    assert run_of("c", project="it's mine", run_name="trial")[:2] == ("it's mine", "trial")
    monkeypatch.setenv("MLFLOW_RUN_ID", other[2])
    assert run_of("d", project=None, run_name=None) == other
    mine = run_of("e", project="mine")
    assert mine[0] == "mine" and mine[2] != other[2]
    assert run_of("e", project="mine", resume_step=0) == mine


@pytest.mark.tracking
def test_a_deleted_run_is_replaced_and_a_deleted_experiment_is_named(
    accelerator: Accelerator, tmp_path: Path, store: str
) -> None:
    import mlflow

    client = mlflow.MlflowClient(store)
    start(accelerator, tmp_path / "run", mlflow_uri=store).finish(ok=True)
    first = json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]
    client.delete_run(first)
    start(accelerator, tmp_path / "run", mlflow_uri=store, resume_step=0).finish(ok=True)
    second = json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]
    assert client.get_run(second).info.lifecycle_stage == "active" and second != first
    client.delete_experiment(client.get_run(second).info.experiment_id)
    with pytest.raises(ValueError, match="the experiment 'laws' is deleted: restore it, or give another"):
        start(accelerator, tmp_path / "run", mlflow_uri=store, resume_step=0)


@pytest.mark.tracking
def test_a_password_in_an_address_is_sent_to_no_tracker(accelerator: Accelerator, tmp_path: Path, store: str) -> None:
    import mlflow

    config = {"run": {"mlflow_uri": "http://alice:hunter2@host:80/x", "urls": ["https://a:hunter2@b", "s3://c/d@e"]}}
    start(accelerator, tmp_path / "run", mlflow_uri=store, config=config).finish(ok=True)
    run_id = json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]
    params = mlflow.MlflowClient(store).get_run(run_id).data.params
    assert params == {"run.mlflow_uri": "http://host:80/x", "run.urls": "['https://b', 's3://c/d@e']"}
    assert without_passwords("cannot reach http://alice:hunter2@host") == "cannot reach http://host"


def test_nothing_that_is_printed_can_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Escape sequences of a row or completion are shown as text; line breaks and other alphabets stay."""
    print_completions([{"prompt": "q \x1b[2J\x1b]0;title\x07", "completion": "\x9b31m \r caf\u00e9\n\u4f60"}], 1)
    shown = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown)
    assert r"\x1b[2J" in shown and r"\x9b31m" in shown and "caf\u00e9" in shown and "\u4f60" in shown
