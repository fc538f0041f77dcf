"""Measurements of a run: means since the last log row, speed, memory, energy and a profile."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.profiler import profile, schedule

from vitral.machine import memory_gb, peak_flops
from vitral.storage import replacing
from vitral.training.energy import energy_meter
from vitral.training.resolved import Resolved


class Counters:
    """Sums since the last log row and counts of skipped steps, stored on the device.

    Reading them waits for the device, so they are read only for a log row or a checkpoint.
    """

    SIZE = 6

    def __init__(self, device: torch.device) -> None:
        # Losses, norms and steps since the last row; skipped steps: total, consecutive, maximum.
        dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        self.values = torch.zeros(self.SIZE, dtype=dtype, device=device)

    def add(self, loss: Tensor, norm: Tensor, skipped: Tensor) -> None:
        """Counts a step. The means exclude the loss and norm of a skipped step."""
        taken = 1 - skipped
        zero = torch.zeros_like(loss)
        seen = torch.stack([torch.where(skipped > 0, zero, x) for x in (loss, norm)])
        in_a_row = (self.values[4] + 1) * skipped
        worst = torch.maximum(self.values[5], in_a_row)
        counted = torch.stack([taken, skipped])
        self.values[:4] += torch.cat([seen, counted])
        self.values[4], self.values[5] = in_a_row, worst

    def read(self) -> dict[str, float]:
        """Returns the mean loss and gradient norm since the last row, and the skipped steps so far.

        "worst" is the largest number of consecutive skipped steps.
        """
        losses, norms, steps, skipped, _, worst = self.values.tolist()
        steps = max(steps, 1.0)
        return {
            "loss": losses / steps,
            "grad_norm": norms / steps,
            "skipped": int(skipped),
            "worst": int(worst),
        }

    def start_row(self) -> None:
        """Resets the sums for the next log row."""
        self.values[:3] = 0


class Clock:
    """Time and energy of the run, and images, FLOPs and data wait since the last log row.

    Args:
        seconds: time that the run has taken so far.
        energy: energy that the run has used so far, in kWh.
    """

    def __init__(self, seconds: float, energy: float, resolved: Resolved) -> None:
        self.device, self.processes = resolved.device, resolved.processes
        self.energy, self.joules = energy, energy_meter(resolved.device)
        rate = peak_flops() if resolved.precision == "bf16" else None
        self.peak = rate and rate * resolved.processes
        self.begin = time.monotonic() - seconds
        self.start_row()

    def start_row(self) -> None:
        """Starts the next row."""
        self.row = time.monotonic()
        self.images, self.flops, self.waited = 0, 0.0, 0.0

    def count(self, images: int, flops_per_image: float) -> None:
        """Counts the images of a step in all processes, and the FLOPs of their forward passes."""
        self.images += images
        self.flops += images * flops_per_image

    def read(self) -> dict[str, float]:
        """Returns the clock columns of a log row. MFU counts forward and backward FLOPs only."""
        now = time.monotonic()
        elapsed = max(now - self.row, 1e-9)
        columns = {
            "seconds": round(now - self.begin, 3),
            "images_per_second": round(self.images / elapsed, 1),
            "data_wait": round(self.waited / elapsed, 4),
            "memory_gb": round(memory_gb(self.device), 3),
        }
        if self.peak is not None:
            columns["mfu"] = round(3 * self.flops / elapsed / self.peak, 4)
        joules = self.joules()
        if joules is not None:
            # All GPUs do the same work, so one is measured.
            columns["energy_kwh"] = round(self.energy + self.processes * joules / 3.6e6, 6)
        return columns


@contextlib.contextmanager
def profiling(enabled: bool, path: Path) -> Iterator[profile | None]:
    """Profiles ten steps, after five warmup steps, and writes a trace to `path` if enabled."""
    if not enabled:
        yield None
        return

    def write(profiler: profile) -> None:
        # torch supports only UTF-8 paths.
        with TemporaryDirectory() as folder, replacing(path) as building:
            trace = Path(folder, path.name)
            profiler.export_chrome_trace(str(trace))
            shutil.copyfile(trace, building)

    plan = schedule(wait=2, warmup=3, active=10, repeat=1)
    # Without acc_events, torch 2.11 warns that other cycles would be lost, but there is only one.
    with profile(schedule=plan, on_trace_ready=write, acc_events=True) as profiler:
        yield profiler
