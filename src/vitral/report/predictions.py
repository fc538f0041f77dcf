"""The best weights of a run, evaluated on the images that it validates on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tqdm import tqdm

from vitral.data.fetch import resolve_workers
from vitral.data.formats import open_dataset
from vitral.data.loader import EVAL_BATCH, eval_batches
from vitral.data.records import Records
from vitral.errors import UserError
from vitral.evaluation import Scores, measure
from vitral.evaluation.evaluate import data_path
from vitral.machine import pick_device
from vitral.rundir import Run
from vitral.weights import Weights, load


@dataclass(frozen=True)
class Predictions:
    """What a model says of the validation images."""

    scores: Scores
    records: Records
    """The images, in the order of the scores."""
    weights: Weights
    """What said it."""


def evaluate_best(run: Run, data: str | None = None) -> Predictions:
    """Runs the best weights over the validation images of the run.

    Args:
        data: where they are now; None takes the path that the weights name.

    Raises:
        UserError: if weights or data cannot be read, or the data are others.
    """
    device = pick_device("auto")
    found = load(run.path, device=str(device))
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
    checked = tqdm(batches, "evaluating", total, leave=False, disable=None)
    scores = measure(found.model, checked, dataset.classes)
    return Predictions(scores, records, found)
