"""The fused feed-forward network, interpreted on a CPU and on a GPU, against torch's operations."""

import pytest
import torch

pytest.importorskip("triton")


def test_values_and_gradients_match_float64(interpreted, case):
    for mine in interpreted["errors"][case, "float32"][0]:
        assert mine < 1e-6


def test_half_precision_is_as_accurate_as_the_plain_code(interpreted, case):
    for mine, theirs in zip(*interpreted["errors"][case, "float16"], strict=True):
        assert mine < 1.1 * theirs


def test_the_layer_is_the_same_without_kernels(interpreted):
    assert interpreted["layer"] is None, interpreted["layer"]


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # torch 2.11's compiler warns of its own code
@pytest.mark.parametrize("dim", [192, 384, 768, 1024])
def test_on_a_gpu_it_is_as_accurate_as_the_plain_code(dim):
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
