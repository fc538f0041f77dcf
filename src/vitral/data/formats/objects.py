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
from vitral.data.records import Dataset, class_name, hold_out
from vitral.data.sampling import Integers
from vitral.data.workers import in_workers
from vitral.errors import UserError, data_error, first_few

CHUNK = 64  # items that a worker reads at a time
NUM_REREAD = 8  # items that are read again, to find out whether they are the same each time


@dataclass(frozen=True)
class PythonDatasets:
    """What `vitral.train` is given in the place of a path."""

    train: Source
    val: Source | None = None
    """None holds out a part of `train`."""
    classes: Sequence[str] | None = None
    """Names of the classes; None takes those of the dataset."""
    fingerprint: str | None = None
    """Identifies the images; None hashes all of them."""


def python_datasets(
    config: Config,
    train: Source | None,
    val: Source | None,
    classes: Sequence[str] | None,
    fingerprint: str | None,
) -> tuple[Config, PythonDatasets | None]:
    """What a run is given, and its settings: `data.path` is PATH if it is given a dataset.

    Raises:
        UserError: something else is given, but no dataset to train on.
    """
    if train is not None:
        settings = replace(config, data=replace(config.data, path=PATH))
        return settings, PythonDatasets(train, val, classes, fingerprint)
    if val is not None or classes is not None or fingerprint is not None:
        raise UserError("dataset: expected one, as val_dataset, classes or fingerprint is given")
    return config, None


def open_data(config: Config, datasets: PythonDatasets | None) -> Dataset:
    """The data set of a run: what is given, or what is at `data.path`. Raises UserError."""
    if datasets is not None:
        return open_objects(datasets, config.data, config.train.seed)
    return open_dataset(config.data, config.model.image_size, config.train.seed)


def open_objects(datasets: PythonDatasets, config: DataConfig, seed: int) -> Dataset:
    """The data set of Python datasets.

    Raises:
        UserError: the datasets cannot be used.
    """
    classes = class_names(datasets.train, datasets.classes)
    train = records_of("dataset", datasets.train, classes, config, datasets.fingerprint)
    dataset = Dataset(PATH, classes, train, None)
    if datasets.val is not None:
        if own_names(datasets.val) not in (None, classes) and datasets.classes is None:
            raise data_error("val_dataset", "the classes of dataset", "others", "give classes=")
        val = records_of("val_dataset", datasets.val, classes, config, datasets.fingerprint)
        dataset = replace(dataset, val=val)
    if datasets.val is None or config.hold_out:
        why = "no val_dataset is used"
        return hold_out(dataset, "dataset", config.val_fraction, seed, why)
    return dataset


def class_names(source: Source, given_names: Sequence[str] | None) -> tuple[str, ...]:
    """The names that are given, or those of the dataset.

    Raises:
        UserError: there are none, fewer than two, or equal ones.
    """
    names = (
        own_names(source)
        if given_names is None
        else tuple(class_name(str(name)) for name in given_names)
    )
    if names is None:
        raise data_error("dataset", "class names in .classes or .features", "none", "give classes=")
    if len({*names}) != len(names) or len(names) < 2:
        got = f"{len(names)}: {first_few(names)}"
        raise data_error("dataset", "two or more different class names", got, "give classes=")
    return names


def own_names(source: Any) -> tuple[str, ...] | None:
    """Names in `classes`, as torchvision has them, or in `features`, as Hugging Face has them."""
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
    """The records of a Python dataset.

    Every item is read once, to hash its image and to know its label; not if a fingerprint is given
    and the dataset lists its labels.

    Args:
        what: the name of the dataset, for messages.

    Raises:
        UserError: it is empty, or an item is not an image with a label of one of the classes.
    """
    rows = np.arange(len(source))
    if not len(rows):
        raise data_error(what, "images", "an empty dataset", "give another")
    records = Objects(source, rows, np.zeros_like(rows), fingerprint or "")
    labels = None if fingerprint is None else _listed_labels(source)
    if labels is None:
        labels, digest = _read_all(what, records, resolve_workers(config, records))
        records = replace(records, digest=fingerprint or digest)
    strange = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(strange):
        got = f"{labels[strange[0]]} of item {strange[0]}"
        fix = "correct the label or give all class names"
        raise data_error(what, f"labels from 0 to {len(classes) - 1}", got, fix)
    return replace(records, labels=labels)


def _listed_labels(source: Any) -> Integers | None:
    """Labels that a dataset lists apart from its images; None if it lists none."""
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
    """Reads every item; returns the labels and the digest of the images."""
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
    """Labels and digests of the images of some items, or an error; runs in worker processes."""

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
                    f"item {i}: expected the same image each time, got two; remove the random "
                    "transforms, which vitral's augmentation replaces, or give fingerprint="
                )
        return labels, b"".join(digests)


def _digest(image: Any) -> bytes:
    pixels = image.permute(1, 2, 0).numpy()
    return hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).digest()
