"""Metrics equal scikit-learn's and values computed by hand; intervals have known distributions."""

import csv
import json
import math

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binom
from sklearn import metrics as reference

from vitral.evaluation import confusion
from vitral.evaluation.metrics import Results, headline, intervals, per_class
from vitral.evaluation.output import summarize, write_results, write_tables
from vitral.evaluation.scores import Scores


def make(labels, probabilities, classes=None):
    """Returns scores for probabilities (n, classes); a row with NaN is an output with NaN."""
    p = np.array(probabilities, np.float32)
    bad = np.isnan(p).any(1)
    ranked = np.argsort(-np.nan_to_num(p), axis=1, kind="stable")[:, :5]
    confidence = np.where(bad, math.nan, p.max(1)).astype(float)
    names = classes or tuple(f"class {i:02d}" for i in range(p.shape[1]))
    labels = np.array(labels)
    return Scores(names, labels, ranked, confidence, np.ones(len(p)), p)


def random_scores(num_classes, n=200, *, absent=(), nan=0, decimals=8, seed=0):
    """Returns predictions that are often right, with ties if probabilities are rounded."""
    draw = np.random.default_rng(seed)
    labels = draw.choice(np.setdiff1d(np.arange(num_classes), absent), n)
    logits = draw.normal(size=(n, num_classes))
    logits[np.arange(n), labels] += 1.5
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    p = p.round(decimals)
    p[draw.permutation(n)[:nan]] = math.nan
    return make(labels, p)


CASES = {
    "two classes": random_scores(2),
    "ties": random_scores(4, decimals=1),
    "absent classes": random_scores(7, absent=(0, 3, 6)),
    "non-finite outputs": random_scores(5, nan=20),
    "rare classes": random_scores(30, n=40, nan=3),
    "one class occurs": random_scores(3, n=9, absent=(0, 1)),
}


@pytest.mark.parametrize("scores", CASES.values(), ids=CASES.keys())
def test_metrics_equal_those_of_scikit_learn(scores):
    """Non-finite outputs are predictions of another class with no images."""
    labels, predicted, C = scores.labels, scores.predicted, len(scores.classes)
    assert (predicted == C).sum() == np.isnan(scores.confidence).sum()
    present, found = np.unique(labels), headline(scores)
    options = {"labels": present, "zero_division": 0}
    functions = {
        "precision": reference.precision_score,
        "recall": reference.recall_score,
        "f1": reference.f1_score,
    }
    expected = {
        f"{average}_{name}": function(labels, predicted, average=average, **options)
        for average in ("macro", "weighted")
        for name, function in functions.items()
    }
    expected["top1"] = expected["weighted_recall"]
    expected["balanced"], expected["f1"] = expected["macro_recall"], expected["macro_f1"]
    expected["top1"] = reference.accuracy_score(labels, predicted)
    expected["mcc"] = reference.matthews_corrcoef(labels, predicted)
    expected["kappa"] = reference.cohen_kappa_score(labels, predicted)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    if set(predicted) <= set(labels):  # otherwise scikit-learn warns
        balanced = reference.balanced_accuracy_score(labels, predicted)
        assert found["balanced"] == pytest.approx(balanced)


@pytest.mark.parametrize("scores", CASES.values(), ids=CASES.keys())
def test_metrics_of_a_class_equal_those_of_scikit_learn(scores):
    labels, predicted, C = scores.labels, scores.predicted, len(scores.classes)
    columns = reference.precision_recall_fscore_support(
        labels, predicted, labels=range(C), zero_division=0
    )
    table = per_class(scores)
    assert [row.name for row in table] == [scores.classes[c] for c in np.unique(labels)]
    for row in table:
        c = scores.classes.index(row.name)
        found = (row.precision, row.top1, row.f1, row.images)
        assert found == pytest.approx([column[c] for column in columns])
        p = np.nan_to_num(scores.probabilities[:, c])
        own = labels == c
        assert row.average_precision == pytest.approx(reference.average_precision_score(own, p))
        if own.all():
            assert math.isnan(row.roc_auc)
        else:
            assert row.roc_auc == pytest.approx(reference.roc_auc_score(own, p))


BY_HAND = make(
    [0, 0, 0, 1, 1, 2],
    [
        [0.7, 0.2, 0.1],
        [0.5, 0.3, 0.2],
        [0.3, 0.6, 0.1],
        [0.1, 0.8, 0.1],
        [math.nan] * 3,
        [0.4, 0.3, 0.3],
    ],
    ("a", "b", "c"),
)


