"""Muon: orthogonalized momentum updates for matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitral.compat import add_all, copy_all, scale_all
from vitral.training.distributed import distribute_like, is_sharded

MOMENTUM = 0.95
# Coefficients of the quintic p(s) = a s + b s^3 + c s^5. Five iterations map singular values
# between 0 and 1 to values between about 0.7 and 1.2 (Jordan et al. 2024).
ROUNDS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
RMS = 0.2  # about that of AdamW's updates, so both can share rate and decay (Liu et al. 2025)


@dataclass(frozen=True)
class MatrixGroup:
    """Matrices with the same shape, weight decay and learning rate multiplier."""

    members: list[nn.Parameter]
    weight_decay: float
    lr_factor: float


class Muon:
    """Muon (Jordan et al. 2024) with Nesterov momentum and decoupled weight decay.

    The singular values of a matrix's update are all about 1, so that it moves equally in all
    directions, not just in the few that dominate its gradients. Matrices of the same shape are
    orthogonalized together. For a sharded model (FSDP), each process gathers the updates, one shape
    at a time, and orthogonalizes all of them.
    """

    def __init__(self, matrix_groups: Sequence[MatrixGroup]) -> None:
        self.matrix_groups = matrix_groups
        members = (p for group in matrix_groups for p in group.members)
        self.state = {p: {"momentum": torch.zeros_like(p)} for p in members}

    @torch.no_grad()
    def step(self, lr: float, skipped: Tensor) -> None:
        """Updates the matrices with their gradients, or leaves them unchanged if `skipped` is 1.0.

        Args:
            lr: learning rate.
            skipped: 0.0 or 1.0, on the device; reading it would wait for the device.
        """
        for group in self.matrix_groups:
            parameters = [_local(p) for p in group.members]
            rate = lr * group.lr_factor
            updates = torch.where(skipped == 1, 0, self._updates(group.members, skipped))
            scale_all(parameters, 1 - rate * group.weight_decay * (1 - skipped))
            add_all(parameters, updates.unbind(), alpha=-rate)

    def _updates(self, members: list[nn.Parameter], skipped: Tensor) -> Tensor:
        """Updates the momenta and returns the stacked updates, (matrices, local rows, columns).

        The updates of a skipped step are undefined.
        """
        momenta = [_local(self.state[p]["momentum"]) for p in members]
        gradients = torch.stack([_local(p.grad) for p in members if p.grad is not None])
        momentum = torch.stack(momenta)
        moved = momentum.lerp(gradients, 1 - MOMENTUM)
        moved = torch.where(skipped == 1, momentum, moved)
        copy_all(momenta, moved.unbind())
        lookahead = gradients.lerp_(moved, MOMENTUM)
        like = members[0]
        if not is_sharded(like):
            return _scaled(lookahead)
        from torch.distributed.tensor import DTensor, Shard

        shape = len(members), *like.shape
        stride = torch.empty(shape, device="meta").stride()
        assert like.placements == (Shard(0),)
        mesh, rows = like.device_mesh, (Shard(1),)
        full_tensor = DTensor.from_local(
            lookahead, mesh, rows, shape=torch.Size(shape), stride=stride
        )
        return _local(distribute_like(_scaled(full_tensor.full_tensor()), full_tensor))


def _scaled(matrices: Tensor) -> Tensor:
    return RMS * max(matrices.shape[1:]) ** 0.5 * orthogonal(matrices)


def orthogonal(matrices: Tensor) -> Tensor:
    """Approximates U V^T of matrices U S V^T, (n, rows, columns), with Newton-Schulz iterations.

    Uses bf16 on a GPU, as torch's Muon does, and float32 on a CPU: without bf16 instructions, a CPU
    takes 18 to 31 times as long for matrix multiplications in bf16.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # then no singular value is above 1
    for _ in range(ROUNDS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that is in this process."""
    return tensor.to_local() if is_sharded(tensor) else tensor
