"""Chooses the number of epochs for a time budget by timing training and validation once."""

from __future__ import annotations

import bisect
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch

from vitral.config import Config, flatten
from vitral.data.fetch import resolve_workers
from vitral.data.formats.objects import PythonDatasets, open_data
from vitral.data.loader import Batch, eval_batches
from vitral.data.records import Packed, Pixels
from vitral.data.splits import Dataset
from vitral.data.tools.rates import choose_decoder, endless_batches, synchronize
from vitral.errors import UserError, counted
from vitral.machine import pick_device
from vitral.model import count_flops
from vitral.rundir import RunDir, duration
from vitral.settings import Request, adjust_to_epochs, load, replaced
from vitral.training.distributed import World
from vitral.training.estimate import estimate, mean_work, preserve_torch_state
from vitral.training.frozen import freeze
from vitral.training.plan import Plan
from vitral.training.resolved import build_model
from vitral.training.work import Inference, Training

MIN_EPOCHS = 5  # if fewer fit at the recipe's image size, the image size is reduced
MEASURING_FRACTION = 0.05  # fraction of the budget spent on each measurement
MAX_MEASURING_SECONDS = 10.0  # limit on each measurement
OUTPUT_SECONDS = (
    2.0  # time to draw the curves and write the report, including the import of matplotlib
)
DISK_RATE = 200e6  # bytes/s at which weights and checkpoints are hashed and written
FIT_SECONDS = 3e-6  # time to fit a head, per element of the features
SAVED_COPIES = 8  # copies of the weights per validation: last, best, EMA of both, and a checkpoint
ADJUSTABLE = (
    "train.epochs",
    "train.eval_every",
    "train.ema_decay",
    "optim.warmup_epochs",
    "model.image_size",
)


class Costs(NamedTuple):
    """Durations of the parts of a run, in seconds."""

    fixed: float
    """Time before the first step and after the last validation."""
    step: float
    """One step, including reading and augmenting its images."""
    validation: float
    """One validation, including the moving average and writing weights and a checkpoint."""

    def total(self, config: Config, num_images: int) -> float:
        """Returns the duration of a run on `num_images` training images, in seconds."""
        plan = Plan.of(config, num_images)
        return self.fixed + plan.total * self.step + len(plan.evaluations) * self.validation


def fit_time_budget(
    request: Request, run: RunDir, world: World, data: PythonDatasets | None = None
) -> Request:
    """Returns the request with the number of epochs that fit in its time budget.

    An existing run keeps the settings that were chosen when it was new. Without a budget among the
    options, the request is returned unchanged: a budget next to `epochs` in a recipe records an
    earlier choice.

    Raises:
        UserError: if not even one epoch fits, or the data cannot be read.
    """
    budget = request.config.train.time_budget
    if budget is None or "train.time_budget" not in request.given:
        return request
    if run.config.exists():
        existing = load(str(run.config))
        if existing.train.time_budget is None:
            return request  # later rejected, because the settings differ
        values = {
            p: v for p, v in flatten(existing).items() if p in ADJUSTABLE and p not in request.given
        }
        return dataclasses.replace(request, config=replaced(request.config, values))
    config = world.broadcast(
        world.run_on_all_ranks(lambda: _choose(request, budget, world.size, data))
    )
    before, after = flatten(request.config), flatten(config)
    changes = [f"{p} {before[p]:g} -> {after[p]:g}" for p in ADJUSTABLE if before[p] != after[p]]
    note = f"train.time_budget {duration(budget)}: {', '.join(changes) or 'no changes'}"
    return dataclasses.replace(request, config=config, notes=(*request.notes, note))


