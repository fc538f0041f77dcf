"""Settings of a run that depend on whether an image can have several labels."""

from __future__ import annotations

import dataclasses

from vitral.config import Config
from vitral.data.splits import Dataset
from vitral.errors import UserError


def adapt_to_labels(config: Config, dataset: Dataset) -> tuple[Config, list[str]]:
    """Returns the settings for training on a dataset, and notes about changed ones.

    Raises:
        UserError: if a setting does not support the labels of the dataset.
    """
    train = config.train
    if not dataset.multi_label:
        if train.best_by == "map":
            raise UserError(
                "train.best_by: expected top1, balanced, f1 or loss for images with one label "
                "each, got map"
            )
        return config, []
    head_only = train.trainable == "head" or train.probe_first
    for name, value, expected, refused in (
        ("train.class_weights", train.class_weights, "none", True),
        ("train.logit_adjustment", train.logit_adjustment, 0.0, True),
        ("data.sampling", config.data.sampling, "uniform", head_only),
        ("train.best_by", train.best_by, "map", train.best_by == "balanced"),
    ):
        if refused and value != expected:
            what = " if a head is fitted" if name == "data.sampling" else ""
            raise UserError(
                f"{name}: expected {expected} for images with several labels{what}, got {value}"
            )
    changes = {"loss": "bce"} if train.loss == "ce" else {}
    changes |= {"best_by": "map"} if train.best_by == "top1" else {}
    notes = [f"train.{name}: {getattr(train, name)} -> {new}" for name, new in changes.items()]
    train = dataclasses.replace(train, **changes)
    note = f"images with several labels: {', '.join(notes)}"
    return dataclasses.replace(config, train=train), [note] if notes else []
