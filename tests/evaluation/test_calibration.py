"""Temperatures against closed forms and scipy, and coverage by hand."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from vitral.evaluation import calibration
from vitral.evaluation.calibration import Logits, coverage, fit_temperature


def kept(logits, labels, batch=7, first=0):
    """Returns the logits of a dataset in batches."""
    found = Logits(len(labels), logits.shape[1])
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        found.add(SimpleNamespace(first=first + start, targets=labels[part]), logits[part])
    return found


@pytest.fixture(scope="module")
def data():
    """Overconfident logits (300, 5); about half of the images are right."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (300,), generator=generator)
    logits = 4 * torch.randn(300, 5, generator=generator)
    logits[torch.arange(300), labels] += 3
    return logits, labels


def test_temperature_of_two_classes_by_hand():
    """If all logits differ by 2 and 3 of 4 images are right, sigmoid(2 / T) is 3/4."""
    logits = torch.tensor([[2.0, 0.0], [1.0, 3.0], [5.0, 3.0], [2.0, 0.0]])
    assert fit_temperature(kept(logits, torch.tensor([0, 1, 0, 1]))) == pytest.approx(
        2 / math.log(3), rel=1e-9
    )


@pytest.mark.parametrize("factor", [0.1, 1, 3])
def test_temperature_equals_scipys_minimum(data, factor):
    logits, labels = factor * data[0], data[1]
    z, rows = logits.double().numpy(), np.arange(300)

    def cross_entropy(temperature):
        return -log_softmax(z / temperature, axis=1)[rows, labels.numpy()].mean()

    options = {"bounds": (0.01, 100), "method": "bounded", "options": {"xatol": 1e-9}}
    expected = minimize_scalar(cross_entropy, **options).x
    assert fit_temperature(kept(logits, labels)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("factor", [1e-4, 1e3])
def test_extreme_temperatures_are_rejected(data, factor):
    assert fit_temperature(kept(factor * data[0], data[1])) is None


@pytest.mark.parametrize("case", ["all right", "all wrong", "not finite"])
def test_no_temperature_without_a_minimum(data, case):
    logits, labels = data[0].clone(), data[1]
    if case == "all right":
        labels = logits.argmax(1)
    elif case == "all wrong":
        labels = logits.argmin(1)
    else:
        logits[7, 3] = math.nan
    assert fit_temperature(kept(logits, labels)) is None


def test_temperature_does_not_depend_on_the_processes(data):
    parts = [kept(data[0][part], data[1][part]) for part in (slice(70), slice(70, 300))]
    barrier, sums = threading.Barrier(2), [[], []]

    def fit(rank):
        def gather(own):
            sums[rank] = own
            barrier.wait()
            everything = [*sums]
            barrier.wait()
            return everything

        return fit_temperature(parts[rank], gather)

    with ThreadPoolExecutor(2) as threads:
        assert {*threads.map(fit, range(2))} == {fit_temperature(kept(*data))}


def test_only_evenly_spaced_logits_are_kept_of_a_large_dataset(data, monkeypatch):
    expected = fit_temperature(kept(data[0][::3], data[1][::3]))
    monkeypatch.setattr(calibration, "MAX_LOGITS", 500)
    found = kept(*data)
    assert sum(len(logits) for logits, _ in found.batches) == 100
    assert fit_temperature(found) == pytest.approx(expected, rel=1e-12)
    assert found.confidence(1.0) is None


def test_coverage_by_hand():
    confidence = np.array([0.9, 0.6, 0.6, 0.99, 0.3, math.nan])
    right = np.array([True, True, False, True, False, False])
    found = coverage(confidence, right)
    assert found.thresholds.tolist() == [0.99, 0.9, 0.6, 0.3]
    assert found.coverage.tolist() == pytest.approx([1 / 6, 2 / 6, 4 / 6, 5 / 6])
    assert found.accuracy.tolist() == pytest.approx([1, 1, 3 / 4, 3 / 5])
    assert found.threshold(0.99) == (0.9, pytest.approx(2 / 6))
    assert found.threshold(0.75) == (0.6, pytest.approx(4 / 6))
    assert coverage(confidence[:4], right[:4]).threshold(0.7) == (0.0, 1.0)
    assert coverage(confidence[:4], ~right[:4]).threshold(0.7) is None
    assert len(coverage(np.array([math.nan]), np.array([False])).thresholds) == 0
