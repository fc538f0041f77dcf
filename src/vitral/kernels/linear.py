"""Linear layers on a CPU with oneDNN, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitral.compat import has_linear_pointwise, linear_pointwise
from vitral.kernels.norm import product_dtype
from vitral.machine import is_amd


def has_onednn() -> bool:
    """Returns whether torch supports oneDNN's linear layer here: on x86, unless disabled."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        and has_linear_pointwise()
    )


def can_train_by_onednn(x: Tensor) -> bool:
    """Returns whether `onednn_linear` supports x and is faster than torch: float32, on AMD.

    torch runs linear layers with MKL, which uses half the vector width of AMD processors. Other
    processors are not measured. Returns False under torch.compile, whose lowering to oneDNN does
    not support tensors that require gradients.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    exact = product_dtype(x) == x.dtype == torch.float32
    return exact and has_onednn() and is_amd()


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes x W^T + b, like `F.linear`: x (..., D), W (F, D), b (F,), to (..., F).

    Unlike in `F.linear`, x must have at least two axes and at least one row.
    """
    return _Linear.apply(x, weight, bias)  # pyright: ignore[reportReturnType]


def onednn_product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, then: tuple[str, str] = ("none", "")
) -> Tensor:
    """Computes `onednn_linear` without gradients, followed by an elementwise function.

    Args:
        x: (..., D).
        weight: (F, D).
        bias: (F,), or None.
        then: name and form of the function in oneDNN, such as ("gelu", "tanh").

    Returns:
        (..., F).
    """
    return linear_pointwise(x, weight, bias, *then)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return onednn_product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        wanted = ctx.needs_input_grad
        return (
            onednn_product(gradient, weight.mT) if wanted[0] else None,
            onednn_product(rows.mT, x.flatten(0, -2).mT) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )
