"""A run that is killed at random points and started again ends with the bytes of one that was not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parents[2]


SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(
    ("loop", "total"), [("grpo", 3), *(pytest.param(loop, 12, marks=SLOW) for loop in ("sft", "dpo", "grpo"))]
)
def test_kills_leave_no_trace(loop, total):
    """A third on one process, a third on DDP x 2, a third on FSDP2 x 2; survivors of a killed process end."""
    command = [sys.executable, "benchmarks/kill.py", "--kills", str(total), "--loops", loop]
    environment = {**os.environ, "PYTHONPATH": str(HOUSE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HOUSE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = re.findall(rf"\| {loop} \w+ \| (\d+) \| .* \| (\d+) \| (\d+) \|", done.stdout)
    assert sum(int(kills) for kills, _, _ in rows) == total and len(rows) == 3
    assert all(runs == equal for _, runs, equal in rows)
