"""Computes the order of the samples, and the random numbers of each sample.

No random state is saved. Every random number is recomputed from (seed, epoch, index) with a
counter-based hash, as in Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". The
mixing function is that of SplitMix64 (Steele et al. 2014).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Self
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from vitral.config import Config, Sampling

Integers = NDArray[np.int64]
Labels = NDArray[Any]
"""Labels of N images: indices of classes, shape (N,), or, if an image can have several, 0 or 1 for
each class, uint8, shape (N, classes)."""

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Applies SplitMix64's finalizer, a bijection of 64-bit integers that diffuses every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*words: int | Integers) -> NDArray[np.uint64]:
    """Returns a 64-bit hash of integers, elementwise over scalars or arrays of one shape."""
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            word = np.uint64(word & _MASK) if isinstance(word, int) else word.astype(np.uint64)
            state = _mix((state ^ word) + np.uint64(_GOLDEN))
    return state


def derive_seed(purpose: str, *words: int) -> int:
    """Derives a seed for `torch.manual_seed`, below 2**63, from a purpose and integers."""
    return int(hash64(crc32(purpose.encode()), *words)) >> 1


def uniforms(
    seed: int, epoch: int | Integers, indices: Integers, count: int, purpose: str = ""
) -> NDArray[np.float64]:
    """Draws uniform numbers in [0, 1), one row per sample, each a pure function of its arguments.

    Args:
        epoch: epoch of all samples, or of each sample, shape (B,).
        indices: indices of the samples in the dataset, shape (B,).
        count: number of values per sample; the first k columns do not depend on it.
        purpose: selects an independent stream.

    Returns:
        Shape (B, count).
    """
    rows = hash64(seed, crc32(purpose.encode()), np.broadcast_to(epoch, indices.shape), indices)
    columns = np.arange(count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        bits = _mix(rows[:, None] + (columns + np.uint64(1)) * np.uint64(_GOLDEN))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> Integers:
    """Returns the order of samples in `epoch`: a permutation of 0 to size - 1, shape (size,)."""
    order = np.argsort(hash64(seed, crc32(b"order"), epoch, np.arange(size)), kind="stable")
    order.setflags(write=False)
    return order


def count_labels(labels: Labels, num_classes: int) -> Integers:
    """Returns the number of images with each label, shape (classes,)."""
    if labels.ndim == 2:
        return labels.sum(0, dtype=np.int64)
    return np.bincount(labels, minlength=num_classes)


def strata(labels: Labels) -> Integers:
    """Returns the class by which each image is selected, shape (N,).

    This is its label or, if it has several, the rarest of them (Sechidis et al. 2011). Images
    without any label form a class of their own, after the others.
    """
    if labels.ndim == 1:
        return labels
    by_rarity = np.argsort(count_labels(labels, labels.shape[1]), kind="stable")
    rarest = by_rarity[labels[:, by_rarity].argmax(1)]
    return np.where(labels.any(1), rarest, labels.shape[1])


def held_out(
    keys: Integers, labels: Integers, fraction: float, seed: int, purpose: str
) -> NDArray[np.bool_]:
    """Selects the images to hold out of training: a fraction of each class, drawn by hashed keys.

    Args:
        keys: keys of the images, shape (N,); the selection depends on them and not on their order.
        labels: shape (N,).
        purpose: selects an independent stream.

    Returns:
        Mask of shape (N,): the rounded fraction of each class, but at least one and never all.
    """
    counts = np.bincount(labels)
    quota = np.minimum(np.maximum(np.rint(fraction * counts), 1), counts - 1)
    return random_ranks(keys, labels, seed, purpose) < quota[labels]


def held_out_groups(
    groups: Integers, labels: Integers, fraction: float, seed: int, purpose: str
) -> NDArray[np.bool_]:
    """Selects groups of images to hold out of training: about a fraction of each class.

    A group belongs to the rarest of its classes, because rare classes are the hardest to divide
    (Sechidis et al. 2011). Of the groups of a class, in a random order, the first are held out, so
    that as close as possible to the fraction of the class's images in these groups are.

    Args:
        groups: hash of the name of each image's group, shape (N,).
        labels: shape (N,).
        purpose: selects an independent draw.

    Returns:
        Mask of shape (N,), the same for all images of a group. At least one group of each class
        that has two or more is held out, and never all.
    """
    names, group = np.unique(groups, return_inverse=True)
    rarest, sizes = _rarest_classes(group, labels)
    order = np.lexsort((hash64(seed, crc32(purpose.encode()), names), rarest))
    held = np.zeros(len(names), bool)
    for members in np.split(order, np.flatnonzero(np.diff(rarest[order])) + 1):
        total = np.cumsum(sizes[members])
        best = int(np.abs(total - fraction * total[-1]).argmin()) + 1
        held[members[: min(best, len(members) - 1)]] = True
    return held[group]


def _rarest_classes(group: Integers, labels: Integers) -> tuple[Integers, Integers]:
    """Returns the rank by rarity of each group's rarest class, and its images of that class.

    Args:
        group: number of each image's group, shape (N,).
    """
    counts = np.bincount(labels)
    by_rarity = np.lexsort((np.arange(len(counts)), counts))
    rarity = np.argsort(by_rarity)[labels]  # 0 for the rarest class
    rarest = np.full(group.max() + 1, len(counts))
    np.minimum.at(rarest, group, rarity)
    return rarest, np.bincount(group, rarity == rarest[group]).astype(np.int64)


def random_ranks(keys: Integers, labels: Integers, seed: int, purpose: str) -> Integers:
    """Returns the position of each image in a random order of its class: 0, 1, ... Shape (N,).

    Args:
        keys, labels, purpose: as for `held_out`.
    """
    order = np.lexsort((hash64(seed, crc32(purpose.encode()), keys), labels))
    counts = np.bincount(labels)
    ranks = np.empty(len(keys), np.int64)
    ranks[order] = np.arange(len(keys)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks


def divide(
    keys: Integers,
    labels: Integers,
    count: int,
    seed: int,
    purpose: str,
    groups: Integers | None = None,
) -> Integers:
    """Divides images into folds, each with about the same number of images of each class.

    A group belongs to the rarest of its classes, as in `held_out_groups`. The groups of a class are
    assigned from the largest to the smallest, each to the fold with the fewest images of the class
    so far, and of these to the one with the fewest images in total.

    Args:
        keys, labels, purpose: as for `held_out`.
        count: number of folds.
        groups: group of each image, shape (N,); images of a group are in the same fold.

    Returns:
        Fold of each image, from 0 to count - 1. Shape (N,).
    """
    if groups is None:
        return random_ranks(keys, labels, seed, purpose) % count
    names, group = np.unique(groups, return_inverse=True)
    rarest, sizes = _rarest_classes(group, labels)
    order = np.lexsort((hash64(seed, crc32(purpose.encode()), names), -sizes, rarest))
    of_group, before = np.empty(len(names), np.int64), -1
    in_class, in_total = [0] * count, [0] * count
    columns = (column.tolist() for column in (order, sizes[order], rarest[order]))
    for i, size, owner in zip(*columns, strict=True):
        if owner != before:
            in_class, before = [0] * count, owner
        fold = min(range(count), key=lambda k: (in_class[k], in_total[k]))
        of_group[i] = fold
        in_class[fold] += size
        in_total[fold] += size
    return of_group[group]


def quotas(counts: Integers, sampling: Sampling) -> NDArray[np.float64]:
    """Returns the expected number of images of each class in an epoch, for `data.sampling`.

    Args:
        counts: number of images of each class, shape (classes,).
    """
    shares = {"uniform": np.positive, "balanced": np.sign, "sqrt": np.sqrt}[sampling](counts)
    return counts.sum() * shares / shares.sum()


@dataclass(frozen=True, eq=False)
class Repetition:
    """Number of times that each image occurs in an epoch, if `data.sampling` is not uniform.

    An epoch has as many samples as there are images. A class gets its quota of them, rounded up or
    down by systematic sampling over the classes in random order (Madow 1949). Each image of a class
    occurs equally often, or once more; which ones occur once more is drawn for each epoch.
    """

    labels: Integers
    """Positions in `counts`, shape (N,)."""
    counts: Integers
    """Images of each class that has any, shape (classes,)."""
    quotas: NDArray[np.float64]
    """Expected samples of each of these classes in an epoch, shape (classes,)."""

    @classmethod
    def of(cls, labels: Integers, sampling: Sampling) -> Self:
        """Returns the repetition of images with these labels, shape (N,)."""
        _, positions, counts = np.unique(labels, return_inverse=True, return_counts=True)
        return cls(positions, counts, quotas(counts, sampling))

    @cached_property
    def most(self) -> int:
        """Largest number of times that an image can occur in an epoch."""
        return int(np.max(np.ceil(np.ceil(self.quotas) / self.counts)))

    def times(self, seed: int, epoch: int) -> Integers:
        """Returns how often each image occurs in an epoch, shape (N,)."""
        seed, size = derive_seed("repetition", seed, epoch), len(self.labels)
        classes = permutation(seed, 0, len(self.counts))
        offset = uniforms(seed, 0, np.zeros(1, np.int64), 1, "systematic").item()
        bounds = np.floor(np.cumsum(self.quotas[classes]) + offset).astype(np.int64)
        bounds[-1] = size  # whatever the rounding of the sum
        totals = np.empty_like(bounds)
        totals[classes] = np.diff(bounds, prepend=0)
        times, more = np.divmod(totals, self.counts)
        ranks = random_ranks(np.arange(size), self.labels, seed, "once more")
        return times[self.labels] + (ranks < more[self.labels])


@lru_cache(maxsize=2)
def repeated(seed: int, epoch: int, repetition: Repetition) -> tuple[Integers, Integers]:
    """Returns the order of samples in `epoch` if images are repeated.

    Returns:
        Index of each sample, and number of its copy of this image: 0, 1, ... Both of shape (N,).
    """
    times, everything = repetition.times(seed, epoch), np.arange(len(repetition.labels))
    copies = everything - np.repeat(np.cumsum(times) - times, times)
    order = permutation(seed, epoch, len(everything))
    return np.repeat(everything, times)[order], copies[order]


@dataclass(frozen=True)
class Order:
    """An endless sequence of permuted epochs, divided into global batches.

    With `repeats` R > 1, a batch of size G contains G / R images, R times each. Position j contains
    image j mod (G / R), so that within an epoch, positions j and j xor 1, which Mixup pairs,
    contain different images. Each copy is augmented with the random numbers of a different epoch,
    also the copies of `repetition`. These are in random positions, so that Mixup may combine two.
    """

    seed: int
    size: int
    batch_size: int
    repeats: int = 1
    repetition: Repetition | None = None

    @classmethod
    def of(cls, config: Config, labels: Labels) -> Self:
        """Returns the order of a run on images with these labels.

        With `data.sampling`, an image with several labels is repeated as often as the rarest
        requires (Gupta et al. 2019).
        """
        sampling, size = config.data.sampling, config.train.batch_size
        repetition = None if sampling == "uniform" else Repetition.of(strata(labels), sampling)
        return cls(config.train.seed, len(labels), size, config.augment.repeats, repetition)

    def samples(self, step: int, start: int, stop: int) -> tuple[Integers, Integers]:
        """Returns the samples at positions start to stop of global batch `step`.

        Returns:
            The epoch to draw each sample for, and its index, both of shape (stop - start,).
        """
        distinct = self.batch_size // self.repeats
        j = np.arange(start, stop)
        epochs, places = np.divmod(step * distinct + j % distinct, self.size)
        indices, copies, most = np.empty_like(places), np.zeros_like(places), 1
        for epoch in map(int, np.unique(epochs)):
            chosen = epochs == epoch
            if self.repetition is None:
                indices[chosen] = permutation(self.seed, epoch, self.size)[places[chosen]]
            else:
                most, order = self.repetition.most, repeated(self.seed, epoch, self.repetition)
                indices[chosen], copies[chosen] = (part[places[chosen]] for part in order)
        return (epochs * most + copies) * self.repeats + j // distinct, indices

    def end_of_epoch(self, epoch: int) -> int:
        """Returns the number of steps in `epoch` passes over the dataset, counting repeats."""
        return -(-epoch * self.size // self.batch_size)
