"""Finds ImageNet's test sets on disk by the names of their folders and opens them as records."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vitral.config import Config
from vitral.data.decode import SUFFIXES
from vitral.data.formats import open_dataset
from vitral.data.formats.folder import list_images
from vitral.data.formats.ilsvrc import VAL
from vitral.data.formats.parquet import Rows
from vitral.data.imagenet import validation_labels, wnids
from vitral.data.records import Files, Spans
from vitral.data.sampling import Integers
from vitral.data.skipped import is_system
from vitral.errors import data_error, first_few, printable, unreadable
from vitral.files import expand, read_regular

MAX_REAL_BYTES = 1 << 26  # ReaL's label file is a hundredth of this size
DEPTH = 4  # levels of folders to search, as in ILSVRC/Data/CLS-LOC/val
WNID = "n[0-9]{8}"
CLASS = f"{WNID}|[0-9]{{1,3}}"  # does not match a year, as in imagenet/2012
NUMBERED = re.compile(rb"ILSVRC2012_val_([0-9]{8})")


@dataclass(frozen=True)
class Kind:
    """A test set, and the folder name that identifies it."""

    name: str
    pattern: str
    """Regular expression for the folder name in lower case without punctuation."""
    example: str
    """Name of the folder in the published archive."""


IMAGENET = Kind(
    "ImageNet validation",
    r"(imagenet(1k|2012)?|in1k|ilsvrc(2012)?(img)?)?val(idation)?(class)?",
    f"val, imagenet-val, or {VAL}",
)
REAL = Kind("ReaL", r"realjson|imagenetreallabelsjson", "real.json")
V2 = r"(imagenetv2|v2)?{}(formatval)?"
OTHERS = (
    Kind(
        "ImageNet-V2 matched-frequency",
        V2.format("matchedfrequency"),
        "imagenetv2-matched-frequency-format-val",
    ),
    Kind(
        "ImageNet-V2 threshold-0.7",
        V2.format("threshold07"),
        "imagenetv2-threshold0.7-format-val",
    ),
    Kind("ImageNet-V2 top-images", V2.format("topimages"), "imagenetv2-top-images-format-val"),
    Kind("ImageNet-A", r"(imagenet|in)(a|adversarial)", "imagenet-a"),
    Kind("ImageNet-R", r"(imagenet|in)(r|renditions?)", "imagenet-r"),
    Kind("ImageNet-Sketch", r"(imagenet|in)?sketch", "sketch or imagenet-sketch"),
)
KINDS = (IMAGENET, REAL, *OTHERS)


@dataclass(frozen=True, eq=False)
class LabeledSet:
    """The images of a test set."""

    kind: Kind
    place: Path
    classes: tuple[str, ...]
    """Wnids of the classes that have images, sorted."""
    records: Files | Spans | Rows
    """Labels are indices into `classes`."""

    def numbers(self) -> Integers:
        """Returns each image's number in ImageNet's validation set, from its name. Shape (N,).

        The number is 0 if the name does not contain one.
        """
        found = [NUMBERED.search(name) for name in self.records.names.tolist()]
        numbers = np.array([int(match[1]) if match else 0 for match in found], np.int64)
        return np.where(numbers <= len(validation_labels()), numbers, 0)


@dataclass(frozen=True, eq=False)
class Suite:
    """The test sets found in a folder."""

    root: Path
    sets: tuple[LabeledSet, ...]
    real: Path | None
    """ReaL's labels; None if they or the ImageNet validation images that they label are missing."""

    def names(self) -> list[str]:
        """Returns the names of the rows of results, in order."""
        places = self.places()
        return [kind.name for kind in KINDS if kind in places]

    def places(self) -> dict[Kind, Path]:
        """Returns the location of each set that was found."""
        found = {each.kind: each.place for each in self.sets}
        return found if self.real is None else {**found, REAL: self.real}

    def describe(self) -> str:
        """Lists the sets that were found and those that were not, one per line."""
        places = self.places()
        lines = [
            f"{kind.name}: {printable(places[kind])}"
            if kind in places
            else f"{kind.name}: not found ({kind.example})"
            for kind in KINDS
        ]
        return "\n".join(lines)


