import pytest
import torch

from vitral import kernels


@pytest.mark.parametrize("count", [1, 3, 5])
def test_rows_and_gradients_equal_those_of_a_loop(count):
    draw = torch.Generator().manual_seed(count)
    order = torch.randperm(5, generator=draw)
    x = torch.randn(5, 2, 3, generator=draw, dtype=torch.float64, requires_grad=True)
    subset = x.detach()[:count].clone().requires_grad_()
    taken = kernels.take_rows(x, order, count)
    put = kernels.put_rows(subset, order)
    for i in range(5):
        if i < count:
            assert taken[i].equal(x[order[i]])
            assert put[order[i]].equal(subset[i])
        else:
            assert not put[order[i]].any()
    assert torch.autograd.gradcheck(lambda x: kernels.take_rows(x, order, count), x)
    assert torch.autograd.gradcheck(lambda x: kernels.put_rows(x, order), subset)
