"""Fetches records as cropped uint8 images.

Worker processes decode and crop encoded images, or read them for the GPU to decode. Workers gather
the squares of packs, and pixel datasets stay on the device; both are cropped on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from vitral.config import Config, DataConfig
from vitral.data import crops
from vitral.data.decode import DecodeError, decode, decode_on_gpu, gpu_can_decode
from vitral.data.objects import Objects
from vitral.data.records import Encoded, Packed, Pixels, Records
from vitral.data.sampling import Integers
from vitral.data.workers import in_workers
from vitral.errors import reason_of
from vitral.machine import available_cores

T = TypeVar("T")
Decoder = Literal["cpu", "gpu"]
CHUNK = 16  # images decoded before their crops are drawn together
GPU_CHUNK = 32  # images that the GPU decodes and crops together


def resolve_workers(config: DataConfig, records: Records, processes: int = 1) -> int:
    """Returns the number of data workers: none for pixel datasets, which are on the device.

    Args:
        processes: training processes on this machine, which share its cores.
    """
    if isinstance(records, Pixels):
        return 0
    cores = available_cores() // processes - 1
    return max(0, min(16, cores)) if config.workers is None else config.workers


@dataclass(frozen=True)
class Request:
    """Samples to fetch together: the epoch to draw each sample for, and its index, both (B,)."""

    step: int
    first: int
    """Position of the first sample in the global batch."""
    image_size: int
    """Size of the requested images, in pixels."""
    epochs: Integers
    indices: Integers
    views: Integers | None = None
    """Box of each sample among `crops.five_boxes`, instead of a random one, shape (B,)."""


@dataclass(frozen=True)
class Fetched:
    """Samples of a request: uint8 images (B, C, S, S), labels (B,) or, if an image can have
    several, (B, classes), and the broken records."""

    request: Request
    images: Tensor
    labels: Tensor
    broken: list[tuple[int, str]]
    """Index and reason of each record that could not be decoded; other records replaced them."""

    def pin_memory(self) -> Fetched:
        """Pins the images; called by DataLoader, so that the copy to the device is asynchronous."""
        return replace(self, images=self.images.pin_memory())


def fetch(
    records: Records,
    config: Config,
    requests: Iterable[Request],
    workers: int,
    device: torch.device,
    decoder: Decoder = "cpu",
) -> Iterator[Fetched]:
    """Yields the cropped samples of each request, in order.

    They are on `device` if they are cropped there, and otherwise on the CPU.
    """
    gpu = device.type == "cuda"
    if isinstance(records, Pixels):
        return _crop_pixels(records, config, requests, device)
    if isinstance(records, Packed):
        squares = in_workers(_PackedDataset(records, config, crop=not gpu), requests, workers, gpu)
        return _crop_squares(records, config, squares, device) if gpu else squares
    if decoder == "gpu":
        encoded = in_workers(_EncodedDataset(records), requests, workers)
        return (_decode_on_gpu(records, config, read, device) for read in encoded)
    return in_workers(_DecodingDataset(records, config), requests, workers, gpu)


def describe(records: Records, index: int) -> str:
    """Returns the name of a record in messages: its location, or its number."""
    if isinstance(records, Packed | Pixels):
        return f"image {index}"
    return records.where(index)


def _boxes(config: Config, sizes: Integers, request: Request, part: slice) -> Integers:
    if request.views is not None:
        return crops.five_boxes(sizes, config.data.eval_crop, request.views[part])
    return crops.random_boxes(
        config.augment,
        config.data.eval_crop,
        request.image_size,
        sizes,
        config.train.seed,
        request.epochs[part],
        request.indices[part],
        config.data.fit,
    )


class _FetchDataset(Dataset[T]):
    """Base class of the datasets that run in worker processes."""

    def __init__(self, records: Records) -> None:
        self.records = records

    def locations(self, request: Request) -> list[str]:
        """Returns the names of a request's samples in messages."""
        return [describe(self.records, int(i)) for i in request.indices]


class _DecodingDataset(_FetchDataset[Fetched]):
    """Decodes and crops the samples of a request."""

    def __init__(self, records: Encoded, config: Config) -> None:
        super().__init__(records)
        self.encoded = records
        self.config = config

    def __getitem__(self, request: Request) -> Fetched:
        size, data = request.image_size, self.config.data
        images = torch.empty(len(request.indices), 3, size, size, dtype=torch.uint8)
        read = request.indices.copy()
        broken: list[tuple[int, str]] = []
        for first in range(0, len(images), CHUNK):
            part, previous = slice(first, first + CHUNK), -1
            decoded: list[tuple[Tensor, int]] = []
            for i in request.indices[part].tolist():
                same = request.views is not None and i == previous
                decoded.append(decoded[-1] if same else _decode(self.encoded, i, broken))
                previous = i
            sizes = np.array([image.shape[1:] for image, _ in decoded])
            boxes = _boxes(self.config, sizes, request, part)
            for k, ((image, index), box) in enumerate(zip(decoded, boxes, strict=True), first):
                images[k] = crops.crop_resize(image, box, size, data.interpolation, data.fill)
                read[k] = index
        return Fetched(request, images, torch.from_numpy(self.encoded.labels[read]), broken)


