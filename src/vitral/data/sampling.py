"""Which sample comes when, and every random number that is drawn for it.

Nothing random is saved: all of it is recomputed from (seed, epoch, index) by a counter-based hash,
in the manner of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". The mixing
function is SplitMix64's (Steele et al. 2014).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64-bit integers that spreads every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*words: int | Integers) -> NDArray[np.uint64]:
    """A 64-bit hash of integers, elementwise over arrays of one shape or scalars."""
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            word = np.uint64(word & _MASK) if isinstance(word, int) else word.astype(np.uint64)
            state = _mix((state ^ word) + np.uint64(_GOLDEN))
    return state


def derive_seed(purpose: str, *words: int) -> int:
    """A seed for `torch.manual_seed`, below 2**63, from a purpose and (seed, step) or the like."""
    return int(hash64(crc32(purpose.encode()), *words)) >> 1


def uniforms(
    seed: int, epoch: int | Integers, indices: Integers, count: int, purpose: str = ""
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), a row a sample, each a pure function of its arguments.

    Args:
        epoch: of all samples, or of each, shape (B,).
        indices: of the samples in the data set, shape (B,).
        purpose: names independent streams; the first k columns do not depend on `count`.

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
    """The order of the `size` samples in `epoch`. Shape (size,), a permutation of 0 to size - 1."""
    order = np.argsort(hash64(seed, crc32(b"order"), epoch, np.arange(size)), kind="stable")
    order.setflags(write=False)
    return order


def held_out(
    keys: Integers, labels: Integers, fraction: float, seed: int, purpose: str
) -> NDArray[np.bool_]:
    """Which images to hold out of training: a fraction of each class, drawn by hashed keys.

    Args:
        keys: of the images, shape (N,); the choice depends on them and not on the order.
        labels: shape (N,).
        purpose: names independent draws.

    Returns:
        Shape (N,): the rounded fraction of each class, at least one image and never all.
    """
    counts = np.bincount(labels)
    quota = np.minimum(np.maximum(np.rint(fraction * counts), 1), counts - 1)
    return random_ranks(keys, labels, seed, purpose) < quota[labels]


def random_ranks(keys: Integers, labels: Integers, seed: int, purpose: str) -> Integers:
    """The place of each image in a random order of its class: 0, 1, ... Shape (N,).

    Args:
        keys, labels, purpose: as for `held_out`.
    """
    order = np.lexsort((hash64(seed, crc32(purpose.encode()), keys), labels))
    counts = np.bincount(labels)
    ranks = np.empty(len(keys), np.int64)
    ranks[order] = np.arange(len(keys)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks


@dataclass(frozen=True)
class Order:
    """The endless concatenation of permuted epochs, cut into global batches.

    With `repeats` R > 1 a batch of G holds G / R images, R times each: position j holds image
    j mod (G / R), so that within an epoch the partners j and j xor 1 of Mixup are different images;
    each copy is augmented as of its own epoch.
    """

    seed: int
    size: int
    batch_size: int
    repeats: int = 1

    def samples(self, step: int, start: int, stop: int) -> tuple[Integers, Integers]:
        """Positions start to stop of global batch `step`.

        Returns:
            The epoch to draw each sample for, and its index, both of shape (stop - start,).
        """
        distinct = self.batch_size // self.repeats
        j = np.arange(start, stop)
        epochs, places = np.divmod(step * distinct + j % distinct, self.size)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = permutation(self.seed, int(epoch), self.size)[places[chosen]]
        return epochs * self.repeats + j // distinct, indices

    def end_of_epoch(self, epoch: int) -> int:
        """The steps that `epoch` times the size of the set takes, repeats counted."""
        return -(-epoch * self.size // self.batch_size)
