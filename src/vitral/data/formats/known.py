"""Datasets known by name: handwritten digits, synthetic patterns, CIFAR, and Imagenette."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from vitral.caches import downloads_dir
from vitral.config import DataConfig
from vitral.data.formats import folder
from vitral.data.records import Pixels
from vitral.data.splits import Dataset
from vitral.errors import data_error

KNOWN_SETS = ("digits", "synthetic", "cifar10", "cifar100", "imagenette")


def open_known(config: DataConfig, image_size: int, seed: int, train: bool) -> Dataset:
    """Opens the dataset that `config.path`, one of KNOWN_SETS, names; downloads it if necessary.

    Args:
        image_size: size of the images of the synthetic dataset, in pixels.

    Raises:
        UserError: if the dataset cannot be downloaded.
    """
    match config.path:
        case "digits":
            return _digits()
        case "synthetic":
            return _synthetic(image_size)
        case "imagenette":
            return folder.open(_imagenette(), config, seed, train)
        case name:
            return _cifar(name)


def _digits() -> Dataset:
    """Opens scikit-learn's handwritten digits; the last 360, by different writers, are held out."""
    # Importing scikit-learn, and with it SciPy, takes more than half as long as importing torch.
    package = find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    table = np.loadtxt(Path(package.origin).parent / "datasets/data/digits.csv.gz", delimiter=",")
    raw, labels = table[:, :-1], table[:, -1].astype(np.int64)
    gray = torch.from_numpy(np.rint(raw * 255 / 16).astype(np.uint8)).view(-1, 1, 8, 8)
    images = gray.expand(-1, 3, -1, -1).contiguous()
    train, val = Pixels(images[:-360], labels[:-360]), Pixels(images[-360:], labels[-360:])
    return Dataset("digits", tuple("0123456789"), train, val)


def _synthetic(image_size: int) -> Dataset:
    """Creates ten coarse color patterns with noise, for tests and measurements without files."""
    coarse = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    patterns = torch.nn.functional.interpolate(
        coarse * 127, (image_size, image_size), mode="bilinear"
    ).byte()
    # Each draw yields eight pixels. This takes 0.2 s for images of 224 pixels, random_ 1.8 s.
    noise = np.random.PCG64(0).random_raw(3072 * 3 * image_size * image_size // 8).view(np.uint8)
    images, labels = (
        torch.from_numpy(noise).view(3072, 3, image_size, image_size),
        np.arange(3072) % 10,
    )
    images >>= 1
    for label in range(10):
        images[label::10] += patterns[label]
    train, val = Pixels(images[:2560], labels[:2560]), Pixels(images[2560:], labels[2560:])
    return Dataset("synthetic", tuple(f"pattern {i}" for i in range(10)), train, val)


@contextmanager
def _downloading(name: str, archive: str) -> Iterator[Path]:
    """Yields the download folder; failures, including 20 s without data, become a UserError."""
    place = downloads_dir()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        with warnings.catch_warnings(action="ignore"):  # numpy warns about CIFAR's old pickles
            yield place
    except (OSError, RuntimeError, HTTPException) as error:
        got = next(iter(str(error).splitlines()), type(error).__name__)
        fix = f"put {archive} into that folder, or pass an image folder with --data"
        if Path(name).is_dir():
            fix = f"for the local folder of that name, pass ./{name}"
        raise data_error(name, f"it in {place}, or a network connection", got, fix) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _cifar(name: str) -> Dataset:
    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    with _downloading(name, kind.filename) as place:
        train, val = (kind(place, train=split, download=True) for split in (True, False))
    images = [
        torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous() for split in (train, val)
    ]
    splits = (Pixels(images[0], np.array(train.targets)), Pixels(images[1], np.array(val.targets)))
    return Dataset(name, tuple(train.classes), *splits)


def _imagenette() -> Path:
    from torchvision import datasets

    with _downloading("imagenette", "imagenette2-160.tgz") as place:
        datasets.Imagenette(place, size="160px", download=True)
    return place / "imagenette2-160"
