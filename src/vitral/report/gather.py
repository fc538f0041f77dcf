"""What a run folder tells, and what its best weights say of the images that it validates on."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vitral import recipes, weights
from vitral.config import Config, UserError
from vitral.data.fetch import resolve_workers
from vitral.data.loader import eval_batches
from vitral.data.records import Records
from vitral.data.sources import open_dataset
from vitral.evaluation import Scores, measure
from vitral.evaluation.evaluate import EVAL_BATCH, data_path, pick_device
from vitral.weights import Weights

Row = dict[str, float]


@dataclass(frozen=True)
class Run:
    """What stands in a run folder."""

    path: Path
    config: Config
    environment: dict[str, Any]
    """Of env.json."""
    rows: list[Row]
    """Of metrics.jsonl."""
    notes: list[str]
    """What could not be read."""

    @property
    def validations(self) -> list[Row]:
        """The rows of validations."""
        return [row for row in self.rows if "val_top1" in row]

    @property
    def best(self) -> tuple[str, Row] | None:
        """ "val" or "ema", and the row of the best top-1 so far, the first of equals."""
        found = [(kind, row) for row in self.validations for kind in ("val", "ema")]
        found = [(kind, row) for kind, row in found if f"{kind}_top1" in row]
        return max(found, key=lambda item: item[1][f"{item[0]}_top1"], default=None)

    @property
    def finished(self) -> bool:
        """Whether the last step has been taken and validated."""
        last = self.rows[-1] if self.rows else {"epoch": 0.0}
        return "val_top1" in last and last["epoch"] > self.config.train.epochs - 1e-6


@dataclass(frozen=True)
class Predictions:
    """What a model says of the validation images."""

    scores: Scores
    records: Records
    """The images, in the order of the scores."""
    weights: Weights
    """What said it."""


def read_run(path: Path) -> Run:
    """Reads a run folder, finished or not.

    Raises:
        UserError: if it is none, or its settings cannot be read.
    """
    if not (path / "config.yaml").is_file():
        raise UserError(
            f"report: {path}: expected a run folder with config.yaml, got "
            f"{'one without' if path.is_dir() else 'no folder'}; give a folder such as runs/digits"
        )
    notes = []
    log = path / "metrics.jsonl"
    rows = read_rows(log)
    lines = log.read_bytes().count(b"\n") if log.exists() else 0
    if lines > len(rows):
        notes.append(f"metrics.jsonl: line {len(rows) + 1} of {lines} is no row; it ends there")
    environment = {}
    try:
        environment = dict(json.loads((path / "env.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        notes.append("env.json cannot be read: nothing is known of the machine")
    return Run(path, recipes.load(str(path / "config.yaml")), environment, rows, notes)


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl up to the first line that is none, as one cut short is."""
    rows = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
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


def evaluate_best(run: Run, data: str | None = None) -> Predictions:
    """Runs the best weights over the validation images of the run.

    Args:
        data: where they are now; None takes the path that the weights name.

    Raises:
        UserError: if weights or data cannot be read, or the data are others.
    """
    device = pick_device("auto")
    found = weights.load(run.path, device=str(device))
    known = found.description
    settings = dataclasses.replace(known.config.data, path=data_path(known, data), workers=None)
    config = dataclasses.replace(known.config, data=settings)
    dataset = open_dataset(settings, config.model.image_size, config.train.seed)
    if dataset.fingerprint != known.fingerprint:
        raise UserError(f"data: {settings.path} is not the set that the run was trained on")
    records = dataset.val
    assert records is not None
    workers = resolve_workers(settings, records)
    batches = eval_batches(records, config, EVAL_BATCH, workers, device)
    total = -(-len(records) // EVAL_BATCH)
    watched = tqdm(batches, "evaluating", total, leave=False, disable=None)
    scores = measure(found.model, watched, dataset.classes)
    return Predictions(scores, records, found)


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3:05 or 12:03:05."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
