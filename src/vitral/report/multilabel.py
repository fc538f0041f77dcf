"""Contents of the report about predictions for images with any number of labels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitral.evaluation.multilabel import ClassScores, MultiLabelScores
from vitral.report.predictions import Predictions
from vitral.report.thumbnails import attention_examples, thumbnail

MAX_LISTED_CLASSES = 20  # above this, only the ten best and the ten worst
MAX_MISTAKES = 12  # of each kind


@dataclass(frozen=True)
class MultiLabelReport:
    """Contents of the report about individual predictions."""

    predictions: Predictions
    scores: MultiLabelScores
    model: str
    """Description of the weights that made the predictions."""
    images: str
    """Description of the images."""

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Metrics of all images by name."""
        return self.scores.metrics()

    @cached_property
    def per_class(self) -> dict[str, list[ClassScores]]:
        """Tables of classes by title; for more than 20 classes, only the best and the worst."""
        rows = self.scores.per_class()
        if len(rows) <= MAX_LISTED_CLASSES:
            return {"All classes": rows}
        rows = sorted((row for row in rows if row.images), key=lambda row: -row.average_precision)
        return {"Best classes": rows[:10], "Worst classes": rows[:-11:-1]}

    @cached_property
    def mistakes(self) -> dict[str, list[dict[str, Any]]]:
        """Images with the worst missed and false labels, by title."""
        scores = self.scores
        margin = scores.probabilities - scores.thresholds  # (n, classes)
        missed = (scores.labels == 1) & ~scores.predicted
        false = (scores.labels == 0) & scores.predicted
        return {
            "Missed labels": self._worst(np.where(missed, -margin, -np.inf)),
            "False labels": self._worst(np.where(false, margin, -np.inf)),
        }

    @cached_property
    def attention(self) -> list[dict[str, Any]]:
        """Evenly spaced images of the dataset, and the attention of the model to them."""
        found = attention_examples(self.predictions.weights, self.predictions.records)
        return [{**pictures, **self._labels(i)} for i, pictures in found]

    def _worst(self, severity: NDArray[np.float64]) -> list[dict[str, Any]]:
        """Returns the images with the most severe mistakes, given those of all labels."""
        order = np.argsort(-severity, axis=None, kind="stable")[:MAX_MISTAKES]
        found = []
        for i, c in zip(*np.unravel_index(order, severity.shape), strict=True):
            if severity[i, c] > -np.inf:
                facts = {
                    "picture": thumbnail(self.predictions.records, int(i)),
                    "name": self.scores.classes[c],
                    "probability": float(self.scores.probabilities[i, c]),
                    "threshold": float(self.scores.thresholds[c]),
                }
                found.append({**facts, **self._labels(i)})
        return found

    def _labels(self, i: int) -> dict[str, list[str]]:
        """Returns the true and the predicted labels of image i."""
        scores = self.scores
        return {
            "truth": [scores.classes[c] for c in np.flatnonzero(scores.labels[i])],
            "predicted": [scores.classes[c] for c in np.flatnonzero(scores.predicted[i])],
        }
