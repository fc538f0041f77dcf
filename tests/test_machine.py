"""Detection of hardware, most of it simulated."""

import math
import os
import platform
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
    monkeypatch.setattr(machine, "cpu_quota", lambda: math.inf)
    assert (machine.available_cores(), machine.num_cores()) == (3, 64)
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert machine.available_cores() == 64
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.available_cores() == 1


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a/b\n", {"cpu.max": "300000 100000", "a/cpu.max": "250000 100000"}, 2.5),
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000", "a/cpu.max": "max 100000"}, 1.5),
        ("0::/host/docker/1\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/\n", {"cpu.max": "damaged"}, math.inf),
        ("0::/\n", {}, math.inf),
        ("", {"cpu.max": "50000 100000"}, math.inf),
        (
            "5:memory:/x\n4:cpu,cpuacct:/x\n0::/x\n",
            {"cpu/x/cpu.cfs_quota_us": "75000\n", "cpu/x/cpu.cfs_period_us": "50000\n"},
            1.5,
        ),
        (
            "4:cpuacct,cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            math.inf,
        ),
    ],
)
def test_the_quota_is_the_lowest_of_the_control_groups(tmp_path, own, files, quota):
    groups = tmp_path / "cgroup"
    for name, content in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(content)
    (tmp_path / "own").write_text(own)
    assert machine.cpu_quota(groups, tmp_path / "own") == quota


@pytest.mark.parametrize(("quota", "cores"), [(0.5, 1), (2.9, 2), (9, 3), (math.inf, 3)])
def test_a_quota_limits_the_cores(monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert machine.available_cores() == cores


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC 9\nmodel name\t: AMD EPYC 9\n", "AMD EPYC 9"),
        ("CPU part\t: 0xd0c\n", "aarch64"),
        (None, "aarch64"),
    ],
)
def test_the_name_of_the_processor(monkeypatch, text, name):
    def read(path, **_):
        assert str(path) == "/proc/cpuinfo"
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert machine.processor.__wrapped__() == name


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
