"""RMS normalisation that keeps for the backward pass what the next product keeps anyway."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-6


def normalize(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 1e-6) over the last axis (Zhang and Sennrich 2019), without a scale.

    Computed in float32, or in float64 if that is what x is. Kept for the gradient are the result,
    which a linear layer after it keeps too, and one number a row, not x: in bf16 beside a float32
    x that saves two thirds of the memory.

    Args:
        x: (..., D).

    Returns:
        (..., D) in the dtype of x, or in autocast's where that is on, as for a linear layer.
    """
    return _Normalize.apply(x, product_dtype(x))[0]  # pyright: ignore[reportIndexIssue]


def product_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer computes in when it is given x: its dtype, or autocast's."""
    device = x.device.type
    # Autocast knows no meta device. torch.amp.is_autocast_available, which says so, breaks graphs
    # in torch 2.11.
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on and x.dtype != torch.float64 else x.dtype


class _Normalize(torch.autograd.Function):
    """Also gives 1 / sqrt(mean(x^2) + 1e-6), (..., 1), as a part of the backward pass."""

    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        exact = x.float() if x.dtype.itemsize < 4 else x
        norm = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        # In place, here and below: a CPU takes two thirds of the time.
        inverse = norm.square_().div_(x.shape[-1]).add_(EPS).rsqrt_()
        y = exact * inverse
        # A .to that changes nothing costs the gradient here when torch 2.11 compiles it.
        return (y if y.dtype == dtype else y.to(dtype)), inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.dtype = inputs[0].dtype
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*output)

    @staticmethod
    @once_differentiable  # one factor of it is kept as if it were a constant
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, None]:
        y, inverse = ctx.saved_tensors
        g, y = gradients[0].to(inverse.dtype), y.to(inverse.dtype)
        # (g - y mean(g y)) inverse: a CPU takes half the time for it so.
        # Not by vecdot, the same to the last bit: a compiler takes it in bf16, as autocast says.
        projection = (g * y).sum(-1, keepdim=True).div_(-y.shape[-1])
        return torch.addcmul(g, y, projection).mul_(inverse).to(ctx.dtype), None
