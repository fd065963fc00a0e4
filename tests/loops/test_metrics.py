"""How a step's numbers add up over micro-batches and processes."""

import math
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator

from loops.shared.metrics import Metrics


def reduced(add) -> dict[str, float]:
    metrics = Metrics()
    add(metrics)
    return metrics.reduce(Accelerator(cpu=True))


def test_a_name_says_where_it_is_added_how_it_adds_up():
    """Two micro-batches: sums 1 + 2, a mean (1 + 5) / (1 + 3), a maximum of 4 and 3, the newest of 7 and 6."""

    def add(metrics):
        for total, count, largest, newest in ((1, 1, 4, 7), (5, 3, 3, 6)):
            metrics.sum("tokens/loss", count)
            metrics.mean("policy/entropy", torch.tensor(total), count)
            metrics.max("policy/ratio_max", largest)
            metrics.set("optim/grad_norm", newest)

    expected = {"tokens/loss": 4, "policy/entropy": 1.5, "policy/ratio_max": 4, "optim/grad_norm": 6}
    assert reduced(add) == expected


def test_no_value_is_better_than_a_wrong_zero():
    """Means and spreads over nothing are left out; a sum of nothing is 0."""

    def add(metrics):
        metrics.mean("policy/entropy", 0.0, 0)
        metrics.mean_and_std("reward", [])
        metrics.sum("tokens/loss", 0)

    assert reduced(add) == {"tokens/loss": 0}


def test_the_spread_is_of_the_population():
    """1 2 3 6: mean 3, variance (4 + 1 + 0 + 9) / 4."""
    numbers = reduced(lambda metrics: [metrics.mean_and_std("reward", part) for part in ([1.0, 2.0], [3.0, 6.0])])
    assert numbers["reward/mean"] == 3 and numbers["reward/std"] == pytest.approx(math.sqrt(3.5), rel=1e-12)


@pytest.mark.parametrize("values", [(math.nan, 1.0), (1.0, math.nan)])
def test_a_number_that_is_nan_stays_nan(values):
    numbers = reduced(lambda metrics: [metrics.max("x", value) for value in values])
    assert math.isnan(numbers["x"])


def test_a_name_cannot_add_up_in_two_ways():
    metrics = Metrics()
    metrics.sum("x", 1)
    with pytest.raises(AssertionError, match="x is a sum and was added as a mean"):
        metrics.mean("x", 1, 1)


def on_two_processes():
    accelerator = Accelerator(cpu=True)
    metrics, rank = Metrics(), accelerator.process_index
    metrics.sum("sum", rank + 1)
    metrics.mean("mean", 10 * rank, 1 + rank)
    metrics.mean_and_std("reward", [[1.0, 2.0], [3.0, 6.0]][rank])
    metrics.max("max", [math.nan, 2.0][rank])
    metrics.set("time/step", rank)
    if rank:
        metrics.sum("of one process", 5)
    numbers = metrics.reduce(accelerator)
    assert math.isnan(numbers.pop("max")) and abs(numbers.pop("reward/std") - math.sqrt(3.5)) < 1e-12
    assert numbers == {"sum": 3, "mean": 10 / 3, "reward/mean": 3, "time/step": 1, "of one process": 5}


def test_processes_may_have_different_names_and_all_get_the_same_numbers():
    code = (
        "from accelerate import debug_launcher; from tests.loops.test_metrics import on_two_processes;"
        "debug_launcher(on_two_processes, num_processes=2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
