"""Evaluates a model on ImageNet's test sets to measure accuracy under distribution shift."""

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
"""Correct classes of each image; images without any are not scored. Shape (N, classes)."""


def evaluate_suite(
    weights: Weights | str | Path,
    suite: Suite | str | Path,
    *,
    which: Which | None = None,
    batch_size: int = EVAL_BATCH,
    workers: int | None = None,
    device: str = "auto",
) -> Iterator[Row]:
    """Evaluates weights on each test set of ImageNet-1K in a folder, one set at a time.

    Each set is evaluated on the classes that it shares with the weights; images and logits of other
    classes are removed. For ImageNet-A and ImageNet-R, these are 200 classes, as in their paper
    (Hendrycks et al. 2021), or fewer if the weights have only some of ImageNet's classes. ReaL
    (Beyer et al. 2020) uses the classes of the available validation images. A prediction is correct
    if it is among the labels of the image; images without labels are skipped.

    Args:
        weights: loaded weights, or anything that `load` accepts, with classes named by wnid.
        suite: the result of `find_suite`, or the folder to search.
        which: "model" or "ema"; None uses the default of the weights.
        batch_size: images per forward pass.
        workers: number of decoding processes; None uses all cores but one.
        device: "cpu", "cuda", "mps", "xpu", or "auto" to use a GPU if there is one.

    Returns:
        An iterator over rows, one for each of `suite.names()`. A row has no scores if fewer than
        two classes are shared.

    Raises:
        UserError: if the weights or sets cannot be read, or the weights have different classes.
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
    """Yields rows for the set's own labels and for ReaL's, from the same forward passes."""
    shared = _common_classes(weights, labeled)
    truths = {labeled.kind.name: _own_truth(labeled, shared)}
    if real is not None:
        truths[REAL.name] = _real_truth(labeled, shared, real)
    right = np.logical_or.reduce([*truths.values()])
    scored = right.any(1)
    if len(shared) < 2 or not scored.any():
        yield from (Row(name, 0, len(shared), *NO_SCORES) for name in truths)
        return
    # The cross-entropy, which is not reported here, needs one label per image.
    labels = right[scored].argmax(1)
    records = dataclasses.replace(labeled.records.take(scored), labels=labels)
    scores = score(weights, records, shared, config, batch_size)
    for name, truth in truths.items():
        yield _row(name, scores, truth[scored])


def _row(name: str, scores: Scores, truth: Truth) -> Row:
    """Returns the metrics for the images that have a correct class in `truth`."""
    counts = truth.any(1)
    if not counts.any():
        return Row(name, 0, len(scores.classes), *NO_SCORES)
    right = np.take_along_axis(truth, scores.ranked, 1)[counts]  # for the five most likely classes
    return Row(
        name,
        len(right),
        len(scores.classes),
        float(right[:, 0].mean()),
        float(right.any(1).mean()),
        calibration_error(scores.confidence[counts], right[:, 0]),
    )


def _common_classes(weights: Weights, labeled: LabeledSet) -> tuple[str, ...]:
    """Returns the classes that the weights and the set share, sorted."""
    return tuple(sorted({*weights.description.classes} & {*labeled.classes}))


def _own_truth(labeled: LabeledSet, shared: tuple[str, ...]) -> Truth:
    known = np.array(labeled.classes)[:, None] == np.array(shared, str)
    return known[labeled.records.labels]


def _real_truth(labeled: LabeledSet, shared: tuple[str, ...], real: list[list[int]]) -> Truth:
    """Looks up ReaL's labels by the number in each image's name."""
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
            f"weights: {weights.path}: expected ImageNet classes by wnid, such as n01440764, "
            f"got {first_few(classes)}; use --data instead of --suite for other classes"
        )
    if all(len(_common_classes(weights, each)) < 2 for each in suite.sets):
        raise UserError(
            f"suite: {suite.root}: expected a test set with two or more of the {len(classes):,} "
            f"classes of the weights, got only {', '.join(suite.names())}; specify another folder"
        )
