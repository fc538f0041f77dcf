"""What a GPU has used of energy, as its driver counts it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

LIBRARY = "libnvidia-ml.so.1"  # NVML, a part of NVIDIA's driver


def energy_meter(device: str) -> Callable[[], float | None]:
    """A function that gives the joules which this process's GPU has used since now.

    It gives None on a CPU, and where the driver counts none, as before Volta.
    """
    if device != "cuda":
        return lambda: None
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    return meter_of(f"GPU-{uuid}")


def meter_of(uuid: str) -> Callable[[], float | None]:
    """`energy_meter` of the GPU of that name."""
    try:
        nvml = ctypes.CDLL(LIBRARY)
    except OSError:
        return lambda: None
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    # Each call gives 0 for success.
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
        return lambda: None

    def count() -> float | None:
        failed = nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return None if failed else millijoules.value / 1e3

    start = count()

    def since() -> float | None:
        now = count()
        return None if start is None or now is None else now - start

    return since
