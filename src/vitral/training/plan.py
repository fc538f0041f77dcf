"""Steps of a run and their learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vitral.config import Config, OptimConfig
from vitral.data.sampling import Order


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a pure function of the step: linear warmup, then cosine decay.

    The first step has 1 / warmup times the peak rate, the last step of the warmup has the peak
    rate, and the step after the last step would have `final_lr` times the peak rate (Loshchilov and
    Hutter 2016).
    """

    optim: OptimConfig
    warmup: int
    total: int

    def lr(self, step: int) -> float:
        """Returns the learning rate of step 0, 1, ..., total - 1."""
        if step < self.warmup:
            return self.optim.lr * (step + 1) / self.warmup
        progress = (step + 1 - self.warmup) / (self.total + 1 - self.warmup)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.optim.lr * (self.optim.final_lr + (1 - self.optim.final_lr) * cosine)


@dataclass(frozen=True)
class Plan:
    """Steps of a run, determined by its settings and the number of images."""

    steps_per_epoch: float
    total: int
    evaluations: frozenset[int]
    """Steps after which the model is validated."""
    schedule: Schedule

    @classmethod
    def of(cls, config: Config, num_images: int) -> Plan:
        """Returns the plan for a number of training images."""
        train = config.train
        order = Order(train.seed, num_images, train.batch_size)
        steps_per_epoch, total = num_images / train.batch_size, order.end_of_epoch(train.epochs)
        ends = range(train.eval_every, train.epochs, train.eval_every)
        evaluations = frozenset(map(order.end_of_epoch, ends)) | {total}
        warmup = round(config.optim.warmup_epochs * steps_per_epoch)
        return cls(steps_per_epoch, total, evaluations, Schedule(config.optim, warmup, total))
