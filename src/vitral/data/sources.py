"""Where images come from: tables of records with random access, from folders and known sets.

A folder is `train/` and `val/` (or `validation/`, `test/`), or class folders alone, of which a part
is held out. A known set is asked for by name; a folder of the same name as `./name`.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray

from vitral.config import DataConfig, UserError
from vitral.data.sampling import Integers, hashed

KNOWN_SETS = ("digits", "synthetic", "cifar10", "cifar100", "imagenette")
SUFFIXES = frozenset(["jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif"])
_VALIDATION = ("val", "validation", "test")


@dataclass(frozen=True, eq=False)
class Files:
    """Encoded images, one a file."""

    root: Path
    paths: NDArray[np.bytes_]
    """Relative to root, as `os.fsencode` gives them. Shape (N,)."""
    sizes: Integers
    """Bytes of each file. Shape (N,)."""
    labels: Integers
    """Shape (N,)."""

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> bytes:
        """The encoded bytes of image `i`. Raises OSError."""
        return (self.root / os.fsdecode(self.paths[i])).read_bytes()

    def where(self, i: int) -> str:
        """The path of image `i`, for messages."""
        return printable(self.root / os.fsdecode(self.paths[i]))

    def take(self, chosen: NDArray[np.bool_]) -> Files:
        """The images where `chosen`, shape (N,), is true."""
        return Files(self.root, self.paths[chosen], self.sizes[chosen], self.labels[chosen])


@dataclass(frozen=True, eq=False)
class Pixels:
    """Decoded images of one size, in memory."""

    images: torch.Tensor
    """Shape (N, 3, H, W), uint8."""
    labels: Integers
    """Shape (N,)."""

    def __len__(self) -> int:
        return len(self.labels)


Records = Files | Pixels


@dataclass(frozen=True, eq=False)
class Dataset:
    """Two splits with the same classes; a label is a position in `classes`."""

    name: str
    classes: tuple[str, ...]
    train: Records | None
    val: Records | None
    notes: tuple[str, ...] = ()
    """What the user should be told."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over classes, labels, and paths with sizes or pixels; not over the location."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for split, records in (("train", self.train), ("val", self.val)):
            if records is not None:
                digest.update(f"\0\0{split} {len(records)}\0".encode())
                digest.update(np.ascontiguousarray(records.labels, "<i8").data)
            if isinstance(records, Files):
                digest.update(b"\0".join(records.paths.tolist()))
                digest.update(np.ascontiguousarray(records.sizes, "<i8").data)
            elif isinstance(records, Pixels):
                digest.update(str(tuple(records.images.shape)).encode())
                digest.update(records.images.contiguous().numpy().data)
        return digest.hexdigest()


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
    match config.path:
        case "digits":
            return _digits()
        case "synthetic":
            return _synthetic(image_size)
        case "cifar10" | "cifar100":
            return _cifar(config.path)
        case "imagenette":
            return _imagenette(config, seed)
    try:
        return _open_folder(Path(config.path).expanduser(), config, seed, train)
    except OSError as error:
        reason = error.strerror or str(error)
        place = error.filename or config.path
        raise _mistake(place, "to read it", reason, "mend or remove it") from error


