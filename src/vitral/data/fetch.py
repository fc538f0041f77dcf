"""Records become cropped uint8 images on the device, by the way that suits what holds them.

Encoded images are decoded and cropped by worker processes, or read by them and decoded by the GPU;
packed squares are gathered by workers, and pixel sets lie on the device: both are cropped there.
The ways are in one file because they share the workers and what happens when these fail or hang.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import secrets
import signal
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitral.compat import (
    abandon_loader,
    is_loader_timeout,
    loader_workers,
    wrap_exception,
)
from vitral.config import Config, DataConfig
from vitral.data import crops
from vitral.data.decode import DecodeError, decode, decode_on_gpu, gpu_decodes
from vitral.data.objects import Objects
from vitral.data.records import Encoded, Packed, Pixels, Records
from vitral.data.sampling import Integers
from vitral.errors import UserError, first_few
from vitral.files import is_exhausted
from vitral.machine import available_cores

T = TypeVar("T")
Decoder = Literal["cpu", "gpu"]
_started = weakref.WeakSet[BaseProcess]()  # workers
CHUNK = 16  # images decoded before their crops are drawn together
TICK, PATIENCE = 5, 60  # seconds without a batch, until it is looked into and said
GPU_CHUNK = 32  # images that the GPU decodes and crops together


def resolve_workers(config: DataConfig, records: Records, processes: int = 1) -> int:
    """The number of fetching processes: none for pixel sets, which lie on the device.

    Args:
        processes: that train on this machine and share its cores.
    """
    if isinstance(records, Pixels):
        return 0
    cores = available_cores() // processes - 1
    return max(0, min(16, cores)) if config.workers is None else config.workers


@dataclass(frozen=True)
class Request:
    """Samples to fetch together: the epoch to draw each for and its index, both (B,)."""

    step: int
    first: int
    """Place of the first sample in the global batch."""
    side: int
    """Of the images wanted, in pixels."""
    epochs: Integers
    indices: Integers


@dataclass(frozen=True)
class Fetched:
    """The samples of a request: uint8 images (B, C, S, S), labels (B,), and what was broken."""

    request: Request
    images: Tensor
    labels: Tensor
    broken: list[tuple[int, str]]
    """Records that could not be decoded, with the reason; others took their place."""

    def pin_memory(self) -> Fetched:
        """Called by DataLoader, so that the copy to the device need not be waited for."""
        return replace(self, images=self.images.pin_memory())


def fetch(
    records: Records,
    config: Config,
    requests: Iterable[Request],
    workers: int,
    device: torch.device,
    decoder: Decoder = "cpu",
) -> Iterator[Fetched]:
    """The samples of each request, in order, cropped; those of Pixels and a GPU's on `device`."""
    gpu = device.type == "cuda"
    if isinstance(records, Pixels):
        return _crop_pixels(records, config, requests, device)
    if isinstance(records, Packed):
        squares = in_workers(_Gathering(records, config, crop=not gpu), requests, workers, gpu)
        return _crop_squares(records, config, squares, device) if gpu else squares
    if decoder == "gpu":
        encoded = in_workers(_Reading(records), requests, workers)
        return (_decode_on_gpu(records, config, read, device) for read in encoded)
    return in_workers(_Decoding(records, config), requests, workers, gpu)


def describe(records: Records, index: int) -> str:
    """What to call a record in a message: its place, or its number."""
    if isinstance(records, Packed | Pixels):
        return f"image {index}"
    return records.where(index)


def in_workers(
    dataset: Dataset[T], requests: Iterable[Any], workers: int, pin_memory: bool = False
) -> Iterator[T]:
    """What `dataset` has for each request, in order, fetched by worker processes.

    Where they cannot be started, fewer or none do the work, and a line on stderr says so. Another
    line says what is waited for if nothing comes for a minute; a dataset's `places(request)` names
    it.
    """
    pending: deque[Any] = deque()
    asked, reason = workers, ""
    if workers and multiprocessing.current_process().daemon:
        workers, reason = 0, "a daemonic process may not have children"

    def handed_out() -> Iterator[Any]:
        for request in requests:
            pending.append(request)
            yield request

    source = handed_out()
    while True:
        try:
            batches = _start(dataset, source, workers, pin_memory)
            break
        except (OSError, RuntimeError) as error:
            if not workers:
                raise
            workers, reason = workers // 2, getattr(error, "strerror", None) or str(error)
    if reason:
        _say(f"{workers} of {asked} data workers can be started: {reason}")
    _started.update(loader_workers(batches))
    return _watched(batches, pending, getattr(dataset, "places", None))


