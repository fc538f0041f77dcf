"""Predictions for images with any number of labels, and the metrics computed from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitral.data.imagenet import display
from vitral.data.loader import Batch
from vitral.errors import counted
from vitral.evaluation.table import write_metrics, write_named

DEFAULT_THRESHOLD = 0.5  # for a class without images
Targets = NDArray[np.uint8]
Probabilities = NDArray[np.float32]


class ClassScores(NamedTuple):
    """Metrics of one class; NaN if they are undefined."""

    name: str
    images: int
    """Number of images with the class."""
    average_precision: float
    roc_auc: float
    precision: float
    recall: float
    f1: float
    threshold: float


@dataclass(frozen=True)
class MultiLabelScores:
    """The predictions for n images, in the order of the dataset.

    Precision, recall and F1 are those of the predictions `probabilities >= thresholds`. Macro
    averages are over the classes that have images.
    """

    classes: tuple[str, ...]
    labels: Targets
    """(n, classes): 1 for the labels of each image, otherwise 0."""
    probabilities: Probabilities
    """(n, classes); 0 if the model's output is not finite."""
    losses: NDArray[np.float64]
    """(n,): the binary cross-entropy of each image, averaged over the classes, in nats."""
    given: tuple[float, ...] = ()
    """Thresholds of the classes; if empty, they are chosen on these images."""

    @cached_property
    def thresholds(self) -> NDArray[np.float64]:
        """The threshold of each class, (classes,)."""
        return (
            np.array(self.given) if self.given else best_thresholds(self.labels, self.probabilities)
        )

    @cached_property
    def predicted(self) -> NDArray[np.bool_]:
        """The predicted labels, (n, classes)."""
        return self.probabilities >= self.thresholds

    @property
    def loss(self) -> float:
        """Mean binary cross-entropy, in nats."""
        return float(self.losses.mean())

    @property
    def mean_ap(self) -> float:
        """Mean of the average precision of the classes (mAP)."""
        return macro_average_precision(self.labels, self.probabilities)

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of a validation by name, as in the metrics log.

        These are the loss, the macro and micro averages of the average precision (`map` and
        `micro_ap`), and those of F1 (`f1` and `micro_f1`).
        """
        from sklearn.metrics import f1_score

        known = np.flatnonzero(self.labels.any(0))
        f1 = [f1_score(self.labels[:, i], self.predicted[:, i]) for i in known]
        pooled = 0.0
        if self.labels.any():
            pooled = f1_score(self.labels.ravel(), self.predicted.ravel())
        return {
            "loss": self.loss,
            "map": self.mean_ap,
            "micro_ap": average_precision(self.labels.ravel(), self.probabilities.ravel()),
            "f1": float(np.mean(f1)) if f1 else math.nan,
            "micro_f1": float(pooled),
        }

    def per_class(self) -> list[ClassScores]:
        """Returns the metrics of each class."""
        columns = zip(
            self.classes,
            self.labels.T,
            self.probabilities.T,
            self.predicted.T,
            self.thresholds.tolist(),
            strict=True,
        )
        return [_class_scores(*column) for column in columns]

    def write_tables(self, directory: Path) -> None:
        """Writes per_class.csv; for wnids, adds a column with their names."""
        header = ("class", *ClassScores._fields[1:])
        write_named(directory / "per_class.csv", self.classes, 1, header, self.per_class())

    def write_results(self, directory: Path) -> None:
        """Writes metrics.json and the table of `write_tables`."""
        facts = {"images": len(self.labels), "classes": len(self.classes)}
        write_metrics(directory / "metrics.json", self.metrics(), facts)
        self.write_tables(directory)


def _class_scores(
    name: str,
    truth: Targets,
    probabilities: Probabilities,
    predicted: NDArray[np.bool_],
    threshold: float,
) -> ClassScores:
    from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

    images = int(truth.sum())
    ap, auc = average_precision(truth, probabilities), math.nan
    if 0 < images < len(truth):
        auc = float(roc_auc_score(truth, probabilities))
    found = precision_recall_fscore_support(truth, predicted, average="binary", zero_division=0)  # pyright: ignore[reportArgumentType]
    precision, recall, f1 = map(float, found[:3])
    if not images:
        recall = f1 = math.nan
    return ClassScores(name, images, ap, auc, precision, recall, f1, threshold)


def average_precision(truth: Targets, probabilities: Probabilities) -> float:
    """Returns the average precision of a class, (n,) each; NaN if no image has it."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(truth, probabilities)) if truth.any() else math.nan