def printable(name: str | bytes | os.PathLike[str]) -> str:
    """A file name for people: bytes that are no UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _mistake(place: os.PathLike[str] | str, expected: str, got: str, mend: str) -> UserError:
    return UserError(printable(f"data: {place}: expected {expected}, got {got}; {mend}"))


# ---- Image folders.


def _open_folder(root: Path, config: DataConfig, seed: int, train: bool) -> Dataset:
    _require_folder(root, config.path)
    name = printable(os.path.basename(os.path.abspath(root)))  # noqa: PTH100, PTH119
    training, val = _find_splits(root)
    if val is None:
        classes, records = _scan(root, training or "")
        if not train and training is None:
            return Dataset(name, classes, None, records)
        return _hold_out(name, classes, records, config.val_fraction, seed)
    classes, held_out = _scan(root, val)
    notes = (f"{name} has no val/: {val}/ is validated on",) if val.lower() == "test" else ()
    if not train:
        return Dataset(name, classes, None, held_out, notes)
    if training is None:
        mend = "put the training images there, a folder for each class"
        raise _mistake(root, f"train/ beside {val}/", "none", mend)
    known, records = _scan(root, training)
    if known != classes:
        missing, extra = sorted({*known} - {*classes}), sorted({*classes} - {*known})
        got = f"only in {training}/: {_some(missing)}, only in {val}/: {_some(extra)}"
        expected = f"the same classes in {training}/ and {val}/"
        raise _mistake(root, expected, got, "rename or remove folders")
    return Dataset(name, classes, records, held_out, notes)


def _require_folder(root: Path, asked: str) -> None:
    if root.is_dir():
        return
    if root.exists():
        raise _mistake(root, "an image folder", "a file", "if it is an archive, unpack it")
    near = difflib.get_close_matches(asked.lower(), KNOWN_SETS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known sets are {', '.join(KNOWN_SETS)}"
    raise _mistake(root, "an image folder or a known set", "nothing of that name", hint)


def _find_splits(root: Path) -> tuple[str | None, str | None]:
    """Names of the training and the validation folder; None twice where root holds classes."""
    folders = {entry.name.lower(): entry.name for entry in _entries(root) if entry.is_dir()}
    named = [folders[name] for name in ("train", *_VALIDATION) if name in folders]
    # A class may be called train, as one of CIFAR-100 is.
    if len(folders) > len(named) and all(_holds_images(root / name) for name in named):
        return None, None
    val = next((folders[name] for name in _VALIDATION if name in folders), None)
    return folders.get("train"), val


def _hold_out(
    name: str, classes: tuple[str, ...], records: Files, fraction: float, seed: int
) -> Dataset:
    held = _draw_held_out(records, fraction, seed)
    if not held.any():
        got = "none: there is no val/, and no class has two images to hold one out"
        raise _mistake(records.root, "validation images", got, "add val/, a folder for each class")
    note = (
        f"{name} has no val/, validation/ or test/: {held.sum():,} of its {len(held):,} images "
        f"({fraction:.0%} of each class) are held out, drawn by seed {seed}"
    )
    return Dataset(name, classes, records.take(~held), records.take(held), (note,))


def _draw_held_out(records: Files, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which images to hold out: the rounded share of each class, at least one, never all. (N,)."""
    N = len(records)
    words = np.fromiter(map(crc32, records.paths.tolist()), np.int64, N)
    order = np.lexsort((hashed(seed, crc32(b"held out"), words), records.labels))
    counts = np.bincount(records.labels)
    rank = np.arange(N) - np.repeat(np.cumsum(counts) - counts, counts)
    quota = np.minimum(np.maximum(np.rint(fraction * counts), 1), counts - 1)
    held = np.zeros(N, bool)
    held[order] = rank < np.repeat(quota, counts)
    return held


def _scan(root: Path, split: str) -> tuple[tuple[str, ...], Files]:
    """Class names and records of the class folders in one split, both in order of name."""
    base = root / split
    names = _class_folders(base, split)
    found = [sorted(_walk(base / n, os.fsencode(f"{split}/{n}" if split else n))) for n in names]
    empty = [name for name, images in zip(names, found, strict=True) if not images]
    if len(empty) == len(names):
        raise _no_images(base)
    if empty:
        got = f"none in {_some(empty)}"
        raise _mistake(base, "images in each class folder", got, "add some or remove the folder")
    paths, sizes = zip(*(image for images in found for image in images), strict=True)
    labels = np.repeat(np.arange(len(names)), [len(images) for images in found])
    return tuple(map(printable, names)), Files(root, np.array(paths), np.array(sizes), labels)


def _class_folders(base: Path, split: str) -> list[str]:
    """Names of the class folders, in order of their bytes."""
    names = sorted((entry.name for entry in _entries(base) if entry.is_dir()), key=os.fsencode)
    if len(names) > 1:
        return names
    mend = "make one folder a class"
    if names:
        raise _mistake(base, "two classes or more", f"{names[0]} alone", mend)
    if not _holds_images(base):
        raise _no_images(base)
    if split.lower() in _VALIDATION:
        mend += f" as in train/, or remove {split}/ to have a part of train/ held out"
    raise _mistake(base, "a folder for each class", "images directly in it", mend)


def _walk(folder: Path, prefix: bytes) -> Iterator[tuple[bytes, int]]:
    """Path below the root, and size, of each image in a class folder and the folders in it."""
    for entry in _entries(folder):
        path = prefix + b"/" + os.fsencode(entry.name)
        if entry.is_dir():
            # A link to a folder around it would be walked forty times over.
            if not (
                entry.is_symlink() and folder.resolve().is_relative_to(os.path.realpath(entry))
            ):
                yield from _walk(folder / entry.name, path)
        elif _is_image(entry.name):
            yield path, entry.stat().st_size if entry.is_file() else 0  # a link to nothing


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from (e for e in entries if not e.name.startswith(".") and e.name != "__MACOSX")


