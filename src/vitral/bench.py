"""Rates: of the training step, of training, and of the input beside torchvision's reference."""

from __future__ import annotations

import io
import itertools
import operator
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from vitral import recipes
from vitral.config import Config, UserError
from vitral.data import augment, crops
from vitral.data.decode import DecodeError, decode
from vitral.data.fetch import available_cores, in_workers, resolve_workers
from vitral.data.loader import Batch
from vitral.data.rates import (
    BATCH,
    ENDLESS,
    choose_decoder,
    decoders,
    endless_batches,
    images_per_second,
    measure_rate,
)
from vitral.data.records import Dataset, Encoded, Packed, Pixels, Records
from vitral.data.sampling import Integers, Order
from vitral.data.sources import open_dataset
from vitral.evaluation.evaluate import pick_device
from vitral.model import CHANNELS, ViT, count_flops
from vitral.report.gather import duration
from vitral.training.distributed import World
from vitral.training.monitor import memory_gb, peak_flops
from vitral.training.optim import Optimizer
from vitral.training.parallel import Averaged
from vitral.training.resolve import Resolved, build_model, prepare_device, resolve

ROUNDS = 3
SECONDS = 2.0  # that a rate is measured for in each round
SAMPLE = 512  # encoded images that are read over and over
REFERENCE = "torchvision's reference transforms"


