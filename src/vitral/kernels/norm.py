"""RMS normalization that shares the saved tensor with the next linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-6


def normalize(x: Tensor) -> Tensor:
    """Computes x / sqrt(mean(x^2) + 1e-6) over the last axis (Zhang and Sennrich 2019).

    There is no scale. The computation is in float32, or in float64 if x is float64. For
    the gradient, it saves the result, which the next linear layer also saves, and one number per
    row, but not x. With a bf16 result and a float32 x, this saves two thirds of the memory.

    Args:
        x: (..., D).

    Returns:
        (..., D) in the dtype of x, or in that of autocast if it is enabled, as for a linear layer.
    """
    return _Normalize.apply(x, product_dtype(x))[0]  # pyright: ignore[reportIndexIssue]


def product_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype in which a linear layer computes for input x: that of x or autocast."""
    device = x.device.type
    # Autocast does not support the meta device. torch.amp.is_autocast_available would detect that,
    # but causes graph breaks in torch 2.11.
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on and x.dtype != torch.float64 else x.dtype


class _Normalize(torch.autograd.Function):
    """Also returns 1 / sqrt(mean(x^2) + 1e-6), (..., 1), for the backward pass."""

    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        exact = x.float() if x.dtype.itemsize < 4 else x
        norm = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        # On a CPU, in-place operations here and below take two thirds of the time.
        inverse = norm.square_().div_(x.shape[-1]).add_(EPS).rsqrt_()
        y = exact * inverse
        # With a .to that does not change the dtype, torch.compile loses the gradient in torch 2.11.
        return (y if y.dtype == dtype else y.to(dtype)), inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.dtype = inputs[0].dtype
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*output)

    @staticmethod
    @once_differentiable  # because it treats the saved `inverse` as a constant
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, None]:
        y, inverse = ctx.saved_tensors
        g, y = gradients[0].to(inverse.dtype), y.to(inverse.dtype)
        # (g - y mean(g y)) inverse; on a CPU, this form takes half the time. vecdot would return
        # the same bits, but autocast lets torch.compile compute it in bf16.
        projection = (g * y).sum(-1, keepdim=True).div_(-y.shape[-1])
        return torch.addcmul(g, y, projection).mul_(inverse).to(ctx.dtype), None
