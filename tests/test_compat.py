"""Private PyTorch APIs: each still behaves as vitral expects."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from vitral import compat


def pair():
    """Two lists of tensors of different shapes, in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (2, 4), ()]
    return (
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        for _ in range(2)
    )


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        (compat.lerp_all, (0.25,), lambda a, b: a + 0.25 * (b - a)),
        (compat.lerp_all, (torch.tensor(0.25).double(),), lambda a, b: a + 0.25 * (b - a)),
        (compat.add_all, (), lambda a, b: a + b),
        (compat.add_all, (-3.0,), lambda a, b: a - 3 * b),
        (compat.copy_all, (), lambda a, b: b),
    ],
)
def test_lists_of_tensors_are_changed_in_place(function, arguments, expected):
    tensors, others = pair()
    wanted = [expected(a, b) for a, b in zip(tensors, others, strict=True)]
    places = [tensor.data_ptr() for tensor in tensors]
    function(tuple(tensors), tuple(others), *arguments)
    assert [tensor.data_ptr() for tensor in tensors] == places
    torch.testing.assert_close(tensors, wanted)


def test_lists_of_tensors_are_scaled_by_a_tensor():
    tensors, _ = pair()
    wanted = [-2 * tensor for tensor in tensors]
    compat.scale_all(tensors, torch.tensor(-2.0, dtype=torch.float64))
    torch.testing.assert_close(tensors, wanted)


def test_the_gradient_of_ones_is_contiguous():
    x, strides = torch.randn(3, 4, requires_grad=True), []
    y = x * 2
    y.grad_fn.register_prehook(lambda gradients: strides.append(gradients[0].stride()))
    compat.backward_of_ones(y)
    assert torch.equal(x.grad, torch.full((3, 4), 2.0))
    assert strides == [(4, 1)]


def test_the_limit_on_graphs_is_only_raised():
    import torch._dynamo.config as dynamo

    with dynamo.patch(recompile_limit=8):
        compat.allow_recompiles(30)
        assert dynamo.recompile_limit == 30
        compat.allow_recompiles(12)
        assert dynamo.recompile_limit == 30


def test_inductor_is_made_deterministic():
    import torch._inductor.config as inductor

    with inductor.patch(deterministic=False):
        compat.make_inductor_deterministic()
        assert inductor.deterministic


def test_compiled_graphs_are_counted():
    layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    compiled = torch.compile(layers, backend="eager", dynamic=False)
    before = compat.num_compiled_graphs()
    for count in (2, 2, 5):
        compiled(torch.zeros(count, 3))
    assert compat.num_compiled_graphs() == before + 2


def test_a_fresh_cache_is_empty(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with compat.fresh_compile_cache():
        inside = os.environ["TORCHINDUCTOR_CACHE_DIR"]
        assert inside != str(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)


@pytest.mark.skipif(not compat.has_linear_pointwise(), reason="torch does not support oneDNN here")
@pytest.mark.parametrize("form", ["none", "tanh"])
def test_onednn_computes_a_linear_layer_and_gelu(form):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((5, 3), (4, 3), (4,)))
    found = compat.linear_pointwise(x, weight, bias, "gelu", form)
    torch.testing.assert_close(found, F.gelu(F.linear(x, weight, bias), approximate=form))
    plain = compat.linear_pointwise(x, weight, None, "none", "")
    torch.testing.assert_close(plain, F.linear(x, weight))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_loaders_workers_are_its_processes():
    loader = DataLoader(range(4), num_workers=2)
    batches = iter(loader)
    workers = list(compat.loader_workers(batches))
    assert len(workers) == 2
    assert all(worker.is_alive() for worker in workers)
    assert len(list(batches)) == 4
    assert list(compat.loader_workers(iter(DataLoader(range(4))))) == []


def test_a_wrapped_exception_is_raised_where_it_is_received():
    try:
        raise OSError(28, "No space left on device")
    except OSError as error:
        wrapped = compat.wrap_exception(error)
    with pytest.raises(OSError, match="No space left on device"):
        wrapped.reraise()