def plan(config: Config) -> str:
    """The settings, the size of the model, the steps, and an estimate of the time (`--dry-run`)."""
    dataset = open_dataset(config.data, config.model.image_size, config.train.seed)
    assert dataset.train is not None
    train, classes = config.train, len(dataset.classes)
    steps = Order(train.seed, len(dataset.train), train.batch_size).end_of_epoch(train.epochs)
    training = _Training(config, classes, config.model.image_size)
    seconds = steps * train.batch_size / training.rate(itertools.repeat(training.batch))
    seconds *= _mean_work(config, classes)
    micro = -(-train.batch_size // training.resolved.micro_batch)
    lines = [
        recipes.dump(config),
        *_size(config, training.model, classes),
        f"data        {_describe(dataset)}",
        f"steps       {steps:,} of {train.batch_size} images, {micro} micro-batches each",
        f"time        about {duration(seconds)} for the steps on "
        f"{training.device.type}, if the input keeps up",
    ]
    return "\n".join(lines)


def _mean_work(config: Config, classes: int) -> float:
    """Work of a mean step over that of one at the model's image size."""
    parts = [share * count_flops(config.model, classes, n) for n, share in config.train.progressive]
    return sum(parts) / count_flops(config.model, classes) if parts else 1.0


def bench_model(config: Config, num_classes: int = 1000) -> str:
    """The rate of forward, backward and optimiser step on synthetic images of one micro-batch."""
    training = _Training(config, num_classes, config.model.image_size)
    resolved, same = training.resolved, itertools.repeat(training.batch)
    rate = statistics.median(training.rate(same) for _ in range(ROUNDS))
    seconds = resolved.micro_batch / rate
    work = 3 * count_flops(config.model, num_classes, training=True) * rate
    lines = [
        *_size(config, training.model, num_classes),
        f"device      {_device(resolved)}",
        f"step        {1e3 * seconds:.1f} ms for {resolved.micro_batch} images",
        f"rate        {rate:,.0f} images/s, {work / 1e12:.3f} TFLOP/s",
        f"memory      {memory_gb(resolved.device):.2f} GB",
    ]
    peak = peak_flops()
    if peak is not None and resolved.precision == "bf16":
        lines.append(f"MFU         {work / peak:.1%}")
    return "\n".join(lines)


def bench_train(config: Config) -> str:
    """The rate of training beside that of the same steps on one batch that stays on the device."""
    dataset = open_dataset(config.data, config.model.image_size, config.train.seed)
    records, classes = dataset.train, len(dataset.classes)
    assert records is not None
    training = _Training(config, classes, config.image_size_at(0))
    device, resolved = training.device, training.resolved
    workers = resolve_workers(config.data, records)
    decoder, _ = choose_decoder(records, config, workers, device)

    def synthetic() -> float:
        return training.rate(itertools.repeat(training.batch), seconds=SECONDS)

    def real() -> float:
        size = resolved.micro_batch
        batches = endless_batches(records, config, classes, size, workers, device, decoder)
        return training.rate(batches, workers, SECONDS)

    rounds = _in_turn({"synthetic": synthetic, "training": real})
    ratio = _ratio(rounds["training"], rounds["synthetic"])
    B, _, S, _ = training.batch.images.shape
    lines = [
        *_size(config, training.model, classes),
        f"device      {_device(resolved)}",
        f"data        {_describe(dataset)}",
        f"input       decoder {decoder}, workers {workers}, cores {available_cores()}, "
        f"micro-batches of {B} images of {S} pixels",
        *_table(rounds),
        f"ratio       {ratio:.1%} of the synthetic rate, medians of {ROUNDS} rounds in turn",
    ]
    return "\n".join(lines)


def bench_data(config: Config) -> str:
    """Images per second of every way in that the data and the machine offer, to augmented batches.

    Encoded images also go through a PyTorch DataLoader with as many workers and the transforms of
    torchvision's classification reference, in turn with ours, and through a single core.
    """
    device = pick_device(config.train.device)
    prepare_device(config, device)
    dataset = open_dataset(config.data, config.model.image_size, config.train.seed, train=False)
    assert dataset.val is not None
    records = _sample(dataset.val)
    workers = resolve_workers(config.data, records)
    measure = partial(measure_rate, records, config, workers, device, seconds=SECONDS)
    names = {"cpu": "vitral", "gpu": "vitral, decoded by the GPU"}
    runs: dict[str, Callable[[], float]]
    runs = {names[way]: partial(measure, decoder=way) for way in decoders(records, device)}
    head = (
        f"{len(records):,} images of {dataset.name} over and over, on {device.type}, "
        f"{available_cores()} cores, medians of {ROUNDS} rounds in turn"
    )
    augmentation = _augmentation(config, device)
    if isinstance(records, Packed | Pixels):
        return "\n".join([head, *_table(_in_turn(runs)), augmentation])
    runs[REFERENCE] = partial(_reference_rate, records, config, workers, device)
    lines = [head, f"with workers: {workers}", *_table(_in_turn(runs)), augmentation]
    torch.set_num_threads(1)
    lines += ["on one core", *_table(_in_turn(_one_core(config, records)))]
    return "\n".join(lines)


def _augmentation(config: Config, device: torch.device) -> str:
    """The time that all after the crops takes, Mixup and CutMix too, of a batch on the device."""
    side, seed, size = config.model.image_size, config.train.seed, 1024
    if device.type == "cpu":
        size = 64
    images = torch.randint(256, (size, CHANNELS, side, side), dtype=torch.uint8, device=device)
    targets = torch.full((size, 1000), 1e-3, device=device)

    def work(step: int) -> int:
        mix = augment.draw_mix(config.augment, side, seed, step)
        finished = _our_rest(config, images)
        if mix is not None:
            augment.mix(finished, targets, mix)
        return size

    rate = images_per_second(map(work, itertools.count()), 0, device, SECONDS)
    return f"augmentation alone of {size:,} images of {side} pixels: {1e3 * size / rate:.1f} ms"


def _sample(records: Records) -> Records:
    """Of encoded images as many as are soon read over and over, those that can be decoded."""
    if isinstance(records, Packed | Pixels):
        return records
    chosen = np.zeros(len(records), bool)
    for index in np.linspace(0, len(records) - 1, min(len(records), SAMPLE)).astype(int):
        chosen[index] = _decodes(records, index)
    if not chosen.any():
        raise UserError(f"data: {records.where(0)} and others: expected images that can be decoded")
    return records.take(chosen)


def _decodes(records: Encoded, index: int) -> bool:
    try:
        decode(records.read(index))
    except (DecodeError, OSError):
        return False
    return True


@dataclass(frozen=True)
class _Rounds:
    """What a run gave in each round."""

    rates: list[float] = field(default_factory=list)
    """Images per second."""
    cores: list[float] = field(default_factory=list)
    """Kept busy, by this process and workers that have ended."""


def _in_turn(runs: dict[str, Callable[[], float]]) -> dict[str, _Rounds]:
    rounds = {name: _Rounds() for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            busy, started = sum(os.times()[:4]), time.perf_counter()
            rounds[name].rates.append(run())
            busy, passed = sum(os.times()[:4]) - busy, time.perf_counter() - started
            rounds[name].cores.append(busy / passed)
    return rounds


def _table(rounds: dict[str, _Rounds]) -> Iterator[str]:
    """A line for each: medians, also of the ratio to torchvision's, where that was run."""
    theirs = rounds.get(REFERENCE)
    for name, ours in rounds.items():
        line = f"{name:40}{statistics.median(ours.rates):9,.0f} images/s"
        line += f"  {statistics.median(ours.cores):4.1f} cores used"
        yield line + (f"  {_ratio(ours, theirs):5.2f} times torchvision" if theirs else "")


def _ratio(ours: _Rounds, theirs: _Rounds) -> float:
    return statistics.median(map(operator.truediv, ours.rates, theirs.rates))


def _one_core(config: Config, records: Encoded) -> dict[str, Callable[[], float]]:
    """A worker's part, all of ours, and torchvision's, on encoded images in memory."""
    encoded = [records.read(i) for i in range(min(len(records), SAMPLE // 4))]
    reference = _reference(config.model.image_size)

    def rate(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        return len(encoded) / (time.perf_counter() - started)

    def theirs() -> None:
        for content in encoded:
            reference(Image.open(io.BytesIO(content)).convert("RGB"))

    return {
        "vitral, a worker's part (decode, crop)": lambda: rate(lambda: _our_crops(config, encoded)),
        "vitral, all of it": lambda: rate(lambda: _our_rest(config, _our_crops(config, encoded))),
        REFERENCE: lambda: rate(theirs),
    }


def _our_crops(config: Config, encoded: list[bytes]) -> Tensor:
    side, data = config.model.image_size, config.data
    images = torch.empty(len(encoded), CHANNELS, side, side, dtype=torch.uint8)
    for i, content in enumerate(encoded):
        image = decode(content)
        size = np.array([image.shape[1:]])
        drawn = (config.train.seed, 0, np.array([i]))
        box = crops.random_boxes(config.augment, data.eval_crop, side, size, *drawn)[0]
        images[i] = crops.crop_resize(image, box, side, data.interpolation)
    return images


def _our_rest(config: Config, images: Tensor) -> Tensor:
    indices = np.arange(len(images))
    plan = augment.draw_plan(config.augment, images.shape[-1], config.train.seed, 0, indices)
    return augment.finish(augment.augment(images, plan), plan, config.data.mean, config.data.std)


def _reference(side: int) -> Callable[[Image.Image], Tensor]:
    """The preset of torchvision's references/classification, with AutoAugment and erasing."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(side, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.AutoAugment(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            v2.RandomErasing(0.1),
        ]
    )


class _Reference(torch.utils.data.Dataset[Tensor]):
    """Batches as torchvision's reference makes them, image by image; runs in worker processes."""

    def __init__(self, records: Encoded, side: int) -> None:
        self.records = records
        self.transform = _reference(side)

    def __getitem__(self, indices: Integers) -> Tensor:
        contents = (self.records.read(int(index)) for index in indices)
        return torch.stack(
            [self.transform(Image.open(io.BytesIO(c)).convert("RGB")) for c in contents]
        )


def _reference_rate(records: Encoded, config: Config, workers: int, device: torch.device) -> float:
    size = min(config.train.batch_size, BATCH)
    order = Order(config.train.seed, len(records), size)
    requests = (order.samples(step, 0, size)[1] for step in range(ENDLESS))
    gpu = device.type == "cuda"
    batches = in_workers(_Reference(records, config.model.image_size), requests, workers, gpu)
    counts = (len(images.to(device, non_blocking=True)) for images in batches)
    return images_per_second(counts, workers, device, SECONDS)


class _Training:
    """A model in training, and a batch of noise for it that lies on the device."""

    def __init__(self, config: Config, num_classes: int, side: int) -> None:
        self.config, self.device = config, pick_device(config.train.device)
        self.model = build_model(config, num_classes, init=False).to(self.device)
        prepare_device(config, self.device)
        self.resolved = resolve(config, self.model, self.device)
        torch.set_num_threads(self.resolved.threads)
        self.optimizer = Optimizer(self.model, config.optim)
        self.passes = Averaged(self.model, config.train, self.resolved, World())
        size = self.resolved.micro_batch
        images = torch.randn(size, CHANNELS, side, side, device=self.device)
        targets = torch.full((size, num_classes), 1 / num_classes, device=self.device)
        self.batch = Batch(0, 0, images, targets, [])

    def rate(self, batches: Iterator[Batch], workers: int = 0, seconds: float = 0.5) -> float:
        """Images per second of a step on each of the batches."""
        counts = (self._step(batch) for batch in batches)
        return images_per_second(counts, workers, self.device, seconds)

    def _step(self, batch: Batch) -> int:
        loss = self.passes.accumulate(batch, last=True)
        self.optimizer.step(self.config.optim.lr, loss)
        return len(batch.images)


def _device(resolved: Resolved) -> str:
    compiled = "compiled" if resolved.compile else "not compiled"
    return f"{resolved.device}, {resolved.precision}, {compiled}, {resolved.threads} threads"


def _size(config: Config, model: ViT, num_classes: int) -> list[str]:
    flops = count_flops(config.model, num_classes)
    return [
        f"parameters  {model.num_parameters:,}",
        f"FLOPs       {flops / 1e9:.4g} G an image and forward pass, three times that in training",
    ]


def _describe(dataset: Dataset) -> str:
    assert dataset.train is not None
    assert dataset.val is not None
    notes = "".join(f"; {note}" for note in dataset.notes)
    return (
        f"{Path(dataset.name).name}: {len(dataset.train):,} images to train on, "
        f"{len(dataset.val):,} to validate, {len(dataset.classes)} classes{notes}"
    )
