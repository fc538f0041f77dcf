"""The energy meter, with a driver that counts as NVML does."""

import itertools

import pynvml
import pytest

from vitral.training import energy
from vitral.training.monitor import Clock
from vitral.training.resolved import Resolved

KWH = 3_600_000_000  # millijoules


@pytest.fixture
def nvml(monkeypatch):
    """A driver that counts a kWh between two calls, from a count above 32 bits."""
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


def test_without_a_counter_there_is_none(nvml, monkeypatch):
    assert energy.meter_of("GPU-other")() is None
    monkeypatch.undo()  # the real library, which finds no such GPU
    assert energy.meter_of("GPU-12-ab")() is None
    assert energy.energy_meter("cpu")() is None


def test_a_log_row_has_the_energy_of_all_processes_and_of_what_came_before(nvml, monkeypatch):
    monkeypatch.setattr(
        "vitral.training.monitor.energy_meter", lambda _: energy.meter_of("GPU-12-ab")
    )
    resolved = Resolved("cpu", "fp32", False, 1, 2, 4, "cpu", False)
    clock = Clock(10.0, 0.5, resolved)
    assert clock.read()["energy_kwh"] == 0.5 + 4 * 1
    assert clock.read()["energy_kwh"] == 0.5 + 4 * 2
