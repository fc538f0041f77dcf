"""Energy used by a GPU, as counted by its driver."""

from __future__ import annotations

from collections.abc import Callable

import torch

Meter = Callable[[], float | None]


def energy_meter(device: str) -> Meter:
    """Returns a function that returns the joules used by this process's GPU since this call.

    The function returns None on a CPU and for GPUs older than Volta, whose driver does not count
    energy.
    """
    if device != "cuda":
        return lambda: None
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    return meter_of(f"GPU-{uuid}")


def meter_of(uuid: str) -> Meter:
    """Returns the `energy_meter` of the GPU with this UUID."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        start = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return lambda: None

    def joules() -> float | None:
        try:
            return (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - start) / 1e3
        except pynvml.NVMLError:
            return None

    return joules
