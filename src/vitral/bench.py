"""Rates: of the training step, and of the input beside torchvision's reference transforms."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from vitral import recipes
from vitral.config import Config, UserError
from vitral.data import augment, crops
from vitral.data.decode import DecodeError, decode
from vitral.data.records import Dataset, Encoded, Packed, Pixels
from vitral.data.sampling import Order
from vitral.data.sources import open_dataset
from vitral.evaluation.evaluate import pick_device
from vitral.model import CHANNELS, ViT, count_flops
from vitral.training.metrics import duration
from vitral.training.monitor import memory_gb, peak_flops
from vitral.training.optim import Optimizer, loss_sum
from vitral.training.resolve import Resolved, build_model, compiled, prepare_device, resolve

ROUNDS = 5


def plan(config: Config) -> str:
    """The settings, the size of the model, the steps, and an estimate of the time (`--dry-run`)."""
    dataset = open_dataset(config.data, config.model.image_size, config.train.seed)
    assert dataset.train is not None
    train, classes = config.train, len(dataset.classes)
    steps = Order(train.seed, len(dataset.train), train.batch_size).end_of_epoch(train.epochs)
    model, step, resolved = _training_step(config, classes)
    seconds = _seconds_per_call(step, rounds=2)
    micro = -(-train.batch_size // resolved.micro_batch)
    lines = [
        recipes.dump(config),
        *_size(config, model, classes),
        f"data        {_describe(dataset)}",
        f"steps       {steps:,} of {train.batch_size} images, {micro} micro-batches each",
        f"time        about {duration(steps * micro * seconds)} for the steps on "
        f"{resolved.device}, if the input keeps up",
    ]
    return "\n".join(lines)


def bench_model(config: Config, num_classes: int = 1000) -> str:
    """The rate of forward, backward and optimiser step on synthetic images of one micro-batch."""
    model, step, resolved = _training_step(config, num_classes)
    seconds = _seconds_per_call(step, ROUNDS)
    rate = resolved.micro_batch / seconds
    work = 3 * count_flops(config.model, num_classes) * rate
    lines = [
        *_size(config, model, num_classes),
        f"device      {resolved.device}, {resolved.precision}, "
        f"{'compiled' if resolved.compile else 'not compiled'}, {resolved.threads} threads",
        f"step        {1e3 * seconds:.1f} ms for {resolved.micro_batch} images, median of {ROUNDS}",
        f"rate        {rate:,.0f} images/s, {work / 1e12:.3f} TFLOP/s",
        f"memory      {memory_gb(resolved.device):.2f} GB",
    ]
    peak = peak_flops()
    if peak is not None and resolved.precision == "bf16":
        lines.append(f"MFU         {work / peak:.1%}")
    return "\n".join(lines)


def bench_data(config: Config) -> str:
    """Images per second of one core, ours and torchvision's reference pipeline, in turn.

    Ours is what a worker does, decode and crop, and beside it the batched rest; torchvision's does
    all of it image by image, with Pillow, as its classification reference does.
    """
    dataset = open_dataset(config.data, config.model.image_size, config.train.seed, train=False)
    records = dataset.val
    if records is None or isinstance(records, Packed | Pixels):
        raise UserError(f"bench data: {dataset.name} needs no decoding; give an image folder")
    torch.set_num_threads(1)
    encoded = [records.read(i) for i in range(min(len(records), 256)) if _decodes(records, i)]
    ours, rest, theirs = [], [], []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        images = _our_crops(config, encoded)
        cropped = time.perf_counter()
        _our_rest(config, images)
        augmented = time.perf_counter()
        reference = _reference(config.model.image_size)
        for data in encoded:
            reference(Image.open(io.BytesIO(data)).convert("RGB"))
        ended = time.perf_counter()
        ours.append(cropped - started)
        rest.append(augmented - cropped)
        theirs.append(ended - augmented)
    rates = {
        "vitral, a worker's part (decode, crop)": ours,
        "vitral, all of it on the same core": [a + b for a, b in zip(ours, rest, strict=True)],
        "torchvision's reference transforms": theirs,
    }
    lines = [
        f"{len(encoded)} images of {dataset.name}, one core, median of {ROUNDS} rounds in turn"
    ]
    for name, seconds in rates.items():
        rate = len(encoded) / statistics.median(seconds)
        ratio = statistics.median(b / a for a, b in zip(seconds, theirs, strict=True))
        lines.append(f"{name:40}{rate:8,.0f} images/s  {ratio:5.2f} times torchvision")
    return "\n".join(lines)


def _decodes(records: Encoded, index: int) -> bool:
    try:
        decode(records.read(index))
    except DecodeError:
        return False
    return True


def _our_crops(config: Config, encoded: list[bytes]) -> torch.Tensor:
    side, data = config.model.image_size, config.data
    images = torch.empty(len(encoded), CHANNELS, side, side, dtype=torch.uint8)
    for i, content in enumerate(encoded):
        image = decode(content)
        size = np.array([image.shape[1:]])
        drawn = (config.train.seed, 0, np.array([i]))
        box = crops.random_boxes(config.augment, data.eval_crop, side, size, *drawn)[0]
        images[i] = crops.crop_resize(image, box, side, data.interpolation)
    return images


def _our_rest(config: Config, images: torch.Tensor) -> torch.Tensor:
    indices = np.arange(len(images))
    plan = augment.draw_plan(config.augment, images.shape[-1], config.train.seed, 0, indices)
    return augment.finish(augment.augment(images, plan), plan, config.data.mean, config.data.std)


def _reference(side: int) -> Callable[[Image.Image], torch.Tensor]:
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


def _training_step(config: Config, num_classes: int) -> tuple[ViT, Callable[[], object], Resolved]:
    device = pick_device(config.train.device)
    model = build_model(config, num_classes, init=False).to(device)
    prepare_device(config, device)
    resolved = resolve(config, model, device)
    torch.set_num_threads(resolved.threads)
    optimizer = Optimizer(model, config.optim)
    forward = compiled(model, resolved)
    side = config.model.image_size
    images = torch.randn(resolved.micro_batch, CHANNELS, side, side, device=device)
    targets = torch.full((resolved.micro_batch, num_classes), 1 / num_classes, device=device)

    def step() -> None:
        with resolved.autocast():
            loss = loss_sum(forward(images), targets, config.train.loss) / len(images)
        loss.backward()
        optimizer.step(config.optim.lr, loss.detach())

    return model, step, resolved


def _seconds_per_call(function: Callable[[], object], rounds: int) -> float:
    """The median over rounds, each of enough calls to last a quarter of a second."""

    def timed(calls: int) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / calls

    timed(1)
    calls = max(1, round(0.25 / timed(1)))
    return statistics.median(timed(calls) for _ in range(rounds))


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
