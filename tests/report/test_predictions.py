"""Tests of evaluating the best weights of a run on its validation images."""

import shutil

import numpy as np
import pytest

from vitral.errors import UserError
from vitral.report.predictions import evaluate_best
from vitral.rundir import read_run


@pytest.fixture(scope="module")
def predictions(run):
    return evaluate_best(read_run(run))


def test_scores_match_a_plain_loop(predictions, answers):
    labels, probabilities = answers
    scores = predictions.scores
    assert scores.classes == tuple("0123456789")
    assert scores.labels.tolist() == labels == predictions.records.labels.tolist()
    assert scores.ranked[:, 0].tolist() == probabilities.argmax(1).tolist()
    np.testing.assert_allclose(scores.calibrated, probabilities.amax(1), atol=1e-5)


def test_predictions_are_from_the_best_weights(run, predictions):
    best = read_run(run).best
    assert best is not None
    kind, row = best
    assert predictions.weights.path == run / "weights" / "best"
    assert predictions.scores.hits(1).mean() == pytest.approx(row[f"{kind}_top1"])


def test_the_images_may_have_moved_but_not_changed(run, predictions):
    moved = evaluate_best(read_run(run), "digits")
    assert moved.scores.ranked.tolist() == predictions.scores.ranked.tolist()
    with pytest.raises(UserError, match="synthetic is not the dataset that the run was trained on"):
        evaluate_best(read_run(run), "synthetic")


def test_a_run_without_weights_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("weights"))
    with pytest.raises(UserError, match="no weights found"):
        evaluate_best(read_run(tmp_path / "run"))
