"""Finds the largest batch for which a training step fits in GPU memory."""

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
    """Returns the largest batch for which a training step and the optimizer state fit, or 0.

    Raises:
        UserError: if there is no CUDA GPU.
    """
    device = pick_device(config.train.device)
    if device.type != "cuda":
        raise UserError(f"largest-batch: expected a CUDA GPU, got a {device.type} device")

    def fits(batch: int) -> bool:
        train = dataclasses.replace(config.train, batch_size=batch, micro_batch=batch)
        changed = dataclasses.replace(config, train=train)
        try:
            with device:  # initialization on a CPU takes longer than the steps
                model = build(config.model, num_classes)
            training = Training(changed, num_classes, config.model.image_size, model)
            for _ in range(2):  # the first one creates the optimizer state
                training.step(training.batch)
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            return False
        return True

    def fits_then_cleanup(batch: int) -> bool:
        result = fits(batch)
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        return result

    return largest(fits_then_cleanup)


def largest(fits: Callable[[int], bool]) -> int:
    """Returns the largest even number that fits, or 0 if there is none.

    The search stops at an eighth of the power of two below the result.
    """
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
