"""Trials on this machine: whether compilation works, and GPU kernels are faster."""

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

Precision = Literal["bf16", "fp32"]
ROUNDS, STEPS = 5, 10


def autocast(device: str, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """Returns a context with bf16 autocast, or without autocast in float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device, torch.bfloat16)


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Returns whether torch.compile works on a device; warns with the reason if it does not."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except Exception as error:  # compilers raise errors of any type
        warnings.warn(
            f"training is not compiled and runs slower, because torch.compile fails: "
            f"{_reason(error)}; usually a C compiler or Python's headers are missing",
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def fused_is_faster(
    config: ViTConfig,
    device: str,
    precision: Precision,
    compile: bool,
    micro_batch: int,
) -> bool:
    """Returns whether the custom kernels are faster than PyTorch's on a GPU.

    Alternately times both passes of a norm and a feed-forward network on noise with each.
    Returns False if there are no kernels for the device, as on mps and xpu, or if they fail.
    """
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
        except Exception as error:  # compilers raise errors of any type
            message = f"using PyTorch's kernels, because the custom kernels fail: {_reason(error)}"
            warnings.warn(message, stacklevel=2)
            return False
        finally:
            del x, fused, plain
            torch.cuda.empty_cache()
    fused_seconds, plain_seconds = map(statistics.median, zip(*rounds, strict=True))
    return fused_seconds < plain_seconds


def _reason(error: Exception) -> str:
    """Returns the first line of a compiler's error, which may have dozens of them."""
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
