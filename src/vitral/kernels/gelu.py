"""Matrix multiplications fused with GELU or its derivative, in Triton.

The tensor between the two multiplications of a feed-forward network is the largest one in a block.
Without fusion, the first multiplication writes it, and GELU reads and writes it. In the backward
pass, a multiplication writes its gradient, GELU's derivative reads both tensors and writes its
result, and the gradient of the bias reads that result. Fusing GELU and its derivative into the
multiplications leaves four of these eight passes over the tensor.

Each program computes one block of the result, with float32 sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

# The same for all shapes: autotuning could choose a different order of summation in each run.
BLOCK_M, BLOCK_N, BLOCK_K, GROUP = 128, 128, 64, 8
WARPS, STAGES = 4, 3


@triton.jit
def _gelu_gate(x):
    """Returns s = (1 + tanh u) / 2 = sigmoid(2 u) in gelu(x) = x s, tanh form; and d(2u)/dx."""
    square = x * x
    gate = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * square))
    return gate, 1.5957691216057308 * (1 + 0.134145 * square)


@triton.jit
def _block_of(num_m, num_n, GROUP: tl.constexpr):
    """Returns row and column of this program's block; GROUP rows of blocks share the cache."""
    program = tl.program_id(0)
    group = program // (GROUP * num_n)
    first = group * GROUP
    rows = min(num_m - first, GROUP)
    within = program % (GROUP * num_n)
    return first + within % rows, within // rows


@triton.jit
def _product(
    a, b, m, n, M, N, K, stride_bn, stride_bk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Returns rows m and columns n of a b, for a row-major a (M, K) and a strided b (K, N)."""
    k = tl.arange(0, BLOCK_K)
    a += (m % M)[:, None].to(tl.int64) * K + k[None, :]
    b += (n % N)[None, :] * stride_bn + k[:, None] * stride_bk
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = k + start < K
        left = tl.load(a, mask=inside[None, :], other=0.0)
        right = tl.load(b, mask=inside[:, None], other=0.0)
        total = tl.dot(left, right, total)
        a += BLOCK_K
        b += BLOCK_K * stride_bk
    return total


@triton.jit
def _gelu_linear(
    x, weight, bias, before, after, M, N, K,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = _block_of(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m, n = row * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    total = _product(x, weight, m, n, M, N, K, K, 1, BLOCK_M, BLOCK_N, BLOCK_K)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    gate, _ = _gelu_gate(total)
    where, inside = m[:, None].to(tl.int64) * N + n[None, :], (m < M)[:, None] & (n < N)[None, :]
    tl.store(before + where, total.to(before.dtype.element_ty), mask=inside)
    tl.store(after + where, (total * gate).to(after.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_backward(
    gradient, weight, before, result, sums, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = _block_of(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m, n = row * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    total = _product(gradient, weight, m, n, M, N, K, 1, N, BLOCK_M, BLOCK_N, BLOCK_K)
    where, inside = m[:, None].to(tl.int64) * N + n[None, :], (m < M)[:, None] & (n < N)[None, :]
    x = tl.load(before + where, mask=inside, other=0.0).to(tl.float32)
    gate, slope = _gelu_gate(x)
    total *= gate + x * gate * (1 - gate) * slope
    tl.store(result + where, total.to(result.dtype.element_ty), mask=inside)
    tl.store(sums + row * N + n, tl.sum(tl.where(inside, total, 0.0), axis=0), mask=n < N)


def _launch(kernel: object, tensors: tuple[Tensor, ...], M: int, N: int, K: int, **constants: bool):
    grid = (triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N),)
    wrap_triton(kernel)[grid](  # pyright: ignore[reportIndexIssue, reportArgumentType]
        *tensors, M, N, K,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, GROUP=GROUP,
        num_warps=WARPS, num_stages=STAGES, **constants,
    )  # fmt: skip


@triton_op("vitral::gelu_linear", mutates_args=())
def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Computes y = x weight^T + bias, and gelu(y).

    Args:
        x: (M, K), contiguous.
        weight: (N, K), contiguous, with the dtype of x.
        bias: (N,), or None.

    Returns:
        y and gelu(y), each (M, N) with the dtype of x. GELU is applied before y is rounded.
    """
    M, K = x.shape
    N = len(weight)
    before, after = x.new_empty(M, N), x.new_empty(M, N)
    tensors = (x, weight, weight if bias is None else bias, before, after)
    _launch(_gelu_linear, tensors, M, N, K, HAS_BIAS=bias is not None)
    return before, after


@triton_op("vitral::gelu_backward", mutates_args=())
def gelu_backward(gradient: Tensor, weight: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Computes (gradient weight) gelu'(before), and its sum over the rows.

    Args:
        gradient: gradient of gelu(before) weight^T, (M, K), contiguous.
        weight: (K, N), contiguous, with the same dtype.
        before: (M, N), contiguous.

    Returns:
        (M, N) with that dtype, and (N,) in float32. The sum adds the rows within each block, then
        the blocks, so that its order is fixed.
    """
    M, K = gradient.shape
    N = weight.shape[1]
    result = torch.empty_like(before)
    sums = gradient.new_empty(triton.cdiv(M, BLOCK_M), N, dtype=torch.float32)
    _launch(_gelu_backward, (gradient, weight, before, result, sums), M, N, K)
    return result, sums.sum(0)
