"""Finds likely label errors in the dataset of a run."""

from __future__ import annotations

import numpy as np

from vitral.data.records import groups_of
from vitral.errors import UserError, printable
from vitral.evaluation.label_errors import CheckedLabels, LabelErrors
from vitral.report.predictions import Predictions
from vitral.rundir import Run, RunDir
from vitral.storage import CorruptError
from vitral.training.balance import Balance
from vitral.training.frozen import read_features
from vitral.training.probe import out_of_fold


def find_label_errors(run: Run, predictions: Predictions) -> LabelErrors:
    """Compares the labels of a run with predictions of models that were not trained on them.

    Validation images are predicted by the run's weights. Training images are predicted out of fold
    from the features of the frozen backbone that the run has stored. Without such features, they
    are not checked: a trained model has learned the labels of its training images, including the
    wrong ones.

    Args:
        predictions: the result of `evaluate_best`.

    Raises:
        UserError: if the stored features are damaged, or an image can have several labels.
    """
    description, train = predictions.weights.description, predictions.train
    if description.multi_label:
        raise UserError("label-errors: expected images with one label each, got several")
    classes, config = description.classes, description.config
    assert train is not None
    assert predictions.scores.probabilities is not None
    images, probabilities = np.empty(0, np.int64), np.empty((0, len(classes)), np.float32)
    directory = RunDir(run.path).features
    if directory.is_dir():
        try:
            features = read_features(directory)
        except CorruptError as error:
            fix = "train again with another --out to compute them"
            raise UserError(f"features: {printable(str(error))}; {fix}") from None
        balance = Balance.of(config, classes, train.labels, each_once=True)
        seed, groups = config.train.seed, groups_of(train)
        device = predictions.weights.model.device
        device = device if device.type == "cuda" else "cpu"
        images, probabilities = out_of_fold(features, len(classes), seed, device, balance, groups)
    val = predictions.records
    return LabelErrors(
        predictions.scores.classes,
        (
            CheckedLabels.of("train", train, images, probabilities),
            CheckedLabels.of("val", val, np.arange(len(val)), predictions.scores.probabilities),
        ),
    )
