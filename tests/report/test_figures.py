"""Tests of charts: positions of lines, and ranges of axes."""

import re

import numpy as np
import pytest

from vitral.report.figures import Axis, Chart, Line, downsample, reliability


def test_a_line_has_the_coordinates_of_its_values():
    points = [(0.5, 3.0), (1.0, 12.5), (2.0, 7.25)]
    svg = str(Chart("Title", "", (Line("a", points),)).svg)
    (path,) = re.findall(r'<polyline class="s0" points="([^"]*)"', svg)
    x = [
        (float(at), float(value))
        for at, value in re.findall(r'<text x="([\d.]+)" y="231" class="mid">([\d.]+)', svg)
    ]
    y = [
        (float(at), float(value))
        for at, value in re.findall(r'y="([\d.]+)" dy="4" class="end">([\d.]+)', svg)
    ]
    for (px, py), (a, b) in zip(
        (map(float, p.split(",")) for p in path.split()), points, strict=True
    ):
        assert np.interp(px, *zip(*x, strict=True)) == pytest.approx(a, abs=0.02)
        assert np.interp(-py, *zip(*((-at, v) for at, v in y), strict=True)) == pytest.approx(
            b, abs=0.1
        )


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (-3.0, -3.0), (1e-9, 2e-9), (0, 12345)])
def test_rounded_axes_contain_their_values(low, high):
    axis = Axis.rounded(low, high, 0, 100)
    assert axis.low <= low <= high <= axis.high
    assert 3 <= len(axis.ticks) <= 8
    assert 0 <= axis.position(low) <= axis.position(high) <= 100


@pytest.mark.parametrize("low", [0.0, 2.3, 60.0, 99.97, 100.0])
@pytest.mark.parametrize("high", [0.0, 2.3, 60.0, 99.97, 100.0])
def test_percentage_axes_stay_within_0_and_100(low, high):
    low, high = sorted((low, high))
    axis = Axis.rounded(low, high, 0, 100)
    assert 0 <= axis.low <= low + 1e-9
    assert high - 1e-9 <= axis.high <= 100 + 1e-9


def test_charts_omit_values_that_are_not_finite():
    svg = str(Chart("Loss", "", (Line("a", [(1, 2.0), (2, float("nan")), (3, 1.0)]),)).svg)
    assert "nan" not in svg
    (path,) = re.findall(r'points="([^"]*)"', svg)
    assert len(path.split()) == 2
    assert "No value" in Chart("Loss", "", (Line("a", [(1, float("inf"))]),)).svg


def test_downsampling_keeps_ends_peaks_and_order():
    values = np.random.default_rng(0).normal(size=10_000)
    values[[0, 1234, 7777, -1]] = 0.5, 99.0, -99.0, 0.25
    points = list(enumerate(values.tolist()))
    kept = downsample(points)
    assert len(kept) < 700
    assert {points[0], points[1234], points[7777], points[-1]} <= {*kept}
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert downsample(points[:500]) == points[:500]


def test_reliability_draws_accuracy_and_confidence():
    svg = str(reliability([(0.2, 4, 0.15, 0.5), (1.0, 16, 0.97, 1.0)]))
    heights = [float(h) for h in re.findall(r'class="bar".*?height="([\d.]+)"', svg)]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    marks = [float(y) for y in re.findall(r'class="confidence" d="M[\d.]+ ([\d.]+)H', svg)]
    assert 216 - marks[0] == pytest.approx(0.15 * heights[1], abs=0.2)
