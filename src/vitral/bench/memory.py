"""The largest batch of a training step that a GPU's memory holds."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable

import torch

from vitral.bench.peers import Builder
from vitral.config import Config
from vitral.errors import UserError
from vitral.machine import pick_device
from vitral.training.work import Training


def largest_batch(config: Config, build: Builder, num_classes: int) -> int:
    """The largest batch with which a whole training step fits, optimiser's state and all; or 0.

    Raises:
        UserError: if there is no GPU.
    """
    device = pick_device(config.train.device)
    if device.type != "cuda":
        raise UserError(f"largest-batch: expected a CUDA GPU, got a {device.type} device")

    def fits(batch: int) -> bool:
        train = dataclasses.replace(config.train, batch_size=batch, micro_batch=batch)
        own = dataclasses.replace(config, train=train)
        try:
            with device:  # a CPU takes longer to draw the weights than a GPU for the steps
                model = build(config.model, num_classes)
            training = Training(own, num_classes, config.model.image_size, model)
            for _ in range(2):  # the first makes the optimiser's state
                training.step(training.batch)
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            return False
        return True

    def cleanly(batch: int) -> bool:
        able = fits(batch)
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        return able

    return largest(cleanly)


def largest(fits: Callable[[int], bool]) -> int:
    """The largest even number that fits, to an eighth of the power of two below it; 0 if none."""
    size = 1
    while fits(2 * size):
        size *= 2
    if size == 1:
        return 0
    found = size
    for part in (2, 4, 8):
        step = size // part
        if step % 2 == 0 and fits(found + step):
            found += step
    return found
