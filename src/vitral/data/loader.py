"""Turns requests into batches on the device, which are prepared one step ahead.

Fetched images are uint8 crops. All further processing, from flips to normalization, is batched and
runs on the device.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitral.config import AugmentConfig, Config
from vitral.data import augment
from vitral.data.fetch import Decoder, Fetched, Request, describe, fetch
from vitral.data.records import Records
from vitral.data.sampling import Integers, Order
from vitral.errors import UserError
from vitral.machine import input_device

EVAL_BATCH = 256  # images per forward pass in evaluation
NO_AUGMENTATION = AugmentConfig(crop="none", flip=0.0)


@dataclass(frozen=True)
class Batch:
    """A micro-batch for training, or a batch for evaluation, on the device."""

    step: int
    """Index of its global batch; in evaluation, its own index."""
    first: int
    """Index of its first image in the global batch; in evaluation, in the dataset."""
    images: Tensor
    """(B, C, S, S), float32, normalized."""
    targets: Tensor
    """(B, classes), float32, rows that sum to one if each image has one label; in evaluation, the
    labels: (B,), int64, or (B, classes), 0 or 1."""
    broken: list[tuple[int, str]]
    """Index and reason of each record that could not be decoded; other records replaced them."""
    waited: float = 0.0
    """Seconds that the device was idle because images had not been fetched yet."""


def train_batches(
    records: Records,
    config: Config,
    num_classes: int,
    *,
    steps: range,
    total_steps: int,
    micro_batch: int,
    workers: int,
    device: torch.device,
    shard: tuple[int, int] = (0, 1),
    num_slices: int = 1,
    decoder: Decoder = "cpu",
) -> Iterator[Batch]:
    """Yields the micro-batches of the global batches `steps`, in order, augmented and mixed.

    An image depends only on the seed, its epoch and its index; mixing also depends on the global
    batch and the position in it. The results therefore do not depend on the number of workers,
    micro-batches or processes.

    Args:
        shard: index of this process's shard of every global batch, and number of shards. Shards
            have equal, even sizes.
        num_slices: number of equal slices of a shard, each of even size; a micro-batch never
            crosses their boundaries.
    """
    data_device = input_device(device)
    seed, smoothing = config.train.seed, config.train.label_smoothing
    size = config.train.batch_size // (shard[1] * num_slices)
    starts = range(shard[0] * num_slices * size, (shard[0] + 1) * num_slices * size, size)
    order = Order.of(config, records.labels)

    def requests() -> Iterator[Request]:
        for step in steps:
            image_size = config.image_size_at(step / total_steps)
            for start in starts:
                for first in range(start, start + size, micro_batch):
                    chosen = order.samples(step, first, min(first + micro_batch, start + size))
                    yield Request(step, first, image_size, *chosen)

    def prepare(fetched: Fetched) -> Batch:
        request, image_size = fetched.request, fetched.request.image_size
        plan = augment.draw_plan(config.augment, image_size, seed, request.epochs, request.indices)
        images = augment.augment(fetched.images.to(data_device, non_blocking=True), plan)
        images = augment.finish(images, plan, config.data.mean, config.data.std)
        labels = fetched.labels.to(data_device, non_blocking=True)
        targets = smoothed(labels, num_classes, smoothing)
        if request.step < config.augment.mix_until * total_steps:
            mix = augment.draw_mix(config.augment, image_size, seed, request.step)
            if mix is not None:
                images, targets = augment.mix(images, targets, mix)
        return Batch(request.step, request.first, images, targets, fetched.broken)

    fetched = fetch(records, config, requests(), workers, data_device, decoder)
    return _prepare_ahead(fetched, prepare, device)


def smoothed(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Converts labels to targets (B, classes), float32.

    Labels (B,) become one-hot rows, and a fraction of each is spread evenly over the classes. For
    labels of 0 and 1 (B, classes), it is spread over presence and absence of each class.
    """
    if labels.ndim == 2:
        return labels * (1 - smoothing) + smoothing / 2
    return F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def eval_batches(
    records: Records,
    config: Config,
    batch_size: int,
    workers: int,
    device: torch.device,
    shard: tuple[int, int] = (0, 1),
    decoder: Decoder = "cpu",
    num_crops: int = 1,
) -> Iterator[Batch]:
    """Yields every record once, in order.

    The last batch is padded with copies of an image, so that all batches have the same shape; there
    are no labels for these copies.

    Args:
        shard: index of this process's shard of the batches, and number of shards. Shards are
            contiguous.
        num_crops: 1 for the evaluation crop, or 5 for the crops of `crops.five_boxes`; those of an
            image are consecutive.

    Raises:
        UserError: if an image cannot be decoded.
    """
    data_device = input_device(device)
    everything = np.arange(len(records))
    index_batches = [
        everything[first : first + batch_size] for first in range(0, len(records), batch_size)
    ]
    own_range = range(*(len(index_batches) * (shard[0] + k) // shard[1] for k in (0, 1)))
    own_batches = [index_batches[n] for n in own_range]

    def prepare(fetched: Fetched) -> Batch:
        for index, reason in fetched.broken:
            raise UserError(
                f"data: {describe(records, index)}: {reason}; "
                "fix or remove it and start again; `vitral data check` lists all broken images"
            )
        images = fetched.images.to(data_device, non_blocking=True)
        if len(images) < batch_size * num_crops:
            padding = images[-1:].expand(batch_size * num_crops - len(images), -1, -1, -1)
            images = torch.cat([images, padding])
        images = augment.finish(images, None, config.data.mean, config.data.std)
        first = int(fetched.request.indices[0])
        labels = fetched.labels[::num_crops].to(data_device, non_blocking=True)
        return Batch(first // batch_size, first, images, labels, [])

    return _prepare_ahead(
        fetch_eval_crops(records, config, own_batches, workers, data_device, decoder, num_crops),
        prepare,
        device,
    )


def fetch_eval_crops(
    records: Records,
    config: Config,
    index_batches: Sequence[Integers],
    workers: int,
    device: torch.device,
    decoder: Decoder = "cpu",
    num_crops: int = 1,
) -> Iterator[Fetched]:
    """Yields unnormalized evaluation crops, one batch per element of `index_batches`."""
    config = dataclasses.replace(config, augment=NO_AUGMENTATION)
    image_size = config.model.image_size

    def request(indices: Integers) -> Request:
        views = np.tile(np.arange(num_crops), len(indices)) if num_crops > 1 else None
        repeated = np.repeat(indices, num_crops)
        return Request(0, 0, image_size, np.zeros_like(repeated), repeated, views)

    requests = [request(indices) for indices in index_batches]
    return fetch(records, config, requests, workers, device, decoder)


def _prepare_ahead(
    fetched: Iterator[Fetched], prepare: Callable[[Fetched], Batch], device: torch.device
) -> Iterator[Batch]:
    """Prepares each batch; on a GPU, on a side stream while the previous step still runs."""
    if device.type != "cuda":
        started = time.perf_counter()
        for item in fetched:
            waited = time.perf_counter() - started
            batch = prepare(item)
            images, targets = batch.images.to(device), batch.targets.to(device)
            yield dataclasses.replace(batch, images=images, targets=targets, waited=waited)
            started = time.perf_counter()
        return
    side_stream, before = torch.cuda.Stream(device), None
    side_stream.wait_stream(torch.cuda.current_stream(device))
    while True:
        main = torch.cuda.current_stream(device)
        done = torch.cuda.Event(enable_timing=True)
        done.record(main)
        if before is not None:
            # Otherwise a fast host would prepare several batches and use more memory than planned.
            before.synchronize()
        with torch.cuda.stream(side_stream):
            item = next(fetched, None)
            if item is None:
                return
            waited = _idle_seconds(done, main)
            batch = dataclasses.replace(prepare(item), waited=waited)
        before = done
        main.wait_stream(side_stream)
        # Otherwise the allocator would reuse the memory while the step still reads it.
        batch.images.record_stream(main)
        batch.targets.record_stream(main)
        yield batch


def _idle_seconds(done: torch.cuda.Event, stream: torch.cuda.Stream) -> float:
    """Returns the seconds that a stream has been idle; `done` is the last event recorded on it."""
    if not done.query():
        return 0.0
    now = torch.cuda.Event(enable_timing=True)
    now.record(stream)
    now.synchronize()
    return done.elapsed_time(now) / 1e3
