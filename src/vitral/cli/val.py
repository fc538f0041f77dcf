"""Evaluate weights: accuracy, F1, per-class metrics and calibration on a labeled dataset.

--image-sizes reports the accuracy at several image sizes. --suite reports the accuracy on the
ImageNet test sets: validation, ReaL, V2, A, R and Sketch.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vitral.cli.common import EngineOptions, TableOptions
from vitral.errors import UserError, printable
from vitral.files import check_writable

if TYPE_CHECKING:
    from vitral.data.splits import Dataset
    from vitral.evaluation import Scores
    from vitral.weights import Weights

ARGUMENTS = {"weights": "WEIGHTS"}


@dataclass(frozen=True, kw_only=True)
class Options(TableOptions, EngineOptions):
    """Options of `vitral val`."""

    data: str | None = None
    """Image folder, table of labels, or known dataset. Default: the dataset that the weights were
    trained on."""
    image_sizes: tuple[int, ...] | None = None
    """Image sizes to evaluate at, multiples of the patch size, with the same crop fraction."""
    suite: str | None = None
    """Folder that contains the ImageNet test sets, each in its own folder."""
    classes: Literal["subset", "all"] | None = None
    """Candidate classes if the dataset has only a subset of the weights' classes: this subset, or
    all. Default: subset, or all for a dataset with one class."""
    which: Literal["model", "ema"] | None = None
    """Weights to use: raw (model) or averaged (ema). Default: as stored with the weights."""
    tta: Literal["none", "flip", "five-crop"] = "none"
    """Test-time augmentation, evaluated in addition: average the probabilities of an image and its
    mirror image (flip), or of crops at its four corners and center (five-crop)."""
    batch_size: int = 256
    """Number of images per forward pass."""
    workers: int | None = None
    """Number of decoding processes. Default: all cores but one."""
    out: str | None = None
    """Directory for the results: metrics.json, per_class.csv, confused_pairs.csv, confusion.csv and
    confusion.png; or image_sizes.csv, or suite.csv."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size: expected 1 or more, got {self.batch_size}")
        for name in ("data", "image_sizes", "suite"):
            if getattr(self, name) in ("", ()):
                option = name.replace("_", "-")
                raise UserError(f"{option}: expected a value after --{option}, got nothing")
        if self.tta != "none" and (self.suite is not None or self.image_sizes):
            other = "suite" if self.suite is not None else "image-sizes"
            raise UserError(f"tta, {other}: expected one of the two, got both")
        if self.suite is not None and self.classes is not None:
            raise UserError("suite, classes: expected one of the two, got both")
        if self.suite is not None and (self.data is not None or self.image_sizes):
            other = "image-sizes" if self.data is None else "data"
            raise UserError(f"suite, {other}: expected one of the two, got both")


def run(args: argparse.Namespace, options: Options) -> int:
    """Prints the results and returns the exit code."""
    from vitral.engines.choice import pick_engine_device, with_engine
    from vitral.evaluation import (
        Results,
        Scores,
        at_sizes,
        evaluate,
        multilabel,
        open_set,
        summarize,
    )
    from vitral.evaluation.multilabel import MultiLabelScores
    from vitral.evaluation.output import write_results
    from vitral.evaluation.tta import NUM_PASSES, check_tta
    from vitral.weights import load, require_head

    device = pick_engine_device(options.engine, options.device)
    weights = require_head(load(args.weights, which=options.which))
    known = weights.description
    check_tta(options.tta, known)
    at_sizes(known, options.image_sizes or ())  # checks the sizes before the dataset is opened
    dataset = None if options.suite else open_set(known, options.data, options.columns)
    heading = _heading(weights, dataset, options)
    weights = with_engine(weights, options.engine)
    if dataset is None or options.image_sizes:
        return _table(weights, dataset, options, device, heading)
    if options.out is not None:
        check_writable(options.out)
    how = {
        "classes": options.classes,
        "batch_size": options.batch_size,
        "workers": options.workers,
        "device": device,
    }
    scores = evaluate(weights, dataset, keep_probabilities=options.out is not None, **how)
    print(heading)
    if isinstance(scores, MultiLabelScores):
        print(multilabel.summarize(scores))
        if options.out is not None:
            scores.write_results(Path(options.out))
        return 0
    results = Results(scores)
    print(summarize(results))
    print(_calibration(scores, fitted=dataset.fingerprint == known.fingerprint))
    if options.tta != "none":
        averaged = evaluate(weights, dataset, tta=options.tta, **how)
        assert isinstance(averaged, Scores)
        print(
            f"with test-time augmentation {options.tta}: top-1 {averaged.top1:.2%} instead of "
            f"{scores.top1:.2%} ({100 * (averaged.top1 - scores.top1):+.2f} points), "
            f"{NUM_PASSES[options.tta]} forward passes per image instead of 1"
        )
    if options.out is not None:
        write_results(results, Path(options.out))
    return 0


def _calibration(scores: Scores, fitted: bool) -> str:
    """Returns a line about the temperature of the weights.

    Args:
        fitted: whether the temperature was fitted on the same images.
    """
    if scores.temperature is None:
        return "not calibrated: the weights have no temperature"
    line = (
        f"calibrated with temperature {scores.temperature:.4g}: calibration error "
        f"{scores.calibration_error:.2%} before, "
        f"{scores.after_temperature().calibration_error:.2%} after"
    )
    return f"{line} (slightly optimistic: fitted on these images)" if fitted else line


def _heading(weights: Weights, dataset: Dataset | None, options: Options) -> str:
    from vitral.evaluation.evaluate import competing_classes

    known = weights.description
    place = options.suite or options.data or known.config.data.path
    place = printable(place) + (
        ", held-out training images" if dataset and dataset.held_out else ""
    )
    heading = f"{printable(weights.path)} ({options.which or known.default}) on {place}"
    if dataset and len(dataset.classes) < len(known.classes):
        part = f"{len(dataset.classes):,} of the {len(known.classes):,} classes"
        removed = len(competing_classes(known, dataset.classes, options.classes)) < len(
            known.classes
        )
        others = "with the logits of the others removed" if removed else "among all of them"
        heading += f"\nscored on {part} of the weights, {others}"
    return heading


def _table(
    weights: Weights, dataset: Dataset | None, options: Options, device: str, heading: str
) -> int:
    """Evaluates on several datasets or at several sizes, one row each."""
    from vitral.evaluation import evaluate_suite, find_suite, sweep
    from vitral.evaluation.table import show, write_rows

    how = {"batch_size": options.batch_size, "workers": options.workers, "device": device}
    if options.suite is not None:
        suite = find_suite(options.suite)
        title, file, names = "test set", "suite.csv", suite.names()
        heading = f"{heading}\n{suite.describe()}"
        rows = evaluate_suite(weights, suite, **how)
    else:
        sizes = options.image_sizes or ()
        title, file, names = "image size", "image_sizes.csv", [*map(str, sizes)]
        data = weights.description.config.data
        if data.fit == "crop":
            heading += f", the central {100 * data.eval_crop:g}% of the shorter side at every size"
        found = sweep(weights, sizes, dataset, classes=options.classes, **how)
        rows = (scores.row(str(size)) for size, scores in found)
    if options.out is not None:
        check_writable(options.out)
    print(heading, flush=True)
    done = show(title, names, rows)
    if options.out is not None:
        write_rows(Path(options.out) / file, title, done)
    return 0
