"""The log of a run: metrics.csv and metrics.jsonl, TensorBoard, and what a terminal shows."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from vitral.report.gather import duration, read_rows
from vitral.storage import replacing

MEASURES = ("loss", "top1", "top5", "ece")
COLUMNS = (
    "step",
    "epoch",
    "images",
    "lr",
    "loss",
    "grad_norm",
    "skipped",
    "broken",
    *(f"val_{name}" for name in MEASURES),
    *(f"ema_{name}" for name in MEASURES),
)
# What depends on the machine and the hour: no part of what an exact resume reproduces.
CLOCK = ("seconds", "images_per_second", "data_wait", "memory_gb", "mfu", "energy_kwh")


class MetricsLog:
    """Appends a row at a time to both files and to TensorBoard.

    Args:
        directory: the run folder.
        step: the step that the run goes on from; rows of later steps are cut first.
    """

    def __init__(self, directory: Path, step: int) -> None:
        self.csv, self.jsonl = directory / "metrics.csv", directory / "metrics.jsonl"
        rows = [row for row in read_rows(self.jsonl) if row["step"] <= step]
        header = dict(zip(COLUMNS + CLOCK, COLUMNS + CLOCK, strict=True))
        with replacing(self.jsonl) as lines, replacing(self.csv) as table:
            lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            table.write_text(_as_csv([header, *rows]), encoding="utf-8")
        self.seconds = float(rows[-1]["seconds"]) if rows else 0.0
        self.energy = float(rows[-1].get("energy_kwh", 0)) if rows else 0.0
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, row: Mapping[str, float]) -> None:
        """Adds a row; a column that it lacks stays empty."""
        with self.jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(row)) + "\n")
        with self.csv.open("a", encoding="utf-8") as file:
            file.write(_as_csv([row]))
        for name, value in row.items():
            self.board.add_scalar(name, value, int(row["step"]))

    def picture(self, grid: Tensor) -> None:
        """Shows a picture (C, H, W), uint8, in TensorBoard."""
        self.board.add_image("train_batch", grid, 0)

    def close(self) -> None:
        """Flushes TensorBoard."""
        self.board.close()


def _as_csv(rows: Sequence[Mapping[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS + CLOCK, lineterminator="\n")
    writer.writerows(rows)
    return text.getvalue()


class Console:
    """What a person watches: a progress bar on a terminal, elsewhere a plain line now and then.

    Every message, and every plain line, goes to train.log as well. A quiet one is for a process
    that another speaks for.
    """

    INTERVAL = 5.0  # seconds between plain lines

    def __init__(self, path: Path, total: int, step: int, quiet: bool) -> None:
        path = Path(os.devnull) if quiet else path
        self.file = path.open("a", encoding="utf-8")
        self.stream = self.file if quiet else sys.stdout
        self.total = total
        self.bar = None
        if self.stream.isatty():
            layout = "{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} {remaining} left{postfix}"
            self.bar = tqdm(
                total=total, initial=step, bar_format=layout, file=self.stream, dynamic_ncols=True
            )
        self.last = time.monotonic()

    def message(self, text: str) -> None:
        """Something to be read now and kept."""
        print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=self.file, flush=True)
        try:
            if self.bar is not None:
                self.bar.write(text, file=self.stream)
            else:
                print(text, file=self.stream, flush=True)
        except BrokenPipeError:  # nobody listens any more: train.log still does
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def due(self) -> bool:
        """Whether it is time to show progress again."""
        interval = 0.5 if self.bar is not None else self.INTERVAL
        return time.monotonic() - self.last >= interval

    def progress(self, step: int, text: str, seconds_left: float) -> None:
        """Shows how far the run is."""
        self.last = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        else:
            self.message(f"step {step}/{self.total}  {text}  left {duration(seconds_left)}")

    def close(self) -> None:
        """Ends the bar and the file."""
        if self.bar is not None:
            self.bar.close()
        self.file.close()