def find_suite(path: str | Path) -> Suite:
    """Finds the test sets of ImageNet-1K in the folders below `path`.

    These are ImageNet's validation set (Russakovsky et al. 2015), ReaL's labels for it (Beyer et
    al. 2020), the three sets of ImageNet-V2 (Recht et al. 2019), ImageNet-A and ImageNet-R
    (Hendrycks et al. 2021) and ImageNet-Sketch (Wang et al. 2019), extracted as published, with one
    folder per class. The validation set can also be a single folder of images, the tar as
    downloaded, or shards or Parquet files in a separate folder.

    Args:
        path: folder to search, up to four levels deep, or the folder of one set.

    Raises:
        UserError: if no test set is found, one is found twice, or one cannot be used.
    """
    root = expand(path).resolve()
    if not root.is_dir():
        got = "a file" if root.exists() else "a path that does not exist"
        raise data_error(root, "a folder that contains test sets", got, "specify another folder")
    try:
        found = _locate(root)
        sets = tuple(_open(kind, found[kind]) for kind in KINDS if kind in found and kind != REAL)
    except OSError as error:
        raise unreadable(root, error) from error
    if not sets:
        expected = ", ".join(f"{kind.example} ({kind.name})" for kind in KINDS)
        fix = "specify the folder that contains them"
        raise data_error(root, f"one or more of {expected}", "none", fix)
    numbered = sets[0].kind == IMAGENET and sets[0].numbers().any()
    return Suite(root, sets, found.get(REAL) if numbered else None)


