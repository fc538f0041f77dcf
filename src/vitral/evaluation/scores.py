"""Predictions of a model on a labeled dataset, and the metrics computed from them."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitral.data.loader import Batch
from vitral.evaluation.calibration import confidence
from vitral.evaluation.table import Row

BINS = 15


@dataclass(frozen=True)
class Scores:
    """The predictions for n images, in the order of the dataset."""

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    """(n,)"""
    ranked: NDArray[np.int64]
    """(n, min(5, classes)): the most likely classes, most likely first."""
    confidence: NDArray[np.float64]
    """(n,): the probability of the most likely class; NaN if the model's output is not finite,
    which counts as wrong."""
    losses: NDArray[np.float64]
    """(n,): the cross-entropy of each image, in nats."""
    probabilities: NDArray[np.float32] | None = None
    """(n, classes): NaN for an image whose output is not finite; None if they were not kept."""
    temperature: float | None = None
    """The temperature of the weights; None if they are not calibrated. It affects only
    `calibrated`."""
    calibrated: NDArray[np.float64] | None = None
    """(n,): the confidence after temperature scaling."""

    @property
    def predicted(self) -> NDArray[np.int64]:
        """(n,): the most likely class, or `len(classes)` if the output is not finite.

        Such an image is wrong for its own class and not predicted as any other class.
        """
        return np.where(np.isnan(self.confidence), len(self.classes), self.ranked[:, 0])

    @property
    def loss(self) -> float:
        """Mean cross-entropy, in nats."""
        return float(self.losses.mean())

    @property
    def top1(self) -> float:
        """Fraction of images whose most likely class is correct."""
        return float(self.hits(1).mean())

    @property
    def top5(self) -> float:
        """Fraction of images whose class is among the five most likely."""
        return float(self.hits(5).mean())

    @property
    def calibration_error(self) -> float:
        """Expected calibration error, computed by the function `calibration_error`."""
        return calibration_error(self.confidence, self.hits(1))

    def after_temperature(self) -> Scores:
        """Returns these scores with the calibrated confidence, if there is one.

        The losses remain those of the logits.
        """
        if self.calibrated is None:
            return self
        return dataclasses.replace(self, confidence=self.calibrated)

    def reliability(self) -> list[tuple[float, int, float, float]]:
        """Returns the upper edge, images, mean confidence and accuracy of each nonempty bin.

        Images whose confidence is NaN are not in any bin.
        """
        known = ~np.isnan(self.confidence)
        confidence = self.confidence[known]
        bins = _bins(confidence)
        counts = np.bincount(bins, minlength=BINS)
        sums = (np.bincount(bins, values, BINS) for values in (confidence, self.hits(1)[known]))
        return [
            ((i + 1) / BINS, int(n), float(confidence / n), float(right / n))
            for i, (n, confidence, right) in enumerate(zip(counts, *sums, strict=True))
            if n
        ]

    def hits(self, k: int) -> NDArray[np.bool_]:
        """Returns whether each class is among the k most likely, k at most 5. Shape (n,)."""
        found = (self.ranked[:, :k] == self.labels[:, None]).any(1)
        return found & ~np.isnan(self.confidence)

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of a validation by name, as in the metrics log."""
        rates = classification_rates(self.labels[None], self.predicted[None], len(self.classes))
        return {
            "loss": self.loss,
            "top1": self.top1,
            "top5": self.top5,
            "balanced": float(rates.balanced[0]),
            "f1": float(rates.f1[0]),
            "ece": self.calibration_error,
        }

    def row(self, name: str) -> Row:
        """Returns the metrics as a row of a table."""
        images, classes = len(self.labels), len(self.classes)
        return Row(name, images, classes, self.top1, self.top5, self.calibration_error)

    def confusion(self) -> NDArray[np.int64]:
        """Returns image counts by true (row) and predicted (column) class: (classes, classes).

        Images whose output is not finite are not in any column.
        """
        C = len(self.classes)
        known = ~np.isnan(self.confidence)
        cells = self.labels[known] * C + self.ranked[known, 0]
        return np.bincount(cells, minlength=C * C).reshape(C, C)

    def confused_pairs(self) -> list[tuple[str, str, int]]:
        """Returns the true class, predicted class and images per confusion, most frequent first."""
        wrong = ~self.hits(1) & ~np.isnan(self.confidence)
        pairs = Counter(zip(self.labels[wrong], self.ranked[wrong, 0], strict=True))
        ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
        return [(self.classes[a], self.classes[b], n) for (a, b), n in ordered]


