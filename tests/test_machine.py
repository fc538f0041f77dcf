"""Detection of hardware, most of it simulated."""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vitral import machine
from vitral.errors import UserError


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there is a GPU of some name."""

    def pretend(name):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: name is not None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)

    return pretend


def test_the_device_is_the_gpu_if_there_is_one(gpu):
    gpu("NVIDIA H200")
    found = [machine.pick_device(name) for name in ("auto", "cuda", "cpu")]
    assert [str(device) for device in found] == ["cuda", "cuda", "cpu"]


def test_without_a_gpu_only_requesting_one_is_an_error(gpu):
    gpu(None)
    assert [machine.pick_device(name).type for name in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(UserError, match="device: expected a GPU that torch can use, got none; "):
        machine.pick_device("cuda")


@pytest.mark.parametrize(
    ("available", "auto"),
    [
        (set(), "cpu"),
        ({"cuda"}, "cuda"),
        ({"mps"}, "mps"),
        ({"xpu"}, "xpu"),
        ({"mps", "cuda"}, "cuda"),
        ({"xpu", "cuda"}, "cuda"),
        ({"xpu", "mps"}, "xpu"),
        ({"xpu", "mps", "cuda"}, "cuda"),
    ],
)
def test_auto_selects_an_accelerator_and_a_name_selects_that_one(available, auto):
    assert machine.select_device("auto", available) == auto
    assert machine.select_device("cpu", available) == "cpu"
    for name, what in (("cuda", "a GPU"), ("mps", "an mps device"), ("xpu", "an xpu device")):
        if name in available:
            assert machine.select_device(name, available) == name
        else:
            with pytest.raises(UserError, match=f"device: expected {what} that torch can use, got"):
                machine.select_device(name, available)


@pytest.mark.parametrize(
    ("kind", "expected"), [("mps", "mps"), ("xpu", "xpu"), ("hpu", None), (None, None)]
)
def test_other_accelerators_are_those_of_torch(gpu, monkeypatch, kind, expected):
    """auto does not select an untested device type such as hpu."""
    gpu(None)
    found = torch.device(kind) if kind else None
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: check_available and found
    )
    assert machine.accelerators() == ({expected} if expected else set())
    assert machine.gpu_name() == expected
    assert machine.pick_device("auto").type == (expected or "cpu")


@pytest.mark.parametrize(
    ("kind", "place"), [("cpu", "cpu"), ("cuda:1", "cuda:1"), ("mps", "cpu"), ("xpu", "cpu")]
)
def test_device_for_preprocessing(kind, place):
    assert machine.input_device(torch.device(kind)) == torch.device(place)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA L400", None),
        (None, None),
    ],
)
def test_peak_rates_by_gpu_name(gpu, name, peak):
    gpu(name)
    assert machine.gpu_name() == name
    assert machine.peak_flops() == peak


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert (machine.available_cores(), machine.num_cores()) == (3, 64)
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert machine.available_cores() == 64
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.available_cores() == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("vendor_id : AuthenticAMD\n", True), ("vendor_id : GenuineIntel\n", False), (None, False)],
)
def test_the_processor_vendor(monkeypatch, text, expected):
    def read(path, **_):
        assert str(path) == "/proc/cpuinfo"
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read)
    assert machine.is_amd.__wrapped__() is expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_the_peak_of_the_process(monkeypatch):
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    found = machine.memory_gb("cpu")
    assert found == pytest.approx(int(peak) * 1024 / 1e9, rel=0.05)
    monkeypatch.setattr(sys, "platform", "darwin")  # where the unit is bytes
    assert machine.memory_gb("cpu") == pytest.approx(found / 1024, rel=0.05)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3_000_000_000)
    assert machine.memory_gb("cuda") == 3


@pytest.mark.parametrize(
    ("shell", "expected"),
    [
        (None, False),
        (type("TerminalInteractiveShell", (), {})(), False),
        (type("ZMQInteractiveShell", (), {})(), True),
        (type("Shell", (type("ZMQInteractiveShell", (), {}),), {})(), True),  # Colab's
    ],
)
def test_a_notebook_is_recognized_by_its_shell(monkeypatch, shell, expected):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert machine.in_notebook() is expected
    monkeypatch.delitem(sys.modules, "IPython")
    assert not machine.in_notebook()
