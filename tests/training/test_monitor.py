"""Means since the last log row, and the clock, against values computed by hand."""

import math

import pytest
import torch

from vitral.training import monitor
from vitral.training.monitor import Clock, Counters, profiling
from vitral.training.resolved import Resolved


def count(counters, *steps):
    """Counts steps, each a loss, a gradient norm and whether it was skipped."""
    for step in steps:
        counters.add(*(torch.tensor(float(value)) for value in step))


def test_means_exclude_skipped_steps():
    counters = Counters(torch.device("cpu"))
    assert counters.read() == {"loss": 0, "grad_norm": 0, "skipped": 0, "worst": 0}
    count(counters, (1, 2, 0), (math.nan, math.inf, 1), (4, 6, 0))
    assert counters.read() == {"loss": 2.5, "grad_norm": 4, "skipped": 1, "worst": 1}
    counters.start_row()
    count(counters, (7, 8, 0))
    assert counters.read() == {"loss": 7, "grad_norm": 8, "skipped": 1, "worst": 1}


def test_the_longest_run_of_skipped_steps_crosses_log_rows():
    counters, skipped = Counters(torch.device("cpu")), (math.inf, math.nan, 1)
    count(counters, skipped, skipped, (1, 1, 0), skipped)
    assert counters.read()["worst"] == 2
    counters.start_row()
    count(counters, skipped, skipped)
    assert counters.read()["worst"] == 3
    count(counters, (1, 1, 0), skipped)
    assert counters.read() == {"loss": 1, "grad_norm": 1, "skipped": 6, "worst": 3}


def test_sums_do_not_lose_small_losses():
    counters = Counters(torch.device("cpu"))
    count(counters, (2**25, 0, 0), *[(1, 0, 0)] * 7)
    assert counters.read()["loss"] == (2**25 + 7) / 8  # float32 would drop the ones


def test_counters_stay_on_the_device():
    """On the meta device, where no value can be read."""
    with torch.device("meta"):
        values = [torch.zeros(()) for _ in range(3)]
    counters = Counters(torch.device("meta"))
    counters.add(*values)
    counters.start_row()


@pytest.fixture
def now(monkeypatch):
    """Replaces the clock with a value that tests set, and the memory with 1.25 GB."""
    seconds = [1000.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(monitor, "memory_gb", lambda _: 1.25)
    return seconds


def make_resolved(precision="fp32", processes=1):
    return Resolved("cpu", precision, False, 1, 2, processes, "cpu", False)


def test_a_row_covers_the_time_since_the_last_one(now):
    clock = Clock(50.0, 0.0, make_resolved())
    clock.count(64, 1e9)
    now[0] += 8
    clock.start_row()
    clock.count(64, 1e9)
    clock.count(32, 1e9)
    clock.waited += 0.5
    now[0] += 2
    expected = {"seconds": 60.0, "images_per_second": 48.0, "data_wait": 0.25, "memory_gb": 1.25}
    assert clock.read() == expected


@pytest.mark.parametrize(
    ("gpu", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_mfu_is_relative_to_the_peak_of_all_gpus(now, monkeypatch, gpu, rate):
    """A backward pass is twice the work of a forward pass. An unknown GPU has no MFU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    clock = Clock(0.0, 0.0, make_resolved("bf16", processes=2))
    clock.count(1000, 4e11)
    clock.count(500, 2e11)
    now[0] += 4
    mfu = clock.read().get("mfu")
    assert mfu == (rate and round(3 * (1000 * 4e11 + 500 * 2e11) / 4 / (2 * rate), 4))
    assert "mfu" not in Clock(0.0, 0.0, make_resolved("fp32")).read()  # the rate is that of bf16


def test_no_profile_by_default(tmp_path):
    with profiling(False, tmp_path / "trace.json") as profiler:
        assert profiler is None
    assert not (tmp_path / "trace.json").exists()
