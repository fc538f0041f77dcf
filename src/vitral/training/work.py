"""The work of a model on its device, over and over: training's very step, or a forward pass."""

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
    """A model, and a batch of noise for it that lies on the device.

    Args:
        side: of the images, in pixels.
        model: vitral's as the run would build it, if none is given. A peer must name its parts as
            timm and vitral do: `blocks`, `norm` and `head`.
    """

    def __init__(
        self, config: Config, num_classes: int, image_size: int, model: nn.Module | None = None
    ) -> None:
        self.config, self.device = config, pick_device(config.train.device)
        own = build_model(config, num_classes) if model is None else model
        # The names of its parts are all that the step knows of a model.
        self.model = cast(ViT, own.to(self.device))
        prepare_device(config, self.device)
        self.resolved = resolve(config, self.model, self.device)
        torch.set_num_threads(self.resolved.threads)
        size = self.resolved.micro_batch
        images = torch.randn(size, CHANNELS, image_size, image_size, device=self.device)
        # Even ones would be what the head starts with: gradients of nothing but rounding.
        targets = torch.randn(size, num_classes, device=self.device).softmax(1)
        self.batch = Batch(0, 0, images, targets, [])

    @abstractmethod
    def step(self, batch: Batch) -> int:
        """Does the work on a batch; returns the number of its images."""


class Training(Work):
    """The step that training takes: both passes, clipping, the optimiser, gradients cleared."""

    def __init__(
        self, config: Config, num_classes: int, image_size: int, model: nn.Module | None = None
    ) -> None:
        super().__init__(config, num_classes, image_size, model)
        self.optimizer = Optimizer(self.model, config.optim)
        self.accumulator = AveragedGradients(self.model, config.train, self.resolved, World())

    def accumulate(self, batch: Batch) -> torch.Tensor:
        """Both passes of a batch; returns its loss."""
        return self.accumulator.accumulate(batch, last=True)

    def step(self, batch: Batch) -> int:
        loss = self.accumulate(batch)
        self.optimizer.step(self.config.optim.lr, loss)
        return len(batch.images)

    def rate(self, batches: Iterator[Batch], workers: int = 0, seconds: float = 0.5) -> float:
        """Images per second of a step on each of the batches."""
        return images_per_second(map(self.step, batches), workers, self.device, seconds)


class Inference(Work):
    """A forward pass, as evaluation has it in training."""

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
