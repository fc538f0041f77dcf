"""Temperature scaling (Guo et al. 2017), and accuracy against coverage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitral.data.loader import Batch

MAX_TEMPERATURE = 20.0  # temperatures are between this and its inverse
MAX_LOGITS = 1 << 26  # logits kept to fit a temperature: 256 MiB
TOLERANCE = 1e-10  # relative change of the temperature at which the fit stops
MAX_STEPS = 100

Sums = tuple[float, float]
Gather = Callable[[list[Sums]], list[list[Sums]]]


class Logits:
    """The logits of a dataset, or of one process's part of it, on the CPU.

    Args:
        images: number of images of the entire dataset. If it has more than `MAX_LOGITS` logits,
            only those of evenly spaced images are kept.
        num_classes: number of logits per image.
    """

    def __init__(self, images: int, num_classes: int) -> None:
        self.stride = max(1, -(-images * num_classes // MAX_LOGITS))
        self.batches: list[tuple[Tensor, Tensor]] = []

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Adds the logits (n, classes) of a batch."""
        kept = slice(-batch.first % self.stride, None, self.stride)
        self.batches.append((logits[kept].cpu(), batch.targets[kept].cpu()))

    def confidence(self, temperature: float) -> NDArray[np.float64] | None:
        """Returns the largest probability of each image, (n,); None if some were not kept."""
        if self.stride > 1:
            return None
        found = [confidence(logits, temperature) for logits, _ in self.batches]
        return torch.cat([torch.zeros(0), *found]).double().numpy()


def confidence(logits: Tensor, temperature: float) -> Tensor:
    """Returns the largest probability after temperature scaling: (n, classes) to (n,)."""
    return (logits / temperature).softmax(1).amax(1)


def fit_temperature(logits: Logits, gather: Gather = lambda sums: [sums]) -> float | None:
    """Returns the temperature that minimizes the mean cross-entropy of softmax(logits / T).

    The cross-entropy is convex in 1 / T. It is minimized with Newton's method in float64. The
    result does not depend on how the batches are distributed over processes.

    Args:
        gather: returns the sums of all processes. Every process must call this function.

    Returns:
        The temperature; None if there is no minimum within `MAX_TEMPERATURE` and its inverse. This
        is the case if all images are classified correctly, if the model is not better than chance,
        or if a logit is not finite.
    """

    def derivatives(scale: float) -> tuple[float, float]:
        """Returns the first and second derivative of the total with respect to 1 / T."""
        own = [_derivatives(*batch, scale) for batch in logits.batches]
        sums = [each for part in gather(own) for each in part]
        # fsum is exact, so the order does not matter.
        return math.fsum(first for first, _ in sums), math.fsum(second for _, second in sums)

    low, high = 1 / MAX_TEMPERATURE, MAX_TEMPERATURE
    if not derivatives(low)[0] < 0 < derivatives(high)[0]:
        return None
    scale = 1.0
    for _ in range(MAX_STEPS):
        slope, curvature = derivatives(scale)
        low, high = (scale, high) if slope < 0 else (low, scale)
        step = slope / curvature if curvature else math.inf
        if abs(step) <= TOLERANCE * scale:
            break
        scale = scale - step if low < scale - step < high else math.sqrt(low * high)
    return 1 / scale


def _derivatives(logits: Tensor, labels: Tensor, scale: float) -> Sums:
    """Returns the sums over a batch: E[z] - z[label], and Var[z], for p = softmax(scale z)."""
    z = logits.double()
    z = z - z.amax(1, keepdim=True)
    p = (scale * z).softmax(1)
    mean = (p * z).sum(1)
    variance = (p * (z - mean[:, None]).square()).sum(1)
    return float((mean - z.gather(1, labels[:, None])[:, 0]).sum()), float(variance.sum())


class Coverage(NamedTuple):
    """Accuracy on the images whose confidence is at least a threshold, for each threshold."""

    thresholds: NDArray[np.float64]
    """(k,): the distinct confidences, in descending order."""
    coverage: NDArray[np.float64]
    """(k,): fraction of the images that are answered."""
    accuracy: NDArray[np.float64]
    """(k,): fraction of these that are correct."""

    def threshold(self, accuracy: float) -> tuple[float, float] | None:
        """Returns the lowest threshold with at least this accuracy, and its coverage.

        The threshold is 0 if all images can be answered; the result is None if no threshold has
        this accuracy.
        """
        reached = np.flatnonzero(self.accuracy >= accuracy)
        if not len(reached):
            return None
        last = reached[-1]
        threshold = 0.0 if self.coverage[last] == 1 else float(self.thresholds[last])
        return threshold, float(self.coverage[last])


def coverage(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> Coverage:
    """Computes the accuracy at each coverage (El-Yaniv and Wiener 2010).

    Args:
        confidence: probability of the most likely class, shape (n,); NaN is never answered.
        right: whether this class is correct, shape (n,).
    """
    known = ~np.isnan(confidence)
    order = np.argsort(-confidence[known], kind="stable")
    thresholds, correct = confidence[known][order], np.cumsum(right[known][order])
    last = np.flatnonzero(np.append(np.diff(thresholds) != 0, [True] * (len(thresholds) > 0)))
    answered = last + 1
    return Coverage(thresholds[last], answered / len(confidence), correct[last] / answered)
