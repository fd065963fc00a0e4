"""docs/changing_a_loop.md: every change applies to the code as it is, costs what it says, and trains."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parents[1]
SECTIONS = re.split(r"^## ", (HOUSE / "docs/changing_a_loop.md").read_text(), flags=re.M)[1:]
SECTIONS = {title: text for title, _, text in (section.partition("\n") for section in SECTIONS)}
CHANGES = [title for title in SECTIONS if title[0].isdigit()]
PRICES = {"1": (1, 15), "2": (2, 15), "3": (0, 0), "4": (1, 15), "5": (1, 15), "6": (1, 15)}  # files, added lines
LOGGED = {"3": "policy/kl", "4": "policy/ratio", "5": "reward/novelty/mean", "6": "rollout/length_right"}

pytestmark = pytest.mark.slow


def parts(title: str) -> tuple[dict[str, str], str, list[str]]:
    """(own files by name, the diff, options of the command) of a section."""
    text = SECTIONS[title]
    files = dict(re.findall(r"^```python\n# (\S+)\n(.*?)^```$", text, flags=re.M | re.S))
    diff = "".join(re.findall(r"^```diff\n(.*?)^```$", text, flags=re.M | re.S))
    (command,) = re.findall(r"^    accelerate launch loops/grpo.py --config configs/grpo.yaml(.*)$", text, flags=re.M)
    return files, diff, command.split()


def test_the_changes_are_priced():
    assert [title[0] for title in CHANGES] == list(PRICES)


@pytest.mark.parametrize("title", CHANGES)
def test_a_change_applies_costs_what_it_says_and_trains(title, tmp_path):
    files, diff, options = parts(title)
    number_of_files, number_of_lines = PRICES[title[0]]
    touched = set(re.findall(r"^\+\+\+ b/(\S+)$", diff, flags=re.M)) | set(files)
    code = [line for text in files.values() for line in text.splitlines() if line.strip()]
    added = [line for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert len(touched) <= number_of_files and len(added) + len(code) <= number_of_lines

    for room in ("loops", "losses", "data", "configs"):
        shutil.copytree(HOUSE / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    if diff:
        done = subprocess.run(["git", "apply"], input=diff, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    command = [sys.executable, "loops/grpo.py", "--config", "configs/grpo.yaml", *options, "--output_dir", "run"]
    command += ["--max_steps", "2", "--max_completion_length", "24", "--max_eval_samples", "4"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and all(row["optim/grad_norm"] > 0 for row in rows[1:])
    assert LOGGED.get(title[0], "loss/policy") in rows[-1]
