"""Linear layers with oneDNN against float64, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from vitral import kernels, settings
from vitral.kernels import linear
from vitral.model import Linear, ViT
from vitral.training.resolved import resolve

pytestmark = pytest.mark.skipif(
    not kernels.has_onednn(), reason="torch does not support oneDNN here"
)
CPU = torch.device("cpu")


def gradients(function, x, weight, bias, gradient):
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = function(*leaves, *([None] if bias is None else []))
    y.backward(gradient)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("shape", [(48,), (5, 48), (3, 17, 48), (2, 3, 17, 48)])
@pytest.mark.parametrize("biased", [True, False])
def test_result_and_gradients_match_float64(shape, biased):
    torch.manual_seed(0)
    x, weight = torch.randn(2 * shape[0], *shape[1:])[::2], torch.randn(48, 40).mT
    bias, gradient = torch.randn(40) if biased else None, torch.randn(40, *shape[:-1])
    gradient = gradient.movedim(0, -1)  # with non-contiguous rows
    inputs = (x, weight, bias, gradient)
    if len(shape) == 1:  # F.linear accepts one axis, the operator does not
        inputs = (x[None], weight, bias, gradient[None])
    truth = gradients(F.linear, *(None if t is None else t.double() for t in inputs))
    plain, fused = gradients(F.linear, *inputs), gradients(kernels.onednn_linear, *inputs)
    assert len(fused) == 3 + biased
    for exact, by_torch, by_onednn in zip(truth, plain, fused, strict=True):
        assert by_onednn.shape == exact.shape
        error, usual = ((got - exact).norm() / exact.norm() for got in (by_onednn, by_torch))
        assert error < 3 * usual + 1e-7, (error, usual)


def test_unneeded_gradients_are_not_computed(monkeypatch):
    products, product = [], linear.onednn_product
    monkeypatch.setattr(
        linear, "onednn_product", lambda *args: products.append(1) or product(*args)
    )
    x, weight = torch.randn(4, 8), torch.randn(3, 8, requires_grad=True)
    y = kernels.onednn_linear(x, weight, None)
    y.sum().backward()
    assert x.grad is None
    assert len(products) == 2  # the result, and the weight's gradient
    torch.testing.assert_close(weight.grad, x.sum(0).expand(3, -1))


def test_a_second_derivative_is_an_error():
    x = torch.randn(4, 8, requires_grad=True)
    (first,) = torch.autograd.grad(
        kernels.onednn_linear(x, torch.randn(3, 8), None).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("words", "fused", "used"),
    [
        ([], True, True),
        ([], False, False),
        (["--model.kernels", "plain"], True, False),
        (["--train.precision", "bf16"], True, False),
    ],
)
def test_training_uses_it_only_where_supported(monkeypatch, words, fused, used):
    """Counts the calls; a ViT with one block has six linear layers."""
    config = settings.load("digits", ["--model.depth", "1", *words])
    model = ViT(config.model, 10)
    calls = []
    monkeypatch.setattr(
        kernels, "onednn_linear", lambda *args: calls.append(args) or F.linear(*args)
    )
    model.fuse(fused)
    with resolve(config, model, CPU).autocast():
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert len(calls) == (6 if used else 0)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch 2.11 warns about itself
def test_compiled_code_computes_the_same_products():
    torch.manual_seed(0)
    inputs = torch.randn(3, 5, 8), torch.randn(4, 8), torch.randn(4)
    gradient = torch.randn(3, 5, 4)
    compiled = torch.compile(kernels.onednn_linear, backend="aot_eager", fullgraph=True)
    plain, found = (gradients(f, *inputs, gradient) for f in (kernels.onednn_linear, compiled))
    assert all(a.equal(b) for a, b in zip(plain, found, strict=True))


@pytest.mark.parametrize("other", [{"dtype": torch.float64}, {"device": "meta"}])
def test_which_inputs_are_accepted(other, monkeypatch):
    assert kernels.can_train_by_onednn(torch.empty(2))
    assert not kernels.can_train_by_onednn(torch.empty(2, **other))
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.can_train_by_onednn(torch.empty(2))
    model = ViT(settings.load("digits").model, 10)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model.fuse(True)
    assert not any(module.fused for module in model.modules() if isinstance(module, Linear))


def test_the_model_gives_the_same_results():
    torch.manual_seed(0)
    words = "--model.dim 48 --model.depth 2 --model.stochastic-depth 0".split()
    config = settings.load("cifar10", words).model
    model = ViT(config, 10)
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(4, 3, 32, 32)
    found = []
    for fused in (False, True):
        model.fuse(fused)
        model.zero_grad()
        logits = model(images)
        logits.square().sum().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())
    assert any((a != b).any() for a, b in zip(*found, strict=True))
    model.eval()
    fused = model(images)
    model.fuse(False)
    assert torch.equal(fused, model(images))  # validation gives the same bits as `vitral val`
