"""Both passes of a micro-batch, on a device that is not the host."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitral.config import TrainConfig, ViTConfig
from vitral.data.loader import Batch
from vitral.model import ViT
from vitral.training.distributed import SHARDS, World
from vitral.training.parallel import Averaged, InFixedOrder
from vitral.training.resolved import Resolved


class Crossings(TorchDispatchMode):
    """Notes what goes from one device to another: a step would wait for a GPU there."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
        if len({x.device for x in tensors}) > 1:
            self.found.append(str(function))
        return result


@pytest.mark.parametrize("passes", [Averaged, InFixedOrder])
def test_a_step_takes_nothing_from_the_host(passes):
    resolved = Resolved("cuda", "fp32", False, 1, 2, 1, "cpu", False)
    with torch.device("meta"):
        model = ViT(ViTConfig(size="ti", depth=1, image_size=16, patch_size=8), num_classes=3)
        images, targets = torch.empty(2, 3, 16, 16), torch.empty(2, 3)
        total = torch.zeros(())
    work = passes(model, TrainConfig(batch_size=2 * SHARDS), resolved, World())
    with Crossings() as crossings:
        for step in range(2):
            for first in range(0, 2 * SHARDS, 2):
                batch = Batch(step, first, images, targets, [])
                total += work.accumulate(batch, last=first + 2 == 2 * SHARDS)
            assert work.reduce(total).device == total.device
    assert crossings.found == []
