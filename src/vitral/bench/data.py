"""Rates of all input paths, compared with torchvision's reference transforms."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from vitral.bench import rounds
from vitral.bench.rounds import interleaved_rates, table
from vitral.config import Config
from vitral.data import augment, crops
from vitral.data.decode import DecodeError, decode
from vitral.data.fetch import resolve_workers
from vitral.data.formats import open_dataset
from vitral.data.records import Encoded, Packed, Pixels, Records
from vitral.data.sampling import Integers, Order
from vitral.data.tools.rates import (
    BATCH,
    UNLIMITED_STEPS,
    decoders,
    images_per_second,
    measure_rate,
)
from vitral.data.workers import in_workers
from vitral.errors import UserError, counted
from vitral.machine import available_cores, input_device, pick_device
from vitral.model import CHANNELS
from vitral.training.resolved import prepare_device

NUM_IMAGES = 512  # encoded images, read repeatedly
REFERENCE = "torchvision's reference transforms"


def bench_data(config: Config) -> str:
    """Measures the images per second of every input path that the data and the machine support.

    Each path ends with augmented batches. Encoded images are also measured through a PyTorch
    DataLoader with the same number of workers and the transforms of torchvision's classification
    reference, interleaved with vitral's, and on a single core.
    """
    device = pick_device(config.train.device)
    prepare_device(config, device)
    dataset = open_dataset(config.data, config.model.image_size, config.train.seed, train=False)
    assert dataset.val is not None
    records = _sample(dataset.val)
    workers = resolve_workers(config.data, records)
    measure = partial(measure_rate, records, config, workers, device, seconds=rounds.SECONDS)
    names = {"cpu": "vitral", "gpu": "vitral, decoded by the GPU"}
    runs: dict[str, Callable[[], float]]
    runs = {names[d]: partial(measure, decoder=d) for d in decoders(records, device)}
    head = (
        f"{counted(len(records), 'image')} of {dataset.name}, read repeatedly, on {device.type}, "
        f"{available_cores()} cores, medians of {rounds.ROUNDS} interleaved rounds"
    )
    augmentation = _augmentation(config, device)
    if isinstance(records, Packed | Pixels):
        return "\n".join([head, *table(interleaved_rates(runs), REFERENCE), augmentation])
    runs[REFERENCE] = partial(_reference_rate, records, config, workers, device)
    lines = [
        head,
        f"workers: {workers}",
        *table(interleaved_rates(runs), REFERENCE),
        augmentation,
    ]
    torch.set_num_threads(1)
    lines += ["on one core", *table(interleaved_rates(_one_core(config, records)), REFERENCE)]
    return "\n".join(lines)


def _augmentation(config: Config, device: torch.device) -> str:
    """Measures everything after the crops, with Mixup and CutMix, for a batch on the device."""
    image_size, seed, size = config.model.image_size, config.train.seed, 1024
    device = input_device(device)
    if device.type == "cpu":
        size = 64
    images = torch.randint(
        256, (size, CHANNELS, image_size, image_size), dtype=torch.uint8, device=device
    )
    targets = torch.full((size, 1000), 1e-3, device=device)

    def work(step: int) -> int:
        mix = augment.draw_mix(config.augment, image_size, seed, step)
        finished = _vitral_augmentation(config, images)
        if mix is not None:
            augment.mix(finished, targets, mix)
        return size

    rate = images_per_second(map(work, itertools.count()), 0, device, rounds.SECONDS)
    return f"augmentation only, {size:,} images of {image_size} pixels: {1e3 * size / rate:.1f} ms"


def _sample(records: Records) -> Records:
    """Selects up to NUM_IMAGES encoded images that can be decoded; keeps other records."""
    if isinstance(records, Packed | Pixels):
        return records
    chosen = np.zeros(len(records), bool)
    for index in np.linspace(0, len(records) - 1, min(len(records), NUM_IMAGES)).astype(int):
        chosen[index] = _can_decode(records, index)
    if not chosen.any():
        raise UserError(f"data: {records.where(0)} and others: expected images that can be decoded")
    return records.take(chosen)


def _can_decode(records: Encoded, index: int) -> bool:
    try:
        decode(records.read(index))
    except (DecodeError, OSError):
        return False
    return True


def _one_core(config: Config, records: Encoded) -> dict[str, Callable[[], float]]:
    """Returns benchmarks on encoded images in memory: vitral's worker part, vitral, torchvision."""
    encoded = [records.read(i) for i in range(min(len(records), NUM_IMAGES // 4))]
    reference = _reference(config.model.image_size)

    def rate(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        return len(encoded) / (time.perf_counter() - started)

    def torchvision_work() -> None:
        for content in encoded:
            reference(Image.open(io.BytesIO(content)).convert("RGB"))

    return {
        "vitral, worker part (decode, crop)": lambda: rate(lambda: _vitral_crops(config, encoded)),
        "vitral, complete": lambda: rate(
            lambda: _vitral_augmentation(config, _vitral_crops(config, encoded))
        ),
        REFERENCE: lambda: rate(torchvision_work),
    }


def _vitral_crops(config: Config, encoded: list[bytes]) -> Tensor:
    image_size, data = config.model.image_size, config.data
    images = torch.empty(len(encoded), CHANNELS, image_size, image_size, dtype=torch.uint8)
    for i, content in enumerate(encoded):
        image = decode(content)
        size = np.array([image.shape[1:]])
        key = (config.train.seed, 0, np.array([i]))
        box = crops.random_boxes(config.augment, data.eval_crop, image_size, size, *key, data.fit)
        images[i] = crops.crop_resize(image, box[0], image_size, data.interpolation, data.fill)
    return images


def _vitral_augmentation(config: Config, images: Tensor) -> Tensor:
    indices = np.arange(len(images))
    plan = augment.draw_plan(config.augment, images.shape[-1], config.train.seed, 0, indices)
    return augment.finish(augment.augment(images, plan), plan, config.data.mean, config.data.std)


def _reference(image_size: int) -> Callable[[Image.Image], Tensor]:
    """Returns the transforms of torchvision's references/classification with AutoAugment."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(image_size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.AutoAugment(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            v2.RandomErasing(0.1),
        ]
    )


class _Reference(torch.utils.data.Dataset[Tensor]):
    """Batches of torchvision's reference transforms, image by image, for worker processes."""

    def __init__(self, records: Encoded, image_size: int) -> None:
        self.records = records
        self.transform = _reference(image_size)

    def __getitem__(self, indices: Integers) -> Tensor:
        contents = (self.records.read(int(index)) for index in indices)
        return torch.stack(
            [self.transform(Image.open(io.BytesIO(c)).convert("RGB")) for c in contents]
        )


def _reference_rate(records: Encoded, config: Config, workers: int, device: torch.device) -> float:
    size = min(config.train.batch_size, BATCH)
    order = Order(config.train.seed, len(records), size)
    requests = (order.samples(step, 0, size)[1] for step in range(UNLIMITED_STEPS))
    gpu = device.type == "cuda"
    batches = in_workers(_Reference(records, config.model.image_size), requests, workers, gpu)
    counts = (len(images.to(device, non_blocking=True)) for images in batches)
    return images_per_second(counts, workers, device, rounds.SECONDS)
