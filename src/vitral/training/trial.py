"""What this machine can do, found by trying: compile, and run vitral's own kernels faster."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch

from vitral import kernels
from vitral.config import ViTConfig
from vitral.model import FeedForward, PreNorm

ROUNDS, STEPS = 5, 10


def autocast(
    device: str, precision: Literal["bf16", "fp32"]
) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast, or nothing."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device, torch.bfloat16)


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether torch.compile builds a kernel for a device; where it does not, a warning says why."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except Exception as error:  # a compiler's, of whatever kind
        warnings.warn(
            f"training is not compiled, and slower, as torch.compile fails: {_reason(error)}; what "
            "it mostly lacks are a C compiler and Python's headers",
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def fused_is_faster(
    config: ViTConfig,
    device: str,
    precision: Literal["bf16", "fp32"],
    compile: bool,
    micro_batch: int,
) -> bool:
    """On a GPU tries a norm and a feed-forward network on noise, both passes, in turn.

    False where there are no kernels for that, as on mps and xpu, or where they fail. A CPU is known
    by its maker, so that the same run is the same to the last bit, whatever else the machine has to
    do.
    """
    if device == "cpu":
        eager = config.kernels == "auto" and not compile
        with autocast(device, precision):
            return eager and kernels.can_train_by_onednn(torch.empty(1))
    if config.kernels == "plain" or not kernels.has_feed_forward(torch.device(device)):
        return False
    grid_size = config.image_size // config.patch_size
    tokens = micro_batch * (config.num_prefix + grid_size**2)
    with autocast(device, precision):
        if not kernels.can_fuse(torch.empty(1, device=device)):
            return False
        x = torch.randn(tokens, config.shape.dim, device=device, requires_grad=True)
        fused, plain = (_forward_backward(config, x, compile, kind) for kind in (True, False))
        try:
            fused()
            plain()
            rounds = [(_seconds(fused), _seconds(plain)) for _ in range(ROUNDS)]
        except Exception as error:  # a compiler's, of whatever kind
            message = f"torch's kernels do the work, as vitral's fail: {_reason(error)}"
            warnings.warn(message, stacklevel=2)
            return False
        finally:
            del x, fused, plain
            torch.cuda.empty_cache()
    fused_seconds, plain_seconds = map(statistics.median, zip(*rounds, strict=True))
    return fused_seconds < plain_seconds


def _reason(error: Exception) -> str:
    """The first line of a compiler's error, which may have dozens."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _forward_backward(
    config: ViTConfig, x: torch.Tensor, compiled: bool, fused: bool
) -> Callable[[], None]:
    norm, layer = PreNorm(config.shape.dim).to(x.device), FeedForward(config).to(x.device)
    layer.fused = fused
    call = torch.compile(layer, dynamic=False) if compiled else layer
    gradient = torch.randn_like(x)

    def step() -> None:
        y = call(norm(x))
        y.backward(gradient.to(y.dtype))

    return step


def _seconds(step: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return time.perf_counter() - started