def _start(
    dataset: Dataset[T], requests: Iterator[Any], workers: int, pin_memory: bool
) -> Iterator[T]:
    """The batches of a DataLoader. Raises OSError or RuntimeError, with no worker left."""
    before = {*multiprocessing.active_children()}
    with warnings.catch_warnings():
        # More workers than cores is what was asked for. And CUDA has threads in every process that
        # uses it, which Python 3.12 warns of: workers use no CUDA.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        warnings.filterwarnings("ignore", message="This process .* is multi-threaded")
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=requests,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            timeout=TICK if workers else 0,
            worker_init_fn=_prepare_worker,
            multiprocessing_context="fork" if workers and hasattr(os, "fork") else None,
        )
        try:
            return iter(loader)
        except BaseException as error:
            abandon_loader(error)
            for child in {*multiprocessing.active_children()} - before:
                child.kill()  # it ignores SIGTERM, by which Python would end it
                child.join()
            raise


def _watched(
    batches: Iterator[T], pending: deque[Any], places: Callable[[Any], list[str]] | None
) -> Iterator[T]:
    """The batches; says once what it waits for.

    Raises:
        OSError: a worker found shared memory full.
        UserError: there are too few file descriptors.
    """
    waited = 0
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if is_loader_timeout(error, batches):
                waited += TICK
                if waited == PATIENCE:
                    what = first_few(places(pending[0])) if places else "the data workers"
                    _say(f"waiting for {what}, for {PATIENCE} seconds so far")
                continue
            # Not by the reason that it gives, which torch 2.11 has wrong.
            if "unable to allocate shared memory" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/dev/shm") from None
            if "Too many open files" in str(error):
                fix = "raise the limit, as by `ulimit -n 4096`, or give --data.workers 0"
                raise UserError(f"data: too many open files; {fix}") from None
            raise
        waited = 0
        pending.popleft()
        yield batch


def _say(line: str) -> None:
    """Prints a line to stderr, if it is there."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        print(f"vitral: {line}", file=sys.stderr, flush=True)


def _as_it_is(fetched: Any) -> Any:
    return fetched


def _prepare_worker(_: int) -> None:
    """Ctrl-C and a scheduler's signals reach the whole group; the training process decides."""
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_error  # pyright: ignore
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    # multiprocessing's thread would print that the reader has gone; errors of the data set go
    # another way.
    sys.excepthook = lambda *_: None
    if sys.platform == "linux":
        multiprocessing.connection.arbitrary_address = _abstract_address  # pyright: ignore


def _abstract_address(_: str) -> str:
    """An address of a socket that is no file.

    A worker sends open files through it. Else its folder would be left behind by SIGKILL, and a
    long TMPDIR would not fit into the address.
    """
    return f"\0vitral-{os.getpid()}-{secrets.token_hex(8)}"


def _send_error(
    queue: multiprocessing.queues.Queue[Any], error: Exception, batch: tuple[int, Any]
) -> None:
    """Sends the error instead of a batch that could not be sent, as where shared memory is full.

    The thread that sends would drop the batch, and the reader wait for it for ever. Were the worker
    to end, torch would raise an error wherever the reader is just then.
    """
    queue.put((batch[0], wrap_exception(error)))


@atexit.register
def _end_workers() -> None:
    """After an error multiprocessing would end them by SIGTERM, which they ignore, and wait."""
    left = [child for child in multiprocessing.active_children() if child in _started]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would call it an error
    for child in left:
        child.kill()


def _boxes(config: Config, sizes: Integers, request: Request, part: slice) -> Integers:
    return crops.random_boxes(
        config.augment,
        config.data.eval_crop,
        request.side,
        sizes,
        config.train.seed,
        request.epochs[part],
        request.indices[part],
        config.data.fit,
    )


class _Fetching(Dataset[T]):
    """What worker processes run."""

    def __init__(self, records: Records) -> None:
        self.records = records

    def places(self, request: Request) -> list[str]:
        """What the samples of a request are called in messages."""
        return [describe(self.records, int(i)) for i in request.indices]


class _Decoding(_Fetching[Fetched]):
    """Decodes and crops the samples of a request."""

    def __init__(self, records: Encoded, config: Config) -> None:
        super().__init__(records)
        self.encoded = records
        self.config = config

    def __getitem__(self, request: Request) -> Fetched:
        size, interpolation = request.side, self.config.data.interpolation
        images = torch.empty(len(request.indices), 3, size, size, dtype=torch.uint8)
        labels = torch.empty(len(request.indices), dtype=torch.int64)
        broken: list[tuple[int, str]] = []
        for first in range(0, len(images), CHUNK):
            part = slice(first, first + CHUNK)
            decoded = [_decode(self.encoded, int(i), broken) for i in request.indices[part]]
            sizes = np.array([image.shape[1:] for image, _ in decoded])
            boxes = _boxes(self.config, sizes, request, part)
            for k, ((image, label), box) in enumerate(zip(decoded, boxes, strict=True), first):
                images[k] = crops.crop_resize(image, box, size, interpolation)
                labels[k] = label
        return Fetched(request, images, labels, broken)


