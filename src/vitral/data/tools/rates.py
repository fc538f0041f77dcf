"""How fast each way in is, the choice of one, and whether it feeds the model."""

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

BATCH = 256  # images at most of a batch that is measured
UNLIMITED_STEPS = 1 << 40  # steps, of which only the first few are taken
MAX_WAIT_FRACTION = 0.05  # share of the time up to which waiting for input is no matter


def choose_decoder(
    records: Records, config: Config, workers: int, device: torch.device
) -> tuple[Decoder, dict[Decoder, float]]:
    """The decoder that `data.decode` asks for; for "auto" the fastest, if there are several.

    Returns:
        The decoder, and the images per second of each that was measured.

    Raises:
        UserError: if the GPU is to decode what it cannot, or there is none.
    """
    asked, found = config.data.decode, decoders(records, device)
    if asked == "gpu" and "gpu" not in found:
        got = f"a {device.type} device"
        if isinstance(records, Packed | Pixels | Objects):
            got = "images that are decoded already"
        elif device.type == "cuda":
            got = "a torchcodec without nvJPEG"
        raise UserError(
            f"data.decode: gpu: expected JPEGs and a GPU that decodes them, got {got}; "
            "give --data.decode cpu"
        )
    if asked != "auto":
        return asked, {}
    if config.train.reproducible:
        return "cpu", {}  # what is measured may come out otherwise next time
    if len(found) == 1:
        return found[0], {}
    rates = measure_rates(records, config, workers, device)
    return max(rates, key=lambda decoder: rates[decoder]), rates


def decoders(records: Records, device: torch.device) -> tuple[Decoder, ...]:
    """Who can decode these records here; "cpu" stands for all that needs no decoding, too."""
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
    """Images per second of each decoder, from the records to augmented batches on the device."""
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
    """Images per second of one decoder, from the records to augmented batches on the device.

    Args:
        seconds: to measure for at least; starting workers comes on top.
        part: of the order to read, so that a second measurement finds no files cached by the first.
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
    """Batches as they are at the start of a training, from another `part` of the order."""
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
    """The rate at which an endless iterator does its work, when its workers are under way.

    They begin together, so that their batches come in waves: whole ones are waited for.

    Args:
        counts: images of one batch after the other.
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
    """Whether the input keeps up with the model, which waits for it this share of the time."""
    if waited <= MAX_WAIT_FRACTION:
        return f"input feeds the model (it waits {waited:.0%} of the time)"
    fix = "" if packed else ", or pack the images with `vitral data pack`"
    return (
        f"input starves the model by {1 / (1 - waited):.1f}x: it waits {waited:.0%} of the time; "
        f"give more --data.workers where cores are idle{fix}"
    )
