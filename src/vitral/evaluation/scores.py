"""Predictions of a model on a labeled dataset, and the metrics computed from them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitral.data.imagenet import display, human_name
from vitral.data.loader import Batch
from vitral.errors import counted
from vitral.evaluation.table import Row, write_csv

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
    """(n, classes): the probabilities of all classes, if they are kept."""

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
        """Returns the loss, top-1, top-5 and calibration error by name."""
        return {
            "loss": self.loss,
            "top1": self.top1,
            "top5": self.top5,
            "ece": self.calibration_error,
        }

    def row(self, name: str) -> Row:
        """Returns the metrics as a row of a table."""
        images, classes = len(self.labels), len(self.classes)
        return Row(name, images, classes, self.top1, self.top5, self.calibration_error)

    def per_class(self) -> list[tuple[str, int, float, float]]:
        """Returns the name, images, top-1 and top-5 of each class that has images."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        first, five = (np.bincount(self.labels, self.hits(k), len(self.classes)) for k in (1, 5))
        return [
            (name, int(n), float(a / n), float(b / n))
            for name, n, a, b in zip(self.classes, counts, first, five, strict=True)
            if n
        ]

    def confusion(self) -> NDArray[np.int64]:
        """Returns image counts by true (row) and predicted (column) class: (classes, classes)."""
        C = len(self.classes)
        return np.bincount(self.labels * C + self.ranked[:, 0], minlength=C * C).reshape(C, C)

    def confused_pairs(self) -> list[tuple[str, str, int]]:
        """Returns the true class, predicted class and images per confusion, most frequent first."""
        wrong = ~self.hits(1)
        pairs = Counter(zip(self.labels[wrong], self.ranked[wrong, 0], strict=True))
        ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
        return [(self.classes[a], self.classes[b], n) for (a, b), n in ordered]

    def write_tables(self, directory: Path) -> None:
        """Writes per_class.csv and confused_pairs.csv; for wnids, adds columns with their names."""
        tables = {
            "per_class.csv": (1, ("class", "images", "top1", "top5"), self.per_class()),
            "confused_pairs.csv": (2, ("class", "predicted", "images"), self.confused_pairs()),
        }
        for name, (k, header, rows) in tables.items():
            if any(map(human_name, self.classes)):
                header = (*header, *(f"{column}_name" for column in header[:k]))
                rows = [(*row, *(human_name(str(name)) for name in row[:k])) for row in rows]
            write_csv(directory / name, header, rows)


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
) -> Scores:
    """Computes the scores of a model.

    Args:
        forward: maps images (B, C, H, W) to logits (B, classes), in evaluation mode.
        batches: batches from `vitral.data.loader.eval_batches`.
        classes: names of the logits.
        keep_probabilities: whether to keep the probabilities of all classes.
    """
    k = min(5, len(classes))
    # Starts with an empty part, because one of many processes may have no images.
    empty = torch.zeros(0)
    parts: list[tuple[Tensor, ...]] = [
        (empty.long(), torch.zeros(0, k).long(), empty.double(), empty.double())
    ]
    probabilities = [np.empty((0, len(classes)), np.float32)]
    for batch in batches:
        truth = batch.targets
        logits = forward(batch.images)[: len(truth)].float()
        top_classes = logits.softmax(1).topk(k)
        if keep_probabilities:
            probabilities.append(logits.softmax(1).cpu().numpy())
        losses = F.cross_entropy(logits, truth, reduction="none")
        found = (truth, top_classes.indices, top_classes.values[:, 0], losses)
        truth, ranked, confidence, losses = (column.cpu() for column in found)
        parts.append((truth, ranked, confidence.double(), losses.double()))
    kept = np.concatenate(probabilities) if keep_probabilities else None
    columns = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return Scores(classes, *columns, probabilities=kept)


def merge(parts: Sequence[Scores]) -> Scores:
    """Concatenates the scores of several parts of a dataset, in order."""
    columns = ("labels", "ranked", "confidence", "losses")
    joined = (np.concatenate([getattr(part, name) for part in parts]) for name in columns)
    return Scores(parts[0].classes, *joined)


def summarize(scores: Scores) -> str:
    """Formats the metrics and a table of classes; for over 20, only the worst and the best."""
    lines = [
        f"{counted(len(scores.labels), 'image')}, {counted(len(scores.classes), 'class')}",
        f"top-1 {scores.top1:.2%}   top-5 {scores.top5:.2%}   loss {scores.loss:.4f}   "
        f"calibration error {scores.calibration_error:.2%}",
    ]
    table = scores.per_class()
    if len(table) > 20:
        table = sorted(table, key=lambda row: row[2])
        table = table[:10] + table[-5:]
        lines.append("the ten worst and the five best classes:")
    width = max(len("class"), *(len(display(row[0])) for row in table))
    lines.append(f"{'class':{width}}  images    top-1    top-5")
    for name, count, top1, top5 in table:
        lines.append(f"{display(name):{width}}  {count:6,}  {top1:7.2%}  {top5:7.2%}")
    return "\n".join(lines)
