"""Whether this device runs vitral's own kernels faster than torch's, found by trying both."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch

from vitral import kernels
from vitral.config import ViTConfig
from vitral.model import FeedForward, RMSNorm

ROUNDS, STEPS = 5, 10


def fused_is_faster(config: ViTConfig, images: int, device: torch.device, compile: bool) -> bool:
    """Tries a norm and a feed-forward network on noise, both passes, in turn, under autocast.

    False where there are no such kernels, or where they fail.

    Args:
        images: in a micro-batch.
        compile: whether training compiles.
    """
    tokens = images * (1 + config.num_registers + (config.image_size // config.patch_size) ** 2)
    x = torch.randn(tokens, config.shape.dim, device=device, requires_grad=True)
    if config.kernels == "plain" or not kernels.can_fuse(x):
        return False
    fused, plain = (
        _passes(dataclasses.replace(config, kernels=kind), x, compile) for kind in ("auto", "plain")
    )
    plain()
    try:
        fused()
    except Exception:  # a compiler's, of whatever kind: torch's own do the work then
        return False
    rounds = [(_seconds(fused), _seconds(plain)) for _ in range(ROUNDS)]
    ours, theirs = map(statistics.median, zip(*rounds, strict=True))
    return ours < theirs


def _passes(config: ViTConfig, x: torch.Tensor, compile: bool) -> Callable[[], None]:
    norm, layer = RMSNorm(config.shape.dim).to(x.device), FeedForward(config).to(x.device)
    call = torch.compile(layer, dynamic=False) if compile else layer
    gradient = torch.randn_like(x)

    def step() -> None:
        y = call(x, norm)
        y.backward(gradient.to(y.dtype))

    return step


def _seconds(step: Callable[[], None]) -> float:
    torch.accelerator.synchronize()
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.accelerator.synchronize()
    return time.perf_counter() - started
