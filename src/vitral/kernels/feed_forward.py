"""A feed-forward network with GELU fused into the adjacent matrix multiplications."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitral.kernels.norm import product_dtype

HOPPER = (9, 0)


def has_feed_forward(device: torch.device) -> bool:
    """Returns whether the device supports the kernels: a Hopper GPU or newer, with Triton."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= HOPPER


def can_fuse(x: Tensor) -> bool:
    """Returns whether the kernels support x on a supported device: a GPU, in half precision."""
    return x.is_cuda and product_dtype(x).itemsize == 2


def feed_forward(
    x: Tensor, expand: Tensor, expand_bias: Tensor | None, contract: Tensor, bias: Tensor | None
) -> Tensor:
    """Computes linear(gelu(linear(x))), with the tanh form of GELU (Hendrycks and Gimpel 2016).

    Args:
        x: (..., D).
        expand: weights of the first linear layer, (F, D).
        expand_bias: its bias, (F,).
        contract: weights of the second linear layer, (D, F).
        bias: its bias, (D,).

    Returns:
        (..., D), in the dtype in which a linear layer would compute.
    """
    dtype = product_dtype(x)
    # The kernels require contiguous rows. The first bias keeps its dtype, because they add it
    # to float32 sums.
    weights = expand.to(dtype).contiguous(), expand_bias, contract.to(dtype).contiguous()
    rows = x.to(dtype).flatten(0, -2).contiguous()
    with torch.autocast(x.device.type, enabled=False):
        result = _FeedForward.apply(rows, *weights)[0]  # pyright: ignore[reportIndexIssue]
        if bias is not None:
            result = result + bias.to(dtype)
    return result.view(x.shape)


class _FeedForward(torch.autograd.Function):
    """Also returns the input and the output of GELU, (M, F), for the backward pass."""

    @staticmethod
    def forward(
        x: Tensor, expand: Tensor, expand_bias: Tensor | None, contract: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        from vitral.kernels.gelu import gelu_linear

        before, after = gelu_linear(x, expand, expand_bias)
        return F.linear(after, contract), before, after

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, expand, _, contract = inputs
        _, before, after = output
        ctx.mark_non_differentiable(before, after)
        ctx.save_for_backward(x, expand, contract, before, after)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        from vitral.kernels.gelu import gelu_backward

        x, expand, contract, before, after = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        inner, sums = gelu_backward(gradient, contract, before)
        bias = sums if ctx.needs_input_grad[2] else None
        return inner @ expand, inner.mT @ x, bias, gradient.mT @ after
