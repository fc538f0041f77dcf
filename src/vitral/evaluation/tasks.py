"""Scores of either kind of labels: one per image, or any number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from vitral.data.loader import Batch
from vitral.evaluation import multilabel, output, scores
from vitral.evaluation.metrics import Results
from vitral.evaluation.multilabel import MultiLabelScores
from vitral.evaluation.scores import Scores
from vitral.weights import Weights

AnyScores = Scores | MultiLabelScores


def score_batches(
    weights: Weights, batches: Iterable[Batch], classes: tuple[str, ...]
) -> AnyScores:
    """Returns the scores, with all probabilities, on batches with labels of all classes."""
    if weights.description.multi_label:
        return multilabel.measure(weights.model, batches, classes, weights.description.thresholds)
    return scores.measure(
        weights.model,
        batches,
        classes,
        keep_probabilities=True,
        temperature=weights.description.temperature,
    )


def write_tables(found: AnyScores, directory: Path) -> None:
    """Writes the tables of a validation."""
    if isinstance(found, MultiLabelScores):
        found.write_tables(directory)
    else:
        output.write_tables(Results(found), directory)


def thresholds(found: Mapping[str, AnyScores]) -> dict[str, tuple[float, ...]]:
    """Returns the thresholds of the classes by file name, given the scores of "val" and "ema"."""
    return {
        {"val": "model"}.get(kind, kind): tuple(each.thresholds.tolist())
        for kind, each in found.items()
        if isinstance(each, MultiLabelScores)
    }
