"""What a run is watched by: means since the last log row, the clock, memory, and the profiler."""

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
    """Sums since the last log row and counts of skipped steps, kept on the device.

    Reading them waits for the device, so it is done for a log row or a checkpoint alone.
    """

    SIZE = 6

    def __init__(self, device: torch.device) -> None:
        # losses, norms and steps since the last row; skipped steps in all, in a row, worst row
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which mps does not have
        self.values = torch.zeros(self.SIZE, dtype=dtype, device=device)

    def add(self, loss: Tensor, norm: Tensor, skipped: Tensor) -> None:
        """Counts a step; the loss and norm of a skipped one stay out of the means."""
        taken = 1 - skipped
        zero = torch.zeros_like(loss)
        seen = torch.stack([torch.where(skipped > 0, zero, x) for x in (loss, norm)])
        in_a_row = (self.values[4] + 1) * skipped
        worst = torch.maximum(self.values[5], in_a_row)
        counted = torch.stack([taken, skipped])
        self.values[:4] += torch.cat([seen, counted])
        self.values[4], self.values[5] = in_a_row, worst

    def read(self) -> dict[str, float]:
        """Mean loss and gradient norm since the last row, skipped steps, and the worst row."""
        losses, norms, steps, skipped, _, worst = self.values.tolist()
        steps = max(steps, 1.0)
        return {
            "loss": losses / steps,
            "grad_norm": norms / steps,
            "skipped": int(skipped),
            "worst": int(worst),
        }

    def start_row(self) -> None:
        """Begins the sums of the next log row."""
        self.values[:3] = 0


class Clock:
    """Seconds and energy of the run, and images, their work and waiting since the last log row.

    Args:
        seconds, energy: of the run so far, energy in kWh.
    """

    def __init__(self, seconds: float, energy: float, resolved: Resolved) -> None:
        self.device, self.processes = resolved.device, resolved.processes
        self.energy, self.joules = energy, energy_meter(resolved.device)
        rate = peak_flops() if resolved.precision == "bf16" else None
        self.peak = rate and rate * resolved.processes
        self.begin = time.monotonic() - seconds
        self.start_row()

    def start_row(self) -> None:
        """Begins the next row."""
        self.row = time.monotonic()
        self.images, self.flops, self.waited = 0, 0.0, 0.0

    def count(self, images: int, flops_per_image: float) -> None:
        """Counts the images of a step, of all processes, and a forward pass of each."""
        self.images += images
        self.flops += images * flops_per_image

    def read(self) -> dict[str, float]:
        """The clock columns of a log row; MFU counts the model's own work, forward and backward."""
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
            # Of one GPU, times their number: they do the same work.
            columns["energy_kwh"] = round(self.energy + self.processes * joules / 3.6e6, 6)
        return columns


@contextlib.contextmanager
def profiling(enabled: bool, path: Path) -> Iterator[profile | None]:
    """A profiler of ten steps, after five to warm up, that writes a trace to `path`; or none."""
    if not enabled:
        yield None
        return

    def write(profiler: profile) -> None:
        # torch takes no path that is not UTF-8.
        with TemporaryDirectory() as folder, replacing(path) as building:
            trace = Path(folder, path.name)
            profiler.export_chrome_trace(str(trace))
            shutil.copyfile(trace, building)

    plan = schedule(wait=2, warmup=3, active=10, repeat=1)
    # There is one cycle; without acc_events torch 2.11 warns that the others would be lost.
    with profile(schedule=plan, on_trace_ready=write, acc_events=True) as profiler:
        yield profiler
