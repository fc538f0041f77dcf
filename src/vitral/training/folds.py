"""Cross-validation of a linear classifier on the features that a run has stored."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vitral import weights
from vitral.data.imagenet import display
from vitral.data.records import groups_of
from vitral.data.sampling import Integers, divide
from vitral.errors import UserError, counted
from vitral.report.predictions import open_dataset_of
from vitral.rundir import RunDir
from vitral.storage import write_csv
from vitral.training.balance import NO_BALANCE, Balance
from vitral.training.frozen import Features, read_features
from vitral.training.probe import fit

FOLDS = "folds.csv"


def cross_validate(path: Path, count: int) -> str:
    """Computes the accuracy in each of `count` folds of the training images, overall and per class.

    Writes folds.csv in the run directory. Folds do not divide groups.

    Args:
        path: directory of a finished run with `train.trainable` head.

    Returns:
        A table of the means and standard deviations over the folds.

    Raises:
        UserError: if a fold has no images of a class, or the run's dataset cannot be opened.
    """
    run = RunDir(path)
    known = weights.read_description(path)[1]
    if known.multi_label:
        raise UserError("folds: expected images with one label each, got several; omit --folds")
    train = open_dataset_of(known)[1].train
    assert train is not None
    features, seed = read_features(run.features), known.config.train.seed
    names = [display(name) for name in known.classes]
    _, first = np.unique(features.images, return_index=True)
    labels = features.labels.numpy()[first]
    balance = Balance.of(known.config, known.classes, labels, each_once=True)
    correct, labels, fold = predict_folds(
        features, len(names), count, seed, names, balance, groups_of(train)
    )
    subsets = {"all": np.ones(len(labels), bool)}
    subsets |= {name: labels == i for i, name in enumerate(names)}
    table = {
        name: [float(correct[members & (fold == k)].mean()) for k in range(count)]
        for name, members in subsets.items()
    }
    header = ("class", *(f"fold{k + 1}" for k in range(count)))
    write_csv(path / FOLDS, header, [(name, *values) for name, values in table.items()])
    width = max(map(len, [*table, "class"]))
    lines = [
        f"{count} folds of {counted(len(labels), 'training image')}",
        f"{'class':{width}}  top-1",
    ]
    for name, values in table.items():
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        lines.append(f"{name:{width}}  {mean:.2%} ± {deviation:.2%}")
    return "\n".join(lines)


def predict_folds(
    features: Features,
    num_classes: int,
    count: int,
    seed: int,
    names: Sequence[str],
    balance: Balance = NO_BALANCE,
    groups: Integers | None = None,
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """Classifies each image with a head that is fitted to the other folds.

    Args:
        groups: group of each image of the split, which the folds do not divide.

    Returns:
        Whether each image is classified correctly, its label and its fold, each (n,).
    """
    images, first, inverse = np.unique(features.images, return_index=True, return_inverse=True)
    labels = features.labels.numpy()[first]
    counts = np.bincount(labels, minlength=num_classes)
    if counts.min() < count:
        raise UserError(
            f"folds: expected at least {count} training images of each class, got "
            f"{counts.min()} of {names[int(counts.argmin())]}; use fewer folds or more images"
        )
    own = None if groups is None else groups[images]
    fold = divide(images, labels, count, seed, "folds", own)
    empty = np.argwhere(np.bincount(labels * count + fold, minlength=num_classes * count) == 0)
    if len(empty):
        raise UserError(
            f"folds: expected images of each class in each fold, got none of "
            f"{names[int(empty[0, 0]) // count]} in one of them, because groups are not divided; "
            "use fewer folds"
        )
    correct = np.empty(len(images), bool)
    for k in range(count):
        rows = torch.from_numpy(fold[inverse] != k)
        part = Features(features.vectors[rows], features.labels[rows], features.images[rows], {})
        own = fold == k
        head = fit(part, num_classes, seed, balance=balance, groups=groups)
        correct[own] = head.predict(features.vectors[first[own]]).numpy() == labels[own]
    return correct, labels, fold
