"""Linear layers by oneDNN against float64, in both directions."""

import pytest
import torch
import torch.nn.functional as F

from vitral import kernels, settings
from vitral.kernels import linear
from vitral.model import ViT
from vitral.training.resolved import resolve

pytestmark = pytest.mark.skipif(not kernels.has_onednn(), reason="torch has no oneDNN here")
CPU = torch.device("cpu")


@pytest.fixture
def amd(monkeypatch):
    monkeypatch.setattr(linear, "is_amd", lambda: True)


def gradients(function, x, weight, bias, gradient):
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = function(*leaves, *([None] if bias is None else []))
    y.backward(gradient)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("shape", [(48,), (5, 48), (3, 17, 48), (2, 3, 17, 48)])
@pytest.mark.parametrize("biased", [True, False])
def test_result_and_gradients(shape, biased):
    torch.manual_seed(0)
    x, weight = torch.randn(2 * shape[0], *shape[1:])[::2], torch.randn(48, 40).mT
    bias, gradient = torch.randn(40) if biased else None, torch.randn(40, *shape[:-1])
    gradient = gradient.movedim(0, -1)  # no row of it lies together
    given = (x, weight, bias, gradient)
    if len(shape) == 1:  # torch's own takes a single row too, the operator does not
        given = (x[None], weight, bias, gradient[None])
    exact = gradients(F.linear, *(None if t is None else t.double() for t in given))
    plain, ours = gradients(F.linear, *given), gradients(kernels.onednn_linear, *given)
    assert len(ours) == 3 + biased
    for truth, torchs, here in zip(exact, plain, ours, strict=True):
        assert here.shape == truth.shape
        error, known = ((got - truth).norm() / truth.norm() for got in (here, torchs))
        assert error < 3 * known + 1e-7, (error, known)


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


@pytest.mark.usefixtures("amd")
@pytest.mark.parametrize(
    ("words", "used"),
    [
        ([], True),
        (["--model.kernels", "plain"], False),
        (["--train.reproducible"], False),
        (["--train.compile", "always"], False),
        (["--train.precision", "bf16"], False),
    ],
)
def test_when_training_uses_it(monkeypatch, words, used):
    """It is in use where the choice says so, and counted: a ViT of one block has six layers."""
    config = settings.load("digits", ["--model.depth", "1", *words])
    model = ViT(config.model, 10)
    resolved = resolve(config, model, CPU)
    assert resolved.fused is used
    calls = []
    monkeypatch.setattr(
        kernels, "onednn_linear", lambda *args: calls.append(args) or F.linear(*args)
    )
    model.fuse(resolved.fused)
    with resolved.autocast():
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert len(calls) == (6 if used else 0)


@pytest.mark.parametrize("other", [{"dtype": torch.float64}, {"device": "meta"}])
@pytest.mark.usefixtures("amd")
def test_which_inputs_are_accepted(other, monkeypatch):
    assert kernels.can_train_by_onednn(torch.empty(2))
    assert not kernels.can_train_by_onednn(torch.empty(2, **other))
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.can_train_by_onednn(torch.empty(2))
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not kernels.can_train_by_onednn(torch.empty(2))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not kernels.can_train_by_onednn(torch.empty(2))


def test_other_processors_use_torch(monkeypatch):
    monkeypatch.setattr(linear, "is_amd", lambda: False)
    assert not kernels.can_train_by_onednn(torch.empty(2))


@pytest.mark.usefixtures("amd")
def test_the_model_is_unchanged():
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
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())
    assert any((a != b).any() for a, b in zip(*found, strict=True))
    model.eval()
    fused = model(images)
    model.fuse(False)
    assert torch.equal(fused, model(images))  # a validation is to the last bit what val gives
