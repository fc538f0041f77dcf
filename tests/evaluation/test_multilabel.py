"""Metrics and thresholds for images with any number of labels."""

import csv

import numpy as np
import pytest
import torch
from sklearn import metrics

from vitral.data.loader import Batch
from vitral.evaluation.multilabel import (
    MultiLabelScores,
    best_thresholds,
    measure,
    merge,
    summarize,
)

CLASSES = ("a", "b", "c", "rare")


def random_scores(n=200, **options):
    draw = np.random.default_rng(0)
    labels = (draw.random((n, 4)) < [0.5, 0.3, 0.2, 0.03]).astype(np.uint8)
    p = (0.6 * draw.random((n, 4)) + 0.4 * draw.random((n, 4)) * labels).astype(np.float32)
    return MultiLabelScores(CLASSES, labels, p, draw.random(n), **options)


def test_metrics_equal_scikit_learn():
    scores = random_scores(given=(0.3, 0.4, 0.5, 0.6))
    truth, p = scores.labels, scores.probabilities
    found = p >= np.array([0.3, 0.4, 0.5, 0.6])
    values = scores.metrics()
    assert values["loss"] == pytest.approx(scores.losses.mean())
    for average, ap, f1 in (("macro", "map", "f1"), ("micro", "micro_ap", "micro_f1")):
        expected = metrics.average_precision_score(truth, p, average=average)
        assert values[ap] == pytest.approx(expected)
        assert values[f1] == pytest.approx(metrics.f1_score(truth, found, average=average))
    for i, row in enumerate(scores.per_class()):
        expected = (
            truth[:, i].sum(),
            metrics.average_precision_score(truth[:, i], p[:, i]),
            metrics.roc_auc_score(truth[:, i], p[:, i]),
            metrics.precision_score(truth[:, i], found[:, i]),
            metrics.recall_score(truth[:, i], found[:, i]),
            metrics.f1_score(truth[:, i], found[:, i]),
            (0.3, 0.4, 0.5, 0.6)[i],
        )
        assert row[1:] == pytest.approx(expected)


def test_a_case_computed_by_hand():
    labels = np.array([[1, 0], [0, 0], [1, 0], [0, 0]], np.uint8)
    p = np.array([[0.9, 0.2], [0.8, 0.6], [0.7, 0.1], [0.1, 0.3]], np.float32)
    scores = MultiLabelScores(("a", "none"), labels, p, np.zeros(4))
    # a: precision 1 at recall 1/2, and 2/3 at recall 1. F1 is best for the first three images.
    assert scores.mean_ap == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)
    assert scores.thresholds == pytest.approx([(0.7 + 0.1) / 2, 0.5])
    assert scores.predicted.tolist() == [[True, False], [True, True], [True, False], [False, False]]
    values = scores.metrics()
    assert values["f1"] == pytest.approx(4 / 5)
    assert values["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 2))
    first, second = scores.per_class()
    assert first[3:7] == pytest.approx((3 / 4, 2 / 3, 1, 4 / 5))
    assert np.isnan([*second[2:4], *second[5:7]]).all()


def test_thresholds_have_the_best_f1_of_all_thresholds():
    scores = random_scores()
    truth, p = scores.labels, scores.probabilities
    for i, threshold in enumerate(scores.thresholds):
        best = max(metrics.f1_score(truth[:, i], p[:, i] >= t) for t in p[::4, i])
        assert metrics.f1_score(truth[:, i], p[:, i] >= threshold) >= best
        assert threshold not in p[:, i]
    order = np.random.default_rng(1).permutation(len(p))
    assert np.array_equal(best_thresholds(truth[order], p[order]), scores.thresholds)
    everything = np.ones((3, 1), np.uint8)
    assert best_thresholds(everything, p[:3, :1])[0] == p[:3, 0].min() / 2


def test_measuring_in_parts_equals_measuring_at_once():
    draw = torch.Generator().manual_seed(0)
    images, head = torch.randn(10, 5, generator=draw), torch.randn(5, 4, generator=draw)
    labels = (torch.rand(10, 4, generator=draw) < 0.4).byte()

    def batches(start, stop, size=2):
        for i in range(start, stop, size):
            padded = torch.cat([images[i : i + size], images[:1]])  # has no labels
            yield Batch(0, i, padded, labels[i : i + size], [])

    def forward(x):
        return x @ head

    everything = measure(forward, batches(0, 10), CLASSES)
    parts = [measure(forward, batches(*part), CLASSES) for part in ((0, 4), (4, 4), (4, 10))]
    joined = merge(parts)
    for name in ("labels", "probabilities", "losses"):
        assert np.array_equal(getattr(joined, name), getattr(everything, name))
    assert joined.metrics() == everything.metrics()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(images @ head, labels.float())
    assert everything.loss == pytest.approx(expected.item())
    broken = measure(
        lambda x: forward(x) * torch.tensor([1, 1, 1, torch.nan]), batches(0, 10), CLASSES
    )
    assert np.isnan(broken.loss)
    assert (broken.probabilities[:, 3] == 0).all()


def test_tables_and_summary(tmp_path):
    scores = random_scores()
    scores.write_tables(tmp_path)
    rows = [*csv.DictReader((tmp_path / "per_class.csv").read_text().splitlines())]
    assert [row["class"] for row in rows] == [*CLASSES]
    assert float(rows[1]["average_precision"]) == scores.per_class()[1].average_precision
    text = summarize(scores)
    assert f"macro (mAP) {scores.mean_ap:.2%}" in text
    assert text.count("\n") == 2 + 1 + 4
