"""What a run logs: metrics.jsonl always, completions.jsonl and trackers when asked, a progress bar.

`metrics.jsonl` has one JSON object a line: `step` and every metric under its path (`loss/nll`, `time/step`, ...).
JSON has no word for NaN or infinity: such a value is null, and `nonfinite` in the same row says which it was:

    {"step": 7, "loss/nll": null, "optim/grad_norm": 1.5, "nonfinite": {"loss/nll": "nan"}}

Only the main process writes. The others get a `SilentTracker`, so that the loops need not ask which process they are.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

logger = logging.getLogger(__name__)

TRACKERS = ("mlflow", "wandb", "tensorboard")
HEADLINE = (  # shown by the progress bar where the loop has them
    *("loss/nll", "loss/dpo", "loss/policy", "reward/mean", "reward/missing", "reward/accuracy", "eval/loss"),
    *("eval/accuracy", "optim/grad_norm", "optim/learning_rate", "time/step"),
)
CELL_LENGTH = 400  # characters of a prompt or completion that are printed


class Tracker:
    """Writes the run's rows; built by `start_tracking`, on the main process only."""

    def __init__(
        self,
        folder: Path,
        trackers: Sequence[GeneralTracker],
        *,
        resume_step: int | None,
        logging_steps: int,
        total_steps: int | None,
    ) -> None:
        self.trackers = list(trackers)
        self._failed: set[str] = set()  # names of trackers that get no more rows
        self.logging_steps = max(1, logging_steps)
        self.total_steps = total_steps
        cut_rows(folder / "metrics.jsonl", resume_step)
        cut_rows(folder / "completions.jsonl", resume_step)
        self._metrics = open(folder / "metrics.jsonl", "a", encoding="utf-8")
        self._completions = open(folder / "completions.jsonl", "a", encoding="utf-8")
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=resume_step or 0, unit="step", dynamic_ncols=True)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write one row; call it once a step. Values are numbers, or tensors and arrays with one element.

        The trackers get every `logging_steps`-th step, the last one, and every row with an evaluation.
        """
        numbers = {name: number_of(value) for name, value in metrics.items()}
        self._metrics.write(json_row(step, numbers))
        self._metrics.flush()
        if self._is_due(step) or any(name.startswith("eval/") for name in numbers):
            self._send(numbers, step)

    def completions(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Append `rows` (`prompt`, `completion`, `reward` and more, JSON types), and print them cut."""
        for row in rows:
            self._completions.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")
        self._completions.flush()
        if self._bar is not None:
            self._bar.clear()
        print_completions(rows, step)
        if self._bar is not None:
            self._bar.refresh()

    def progress(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show how far the run is: a bar on a terminal, else a line every `logging_steps` steps. `Run.log` says
        evaluations in lines of their own; missing rewards are shown where there are any."""
        numbers = {name: number_of(metrics[name]) for name in HEADLINE if name in metrics}
        numbers = {name: value for name, value in numbers.items() if value or name != "reward/missing"}
        shown = {name: f"{value:.4g}" for name, value in numbers.items() if not name.startswith("eval/")}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif shown and self._is_due(step):
            of_total = f"/{self.total_steps}" if self.total_steps else ""
            print(" ".join([f"step {step}{of_total}", *(f"{k}={v}" for k, v in shown.items())]), file=sys.stderr)

    def finish(self, ok: bool) -> None:
        """Close the files and the trackers; their run is marked as finished, or as failed when not `ok`."""
        if self._bar is not None:
            self._bar.close()
        self._metrics.close()
        self._completions.close()
        for tracker in self.trackers:  # those that failed too: the server may be back, and else MLflow tries at exit
            try:
                end_tracker(tracker, ok)
            except Exception as error:  # the run is over and its files are complete
                level = (
                    logging.INFO if tracker.name in self._failed else logging.WARNING
                )  # quieter where it was dropped before
                logger.log(level, "%s could not be closed: %s", tracker.name, first_line(error))
        self.trackers = []

    def _is_due(self, step: int) -> bool:
        return step % self.logging_steps == 0 or step == self.total_steps

    def _send(self, numbers: Mapping[str, float], step: int) -> None:
        for tracker in self.trackers:
            if tracker.name in self._failed:
                continue
            try:
                row = {mlflow_name(name) if tracker.name == "mlflow" else name: x for name, x in numbers.items()}
                tracker.log(row, step=step)
            except Exception as error:  # a tracker's server must not end a run; each is dropped at its first failure
                self._failed.add(tracker.name)
                logger.warning(
                    "%s failed at step %d and gets no more rows (metrics.jsonl has them all): %s",
                    tracker.name,
                    step,
                    first_line(error),
                )


class SilentTracker:
    """The same calls, doing nothing: what every process but the main one holds."""

    def log(self, *_: Any, **__: Any) -> None:
        """See `Tracker`."""

    completions = progress = finish = log


@dataclass(frozen=True)
class TrackerSettings:
    """Which trackers, and the names that they show; where these are None the trackers' own environment variables
    decide, then `plumbline` and the folder's name."""

    report_to: str | Iterable[str] = "none"
    run_name: str | None = None
    project: str | None = None  # MLflow's experiment and W&B's project
    mlflow_uri: str | None = None
    logging_steps: int = 1


def start_tracking(
    accelerator: Accelerator,
    settings: TrackerSettings,
    *,
    folder: Path | str,
    config: Mapping[str, Any],
    resume_step: int | None = None,
    total_steps: int | None = None,
) -> Tracker | SilentTracker:
    """Open the run's files and trackers in `folder` (made if missing).

    config: the resolved configuration, nested; passwords in its addresses are left out. resume_step: of the checkpoint;
    later rows are cut and the trackers' runs are continued; None starts anew. Raises ValueError when a tracker is
    unknown, not installed, or cannot be started.
    """
    project, run_name, mlflow_uri = settings.project, settings.run_name, settings.mlflow_uri
    names = tracker_names(settings.report_to, mlflow_uri)
    if not accelerator.is_main_process:
        return SilentTracker()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ids = folder / "trackers.json"  # of the trackers' runs, by tracker: a resumed run goes on in the same ones
    known_runs = json.loads(ids.read_text()) if resume_step is not None and ids.exists() else {}
    config = without_passwords(config)
    trackers: list[GeneralTracker] = []
    for name in names:
        with _starting(name, trackers):
            if name == "mlflow":
                trackers.append(start_mlflow(folder, mlflow_uri, project, run_name, config, known_runs))
            elif name == "wandb":
                trackers.append(start_wandb(folder, project, run_name, config, known_runs))
            else:
                trackers.append(start_tensorboard(folder, config, resume_step))
    replace_text(ids, json.dumps(known_runs, indent=2) + "\n")
    steps = settings.logging_steps
    return Tracker(folder, trackers, resume_step=resume_step, logging_steps=steps, total_steps=total_steps)


def tracker_names(report_to: str | Iterable[str], mlflow_uri: str | None = None) -> list[str]:
    """Trackers meant by `report_to` (list or comma list, or none); `mlflow_uri` implies mlflow.

    Raises ValueError naming one that is unknown or not installed.
    """
    given = report_to.split(",") if isinstance(report_to, str) else list(report_to)
    names = [name.strip().lower() for name in given]
    names = list(dict.fromkeys(name for name in names if name not in ("", "none")))
    if mlflow_uri and "mlflow" not in names:
        names.append("mlflow")
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"report_to names {name!r}: choose from {', '.join(TRACKERS)}, or none.")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"report_to names {name}, which is not installed: pip install plumbline[tracking].")
    return names


