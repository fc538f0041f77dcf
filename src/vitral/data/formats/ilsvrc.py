"""ILSVRC2012 as downloaded: a tar of a thousand tars, a flat tar, and a development kit.

Without the development kit, the ground truth included in this package is used.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from vitral.config import DataConfig
from vitral.data.archives import REDOWNLOAD, check_unique, members, progress
from vitral.data.decode import SUFFIXES
from vitral.data.imagenet import validation_labels, wnids
from vitral.data.index import Row, index_archives
from vitral.data.splits import VALIDATION, Dataset, Split, merge_splits
from vitral.errors import counted, data_error, first_few, printable
from vitral.files import open_regular, read_regular

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12"
META, GROUND_TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
MAX_DEVKIT_BYTES = 1 << 26  # per file of the kit, far more than in the original
USE_MATCHING = "use archives and a development kit of the same release"


def matches(root: Path) -> bool:
    """Returns whether `root` contains the archives, or is one of them.

    False if both splits also exist as folders.
    """
    folder, training = _locate(root)
    splits = any((root / name).is_dir() for name in VALIDATION) and (root / "train").is_dir()
    return not splits and (training.is_file() or (folder / VAL).is_file())


def open(root: Path, config: DataConfig, seed: int, train: bool) -> Dataset:
    """Opens the dataset in the archives in `root`, or in one archive and those next to it.

    Raises:
        UserError: if an archive or the development kit cannot be used.
    """
    folder, training = _locate(root)
    has_train, has_val = training.is_file(), (folder / VAL).is_file()
    if train and not has_train:
        raise data_error(folder, training.name, "none", "download it into that folder")
    skipped = Counter[str]()
    known = _open_train(training, skipped) if train or not has_val else None
    if not has_val:
        return merge_splits(folder, known, None, config, seed, skipped)
    classes = known[0] if known else _class_names(training) if has_train else None
    return merge_splits(folder, known, _open_val(folder, classes, skipped), config, seed, skipped)


def _locate(root: Path) -> tuple[Path, Path]:
    """Returns the folder of the archives and the training tar; `root` may be a tar of any name."""
    if root.name.endswith(".tar") and root.is_file():
        return root.parent, root if root.name != VAL else root.with_name(TRAIN)
    return root, root / TRAIN


def _class_names(archive: Path) -> tuple[str, ...]:
    with open_regular(archive) as file:
        names = sorted(os.fsencode(name) for name, _, _ in _class_tars(archive, file))
    return tuple(map(printable, names))


def _class_tars(
    archive: Path, file: BinaryIO, skipped: Counter[str] | None = None
) -> list[tuple[str, str, tarfile.TarInfo]]:
    """Returns the class, name and header of each tar in the training tar."""
    found = list(members(file, printable(archive), (".tar", *SUFFIXES), skipped=skipped))
    others = [name for name, _ in found if not name.lower().endswith(".tar")]
    if others or len(found) < 2:
        got = first_few(others or [name for name, _ in found])
        fix = "for shards, specify their folder; otherwise, download it again"
        raise data_error(archive, "a tar inside it for each of two or more classes", got, fix)
    classes = [(PurePosixPath(name).stem, name, tar) for name, tar in found]
    check_unique(archive, (name for name, _, _ in classes))
    return classes


def _open_train(archive: Path, skipped: Counter[str]) -> Split:
    found = index_archives([archive], read_train)
    skipped.update(found.skipped)
    return tuple(map(printable, found.values.tolist())), found.spans


def read_train(archives: Sequence[Path]) -> tuple[list[Row], dict[bytes, bytes], Counter[str]]:
    """Reads the images in the inner tars of the training tar, labeled with the tars' names."""
    rows: list[Row] = []
    skipped = Counter[str]()
    with open_regular(archives[0]) as file:
        for label, outer, tar in progress(_class_tars(archives[0], file, skipped)):
            place, start = printable(f"{archives[0]}: {outer}"), tar.offset_data
            images = list(members(file, place, SUFFIXES, start, start + tar.size, skipped))
            if not images:
                raise data_error(place, f"images ({', '.join(SUFFIXES)})", "none", REDOWNLOAD)
            check_unique(place, (name for name, _ in images))
            value = os.fsencode(label)
            for name, image in images:
                inside = os.fsencode(f"{outer}/{name}")
                rows.append((value, inside, 0, image.offset_data, image.size))
    return rows, {}, skipped


