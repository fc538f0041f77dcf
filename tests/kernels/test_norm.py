import pytest
import torch
import torch.nn.functional as F

from vitral import kernels
from vitral.model import Linear, Normed


def by_formula(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 0.0])
def test_normalize_and_its_gradient(magnitude):
    x = (magnitude * draw(2, 3, 8)).requires_grad_()
    torch.testing.assert_close(kernels.normalize(x), by_formula(x))
    if magnitude == 1:
        assert torch.autograd.gradcheck(kernels.normalize, x)
    weight = draw(2, 3, 8) ** 2
    gradients = [torch.autograd.grad((f(x) * weight).sum(), x)[0]
                 for f in (kernels.normalize, by_formula)]  # fmt: skip
    torch.testing.assert_close(*gradients)


def test_a_second_derivative_is_an_error():
    """It would lack the terms from the saved tensors."""
    x = draw(2, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(kernels.normalize(x).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_are_those_of_a_linear_layer(dtype):
    x, weight = torch.ones(2, 8, dtype=dtype, requires_grad=True), torch.ones(3, 8, dtype=dtype)
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            y = kernels.normalize(x)
            assert y.dtype == F.linear(x, weight).dtype == F.linear(y, weight.to(y.dtype)).dtype
        (gradient,) = torch.autograd.grad(y.float().sum(), x)
        assert gradient.dtype == dtype


def test_bf16_is_rounded_once():
    x = draw(64, 32).bfloat16()
    assert (kernels.normalize(x) != by_formula(x.double()).bfloat16()).double().mean() < 0.005


def test_only_the_result_and_one_number_per_row_are_saved():
    x, weight = torch.ones(64, 32, requires_grad=True), torch.ones(16, 32, dtype=torch.bfloat16)
    saved = {}

    def save(tensor):
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        y = F.linear(kernels.normalize(x), weight.requires_grad_())
    assert sum(saved.values()) == 2 * x.numel() + 4 * len(x) + weight.nbytes
    assert y.dtype == torch.bfloat16


def test_bf16_is_as_accurate_as_the_plain_norm():
    """Compares outputs and gradients of both under autocast with float64."""
    x, scale, weight = draw(64, 48, 32), 1 + 0.3 * draw(32), draw(40, 32) / 6
    upstream = draw(64, 48, 40)

    def passes(run, dtype, autocast):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, scale, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = run(*leaves)
        y.backward(upstream.to(y.dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    def split(x, scale, weight):
        linear = Linear(32, 40, bias=False)
        del linear.weight
        linear.weight = weight
        return linear(Normed(kernels.normalize(x), scale))

    def plain(x, scale, weight):
        return F.linear(F.rms_norm(x, (32,), scale, eps=1e-6), weight)

    def exact(x, scale, weight):
        return F.linear(by_formula(x) * scale, weight)

    truth = passes(exact, torch.float64, autocast=False)
    errors = [
        [relative_error(got, expected) for got, expected in zip(found, truth, strict=True)]
        for found in (passes(run, torch.float32, autocast=True) for run in (split, plain))
    ]
    for name, ours, usual in zip(("y", "x", "scale", "weight"), *errors, strict=True):
        assert ours < 1.1 * usual, name  # the same roundings, in another order


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # from torch 2.11 itself
def test_the_compiled_gradient_is_the_same_under_autocast():
    """torch.compile traces the backward pass under the autocast of the forward pass."""
    x, upstream = draw(4, 16, 32).float().requires_grad_(), draw(4, 16, 32).bfloat16()
    gradients = []
    for run in (kernels.normalize, torch.compile(kernels.normalize, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        gradients += torch.autograd.grad(y, x, upstream)
    assert torch.equal(*gradients)
