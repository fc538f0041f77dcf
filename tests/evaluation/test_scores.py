"""Tests of scores against values computed by hand and loops over the definitions."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitral.data.loader import Batch
from vitral.evaluation.scores import Scores, measure, merge

CLASSES = tuple("abcdefg")


def make(labels, ranked, confidence, classes=CLASSES):
    columns = (np.array(column) for column in (labels, ranked, confidence))
    return Scores(classes, *columns, losses=np.full(len(labels), 1.5))


@pytest.fixture
def scores():
    """Predictions for six images of classes a to d."""
    ranked = [
        [0, 1, 2, 3, 4],  # a, right
        [1, 0, 2, 3, 4],  # a, second
        [1, 2, 3, 4, 0],  # a, fifth
        [0, 2, 3, 4, 5],  # b, not in the top five
        [2, 0, 1, 3, 4],  # c, right
        [5, 2, 3, 4, 6],  # d, third
    ]
    return make([0, 0, 0, 1, 2, 3], ranked, [0.9, 0.5, 0.4, 0.9, 1.0, 0.4])


def test_scores_match_values_computed_by_hand(scores):
    # bins (0.333, 0.4], (0.466, 0.533], (0.866, 0.933] and (0.933, 1]: 2 wrong at 0.4, 1 at 0.5,
    # one of two right at 0.9, and one right at 1
    expected_error = (2 * 0.4 + 0.5 + (1.8 - 1) + 0) / 6
    assert scores.metrics() == {
        "loss": 1.5,
        "top1": pytest.approx(2 / 6),
        "top5": pytest.approx(5 / 6),
        "balanced": pytest.approx((1 / 3 + 0 + 1 + 0) / 4),
        "f1": pytest.approx((2 / 5 + 0 + 1 + 0) / 4),  # a: 1 of 3 images and 2 predictions
        "ece": pytest.approx(expected_error),
    }
    assert scores.confused_pairs() == [("a", "b", 2), ("b", "a", 1), ("d", "f", 1)]


@pytest.mark.parametrize(
    ("confidence", "hits", "expected"),
    [
        ([1.0, 1.0], [1, 1], 0.0),
        ([1.0, 1.0], [0, 0], 1.0),
        ([0.75, 0.75, 0.75, 0.75], [1, 1, 1, 0], 0.0),
        ([0.2, 0.21], [1, 0], (0.8 + 0.21) / 2),  # 0.2 is the upper edge of the third bin
        ([0.19, 0.2], [1, 0], 0.61 / 2),
        ([0.0, 0.5], [0, 1], 0.25),
    ],
)
def test_calibration_error_matches_values_computed_by_hand(confidence, hits, expected):
    scores = make([0] * len(hits), [[1 - hit, 5] for hit in hits], confidence)
    assert scores.calibration_error == pytest.approx(expected)


@pytest.mark.parametrize("size", [1, 7, 8, 53, 60])
@pytest.mark.parametrize("num_classes", [2, 3, 5, 9])
def test_every_image_counts_once(num_classes, size):
    generator = torch.Generator().manual_seed(num_classes)
    logits = torch.randn(53, num_classes, generator=generator) * 2
    labels = torch.randint(num_classes, (53,), generator=generator)
    classes = tuple(f"class {i}" for i in range(num_classes))
    images = logits.view(53, num_classes, 1, 1)  # the images are the logits
    parts = zip(images.split(size), labels.split(size), strict=True)
    batches = [  # the last is padded with copies of its last image
        Batch(
            number,
            number * size,
            torch.cat([part, part[-1:].expand(size - len(part), -1, -1, -1)]),
            truth,
            [],
        )
        for number, (part, truth) in enumerate(parts)
    ]
    shapes = []

    def forward(batch):
        shapes.append(len(batch))
        return batch.flatten(1)

    scores = measure(forward, batches, classes, keep_probabilities=True)
    assert set(shapes) == {size}
    np.testing.assert_allclose(scores.probabilities, logits.double().softmax(1), atol=1e-6)
    assert scores.probabilities.dtype == np.float32

    rows = list(zip(logits.double().softmax(1).tolist(), labels.tolist(), strict=True))
    order = [sorted(range(num_classes), key=lambda c, p=p: -p[c]) for p, _ in rows]
    best = [(o[0], label, p[o[0]]) for o, (p, label) in zip(order, rows, strict=True)]
    assert scores.labels.tolist() == labels.tolist()
    assert scores.ranked.tolist() == [o[:5] for o in order]
    assert scores.loss == pytest.approx(F.cross_entropy(logits.double(), labels).item(), rel=1e-6)
    assert scores.top1 == pytest.approx(sum(o == label for o, label, _ in best) / 53)
    assert scores.top5 == pytest.approx(
        sum(label in o[:5] for o, (_, label) in zip(order, rows, strict=True)) / 53
    )
    error = 0.0
    for k in range(15):
        inside = [(o == label) - p for o, label, p in best if k / 15 < p <= (k + 1) / 15]
        error += abs(sum(inside)) / 53
    assert scores.calibration_error == pytest.approx(error, abs=1e-6)
    wrong = [(classes[label], classes[o]) for o, label, _ in best if o != label]
    pairs = scores.confused_pairs()
    assert {(a, b): n for a, b, n in pairs} == {pair: wrong.count(pair) for pair in wrong}
    assert [n for *_, n in pairs] == sorted((n for *_, n in pairs), reverse=True)


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_merged_parts_equal_the_scores_of_the_complete_set(processes):
    logits = torch.randn(12, 4, 1, 1, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 4
    batches = [Batch(i, 4 * i, logits[4 * i :][:4], labels[4 * i :][:4], []) for i in range(3)]
    cuts = [3 * k // processes for k in range(processes + 1)]
    for keep in (False, True):
        expected, *parts = (
            measure(lambda x: x.flatten(1), some, CLASSES[:4], keep_probabilities=keep)
            for some in (batches, *(batches[a:b] for a, b in pairwise(cuts)))
        )
        assert merge(parts).metrics() == expected.metrics()
        assert merge(parts).ranked.tolist() == expected.ranked.tolist()
        assert np.array_equal(merge(parts).probabilities, expected.probabilities)


def test_half_precision_logits_are_measured_in_float32():
    logits = torch.randn(6, 4, 1, 1, generator=torch.Generator().manual_seed(0)).bfloat16()
    batch = Batch(0, 0, logits, torch.tensor([0, 1, 2, 3, 0, 1]), [])
    scores = measure(lambda x: x.flatten(1), [batch], CLASSES[:4])
    exact = logits.double().flatten(1).softmax(1).amax(1)
    np.testing.assert_allclose(scores.confidence, exact, rtol=1e-6)


def test_confusion_and_reliability_match_values_computed_by_hand(scores):
    found = scores.confusion()
    pairs = {(0, 0): 1, (0, 1): 2, (1, 0): 1, (2, 2): 1, (3, 5): 1}
    assert {(i, j): found[i, j] for i, j in zip(*found.nonzero(), strict=True)} == pairs
    assert scores.reliability() == [
        (pytest.approx(6 / 15), 2, pytest.approx(0.4), 0.0),
        (pytest.approx(8 / 15), 1, pytest.approx(0.5), 0.0),
        (pytest.approx(14 / 15), 2, pytest.approx(0.9), 0.5),
        (1.0, 1, 1.0, 1.0),
    ]


def test_nonfinite_outputs_are_wrong_and_have_no_confidence():
    """This holds even if the predicted class is correct. The finite image still counts."""
    logits = torch.tensor([[3.0, 1.0], [float("nan"), 0.0], [float("inf"), 0.0]])
    batch = Batch(0, 0, logits, torch.zeros(3, dtype=torch.int64), [])
    found = measure(lambda images: images, [batch], ("a", "b"))
    assert np.isnan(found.confidence).tolist() == [False, True, True]
    assert found.hits(1).tolist() == found.hits(5).tolist() == [True, False, False]
    assert found.top1 == 1 / 3
    assert np.isnan([found.loss, found.calibration_error]).all()
    ((edge, count, confidence, accuracy),) = found.reliability()
    assert (edge, count, accuracy) == (14 / 15, 1, 1.0)
    assert confidence == pytest.approx(1 / (1 + np.exp(-2)))
    assert found.predicted.tolist() == [0, 2, 2]
    assert found.confusion().tolist() == [[1, 0], [0, 0]]
    assert found.confused_pairs() == []
