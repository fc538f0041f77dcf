"""Selects the best weights of a run, and stops it early, by `train.best_by`."""

from __future__ import annotations

from collections.abc import Mapping

from vitral.config import TrainConfig
from vitral.data.sampling import count_labels
from vitral.data.splits import Dataset
from vitral.data.tools.check import MAX_IMBALANCE
from vitral.errors import counted
from vitral.evaluation.output import TITLES
from vitral.training.resume import Progress

Metrics = Mapping[str, Mapping[str, float]]
"""Results of a validation: metrics by name, of "val" (raw weights) and, if enabled, "ema"."""


def select(progress: Progress, train: TrainConfig, metrics: Metrics) -> tuple[str, bool]:
    """Counts a validation in `progress`; returns the better weights and whether they improved."""
    kind = max(metrics, key=lambda name: train.rank(metrics[name]))
    # The first validation is always the best so far, even if its loss is NaN.
    improved = progress.best["step"] < 0 or train.rank(metrics[kind]) > train.rank(progress.best)
    progress.stale = 0 if improved else progress.stale + 1
    if improved:
        progress.best = {"step": progress.step, **metrics[kind]}
    return kind, improved


def finished(progress: Progress, train: TrainConfig, total: int) -> bool:
    """Returns whether the last of `total` steps is validated, or `train.patience` has run out."""
    return progress.evaluated == total or 0 < train.patience <= progress.stale


def early_stop_message(train: TrainConfig, epoch: float) -> str:
    """Returns the reason why a run stops before its last epoch."""
    return (
        f"stopped at epoch {epoch:.0f}: {TITLES[train.best_by]} has not improved in "
        f"{counted(train.patience, 'validation')} (train.patience); the learning rate schedule was "
        f"planned for {counted(train.epochs, 'epoch')}"
    )


def is_imbalanced(dataset: Dataset) -> bool:
    """Returns whether the validation images of classes differ so much that top-1 is misleading."""
    assert dataset.val is not None
    counts = count_labels(dataset.val.labels, len(dataset.classes))
    return bool(counts.max() > MAX_IMBALANCE * max(counts.min(), 1))


def validation_message(
    train: TrainConfig, metrics: Metrics, *, imbalanced: bool, multi_label: bool
) -> str:
    """Formats a validation as text: top-1 or mAP, and other metrics if they matter."""
    best_by = train.best_by
    names = {"map": "mAP"} if multi_label else {"top1": "top-1"}
    balanced = not multi_label and (imbalanced or best_by == "balanced")
    names |= {"balanced": "balanced"} if balanced else {}
    names |= {"f1": "F1"} if multi_label or best_by == "f1" else {}
    shown = (
        f"{kind} {', '.join(f'{title} {each[name]:.2%}' for name, title in names.items())}"
        for kind, each in metrics.items()
    )
    return f"{'  '.join(shown)}  val loss {metrics['val']['loss']:.3f}"