def _decode(records: Encoded, index: int, broken: list[tuple[int, str]]) -> tuple[Tensor, int]:
    """Image and label of a record, or of the next one that can be decoded.

    Where more in a row cannot than a run puts up with, it is black: the run will stop.
    """
    for _ in range(CHUNK + len(records) // 1000):
        try:
            decoded = isinstance(records, Objects)
            image = records.image(index) if decoded else decode(records.read(index))
            return image, int(records.labels[index])
        except (DecodeError, OSError) as error:
            if is_exhausted(error):
                raise
            broken.append((index, str(error)))
            index = (index + 1) % len(records)
    return torch.zeros(3, 1, 1, dtype=torch.uint8), int(records.labels[index])


class _Gathering(_Fetching[Fetched]):
    """Copies the packed squares of a request together, and crops them if no GPU does."""

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
    """Crops drawn in the originals' pixels, and taken from the squares that those became."""
    request = squares.request
    sides = records.sides[request.indices]
    boxes = _boxes(config, sides, request, slice(None))
    scale = squares.images.shape[-1] / sides
    boxes = boxes * np.hstack([scale, scale])
    images = crops.resample(squares.images, boxes, request.side, config.data.interpolation)
    return replace(squares, images=images)


def _crop_squares(
    records: Packed, config: Config, gathered: Iterator[Fetched], device: torch.device
) -> Iterator[Fetched]:
    for squares in gathered:
        images = squares.images.to(device, non_blocking=True)
        yield _crop(records, config, replace(squares, images=images))


def _crop_pixels(
    records: Pixels, config: Config, requests: Iterable[Request], device: torch.device
) -> Iterator[Fetched]:
    pixels, labels = records.images.to(device), torch.from_numpy(records.labels)
    for request in requests:
        chosen = torch.from_numpy(request.indices)
        images = pixels[chosen.to(device, non_blocking=True)]
        sizes = np.broadcast_to(images.shape[2:], (len(images), 2))
        boxes = _boxes(config, sizes, request, slice(None))
        images = crops.resample(images, boxes, request.side, config.data.interpolation)
        yield Fetched(request, images, labels[chosen], [])


@dataclass(frozen=True)
class _Read:
    """The encoded bytes of a request's samples, one after the other."""

    request: Request
    content: Tensor
    lengths: list[int]
    plain: NDArray[np.bool_]
    """Which of them the GPU's decoder can read. Shape (B,)."""


class _Reading(_Fetching[_Read]):
    """Reads the samples of a request for the GPU to decode."""

    def __init__(self, records: Encoded) -> None:
        super().__init__(records)
        self.encoded = records

    def __getitem__(self, request: Request) -> _Read:
        contents = [self._read(int(index)) for index in request.indices]
        plain = np.array([gpu_decodes(content) for content in contents], bool)
        joined = np.frombuffer(b"".join(contents), np.uint8).copy()
        return _Read(request, torch.from_numpy(joined), [len(c) for c in contents], plain)

    def _read(self, index: int) -> bytes:
        try:
            return self.encoded.read(index)
        except (DecodeError, OSError) as error:
            if is_exhausted(error):
                raise
            return b""  # decoding it fails once more, and puts another in its place


def _decode_on_gpu(records: Encoded, config: Config, read: _Read, device: torch.device) -> Fetched:
    request, broken = read.request, []
    labels = torch.from_numpy(records.labels[request.indices])
    contents = read.content.split(read.lengths)
    shape = (len(contents), 3, request.side, request.side)
    images = torch.empty(shape, dtype=torch.uint8, device=device)
    for first in range(0, len(contents), GPU_CHUNK):
        part = slice(first, first + GPU_CHUNK)
        decoded = decode_on_gpu(contents[part], read.plain[part], device)
        for k, image in enumerate(decoded):
            if image is None:
                index = int(request.indices[first + k])
                image, labels[first + k] = _decode(records, index, broken)
                decoded[k] = image.to(device)
        whole = [image for image in decoded if image is not None]
        sizes = np.array([image.shape[1:] for image in whole])
        boxes = _boxes(config, sizes, request, part)
        images[part] = _crop_ragged(whole, boxes, request.side, config.data.interpolation)
    return Fetched(request, images, labels, broken)


def _crop_ragged(images: list[Tensor], boxes: Integers, size: int, interpolation: str) -> Tensor:
    """Crops of images of different sizes, resized in one go. (B, 3, size, size), uint8."""
    height, width = (max(int(n), 1) for n in boxes[:, 2:].max(0))
    stacked = images[0].new_zeros(len(images), 3, height, width)
    for place, image, (top, left, h, w) in zip(stacked, images, boxes.tolist(), strict=True):
        y, x = max(-top, 0), max(-left, 0)
        crop = image[:, max(top, 0) : max(top + h, 0), max(left, 0) : max(left + w, 0)]
        place[:, y : y + crop.shape[1], x : x + crop.shape[2]] = crop
    whole = np.hstack([np.zeros_like(boxes[:, :2]), boxes[:, 2:]])
    return crops.resample(stacked, whole, size, interpolation)