def _holds_images(folder: Path) -> bool:
    return any(_is_image(entry.name) and not entry.is_dir() for entry in _entries(folder))


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in SUFFIXES


def _no_images(base: Path) -> UserError:
    expected = f"images ({', '.join(sorted(SUFFIXES))}), a folder for each class"
    return _mistake(base, expected, "none", "put images there, or give another folder")


def _some(names: Sequence[str]) -> str:
    return (
        ", ".join(names[:3]) + (f", ... ({len(names)} in all)" if len(names) > 3 else "") or "none"
    )


# ---- Known sets.


def _digits() -> Dataset:
    """scikit-learn's handwritten digits (Alpaydin and Kaynak 1998); the last 360 are held out.

    Those are other writers' than the first 1,437, which is harder than a random split.
    """
    from sklearn.datasets import load_digits

    raw, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(np.rint(raw * 255 / 16).astype(np.uint8)).view(-1, 1, 8, 8)
    images, labels = grey.expand(-1, 3, -1, -1).contiguous(), labels.astype(np.int64)
    cut = len(labels) - 360
    train, val = Pixels(images[:cut], labels[:cut]), Pixels(images[cut:], labels[cut:])
    return Dataset("digits", tuple("0123456789"), train, val)


def _synthetic(side: int) -> Dataset:
    """Ten coarse colour patterns under noise: to try things out and to measure, without files."""
    coarse = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    patterns = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    base = (patterns * 127).to(torch.uint8)
    bits = np.random.PCG64(0)

    def split(count: int) -> Pixels:
        # Raw bits of a generator that keeps its stream: 224 px take 0.5 s, torch's random_ 1.8 s.
        noise = bits.random_raw(-(-count * base[0].numel() // 8)).view(np.uint8)
        images = torch.from_numpy(noise)[: count * base[0].numel()].view(count, *base[0].shape)
        images >>= 1
        for label in range(10):
            images[label::10] += base[label]
        return Pixels(images, np.arange(count) % 10)

    classes = tuple(f"pattern {i}" for i in range(10))
    return Dataset("synthetic", classes, split(2560), split(512))


def _downloads() -> Path:
    return Path(os.environ.get("VITRAL_DATA") or "~/.cache/vitral/data").expanduser()


@contextmanager
def _downloading(name: str, archive: str) -> Iterator[None]:
    """Failures become a UserError, at the latest after 20 seconds without a byte."""
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        with warnings.catch_warnings(action="ignore"):  # numpy warns of CIFAR's old pickles
            yield
    except (OSError, RuntimeError, HTTPException) as error:
        got = next(iter(str(error).splitlines()), type(error).__name__)
        mend = f"put {archive} into that folder, or point --data at an image folder"
        raise _mistake(name, f"it in {_downloads()}, or a network", got, mend) from error
    finally:
        socket.setdefaulttimeout(patience)


def _cifar(name: str) -> Dataset:
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if name == "cifar10" else CIFAR100
    with _downloading(name, kind.filename):
        train, val = (kind(_downloads(), train=part, download=True) for part in (True, False))
    return Dataset(
        name,
        tuple(train.classes),
        _pixels(train.data, train.targets),
        _pixels(val.data, val.targets),
    )


def _pixels(images: NDArray[np.uint8], labels: Sequence[int]) -> Pixels:
    """From images (N, H, W, 3)."""
    return Pixels(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), np.array(labels))


def _imagenette(config: DataConfig, seed: int) -> Dataset:
    from torchvision.datasets import Imagenette

    with _downloading("imagenette", "imagenette2-160.tgz"):
        Imagenette(_downloads(), size="160px", download=True)
    dataset = _open_folder(_downloads() / "imagenette2-160", config, seed, train=True)
    return replace(dataset, name="imagenette")


class _Scan(NamedTuple):
    classes: tuple[str, ...]
    files: Files
    strays: int
    """Images beside the class folders, which belong to no class."""


def _open_folder(root: Path, config: DataConfig, seed: int, train: bool) -> Dataset:
    """Make out how `root` is laid out, and scan the splits that are asked for."""
    _check_folder(root)
    folders = {name.lower(): name for name in sorted(_children(root)[0])}
    val_names = [folders[name] for name in ("val", "validation", "test") if name in folders]
    if val_names and not train:
        return _dataset(root, None, _scan(root / val_names[0]))
    if "train" in folders:
        trained = _scan(root / folders["train"])
        if val_names:
            return _dataset(root, trained, _scan(root / val_names[0]))
        return _hold_out(root, trained, config.val_fraction, seed)
    if val_names:
        raise UserError(
            f"{root}: expected train/ beside {val_names[0]}/, found none; add it, or rename "
            f"{val_names[0]}/ if that is a class"
        )
    whole = _scan(root)
    if not train:
        return _dataset(root, None, whole)
    return _hold_out(root, whole, config.val_fraction, seed)


def _check_folder(root: Path) -> None:
    if root.is_dir():
        return
    if root.exists():
        raise UserError(f"{root}: expected an image folder, got a file; unpack archives first")
    near = difflib.get_close_matches(root.name.lower(), KNOWN_SETS, n=1)
    raise UserError(
        f"{root}: no such folder; expected an image folder or one of {', '.join(KNOWN_SETS)}"
        + (f"; did you mean {near[0]}?" if near else "")
    )


def _dataset(root: Path, train: _Scan | None, val: _Scan) -> Dataset:
    if train is not None and train.classes != val.classes:
        missing = sorted(set(train.classes) - set(val.classes))
        extra = sorted(set(val.classes) - set(train.classes))
        one, other = train.files.root.name, val.files.root.name
        raise UserError(
            f"{root}: expected the same classes in {one}/ and {other}/"
            + (f"; missing in {other}/: {_some(missing)}" if missing else "")
            + (f"; only in {other}/: {_some(extra)}" if extra else "")
            + "; add or rename the class folders"
        )
    notes = tuple(_stray_note(scan) for scan in (train, val) if scan is not None and scan.strays)
    return Dataset(root.name, val.classes, train and train.files, val.files, notes)


def _some(names: list[str]) -> str:
    rest = len(names) - 5
    return ", ".join(names[:5]) + (f" and {rest} more" if rest > 0 else "")


def _stray_note(scan: _Scan) -> str:
    return f"{scan.files.root}: left out {scan.strays} images that lie in no class folder"


def _hold_out(root: Path, scan: _Scan, fraction: float, seed: int) -> Dataset:
    chosen = held_out(scan.files.labels, fraction, seed)
    if not chosen.any():
        raise UserError(
            f"{root}: no val/, and no class has a second image to hold out; expected two images "
            "or more in each class"
        )
    note = (
        f"no validation split: held out {chosen.mean():.0%} ({chosen.sum():,} images) by seed {seed}"
    )
    strays = (_stray_note(scan),) if scan.strays else ()
    files = scan.files
    train, val = files.take(~chosen), files.take(chosen)
    return Dataset(root.resolve().name, scan.classes, train, val, (note, *strays))


def held_out(labels: Integers, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which images to hold out: `fraction` of all and, within one image, of each class.

    A class keeps one image at least; one is held out if any class has two.

    Args:
        labels: shape (N,), sorted.

    Returns:
        Shape (N,); a pure function of the arguments.
    """
    counts = np.bincount(labels)
    # Rounding the running total, not each class: classes of three images lose their share too.
    quota = np.diff(np.rint(fraction * np.cumsum(counts)).astype(np.int64), prepend=0)
    quota = np.minimum(quota, np.maximum(counts - 1, 0))
    if not quota.any() and counts.max() > 1:
        quota[counts.argmax()] = 1
    order = np.lexsort((hashed(seed, crc32(b"held out"), np.arange(len(labels))), labels))
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = np.zeros(len(labels), np.bool_)
    chosen[order[rank < quota[labels]]] = True
    return chosen


def _scan(split: Path) -> _Scan:
    """Every image below the class folders of `split`, by class and then by path."""
    classes, strays = _children(split)
    found: list[tuple[bytes, int]] = []
    counts: list[int] = []
    for name in classes:
        images = sorted(_walk(os.fsencode(split / name), os.fsencode(name)))
        found += images
        counts.append(len(images))
    _check_scan(split, classes, counts, strays)
    labels = np.repeat(np.arange(len(classes)), counts)
    paths = np.array([path for path, _ in found], np.bytes_)
    sizes = np.array([size for _, size in found], np.int64)
    return _Scan(tuple(classes), Files(split, paths, sizes, labels), strays)


def _check_scan(split: Path, classes: list[str], counts: list[int], strays: int) -> None:
    if not sum(counts):
        if strays:
            raise UserError(
                f"{split}: expected one folder a class, got {strays:,} images directly in it; "
                f"sort them into class folders, those of train and val alike: {split}/<class>/..."
            )
        kinds = " ".join(sorted(os.fsdecode(suffix) for suffix in SUFFIXES))
        raise UserError(f"{split}: expected class folders with images, got no image ({kinds})")
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        raise UserError(
            f"{split}: expected images in each class folder, got none in: {_some(empty)}; "
            "add images, or remove the folder"
        )
    if len(classes) < 2:
        raise UserError(
            f"{split}: expected two class folders or more, got only {classes[0]}; "
            f"if that holds the set, use {split / classes[0]}"
        )


def _hidden(name: bytes) -> bool:
    return name.startswith((b".", b"__MACOSX"))


def _is_image(name: bytes) -> bool:
    return name.rpartition(b".")[2].lower() in SUFFIXES


def _children(folder: Path) -> tuple[list[str], int]:
    """The sorted names of the folders in `folder`, and the number of images beside them."""
    folders: list[str] = []
    images = 0
    with os.scandir(os.fsencode(folder)) as entries:
        for entry in entries:
            if _hidden(entry.name):
                continue
            if entry.is_dir():
                folders.append(_text(folder, entry.name))
            elif _is_image(entry.name):
                images += 1
    return sorted(folders), images


def _text(folder: Path, name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise UserError(f"{folder}: expected folder names in UTF-8, got {name!r}; rename") from None


def _walk(
    folder: bytes, inside: bytes, above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[tuple[bytes, int]]:
    """Path (`inside` put first) and size of every image below `folder`; links are followed.

    Args:
        above: the folders that lead here, so that a link to one of them ends the walk.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if _hidden(entry.name):
                continue
            path = inside + b"/" + entry.name
            if entry.is_dir():
                status = entry.stat()
                identity = status.st_dev, status.st_ino
                if identity not in above:
                    yield from _walk(entry.path, path, above | {identity})
            elif _is_image(entry.name):
                yield path, entry.stat().st_size


def _digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits; the last 360, by other writers, are held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))
    images = grey[:, None].repeat(1, 3, 1, 1)
    labels = bunch.target.astype(np.int64)
    train, val = Pixels(images[:-360], labels[:-360]), Pixels(images[-360:], labels[-360:])
    return Dataset("digits", tuple("0123456789"), train, val)