def check_trackers(report_to: str | Iterable[str], mlflow_uri: str | None) -> None:
    """Raise ValueError where MLflow's server or W&B's does not answer, or lets nobody in. It writes nothing."""
    for name in tracker_names(report_to, mlflow_uri):
        with _starting(name):
            if name == "mlflow":
                import mlflow

                set_mlflow(mlflow_uri)
                if mlflow.is_tracking_uri_set() and re.match(r"(?!file|sqlite)\w+:", mlflow.get_tracking_uri()):
                    mlflow.MlflowClient().search_experiments(max_results=1)
            elif name == "wandb":
                import wandb

                if wandb.setup().settings.mode in ("online", "shared"):
                    wandb.login()


@contextmanager
def _starting(name: str, before: Sequence[GeneralTracker] = ()) -> Iterator[None]:
    """Turn whatever a tracker raises into one sentence; end the trackers that were started before it."""
    try:
        yield
    except Exception as error:
        for started in before:
            end_tracker(started, ok=False)
        raise ValueError(
            f"{name} could not be started ({type(error).__name__}: {first_line(error)}): correct its settings or "
            f"take {name} out of report_to."
        ) from error


def set_mlflow(uri: str | None) -> None:
    """Point MLflow to `uri` (None: leave it), with limits of seconds: its own make training wait for minutes when the
    server goes away."""
    import mlflow
    from mlflow import environment_variables as settings

    if uri is not None:
        mlflow.set_tracking_uri(uri)
        if uri.startswith("file:") and not settings.MLFLOW_ALLOW_FILE_STORE.is_set():
            settings.MLFLOW_ALLOW_FILE_STORE.set(True)  # MLflow 3 refuses file stores unless told twice
    for setting, limit in ((settings.MLFLOW_HTTP_REQUEST_MAX_RETRIES, 2), (settings.MLFLOW_HTTP_REQUEST_TIMEOUT, 10)):
        if not setting.is_set():
            setting.set(limit)


