"""Likely label errors: values by hand, known swaps, and the table for corrections."""

import csv
import os

import numpy as np
import pytest
import torch

from vitral.data.records import Files, Pixels
from vitral.evaluation.label_errors import CheckedLabels, LabelErrors, count_errors

PROBABILITIES = np.array(
    [
        [0.9, 0.1, 0.0],
        [0.2, 0.7, 0.1],  # labeled 0
        [0.5, 0.5, 0.0],
        [0.1, 0.6, 0.3],
        [0.0, 0.3, 0.7],  # labeled 1
        [0.0, 0.1, 0.9],
    ],
    np.float32,
)
LABELS = np.array([0, 0, 0, 1, 1, 2])


def records(labels):
    return Pixels(torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8), np.array(labels))


def test_scores_by_hand():
    checked = CheckedLabels.of("train", records(LABELS), np.arange(6), PROBABILITIES)
    assert checked.scores == pytest.approx([0.8, -0.5, 0.0, 0.3, -0.4, 0.8])
    assert checked.suggested.tolist() == [-1, 1, -1, -1, 2, -1]
    assert checked.confidence[[1, 4]] == pytest.approx([0.7, 0.7])
    assert np.isnan(checked.confidence[[0, 2, 3, 5]]).all()


def test_the_estimate_by_hand():
    # Thresholds: (0.9 + 0.2 + 0.5) / 3 = 0.53, (0.6 + 0.3) / 2 = 0.45 and 0.9. Classes that reach
    # them: 0; 1 (an error); 1 (an error); 1; none; 2.
    assert count_errors(LABELS, PROBABILITIES) == 2
    assert count_errors(np.array([0, 0]), np.array([[0.6, 0.4], [0.4, 0.6]], np.float32)) == 0


def test_images_without_predictions_are_last_and_keep_their_place():
    images = np.array([1, 3, 4])
    probabilities = PROBABILITIES[[1, 3, 4]]
    probabilities[1] = np.nan
    checked = CheckedLabels.of("val", records(LABELS), images, probabilities)
    assert np.isnan(checked.scores).tolist() == [True, False, True, True, False, True]
    other = CheckedLabels.of("train", records([0]), np.empty(0, int), np.empty((0, 3), np.float32))
    order = [
        (split.split, i) for split, i in LabelErrors(("a", "b", "c"), (other, checked)).ranked()
    ]
    assert order[:2] == [("val", 1), ("val", 4)]
    assert order[2:] == [("train", 0), ("val", 0), ("val", 2), ("val", 3), ("val", 5)]


def test_swapped_labels_are_ranked_first():
    """The predictions of a calibrated model that is right for most images."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, 10, 5000)
    logits = rng.normal(0, 1, (5000, 10))
    logits[np.arange(5000), true] += 3.6
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert 0.94 < (probabilities.argmax(1) == true).mean() < 0.99
    swapped = rng.permutation(5000)[:100]
    labels = true.copy()
    labels[swapped] = (true[swapped] + rng.integers(1, 10, 100)) % 10
    images, predicted = np.arange(5000), probabilities.astype(np.float32)
    checked = CheckedLabels.of("train", records(labels), images, predicted)
    first = np.argsort(checked.scores)[:200]
    assert np.isin(swapped, first).mean() > 0.9
    assert (checked.suggested[swapped] == true[swapped]).mean() > 0.9
    assert 30 < checked.estimate < 150


def test_the_table_contains_all_images_with_groups_and_names(tmp_path):
    names = np.array([os.fsencode(name) for name in ("a,b.jpg", "ä.jpg")] + [b"\xff.jpg"])
    files = Files(tmp_path, names, np.ones(3, int), np.array([0, 1, 1]), np.array([5, -7, 5]))
    checked = CheckedLabels.of(
        "train", files, np.arange(2), np.array([[0.25, 0.75]] * 2, np.float32)
    )
    nothing = CheckedLabels.of(
        "val", files.take(np.zeros(3, bool)), np.empty(0, int), PROBABILITIES[:0]
    )
    errors = LabelErrors(("n01440764", "other"), (checked, nothing))
    errors.write(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="", errors="surrogateescape") as file:
        rows = [*csv.reader(file)]
    header = "image,label,split,group,suggested,confidence,score,label_name,suggested_name"
    assert rows[0] == header.split(",")
    fish = "tench, Tinca tinca"
    assert rows[1:] == [
        [f"{tmp_path}/a,b.jpg", "n01440764", "train", "5", "other", "0.7500", "-0.5000", fish, ""],
        [f"{tmp_path}/ä.jpg", "other", "train", "-7", "", "", "0.5000", "", ""],
        [os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg"), "other", "train", "5", *[""] * 5],
    ]
