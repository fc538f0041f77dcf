"""The metrics log and the console output of a run."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from vitral.errors import Messages, printable
from vitral.machine import in_notebook
from vitral.rundir import RunDir, duration, read_rows
from vitral.storage import naming, replacing, sync

# Columns that depend on the machine and the time; resuming does not reproduce them exactly.
CLOCK_COLUMNS = ("seconds", "images_per_second", "data_wait", "memory_gb", "mfu", "energy_kwh")


class MetricsLog:
    """Appends rows to the metrics log and to TensorBoard.

    Args:
        run: the run directory.
        step: the step to resume from; rows of later steps are removed first.
    """

    def __init__(self, run: RunDir, step: int) -> None:
        from vitral.training.tensorboard import TensorBoardWriter  # imports tensorboard

        self.path = run.metrics
        rows = [row for row in read_rows(self.path) if row["step"] <= step]
        with replacing(self.path) as file:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        last = rows[-1] if rows else {}
        self.totals = float(last.get("seconds", 0)), float(last.get("energy_kwh", 0))
        """Seconds and kWh that the run has used so far."""
        self.run, self.board = run, TensorBoardWriter(run.tensorboard, step + 1)

    def write(self, row: Mapping[str, float]) -> None:
        """Appends a row."""
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(row)) + "\n")
        self.board.scalars(int(row["step"]), row)

    def picture(self, grid: Tensor) -> None:
        """Writes an image (C, H, W), uint8, to TensorBoard."""
        self.board.image("train_batch", grid)

    def sync(self) -> None:
        """Flushes all logs and the run directory to disk, as required before a checkpoint."""
        run = self.run
        for path in (self.path, run.log, self.board.path, run.tensorboard, run.path):
            with naming(path):
                sync(path)

    def close(self) -> None:
        """Closes TensorBoard's file."""
        self.board.close()


class Console:
    """Shows progress as a bar, or as a plain line every few seconds.

    The bar is used in a terminal and in a notebook, which can both rewrite a line in place.
    Messages and plain lines are also written to train.log. The console is quiet in all processes
    except rank 0. stdout may be None, or any object with `write` and `flush`; text that it cannot
    encode is written to train.log only.
    """

    INTERVAL = 5.0  # seconds between plain lines

    def __init__(self, path: Path, total: int, step: int, quiet: bool) -> None:
        self.path = Path(os.devnull) if quiet else path
        self.file = self.path.open("a", encoding="utf-8", errors="backslashreplace")
        self.stream = Messages(self.file if quiet else sys.stdout)
        self.total = total
        self.bar = None
        terminal = hasattr(self.stream, "isatty") and self.stream.isatty()
        if terminal or (in_notebook() and not quiet):
            layout = "{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} ETA {remaining}{postfix}"
            self.bar = tqdm(
                total=total, initial=step, bar_format=layout, file=self.stream, dynamic_ncols=True
            )
        self.last = time.monotonic()

    def message(self, text: str) -> None:
        """Prints a line and writes it to train.log."""
        text = printable(text)
        with naming(self.path):
            print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=self.file, flush=True)
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def due(self) -> bool:
        """Returns whether it is time to show progress again."""
        interval = 0.5 if self.bar is not None else self.INTERVAL
        return time.monotonic() - self.last >= interval

    def progress(
        self, step: int, values: Mapping[str, float], pace: Mapping[str, float], seconds_left: float
    ) -> None:
        """Shows the progress of the run.

        Args:
            step: optimizer steps taken.
            values: epoch, learning rate, loss and gradient norm.
            pace: the clock columns of a log row.
            seconds_left: estimated time for the rest of the run.
        """
        self.last = time.monotonic()
        text = (
            f"epoch {values['epoch']:.1f}  loss {values['loss']:.3f}  lr {values['lr']:.1e}  "
            f"norm {values['grad_norm']:.2f}  {pace['images_per_second']:,.0f} img/s  "
            f"data wait {pace['data_wait']:.0%}  {pace['memory_gb']:.1f} GB"
        )
        text += f"  MFU {pace['mfu']:.0%}" if "mfu" in pace else ""
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        else:
            self.message(f"step {step}/{self.total}  {text}  ETA {duration(seconds_left)}")

    def status(self, text: str, done: float) -> None:
        """Shows the progress of work before the first step; `done` is a fraction from 0 to 1."""
        self.last = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(int(done * self.total) - self.bar.n)
        else:
            self.message(text)

    def close(self) -> None:
        """Closes the bar and the file."""
        if self.bar is not None:
            self.bar.close()
        self.file.close()
