"""Trials on this machine: whether torch.compile works, and which kernels are faster."""

import os
import re
import subprocess
import sys

import pytest
import torch

from vitral import kernels
from vitral.config import ViTConfig
from vitral.training import trial
from vitral.training.trial import autocast

CPU = torch.device("cpu")
CONFIG = ViTConfig(dim=16, depth=1, num_heads=2, num_kv_heads=1, image_size=8, patch_size=4)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_autocast_applies_only_to_products(precision, dtype):
    x = torch.ones(2, 2)
    with autocast("cpu", precision):
        assert (x @ x).dtype == dtype
        assert (x + x).dtype == torch.float32
    assert (x @ x).dtype == torch.float32


def test_compilation_is_tried_once(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f: calls.append(f) or f)
    trial.can_compile.cache_clear()
    assert trial.can_compile(CPU)
    assert trial.can_compile(CPU)
    assert len(calls) == 1
    trial.can_compile.cache_clear()


@pytest.mark.parametrize(
    ("error", "reason"), [("\nno compiler\n  in line 3", "no compiler"), ("", "RuntimeError")]
)
def test_a_failing_compiler_causes_a_warning(monkeypatch, error, reason):
    def fail(_):
        raise RuntimeError(error)

    monkeypatch.setattr(torch, "compile", lambda f: fail)
    with pytest.warns(UserWarning, match="training is not compiled") as caught:
        assert not trial.can_compile.__wrapped__(CPU)
    assert f"torch.compile fails: {reason}; " in str(caught[0].message)


# In a separate process: the compiler leaves threads behind, which make forking unsafe.
TRY = """
import sys
import torch
from torch._inductor import config
from vitral.training.trial import can_compile

with config.patch({"cpp.cxx": (sys.argv[1],)}):
    print(can_compile(torch.device("cpu")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++", "/no/compiler"])
def test_without_a_compiler_nothing_is_compiled(compiler, tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    words = [sys.executable, "-c", TRY, compiler]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.stdout == f"{compiler == 'g++'}\n", done.stderr
    warning = re.search("training is not compiled and runs slower, .*C compiler", done.stderr)
    assert bool(warning) is (compiler != "g++")


def timed(monkeypatch, fused, plain):
    """Returns whether the custom kernels count as faster, given the times of the passes.

    The device is torch's meta device. An exception among the times is raised.
    """
    times = {True: iter(fused), False: iter(plain)}
    sizes = []

    def passes(config, x, compiled, kind):
        sizes.append((*x.shape, compiled))
        return lambda: kind

    def seconds(step):
        value = next(times[step()])
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(kernels, "has_feed_forward", lambda device: device.type == "meta")
    monkeypatch.setattr(kernels, "can_fuse", lambda x: True)
    monkeypatch.setattr(trial, "_forward_backward", passes)
    monkeypatch.setattr(trial, "_seconds", seconds)
    faster = trial.fused_is_faster.__wrapped__(CONFIG, "meta", "fp32", True, 8)
    assert sizes == [(8 * (1 + 2 * 2), 16, True)] * 2
    return faster


@pytest.mark.parametrize(
    ("fused", "plain", "faster"),
    [
        ([1] * 5, [2] * 5, True),
        ([2] * 5, [1] * 5, False),
        ([1] * 5, [1] * 5, False),
        ([1, 90, 1, 90, 1], [2] * 5, True),  # medians
        ([1, 90, 1, 90, 3], [2] * 5, False),
    ],
)
def test_medians_decide_which_gpu_kernels_run(monkeypatch, fused, plain, faster):
    assert timed(monkeypatch, fused, plain) is faster


def test_failing_kernels_are_not_used(monkeypatch):
    error = RuntimeError("out of registers\nmore")
    with pytest.warns(UserWarning, match="because the custom kernels fail: out of registers$"):
        assert not timed(monkeypatch, [1, error], [2] * 5)


@pytest.mark.parametrize("lacks", ["has_feed_forward", "can_fuse"])
def test_without_kernels_nothing_is_timed(monkeypatch, lacks):
    for name in ("has_feed_forward", "can_fuse"):
        monkeypatch.setattr(kernels, name, lambda _, name=name: name != lacks)
    monkeypatch.setattr(trial, "_seconds", pytest.fail)
    assert not trial.fused_is_faster.__wrapped__(CONFIG, "meta", "fp32", False, 8)
