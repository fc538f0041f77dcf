"""Requests become batches on the device: fetched, copied, augmented, one ahead of the step.

What is fetched are crops in uint8; all the rest, from flip to normalisation, is one batched code on
the device.
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

EVAL_BATCH = 256  # images of a forward pass in evaluation
NO_AUGMENTATION = AugmentConfig(crop="none", flip=0.0)


@dataclass(frozen=True)
class Batch:
    """A micro-batch, or a batch for evaluation, on the device."""

    step: int
    """The global batch that it is a slice of; in evaluation its number."""
    first: int
    """Place of its first image in the global batch; in evaluation in the set."""
    images: Tensor
    """(B, C, S, S), float32, normalised."""
    targets: Tensor
    """(B, classes), float32, rows that sum to one; in evaluation the labels, int64."""
    broken: list[tuple[int, str]]
    """Records that could not be decoded, with the reason; others took their place."""
    waited: float = 0.0
    """Seconds that the device had nothing to do, as the images were still to be fetched."""


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
    """The micro-batches of the global batches `steps`, in order, augmented and mixed.

    What a sample looks like depends on the seed, its epoch and its index alone; how it is mixed on
    the global batch and its place in it. So neither workers nor micro-batches nor the number of
    processes change anything.

    Args:
        share: which part of every global batch, of how many equal ones, all of even size.
        parts: how many equal parts of that share no micro-batch goes across, of even size too.
    """
    data_device = input_device(device)
    seed, smoothing = config.train.seed, config.train.label_smoothing
    size = config.train.batch_size // (shard[1] * num_slices)
    starts = range(shard[0] * num_slices * size, (shard[0] + 1) * num_slices * size, size)
    order = Order(seed, len(records), config.train.batch_size, config.augment.repeats)

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
    """Targets (B, classes) for labels (B,), with a fraction spread evenly over the classes."""
    return F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def eval_batches(
    records: Records,
    config: Config,
    batch_size: int,
    workers: int,
    device: torch.device,
    shard: tuple[int, int] = (0, 1),
    decoder: Decoder = "cpu",
) -> Iterator[Batch]:
    """Every record once, in order.

    The last batch is filled up with copies of an image, so that all batches have one shape; as many
    images count as there are labels.

    Args:
        share: which part of the batches, of how many contiguous ones.

    Raises:
        UserError: for an image that cannot be decoded.
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
                "fix or remove it and start again; `vitral data check` finds all"
            )
        images = fetched.images.to(data_device, non_blocking=True)
        if len(images) < batch_size:
            filling = images[-1:].expand(batch_size - len(images), -1, -1, -1)
            images = torch.cat([images, filling])
        images = augment.finish(images, None, config.data.mean, config.data.std)
        first = int(fetched.request.indices[0])
        labels = fetched.labels.to(data_device, non_blocking=True)
        return Batch(first // batch_size, first, images, labels, [])

    return _prepare_ahead(
        fetch_eval_crops(records, config, own_batches, workers, data_device, decoder),
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
) -> Iterator[Fetched]:
    """Chosen records as evaluation sees them, unnormalized: a batch for each of `index_batches`."""
    still = dataclasses.replace(config, augment=NO_AUGMENTATION)
    image_size = config.model.image_size
    requests = [
        Request(0, 0, image_size, np.zeros_like(indices), indices) for indices in index_batches
    ]
    return fetch(records, still, requests, workers, device, decoder)


def _prepare_ahead(
    fetched: Iterator[Fetched], prepare: Callable[[Fetched], Batch], device: torch.device
) -> Iterator[Batch]:
    """Prepares each batch; on a side stream of a GPU, while the step before it still runs there."""
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
            # Else a quick host would prepare several batches, whose memory nobody reckoned with.
            before.synchronize()
        with torch.cuda.stream(side_stream):
            item = next(fetched, None)
            if item is None:
                return
            waited = _idle_seconds(done, main)
            batch = dataclasses.replace(prepare(item), waited=waited)
        before = done
        main.wait_stream(side_stream)
        # Else the allocator would hand the memory out again while the step still reads it.
        batch.images.record_stream(main)
        batch.targets.record_stream(main)
        yield batch


def _idle_seconds(done: torch.cuda.Event, stream: torch.cuda.Stream) -> float:
    """Seconds that a stream has had nothing to do for; `done` was the last that it was given."""
    if not done.query():
        return 0.0
    now = torch.cuda.Event(enable_timing=True)
    now.record(stream)
    now.synchronize()
    return done.elapsed_time(now) / 1e3
