"""The energy meter, with a replacement for NVML."""

import itertools

import pynvml
import pytest

from vitral.training import energy
from vitral.training.monitor import Clock
from vitral.training.resolved import Resolved

KWH = 3_600_000_000  # millijoules


@pytest.fixture
def nvml(monkeypatch):
    """Replaces NVML with a counter that starts above 32 bits and adds a kWh per call."""
    counts = itertools.count(5_000_000_000_000, KWH)

    def handle(uuid):
        if uuid != "GPU-12-ab":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return "handle"

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda _: next(counts))


def test_energy_is_counted_from_the_start(nvml):
    joules = energy.meter_of("GPU-12-ab")
    assert [joules(), joules()] == [3.6e6, 7.2e6]


def test_without_a_counter_the_meter_returns_none(nvml, monkeypatch):
    assert energy.meter_of("GPU-other")() is None
    monkeypatch.undo()  # the real library, which finds no such GPU
    assert energy.meter_of("GPU-12-ab")() is None
    assert energy.energy_meter("cpu")() is None


def test_a_log_row_has_the_energy_of_all_processes_since_the_start_of_the_run(nvml, monkeypatch):
    monkeypatch.setattr(
        "vitral.training.monitor.energy_meter", lambda _: energy.meter_of("GPU-12-ab")
    )
    resolved = Resolved("cpu", "fp32", False, 1, 2, 4, "cpu", False)
    clock = Clock(10.0, 0.5, resolved)
    assert clock.read()["energy_kwh"] == 0.5 + 4 * 1
    assert clock.read()["energy_kwh"] == 0.5 + 4 * 2
