"""Likely label errors: labels that a model which was not trained on them considers improbable.

The images are ranked by normalized margin, a score of confident learning (Northcutt et al. 2021).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from vitral.data.imagenet import human_name
from vitral.data.records import Records, groups_of, image_path
from vitral.data.sampling import Integers
from vitral.storage import write_csv

FILE = "label_errors.csv"


@dataclass(frozen=True, eq=False)
class CheckedLabels:
    """The labels of a split compared with predictions."""

    split: str
    records: Records
    scores: NDArray[np.float64]
    """Probability of the label minus that of the most probable other class, from -1 to 1; NaN for
    images that are not checked. Shape (N,)."""
    suggested: Integers
    """The most probable class if it is not the label, otherwise -1. Shape (N,)."""
    confidence: NDArray[np.float64]
    """Probability of the suggested class, otherwise NaN. Shape (N,)."""
    estimate: int
    """Number of images that confident learning counts as label errors."""

    @classmethod
    def of(
        cls, split: str, records: Records, images: Integers, probabilities: NDArray[np.float32]
    ) -> Self:
        """Compares labels with predictions.

        Args:
            images: indices of the images with predictions, shape (n,).
            probabilities: predictions of a model that was not trained on these images, shape (n,
                classes). Images with NaN are not checked.
        """
        known = ~np.isnan(probabilities).any(1)
        images, probabilities = images[known], probabilities[known]
        rows, labels = np.arange(len(images)), records.labels[images]
        of_label, others = probabilities[rows, labels], probabilities.copy()
        others[rows, labels] = -1
        best = others.argmax(1)
        margins = of_label - others[rows, best]
        N = len(records)
        scores, confidence, suggested = np.full(N, np.nan), np.full(N, np.nan), np.full(N, -1)
        scores[images] = margins
        wrong = images[margins < 0]
        suggested[wrong] = best[margins < 0]
        confidence[wrong] = others[rows, best][margins < 0]
        estimate = count_errors(labels, probabilities)
        return cls(split, records, scores, suggested, confidence, estimate)


def count_errors(labels: Integers, probabilities: NDArray[np.float32]) -> int:
    """Estimates the number of label errors by the confident joint of Northcutt et al. 2021.

    The threshold of a class is the mean probability of the class for the images with this label.
    An image counts if, of the classes whose probability reaches their threshold, the most probable
    is not its label.

    Args:
        labels: shape (n,).
        probabilities: shape (n, classes).
    """
    C = probabilities.shape[1]
    counts = np.bincount(labels, minlength=C)
    of_label = probabilities[np.arange(len(labels)), labels]
    sums = np.bincount(labels, of_label, C)
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    confident = np.where(probabilities >= thresholds, probabilities, -1)
    return int(np.sum((confident.max(1) >= 0) & (confident.argmax(1) != labels)))


@dataclass(frozen=True, eq=False)
class LabelErrors:
    """The labels of a dataset, compared with predictions."""

    classes: tuple[str, ...]
    splits: tuple[CheckedLabels, ...]

    def ranked(self) -> Iterator[tuple[CheckedLabels, int]]:
        """Yields split and index of each image: lowest score first, unchecked images last."""
        scores = np.concatenate([split.scores for split in self.splits])
        owner = np.repeat(np.arange(len(self.splits)), [len(split.scores) for split in self.splits])
        index = np.concatenate([np.arange(len(split.scores)) for split in self.splits])
        for i in np.argsort(scores, kind="stable").tolist():
            yield self.splits[owner[i]], int(index[i])

    def write(self, path: Path) -> None:
        """Writes a table of labels with all images, most likely errors first.

        After the labels in it are corrected, it can be used as `data.path`. For wnids, columns with
        their names are added.
        """
        grouped = groups_of(self.splits[0].records) is not None
        named = any(map(human_name, self.classes))
        header = ["image", "label", "split", *["group"] * grouped]
        header += ["suggested", "confidence", "score", *["label_name", "suggested_name"] * named]
        write_csv(path, header, (self._row(*item, named) for item in self.ranked()))

    def _row(self, split: CheckedLabels, i: int, named: bool) -> list[object]:
        label, groups = self.classes[split.records.labels[i]], groups_of(split.records)
        wrong = split.suggested[i] >= 0
        suggested = self.classes[split.suggested[i]] if wrong else ""
        confidence = f"{split.confidence[i]:.4f}" if wrong else ""
        score = "" if np.isnan(split.scores[i]) else f"{split.scores[i]:.4f}"
        row = [image_path(split.records, i), label, split.split]
        row += [] if groups is None else [int(groups[i])]
        row += [suggested, confidence, score]
        return row + ([human_name(label), human_name(suggested)] if named else [])
