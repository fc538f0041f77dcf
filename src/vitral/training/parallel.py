"""Forward and backward passes in one or more processes, and gradient reduction."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from vitral.compat import add_all, allow_recompiles
from vitral.config import TrainConfig
from vitral.data.loader import Batch
from vitral.model import ViT
from vitral.training.balance import NO_BALANCE, Balance
from vitral.training.distributed import NUM_SHARDS, World
from vitral.training.optim import loss_sum
from vitral.training.resolved import Resolved, compiled

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


class AveragedGradients:
    """Averages gradients over the processes during the backward pass.

    Each process has the full model (DDP, Li et al. 2020) or a shard of every parameter (FSDP2,
    Zhao et al. 2023). FSDP2 changes the model in place.
    """

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        resolved: Resolved,
        world: World,
        balance: Balance = NO_BALANCE,
    ) -> None:
        self.train, self.resolved, self.world, self.balance = train, resolved, world, balance
        self.wrapped: DistributedDataParallel | FSDPModule | None = None
        if world.size > 1 and train.parallel == "fsdp":
            assert isinstance(model, ViT)
            self.wrapped = _shard_model(model, resolved, world)
            self.forward = model
            return
        self.forward = compiled(model, resolved)
        if world.size > 1:
            # Compiled before wrapping, so that DDP sends buckets between the graphs.
            self.wrapped = DistributedDataParallel(self.forward, gradient_as_bucket_view=True)

    def accumulate(self, batch: Batch, last: bool) -> Tensor:
        """Adds the gradient of a micro-batch, the `last` of a step or not. Returns its loss."""
        call, no_sync = self.forward, contextlib.nullcontext()
        if isinstance(self.wrapped, DistributedDataParallel):
            call = self.wrapped
            no_sync = no_sync if last else call.no_sync()
        elif self.wrapped is not None:
            self.wrapped.set_requires_gradient_sync(last)
        with no_sync:
            with self.resolved.autocast():
                loss = loss_sum(call(batch.images), batch.targets, self.train.loss, self.balance)
                loss = loss / self.train.batch_size
            # DDP and FSDP2 average the gradients over the processes; this makes it a sum.
            (loss * self.world.size).backward()
        return loss.detach()

    def reduce(self, loss: Tensor) -> Tensor:
        """Returns the loss of the global batch, given the loss of this process."""
        if self.world.size > 1:
            dist.all_reduce(loss)
        return loss


class FixedOrderReduction:
    """Adds the gradients of NUM_SHARDS equal shards of the global batch in a binary tree.

    The tree does not depend on the number of processes, so the weights are bit-identical for 1, 2,
    4 or 8 processes. It requires a copy of the gradients for each level, and communication starts
    only after the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        resolved: Resolved,
        world: World,
        balance: Balance = NO_BALANCE,
    ) -> None:
        self.train, self.resolved, self.world, self.balance = train, resolved, world, balance
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.forward = compiled(model, resolved)
        self.shard = train.batch_size // NUM_SHARDS
        self.sums: list[tuple[int, list[Tensor]]] = []
        self.loss = torch.zeros((), device=self.parameters[0].device)

    def accumulate(self, batch: Batch, last: bool) -> Tensor:
        """Adds the gradient of a micro-batch, the `last` of a step or not. Returns its loss."""
        with self.resolved.autocast():
            loss = loss_sum(
                self.forward(batch.images), batch.targets, self.train.loss, self.balance
            )
            loss = loss / self.train.batch_size
        loss.backward()
        self.loss = self.loss + loss.detach()
        if (batch.first + len(batch.images)) % self.shard == 0:
            self._finish_shard()
        return loss.detach()

    def _finish_shard(self) -> None:
        leaves = [self.loss]
        for parameter in self.parameters:
            assert parameter.grad is not None
            leaves.append(parameter.grad)
            parameter.grad = None
        self.loss = torch.zeros_like(self.loss)
        self.sums.append((1, leaves))
        while len(self.sums) > 1 and self.sums[-1][0] == self.sums[-2][0]:
            (count, left), (_, right) = self.sums[-2:]
            add_all(left, right)
            self.sums[-2:] = [(2 * count, left)]

    def reduce(self, loss: Tensor) -> Tensor:
        """Replaces the gradients with the sums; returns the loss of the global batch."""
        ((count, leaves),) = self.sums
        assert count * self.world.size == NUM_SHARDS
        self.sums = []
        total, *gradients = map(self._tree_reduce, leaves)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return total

    def _tree_reduce(self, own: Tensor) -> Tensor:
        if self.world.size == 1:
            return own
        sums = own.new_empty(self.world.size, *own.shape)
        dist.all_gather(list(sums.unbind()), own.contiguous())
        while len(sums) > 1:
            sums = sums[0::2] + sums[1::2]
        return sums[0]


@contextlib.contextmanager
def unsharded(model: ViT) -> Iterator[None]:
    """Temporarily gathers all parameters in every process, so that no process waits for others."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # imported by `_shard_model`
    modules: list[Any] = []
    if fsdp is not None:
        modules = [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def _shard_model(model: ViT, resolved: Resolved, world: World) -> FSDPModule:
    """Shards the parameters over all processes, block by block.

    In bf16, the parameters of the blocks are gathered in bf16, and gradients are added in float32.
    Parameters outside the blocks and the residual stream remain in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model.fuse(resolved.fused)
    # Each block is compiled for its own stochastic depth, and for each image size.
    allow_recompiles(4 * len(model.blocks))
    mesh = init_device_mesh(resolved.device, (world.size,))
    policy = MixedPrecisionPolicy()
    if resolved.precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        if resolved.compile:
            block.compile(dynamic=False)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # Otherwise the outermost parameters would stay gathered after an evaluation and become stale.
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)
