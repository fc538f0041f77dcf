"""Runs the Triton kernels in the interpreter (TRITON_INTERPRET=1) and prints their errors as JSON.

The interpreter does not support bf16 products, so half precision is float16 here.
"""

import json
import sys
import traceback

import torch
import torch.nn.functional as F
from torch import nn

from vitral import kernels
from vitral.config import ViTConfig
from vitral.kernels import gelu
from vitral.kernels.feed_forward import feed_forward
from vitral.model import FeedForward, PreNorm

gelu.wrap_triton = lambda kernel: kernel  # not done by torch 2.11 in the interpreter


def plain(x, expand, expand_bias, contract, bias):
    hidden = F.gelu(F.linear(x, expand, expand_bias), approximate="tanh")
    return F.linear(hidden, contract, bias)


def passes(run, tokens, dim, hidden, with_bias, dtype):
    """Returns the result and the gradients of a feed-forward network."""
    draw = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    leaves = [
        noise(1, tokens, dim),
        noise(hidden, dim) / dim**0.5,
        noise(hidden),
        noise(dim, hidden) / hidden**0.5,
        noise(dim),
    ]
    if not with_bias:
        leaves[2] = leaves[4] = None
    leaves = [leaf if leaf is None else leaf.to(dtype).requires_grad_() for leaf in leaves]
    # Non-contiguous rows, and weights and a gradient that are transposed in memory.
    wide = torch.cat([leaves[0], leaves[0]], dim=2)[..., :dim]
    expand, contract = (leaves[i].T.contiguous().T for i in (1, 3))
    y = run(wide, expand, leaves[2], contract, leaves[4])
    y.backward(noise(1, dim, tokens).to(dtype).mT)
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def errors(cases):
    """Returns relative errors of the kernels and of torch's operations, for each case and dtype."""
    found = []
    for case in cases:
        truth = passes(plain, *case, torch.float64)
        for dtype in (torch.float32, torch.float16):
            each = (passes(run, *case, dtype) for run in (feed_forward, plain))
            found.append(
                [[relative(a, b) for a, b in zip(got, truth, strict=True)] for got in each]
            )
    return found


def products(cases):
    """Returns relative errors of the results of both products in float32, for each case."""
    found = []
    for M, K, N, with_bias in cases:
        draw = torch.Generator().manual_seed(1)
        x, weight = torch.randn(M, K, generator=draw), torch.randn(N, K, generator=draw) / K**0.5
        bias = torch.randn(N, generator=draw) if with_bias else None
        gradient, back = torch.randn(M, K, generator=draw), torch.randn(K, N, generator=draw)
        before, after = gelu.gelu_linear(x, weight, bias)
        result, sums = gelu.gelu_backward(gradient, back, before)
        linear = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        exact = before.double().requires_grad_()
        F.gelu(exact, approximate="tanh").backward(gradient.double() @ back.double())
        found.append(
            {
                "before": relative(before, linear),
                "after": relative(after, F.gelu(linear, approximate="tanh")),
                "result": relative(result, exact.grad),
                "sums": relative(sums, exact.grad.sum(0)),
            }
        )
    return found


def layer():
    """Returns None if the layer is the same with and without kernels, otherwise a traceback."""
    kernels.can_fuse = lambda x: True
    try:
        for bias in (True, False):
            layer = FeedForward(ViTConfig(dim=24, num_heads=2, num_kv_heads=1, ffn_bias=bias))
            norm, x = PreNorm(24), torch.randn(2, 5, 24)
            parameters = [norm.scale, *layer.parameters()]
            for parameter in parameters:
                nn.init.normal_(parameter)
            found = []
            for layer.fused in (True, False):
                y = layer(norm(x))
                found.append([y, *torch.autograd.grad(y.square().sum(), parameters)])
            assert not found[0][0].equal(found[1][0])
            for fused, plain in zip(*found, strict=True):
                torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-2)
    except Exception:
        return traceback.format_exc()
    return None


def relative(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


cases = json.loads(sys.argv[1])
print(json.dumps({"errors": errors(cases), "products": products(cases), "layer": layer()}))