def max_epochs(
    config: Config, given: frozenset[str], costs: Costs, num_images: int, seconds: float
) -> int:
    """Returns the largest number of epochs that fit, or 0.

    Args:
        given: dotted names of the settings that must not change.
        num_images: number of training images.
        seconds: time available for the run.
    """
    fewest = _min_epochs(config, given)

    def seconds_of(epochs: int) -> float:
        return costs.total(with_epochs(config, given, epochs), num_images)

    upper_bound = fewest + int(seconds / (costs.step * num_images / config.train.batch_size))
    found = bisect.bisect_right(range(fewest, upper_bound + 1), seconds, key=seconds_of)
    return fewest + found - 1 if found else 0


def with_epochs(config: Config, given: frozenset[str], epochs: int) -> Config:
    """Returns the settings for a different number of epochs, as adjusted by `adjust_to_epochs`."""
    own = flatten(config)
    fixed = {path: own[path] for path in given} | {"train.epochs": epochs}
    return replaced(config, adjust_to_epochs(own, fixed) | {"train.epochs": epochs})


def measure(
    config: Config, processes: int, data: PythonDatasets | None = None
) -> tuple[Costs, int]:
    """Measures the costs of a run on this machine; also returns the number of training images.

    Training is timed on the real input, with a copy of the model and with micro-batches small
    enough to measure the rate within seconds.
    """
    began, seconds = time.perf_counter(), _seconds_to_measure(config)
    dataset = open_data(config, data)
    assert dataset.train is not None
    opened = time.perf_counter() - began
    classes, device = len(dataset.classes), pick_device(config.train.device)
    workers = resolve_workers(config.data, dataset.train)
    if config.train.trainable == "head":
        return _measure_head(config, dataset, opened, workers, seconds, processes)
    full_size = replaced(config, {"train.progressive": ()})
    per_image, per_step = estimate(full_size, classes)
    began = time.perf_counter()
    with preserve_torch_state():
        model = build_model(full_size, classes)
        freeze(model, config.train.trainable)
        training = Training(full_size, classes, config.model.image_size, model)
        wave, max_images = max(1, workers), training.resolved.micro_batch
        size = max(2, min(max_images, 2 * int(seconds / (2 * wave * per_image))))
        decoder, _ = choose_decoder(dataset.train, config, workers, device)
        batches = endless_batches(dataset.train, full_size, classes, size, workers, device, decoder)
        built = time.perf_counter() - began
        first, per_image = _measure_seconds(batches, training.accumulate, wave, seconds, device)
        validation, checking = _validation(training, dataset, size, workers, seconds)
    per_step += config.train.batch_size / processes * per_image * mean_work(config, classes)
    averages = 2 if config.train.ema_decay else 1
    saving = SAVED_COPIES * 4 * training.model.num_parameters / DISK_RATE
    fixed = opened + built + first + checking + OUTPUT_SECONDS
    if config.train.probe_first:  # a forward pass is a third of the work of a step
        images = len(dataset.train)
        fixed += images * (per_image / 3 / processes + config.model.shape.dim * FIT_SECONDS)
    costs = Costs(fixed, per_step, averages * validation / processes + saving)
    return costs, len(dataset.train)


def _measure_head(
    config: Config,
    dataset: Dataset,
    opened: float,
    workers: int,
    seconds: float,
    processes: int,
) -> tuple[Costs, int]:
    """Performs `measure` for a run that only fits a head: its steps are forward passes."""
    began, device = time.perf_counter(), pick_device(config.train.device)
    assert dataset.train is not None
    assert dataset.val is not None
    with preserve_torch_state():
        work = Inference(config, len(dataset.classes), config.model.image_size)
        engine = work.resolved.for_inference(work.model)
        size = min(work.resolved.micro_batch, len(dataset.train))
        batches = eval_batches(dataset.train, config, size, workers, device)

        def forward(batch: Batch) -> None:
            with torch.no_grad(), work.resolved.autocast():
                engine(batch.images)

        built = time.perf_counter() - began
        first, per_image = _measure_seconds(batches, forward, max(1, workers), seconds, device)
    images = len(dataset.train)
    saving = 3 * 4 * work.model.num_parameters / DISK_RATE  # last, best and a checkpoint
    costs = Costs(
        opened + built + first + OUTPUT_SECONDS + images * config.model.shape.dim * FIT_SECONDS,
        config.train.batch_size * per_image / processes,
        len(dataset.val) * per_image / processes + saving,
    )
    return costs, images