def start_mlflow(
    folder: Path,
    uri: str | None,
    experiment: str | None,
    run_name: str | None,
    config: Mapping[str, Any],
    known_runs: dict[str, str],
) -> GeneralTracker:
    """Start or continue the run on `uri`; without one, on MLflow's own setting, else on `mlflow.db` in the folder.

    An experiment or a run's name that is given wins over MLFLOW_EXPERIMENT_NAME and MLFLOW_RUN_ID.
    """
    import mlflow
    from accelerate.tracking import MLflowTracker
    from mlflow import environment_variables as settings
    from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

    if uri is None and not mlflow.is_tracking_uri_set():
        uri = f"sqlite:///{(folder / 'mlflow.db').resolve()}"
    set_mlflow(uri)
    client = mlflow.MlflowClient()
    known = known_runs.get("mlflow")
    if known is not None:
        try:
            found = client.get_run(known).info.lifecycle_stage
        except mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            found = "not known"
        if found != "active":
            logger.warning("run %s is %s at %s: a new one is started", known, found, mlflow.get_tracking_uri())
            known = None
    elif asked := settings.MLFLOW_RUN_ID.get():
        if experiment or run_name:
            logger.warning("MLFLOW_RUN_ID is not used: mlflow_experiment_name or run_name is given")
        else:
            logger.warning("going on in MLflow's run %s: MLFLOW_RUN_ID says so", asked)
            known = asked
    experiment_id = None if known else find_experiment(client, experiment)
    tracker = MLflowTracker()  # whose `start` prefers the environment to what it is given, and fails on a quote
    tracker.active_run = mlflow.start_run(
        run_id=known,
        experiment_id=experiment_id,
        run_name=run_name or (None if known else folder.resolve().name),  # None keeps the run's own
        nested=tracker.nested_run,
        tags=tracker.tags,
    )
    if known is None:  # a continued run has its parameters, and MLflow lets none be changed
        values = flatten(config)
        cut = {key: str(value)[:MAX_PARAM_VAL_LENGTH] for key, value in values.items()}
        tracker.store_init_configuration({mlflow_name(key): value for key, value in cut.items()})
    known_runs["mlflow"] = tracker.tracker.info.run_id
    return tracker


def find_experiment(client: Any, name: str | None) -> str:
    """Id of MLflow's experiment `name`, made where it is missing. Raises ValueError where it has been deleted."""
    from mlflow import environment_variables as settings

    name = name or settings.MLFLOW_EXPERIMENT_NAME.get()
    if not name and settings.MLFLOW_EXPERIMENT_ID.get():
        return str(settings.MLFLOW_EXPERIMENT_ID.get())
    found = client.get_experiment_by_name(name or "plumbline")
    if found is None:
        return client.create_experiment(name or "plumbline")
    if found.lifecycle_stage == "deleted":
        raise ValueError(f"the experiment {name!r} is deleted: restore it, or give another mlflow_experiment_name")
    return found.experiment_id


def start_wandb(
    folder: Path, project: str | None, run_name: str | None, config: Mapping[str, Any], known_runs: dict[str, str]
) -> GeneralTracker:
    """Start or continue the W&B run; its files are in `wandb_logs`, its mode is the user's WANDB_MODE.

    What is given wins over WANDB_PROJECT, WANDB_NAME and WANDB_RUN_ID.
    """
    import wandb
    from accelerate.tracking import WandBTracker

    logs = folder / "wandb_logs"
    logs.mkdir(exist_ok=True)
    theirs = wandb.setup().settings  # with the environment's values
    known = known_runs.get("wandb") or (theirs.run_id if not (project or run_name) else None)
    project, run_name = project or theirs.project or "plumbline", run_name or theirs.run_name or folder.resolve().name
    tracker = WandBTracker(project, name=run_name, id=known, resume="allow", dir=str(logs))
    tracker.start()
    known_runs["wandb"] = tracker.tracker.id
    tracker.store_init_configuration(dict(config))
    return tracker


