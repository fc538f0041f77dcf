"""Repeatable work for measurements: a training step or a forward pass of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from vitral.config import Config
from vitral.data.loader import Batch
from vitral.data.tools.rates import images_per_second
from vitral.machine import pick_device
from vitral.model import CHANNELS, ViT
from vitral.training.distributed import World
from vitral.training.optim import Optimizer
from vitral.training.parallel import AveragedGradients
from vitral.training.resolved import build_model, compiled, prepare_device, resolve


class Work(ABC):
    """A model, and a batch of noise on its device.

    Args:
        image_size: height and width of the images, in pixels.
        model: the model. Default: vitral's model, built as in a run. Any other model must have the
            attributes `blocks`, `norm` and `head`, as in timm and vitral.
    """

    def __init__(
        self, config: Config, num_classes: int, image_size: int, model: nn.Module | None = None
    ) -> None:
        self.config, self.device = config, pick_device(config.train.device)
        own = build_model(config, num_classes) if model is None else model
        # The step relies only on the names of the model's parts.
        self.model = cast(ViT, own.to(self.device))
        prepare_device(config, self.device)
        self.resolved = resolve(config, self.model, self.device)
        torch.set_num_threads(self.resolved.threads)
        size = self.resolved.micro_batch
        images = torch.randn(size, CHANNELS, image_size, image_size, device=self.device)
        # A new head predicts equal probabilities; equal targets would produce only rounding errors.
        targets = torch.randn(size, num_classes, device=self.device).softmax(1)
        self.batch = Batch(0, 0, images, targets, [])

    @abstractmethod
    def step(self, batch: Batch) -> int:
        """Performs the work on a batch; returns its number of images."""


class Training(Work):
    """A training step: both passes, clipping, the optimizer, and clearing the gradients."""

    def __init__(
        self, config: Config, num_classes: int, image_size: int, model: nn.Module | None = None
    ) -> None:
        super().__init__(config, num_classes, image_size, model)
        self.optimizer = Optimizer(self.model, config.optim)
        self.accumulator = AveragedGradients(self.model, config.train, self.resolved, World())

    def accumulate(self, batch: Batch) -> torch.Tensor:
        """Runs both passes of a batch; returns its loss."""
        return self.accumulator.accumulate(batch, last=True)

    def step(self, batch: Batch) -> int:
        loss = self.accumulate(batch)
        self.optimizer.step(self.config.optim.lr, loss)
        return len(batch.images)

    def rate(self, batches: Iterator[Batch], workers: int = 0, seconds: float = 0.5) -> float:
        """Returns the images per second of training steps on the batches."""
        return images_per_second(map(self.step, batches), workers, self.device, seconds)


class Inference(Work):
    """A forward pass, as in evaluation during training."""

    def __init__(
        self, config: Config, num_classes: int, image_size: int, model: nn.Module | None = None
    ) -> None:
        super().__init__(config, num_classes, image_size, model)
        self.model.eval()
        self.forward = compiled(self.model, self.resolved)

    @torch.no_grad()
    def step(self, batch: Batch) -> int:
        with self.resolved.autocast():
            self.forward(batch.images)
        return len(batch.images)
