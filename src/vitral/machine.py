"""Hardware of the machine: devices, cores, memory, and CPU features."""

from __future__ import annotations

import functools
import math
import os
import platform
import re
import resource
import sys
from collections.abc import Collection
from pathlib import Path

import torch

from vitral.errors import UserError

# Peak dense bf16 rates in FLOP/s, from the vendors' data sheets.
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
    """Returns whether torch can use a GPU."""
    return torch.cuda.is_available()


def num_gpus() -> int:
    """Returns the number of GPUs that torch can use."""
    return torch.cuda.device_count()


def accelerators() -> set[str]:
    """Returns the types of accelerators that torch can use: "cuda", "mps" or "xpu"."""
    if has_gpu():
        return {"cuda"}
    found = torch.accelerator.current_accelerator(check_available=True)
    return {found.type} & {"mps", "xpu"} if found else set()


def gpu_name() -> str | None:
    """Returns the name of the current GPU, "mps" or "xpu" for these types, or None without one."""
    return torch.cuda.get_device_name() if has_gpu() else next(iter(accelerators()), None)


def pick_device(name: str) -> torch.device:
    """Returns the device "cpu", "cuda", "mps" or "xpu"; "auto" selects an accelerator if any.

    Raises:
        UserError: if torch cannot use the requested accelerator.
    """
    return torch.device(select_device(name, accelerators()))


def select_device(name: str, available: Collection[str]) -> str:
    """Returns the device type for a name, given the types of the available accelerators."""
    if name == "auto":
        return next((kind for kind in ("cuda", "xpu", "mps") if kind in available), "cpu")
    if name != "cpu" and name not in available:
        what = "a GPU" if name == "cuda" else f"an {name} device"
        raise UserError(f"device: expected {what} that torch can use, got none; use --device cpu")
    return name


def input_device(device: torch.device) -> torch.device:
    """Returns where to preprocess images for a model: on its device, or on the CPU for mps and xpu.

    Preprocessing sums in float64, which mps does not support, and is tested only on CPUs and GPUs.
    """
    return torch.device("cpu") if device.type in ("mps", "xpu") else device


def synchronize(device: torch.device) -> None:
    """Waits for an accelerator to finish."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_flops() -> float | None:
    """Returns the GPU's peak dense bf16 rate in FLOP/s; None if unknown, and for MIG slices."""
    words = f" {(gpu_name() or '').replace('-', ' ')} "
    if " MIG " in words:
        return None
    return next((rate for key, rate in PEAK_FLOPS.items() if f" {key} " in words), None)


def available_cores() -> int:
    """Returns the number of processor cores that this process may use, at least 1.

    A CPU quota of control groups, as set by `docker run --cpus`, limits it, rounded down.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, int(min(cores, cpu_quota())))


def cpu_quota(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float:
    """Returns how many cores the control groups (v1 or v2) allow on average; inf without a limit.

    Args:
        groups: where the control groups are mounted.
        own: the file with the groups of this process.
    """
    lowest = math.inf
    for line in _read(own).splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = groups / "cpu" if controllers else groups
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        # Without its own namespace, a container lists a group of the host that it does not see.
        group = top / name.lstrip("/")
        while group.is_relative_to(top):
            numbers = " ".join(_read(group / file) for file in files).split()
            if len(numbers) == 2 and all(number.isdecimal() for number in numbers):
                lowest = min(lowest, int(numbers[0]) / int(numbers[1]))
            group = group.parent
    return lowest


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # another system, or no such group
        return ""


def num_cores() -> int | None:
    """Returns the number of processor cores of the machine."""
    return os.cpu_count()


@functools.cache
def processor() -> str:
    """Returns the model name of the processor, or its architecture if the name is unknown."""
    found = re.search(r"^model name\s*: (.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def max_open_files() -> int:
    """Returns the number of files that this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def memory_gb(device: str) -> float:
    """Returns the peak memory so far in 10^9 bytes: of the GPU for "cuda", else of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def in_notebook() -> bool:
    """Returns whether this process is a notebook kernel, from the class of IPython's shell."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    return any(base.__name__ == "ZMQInteractiveShell" for base in type(get_shell()).__mro__)