def start_tensorboard(folder: Path, config: Mapping[str, Any], resume_step: int | None) -> GeneralTracker:
    """Write events to `tb_logs`; on resume, those past the checkpoint are hidden."""
    from accelerate.tracking import TensorBoardTracker

    purge_step = None if resume_step is None else resume_step + 1
    tracker = TensorBoardTracker("", str(folder / "tb_logs"), purge_step=purge_step)
    tracker.start()
    if resume_step is None:
        scalars = (int, float, str, bool)
        values = {key: value if isinstance(value, scalars) else str(value) for key, value in flatten(config).items()}
        tracker.store_init_configuration(values)
    return tracker


def end_tracker(tracker: GeneralTracker, ok: bool) -> None:
    """Close a tracker; MLflow and W&B are told how the run ended."""
    if tracker.name == "mlflow":
        import mlflow

        mlflow.end_run("FINISHED" if ok else "FAILED")
    elif tracker.name == "wandb":
        tracker.tracker.finish(exit_code=0 if ok else 1)
    else:
        tracker.finish()


def mlflow_name(name: str) -> str:
    """MLflow takes letters, digits and `_ - . : /` and space; anything else (the @ of pass@8) becomes `_`."""
    return re.sub(r"[^\w\-.:/ ]", "_", name)


def number_of(value: Any) -> float:
    """A number out of a number, or out of a tensor or array with one element."""
    number = value.item() if hasattr(value, "item") else value
    assert isinstance(number, (int, float)), f"a metric is a number, not {type(number).__name__}"
    return number


def json_row(step: int, numbers: Mapping[str, float]) -> str:
    """One line of metrics.jsonl: valid JSON whatever the numbers are."""
    nonfinite = {name: str(number) for name, number in numbers.items() if not math.isfinite(number)}
    row = {"step": step, **{name: None if name in nonfinite else number for name, number in numbers.items()}}
    return json.dumps(row | ({"nonfinite": nonfinite} if nonfinite else {}), allow_nan=False) + "\n"


def cut_rows(path: Path, last_step: int | None) -> None:
    """Keep the rows of a .jsonl file up to `last_step` (none when it is None), and no half-written one."""
    if not path.exists():
        return
    kept = []
    if last_step is not None:
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
            except ValueError:  # the empty end of the file, or a line that a kill cut short
                continue
            if row["step"] <= last_step:
                kept.append(line + "\n")
    replace_text(path, "".join(kept))


def replace_text(path: Path, text: str) -> None:
    """Write a file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"learning_rate": 1}} -> {"optim.learning_rate": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def leaf_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"optim": {"learning_rate": 1}} -> {"learning_rate": 1}: the settings of all sections; their names are unique."""
    values: dict[str, Any] = {}
    for name, section in settings.items():
        values |= section if isinstance(section, Mapping) else {name: section}
    return values


def without_passwords(value: Any) -> Any:
    """A text, list or mapping without user and password in its addresses: `http://user:password@host` -> `http://host`.

    For everything that is written or sent on.
    """
    if isinstance(value, Mapping):
        return {key: without_passwords(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_passwords(inner) for inner in value]
    return re.sub(r"(?<=://)[^/\s:@]*:[^/\s]*@", "", value) if isinstance(value, str) else value


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for messages of one sentence."""
    return without_passwords(str(error).strip() or type(error).__name__).splitlines()[0][:300]


def print_completions(rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Print sample completions, long texts cut in the middle."""
    for row in rows:
        print(f"completion at step {step}:", *(f"  {name}: {cell(value)}" for name, value in row.items()), sep="\n")


def printable(text: str) -> str:
    """The text with its control characters, which could steer a terminal, written as `\\x1b`."""
    return "".join(f"\\x{ord(c):02x}" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def cell(value: Any) -> str:
    """A value for the terminal: floats to 4 digits, long texts without their middle."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = printable(str(value))
    if len(text) <= CELL_LENGTH:
        return text
    half = CELL_LENGTH // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
