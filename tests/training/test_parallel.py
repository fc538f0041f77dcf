"""Forward and backward passes of micro-batches, and the reduction of their gradients."""

import os
from functools import reduce

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitral import storage
from vitral.config import Config, TrainConfig, ViTConfig
from vitral.data.loader import Batch
from vitral.model import ViT
from vitral.training.distributed import NUM_SHARDS, World, process_world
from vitral.training.parallel import AveragedGradients, FixedOrderReduction
from vitral.training.resolved import Resolved

from .processes import finish, start

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.mark.parametrize("micro_batch", [2, 4])
@pytest.mark.parametrize("accumulator", [AveragedGradients, FixedOrderReduction])
def test_micro_batches_give_the_mean_over_the_batch(accumulator, micro_batch):
    """Loss and gradients equal those of one cross-entropy over all images."""
    torch.manual_seed(0)
    model = ViT(ViTConfig(dim=16, depth=1, num_heads=2, num_kv_heads=1, patch_size=4), 3)
    torch.nn.init.normal_(model.head.weight)
    size = 4 * NUM_SHARDS
    images, targets = torch.randn(size, 3, 8, 8), torch.rand(size, 3).softmax(1)
    expected = F.cross_entropy(model(images), targets)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    resolved = Resolved("cpu", "fp32", False, 1, micro_batch, 1, "cpu", False)
    work = accumulator(model, TrainConfig(batch_size=size), resolved, World())
    for step in range(2):
        loss = torch.zeros(())
        for first in range(0, size, micro_batch):
            part = slice(first, first + micro_batch)
            batch = Batch(step, first, images[part], targets[part], [])
            loss += work.accumulate(batch, last=part.stop == size)
        torch.testing.assert_close(work.reduce(loss), expected.detach(), rtol=1e-5, atol=0)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
            parameter.grad = None


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_gradients_are_added_as_one_tree(tmp_path, size):
    """In the same order for any number of processes, which differs from a plain sum."""
    draw = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.arange(-3, 5)
    gradients = [torch.randn(5, 3, generator=draw) * scale for scale in scales]
    losses = [torch.randn((), generator=draw) * scale for scale in scales]

    def add_up(rank):
        with process_world(gpu=False, timeout_minutes=5) as world:
            model = torch.nn.Linear(3, 5, bias=False)
            resolved = Resolved("cpu", "fp32", False, 1, 2, size, "cpu", False)
            accumulator = FixedOrderReduction(model, Config().train, resolved, world)
            for shard in range(NUM_SHARDS * rank // size, NUM_SHARDS * (rank + 1) // size):
                model.weight.grad, accumulator.loss = (
                    gradients[shard].clone(),
                    losses[shard].clone(),
                )
                accumulator._finish_shard()
            loss = accumulator.reduce(torch.zeros(()))
        assert model.weight.grad is not None
        storage.write(tmp_path / f"{rank}", {"sums": {"loss": loss, "g": model.weight.grad}}, {})
        os._exit(0)

    assert finish(start([["--out", str(tmp_path / "run")]] * size, add_up)) == [0] * size
    for name, leaves in (("loss", losses), ("g", gradients)):
        a, b, c, d, e, f, g, h = leaves
        tree = ((a + b) + (c + d)) + ((e + f) + (g + h))
        exact = torch.stack(leaves).double().sum(0)
        torch.testing.assert_close(tree.double(), exact, rtol=1e-6, atol=1e-2)
        for rank in range(size):
            assert torch.equal(storage.read_tensors(tmp_path / f"{rank}", "sums")[name], tree)
    assert not torch.equal(tree, reduce(torch.add, gradients))


class Crossings(TorchDispatchMode):
    """Records operations between devices, where a step would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
        if len({x.device for x in tensors}) > 1:
            self.found.append(str(function))
        return result


@pytest.mark.parametrize("accumulator", [AveragedGradients, FixedOrderReduction])
def test_a_step_transfers_nothing_from_the_host(accumulator):
    resolved = Resolved("cuda", "fp32", False, 1, 2, 1, "cpu", False)
    with torch.device("meta"):
        model = ViT(ViTConfig(size="ti", depth=1, image_size=16, patch_size=8), num_classes=3)
        images, targets = torch.empty(2, 3, 16, 16), torch.empty(2, 3)
        total = torch.zeros(())
    work = accumulator(model, TrainConfig(batch_size=2 * NUM_SHARDS), resolved, World())
    with Crossings() as crossings:
        for step in range(2):
            for first in range(0, 2 * NUM_SHARDS, 2):
                batch = Batch(step, first, images, targets, [])
                total += work.accumulate(batch, last=first + 2 == 2 * NUM_SHARDS)
            assert work.reduce(total).device == total.device
    assert crossings.found == []