def read_real(path: Path) -> list[list[int]]:
    """Reads ReaL's labels of each validation image, in order of number: indices into `wnids()`.

    Some images have no labels (Beyer et al. 2020).

    Raises:
        UserError: if the file contains anything else.
    """
    count, max_label = len(validation_labels()), len(wnids()) - 1
    expected, fix = (
        f"a list of {count:,} lists of labels from 0 to {max_label}",
        "download it again",
    )
    try:
        labels = json.loads(read_regular(path, MAX_REAL_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise data_error(path, expected, str(error), fix) from error
    if not isinstance(labels, list) or len(labels) != count:
        raise data_error(path, expected, "a different structure or length", fix)
    for number, each in enumerate(labels, 1):
        if not isinstance(each, list) or any(
            type(label) is not int or not 0 <= label <= max_label for label in each
        ):
            raise data_error(path, expected, f"{each} for image {number}", fix)
    return labels


def _locate(root: Path) -> dict[Kind, Path]:
    """Returns the location of each set: the folder with its classes or images, or the file."""
    found: dict[Kind, Path] = {}
    archives: dict[Kind, Path] = {}
    for folder, inner, files in _walk(root):
        kind = _kind(root, folder)
        for name in files:
            if re.fullmatch(REAL.pattern, _normalized(name)):
                _add(found, REAL, folder / name)
        if any(NUMBERED.match(os.fsencode(name)) and _is_image(name) for name in files):
            _add(found, IMAGENET, folder)
        elif kind and _class_folders(kind, inner):
            _add(found, kind, folder)
        elif VAL in files or (kind == IMAGENET and _holds_archives(folder, files)):
            _add(archives, IMAGENET, folder)
    # An extracted set takes precedence over its archive, which users often keep.
    return {**archives, **found}


def _holds_archives(folder: Path, files: Sequence[str]) -> bool:
    """Returns whether these are tar or Parquet files of ImageNet; other sets also have a `val`."""
    imagenet_name = re.search("imagenet|ilsvrc|in1k", _normalized(str(folder)))
    return imagenet_name is not None and any(name.endswith((".tar", ".parquet")) for name in files)


def _add(found: dict[Kind, Path], kind: Kind, place: Path) -> None:
    # Links can lead to the same location twice.
    if kind in found and not found[kind].samefile(place):
        got = f"{printable(found[kind])} and {printable(place)}"
        raise data_error(place, f"one location of {kind.name}", got, "move one of them elsewhere")
    found.setdefault(kind, place)


def _walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yields the folders from `root` down, with the sorted names of folders and files in each.

    Skips class folders and folders that cannot be read.
    """
    for place, folders, files in os.walk(root, followlinks=True):
        folder = Path(place)
        inner = sorted(name for name in folders if not is_system(name))
        yield folder, inner, sorted(files)
        deeper = len(folder.relative_to(root).parts) < DEPTH
        folders[:] = [name for name in inner if deeper and not re.fullmatch(CLASS, name)]


def _kind(root: Path, folder: Path) -> Kind | None:
    """Identifies a folder by its own name or the name of a parent folder.

    The validation set comes last because paths of other sets can end in its name, as in
    `imagenet-sketch/val`.
    """
    parts = [root.name, *folder.relative_to(root).parts][::-1]
    for kinds in (OTHERS, (IMAGENET,)):
        for part in parts:
            for kind in kinds:
                if re.fullmatch(kind.pattern, _normalized(part)):
                    return kind
    return None


def _normalized(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _class_folders(kind: Kind, names: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the name and wnid of each class folder, ignoring other folders."""
    found = [(name, name) for name in names if re.fullmatch(WNID, name)]
    if found or "V2" not in kind.name:
        return found
    # ImageNet-V2 names folders by index into the sorted wnids. Sorting these names as text puts 10
    # before 2.
    numbers = [name for name in names if name.isdecimal()]
    return [(name, wnids()[int(name)]) for name in numbers if int(name) < len(wnids())]


def _open(kind: Kind, place: Path) -> LabeledSet:
    names = sorted(entry.name for entry in place.iterdir() if entry.is_dir())
    images = [
        (wnid, path, size)
        for name, wnid in _class_folders(kind, names)
        for path, size in zip(
            *(each.tolist() for each in list_images(place / name, os.fsencode(name))), strict=True
        )
    ]
    if not images and kind == IMAGENET:
        images = list(_flat_images(place))
    if images:
        images.sort()
        labels, paths, sizes = zip(*images, strict=True)
        classes, positions = np.unique(np.array(labels), return_inverse=True)
        records = Files(place, np.array(paths), np.array(sizes), positions)
        return LabeledSet(kind, place, tuple(classes.tolist()), records)
    if kind == IMAGENET:
        return _open_archives(place)
    raise data_error(place, f"images ({', '.join(SUFFIXES)})", "none", "extract them there")


def _flat_images(folder: Path) -> Iterator[tuple[str, bytes, int]]:
    """Yields the wnid, path and size of each validation image directly in `folder`."""
    truth = validation_labels()
    for entry in folder.iterdir():
        name = os.fsencode(entry.name)
        match = NUMBERED.match(name)
        if match and _is_image(entry.name) and 0 < int(match[1]) <= len(truth):
            yield wnids()[truth[int(match[1]) - 1]], name, entry.stat().st_size


def _open_archives(place: Path) -> LabeledSet:
    """Opens ImageNet's validation set from tar or Parquet files."""
    config = replace(Config().data, path=str(place))
    dataset = open_dataset(config, image_size=1, seed=0, train=False)
    records, classes = dataset.val, dataset.classes
    unknown = [name for name in classes if name not in wnids()]
    if unknown or dataset.choices or not isinstance(records, Files | Spans | Rows):
        expected = "ImageNet's validation images, labeled by wnid"
        got = f"classes {first_few(unknown)}" if unknown else "different images"
        raise data_error(place, expected, got, "move them elsewhere")
    seen, labels = np.unique(records.labels, return_inverse=True)
    named = tuple(classes[i] for i in seen.tolist())
    return LabeledSet(IMAGENET, place, named, replace(records, labels=labels))
