"""Linear layers on a CPU with oneDNN, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitral.compat import has_linear_pointwise, linear_pointwise
from vitral.kernels.norm import product_dtype


def has_onednn() -> bool:
    """Returns whether torch supports oneDNN's linear layer here: on x86, unless disabled."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        and has_linear_pointwise()
    )


def can_train_by_onednn(x: Tensor) -> bool:
    """Returns whether `onednn_linear` supports x where `has_onednn`: float32 on a CPU."""
    return x.device.type == "cpu" and product_dtype(x) == x.dtype == torch.float32


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
    if torch.compiler.is_compiling():
        return compiled_product(x, weight, bias, *then)
    return linear_pointwise(x, weight, bias, *then)


@torch.library.custom_op("vitral::onednn_product", mutates_args=())
def compiled_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, function: str, form: str
) -> Tensor:
    """Computes `linear_pointwise` in compiled code.

    torch.compile does not inspect a custom operator. It would replace torch's own operator, which
    it supports only for constant weights.
    """
    return linear_pointwise(x, weight, bias, function, form)


@compiled_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, function: str, form: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


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
