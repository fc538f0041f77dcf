"""Opens Python datasets: their classes, labels and fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Subset

from vitral.config import Config, DataConfig
from vitral.data.archives import progress
from vitral.data.decode import DecodeError
from vitral.data.fetch import resolve_workers
from vitral.data.formats import open_dataset
from vitral.data.objects import LABELS, PATH, Objects, Source, read_item
from vitral.data.sampling import Integers
from vitral.data.splits import Dataset, class_name, hold_out
from vitral.data.workers import in_workers
from vitral.errors import UserError, data_error, first_few

CHUNK = 64  # items that a worker reads at a time
NUM_REREAD = 8  # items that are read twice, to check that they are the same each time


@dataclass(frozen=True)
class PythonDatasets:
    """Datasets that are passed to `vitral.train` instead of a path."""

    train: Source
    val: Source | None = None
    """Validation images; if None, a part of `train` is held out."""
    classes: Sequence[str] | None = None
    """Class names; None uses those of the dataset."""
    fingerprint: str | None = None
    """Identifies the images; None hashes all of them."""


def python_datasets(
    config: Config,
    train: Source | None,
    val: Source | None,
    classes: Sequence[str] | None,
    fingerprint: str | None,
) -> tuple[Config, PythonDatasets | None]:
    """Returns a run's settings and datasets; `data.path` becomes PATH if a dataset is passed.

    Raises:
        UserError: if other arguments are passed without a training dataset.
    """
    if train is not None:
        settings = replace(config, data=replace(config.data, path=PATH))
        return settings, PythonDatasets(train, val, classes, fingerprint)
    if val is not None or classes is not None or fingerprint is not None:
        raise UserError("dataset: expected one with val_dataset, classes or fingerprint, got None")
    return config, None


def open_data(config: Config, datasets: PythonDatasets | None) -> Dataset:
    """Opens the datasets that were passed, or the one at `data.path`. Raises UserError."""
    if datasets is not None:
        return open_objects(datasets, config.data, config.train.seed)
    return open_dataset(config.data, config.model.image_size, config.train.seed)


def open_objects(datasets: PythonDatasets, config: DataConfig, seed: int) -> Dataset:
    """Opens Python datasets.

    Raises:
        UserError: if the datasets cannot be used.
    """
    classes = class_names(datasets.train, datasets.classes)
    train = records_of("dataset", datasets.train, classes, config, datasets.fingerprint)
    dataset = Dataset(PATH, classes, train, None)
    if datasets.val is not None:
        if own_names(datasets.val) not in (None, classes) and datasets.classes is None:
            got = "different ones"
            raise data_error("val_dataset", "the classes of dataset", got, "pass classes=")
        val = records_of("val_dataset", datasets.val, classes, config, datasets.fingerprint)
        dataset = replace(dataset, val=val)
    if datasets.val is None or config.hold_out:
        why = "no val_dataset is used"
        return hold_out(dataset, "dataset", config.val_fraction, seed, why)
    return dataset


def class_names(source: Source, given_names: Sequence[str] | None) -> tuple[str, ...]:
    """Returns `given_names`, or those of the dataset.

    Raises:
        UserError: if there are none, fewer than two, or duplicates.
    """
    names = (
        own_names(source)
        if given_names is None
        else tuple(class_name(str(name)) for name in given_names)
    )
    if names is None:
        raise data_error("dataset", "class names in .classes or .features", "none", "pass classes=")
    if len({*names}) != len(names) or len(names) < 2:
        got = f"{len(names)}: {first_few(names)}"
        raise data_error("dataset", "two or more different class names", got, "pass classes=")
    return names


def own_names(source: Any) -> tuple[str, ...] | None:
    """Returns the names in `classes`, as in torchvision, or in `features`, as in Hugging Face."""
    while isinstance(source, Subset):
        source = source.dataset
    names = getattr(source, "classes", None)
    features = getattr(source, "features", None)
    for key in LABELS:
        if names is None and isinstance(features, Mapping):
            names = getattr(features.get(key), "names", None)
    return None if names is None else tuple(class_name(str(name)) for name in names)


def records_of(
    what: str, source: Source, classes: Sequence[str], config: DataConfig, fingerprint: str | None
) -> Objects:
    """Returns the records of a Python dataset.

    Every item is read once, to hash its image and to get its label, unless a fingerprint is passed
    and the dataset lists its labels.

    Args:
        what: name of the dataset in messages.

    Raises:
        UserError: if it is empty, or an item is not an image with a label of one of the classes.
    """
    rows = np.arange(len(source))
    if not len(rows):
        raise data_error(what, "images", "an empty dataset", "pass another dataset")
    records = Objects(source, rows, np.zeros_like(rows), fingerprint or "")
    labels = None if fingerprint is None else _listed_labels(source)
    if labels is None:
        labels, digest = _read_all(what, records, resolve_workers(config, records))
        records = replace(records, digest=fingerprint or digest)
    invalid = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(invalid):
        got = f"{labels[invalid[0]]} for item {invalid[0]}"
        fix = "correct the label or pass all class names"
        raise data_error(what, f"labels from 0 to {len(classes) - 1}", got, fix)
    return replace(records, labels=labels)


def _listed_labels(source: Any) -> Integers | None:
    """Returns the labels that a dataset lists separately from its images, or None."""
    if isinstance(source, Subset):
        inside = _listed_labels(source.dataset)
        return None if inside is None else inside[np.asarray(source.indices)]
    for key in LABELS:
        if key in getattr(source, "column_names", ()):
            return np.asarray(source[key], np.int64)
    if getattr(source, "targets", None) is None or getattr(source, "target_transform", None):
        return None
    return np.asarray(source.targets, np.int64)


def _read_all(what: str, records: Objects, workers: int) -> tuple[Integers, str]:
    """Reads every item; returns the labels and a digest of the images."""
    starts = range(0, len(records), CHUNK)
    chunks = [range(first, min(first + CHUNK, len(records))) for first in starts]
    labels, digest = [], hashlib.sha256()
    found = in_workers(_ItemDataset(records.source), chunks, workers)
    for read in progress(found, f"reading {what}", "chunk", len(chunks)):
        if isinstance(read, str):
            raise UserError(f"data: {what}: {read}")
        labels += read[0]
        digest.update(read[1])
    return np.array(labels, np.int64), digest.hexdigest()


class _ItemDataset(TorchDataset[tuple[list[int], bytes] | str]):
    """Computes labels and image digests of chunks of items; runs in worker processes."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, chunk: range) -> tuple[list[int], bytes] | str:
        labels, digests = [], []
        for i in chunk:
            try:
                image, label = read_item(self.source, i)
                again = _digest(read_item(self.source, i)[0]) if i < NUM_REREAD else None
            except DecodeError as error:
                return f"item {i}: {error}; fix or remove it"
            labels.append(label)
            digests.append(_digest(image))
            if again not in (None, digests[-1]):
                return (
                    f"item {i}: expected the same image each time, got two different ones; remove "
                    "random transforms, which vitral's augmentation replaces, or pass fingerprint="
                )
        return labels, b"".join(digests)


def _digest(image: Any) -> bytes:
    pixels = image.permute(1, 2, 0).numpy()
    return hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).digest()
