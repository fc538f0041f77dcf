"""A dataset: two splits with the same classes, and how images are held out."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from vitral.config import DataConfig
from vitral.data.records import Encoded, Pixels, Records, groups_of
from vitral.data.sampling import Labels, held_out, held_out_groups, strata
from vitral.data.skipped import kinds, note
from vitral.errors import counted, data_error, first_few, printable

VALIDATION = ("val", "validation", "valid", "dev", "test")  # the first one found is used


Split = tuple[tuple[str, ...], Encoded]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Two splits with the same classes; labels are indices into `classes`, or 0 and 1 for each."""

    name: str
    classes: tuple[str, ...]
    train: Records | None
    val: Records | None
    held_out: bool = False
    """Whether `val` is a held-out part of the training images."""
    choices: tuple[str, ...] = ()
    """How the splits were chosen, if the user may have meant different ones."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Number of unused files, by kind."""

    @property
    def multi_label(self) -> bool:
        """Whether an image can have any number of labels."""
        records = self.val if self.train is None else self.train
        return records is not None and records.labels.ndim == 2

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes about the dataset for the user."""
        return (*self.choices, *note(self.name, self.skipped))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of classes, labels, and data that identifies the images, without locations."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for split, records in (("train", self.train), ("val", self.val)):
            if records is not None:
                digest.update(f"\0\0{split} {len(records)}\0".encode())
                digest.update(label_bytes(records.labels))
                for part in records.identity():
                    digest.update(part)
        return digest.hexdigest()


def label_bytes(labels: Labels) -> memoryview:
    """Returns labels as bytes that are the same on all machines."""
    return np.ascontiguousarray(labels, "<i8" if labels.ndim == 1 else "u1").data


def merge_splits(
    root: Path,
    training: Split | None,
    val: Split | None,
    config: DataConfig,
    seed: int,
    skipped: Mapping[str, int] | None = None,
) -> Dataset:
    """Returns the dataset of two splits; if `val` is None, holds out a part of `training`.

    `training` is None if only the validation split is needed. Class names are normalized by
    `class_name`.

    Raises:
        UserError: if the classes differ, two of them have the same name, there is only one to train
            on, or nothing can be held out.
    """
    name, skipped = printable(root.resolve().name), skipped or {}
    training, val = (_with_class_names(root, split) for split in (training, val))
    if training is not None and len(training[0]) < 2:
        got, fix = f"only {first_few(training[0])}", "add images of other classes"
        raise data_error(root, "two or more classes", got, fix)
    if val is None:
        assert training is not None
        why = f"{name} has no validation split"
        dataset = Dataset(name, *training, None, skipped=skipped)
        return hold_out(dataset, root, config.val_fraction, seed, why)
    classes, held_out = val
    if training is None:
        return Dataset(name, classes, None, held_out, skipped=skipped)
    known, records = training
    if known != classes:
        missing, extra = sorted({*known} - {*classes}), sorted({*classes} - {*known})
        got = (
            f"only in the training split: {first_few(missing)}, "
            f"only in validation: {first_few(extra)}"
        )
        expected = "the same classes in both splits"
        raise data_error(root, expected, got, "rename or remove them")
    return Dataset(name, classes, records, held_out, skipped=skipped)


def class_name(name: str) -> str:
    """Returns the name of a class as it is compared, stored and printed.

    Names are normalized to NFC, because file systems encode accented letters differently. Control
    characters, which terminals would interpret, are escaped.
    """
    return printable(unicodedata.normalize("NFC", name))


def _with_class_names(root: Path, split: Split | None) -> Split | None:
    """Normalizes class names with `class_name`. Raises UserError if two of them become the same."""
    if split is None:
        return None
    spellings: dict[str, list[str]] = {}
    for name in split[0]:
        spellings.setdefault(class_name(name), []).append(name)
    for several in spellings.values():
        if len(several) > 1:
            names = " and ".join(map(ascii, several))
            got = f"{names}, which are equal after Unicode normalization"
            raise data_error(root, "each class once", got, "rename or merge them")
    return tuple(spellings), split[1]


def hold_out(
    dataset: Dataset, place: os.PathLike[str] | str, fraction: float, seed: int, why: str
) -> Dataset:
    """Returns the dataset with a part of its training images as the validation split.

    Args:
        place: path of the dataset, for messages.
        fraction: fraction of each class to hold out.
        why: the reason, for messages.

    Raises:
        UserError: if no class has two images, or two groups of images.
    """
    records = dataset.train
    assert records is not None
    held = _draw_held_out(records, fraction, seed)
    grouped = groups_of(records) is not None
    if not held.any():
        kind = "groups" if grouped else "images"
        got = f"none: {why}, and no class has enough {kind} to hold one out"
        got += f"; skipped: {kinds(dataset.skipped)}" if dataset.skipped else ""
        raise data_error(place, "validation images", got, "add images")
    share = f"{fraction:.0%} of each class"
    share += " by the rarest label of each image" if dataset.multi_label else ""
    share += ", without dividing groups" if grouped else ""
    choice = (
        f"{why}: {held.sum():,} of {counted(len(held), 'training image')} ({share}) "
        f"{'is' if held.sum() == 1 else 'are'} held out, drawn with seed {seed}"
    )
    train, val = records.take(~held), records.take(held)
    return replace(dataset, train=train, val=val, held_out=True, choices=(choice,))


def _draw_held_out(records: Records, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Returns a mask of the images to hold out. Shape (N,)."""
    classes = strata(records.labels)
    if isinstance(records, Pixels):
        keys = np.arange(len(records))
    else:  # by base name, which is the same in an archive and in the folder it was made from
        keys = np.array([crc32(path.rpartition(b"/")[2]) for path in records.names.tolist()])
    groups = groups_of(records)
    if groups is not None:
        return held_out_groups(groups, classes, fraction, seed, "held out")
    return held_out(keys, classes, fraction, seed, "held out")
