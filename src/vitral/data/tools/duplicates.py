"""Finds identical and similar images with a perceptual hash, within and across splits.

The hash is pHash: whether each of the 64 lowest frequencies is above their median. Few bits change
if an image is resized, compressed again or brightened. Mirrored images have different hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vitral.data.crops import crop_resize
from vitral.data.records import Records, image_path, label_of
from vitral.data.sampling import Integers
from vitral.errors import counted, first_few, printable
from vitral.storage import write_csv

MAX_DISTANCE = 4  # bits in which the hashes of similar images may differ
BANDS = (11, 11, 11, 11, 10, 10)  # bits of the hash
SIZE = 32  # side of the image whose frequencies are computed
COSINES = np.cos(np.pi / SIZE * np.outer(np.arange(8), np.arange(SIZE) + 0.5))  # of a DCT-II
GRAY = np.array([0.299, 0.587, 0.114])
KINDS = ("in both splits", "with different labels", "with the same label")
MAX_SHOWN = 5  # groups of each kind
Hashes = NDArray[np.uint64]


def hash_content(content: bytes | memoryview) -> int:
    """Returns 64 bits of a hash of a file or of the pixels of an image."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def perceptual_hash(image: Tensor) -> int:
    """Returns pHash of an image (3, H, W), uint8: 64 bits.

    Source: Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", with
    the 8 x 8 lowest frequencies including the mean.
    """
    pixels = crop_resize(image, np.array([0, 0, *image.shape[1:]]), SIZE, "bilinear").numpy()
    spectrum = COSINES @ np.tensordot(GRAY, pixels, 1) @ COSINES.T
    spectrum = spectrum.round(3)  # zeros that are not exact would be random bits
    bits = np.packbits(spectrum > np.median(spectrum)).tobytes()
    return int.from_bytes(bits, "big")


class Image(NamedTuple):
    """An image in a group of duplicates."""

    split: str
    label: str
    path: str
    identical: bool
    """Whether another image of the group has the same content."""


@dataclass(frozen=True)
class Duplicates:
    """Groups of identical or similar images."""

    groups: Sequence[tuple[str, Sequence[Image]]]
    """Kind and images of each group, in the order of KINDS."""

    def __str__(self) -> str:
        images = [image for _, group in self.groups for image in group]
        identical = sum(image.identical for image in images)
        if not images:
            return "duplicates: none"
        lines = [
            f"duplicates: {counted(len(self.groups), 'group')} of identical or similar images, "
            f"{counted(len(images), 'image')}, {identical:,} with an identical copy"
        ]
        for kind in KINDS:
            groups = [group for known, group in self.groups if known == kind]
            lines += [f"  {kind}: {counted(len(groups), 'group')}"] * bool(groups)
            for group in groups[:MAX_SHOWN]:
                places = [f"{printable(image.path)} ({image.label})" for image in group]
                lines += [f"    {first_few(places)}"]
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Writes a CSV file with a row for each image."""
        rows = [
            (number, kind, *image[:-1], "yes" if image.identical else "no")
            for number, (kind, group) in enumerate(self.groups, 1)
            for image in group
        ]
        write_csv(path, ("group", "kind", "split", "label", "image", "identical"), rows)


class Split(NamedTuple):
    """The images of a split and their hashes."""

    name: str
    records: Records
    hashes: Hashes
    """Hash of the content, and perceptual hash. Shape (N, 2)."""
    decoded: NDArray[np.bool_]
    """Whether the image can be decoded; only these images are compared. Shape (N,)."""


def find_duplicates(splits: Sequence[Split], classes: tuple[str, ...]) -> Duplicates:
    """Groups the images whose hashes differ in at most MAX_DISTANCE bits.

    If A is similar to B, and B to C, all three are in one group.
    """
    indices = [np.flatnonzero(split.decoded) for split in splits]
    numbers = np.repeat(np.arange(len(splits)), [len(index) for index in indices])
    index = np.concatenate(indices)
    hashes = np.concatenate([split.hashes[split.decoded] for split in splits])
    group = similar(hashes[:, 1])
    several = np.flatnonzero(np.bincount(group)[group] > 1)
    members = several[np.argsort(group[several], kind="stable")]
    starts = np.flatnonzero(np.diff(group[members])) + 1

    def described(chosen: Integers) -> tuple[str, list[Image]]:
        content = hashes[chosen, 0]
        _, which, copies = np.unique(content, return_inverse=True, return_counts=True)
        columns = (numbers[chosen], index[chosen], copies[which] > 1)
        images = []
        for s, i, copy in zip(*(column.tolist() for column in columns), strict=True):
            name, records = splits[s].name, splits[s].records
            images.append(Image(name, label_of(records, classes, i), image_path(records, i), copy))
        across = len({image.split for image in images}) > 1
        kind = 0 if across else 1 if len({image.label for image in images}) > 1 else 2
        return KINDS[kind], images

    found = [described(chosen) for chosen in np.split(members, starts) if len(chosen)]
    return Duplicates(sorted(found, key=lambda item: KINDS.index(item[0])))


def similar(hashes: Hashes) -> Integers:
    """Returns the group of each hash, numbered by its first member. Shape (N,).

    Two hashes are in one group if a chain of hashes connects them in which neighbors differ in at
    most MAX_DISTANCE bits.
    """
    from scipy.sparse import csr_array  # training does not need SciPy, but imports this module
    from scipy.sparse.csgraph import connected_components

    distinct, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    n = len(distinct)
    root = np.arange(n)  # a member of each hash's group
    for pairs in close_pairs(distinct):
        edges = np.concatenate([pairs, [np.arange(n), root]], 1)
        graph = csr_array((np.ones(edges.shape[1], bool), (edges[0], edges[1])), (n, n))
        _, component = connected_components(graph, directed=False)
        root = np.unique(component, return_index=True)[1][component]
    earliest = np.full(n, len(hashes))
    np.minimum.at(earliest, root, first)
    return earliest[root][inverse]


def close_pairs(hashes: Hashes) -> Iterator[Integers]:
    """Yields positions of all pairs of hashes that differ in at most MAX_DISTANCE bits, (2, n).

    Of six bands of bits, four different bits leave two unchanged. The hashes are therefore sorted
    by each pair of bands, and compared with those that have the same bits there.
    """
    ends = np.cumsum(BANDS).tolist()
    bands = [((1 << width) - 1) << (end - width) for width, end in zip(BANDS, ends, strict=True)]
    for one, other in combinations(bands, 2):
        keys = hashes & np.uint64(one | other)
        order = np.argsort(keys)
        keys, ordered = keys[order], hashes[order]
        found, start, shift = [np.empty((2, 0), np.int64)], np.arange(len(hashes)), 0
        while len(start):
            shift += 1
            start = start[start + shift < len(hashes)]
            start = start[keys[start] == keys[start + shift]]
            different = np.bitwise_count(ordered[start] ^ ordered[start + shift])
            close = start[different <= MAX_DISTANCE]
            found.append(np.stack([order[close], order[close + shift]]))
        yield np.concatenate(found, 1)
