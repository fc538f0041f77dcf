"""What a training is made of besides its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vitral import weights
from vitral.config import OptimConfig, ViTConfig
from vitral.model import ViT
from vitral.training.optim import Optimizer


@dataclass(frozen=True)
class Parts:
    """How a run makes and initializes its model and optimizer, which an experiment can replace.

    So a control or an ablation runs in vitral's own loop: with the same order, augmentation,
    schedule, checkpoints and log. Where the model is another, no weight folders are written, as
    those describe a ViT of vitral, nor what is made of them.
    """

    name: str = ""
    """What the run calls them, and what a resumption must give again; none: vitral's own."""
    model: Callable[[ViTConfig, int], Any] = ViT
    """Makes a module of the architecture and the number of classes. It takes images (B, C, H, W),
    gives logits (B, classes), names its parts as vitral and timm do, `blocks`, `norm`, `head` and
    `num_classes`, and keeps nothing besides its parameters: no running statistics."""
    optimizer: Callable[[ViT, OptimConfig], Optimizer] = Optimizer
    """Makes an optimiser of the model and the settings."""
    initialize: Callable[[Any, str], list[str]] = weights.initialize
    """Copies the weights of `train.init` into a new model, and returns the names of the parameters
    that are not copied."""

    def __post_init__(self) -> None:
        own = (ViT, Optimizer, weights.initialize)
        if not self.name and (self.model, self.optimizer, self.initialize) != own:
            raise ValueError("name: expected one for parts that are not vitral's own, got none")

    @property
    def describable(self) -> bool:
        """Whether weight folders can describe the model."""
        return self.model is ViT
