"""Checks every image of a dataset before training: counts, sizes, broken files, decoding speed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from vitral.config import DataConfig
from vitral.data.decode import DecodeError, decode
from vitral.data.formats import open_dataset, packed
from vitral.data.formats.folder import holds_only_validation
from vitral.data.records import Encoded, Packed, Pixels
from vitral.data.sampling import Integers, count_labels
from vitral.data.tools.duplicates import (
    Duplicates,
    Split,
    find_duplicates,
    hash_content,
    perceptual_hash,
)
from vitral.data.workers import in_workers
from vitral.errors import counted, reason_of
from vitral.files import expand

MAX_LISTED_CLASSES = 30
MAX_IMBALANCE = (
    10  # ratio of the most frequent to the rarest class above which options are suggested
)
MULTI_LABEL_OPTIONS = "--data.sampling balanced"
OPTIONS = f"{MULTI_LABEL_OPTIONS}, --train.class-weights balanced or --train.logit-adjustment 1"
T = TypeVar("T")
BATCH = 64  # files that a worker checks at a time
FileCheck = tuple[int, int, int, str, float, tuple[int, int]]
"""Width, height, bytes, error, seconds, and hashes: of the content, and the perceptual hash."""


@dataclass(frozen=True)
class Report:
    """Results of `check`."""

    name: str
    classes: tuple[str, ...]
    multi_label: bool
    notes: tuple[str, ...]
    counts: dict[str, Integers]
    """Number of images per class by split, each of shape (classes,)."""
    images: dict[str, int]
    """Number of images by split, which is not the sum of the counts if they have several labels."""
    broken: tuple[tuple[str, str], ...]
    """Location and reason for each file that cannot be decoded."""
    dimensions: Integers
    """Width and height of each decodable image, in pixels. Shape (images, 2)."""
    sizes: Integers
    """Size in bytes of each file, or of each image of a pixel dataset. Shape (images,)."""
    rate: float | None
    """Images decoded per second of one core's CPU time; None if nothing needs decoding."""
    duplicates: Duplicates | None = None
    """Identical and similar images, if they were searched for."""


def check(
    config: DataConfig, image_size: int, seed: int, workers: int, duplicates: bool = False
) -> Report:
    """Decodes every file of the dataset that `config.path` names.

    Args:
        image_size: size of synthetic images, in pixels.
        seed: selects the held-out images if there is no validation split.
        workers: number of decoding processes; 0 decodes in the current process.
        duplicates: whether to search for identical and similar images.

    Raises:
        UserError: if the dataset cannot be opened.
    """
    root = expand(config.path)
    # `vitral val` accepts a validation split without a training split.
    validation_only = root.is_dir() and holds_only_validation(root)
    dataset = open_dataset(config, image_size, seed, train=not validation_only)
    damaged = packed.verify(root) if packed.matches(root) else []
    counts, images, broken, dimensions, sizes, seconds, hashed = {}, {}, [], [], [], [], []
    for split, records in (("train", dataset.train), ("val", dataset.val)):
        if records is None:
            continue
        counts[split] = count_labels(records.labels, len(dataset.classes))
        images[split] = len(records)
        decoded = np.ones(len(records), bool)
        hashes = np.zeros((len(records), 2), np.uint64)
        if isinstance(records, Packed | Pixels):
            dimensions += [records.images.shape[:1:-1]] * len(records)
            sizes += [np.prod(records.images.shape[1:])] * len(records)
            if duplicates:
                hashes[:] = [*_in_batches(_HashDataset(records), len(records), workers)]
        else:
            checks = _in_batches(_CheckDataset(records, duplicates), len(records), workers)
            for i, (width, height, size, reason, spent, found) in enumerate(checks):
                hashes[i] = found
                seconds.append(spent)
                sizes.append(size)
                if reason:
                    broken.append((records.where(i), reason))
                    decoded[i] = False
                else:
                    dimensions.append((width, height))
        hashed.append(Split(split, records, hashes, decoded))
    broken += [(place, reason) for place, _, reason in (d.partition(": ") for d in damaged)]
    rate = len(seconds) / max(sum(seconds), 1e-9) if seconds else None
    found = np.array(dimensions, np.int64).reshape(-1, 2), np.array(sizes, np.int64)
    dataset_facts = dataset.name, dataset.classes, dataset.multi_label, dataset.notes
    groups = find_duplicates(hashed, dataset.classes) if duplicates else None
    return Report(*dataset_facts, counts, images, tuple(broken), *found, rate, groups)