def _open_val(folder: Path, classes: tuple[str, ...] | None, skipped: Counter[str]) -> Split:
    """Opens the validation images; `classes` are those of the training tar, or None."""
    found = index_archives([folder / VAL], read_val)
    skipped.update(found.skipped)
    numbers = [_number(folder, os.fsdecode(name)) for name in found.spans.names.tolist()]
    kit = _read_devkit(folder)
    shipped = folder / VAL, wnids(), [wnids()[label] for label in validation_labels()]
    source, known, truth = kit or shipped
    classes = classes or known
    labeled = [*range(1, len(truth) + 1)]
    if sorted(numbers) != labeled if kit else not {*numbers} <= {*labeled}:
        images = counted(len(numbers), "image")
        expected = f"labels for {images} up to number {max(numbers)} in {VAL}"
        raise data_error(source, expected, f"labels for {len(labeled):,}", USE_MATCHING)
    val_wnids = [truth[number - 1] for number in numbers]
    unknown = sorted({*val_wnids} - {*classes})
    if unknown:
        raise data_error(
            source, f"the {len(classes):,} classes of {TRAIN}", first_few(unknown), USE_MATCHING
        )
    position = {name: i for i, name in enumerate(classes)}
    return classes, found.relabeled(np.array([position[wnid] for wnid in val_wnids]))


def read_val(archives: Sequence[Path]) -> tuple[list[Row], dict[bytes, bytes], Counter[str]]:
    """Reads the images in the validation tar, without labels."""
    skipped = Counter[str]()
    with open_regular(archives[0]) as file:
        found = list(members(file, printable(archives[0]), SUFFIXES, skipped=skipped))
    if not found:
        raise data_error(archives[0], f"images ({', '.join(SUFFIXES)})", "none", REDOWNLOAD)
    check_unique(archives[0], (name for name, _ in found))
    rows = [(b"", os.fsencode(name), 0, image.offset_data, image.size) for name, image in found]
    return rows, {}, skipped


def _number(folder: Path, name: str) -> int:
    match = re.fullmatch(r"(?:.*/)?ILSVRC2012_val_([0-9]{8})\.\w+", name)
    if match is None:
        raise data_error(folder / VAL, "names like ILSVRC2012_val_00000001.JPEG", name, REDOWNLOAD)
    return int(match[1])


def _read_devkit(folder: Path) -> tuple[Path, tuple[str, ...], list[str]] | None:
    """Returns the development kit's path, sorted wnids, and each validation image's wnid, in order.

    The kit numbers the classes from 1, in a different order than the wnids.
    """
    from scipy.io import loadmat

    found = _devkit_files(folder)
    if found is None:
        return None
    place, meta, truth = found
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        leaves = synsets[synsets["num_children"].astype(int) == 0]
        wnid = {str(number): str(name) for number, name in leaves[["ILSVRC2012_ID", "WNID"]]}
    except Exception as error:  # loadmat raises nearly any exception for other files
        expected = f"synsets with ILSVRC2012_ID, WNID and num_children in {META}"
        raise data_error(place, expected, str(error) or "a different file", REDOWNLOAD) from error
    lines = truth.decode("ascii", "replace").split()
    unknown = [line for line in lines if line not in wnid]
    if unknown or not lines:
        expected = f"an ILSVRC2012_ID of {META} in each line of {GROUND_TRUTH}"
        raise data_error(place, expected, first_few(unknown), REDOWNLOAD)
    return place, tuple(sorted(wnid.values())), [wnid[line] for line in lines]


def _devkit_files(folder: Path) -> tuple[Path, bytes, bytes] | None:
    """Returns the path of the development kit, extracted or not, and the contents of its files."""
    kit, packed = folder / DEVKIT, folder / f"{DEVKIT}.tar.gz"
    if kit.is_dir():
        return kit, read_regular(kit / META), read_regular(kit / GROUND_TRUTH)
    if not packed.is_file():
        return None
    try:
        with tarfile.open(packed, "r:gz") as tar:
            content = [tar.extractfile(f"{DEVKIT}/{name}") for name in (META, GROUND_TRUTH)]
            meta, truth = (file.read(MAX_DEVKIT_BYTES) if file else b"" for file in content)
    except (tarfile.TarError, KeyError, EOFError, OSError, zlib.error) as error:
        expected = f"a complete archive with {META} and {GROUND_TRUTH}"
        raise data_error(packed, expected, str(error), REDOWNLOAD) from error
    return packed, meta, truth
