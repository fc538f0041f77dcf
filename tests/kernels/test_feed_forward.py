"""The Triton kernels, on a CPU: interpreted for their values, compiled for what a GPU is given."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

# Interpreted, kernels take no bf16 products, so half precision is float16 here.
INTERPRETED = """
import json
import sys
import torch
import torch.nn.functional as F
from vitral.kernels import gelu
from vitral.kernels.feed_forward import feed_forward

gelu.wrap_triton = lambda kernel: kernel  # which torch 2.11 does not do when they are interpreted

def plain(x, expand, expand_bias, contract, bias):
    hidden = F.gelu(F.linear(x, expand, expand_bias), approximate="tanh")
    return F.linear(hidden, contract, bias)

def passes(run, tokens, dim, hidden, with_bias, dtype):
    draw = torch.Generator().manual_seed(0)
    def noise(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)
    leaves = [noise(1, tokens, dim), noise(hidden, dim) / dim**0.5, noise(hidden),
              noise(dim, hidden) / hidden**0.5, noise(dim)]
    if not with_bias:
        leaves[2] = leaves[4] = None
    leaves = [leaf if leaf is None else leaf.to(dtype).requires_grad_() for leaf in leaves]
    # Rows with gaps between them, and weights and a gradient that lie the other way round.
    wide = torch.cat([leaves[0], leaves[0]], dim=2)[..., :dim]
    expand, contract = (leaves[i].T.contiguous().T for i in (1, 3))
    y = run(wide, expand, leaves[2], contract, leaves[4])
    y.backward(noise(1, dim, tokens).to(dtype).mT)
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]

found = []
for case in json.loads(sys.argv[1]):
    truth = passes(plain, *case, torch.float64)
    for dtype in (torch.float32, torch.float16):
        errors = [
            [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, truth)]
            for got in (passes(run, *case, dtype) for run in (feed_forward, plain))
        ]
        found.append(errors)
print(json.dumps(found))
"""
LAYER = """
import torch
from torch import nn
from vitral import kernels
from vitral.config import ViTConfig
from vitral.kernels import gelu
from vitral.model import FeedForward, PreNorm

gelu.wrap_triton = lambda kernel: kernel  # which torch 2.11 does not do when they are interpreted

kernels.can_fuse = lambda x: True
for bias in (True, False):
    layer = FeedForward(ViTConfig(dim=24, num_heads=2, num_kv_heads=1, ffn_bias=bias))
    norm, x = PreNorm(24), torch.randn(2, 5, 24)
    for parameter in (norm.scale, *layer.parameters()):
        nn.init.normal_(parameter)
    found = []
    for layer.fused in (True, False):
        y = layer(norm(x))
        found.append([y, *torch.autograd.grad(y.square().sum(), [norm.scale, *layer.parameters()])])
    assert not found[0][0].equal(found[1][0])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)
"""
# Tokens, dim, hidden, biases: blocks are 128 by 128, and 64 deep.
CASES = [(130, 64, 128, True), (60, 8, 24, True), (160, 72, 160, False)]


def interpreted(*words):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def errors(interpreter):
    """Relative errors of ours and of torch's operations, by case and dtype."""
    found = iter(json.loads(interpreted(INTERPRETED, json.dumps(CASES))))
    return {(case, kind): next(found) for case in CASES for kind in ("float32", "float16")}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_float64(errors, case):
    for mine in errors[case, "float32"][0]:
        assert mine < 1e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision_errs_no_more_than_the_plain_way_does(errors, case):
    for mine, theirs in zip(*errors[case, "float16"], strict=True):
        assert mine < 1.1 * theirs


def test_the_layer_with_them_is_the_layer_without(interpreter):
    interpreted(LAYER)


def test_kernels_compile_for_hopper(tmp_path, monkeypatch):
    """To its tensor cores, and into what memory two programs of a multiprocessor can share."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vitral.kernels import gelu

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {
        "HAS_BIAS": True, "BLOCK_M": gelu.BLOCK_M, "BLOCK_N": gelu.BLOCK_N,
        "BLOCK_K": gelu.BLOCK_K, "GROUP": gelu.GROUP,
    }  # fmt: skip
    kinds = {"bias": "*fp32", "sums": "*fp32", "M": "i32", "N": "i32", "K": "i32"}
    for kernel in (gelu._gelu_linear, gelu._gelu_backward):
        names = kernel.arg_names
        signature = {
            name: "constexpr" if name in constants else kinds.get(name, "*bf16") for name in names
        }
        fixed = {(i,): constants[name] for i, name in enumerate(names) if name in constants}
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(names)) if (i,) not in fixed}
        source = ASTSource(kernel, signature=signature, constexprs=fixed, attrs=aligned)
        options = {"num_warps": gelu.WARPS, "num_stages": gelu.STAGES}
        done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert "wgmma.mma_async" in done.asm["ptx"]
        assert done.metadata.shared <= 232_448 / 2


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # torch 2.11's compiler warns of its own code
@pytest.mark.parametrize("dim", [192, 384, 768, 1024])
def test_on_a_gpu_it_errs_no_more_than_the_plain_way_does(dim):
    import torch.nn.functional as F

    from vitral import kernels

    def plain(x, expand, expand_bias, contract, bias):
        hidden = F.gelu(F.linear(x, expand, expand_bias), approximate="tanh")
        return F.linear(hidden, contract, bias)

    def passes(run, dtype, autocast):
        draw = torch.Generator("cuda").manual_seed(0)

        def noise(*shape):
            return torch.randn(*shape, generator=draw, dtype=torch.float64, device="cuda")

        shapes = (16, 197, dim), (4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,)
        sizes = 1, dim**-0.5, 1, (4 * dim) ** -0.5, 1
        leaves = [size * noise(*shape) for size, shape in zip(sizes, shapes, strict=True)]
        leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            assert kernels.can_fuse(leaves[0]) == autocast
            y = run(*leaves)
        y.backward(noise(16, 197, dim).to(y.dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    truth = passes(plain, torch.float64, autocast=False)
    compiled = torch.compile(kernels.feed_forward, fullgraph=True, dynamic=False)
    for run in (kernels.feed_forward, compiled):
        both = (passes(way, torch.float32, autocast=True) for way in (run, plain))
        for ours, theirs, exact in zip(*both, truth, strict=True):
            mine, other = ((got.double() - exact).norm() for got in (ours, theirs))
            assert mine < 1.05 * other
