"""Image folders: `train/` and `val/` (or another name in VALIDATION), or class folders directly."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISDIR

import numpy as np

from vitral.config import DataConfig
from vitral.data.decode import SUFFIXES
from vitral.data.records import Files, Names
from vitral.data.sampling import Integers
from vitral.data.skipped import OUTSIDE_CLASSES, count_files, file_kind, is_system, kinds
from vitral.data.splits import VALIDATION, Dataset, Split, class_name, merge_splits
from vitral.errors import counted, data_error, first_few, printable

SPLITS = ("train", *VALIDATION)
DEPTH = 3  # levels of single nested folders that are searched for splits
IMAGES = tuple(map(os.fsencode, SUFFIXES))
NUM_THREADS = 16  # they mostly wait if the files are on another machine


def matches(root: Path) -> bool:
    """Returns whether `root` is a folder."""
    return root.is_dir()


def open(root: Path, config: DataConfig, seed: int, train: bool) -> Dataset:
    """Opens the dataset in class folders; without a validation split, a part is held out.

    If `train` is False, there may be a single class, or empty classes, as in a test set.

    Raises:
        UserError: if the folder cannot be used.
        OSError: if it cannot be read.
    """
    root = _enter_single_folder(root)
    training, val = find_splits(root, train)
    skipped = Counter[str]()
    if training or val:
        _count_files(root, skipped)
    if val is None:
        found = _scan(root, training or "", skipped, train)
        if train and training is None:
            _check_split_names(root)
        splits = (found, None) if train or training else (None, found)
    else:
        held_out = _scan(root, val, skipped, train)
        if train and training is None:
            expected = f"train/ next to {val}/"
            raise data_error(root, expected, "none", "put the training images there")
        known = _scan(root, training, skipped, train) if train and training is not None else None
        splits = known, held_out
    dataset = merge_splits(root, *splits, config, seed, skipped)
    choices = (*dataset.choices, *_split_notes(root, dataset.name, training, val))
    return dataclasses.replace(dataset, choices=choices)


def find_splits(root: Path, train: bool) -> tuple[str | None, str | None]:
    """Returns the names of the training and validation folders; each is None if there is none.

    A folder named like a split is a split if it contains class folders. If none of them does, all
    folders may be classes, and the result is (None, None): CIFAR-100, for example, has a class
    named train.

    Args:
        train: whether to train on the images; ambiguous folders are then rejected.

    Raises:
        UserError: if it is ambiguous which folders are splits and which are classes.
        OSError: if `root` is not a folder, or cannot be read.
    """
    named: dict[str, str] = {}
    for name in _folders(root):
        if name.lower() in named:
            got = f"{named[name.lower()]} and {name}"
            raise data_error(root, "one folder for each split", got, "merge or rename them")
        if name.lower() in SPLITS:
            named[name.lower()] = name
    if not named:
        return None, None
    with_classes = [name for name in named.values() if _holds_classes(root / name)]
    flat = all(holds_images(root / name) for name in named.values())
    others = _other_folders(root)
    classes = flat and not with_classes and bool(others)
    if classes:
        unclear = len(named) > 1 or len(others) == 1
    else:
        image_folders = [name for name in others if holds_images(root / name)]
        unclear = bool(with_classes) and len(named) == 1 and len(image_folders) > 1
    if train and unclear:
        got = f"{first_few([*named.values()])} next to {first_few(others)}"
        fix = (
            "if all of them are classes, move them into train/; "
            "otherwise, move the other folders elsewhere"
        )
        raise data_error(root, "either splits or classes", got, fix)
    val = next((named[name] for name in VALIDATION if name in named), None)
    return (None, None) if classes else (named.get("train"), val)


def holds_only_validation(root: Path) -> bool:
    """Returns whether `root` has a validation split but no training split."""
    training, val = find_splits(_enter_single_folder(root), train=False)
    return training is None and val is not None


def _enter_single_folder(root: Path) -> Path:
    """Returns `root`, or a nested folder with splits, a common layout of extracted archives."""
    folder = root
    for _ in range(DEPTH):
        names = _folders(folder)
        if len(names) != 1 or names[0].lower() in SPLITS:
            break
        folder = folder / names[0]
        if any(find_splits(folder, train=False)):
            return folder
    return root


def _split_notes(root: Path, name: str, training: str | None, val: str | None) -> Iterator[str]:
    """Yields notes about the folders used as splits, and about other folders next to them."""
    if val is not None and val.lower() == "test":
        yield f"{name} has no val/: using {val}/ for validation"
    others = _other_folders(root) if training or val else []
    if others:
        yield f"{name}: skipped folders next to {training or val}/: {first_few(others)}"


def _scan(root: Path, split: str, skipped: Counter[str], train: bool) -> Split:
    """Returns class names and records of the class folders in one split, both sorted by name."""
    base = root / split
    names = _class_folders(base, split, train)
    before = skipped[OUTSIDE_CLASSES]
    _count_files(base, skipped)
    inside = [os.fsencode(f"{split}/{n}" if split else n) for n in names]
    counters = [Counter[str]() for _ in names]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = [*pool.map(list_images, (base / name for name in names), inside, counters)]
    skipped.update(sum(counters, Counter()))
    counts = [len(images) for images, _ in found]
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if len(empty) == len(names):
        expected = f"images ({', '.join(SUFFIXES)}) in a folder for each class"
        got = f"other files: {kinds(skipped)}" if skipped else "none"
        raise data_error(base, expected, got, "put images there, or specify another folder")
    if empty and train:
        got = f"none for {first_few(empty)}" + (f", but {kinds(skipped)}" if skipped else "")
        raise data_error(base, "images for each class", got, "add images or remove the folder")
    num_outside, count = skipped[OUTSIDE_CLASSES] - before, sum(counts)
    if num_outside > count:
        images = counted(num_outside, "image")
        got = f"{images} directly in it and {count:,} in class folders"
        raise data_error(base, "a folder for each class", got, "move or remove them")
    paths, sizes = map(np.concatenate, zip(*found, strict=True))
    labels = np.repeat(np.arange(len(names)), counts)
    return tuple(map(printable, names)), Files(root, paths, sizes, labels)


def _check_split_names(root: Path) -> None:
    """Rejects folders such as `training` and `testing`, which are probably splits, not classes."""
    names = _folders(root)
    first: list[str] = []
    for name in names:
        inside = _folders(root / name)
        first = first or inside
        if len(inside) < 2 or inside != first or holds_images(root / name):
            return
    got = f"{first_few(names)}, which contain the same folders {first_few(first)}"
    fix = "if they are splits, rename them to train/ and val/; if classes, move them into train/"
    raise data_error(root, "train/ and val/, or a folder for each class", got, fix)


def _class_folders(base: Path, split: str, train: bool) -> list[str]:
    """Returns the names of the class folders, sorted by the bytes of their class names."""
    names = sorted(_folders(base), key=lambda name: os.fsencode(class_name(name)))
    fix = "create one folder per class"
    if len(names) == 1 and train:
        inside = _folders(base / names[0])
        if len(inside) > 1:
            fix = f"if {first_few(inside)} in it are the classes, pass {base / names[0]}"
        raise data_error(base, "two or more classes", f"only {names[0]}", fix)
    if not names and holds_images(base):
        if split.lower() in VALIDATION:
            fix += f", as in train/, or remove {split}/ to hold out a part of train/"
        raise data_error(base, "a folder for each class", "images directly in it", fix)
    return names


def list_images(
    folder: Path, prefix: bytes, skipped: Counter[str] | None = None
) -> tuple[Names, Integers]:
    """Lists the images in a class folder and its subfolders; counts other files in `skipped`.

    Returns:
        The path of each image, which is `prefix`, a slash and the path relative to `folder`, in
        order, shape (N,). Its size in bytes, which is 0 for a broken link, shape (N,).
    """
    # With the descriptor of the folder, the system looks up only the names of the files.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        names = os.listdir(os.fsencode(folder))  # noqa: PTH208, for names in bytes
        images = sorted(n for n in names if n.lower().endswith(IMAGES) and not n.startswith(b"."))
        sizes = np.array([_size(name, descriptor) for name in images], np.int64)
    finally:
        os.close(descriptor)
    files = sizes >= 0
    found = [(_joined(prefix, images)[files], sizes[files])]
    if len(found[0][1]) < len(names):
        for entry in _entries(folder, skipped):
            if entry.is_dir():
                loop = entry.is_symlink() and folder.resolve().is_relative_to(Path(entry).resolve())
                if not loop:  # such a link would be followed up to the system's limit of 40
                    path = prefix + b"/" + os.fsencode(entry.name)
                    found.append(list_images(folder / entry.name, path, skipped))
            elif skipped is not None and not _is_image(entry.name):
                skipped[file_kind(entry.name)] += 1
    if len(found) == 1:
        return found[0]
    paths, sizes = map(np.concatenate, zip(*found, strict=True))
    order = np.argsort(paths)
    return paths[order], sizes[order]


def _size(name: bytes, folder: int) -> int:
    """Returns the size of a file in an open folder: 0 for a broken link, and -1 for a folder."""
    try:
        status = os.stat(name, dir_fd=folder)
    except FileNotFoundError:
        return 0
    return -1 if S_ISDIR(status.st_mode) else status.st_size


def _joined(prefix: bytes, names: list[bytes]) -> Names:
    """Returns `prefix`, a slash, and each name."""
    prefix += b"/"
    table = np.array(names, np.bytes_)
    joined = np.empty((len(table), len(prefix) + table.itemsize), np.uint8)
    joined[:, : len(prefix)] = np.frombuffer(prefix, np.uint8)
    joined[:, len(prefix) :] = table.view(np.uint8).reshape(len(table), table.itemsize)
    return joined.view(f"S{joined.shape[1]}")[:, 0]


def _count_files(folder: Path, skipped: Counter[str]) -> None:
    """Counts the files directly in a folder that contains folders of images."""
    for entry in _entries(folder, skipped):
        if not entry.is_dir():
            skipped[OUTSIDE_CLASSES if _is_image(entry.name) else file_kind(entry.name)] += 1


def _entries(folder: Path, skipped: Counter[str] | None = None) -> Iterator[os.DirEntry[str]]:
    """Yields the entries of a folder except system files, which are counted in `skipped`."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_system(entry.name):
                yield entry
            elif skipped is not None:
                skipped[entry.name] += count_files(entry)


def _folders(folder: Path) -> list[str]:
    """Returns the names of the folders in a folder, sorted."""
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir())


def _other_folders(root: Path) -> list[str]:
    """Returns the folders, other than splits, that contain images directly or one level down."""
    others = [root / name for name in _folders(root) if name.lower() not in SPLITS]
    return [
        folder.name
        for folder in others
        if holds_images(folder) or any(holds_images(folder / name) for name in _folders(folder))
    ]


def _holds_classes(folder: Path) -> bool:
    """Returns whether a folder in this folder contains images, at any depth."""
    return any(
        holds_images(folder / name) or len(list_images(folder / name, b"")[0])
        for name in _folders(folder)
    )


def holds_images(folder: Path) -> bool:
    """Whether there are images directly in a folder."""
    return any(_is_image(entry.name) and not entry.is_dir() for entry in _entries(folder))


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)