def _decode(records: Encoded, index: int, broken: list[tuple[int, str]]) -> tuple[Tensor, int]:
    """Returns image and index of a record, or of the next one that can be decoded.

    If more consecutive records fail than a run tolerates, the image is black, because the run will
    stop.
    """
    for _ in range(CHUNK + len(records) // 1000):
        try:
            decoded = isinstance(records, Objects)
            image = records.image(index) if decoded else decode(records.read(index))
            return image, index
        except (DecodeError, OSError) as error:
            broken.append((index, reason_of(error)))
            index = (index + 1) % len(records)
    return torch.zeros(3, 1, 1, dtype=torch.uint8), index


class _PackedDataset(_FetchDataset[Fetched]):
    """Gathers the packed squares of a request, and crops them unless a GPU does."""

    def __init__(self, records: Packed, config: Config, crop: bool) -> None:
        super().__init__(records)
        self.packed = records
        self.config = config
        self.crop = crop

    def __getitem__(self, request: Request) -> Fetched:
        images = torch.from_numpy(self.packed.squares(request.indices))
        labels = torch.from_numpy(self.packed.labels[request.indices])
        fetched = Fetched(request, images, labels, [])
        return _crop(self.packed, self.config, fetched) if self.crop else fetched


def _crop(records: Packed, config: Config, squares: Fetched) -> Fetched:
    """Draws crops in pixels of the original images, and cuts them out of the squashed squares."""
    request = squares.request
    sides = records.sides[request.indices]
    boxes = _boxes(config, sides, request, slice(None))
    scale = squares.images.shape[-1] / sides
    boxes = boxes * np.hstack([scale, scale])
    data = config.data
    images = crops.resample(
        squares.images, boxes, request.image_size, data.interpolation, data.fill
    )
    return replace(squares, images=images)


def _crop_squares(
    records: Packed, config: Config, batches: Iterator[Fetched], device: torch.device
) -> Iterator[Fetched]:
    for squares in batches:
        images = squares.images.to(device, non_blocking=True)
        yield _crop(records, config, replace(squares, images=images))


def _crop_pixels(
    records: Pixels, config: Config, requests: Iterable[Request], device: torch.device
) -> Iterator[Fetched]:
    pixels, labels = records.images.to(device), torch.from_numpy(records.labels)
    data = config.data
    for request in requests:
        chosen = torch.from_numpy(request.indices)
        images = pixels[chosen.to(device, non_blocking=True)]
        sizes = np.broadcast_to(images.shape[2:], (len(images), 2))
        boxes = _boxes(config, sizes, request, slice(None))
        images = crops.resample(images, boxes, request.image_size, data.interpolation, data.fill)
        yield Fetched(request, images, labels[chosen], [])


@dataclass(frozen=True)
class _EncodedBatch:
    """Encoded bytes of a request's samples, one after another."""

    request: Request
    content: Tensor
    lengths: list[int]
    gpu_readable: NDArray[np.bool_]
    """Whether the GPU's decoder can read each sample. Shape (B,)."""


class _EncodedDataset(_FetchDataset[_EncodedBatch]):
    """Reads the samples of a request for the GPU to decode."""

    def __init__(self, records: Encoded) -> None:
        super().__init__(records)
        self.encoded = records

    def __getitem__(self, request: Request) -> _EncodedBatch:
        contents = [self._read(int(index)) for index in request.indices]
        gpu_readable = np.array([gpu_can_decode(content) for content in contents], bool)
        joined = np.frombuffer(b"".join(contents), np.uint8).copy()
        return _EncodedBatch(
            request, torch.from_numpy(joined), [len(c) for c in contents], gpu_readable
        )

    def _read(self, index: int) -> bytes:
        try:
            return self.encoded.read(index)
        except (DecodeError, OSError):
            return b""  # fails again when decoded, and is then replaced


def _decode_on_gpu(
    records: Encoded, config: Config, read: _EncodedBatch, device: torch.device
) -> Fetched:
    request, broken = read.request, []
    indices = request.indices.copy()
    contents = read.content.split(read.lengths)
    shape = (len(contents), 3, request.image_size, request.image_size)
    images = torch.empty(shape, dtype=torch.uint8, device=device)
    for first in range(0, len(contents), GPU_CHUNK):
        part = slice(first, first + GPU_CHUNK)
        decoded = decode_on_gpu(contents[part], read.gpu_readable[part], device)
        for k, image in enumerate(decoded):
            if image is None:
                image, indices[first + k] = _decode(records, int(indices[first + k]), broken)
                decoded[k] = image.to(device)
        complete = [image for image in decoded if image is not None]
        sizes = np.array([image.shape[1:] for image in complete])
        boxes = _boxes(config, sizes, request, part)
        images[part] = _crop_ragged(complete, boxes, request.image_size, config.data)
    return Fetched(request, images, torch.from_numpy(records.labels[indices]), broken)


def _crop_ragged(images: list[Tensor], boxes: Integers, size: int, config: DataConfig) -> Tensor:
    """Crops images of different sizes and resizes them together; returns (B, 3, size, size)."""
    height, width = (max(int(n), 1) for n in boxes[:, 2:].max(0))
    color = images[0].new_tensor(config.fill).view(1, 3, 1, 1)
    stacked = color.repeat(len(images), 1, height, width)
    for place, image, (top, left, h, w) in zip(stacked, images, boxes.tolist(), strict=True):
        y, x = max(-top, 0), max(-left, 0)
        crop = image[:, max(top, 0) : max(top + h, 0), max(left, 0) : max(left + w, 0)]
        place[:, y : y + crop.shape[1], x : x + crop.shape[2]] = crop
    complete = np.hstack([np.zeros_like(boxes[:, :2]), boxes[:, 2:]])
    return crops.resample(stacked, complete, size, config.interpolation)
