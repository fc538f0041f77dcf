"""The run directory: file names, lock, and reading of logs."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PosixPath
from typing import IO, Any

import torch

from vitral import machine, settings
from vitral.config import Config
from vitral.errors import UserError, how_to_fix
from vitral.files import open_regular, read_regular, require_regular
from vitral.storage import make_directory, replacing

Row = dict[str, float]
"""A row of the metrics log, by column."""
HEADLINES = ("top1", "map")  # main metrics: for one label per image, and for any number
PACKAGES = ("vitral", "torch", "torchvision", "torchcodec", "numpy", "safetensors")
WEIGHTS, CHECKPOINTS = "weights", "checkpoints"
CONFIG, CURVES, REPORT = "config.yaml", "curves.png", "report.html"


class RunPath(PosixPath):
    """The path of a run directory. Notebooks display it as the curves of the run."""

    def _repr_png_(self) -> bytes | None:
        curves = RunDir(self).curves
        return curves.read_bytes() if curves.is_file() else None


class RunDir:
    """The paths in a run directory, and the lock that one process at a time can hold."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / CONFIG
        self.environment = self.path / "env.json"
        self.metrics = self.path / "metrics.jsonl"
        self.log = self.path / "train.log"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / CHECKPOINTS
        self.features = self.path / "features"
        self.weights = self.path / WEIGHTS
        self.best = self.weights / "best"
        self.last = self.weights / "last"
        self.train_batch = self.path / "train_batch.jpg"
        self.curves = self.path / CURVES
        self.report = self.path / REPORT
        self.trace = self.path / "trace.json"
        self._lock: IO[str] | None = None

    @classmethod
    def of_weights(cls, directory: Path) -> RunDir | None:
        """Returns the run directory that contains a weight directory, or None."""
        parent = directory.resolve().parent
        return cls(parent.parent) if parent.name == WEIGHTS else None

    def lock(self) -> None:
        """Creates the directory and takes its lock.

        Raises:
            UserError: if it cannot be written, or another process is training in it.
        """
        try:
            make_directory(self.path)
            for path in (self.config, self.environment, self.metrics, self.log):
                if path.exists():  # a FIFO or device could block or be endless
                    require_regular(path.stat(), path)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            self._lock = os.fdopen(os.open(self.path / ".lock", flags, 0o666), "w")
            # Forked workers would keep a flock after a SIGKILL; this lock ends with its process.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"out: another process is training in {self.path}; wait for it, or pass "
                "a different --out"
            ) from None
        except OSError as error:
            place, fix = error.filename or self.path, how_to_fix(error, "pass a different --out")
            raise UserError(f"out: cannot write {place}: {error.strerror}; {fix}") from None

    def unlock(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.unlock()

    def unused_name(self) -> Path:
        """Returns a similar path that does not exist yet."""
        number = 2
        while (other := self.path.with_name(f"{self.path.name}-{number}")).exists():
            number += 1
        return other

    def write_config(self, config: Config) -> None:
        """Writes config.yaml, a recipe that reproduces the run."""
        with replacing(self.config) as file:
            file.write_text(settings.dump(config), encoding="utf-8")

    def write_environment(self, **facts: object) -> None:
        """Writes env.json: versions, hardware, command, and `facts`."""
        gpu = machine.gpu_name()
        environment = {
            "command": sys.argv,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": {name: version(name) for name in PACKAGES},
            "cpu_cores": machine.num_cores(),
            "gpu": gpu,
            "cuda": torch.version.cuda if gpu else None,
            **facts,
        }
        with replacing(self.environment) as file:
            file.write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Run:
    """The content of a run directory, for a report."""

    path: Path
    config: Config
    environment: dict[str, Any]
    """The content of env.json."""
    rows: list[Row]
    """The rows of the metrics log."""
    notes: list[str]
    """Messages about content that could not be read."""

    @property
    def validations(self) -> list[Row]:
        """The rows with validation results."""
        return [row for row in self.rows if "val_loss" in row]

    @property
    def best(self) -> tuple[str, Row] | None:
        """ "val" or "ema", and the best row by `train.best_by`; ties go to the first row."""
        found = [(kind, row) for row in self.validations for kind in ("val", "ema")]
        found = [(kind, row) for kind, row in found if f"{kind}_loss" in row]
        rank = self.config.train.rank
        return max(found, key=lambda item: rank(item[1], f"{item[0]}_"), default=None)

    @property
    def headline(self) -> str:
        """Name of the main metric."""
        return headline(self.validations[-1] if self.validations else {})

    @property
    def stopped_early(self) -> bool:
        """Whether the last validations did not improve for `train.patience` validations."""
        if self.best is None or not self.config.train.patience:
            return False
        since = len(self.validations) - 1 - self.validations.index(self.best[1])
        return since >= self.config.train.patience

    @property
    def finished(self) -> bool:
        """Whether the last step has been trained and validated, or the run has stopped early."""
        last = self.rows[-1] if self.rows else {"epoch": 0.0}
        done = last["epoch"] > self.config.train.epochs - 1e-6 or self.stopped_early
        return "val_loss" in last and done


def headline(metrics: Mapping[str, float], kind: str = "val") -> str:
    """Returns the name of the main metric: that for one label per image, or for several."""
    return next((name for name in HEADLINES if f"{kind}_{name}" in metrics), "top1")


def read_run(path: Path) -> Run:
    """Reads the directory of a finished or unfinished run.

    Raises:
        UserError: if it is not a run directory, or its settings cannot be read.
    """
    run = RunDir(path.parent if path.name == CONFIG and path.is_file() else path)
    if not run.config.is_file():
        raise UserError(
            f"report: {path}: expected a run directory with {CONFIG}, got "
            f"{'one without' if path.is_dir() else 'no directory'}; specify one such as runs/digits"
        )
    notes, rows = [], read_rows(run.metrics)
    lines = run.metrics.read_bytes().count(b"\n") if run.metrics.exists() else 0
    if lines > len(rows):
        name = run.metrics.name
        notes.append(f"{name}: line {len(rows) + 1} of {lines} is not a row; the rest is ignored")
    environment = {}
    try:
        environment = dict(json.loads(read_regular(run.environment)))
    except (OSError, ValueError, TypeError):
        notes.append(f"{run.environment.name} cannot be read: the machine is unknown")
    return Run(run.path, settings.load(str(run.config)), environment, rows, notes)


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a metrics log, up to the first invalid or truncated line.

    Raises:
        OSError: if it is not a regular file, or cannot be read.
    """
    rows = []
    content = b""
    if path.exists():
        with open_regular(path) as file:  # a run may be appending to it
            content = file.read()
    for line in content.decode("utf-8", "replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not {"step", "epoch", "images", "seconds"} <= row.keys():
            break
        if not all(isinstance(value, int | float) for value in row.values()):
            break
        rows.append(row)
    return rows


def duration(seconds: float) -> str:
    """Formats a time in seconds as 42 s, 3:05 or 12:03:05."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
