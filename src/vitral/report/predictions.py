"""Evaluates the best weights of a run on its validation images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tqdm import tqdm

from vitral.config import Config
from vitral.data.fetch import resolve_workers
from vitral.data.formats import open_dataset
from vitral.data.loader import EVAL_BATCH, eval_batches
from vitral.data.records import Records
from vitral.data.splits import Dataset
from vitral.errors import UserError
from vitral.evaluation.evaluate import data_path
from vitral.evaluation.tasks import AnyScores, score_batches
from vitral.machine import pick_device
from vitral.rundir import Run
from vitral.weights import Description, Weights, load


@dataclass(frozen=True)
class Predictions:
    """Predictions of a model for the validation images."""

    scores: AnyScores
    records: Records
    """The images, in the order of the scores."""
    weights: Weights
    """The weights that made the predictions."""
    train: Records | None = None
    """The training images; None if they are not needed."""


def evaluate_best(
    run: Run,
    data: str | None = None,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> Predictions:
    """Evaluates the best weights of a run on its validation images; keeps all probabilities.

    Args:
        data: current path of the dataset; None uses the path stored with the weights.
        columns: settings of the columns, such as `label_column`, if the data is a table.

    Raises:
        UserError: if the weights or the data cannot be read, or the dataset is not that of the run.
    """
    device = pick_device("auto")
    weights = load(run.path, device=str(device))
    config, dataset = open_dataset_of(weights.description, data, columns)
    records = dataset.val
    assert records is not None
    workers = resolve_workers(config.data, records)
    batches = eval_batches(records, config, EVAL_BATCH, workers, device)
    total = -(-len(records) // EVAL_BATCH)
    batches = tqdm(batches, "evaluating", total, leave=False, disable=None)
    scores = score_batches(weights, batches, dataset.classes)
    return Predictions(scores, records, weights, dataset.train)


def open_dataset_of(
    description: Description,
    data: str | None = None,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Config, Dataset]:
    """Returns the settings and both splits of the dataset that weights were trained on.

    Args:
        data, columns: as for `evaluate_best`.

    Raises:
        UserError: if the data cannot be read, or is a different dataset.
    """
    path = data_path(description, data)
    settings = dataclasses.replace(description.config.data, path=path, workers=None, **columns)
    config = dataclasses.replace(description.config, data=settings)
    dataset = open_dataset(settings, config.model.image_size, config.train.seed)
    if dataset.fingerprint != description.fingerprint:
        raise UserError(f"data: {settings.path} is not the dataset that the run was trained on")
    return config, dataset
