"""Where images come from: tables of records with random access, from folders and known sets.

A folder is `train/` and `val/` (or another name in VALIDATION), or class folders alone, of which a
part is held out. A known set is asked for by name; a folder of the same name as `./name`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import socket
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

from vitral.config import DataConfig
from vitral.data import packed
from vitral.data.parquet import find_parquet, open_parquet
from vitral.data.records import (
    VALIDATION,
    Dataset,
    Files,
    Pixels,
    Split,
    combine,
    hold_out,
    mistake,
    printable,
    some,
)

KNOWN_SETS = ("digits", "synthetic", "cifar10", "cifar100", "imagenette")
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif",
)  # fmt: skip


def open_dataset(config: DataConfig, image_size: int, seed: int, *, train: bool = True) -> Dataset:
    """Open the image folder or known set that `config.path` names.

    Args:
        image_size: side of the images of the synthetic set, in pixels.
        seed: chooses the held-out images where there is no validation split.
        train: False where only the validation split is needed; a folder that holds class folders
            itself is then all of it.

    Raises:
        UserError: the folder cannot be used; says why and how to mend it.
    """
    try:
        match config.path:
            case "digits":
                dataset = _digits()
            case "synthetic":
                dataset = _synthetic(image_size)
            case "cifar10" | "cifar100":
                dataset = _cifar(config.path)
            case "imagenette":
                dataset = _open_folder(_imagenette(), config, seed, train)
            case path:
                dataset = _open_path(Path(os.path.expanduser(path)), config, seed, train)  # noqa: PTH111
    except OSError as error:
        where = error.filename or config.path
        raise mistake(where, "to read it", str(error.strerror), "mend or remove it") from error
    if config.hold_out and train and not dataset.held_out:
        why = f"the validation images of {dataset.name} are left alone"
        return hold_out(dataset, config.path, config.val_fraction, seed, why)
    return dataset


def _open_path(root: Path, config: DataConfig, seed: int, train: bool) -> Dataset:
    """Whatever lies at a path: each kind of data set knows its own."""
    from vitral.data.ilsvrc import open_ilsvrc  # they import SUFFIXES from here
    from vitral.data.shards import open_shards

    if packed.found(root):
        return packed.open_pack(root, train)
    if files := find_parquet(root):
        return open_parquet(root, files, config, seed, train)
    for open_archives in (open_ilsvrc, open_shards):
        dataset = open_archives(root, config, seed, train)
        if dataset is not None:
            return dataset
    return _open_folder(root, config, seed, train)


def _open_folder(root: Path, config: DataConfig, seed: int, train: bool) -> Dataset:
    _require_folder(root, config.path)
    training, val = find_splits(root)
    if val is None:
        found = _scan(root, training or "")
        if not train and training is None:
            return combine(root, None, found, config, seed)
        if training is None:
            _refuse_unnamed_splits(root)
        return combine(root, found, None, config, seed)
    held_out = _scan(root, val)
    if train and training is None:
        raise mistake(root, f"train/ beside {val}/", "none", "put the training images there")
    known = _scan(root, training) if train and training is not None else None
    dataset = combine(root, known, held_out, config, seed)
    if val.lower() != "test":
        return dataset
    note = f"{dataset.name} has no val/: {val}/ is validated on"
    return dataclasses.replace(dataset, notes=(note,))


def _require_folder(root: Path, asked: str) -> None:
    if root.is_dir():
        return
    if root.exists():
        raise mistake(root, "an image folder", "a file", "if it is an archive, unpack it")
    near = difflib.get_close_matches(asked.lower(), KNOWN_SETS, n=1)
    mend = f"did you mean {near[0]}?" if near else f"known sets are {', '.join(KNOWN_SETS)}"
    raise mistake(root, "an image folder", "nothing of that name", mend)


def find_splits(root: Path) -> tuple[str | None, str | None]:
    """Names of the training and the validation folder; None twice where root holds classes.

    Raises:
        OSError: it is no folder, or one that cannot be read.
    """
    folders = {entry.name.lower(): entry.name for entry in _entries(root) if entry.is_dir()}
    named = [folders[name] for name in ("train", *VALIDATION) if name in folders]
    # A class may be called train, as one of CIFAR-100 is.
    if len(folders) > len(named) and all(_holds_images(root / name) for name in named):
        return None, None
    val = (folders[name] for name in VALIDATION if name in folders)
    return folders.get("train"), next(val, None)


def _scan(root: Path, split: str) -> Split:
    """Class names and records of the class folders in one split, both in order of name."""
    base = root / split
    names = _class_folders(base, split)
    found = [
        sorted(walk_images(base / n, os.fsencode(f"{split}/{n}" if split else n))) for n in names
    ]
    empty = [name for name, images in zip(names, found, strict=True) if not images]
    if len(empty) == len(names):
        expected = f"images ({', '.join(SUFFIXES)}), a folder for each class"
        raise mistake(base, expected, "none", "put images there, or give another folder")
    if empty:
        raise mistake(base, "images of each class", f"none of {some(empty)}", "add or remove it")
    paths, sizes = zip(*(image for images in found for image in images), strict=True)
    labels = np.repeat(np.arange(len(names)), [len(images) for images in found])
    return tuple(map(printable, names)), Files(root, np.array(paths), np.array(sizes), labels)


def _refuse_unnamed_splits(root: Path) -> None:
    """Splits by other names would be learned as classes: `training` as against `testing`."""
    names = sorted(entry.name for entry in _entries(root) if entry.is_dir())
    first: list[str] = []
    for name in names:
        inside = sorted(entry.name for entry in _entries(root / name) if entry.is_dir())
        first = first or inside
        if len(inside) < 2 or inside != first or _holds_images(root / name):
            return
    got = f"{some(names)}, which hold the same folders {some(first)}"
    mend = "if they are splits, rename them to train/ and val/; if classes, move them into train/"
    raise mistake(root, "train/ and val/, or a folder for each class", got, mend)


def _class_folders(base: Path, split: str) -> list[str]:
    """Names of the class folders, in order of their bytes."""
    names = sorted((entry.name for entry in _entries(base) if entry.is_dir()), key=os.fsencode)
    mend = "make one folder a class"
    if len(names) == 1:
        raise mistake(base, "two classes or more", f"{names[0]} alone", mend)
    if not names and _holds_images(base):
        if split.lower() in VALIDATION:
            mend += f" as in train/, or remove {split}/ to have a part of train/ held out"
        raise mistake(base, "a folder for each class", "images directly in it", mend)
    return names


def walk_images(folder: Path, prefix: bytes) -> Iterator[tuple[bytes, int]]:
    """Path below the root, and size, of each image in a class folder and the folders in it."""
    for path, entry in _walk(folder, prefix):
        if _is_image(entry.name):
            yield path, entry.stat().st_size if entry.is_file() else 0  # a link to nothing


def count_others(root: Path, used: Iterable[bytes]) -> Counter[str]:
    """How many files below `root` are not among those `used`, paths from it, by their endings."""
    known = {*used}
    others = (entry.name for path, entry in _walk(root, b"") if path[1:] not in known)
    return Counter(Path(name).suffix.lower() or "none" for name in others)


def _walk(folder: Path, prefix: bytes) -> Iterator[tuple[bytes, os.DirEntry[str]]]:
    for entry in _entries(folder):
        path = prefix + b"/" + os.fsencode(entry.name)
        if entry.is_dir():
            around = entry.is_symlink() and folder.resolve().is_relative_to(Path(entry).resolve())
            if not around:  # such a link would be walked forty times over
                yield from _walk(folder / entry.name, path)
        else:
            yield path, entry


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from (e for e in entries if not e.name.startswith(".") and e.name != "__MACOSX")


def _holds_images(folder: Path) -> bool:
    return any(_is_image(entry.name) and not entry.is_dir() for entry in _entries(folder))


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _digits() -> Dataset:
    """scikit-learn's handwritten digits; the last 360, by other writers, are held out."""
    from sklearn.datasets import load_digits

    raw, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(np.rint(raw * 255 / 16).astype(np.uint8)).view(-1, 1, 8, 8)
    images, labels = grey.expand(-1, 3, -1, -1).contiguous(), labels.astype(np.int64)
    train, val = Pixels(images[:-360], labels[:-360]), Pixels(images[-360:], labels[-360:])
    return Dataset("digits", tuple("0123456789"), train, val)


