"""Energy that a GPU has used, as its driver counts it."""

from __future__ import annotations

from collections.abc import Callable

import torch

Meter = Callable[[], float | None]


def energy_meter(device: str) -> Meter:
    """A function that returns the joules that this process's GPU has used since now.

    It returns None on a CPU, and where the driver counts no energy, as before Volta.
    """
    if device != "cuda":
        return lambda: None
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    return meter_of(f"GPU-{uuid}")


def meter_of(uuid: str) -> Meter:
    """`energy_meter` of the GPU with a UUID."""
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
