"""Records become batches on the device: decoded and cropped, copied, augmented.

Encoded files are decoded and cropped to uint8 by worker processes; pixel sets lie on the device and
are cropped there. All the rest, from flip to normalisation, is one batched code on the device.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitral.config import AugmentConfig, Config, DataConfig, UserError
from vitral.data import augment, crops
from vitral.data.decode import DecodeError, decode
from vitral.data.sampling import Integers, Order
from vitral.data.sources import Files, Pixels

T = TypeVar("T")
CHUNK = 16  # images decoded before their crops are drawn together
STILL = AugmentConfig(crop="none", flip=0.0)


def available_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resolve_workers(config: DataConfig, records: Files | Pixels) -> int:
    """The number of decoding processes: none for pixel sets, which lie on the device."""
    if isinstance(records, Pixels):
        return 0
    return min(16, available_cores() - 1) if config.workers is None else config.workers


@dataclass(frozen=True)
class Batch:
    """A micro-batch, or a batch for evaluation, on the device."""

    step: int
    """The global batch that it is a slice of; in evaluation its number."""
    images: Tensor
    """(B, C, S, S), float32, normalised."""
    targets: Tensor
    """(B, classes), float32, rows that sum to one; in evaluation the labels, int64."""
    broken: list[tuple[int, str]]
    """Records that could not be decoded, with the reason; others took their place."""


@dataclass(frozen=True)
class Request:
    """Samples to fetch for one batch: the epoch to draw each for and its index, both (B,)."""

    step: int
    epochs: Integers
    indices: Integers


@dataclass(frozen=True)
class Fetched:
    """The samples of a request: cropped uint8 images (B, C, S, S) and labels (B,)."""

    request: Request
    images: Tensor
    labels: Tensor
    broken: list[tuple[int, str]]

    def pin_memory(self) -> Fetched:
        """Called by DataLoader, so that the copy to the device need not be waited for."""
        return dataclasses.replace(self, images=self.images.pin_memory())


def train_batches(
    records: Files | Pixels,
    config: Config,
    num_classes: int,
    *,
    steps: range,
    total_steps: int,
    micro_batch: int,
    workers: int,
    device: torch.device,
) -> Iterator[Batch]:
    """The micro-batches of the global batches `steps`, in order, augmented and mixed.

    What a sample looks like depends on the seed, its epoch and its index alone; how it is mixed on
    the global batch and its place in it. So neither workers nor micro-batches change anything.
    """
    size, seed, repeats = config.train.batch_size, config.train.seed, config.augment.repeats
    order = Order(seed, len(records), size, repeats)
    requests = (
        Request(step, *order.samples(step, first, min(first + micro_batch, size)))
        for step in steps
        for first in range(0, size, micro_batch)
    )
    smoothing = config.train.label_smoothing

    def prepare(fetched: Fetched) -> Batch:
        request, side = fetched.request, config.model.image_size
        plan = augment.draw_plan(config.augment, side, seed, request.epochs, request.indices)
        images = augment.augment(fetched.images.to(device, non_blocking=True), plan)
        images = augment.finish(images, plan, config.data.mean, config.data.std)
        labels = fetched.labels.to(device, non_blocking=True)
        targets = F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes
        if request.step < config.augment.mix_until * total_steps:
            mix = augment.draw_mix(config.augment, side, seed, request.step)
            if mix is not None:
                images, targets = augment.mix(images, targets, mix)
        return Batch(request.step, images, targets, fetched.broken)

    return _beside(_fetch(records, config, requests, workers, device), prepare, device)


def eval_batches(
    records: Files | Pixels, config: Config, batch_size: int, workers: int, device: torch.device
) -> Iterator[Batch]:
    """Every record once, in order.

    The last batch is filled up with copies of an image, so that all batches have one shape; as many
    images count as there are labels.

    Raises:
        UserError: for an image that cannot be decoded.
    """
    still = dataclasses.replace(config, augment=STILL)
    everything = np.arange(len(records))
    parts = [everything[first : first + batch_size] for first in range(0, len(records), batch_size)]
    requests = [Request(step, np.zeros_like(part), part) for step, part in enumerate(parts)]

    def prepare(fetched: Fetched) -> Batch:
        for index, reason in fetched.broken:
            raise UserError(
                f"data: {describe(records, index)}: {reason}; "
                "mend or remove it and start anew; `vitral data check` finds all"
            )
        images = fetched.images.to(device, non_blocking=True)
        if len(images) < batch_size:
            filling = images[-1:].expand(batch_size - len(images), -1, -1, -1)
            images = torch.cat([images, filling])
        images = augment.finish(images, None, config.data.mean, config.data.std)
        return Batch(fetched.request.step, images, fetched.labels.to(device), [])

    return _beside(_fetch(records, still, requests, workers, device), prepare, device)


def describe(records: Files | Pixels, index: int) -> str:
    """What to call a record in a message: its path, or its number."""
    return records.where(index) if isinstance(records, Files) else f"image {index}"


def _boxes(config: Config, sizes: Integers, epochs: Integers, indices: Integers) -> Integers:
    share, side, seed = config.data.eval_crop, config.model.image_size, config.train.seed
    return crops.random_boxes(config.augment, share, side, sizes, seed, epochs, indices)


def _fetch(
    records: Files | Pixels,
    config: Config,
    requests: Iterable[Request],
    workers: int,
    device: torch.device,
) -> Iterator[Fetched]:
    if isinstance(records, Pixels):
        return _crop_on_device(records, config, requests, device)
    return in_workers(_Decoding(records, config), requests, workers, device.type == "cuda")


def in_workers(
    dataset: Dataset[T], requests: Iterable[Any], workers: int, pin_memory: bool = False
) -> Iterator[T]:
    """What `dataset` has for each request, in order, fetched by worker processes."""
    with warnings.catch_warnings():
        # More workers than cores is what was asked for.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=requests,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            worker_init_fn=_ignore_signals,
            multiprocessing_context="fork" if workers and hasattr(os, "fork") else None,
        )
        return iter(loader)


def _crop_on_device(
    records: Pixels, config: Config, requests: Iterable[Request], device: torch.device
) -> Iterator[Fetched]:
    pixels, labels = records.images.to(device), torch.from_numpy(records.labels)
    for request in requests:
        chosen = torch.from_numpy(request.indices)
        images = pixels[chosen.to(device)]
        sizes = np.broadcast_to(images.shape[2:], (len(images), 2))
        boxes = _boxes(config, sizes, request.epochs, request.indices)
        images = crops.resample(images, boxes, config.model.image_size, config.data.interpolation)
        yield Fetched(request, images, labels[chosen], [])


class _Decoding(Dataset[Fetched]):
    """Decodes and crops the samples of a request; runs in worker processes."""

    def __init__(self, records: Files, config: Config) -> None:
        self.records = records
        self.config = config

    def __getitem__(self, request: Request) -> Fetched:
        size, interpolation = self.config.model.image_size, self.config.data.interpolation
        images = torch.empty(len(request.indices), 3, size, size, dtype=torch.uint8)
        labels = torch.empty(len(request.indices), dtype=torch.int64)
        broken: list[tuple[int, str]] = []
        for first in range(0, len(images), CHUNK):
            part = slice(first, first + CHUNK)
            decoded = [self._decode(int(index), broken) for index in request.indices[part]]
            sizes = np.array([image.shape[1:] for image, _ in decoded])
            boxes = _boxes(self.config, sizes, request.epochs[part], request.indices[part])
            for k, ((image, label), box) in enumerate(zip(decoded, boxes, strict=True), first):
                images[k] = crops.crop_resize(image, box, size, interpolation)
                labels[k] = label
        return Fetched(request, images, labels, broken)

    def _decode(self, index: int, broken: list[tuple[int, str]]) -> tuple[Tensor, int]:
        """Image and label of a record, or of the next one that can be decoded.

        Where more in a row cannot than a run puts up with, it is black: the run will stop.
        """
        for _ in range(CHUNK + len(self.records) // 1000):
            try:
                return decode(self.records.read(index)), int(self.records.labels[index])
            except (DecodeError, FileNotFoundError, PermissionError) as error:
                broken.append((index, str(error)))
                index = (index + 1) % len(self.records)
        return torch.zeros(3, 1, 1, dtype=torch.uint8), int(self.records.labels[index])


def _as_it_is(fetched: Any) -> Any:
    return fetched


def _ignore_signals(_: int) -> None:
    """Ctrl-C and a scheduler's signals reach the whole group; the training process decides."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)


def _beside(
    fetched: Iterator[Fetched], prepare: Callable[[Fetched], Batch], device: torch.device
) -> Iterator[Batch]:
    """Prepares each batch on a side stream of a GPU, while the step before it still runs there."""
    if device.type != "cuda":
        yield from map(prepare, fetched)
        return
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    while True:
        with torch.cuda.stream(side):
            item = next(fetched, None)
            if item is None:
                return
            batch = prepare(item)
        main = torch.cuda.current_stream(device)
        main.wait_stream(side)
        # Else the allocator would hand the memory out again while the step still reads it.
        batch.images.record_stream(main)
        batch.targets.record_stream(main)
        yield batch
