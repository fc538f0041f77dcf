"""Trains the last blocks on the output of the frozen blocks, which is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from vitral.config import Config
from vitral.data import augment
from vitral.data.loader import Batch, fetch_eval_crops, smoothed
from vitral.data.records import Records
from vitral.data.sampling import Order
from vitral.machine import input_device
from vitral.model import ViT
from vitral.training.resolved import Resolved

MAX_CACHE_BYTES = 4e9  # maximum bytes of tokens kept in memory


def can_cache(config: Config, num_images: int, processes: int) -> bool:
    """Returns whether to compute the inputs of the trained blocks once instead of every epoch.

    They must fit in memory and be the same in every epoch, which excludes augmentation. With
    several processes, each would need all of them. The result depends on the settings only, so a
    resumed run does the same.
    """
    model, train = config.model, config.train
    if not isinstance(train.trainable, int) or train.progressive or train.reproducible:
        return False
    tokens = model.num_prefix + (model.image_size // model.patch_size) ** 2
    size = 4 * num_images * tokens * model.shape.dim
    return processes == 1 and config.augment.off and size <= MAX_CACHE_BYTES


class TrainedBlocks(nn.Module):
    """The part of a model that is trained: tokens (B, N, D) to logits (B, classes)."""

    def __init__(self, model: ViT, config: Config) -> None:
        super().__init__()
        self.model = model
        self.first = _num_frozen(config)
        self.grid_size = config.model.image_size // config.model.patch_size

    def forward(self, tokens: Tensor) -> Tensor:
        model = self.model
        x = model.encode(tokens, self.grid_size, self.grid_size, self.first)
        return model.head(model.pool(x if model.config.pooling == "mean-norm" else model.norm(x)))


class TokenCache:
    """Computes and stores the inputs of the trained blocks for all images.

    Args:
        model: the model, on its device.
        check: called with the number of images after each batch; may raise to stop.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: ViT,
        config: Config,
        records: Records,
        resolved: Resolved,
        workers: int,
        check: Callable[[int], None],
    ) -> None:
        self.config, self.device, self.micro_batch = config, model.device, resolved.micro_batch
        self.broken: dict[int, str] = {}
        parts, labels, everything = [], [], np.arange(len(records))
        size = resolved.micro_batch
        chosen = [everything[i : i + size] for i in range(0, len(records), size)]
        model.eval()
        data_device = input_device(model.device)
        for fetched in fetch_eval_crops(
            records, config, chosen, workers, data_device, resolved.decoder
        ):
            images = fetched.images.to(data_device, non_blocking=True)
            images = augment.finish(images, None, config.data.mean, config.data.std)
            images = images.to(model.device)
            with resolved.autocast():
                tokens = model.encode(*model.embed(images), end=_num_frozen(config))
            parts.append(tokens.float().cpu())
            labels.append(fetched.labels.cpu())
            self.broken |= dict(fetched.broken)
            check(len(images))
        self.tokens, self.labels = torch.cat(parts), torch.cat(labels)

    def batches(self, num_classes: int, steps: range) -> Iterator[Batch]:
        """Yields the micro-batches of the given steps, in the order of `train_batches`."""
        train = self.config.train
        order = Order.of(self.config, self.labels.numpy())
        for step in steps:
            for first in range(0, train.batch_size, self.micro_batch):
                stop = min(first + self.micro_batch, train.batch_size)
                chosen = torch.from_numpy(order.samples(step, first, stop)[1])
                targets = smoothed(self.labels[chosen], num_classes, train.label_smoothing)
                tokens = self.tokens[chosen].to(self.device)
                yield Batch(step, first, tokens, targets.to(self.device), [])


def _num_frozen(config: Config) -> int:
    assert isinstance(config.train.trainable, int)
    return config.model.shape.depth - config.train.trainable
