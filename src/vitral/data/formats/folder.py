"""Image folders: `train/` and `val/` (or another name in VALIDATION), or class folders alone."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from vitral.config import DataConfig
from vitral.data.decode import SUFFIXES
from vitral.data.records import VALIDATION, Dataset, Files, Split, combine
from vitral.errors import data_error, first_few, printable


def matches(root: Path) -> bool:
    """Whether `root` is a folder."""
    return root.is_dir()


def open(root: Path, config: DataConfig, seed: int, train: bool) -> Dataset:
    """The data set in class folders; without a validation split a part is held out.

    Raises:
        UserError: the folder cannot be used.
        OSError: it cannot be read.
    """
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
        raise data_error(root, f"train/ beside {val}/", "none", "put the training images there")
    known = _scan(root, training) if train and training is not None else None
    dataset = combine(root, known, held_out, config, seed)
    if val.lower() != "test":
        return dataset
    note = f"{dataset.name} has no val/: {val}/ is validated on"
    return dataclasses.replace(dataset, notes=(note,))


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
        raise data_error(base, expected, "none", "put images there, or give another folder")
    if empty:
        raise data_error(
            base, "images of each class", f"none of {first_few(empty)}", "add or remove it"
        )
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
    got = f"{first_few(names)}, which hold the same folders {first_few(first)}"
    fix = "if they are splits, rename them to train/ and val/; if classes, move them into train/"
    raise data_error(root, "train/ and val/, or a folder for each class", got, fix)


def _class_folders(base: Path, split: str) -> list[str]:
    """Names of the class folders, in order of their bytes."""
    names = sorted((entry.name for entry in _entries(base) if entry.is_dir()), key=os.fsencode)
    fix = "make one folder a class"
    if len(names) == 1:
        raise data_error(base, "two classes or more", f"{names[0]} alone", fix)
    if not names and _holds_images(base):
        if split.lower() in VALIDATION:
            fix += f" as in train/, or remove {split}/ to have a part of train/ held out"
        raise data_error(base, "a folder for each class", "images directly in it", fix)
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
