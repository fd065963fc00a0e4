"""What people see of a run: the README's own lines, and nothing of other packages around them."""

import json
import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from loops.shared.run import _quieten, one_sentence_errors

HOUSE = Path(__file__).resolve().parents[2]
OURS = ("training prompts: ", "evaluation prompts: ", "trains ", "packing: ", "1 process", "step ", "model ", "eval/")


def test_the_loops_and_the_losses_fit_100_columns():
    """What people read side by side."""
    files = [*(HOUSE / "loops").glob("*.py"), *(HOUSE / "losses").glob("*.py")]
    assert not [(path.name, line) for path in files for line in path.read_text().split("\n") if len(line) > 100]


def start(*more: str) -> subprocess.CompletedProcess:
    """README's first line without its installation, with more options; both streams as one text."""
    line = re.search(r"pip install -e \. && accelerate launch (.*)", (HOUSE / "README.md").read_text())[1]
    words = [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(line), *more]
    return subprocess.run(words, cwd=HOUSE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_first_line_of_the_readme_shows_our_lines_only(tmp_path):
    """And each evaluation as one line, before training and after, without a loss that is minus a reward."""
    few = ["--prompts_per_step", "2", "--max_completion_length", "8", "--max_eval_samples", "8", "--lora_r", "2"]
    done = start("--max_steps", "1", "--log_completions_steps", "0", "--output_dir", str(tmp_path / "run"), *few)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith(OURS)] == []
    assert lines[0].startswith("training prompts: ")
    assert [sum(line.startswith(f"step {step}: eval/") for line in lines) for step in (0, 1)] == [1, 1]
    assert sum("eval/" in line for line in lines) == 3 and "eval/loss" not in done.stdout


def test_a_sentence_about_an_error_is_all_that_the_readmes_line_shows_then():
    done = start("--learing_rate", "1")
    assert done.returncode == 1  # the launcher's; the run's own is 2
    assert done.stdout == (
        "loops/grpo.py: the command line: unknown key `learing_rate`: did you mean `learning_rate`?\n"
    )


def test_of_several_processes_one_says_the_sentence_and_the_launcher_ends_with_it(tmp_path):
    """Nothing stands before it, and torchrun's closing block has it as the reason, whichever process ended first."""
    (tmp_path / "file").write_text("")
    words = ["--config_file", "launch/cpu_ddp.yaml", "--main_process_port", "0", "loops/sft.py"]
    words += ["--config", "configs/sft.yaml", "--output_dir", str(tmp_path)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *words]
    done = subprocess.run(command, cwd=HOUSE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sentence = f"loops/sft.py: error: output_dir {tmp_path} already holds files (file): give another, or resume_from: "
    sentence += "latest."
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and lines[0] == sentence and lines.count(sentence) == 1, done.stdout
    assert lines[-2].split(" : ", 1) == ["  traceback", sentence] and "<N/A>" not in done.stdout


@pytest.mark.parametrize(("local_rank", "printed"), [("0", 1), ("1", 0)])
def test_the_launcher_is_left_the_reason(local_rank, printed, tmp_path, monkeypatch, capsys):
    """Without it every process prints the sentence; what is unexpected keeps its traceback."""
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv("RANK", "8")
    file = tmp_path / "error.json"
    for expected in (True, False):
        if expected:
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        else:
            monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
        with pytest.raises(SystemExit) as ended, one_sentence_errors("loops/sft.py") as prints:
            raise FloatingPointError("NaN")
        assert ended.value.code == 1 and capsys.readouterr().err.count("NaN") == (printed if expected else 1)
        assert prints == (bool(printed) or not expected)
        assert json.loads(file.read_text())["message"]["message"] == "loops/sft.py: error: NaN"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(ZeroDivisionError), one_sentence_errors("loops/sft.py"):
        raise ZeroDivisionError("no number")
    assert json.loads(file.read_text())["message"]["message"] == "ZeroDivisionError: no number"


@pytest.mark.parametrize("watched", [True, False])
def test_a_download_shows_how_far_it_is_where_somebody_watches(watched, monkeypatch):
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    monkeypatch.setattr(sys.stderr, "isatty", lambda: watched)
    level = logging.getLogger("loops").level
    for is_main in (True, False):
        enable_progress_bars()
        _quieten(is_main)
        assert are_progress_bars_disabled() == (not (watched and is_main))
    logging.getLogger("loops").setLevel(level)
