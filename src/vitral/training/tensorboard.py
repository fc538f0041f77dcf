"""TensorBoard events of a run."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import image, scalar

from vitral.storage import make_directory, naming


class TensorBoardWriter:
    """Writes a file of TensorBoard events.

    torch's SummaryWriter uses a thread, which prints a traceback if the disk is full.

    Args:
        directory: where to create the file.
        step: events of this and later steps in older files are hidden.
    """

    def __init__(self, directory: Path, step: int) -> None:
        make_directory(directory)
        # TensorBoard reads files in the order of their names.
        name = f"events.out.tfevents.{time.time_ns()}.{platform.node()}.{os.getpid()}"
        self.path = directory / name
        self.file = self.path.open("xb")
        self.records = RecordWriter(self.file)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, row: Mapping[str, float]) -> None:
        """Writes the values of a step."""
        for name, value in row.items():
            self._write(Event(step=step, summary=scalar(name, value)))
        self._flush()

    def image(self, name: str, picture: Tensor) -> None:
        """Writes an image (C, H, W), uint8."""
        self._write(Event(step=0, summary=image(name, picture, dataformats="CHW")))
        self._flush()

    def close(self) -> None:
        """Closes the file."""
        with naming(self.path):
            self.file.close()

    def _flush(self) -> None:
        with naming(self.path):
            self.file.flush()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with naming(self.path):
            self.records.write(event.SerializeToString())