def test_metrics_match_values_computed_by_hand():
    """Class a: 2 of 3 found, 3 predicted; b: 1 of 2 found, 2 predicted; c: 0 of 1, 0 predicted."""
    found = headline(BY_HAND)
    assert found["top1"] == found["weighted_recall"] == 0.5
    assert found["balanced"] == found["macro_recall"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found["macro_precision"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found["f1"] == found["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found["weighted_f1"] == pytest.approx((3 * 2 / 3 + 2 * 1 / 2 + 0) / 6)
    chance = (3 * 3 + 2 * 2 + 1 * 0 + 0 * 1) / 36
    assert found["kappa"] == pytest.approx((0.5 - chance) / (1 - chance))
    pairs, own, other = 3 * 6 - (3 * 3 + 2 * 2), 36 - (9 + 4 + 1), 36 - (9 + 4 + 1)
    assert found["mcc"] == pytest.approx(pairs / math.sqrt(own * other))
    a, b, c = per_class(BY_HAND)
    # Probabilities of class a, with images of a in capitals: .7A .5A .4 .3A .1 0
    assert a.average_precision == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert a.roc_auc == pytest.approx((3 + 3 + 2) / 9)
    # Class b: .8B .6 .3 .3 .2 0B
    assert b.average_precision == pytest.approx((1 + 2 / 6) / 2)
    assert b.roc_auc == pytest.approx((4 + 0) / 8)
    # Class c: .3C .2 .1 .1 .1 0
    assert (c.average_precision, c.roc_auc, c.precision, c.f1) == (1, 1, 0, 0)


def accuracy_scores(right, n):
    """Returns scores of two classes with `right` correct predictions of n."""
    labels = np.arange(n) % 2
    confident = np.where(np.arange(n) < right, labels, 1 - labels)
    return make(labels, np.eye(2)[confident] * 0.8 + 0.1)


def test_the_interval_of_the_accuracy_has_the_bounds_of_its_exact_distribution():
    """The accuracy of a resample is a binomial variable."""
    for right, n in ((90, 100), (25, 50), (399, 400)):
        low, high = intervals(accuracy_scores(right, n))["top1"]
        expected = binom.ppf([0.025, 0.975], n, right / n) / n
        assert [low, high] == pytest.approx(expected, abs=1.5 / n)


def test_intervals_contain_the_true_accuracy_at_their_level():
    draw = np.random.default_rng(0)
    covered = 0
    for right in draw.binomial(100, 0.7, 150):
        low, high = intervals(accuracy_scores(int(right), 100))["top1"]
        covered += low <= 0.7 <= high
    assert 0.88 <= covered / 150 <= 0.99


def test_intervals_are_those_of_a_loop_over_resamples(monkeypatch):
    """They do not depend on the size of chunks, contain the values, and exclude absent classes."""
    scores = random_scores(4, n=60, nan=5)
    found = intervals(scores)
    monkeypatch.setattr("vitral.evaluation.metrics.VALUES_PER_CHUNK", 500)
    assert intervals(scores) == found
    draw, values = np.random.default_rng(0), []
    for _ in range(1000):
        i = draw.integers(60, size=60)
        labels, predicted = scores.labels[i], scores.predicted[i]
        recalls = [np.mean(predicted[labels == c] == c) for c in np.unique(labels)]
        values.append(np.mean(recalls))
    assert found["balanced"] == pytest.approx(np.percentile(values, [2.5, 97.5]))
    for name, (low, high) in found.items():
        assert low < headline(scores)[name] < high


def test_results_are_written(tmp_path):
    write_results(Results(BY_HAND), tmp_path)
    document = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert [document[name] for name in ("images", "classes", "nonfinite")] == [6, 3, 1]
    assert document["metrics"]["top1"] == 0.5
    assert document["metrics"]["ece"] is None
    assert set(document["intervals"]) == {"level", "resamples", "top1", "balanced", "f1"}

    def table(name):
        with (tmp_path / name).open(newline="", encoding="utf-8") as file:
            return list(csv.reader(file))

    header, *rows = table("per_class.csv")
    assert header == [
        "class", "images", "top1", "top5", "precision", "recall", "f1",
        "average_precision", "roc_auc",
    ]  # fmt: skip
    assert rows == [
        [r.name, *(str(v) for v in (r.images, r.top1, r.top5, r.precision, r.top1, r.f1)),
         str(r.average_precision), str(r.roc_auc)]
        for r in per_class(BY_HAND)
    ]  # fmt: skip
    assert table("confused_pairs.csv") == [
        ["class", "predicted", "images"], ["a", "b", "1"], ["c", "a", "1"],
    ]  # fmt: skip
    assert table("confusion.csv") == [
        ["class", "a", "b", "c"], ["a", "2", "1", "0"], ["b", "0", "1", "0"], ["c", "1", "0", "0"],
    ]  # fmt: skip


def test_undefined_values_are_empty(tmp_path):
    """Without images of other classes, there is no ROC curve and no correlation."""
    single = make([0, 0], [[0.9, 0.1], [0.8, 0.2]])
    write_results(Results(single), tmp_path)
    assert (tmp_path / "per_class.csv").read_text().splitlines()[1].endswith(",1.0,")
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"]["kappa"] is None
    assert any(line.split() == ["Cohen's", "kappa", "-"] for line in lines_of(single))


def test_without_probabilities_there_are_no_columns_for_areas(tmp_path):
    scores = Scores(*(getattr(BY_HAND, n) for n in ("classes", "labels", "ranked", "confidence")),
                    BY_HAND.losses)  # fmt: skip
    write_tables(Results(scores), tmp_path)
    assert (tmp_path / "per_class.csv").read_text().startswith("class,images,top1,top5,precision,"
                                                              "recall,f1\n")  # fmt: skip


def test_wnids_are_shown_with_their_names(tmp_path):
    classes = ("n01440764", "n02012849", "own")
    scores = make([0, 1, 2], [[0.8, 0.1, 0.1], [0, 0, 1], [0, 0, 1]], classes)
    write_tables(Results(scores), tmp_path)
    tables = [(tmp_path / f"{name}.csv").read_text() for name in ("per_class", "confused_pairs")]
    header, *rows = tables[0].splitlines()
    assert header.endswith(",class_name")
    assert [row.split(",")[0] for row in rows] == [*classes]
    assert rows[0].endswith(',"tench, Tinca tinca"')
    assert rows[2].endswith(",")
    assert tables[1].splitlines() == [
        "class,predicted,images,class_name,predicted_name",
        "n02012849,own,1,crane,",
    ]
    assert [line.split() for line in lines_of(scores)[-3:]] == [
        ["n01440764", "tench", "1", "100.00%", "100.00%", "100.00%"],
        ["n02012849", "crane", "1", "0.00%", "0.00%", "0.00%"],
        ["own", "1", "50.00%", "100.00%", "66.67%"],
    ]


def lines_of(scores):
    return summarize(Results(scores)).splitlines()


@pytest.mark.parametrize("num_classes", [3, 30])
def test_summary_shows_every_class_or_the_worst_and_best(num_classes):
    labels = np.repeat(np.arange(num_classes), 2)
    guesses = labels.copy()
    guesses[1::4] = 0  # every other class is half right
    lines = lines_of(make(labels, np.eye(num_classes)[guesses]))
    assert lines[0] == f"{len(labels)} images, {num_classes} classes"
    assert sum(line.startswith("class ") for line in lines) == 1 + min(num_classes, 15)
    assert any("ten worst" in line for line in lines) == (num_classes > 20)
    assert "class 02       2    100.00%   50.00%   66.67%" in lines


def test_summary_counts_outputs_that_are_not_finite():
    assert lines_of(BY_HAND)[1] == "1 image with a non-finite output, counted as wrong"
    assert "non-finite" not in "\n".join(lines_of(random_scores(3)))


@pytest.mark.parametrize("num_classes", [1, 2, 21])
def test_the_confusion_matrix_is_drawn(num_classes, tmp_path):
    """Names may contain dollar signs, which matplotlib would parse, and unknown characters."""
    names = tuple(f"$x^{i}_\N{SNOWMAN}\U00012000 {'long ' * 9}" for i in range(num_classes))
    p = np.eye(num_classes)[np.arange(3 * num_classes) % num_classes]
    (tmp_path / "x.png").write_bytes(
        confusion.draw(make(np.arange(len(p)) % num_classes, p, names))
    )
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int)
    dark = (pixels == [8, 48, 107]).all(2)  # the color of the largest value
    left, right = np.array_split(dark, 2, axis=1)
    assert left.sum() > 10 * num_classes
    assert right.sum() > 10 * num_classes
