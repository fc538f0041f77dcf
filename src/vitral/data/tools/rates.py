"""Measures input rates, chooses a decoder, and reports whether the model waits for input."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torchcodec.decoders import decode_jpeg

from vitral.config import Config
from vitral.data.fetch import Decoder
from vitral.data.loader import Batch, train_batches
from vitral.data.objects import Objects
from vitral.data.records import Packed, Pixels, Records
from vitral.errors import UserError
from vitral.machine import synchronize

BATCH = 256  # maximum number of images in a measured batch
UNLIMITED_STEPS = 1 << 40  # only the first few steps are taken
MAX_WAIT_FRACTION = 0.05  # maximum fraction of the time that the model may wait for input


def choose_decoder(
    records: Records, config: Config, workers: int, device: torch.device
) -> tuple[Decoder, dict[Decoder, float]]:
    """Returns the decoder that `data.decode` selects; for "auto", the fastest if there are several.

    Returns:
        The decoder, and the images per second of each measured decoder.

    Raises:
        UserError: if "gpu" is selected, but there is no GPU or it cannot decode these images.
    """
    asked, found = config.data.decode, decoders(records, device)
    if asked == "gpu" and "gpu" not in found:
        got = f"a {device.type} device"
        if isinstance(records, Packed | Pixels | Objects):
            got = "images that are already decoded"
        elif device.type == "cuda":
            got = "a torchcodec without nvJPEG"
        raise UserError(
            f"data.decode: gpu: expected JPEGs and a GPU that decodes them, got {got}; "
            "pass --data.decode cpu"
        )
    if asked != "auto":
        return asked, {}
    if config.train.reproducible:
        return "cpu", {}  # measurements may differ in the next run
    if len(found) == 1:
        return found[0], {}
    rates = measure_rates(records, config, workers, device)
    return max(rates, key=lambda decoder: rates[decoder]), rates


def decoders(records: Records, device: torch.device) -> tuple[Decoder, ...]:
    """Returns the decoders for these records on this device; "cpu" if nothing needs decoding."""
    if isinstance(records, Packed | Pixels | Objects) or device.type != "cuda":
        return ("cpu",)
    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, "JPEG")
    try:
        decode_jpeg([content.getvalue()], mode="RGB", device=device)
    except RuntimeError:
        return ("cpu",)
    return ("cpu", "gpu")


def measure_rates(
    records: Records, config: Config, workers: int, device: torch.device, seconds: float = 2.0
) -> dict[Decoder, float]:
    """Measures the img/s of each decoder, from the records to augmented batches on the device."""
    return {
        decoder: measure_rate(records, config, workers, device, decoder, seconds, part)
        for part, decoder in enumerate(decoders(records, device))
    }


def measure_rate(
    records: Records,
    config: Config,
    workers: int,
    device: torch.device,
    decoder: Decoder,
    seconds: float,
    part: int = 0,
) -> float:
    """Measures the img/s of one decoder, from the records to augmented batches on the device.

    Args:
        seconds: minimum duration of the measurement, in addition to starting the workers.
        part: part of the order to read; a second measurement uses a different one, because the
            first one caches files.
    """
    size, classes = min(config.train.batch_size, BATCH), int(np.max(records.labels)) + 1
    batches = endless_batches(records, config, classes, size, workers, device, decoder, part)
    return images_per_second((len(batch.images) for batch in batches), workers, device, seconds)


def endless_batches(
    records: Records,
    config: Config,
    num_classes: int,
    micro_batch: int,
    workers: int,
    device: torch.device,
    decoder: Decoder,
    part: int = 0,
) -> Iterator[Batch]:
    """Yields batches as at the start of training, from a `part` of the order."""
    return train_batches(
        records,
        config,
        num_classes,
        steps=range(part << 20, UNLIMITED_STEPS),
        total_steps=UNLIMITED_STEPS,
        micro_batch=micro_batch,
        workers=workers,
        device=device,
        decoder=decoder,
    )


def images_per_second(
    counts: Iterator[int], workers: int, device: torch.device, seconds: float
) -> float:
    """Measures the rate of an endless iterator once its workers are running.

    Workers start together, so their batches come in waves. Only complete waves are counted.

    Args:
        counts: number of images in each batch.
    """
    wave = max(1, workers)
    for _ in range(wave):
        next(counts)
    synchronize(device)
    images, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        images += sum(next(counts) for _ in range(wave))
    synchronize(device)
    return images / (time.perf_counter() - started)


def input_speed_message(waited: float, *, packed: bool) -> str:
    """Reports whether the input keeps up with the model, given the fraction of time it waits."""
    if waited <= MAX_WAIT_FRACTION:
        return f"input keeps up with the model, which waits {waited:.0%} of the time"
    fix = "" if packed else ", or pack the images with `vitral data pack`"
    return (
        f"input slows the model down {1 / (1 - waited):.1f}x: the model waits {waited:.0%} of the "
        f"time; increase --data.workers if cores are idle{fix}"
    )
