"""Interleaved runs, so that other load on the machine affects all of them equally."""

from __future__ import annotations

import operator
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

T = TypeVar("T")
ROUNDS = 3
SECONDS = 2.0  # duration of a measurement in each round


def run_interleaved(runs: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Returns the results of each run in each round; every round starts with a different run."""
    names = list(runs)
    found: dict[str, list[T]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(runs[name]())
    return found


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Returns the ratio in each round; a slowdown that affects both cancels out."""
    return list(map(operator.truediv, above, below))


@dataclass(frozen=True)
class Rates:
    """The results of a run in each round."""

    rates: list[float] = field(default_factory=list)
    """Images per second."""
    cores: list[float] = field(default_factory=list)
    """Cores kept busy by this process and by workers that have exited."""


def interleaved_rates(runs: Mapping[str, Callable[[], float]]) -> dict[str, Rates]:
    """Measures the rates that the runs return, and the cores that they use, in ROUNDS rounds."""
    found = {name: Rates() for name in runs}

    def measure(name: str) -> None:
        busy, started = sum(os.times()[:4]), time.perf_counter()
        found[name].rates.append(runs[name]())
        busy, elapsed = sum(os.times()[:4]) - busy, time.perf_counter() - started
        found[name].cores.append(busy / elapsed)

    run_interleaved({name: partial(measure, name) for name in runs}, ROUNDS)
    return found


def table(found: Mapping[str, Rates], reference: str | None = None) -> Iterator[str]:
    """Formats one line per run: medians, and the median ratio to the reference if it was run."""
    baseline = found.get(reference or "")
    for name, run in found.items():
        line = f"{name:40}{statistics.median(run.rates):9,.0f} images/s"
        line += f"  {statistics.median(run.cores):4.1f} cores used"
        if baseline is not None:
            ratio = statistics.median(ratios(run.rates, baseline.rates))
            line += f"  {ratio:5.2f} times torchvision"
        yield line
