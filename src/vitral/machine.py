"""The machine: devices, cores, memory, CPU features, and where its caches are."""

from __future__ import annotations

import functools
import os
import resource
import sys
from pathlib import Path

import torch

from vitral.errors import UserError

# Dense bf16 rates in FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def has_gpu() -> bool:
    """Whether torch can use a GPU."""
    return torch.cuda.is_available()


def num_gpus() -> int:
    """The number of GPUs that torch can use."""
    return torch.cuda.device_count()


def gpu_name() -> str | None:
    """The name of the current GPU, or None without one."""
    return torch.cuda.get_device_name() if has_gpu() else None


def pick_device(name: str) -> torch.device:
    """The device called "cpu" or "cuda"; "auto" is the GPU if there is one.

    Raises:
        UserError: if "cuda" is requested and there is no GPU.
    """
    if name == "cuda" and not has_gpu():
        raise UserError("device: expected a GPU that torch can use, got none; give --device cpu")
    if name == "auto":
        name = "cuda" if has_gpu() else "cpu"
    return torch.device(name)


def peak_flops() -> float | None:
    """The dense bf16 rate of the current GPU in FLOP/s; None if unknown, and for MIG slices."""
    words = f" {(gpu_name() or '').replace('-', ' ')} "
    if " MIG " in words:
        return None
    return next((rate for key, rate in PEAK_FLOPS.items() if f" {key} " in words), None)


def available_cores() -> int:
    """The number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def num_cores() -> int | None:
    """The number of processor cores of the machine."""
    return os.cpu_count()


@functools.cache
def is_amd() -> bool:
    """Whether the processor is made by AMD; False where that cannot be read."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:  # not Linux
        return False


def memory_gb(device: str) -> float:
    """Peak memory so far, in 10^9 bytes: of the GPU for "cuda", else of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel, by the class of IPython's shell."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    return any(base.__name__ == "ZMQInteractiveShell" for base in type(get_shell()).__mro__)


def cache_dir() -> Path:
    """The per-user cache directory: VITRAL_CACHE, or `vitral` in XDG_CACHE_HOME or ~/.cache."""
    own, shared = os.environ.get("VITRAL_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own or Path(shared or "~/.cache") / "vitral").expanduser()


def downloads_dir() -> Path:
    """The directory that known data sets are downloaded to: VITRAL_DATA, or in ~/.cache."""
    return Path(os.environ.get("VITRAL_DATA") or "~/.cache/vitral/data").expanduser()
