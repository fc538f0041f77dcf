"""The plan of a training run (`--dry-run`), and its rate compared with that of its steps alone."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

from vitral import settings
from vitral.bench import rounds
from vitral.bench.describe import describe_device, describe_size
from vitral.bench.rounds import interleaved_rates, ratios, table
from vitral.config import Config
from vitral.data.fetch import resolve_workers
from vitral.data.formats import open_dataset
from vitral.data.sampling import Order
from vitral.data.splits import Dataset
from vitral.data.tools.rates import choose_decoder, endless_batches
from vitral.errors import counted
from vitral.machine import available_cores, pick_device
from vitral.rundir import RunDir, duration
from vitral.training import budget, resume
from vitral.training.distributed import World
from vitral.training.estimate import estimate
from vitral.training.run import prepare
from vitral.training.work import Training


def plan(request: settings.Request) -> str:
    """Returns the settings, model size, number of steps and estimated time (`--dry-run`).

    The model is built on the meta device; the estimate times a single block.

    Raises:
        UserError: if `train` would raise it before its first step, except for errors in images, in
            the tensors of checkpoints, or of the machine.
    """
    run, device = RunDir(request.config.train.out or ""), pick_device(request.config.train.device)
    request = budget.fit_time_budget(request, run, World())
    config, notes, dataset, model = prepare(request.config, run, World(), device="meta")
    assert dataset.train is not None
    resume.check_resumable(config, run, dataset)
    if config.data.decode == "gpu":
        choose_decoder(dataset.train, config, 0, device)
    train, classes = config.train, len(dataset.classes)
    steps = Order(train.seed, len(dataset.train), train.batch_size).end_of_epoch(train.epochs)
    per_image, per_step = estimate(config, classes)
    seconds = steps * (train.batch_size * per_image + per_step)
    lines = [
        settings.dump(config),
        *describe_size(config, model, classes),
        f"data        {_describe(dataset)}",
        *(f"note        {n}" for n in (*request.notes, *notes) if n not in dataset.notes),
        f"steps       {steps:,} of {train.batch_size} images",
        f"time        about {duration(seconds)} for the steps on {device.type}, "
        "if the input keeps up",
    ]
    return "\n".join(lines)


def bench_train(config: Config) -> str:
    """Measures training, and the same steps on one batch that stays on the device."""
    dataset = open_dataset(config.data, config.model.image_size, config.train.seed)
    records, classes = dataset.train, len(dataset.classes)
    assert records is not None
    training = Training(config, classes, config.image_size_at(0))
    device, resolved = training.device, training.resolved
    workers = resolve_workers(config.data, records)
    decoder, _ = choose_decoder(records, config, workers, device)

    def synthetic() -> float:
        return training.rate(itertools.repeat(training.batch), seconds=rounds.SECONDS)

    def real() -> float:
        size = resolved.micro_batch
        batches = endless_batches(records, config, classes, size, workers, device, decoder)
        return training.rate(batches, workers, rounds.SECONDS)

    found = interleaved_rates({"synthetic": synthetic, "training": real})
    ratio = statistics.median(ratios(found["training"].rates, found["synthetic"].rates))
    B, _, S, _ = training.batch.images.shape
    lines = [
        *describe_size(config, training.model, classes),
        f"device      {describe_device(resolved)}",
        f"data        {_describe(dataset)}",
        f"input       decoder {decoder}, workers {workers}, cores {available_cores()}, "
        f"micro-batches of {B} images of {S} pixels",
        *table(found),
        f"ratio       {ratio:.1%} of the synthetic rate, medians of {rounds.ROUNDS} "
        "interleaved rounds",
    ]
    return "\n".join(lines)


def _describe(dataset: Dataset) -> str:
    assert dataset.train is not None
    assert dataset.val is not None
    notes = "".join(f"; {note}" for note in dataset.notes)
    return (
        f"{Path(dataset.name).name}: {counted(len(dataset.train), 'training image')}, "
        f"{counted(len(dataset.val), 'validation image')}, "
        f"{counted(len(dataset.classes), 'class')}{notes}"
    )
