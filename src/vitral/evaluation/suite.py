"""A model on ImageNet's test sets: how its accuracy holds where images come from elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitral.config import Config
from vitral.data.imagenet import wnids
from vitral.data.loader import EVAL_BATCH
from vitral.errors import UserError, first_few
from vitral.evaluation.evaluate import prepare, score
from vitral.evaluation.scores import Scores, calibration_error
from vitral.evaluation.table import Row
from vitral.evaluation.testsets import IMAGENET, REAL, LabeledSet, Suite, find_suite, read_real
from vitral.weights import Weights, Which

NO_SCORES = (float("nan"),) * 3
Truth = NDArray[np.bool_]
"""Which classes are right for each image, none where it does not count. Shape (N, classes)."""


def evaluate_suite(
    weights: Weights | str | Path,
    suite: Suite | str | Path,
    *,
    which: Which | None = None,
    batch_size: int = EVAL_BATCH,
    workers: int | None = None,
    device: str = "auto",
) -> Iterator[Row]:
    """Scores on each test set of ImageNet-1K in a folder, one after the other.

    A set is scored on the classes that both it and the weights know: images of others are left
    out, and so are the logits of other classes. On ImageNet-A and ImageNet-R that are 200 classes,
    as their authors have it (Hendrycks et al. 2021), and for weights with a few classes of ImageNet
    those few. ReaL (Beyer et al. 2020) takes the classes of the validation images that are there;
    a prediction is right if it is among an image's labels, and an image without is left out.

    Args:
        weights: loaded weights, or a weight or run directory, whose classes are named by wnid.
        suite: what `find_suite` found, or the folder to look in.
        which: "model" or "ema"; None takes the one that the weights name.
        batch_size: images of a forward pass.
        workers: decoding processes; None takes the cores but one.
        device: "cpu", "cuda", "mps", "xpu", or "auto" for a GPU if there is one.

    Returns:
        A row for each of `suite.names()`. Where fewer than two classes are known to both, nothing
        is scored.

    Raises:
        UserError: for weights or sets that cannot be read, or weights with other classes.
    """
    weights = prepare(weights, which, device)
    suite = suite if isinstance(suite, Suite) else find_suite(suite)
    _check_classes(weights, suite)
    real = None if suite.real is None else read_real(suite.real)
    settings = weights.description.config
    data = dataclasses.replace(settings.data, workers=workers)
    config = dataclasses.replace(settings, data=data)
    return (
        row
        for each in suite.sets
        for row in _rows(weights, each, real if each.kind == IMAGENET else None, config, batch_size)
    )


def _rows(
    weights: Weights,
    labeled: LabeledSet,
    real: list[list[int]] | None,
    config: Config,
    batch_size: int,
) -> Iterator[Row]:
    """A row for the set's own labels, and one for ReaL's, from the same forward passes."""
    shared = _common_classes(weights, labeled)
    truths = {labeled.kind.name: _own_truth(labeled, shared)}
    if real is not None:
        truths[REAL.name] = _real_truth(labeled, shared, real)
    right = np.logical_or.reduce([*truths.values()])
    scored = right.any(1)
    if len(shared) < 2 or not scored.any():
        yield from (Row(name, 0, len(shared), *NO_SCORES) for name in truths)
        return
    # One label each, as cross-entropy wants it, which is not reported here.
    labels = right[scored].argmax(1)
    records = dataclasses.replace(labeled.records.take(scored), labels=labels)
    scores = score(weights, records, shared, config, batch_size)
    for name, truth in truths.items():
        yield _row(name, scores, truth[scored])


def _row(name: str, scores: Scores, truth: Truth) -> Row:
    """The figures for those images that have a right class in `truth`."""
    counts = truth.any(1)
    if not counts.any():
        return Row(name, 0, len(scores.classes), *NO_SCORES)
    right = np.take_along_axis(truth, scores.ranked, 1)[counts]  # of the five likeliest classes
    return Row(
        name,
        len(right),
        len(scores.classes),
        float(right[:, 0].mean()),
        float(right.any(1).mean()),
        calibration_error(scores.confidence[counts], right[:, 0]),
    )


def _common_classes(weights: Weights, labeled: LabeledSet) -> tuple[str, ...]:
    """The classes that both know, sorted."""
    return tuple(sorted({*weights.description.classes} & {*labeled.classes}))


def _own_truth(labeled: LabeledSet, shared: tuple[str, ...]) -> Truth:
    known = np.array(labeled.classes)[:, None] == np.array(shared, str)
    return known[labeled.records.labels]


def _real_truth(labeled: LabeledSet, shared: tuple[str, ...], real: list[list[int]]) -> Truth:
    """ReaL's labels by the number in each image's name."""
    position = {wnid: i for i, wnid in enumerate(shared)}
    columns = [position.get(wnid) for wnid in wnids()]
    truth = np.zeros((len(labeled.records), len(shared)), bool)
    for i, number in enumerate(labeled.numbers().tolist()):
        for label in real[number - 1] if number else []:
            column = columns[label]
            if column is not None:
                truth[i, column] = True
    return truth


def _check_classes(weights: Weights, suite: Suite) -> None:
    classes = weights.description.classes
    if not {*classes} & {*wnids()}:
        raise UserError(
            f"weights: {weights.path}: expected classes of ImageNet by wnid, such as n01440764, "
            f"got {first_few(classes)}; --suite is for ImageNet's classes, --data for others"
        )
    if all(len(_common_classes(weights, each)) < 2 for each in suite.sets):
        raise UserError(
            f"suite: {suite.root}: expected a set with two or more of the {len(classes):,} classes "
            f"that the weights know, got {', '.join(suite.names())} without; give another folder"
        )
