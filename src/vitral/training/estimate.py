"""Estimates the training time on this machine from the time of one encoder block."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from vitral.compat import backward_of_ones
from vitral.config import Config, TrainConfig, ViTConfig
from vitral.data.splits import Dataset
from vitral.data.tools.rates import synchronize
from vitral.machine import has_gpu
from vitral.model import ViT, count_flops
from vitral.settings import replaced
from vitral.training.optim import EMA
from vitral.training.resolved import compiled
from vitral.training.work import Inference, Training

MIN_IMAGES = 2  # images in the first timing on a CPU; doubled until one takes MIN_TIME
MIN_TIME = 0.3  # seconds
LONG_RUN = 1800.0  # seconds of training above which a run is compared with a pretrained model
MIN_FLOP_RATE = 5e9  # FLOP/s that every machine reaches
PUBLIC_MODEL = "timm:vit_small_patch14_reg4_dinov2.lvd142m"
PUBLIC_SHAPE = ViTConfig(
    size="s", num_kv_heads=6, patch_size=14, image_size=14, num_registers=4, layer_scale=1e-5,
    positions="learned", rope="none", activation="gelu",
)  # fmt: skip
NUM_TRIALS = 3  # the fastest one counts, because other work slows down the others


class Estimate(NamedTuple):
    """Training time without reading and augmenting images."""

    per_image: float
    """Seconds of the forward and backward pass of an image, averaged over all image sizes."""
    per_step: float
    """Seconds of the optimizer and the moving average per step."""


def estimate(config: Config, num_classes: int) -> Estimate:
    """Times a model with one block and the block alone, and extrapolates to the full depth.

    The time of further blocks is proportional to their FLOPs, which stochastic depth reduces. The
    time of the optimizer is proportional to the number of parameters.
    """
    flops = partial(count_flops, num_classes=num_classes, training=True)
    shallow = replaced(config, {"model.depth": 1, "model.stochastic_depth": 0.0})
    deeper = replaced(shallow, {"model.depth": 2}).model
    block_flops = flops(deeper) - flops(shallow.model)
    num_further = (flops(config.model) - flops(shallow.model)) / block_flops
    with preserve_torch_state():
        training = Training(shallow, num_classes, config.model.image_size)
        max_images, parameters = len(training.batch.images), training.model.num_parameters
        first = _seconds_per_image(
            partial(_forward_backward, training), max_images, training.device
        )
        block = _seconds_per_image(block_forward_backward(training), max_images, training.device)
        step = _seconds_of_step(training)
    per_image = (first + num_further * block) * mean_work(config, num_classes)
    return Estimate(per_image, step * meta_model(config, num_classes).num_parameters / parameters)


def compare_with_frozen(config: Config, dataset: Dataset, num_steps: int) -> str:
    """Compares the time of a run with that of one pass of all images through a pretrained model.

    Returns:
        A message; empty for a run of at most LONG_RUN seconds, or one that starts from weights.
    """
    train, classes = config.train, len(dataset.classes)
    flops = 3 * count_flops(config.model, classes) * num_steps * train.batch_size
    if train.init is not None or flops < LONG_RUN * MIN_FLOP_RATE:  # not worth an estimate
        return ""
    found = estimate(config, classes)
    scratch = num_steps * (train.batch_size * found.per_image + found.per_step)
    if scratch <= LONG_RUN:
        return ""
    images = sum(len(records) for records in (dataset.train, dataset.val) if records is not None)
    return (
        f"from scratch: about {_format_duration(scratch)} on this machine; "
        f"with --init {PUBLIC_MODEL}: about {_format_duration(images * _frozen_seconds(config))}"
    )


def meta_model(config: Config, num_classes: int) -> ViT:
    """Returns the model of a run on the meta device, which has shapes but no data."""
    with torch.device("meta"):
        return ViT(config.model, num_classes)


@contextlib.contextmanager
def preserve_torch_state() -> Iterator[None]:
    """Restores torch's random state and number of threads on exit."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng([torch.cuda.current_device()] if has_gpu() else []):
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def block_forward_backward(training: Training) -> Callable[[int], None]:
    """Returns a function that runs both passes of the first block on a number of images."""
    model, resolved = training.model, training.resolved
    config, device, block = model.config, training.device, compiled(model.blocks[0], resolved)
    grid_size = config.image_size // config.patch_size
    tables = (None, None)
    if config.rope != "none":
        with torch.no_grad():
            tables = model.rope(grid_size, grid_size, device)[0]
    if config.activation_checkpointing:
        block = partial(checkpoint, block, use_reentrant=False)
    shape = (len(training.batch.images), config.num_prefix + grid_size**2, config.shape.dim)
    tokens = torch.randn(shape, device=device, requires_grad=True)

    def run(count: int) -> None:
        with resolved.autocast():
            out = block(tokens[:count], *tables)
        backward_of_ones(out)

    return run


def _frozen_seconds(config: Config) -> float:
    """Returns the seconds of a forward pass of PUBLIC_MODEL on an image of about the run's size."""
    patch = PUBLIC_SHAPE.patch_size
    image_size = max(1, round(config.model.image_size / patch)) * patch
    public = dataclasses.replace(PUBLIC_SHAPE, image_size=image_size)
    shallow = dataclasses.replace(public, depth=1)
    train = TrainConfig(device=config.train.device, threads=config.train.threads)
    with preserve_torch_state():
        work = Inference(Config(model=shallow, train=train), 0, image_size)

        def run(count: int) -> None:
            images = work.batch.images[:count]
            work.step(dataclasses.replace(work.batch, images=images))

        seconds = _seconds_per_image(run, len(work.batch.images), work.device)
    return seconds * count_flops(public, 0) / count_flops(shallow, 0)


def _format_duration(seconds: float) -> str:
    return f"{seconds / 3600:,.0f} h" if seconds >= 7200 else f"{max(1.0, seconds / 60):.0f} min"


def _forward_backward(training: Training, count: int) -> torch.Tensor:
    """Runs both passes of the model on a number of images; returns their loss."""
    images, targets = training.batch.images[:count], training.batch.targets[:count]
    batch = dataclasses.replace(training.batch, images=images, targets=targets)
    return training.accumulate(batch)


def _seconds_per_image(
    run: Callable[[int], object], max_images: int, device: torch.device
) -> float:
    """Times `run`, whose argument is a number of images, at most `max_images`."""
    count = min(MIN_IMAGES, max_images) if device.type == "cpu" else max_images
    while True:
        run(count)  # allocates, imports and compiles
        seconds = min(_seconds(partial(run, count), device) for _ in range(NUM_TRIALS))
        if count == max_images or seconds > MIN_TIME:
            return seconds / count
        count = min(2 * count, max_images)  # in a small model, overhead dominates


def _seconds_of_step(training: Training) -> float:
    config, model = training.config, training.model
    average = EMA(model, config.train.ema_decay) if config.train.ema_decay else None

    def step() -> None:
        _, skipped = training.optimizer.step(config.optim.lr, loss)
        if average is not None:
            average.update(1, skipped)

    times = []
    for _ in range(1 + NUM_TRIALS):  # the first creates the optimizer's state
        loss = _forward_backward(training, MIN_IMAGES)
        times.append(_seconds(step, training.device))
    return min(times[1:])


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def mean_work(config: Config, num_classes: int) -> float:
    """Returns the mean FLOPs of a step, relative to a step at the model's image size."""
    terms = [
        fraction * count_flops(config.model, num_classes, n)
        for n, fraction in config.train.progressive
    ]
    return sum(terms) / count_flops(config.model, num_classes) if terms else 1.0
