"""The energy counter against a library with NVML's functions, made on the spot."""

import shutil
import subprocess

import pytest

from vitral.training import energy
from vitral.training.monitor import Clock
from vitral.training.resolve import Resolved

# NVML's signatures: 0 for success; millijoules since the driver was loaded.
NVML = """
#include <string.h>
static int opened, calls;
int nvmlInit_v2(void) { opened = 1; return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    if (!opened || strcmp(uuid, "GPU-12-ab")) return 6;
    *device = &calls;
    return 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *energy) {
    if (device != &calls) return 2;
    *energy = 5000000000000ULL + 3600000ULL * 1000 * calls++;  /* a kWh a call; above 32 bits */
    return 0;
}
"""


@pytest.fixture
def nvml(tmp_path, monkeypatch):
    if shutil.which("cc") is None:
        pytest.skip("no compiler")
    (tmp_path / "nvml.c").write_text(NVML)
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "nvml.c"], check=True)
    monkeypatch.setattr(energy, "LIBRARY", str(library))


def test_energy_is_counted_from_the_start(nvml):
    joules = energy.meter_of("GPU-12-ab")
    assert [joules(), joules()] == [3.6e6, 7.2e6]


def test_without_a_counter_there_is_none(nvml, monkeypatch):
    assert energy.meter_of("GPU-other")() is None
    monkeypatch.setattr(energy, "LIBRARY", "no such library")
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