def macro_average_precision(labels: Targets, probabilities: Probabilities) -> float:
    """Returns the mean average precision of the classes that have images, (n, classes) each."""
    known = np.flatnonzero(labels.any(0))
    values = [average_precision(labels[:, i], probabilities[:, i]) for i in known]
    return float(np.mean(values)) if values else math.nan


def best_thresholds(labels: Targets, probabilities: Probabilities) -> NDArray[np.float64]:
    """Returns the threshold of each class that maximizes its F1 on these images, (classes,).

    It is in the middle between two probabilities, or between the lowest and 0; of equally good
    ones, it is the highest. A class without images has DEFAULT_THRESHOLD.
    """
    from sklearn.metrics import precision_recall_curve

    found = np.full(labels.shape[1], DEFAULT_THRESHOLD)
    for i in np.flatnonzero(labels.any(0)):
        precision, recall, values = precision_recall_curve(labels[:, i], probabilities[:, i])
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        best = len(values) - 1 - int(f1[:-1][::-1].argmax())
        lower = values[best - 1] if best else 0.0
        found[i] = (float(values[best]) + float(lower)) / 2
    return found


@torch.no_grad()
def measure(
    forward: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    classes: tuple[str, ...],
    thresholds: tuple[float, ...] = (),
) -> MultiLabelScores:
    """Computes the scores of a model.

    Args:
        forward: maps images (B, C, H, W) to logits (B, classes), in evaluation mode.
        batches: batches from `vitral.data.loader.eval_batches`, with labels for the first of the
            classes; images do not have the others.
        classes: names of the logits.
        thresholds: threshold of each class; if empty, they are chosen on these images.
    """
    # Starts with an empty part, because one of many processes may have no images.
    labels, probabilities = [torch.zeros(0, len(classes)).byte()], [torch.zeros(0, len(classes))]
    losses = [torch.zeros(0).double()]
    for batch in batches:
        truth = F.pad(batch.targets, (0, len(classes) - batch.targets.shape[1]))
        logits = forward(batch.images)[: len(truth)].float()
        loss = F.binary_cross_entropy_with_logits(logits, truth.float(), reduction="none")
        labels.append(truth.cpu())
        probabilities.append(logits.sigmoid().nan_to_num(0.0).cpu())
        losses.append(loss.mean(1).double().cpu())
    parts = (torch.cat(part).numpy() for part in (labels, probabilities, losses))
    truth, found, loss = parts
    return MultiLabelScores(classes, truth, found, loss, thresholds)


def merge(parts: Sequence[MultiLabelScores]) -> MultiLabelScores:
    """Concatenates the scores of several parts of a dataset, in order."""
    return MultiLabelScores(
        parts[0].classes,
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.probabilities for part in parts]),
        np.concatenate([part.losses for part in parts]),
        parts[0].given,
    )


def summarize(scores: MultiLabelScores) -> str:
    """Formats the metrics and a table of classes; for over 20, only the worst and the best."""
    values = scores.metrics()
    source = "stored with the weights" if scores.given else "chosen on these images"
    lines = [
        f"{counted(len(scores.labels), 'image')}, {counted(len(scores.classes), 'class')}, "
        f"{scores.labels.sum() / max(len(scores.labels), 1):.2f} labels per image",
        f"average precision: macro (mAP) {values['map']:.2%}   "
        f"micro {values['micro_ap']:.2%}   loss {values['loss']:.4f}",
        f"F1: macro {values['f1']:.2%}   micro {values['micro_f1']:.2%}, at the thresholds "
        f"{source}",
    ]
    table = scores.per_class()
    if len(table) > 20:
        table = sorted(
            (row for row in table if row.images), key=lambda row: (row.average_precision, row.name)
        )
        table = table[:10] + table[-5:] if len(table) > 15 else table
        lines.append("the classes with the lowest and the highest average precision:")
    width = max(len("class"), *(len(display(row.name)) for row in table))
    lines.append(
        f"{'class':{width}}  images  average precision  ROC AUC  precision   recall       F1  "
        "threshold"
    )
    for row in table:
        lines.append(
            f"{display(row.name):{width}}  {row.images:6,}  {row.average_precision:17.2%}  "
            f"{row.roc_auc:7.4f}  {row.precision:9.2%}  {row.recall:7.2%}  {row.f1:7.2%}  "
            f"{row.threshold:9.4f}"
        )
    return "\n".join(lines)
