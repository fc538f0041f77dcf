"""Metrics of predictions with one label per image, and bootstrap intervals.

All equal those of scikit-learn. It computes the headline metrics; the others are vectorized here.

An image whose output is not finite counts as wrong: it is a prediction outside all classes, and its
probability is 0 for every class. Macro averages are over the classes that occur in the dataset, and
a class that is never predicted has precision 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vitral.evaluation.scores import Scores, classification_rates

RESAMPLES = 1000
LEVEL = 0.95  # of the intervals
SEED = 0
VALUES_PER_CHUNK = 1 << 20  # resampled images, or counts of classes, that are in memory at a time


@dataclass(frozen=True)
class ClassMetrics:
    """Metrics of a class that occurs in the dataset."""

    name: str
    images: int
    top1: float
    """Also the recall of the class."""
    top5: float
    precision: float
    f1: float
    average_precision: float | None
    """None without probabilities."""
    roc_auc: float | None
    """None without probabilities; NaN if no image has another class."""


@dataclass(frozen=True)
class Results:
    """Metrics of scores, each computed once, when it is first used."""

    scores: Scores

    @cached_property
    def headline(self) -> dict[str, float]:
        """Metrics of all images, from the function `headline`."""
        return headline(self.scores)

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Bootstrap intervals, from the function `intervals`."""
        return intervals(self.scores)

    @cached_property
    def per_class(self) -> list[ClassMetrics]:
        """Metrics of each class, from the function `per_class`."""
        return per_class(self.scores)

    @property
    def num_nonfinite(self) -> int:
        """Number of images whose output is not finite."""
        return int(np.isnan(self.scores.confidence).sum())


def headline(scores: Scores) -> dict[str, float]:
    """Returns the metrics of all images by name.

    These are the metrics of `Scores.metrics`, macro and weighted precision, recall and F1, Matthews
    correlation coefficient (`mcc`) and Cohen's kappa (`kappa`), which are NaN if all labels and
    predictions are the same class. The macro recall is the balanced accuracy, and the weighted
    recall is the accuracy.
    """
    from sklearn import metrics  # takes a second to import

    labels, predicted, found = scores.labels, scores.predicted, scores.metrics()
    for average in ("macro", "weighted"):
        values = metrics.precision_recall_fscore_support(
            labels,
            predicted,
            labels=np.unique(labels),
            average=average,
            zero_division=0,  # pyright: ignore[reportArgumentType]
        )
        names = ("precision", "recall", "f1")
        found |= {f"{average}_{n}": float(v) for n, v in zip(names, values[:3], strict=True)}
    functions = {"mcc": metrics.matthews_corrcoef, "kappa": metrics.cohen_kappa_score}
    defined = len(np.unique([labels, predicted])) > 1
    found |= {
        name: float(function(labels, predicted)) if defined else math.nan
        for name, function in functions.items()
    }
    return found


def intervals(scores: Scores) -> dict[str, tuple[float, float]]:
    """Returns 95% bootstrap intervals of the accuracy, balanced accuracy and macro F1 by name.

    The bounds are percentiles over resamples of the images with replacement (Efron 1979). Averages
    over classes are over those that occur in the resample.
    """
    labels, predicted, C = scores.labels, scores.predicted, len(scores.classes)
    n, draw = len(labels), np.random.default_rng(SEED)
    size = max(1, VALUES_PER_CHUNK // max(n, C))
    parts = []
    for first in range(0, RESAMPLES, size):
        chosen = draw.integers(n, size=(min(size, RESAMPLES - first), n))
        parts.append(classification_rates(labels[chosen], predicted[chosen], C))
    tail = 50 * (1 - LEVEL)
    names = ("top1", "balanced", "f1")
    values = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    bounds = {name: np.percentile(value, (tail, 100 - tail)) for name, value in values.items()}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}


def per_class(scores: Scores) -> list[ClassMetrics]:
    """Returns the metrics of each class that has images."""
    C, predicted = len(scores.classes), scores.predicted
    images = np.bincount(scores.labels, minlength=C)
    total = np.bincount(predicted, minlength=C)
    right, five = (np.bincount(scores.labels, scores.hits(k), C) for k in (1, 5))
    return [
        ClassMetrics(
            scores.classes[c],
            int(images[c]),
            float(right[c] / images[c]),
            float(five[c] / images[c]),
            float(right[c] / max(total[c], 1)),
            float(2 * right[c] / (images[c] + total[c])),
            *_areas(scores, c),
        )
        for c in np.flatnonzero(images).tolist()
    ]


def _areas(scores: Scores, c: int) -> tuple[float | None, float | None]:
    """Returns the average precision and ROC AUC of class c against all others.

    Equal to scikit-learn's `average_precision_score` and `roc_auc_score`, which take a minute for
    1,000 classes of 50,000 images.
    """
    if scores.probabilities is None:
        return None, None
    every = np.nan_to_num(scores.probabilities[:, c])
    own = np.sort(every[scores.labels == c])
    every.sort()
    # Images with a lower probability than each image of the class, and with at most an equal one.
    lower, lower_own = np.searchsorted(every, own), np.searchsorted(own, own)
    upto, upto_own = np.searchsorted(every, own, "right"), np.searchsorted(own, own, "right")
    average_precision = np.mean((len(own) - lower_own) / (len(every) - lower))
    others = len(every) - len(own)
    # An equal probability counts half.
    beaten = ((lower - lower_own) + (upto - upto_own)) / 2
    return float(average_precision), float(beaten.mean() / others) if others else math.nan