def _in_batches(images: Dataset[list[T]], count: int, workers: int) -> Iterator[T]:
    """Yields the result for each of `count` images, computed in workers."""
    chunks = (range(first, min(first + BATCH, count)) for first in range(0, count, BATCH))
    for results in in_workers(images, chunks, workers):
        yield from results


class _CheckDataset(Dataset[list[FileCheck]]):
    """Decodes chunks of images; runs in worker processes."""

    def __init__(self, records: Encoded, hash_images: bool) -> None:
        self.records, self.hash_images = records, hash_images

    def __getitem__(self, request: range) -> list[FileCheck]:
        return [self._check_file(index) for index in request]

    def _check_file(self, index: int) -> FileCheck:
        started = time.process_time()  # not affected by other processes, unlike wall time
        width = height = size = 0
        reason, hashes = "", (0, 0)
        try:
            content = self.records.read(index)
            size = len(content)
            image = decode(content)
            height, width = image.shape[1:]
            spent = time.process_time() - started
            if self.hash_images:
                hashes = hash_content(content), perceptual_hash(image)
        except (DecodeError, OSError) as error:
            reason, spent = reason_of(error), time.process_time() - started
        return width, height, size, reason, spent, hashes


class _HashDataset(Dataset[list[tuple[int, int]]]):
    """Computes the hashes of images that are already decoded; runs in worker processes."""

    def __init__(self, records: Packed | Pixels) -> None:
        self.records = records

    def __getitem__(self, request: range) -> list[tuple[int, int]]:
        records, indices = self.records, np.asarray(request)
        images = (
            torch.from_numpy(records.squares(indices))
            if isinstance(records, Packed)
            else records.images[indices]
        )
        return [
            (hash_content(image.contiguous().numpy().data), perceptual_hash(image))
            for image in images
        ]


def format_report(report: Report) -> str:
    """Formats the report as text; for over 30 classes, lists only the rarest and most frequent."""
    lines = [f"{report.name}: {counted(len(report.classes), 'class')}", *report.notes]
    for split, counts in report.counts.items():
        imbalance = counts.max() / max(counts.min(), 1)
        lines += [
            f"{split}: {counted(report.images[split], 'image')}, {_range(counts, 'per class')}, "
            f"imbalance ratio {imbalance:.1f}"
        ]
        rising = [f"{report.classes[i]} {counts[i]:,}" for i in np.argsort(counts, kind="stable")]
        if len(rising) > MAX_LISTED_CLASSES:
            rising[5:-5] = ["..."]
        lines += [f"  rarest first: {', '.join(rising)}"]
        if split == "train" and imbalance > MAX_IMBALANCE:
            lines += [
                f"  imbalance ratio above {MAX_IMBALANCE}: if rare classes matter, try "
                f"{MULTI_LABEL_OPTIONS if report.multi_label else OPTIONS}, and compare the "
                "accuracy of each class"
            ]
    if len(report.dimensions):
        for side, values in zip(
            ("shorter", "longer"), np.sort(report.dimensions, axis=1).T, strict=True
        ):
            lines += [f"{side} side: {_range(values, 'pixels')}"]
    total = f"{report.sizes.sum() / 1e6:,.1f} MB in total"
    lines += [f"size: {_range(report.sizes, 'bytes')}, {total}"]
    if report.rate is not None:
        lines += [f"decoding: {report.rate:,.0f} img/s per core"]
    lines += [f"broken files: {len(report.broken)}"]
    lines += [f"  {path}: {reason}" for path, reason in report.broken]
    if report.duplicates is not None:
        lines += [str(report.duplicates)]
    return "\n".join(lines)


def _range(values: Integers, unit: str) -> str:
    return f"{values.min():,} to {values.max():,} {unit} (median {int(np.median(values)):,})"
