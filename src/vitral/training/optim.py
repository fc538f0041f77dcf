"""The optimizer (AdamW or Muon), parameter groups, losses, and the moving average of weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitral.compat import lerp_all
from vitral.config import OptimConfig
from vitral.model import ViT, matrices
from vitral.training.adamw import AdamW
from vitral.training.balance import NO_BALANCE, Balance
from vitral.training.distributed import distribute_like, is_sharded
from vitral.training.muon import MatrixGroup, Muon


def parameter_groups(model: ViT, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups the parameters by weight decay and by learning rate multiplier, `lr_factor`.

    Weight decay applies to the matrices of linear layers only, not to biases, norms, tokens,
    LayerScale or rotary frequencies. A parameter k blocks below the head has the multiplier
    layer_decay^k: 1 for the last norm, layer_decay for the last block, and
    layer_decay^(depth + 1) for the embedding. The multiplier of the head is head_lr_factor. Frozen
    parameters are not in any group.
    """
    decayed, depth = matrices(model), len(model.blocks)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("blocks."):
            below = depth - int(name.split(".")[1])
        else:
            below = 0 if name.startswith(("norm.", "head.")) else depth + 1
        decay = config.weight_decay if parameter in decayed else 0.0
        factor = config.head_lr_factor if name.startswith("head.") else config.layer_decay**below
        groups.setdefault((decay, factor), []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "lr_factor": factor}
        for (decay, factor), members in groups.items()
    ]


def take_matrices(model: ViT, groups: list[dict[str, Any]]) -> list[MatrixGroup]:
    """Removes the matrices of the blocks from parameter groups; returns them grouped by shape."""
    taken = matrices(model.blocks)
    matrix_groups: list[MatrixGroup] = []
    for group in groups:
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter in taken:
                shapes.setdefault(parameter.shape, []).append(parameter)
        group["params"] = [p for p in group["params"] if p not in taken]
        known = group["weight_decay"], group["lr_factor"]
        matrix_groups += [MatrixGroup(members, *known) for members in shapes.values()]
    return matrix_groups


class Optimizer:
    """AdamW with clipping by global norm; skips non-finite steps.

    If `config.name` is "muon", Muon updates the matrices of the blocks. The global norm includes
    their gradients.
    """

    def __init__(self, model: ViT, config: OptimConfig) -> None:
        self.config = config
        self.named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        groups = parameter_groups(model, config)
        self.muon = Muon(take_matrices(model, groups) if config.name == "muon" else [])
        self.adamw = AdamW([group for group in groups if group["params"]], config)

    def step(self, lr: float, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clips the gradients and steps, then clears them.

        Returns:
            The global gradient norm before clipping, and 1.0 if the step was skipped because the
            norm or the loss was not finite, and 0.0 otherwise; both on the device.
        """
        parameters = list(self.named.values())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip_norm, norm)
        if is_sharded(norm):
            norm = norm.full_tensor()
        skipped = 1 - (norm.isfinite() & loss.isfinite()).float()
        self.adamw.step(lr, skipped)
        self.muon.step(lr, skipped)
        for parameter in parameters:
            parameter.grad = None
        return norm, skipped

    def state(self) -> dict[str, Tensor]:
        """Returns the optimizer state by parameter name.

        AdamW has NAME.step, NAME.exp_avg and NAME.exp_avg_sq; Muon has NAME.momentum.
        """
        return {
            f"{name}.{key}": value
            for name, parameter in self.named.items()
            for key, value in self._state_of(parameter).items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Loads a state that `state` returned."""
        for name, value in tensors.items():
            name, _, key = name.rpartition(".")
            parameter = self.named[name]
            self._state_of(parameter)[key] = distribute_like(value, parameter)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return self.muon.state.get(parameter) or self.adamw.state[parameter]


def loss_sum(
    logits: Tensor, targets: Tensor, kind: Literal["ce", "bce"], balance: Balance = NO_BALANCE
) -> Tensor:
    """Computes the loss against soft targets, summed over the images, in float32.

    The weight of an image is the mean of the class weights, weighted by its targets.

    Args:
        logits: (B, classes).
        targets: (B, classes), with rows that sum to one unless an image can have several labels.
        kind: cross-entropy, or binary cross-entropy averaged over the classes.
        balance: in float32, on the device of the logits.
    """
    logits = logits.float()
    if balance.shift is not None:
        logits = logits + balance.shift
    reduction = "sum" if balance.weights is None else "none"
    if kind == "ce":
        loss = F.cross_entropy(logits, targets, reduction=reduction)
    else:
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction=reduction)
        loss = loss / logits.shape[1]
    if balance.weights is None:
        return loss
    weights = (targets * balance.weights).sum(1)
    return (loss * (weights if kind == "ce" else weights[:, None])).sum()


class EMA:
    """Exponential moving average of a model's weights, with warmup.

    The decay of update t = 1, 2, ... is min(decay, t / (t + 9)), so that the average soon forgets
    the initial weights.
    """

    def __init__(self, model: ViT, decay: float) -> None:
        self.decay = decay
        self.model = dict(model.named_parameters())
        self.average = {n: p.detach().clone() for n, p in self.model.items()}

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor) -> None:
        """Updates the averages after optimizer step `step` = 1, 2, ...

        Args:
            skipped: 1.0 if the step was skipped, which leaves the averages unchanged, or 0.0.
        """
        weight = 1 - min(self.decay, step / (step + 9))
        on_cpu = skipped.device.type == "cpu"  # elsewhere, reading it would wait for the device
        factor = weight * (1 - (skipped.item() if on_cpu else skipped))
        # The local parts of sharded tensors, which can be multiplied by a plain scalar tensor.
        averages, weights = (
            [t.to_local() if is_sharded(t) else t for t in tensors.values()]
            for tensors in (self.average, self.model)
        )
        lerp_all(averages, weights, factor)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Temporarily replaces the model's weights with the averages."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.model.items():
            weights = parameter.clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(weights)

    @torch.no_grad()
    def reset(self) -> None:
        """Sets the averages to the model's weights."""
        for name, value in self.average.items():
            value.copy_(self.model[name])

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Loads the averages of a checkpoint."""
        for name, value in self.average.items():
            value.copy_(distribute_like(tensors[name], value))
