"""Takes some rows of a batch, and puts them back.

Forward and backward passes only gather, so they are exact and deterministic. PyTorch's gradient
of indexing uses atomic additions on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def take_rows(x: Tensor, order: Tensor, count: int) -> Tensor:
    """Returns the rows order[:count] of x: (B, ...) to (count, ...).

    Args:
        x: (B, ...).
        order: a permutation of the B rows, int64, (B,).
        count: number of rows to take.
    """
    return _Take.apply(x, order[:count], order)  # pyright: ignore[reportReturnType]


def put_rows(x: Tensor, order: Tensor) -> Tensor:
    """Inverts `take_rows`, (count, ...) to (B, ...): row order[i] is x[i], other rows are zero."""
    return _Put.apply(x, order)  # pyright: ignore[reportReturnType]


def _scatter(x: Tensor, order: Tensor) -> Tensor:
    position = order.argsort()
    is_kept = (position < len(x)).view(-1, *[1] * (x.ndim - 1))
    return torch.where(is_kept, x[position.clamp(max=len(x) - 1)], 0)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, chosen: Tensor, order: Tensor) -> Tensor:
        return x[chosen]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _scatter(gradients[0], *ctx.saved_tensors), None, None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, order: Tensor) -> Tensor:
        return _scatter(x, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.count = len(inputs[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return gradients[0][order[: ctx.count]], None
