"""The numbers of one step: where a number is added, the call says how it adds up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

Number = Tensor | float


class Metrics:
    """Collects a step's numbers over its micro-batches, and reduces them over all processes in one exchange.

        metrics.sum("tokens/loss", n)                       added up
        metrics.mean("policy/entropy", entropy.sum(), n)    global total / global count
        metrics.mean_and_std("reward", rewards)             "reward/mean" and "reward/std" (population)
        metrics.max("policy/ratio_max", ratio)              the largest
        metrics.set("time/step", seconds)                   this process's newest value; the largest of all processes'

    Each name is logged as it is given here. A mean over nothing is left out. Tensors stay on their device until
    `reduce`, so that nothing waits for the device between micro-batches.
    """

    def __init__(self) -> None:
        self._parts: dict[str, tuple[str, list[Tensor]]] = {}

    def sum(self, name: str, value: Number) -> None:
        """Added up over micro-batches and processes."""
        self._add(name, "sum", value)

    def mean(self, name: str, total: Number, count: Number) -> None:
        """Both added up over micro-batches and processes, then divided once; left out where the count is 0."""
        self._add(name, "mean", total, count)

    def means(self, totals: Mapping[str, Number], count: Number) -> None:
        """`mean` of each total, all over the same count: what a loss returns beside its sum."""
        for name, total in totals.items():
            self.mean(name, total, count)

    def mean_and_std(self, name: str, values: Iterable[float]) -> None:
        """`name/mean` and `name/std` of single values."""
        values = list(values)
        self._add(name, "spread", math.fsum(values), len(values), math.fsum(value * value for value in values))

    def max(self, name: str, value: Number) -> None:
        """The largest over micro-batches and processes."""
        self._add(name, "max", value)

    def set(self, name: str, value: Number) -> None:
        """The newest value of this process; over processes the largest."""
        self._parts.pop(name, None)
        self._add(name, "max", value)

    def _add(self, name: str, kind: str, *numbers: Number) -> None:
        new = [torch.as_tensor(number, dtype=torch.float64) for number in numbers]
        known, before = self._parts.get(name, (kind, None))
        assert known == kind, f"{name} is a {known} and was added as a {kind}"
        join = torch.maximum if kind == "max" else torch.add
        self._parts[name] = (kind, new if before is None else [join(a, b) for a, b in zip(before, new, strict=True)])

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """The step's numbers over all processes, which all call this; a process may lack names that others have."""
        own = {name: (kind, [float(number) for number in numbers]) for name, (kind, numbers) in self._parts.items()}
        total: dict[str, tuple[str, list[float]]] = {}
        for parts in gather_object([own]):
            for name, (kind, numbers) in parts.items():
                if name in total:
                    join = _larger if kind == "max" else float.__add__
                    numbers = [join(a, b) for a, b in zip(total[name][1], numbers, strict=True)]
                total[name] = (kind, numbers)
        metrics: dict[str, float] = {}
        for name, (kind, numbers) in total.items():
            if kind == "mean" and numbers[1]:
                metrics[name] = numbers[0] / numbers[1]
            elif kind == "spread" and numbers[1]:
                mean = metrics[f"{name}/mean"] = numbers[0] / numbers[1]
                metrics[f"{name}/std"] = math.sqrt(max(numbers[2] / numbers[1] - mean * mean, 0.0))
            elif kind in ("sum", "max"):
                metrics[name] = numbers[0]
        return metrics


def _larger(a: float, b: float) -> float:
    """The larger number; NaN where one is NaN."""
    return a if math.isnan(a) or a > b else b
