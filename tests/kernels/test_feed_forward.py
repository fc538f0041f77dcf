"""The fused feed-forward network against torch's operations, in the interpreter and on a GPU."""

import pytest
import torch

pytest.importorskip("triton")


def test_values_and_gradients_match_float64(interpreted, case):
    for error in interpreted["errors"][case, "float32"][0]:
        assert error < 1e-6


def test_half_precision_is_as_accurate_as_torch(interpreted, case):
    for fused, plain in zip(*interpreted["errors"][case, "float16"], strict=True):
        assert fused < 1.1 * plain


def test_the_layer_gives_the_same_results_without_kernels(interpreted):
    assert interpreted["layer"] is None, interpreted["layer"]


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # torch 2.11's compiler warns about its own code
@pytest.mark.parametrize("dim", [192, 384, 768, 1024])
def test_a_gpu_is_as_accurate_as_torch(dim):
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
        results = (passes(function, torch.float32, autocast=True) for function in (run, plain))
        for *both, exact in zip(*results, truth, strict=True):
            fused_error, plain_error = ((got.double() - exact).norm() for got in both)
            assert fused_error < 1.05 * plain_error
