"""A run that is killed at random points and started again ends with the bytes of one that was not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("loop", ["sft", "dpo", "grpo"])
def test_a_dozen_kills_leave_no_trace(loop):
    """Four on one process, four on DDP x 2, four on FSDP2 x 2; survivors of a killed process end within a minute."""
    command = [sys.executable, "benchmarks/kill.py", "--kills", "12", "--loops", loop]
    environment = {**os.environ, "PYTHONPATH": str(HOUSE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HOUSE, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = re.findall(rf"\| {loop} \w+ \| (\d+) \| .* \| (\d+) \| (\d+) \|", done.stdout)
    assert sum(int(kills) for kills, _, _ in rows) == 12 and len(rows) == 3
    assert all(runs == equal for _, runs, equal in rows)