def _synthetic(side: int) -> Dataset:
    """Ten coarse colour patterns under noise: to try things out and to measure, without files."""
    coarse = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    patterns = torch.nn.functional.interpolate(coarse * 127, (side, side), mode="bilinear").byte()
    # Eight pixels a draw: for images of 224 pixels it takes 0.2 s, torch's random_ takes 1.8 s.
    noise = np.random.PCG64(0).random_raw(3072 * 3 * side * side // 8).view(np.uint8)
    images, labels = torch.from_numpy(noise).view(3072, 3, side, side), np.arange(3072) % 10
    images >>= 1
    for label in range(10):
        images[label::10] += patterns[label]
    train, val = Pixels(images[:2560], labels[:2560]), Pixels(images[2560:], labels[2560:])
    return Dataset("synthetic", tuple(f"pattern {i}" for i in range(10)), train, val)


@contextmanager
def _downloading(name: str, archive: str) -> Iterator[Path]:
    """Where to download to; failures, 20 seconds without a byte too, become a UserError."""
    place = Path(os.environ.get("VITRAL_DATA") or "~/.cache/vitral/data").expanduser()
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        with warnings.catch_warnings(action="ignore"):  # numpy warns of CIFAR's old pickles
            yield place
    except (OSError, RuntimeError, HTTPException) as error:
        got = next(iter(str(error).splitlines()), type(error).__name__)
        mend = f"put {archive} into that folder, or point --data at an image folder"
        if Path(name).is_dir():
            mend = f"for the folder of that name here give ./{name}"
        raise mistake(name, f"it in {place}, or a network", got, mend) from error
    finally:
        socket.setdefaulttimeout(patience)


def _cifar(name: str) -> Dataset:
    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    with _downloading(name, kind.filename) as place:
        train, val = (kind(place, train=part, download=True) for part in (True, False))
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, val)]
    splits = (Pixels(images[0], np.array(train.targets)), Pixels(images[1], np.array(val.targets)))
    return Dataset(name, tuple(train.classes), *splits)


def _imagenette() -> Path:
    from torchvision import datasets

    with _downloading("imagenette", "imagenette2-160.tgz") as place:
        datasets.Imagenette(place, size="160px", download=True)
    return place / "imagenette2-160"