def _choose(request: Request, budget: float, processes: int, data: PythonDatasets | None) -> Config:
    """Returns the settings that fit, with smaller images if too few epochs would fit."""
    config, given = request.config, request.given
    costs, images = measure(config, processes, data)
    left = budget - (time.monotonic() - request.started)
    min_epochs = 1 if config.train.trainable == "head" else MIN_EPOCHS
    image_sizes, full_flops = _image_sizes(config, given), count_flops(config.model, 10)

    def fits(image_size: int) -> bool:
        scale = count_flops(config.model, 10, image_size) / full_flops
        scaled = Costs(costs.fixed, costs.step * scale, costs.validation * scale)
        return max_epochs(config, given, scaled, images, left) >= min_epochs

    image_size = next(filter(fits, image_sizes), image_sizes[-1])
    if image_size != config.model.image_size:
        config = replaced(config, {"model.image_size": image_size})
        costs, images = measure(config, processes, data)
        left = budget - (time.monotonic() - request.started)
    if epochs := max_epochs(config, given, costs, images, left):
        return with_epochs(config, given, epochs)
    fewest = _min_epochs(config, given)
    needed = budget - left + costs.total(with_epochs(config, given, fewest), images)
    raise UserError(
        f"train.time_budget: expected at least {duration(math.ceil(needed))} for "
        f"{counted(fewest, 'epoch')} at {config.model.image_size} pixels, got {duration(budget)}; "
        "allow more time or choose a smaller model"
    )


def _min_epochs(config: Config, given: frozenset[str]) -> int:
    return int(config.optim.warmup_epochs) + 1 if "optim.warmup_epochs" in given else 1


def _image_sizes(config: Config, given: frozenset[str]) -> list[int]:
    """Returns the image sizes to try, from the recipe's down to half of it."""
    image_size, patch = config.model.image_size, config.model.patch_size
    if "model.image_size" in given or config.train.progressive:
        return [image_size]
    return [*range(image_size, (image_size - 1) // 2, -patch)]


def _seconds_to_measure(config: Config) -> float:
    return min(MAX_MEASURING_SECONDS, MEASURING_FRACTION * (config.train.time_budget or math.inf))


def _validation(
    training: Training, dataset: Dataset, size: int, workers: int, seconds: float
) -> tuple[float, float]:
    """Estimates the seconds of a validation, and of decoding its images, from the first batches."""
    records, device = dataset.val, training.device
    assert records is not None
    size = min(size, len(records))
    batches = partial(eval_batches, records, training.config, size, workers, device)

    def forward(batch: Batch) -> None:
        with torch.no_grad(), training.resolved.autocast():
            training.accumulator.forward(batch.images)

    def seconds_of(work: Callable[[Batch], object]) -> float:
        first, per_image = _measure_seconds(batches(), work, max(1, workers), seconds, device)
        return first + max(0, len(records) - max(1, workers) * size) * per_image

    training.model.eval()
    decoded = isinstance(records, Packed | Pixels)
    return seconds_of(forward), 0.0 if decoded else seconds_of(lambda _: None)


def _measure_seconds(
    batches: Iterator[Batch],
    work: Callable[[Batch], object],
    wave: int,
    seconds: float,
    device: torch.device,
) -> tuple[float, float]:
    """Returns the seconds of the first wave of batches, and the seconds per image after it."""

    def do_wave() -> int:
        images = 0
        for batch in islice(batches, wave):
            work(batch)
            images += len(batch.targets)
        synchronize(device)
        return images

    started = time.perf_counter()
    images = do_wave()
    begun = now = time.perf_counter()
    found = 0
    while now - begun < seconds and (more := do_wave()):
        found, now = found + more, time.perf_counter()
    return begun - started, (now - begun) / found if found else (begun - started) / images
