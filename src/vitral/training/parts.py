"""Components of a training run that an experiment can replace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vitral import weights
from vitral.config import OptimConfig, ViTConfig
from vitral.model import ViT
from vitral.training.optim import Optimizer


@dataclass(frozen=True)
class Parts:
    """Functions that create and initialize the model and the optimizer of a run.

    A control or an ablation can thus use vitral's training loop, with the same order, augmentation,
    schedule, checkpoints and log. With a different model, no weight directories (which describe
    vitral's ViT) are written, and no files that depend on them.
    """

    name: str = ""
    """Name of the parts, which must be the same when the run is resumed; empty for vitral's."""
    model: Callable[[ViTConfig, int], Any] = ViT
    """Creates a module from the architecture and the number of classes. The module maps images
    (B, C, H, W) to logits (B, classes), has attributes `blocks`, `norm`, `head` and `num_classes`
    as in vitral and timm, and has no state except its parameters: no running statistics."""
    optimizer: Callable[[ViT, OptimConfig], Optimizer] = Optimizer
    """Creates an optimizer from the model and the settings."""
    initialize: Callable[[Any, str, Sequence[str]], list[str]] = weights.initialize
    """Copies the weights of `train.init` into a new model for classes with the given names, and
    returns the names of the parameters that are not copied."""

    def __post_init__(self) -> None:
        own = (ViT, Optimizer, weights.initialize)
        if not self.name and (self.model, self.optimizer, self.initialize) != own:
            raise ValueError("name: expected a name for parts that are not vitral's, got none")

    @property
    def describable(self) -> bool:
        """Whether weight directories can describe the model."""
        return self.model is ViT