def _synthetic(image_size: int) -> Dataset:
    """Ten classes, each a blurred pattern under blurred noise; a function of `image_size` alone."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 3, 8, 8, generator=generator)

    def draw(count: int) -> Pixels:
        labels = torch.arange(count) % 10
        images = torch.empty(count, 3, image_size, image_size, dtype=torch.uint8)
        for start in range(0, count, 64):  # the float images of all would take a gigabyte and more
            part = labels[start : start + 64]
            low = patterns[part] + 1.5 * torch.randn(len(part), 3, 8, 8, generator=generator)
            image = torch.nn.functional.interpolate(low, (image_size, image_size), mode="bilinear")
            images[start : start + 64] = image.mul_(40).add_(128).clamp_(0, 255)
        return Pixels(images, labels.numpy())

    classes = tuple(f"pattern {i}" for i in range(10))
    return Dataset("synthetic", classes, draw(_SYNTHETIC_TRAIN), draw(_SYNTHETIC_VAL))


def _cache() -> Path:
    """Where downloaded sets live: $VITRAL_DATA, or ~/.cache/vitral/data."""
    return Path(os.environ.get("VITRAL_DATA") or "~/.cache/vitral/data").expanduser()


def _no_download(name: str, archive: str, url: str, error: Exception) -> UserError:
    why = str(error).strip().partition("\n")[0]
    return UserError(
        f"{name}: could not be downloaded from {url} ({why}); fetch {archive} elsewhere and put it "
        f"into {_cache()} (VITRAL_DATA names another folder), or give --data an image folder"
    )


def _cifar(name: str) -> Dataset:
    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    try:
        train, val = (kind(_cache(), train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise _no_download(name, kind.filename, kind.url, error) from error
    classes = tuple(train.classes)
    return Dataset(
        name, classes, _pixels(train.data, train.targets), _pixels(val.data, val.targets)
    )


def _pixels(data: NDArray[np.uint8], targets: list[int]) -> Pixels:
    """torchvision's array of images (N, H, W, 3) and its labels, as a table."""
    images = torch.from_numpy(data).permute(0, 3, 1, 2).contiguous()
    return Pixels(images, np.array(targets, np.int64))


def _imagenette(config: DataConfig, seed: int, train: bool) -> Dataset:
    from torchvision import datasets

    root = _cache() / "imagenette2-160"
    try:
        datasets.Imagenette(_cache(), size="160px", download=True)
    except (OSError, RuntimeError) as error:
        url = datasets.Imagenette._ARCHIVES["160px"][0]
        raise _no_download("imagenette", "imagenette2-160.tgz", url, error) from error
    return _open_folder(root, config, seed, train)