class Rates(NamedTuple):
    """Fractions of each of R sets of predictions, shape (R,)."""

    top1: NDArray[np.float64]
    balanced: NDArray[np.float64]
    """Balanced accuracy: the mean recall of the classes that occur among the labels."""
    f1: NDArray[np.float64]
    """Macro F1: the mean F1 of the classes that occur among the labels."""


def classification_rates(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], num_classes: int
) -> Rates:
    """Computes accuracy, balanced accuracy and macro F1 of several sets of predictions.

    Equal to scikit-learn's `accuracy_score`, `balanced_accuracy_score`, and `f1_score` over the
    classes that occur among the labels.

    Args:
        labels: (R, n).
        predicted: (R, n); `num_classes` stands for no prediction.
    """
    R, C = len(labels), num_classes + 1
    sets = C * np.arange(R)[:, None]

    def count(classes: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.bincount(classes.ravel(), minlength=R * C).reshape(R, C)[:, :num_classes]

    right = count(np.where(labels == predicted, labels, num_classes) + sets)
    support, total = count(labels + sets), count(predicted + sets)
    num_present = (support > 0).sum(1)
    recall = right / support.clip(1)
    f1 = 2 * right / (support + total).clip(1)
    return Rates(
        right.sum(1) / labels.shape[1], recall.sum(1) / num_present, f1.sum(1) / num_present
    )


def calibration_error(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Computes the expected calibration error over 15 bins of equal width (Guo et al. 2017).

    This is the absolute difference between mean confidence and accuracy in a bin (low, high],
    averaged over the bins and weighted by their number of images.

    Args:
        confidence: probability of the most likely class of each image, shape (n,).
        right: whether that class is correct, shape (n,).

    Returns:
        The error, from 0 to 1; NaN if any confidence is NaN.
    """
    if np.isnan(confidence).any():
        return math.nan
    gaps = np.bincount(_bins(confidence), confidence - right, BINS)
    return float(np.abs(gaps).sum() / len(right))


def _bins(confidence: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.clip(np.ceil(confidence * BINS) - 1, 0, BINS - 1).astype(np.int64)


@torch.no_grad()
def measure(
    forward: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    classes: tuple[str, ...],
    *,
    keep_probabilities: bool = False,
    temperature: float | None = None,
    observe: Callable[[Batch, Tensor], None] | None = None,
) -> Scores:
    """Computes the scores of a model.

    Args:
        forward: maps images (B, C, H, W) to logits (B, classes), in evaluation mode.
        batches: batches from `vitral.data.loader.eval_batches`.
        classes: names of the logits.
        keep_probabilities: keep the probabilities of all classes, 4 bytes per image and class.
        temperature: for the calibrated confidence; None for none.
        observe: called with each batch and its logits (n, classes), float32.
    """
    C = len(classes)
    k, kept = min(5, C), C if keep_probabilities else 0
    # Starts with an empty part, because one of many processes may have no images.
    empty = torch.zeros(0)
    parts: list[tuple[Tensor, ...]] = [
        (empty.long(), torch.zeros(0, k).long(), *[empty.double()] * 3, torch.zeros(0, kept))
    ]
    for batch in batches:
        truth = batch.targets
        logits = forward(batch.images)[: len(truth)].float()
        probabilities = logits.softmax(1)
        top_classes = probabilities.topk(k)
        losses = F.cross_entropy(logits, truth, reduction="none")
        best = top_classes.values[:, 0]
        scaled = best if temperature is None else confidence(logits, temperature)
        found = (truth, top_classes.indices, best, losses, scaled, probabilities[:, :kept])
        truth, ranked, *values, probabilities = (column.cpu() for column in found)
        parts.append((truth, ranked, *(column.double() for column in values), probabilities))
        if observe is not None:
            observe(batch, logits)
    *columns, calibrated, probabilities = (
        torch.cat(column).numpy() for column in zip(*parts, strict=True)
    )
    return Scores(
        classes,
        *columns,
        probabilities=probabilities if keep_probabilities else None,
        temperature=temperature,
        calibrated=None if temperature is None else calibrated,
    )


def merge(parts: Sequence[Scores]) -> Scores:
    """Concatenates the scores of several parts of a dataset, in order."""
    columns = ("labels", "ranked", "confidence", "losses", "probabilities", "calibrated")
    arrays = {name: [getattr(part, name) for part in parts] for name in columns}
    joined = {name: np.concatenate(each) for name, each in arrays.items() if each[0] is not None}
    return dataclasses.replace(parts[0], **joined)
