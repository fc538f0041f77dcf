"""A linear classifier on features, fitted with L-BFGS.

This is multinomial logistic regression or, if an image can have several labels, an independent
logistic regression for each class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitral.data.sampling import Integers, divide, strata
from vitral.evaluation.multilabel import macro_average_precision
from vitral.training.balance import NO_BALANCE, Balance
from vitral.training.frozen import Features

STRENGTHS = tuple(10 ** (0.5 - k / 2) for k in range(12))  # L2 strengths to try, from 3 to 1e-5
FOLDS = 5  # number of folds, each held out in turn to select the strength
DEFAULT_STRENGTH = 0.1  # strength if no image can be held out
MAX_CROSS_VALIDATED = 20_000  # number of images above which only one fold is held out
PATIENCE = 2  # number of weaker strengths to try after the best one
MAX_ITERATIONS = 200
TOLERANCE = 1e-5  # largest component of the gradient
SELECTION_TOLERANCE = 1e-4  # used while selecting the strength
LOGITS_PER_BATCH = 1 << 22  # logits computed at a time
MAX_FLOAT64 = (
    1 << 20
)  # largest number of elements for which float64 is used; float32 is twice as fast


Check = Callable[[], None]


class Probe(NamedTuple):
    """A fitted head."""

    weight: Tensor
    """(classes, D), float32."""
    bias: Tensor
    """(classes,), float32."""
    strength: float
    """Strength of the L2 penalty, relative to the mean cross-entropy."""
    held_out: float
    """`held_out_score` of the images used to select the strength."""
    loss: float
    """Mean cross-entropy over all images, in nats, weighted by class."""

    def predict(self, vectors: Tensor) -> Tensor:
        """Returns the most likely class of each vector: (n, D) to (n,)."""
        return (vectors @ self.weight.T + self.bias).argmax(1)


def fit(
    features: Features,
    num_classes: int,
    seed: int,
    check: Check | None = None,
    device: str | torch.device = "cpu",
    balance: Balance = NO_BALANCE,
    groups: Integers | None = None,
) -> Probe:
    """Fits a head to standardized features, with the L2 strength that is best on held-out images.

    The strengths are tried from strong to weak; each fit starts from the previous one. The views of
    an image are in the same fold, and only the first view is scored. The standardization is folded
    into the weights.

    Args:
        check: called before each evaluation of the loss; may raise to stop.
        device: where to compute the loss; must support float64.
        balance: changes to the loss; also determines which accuracy is used to select the
            strength.
        groups: group of each image of the split, which the held-out images do not divide.
    """
    folds = Folds(features, num_classes, seed, check, device, balance, groups)
    strength, accuracy, heads = select([folds.divided(k) for k in folds.for_selection])
    everything = folds.problem(np.arange(len(features.labels)))
    head, loss = everything.minimize(heads[0] if heads else everything.start(), strength)
    weight = head[:, :-1] / folds.deviation
    bias = head[:, -1] - weight @ folds.mean
    return Probe(weight.float().cpu(), bias.float().cpu(), strength, accuracy, loss)


def out_of_fold(
    features: Features,
    num_classes: int,
    seed: int,
    device: str | torch.device = "cpu",
    balance: Balance = NO_BALANCE,
    groups: Integers | None = None,
) -> tuple[Integers, NDArray[np.float32]]:
    """Predicts each image with a head that is fitted to the images of the other folds.

    The strength and the folds are those of `fit`.

    Args:
        device, balance, groups: as for `fit`.

    Returns:
        Index of each image, shape (n,), and its probabilities, shape (n, classes). They are NaN if
        its label is in no other fold.
    """
    folds = Folds(features, num_classes, seed, None, device, balance, groups)
    strength, _, heads = select([folds.divided(k) for k in folds.for_selection])
    probabilities = np.full((len(folds.images), num_classes), np.nan, np.float32)
    for i, k in enumerate(folds.used):
        fitted, held = folds.divided(k)
        head = heads[i] if i < len(heads) else fitted.minimize(heads[0], strength)[0]
        found = held.probabilities(head)
        found[~torch.isin(held.labels, fitted.labels)] = math.nan
        probabilities[folds.fold == k] = found.cpu().numpy()
    return folds.images, probabilities


class Folds:
    """Standardized features in folds that divide neither the views of an image nor groups.

    Args:
        features, num_classes, seed, check, device, balance, groups: as for `fit`.
    """

    def __init__(
        self,
        features: Features,
        num_classes: int,
        seed: int,
        check: Check | None,
        device: str | torch.device,
        balance: Balance,
        groups: Integers | None,
    ) -> None:
        self.num_classes, self.check, self.device = num_classes, check, device
        self.balance = balance.to(device, torch.float64)
        self.vectors, self.labels = features.vectors.to(device), features.labels.to(device)
        self.mean, self.deviation = standardization(self.vectors)
        self.images, self.first, self.inverse = np.unique(
            features.images, return_index=True, return_inverse=True
        )
        own = None if groups is None else groups[self.images]
        labels = features.labels.numpy()[self.first]
        self.fold = divide(self.images, strata(labels), FOLDS, seed, "probe", own)
        self.used = [k for k in range(FOLDS) if 0 < np.sum(self.fold == k) < len(self.fold)]

    @property
    def for_selection(self) -> list[int]:
        """The folds that are held out to select the strength."""
        return self.used if len(self.images) <= MAX_CROSS_VALIDATED else self.used[:1]

    def divided(self, k: int) -> tuple[Problem, Problem]:
        """Returns the problem without fold k, and that of the first views of fold k."""
        held = self.fold == k
        return self.problem(~held[self.inverse]), self.problem(self.first[held])

    def problem(self, rows: NDArray[Any]) -> Problem:
        """Returns the problem of some of the vectors."""
        chosen = torch.from_numpy(rows).to(self.device)
        standardized = (self.vectors[chosen].double() - self.mean) / self.deviation
        small = len(self.labels) * max(self.num_classes, self.vectors.shape[1]) <= MAX_FLOAT64
        standardized = standardized.to(torch.float64 if small else torch.float32)
        return Problem(
            standardized, self.labels[chosen], self.num_classes, self.check, self.balance
        )


def standardization(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean and deviation of each feature, (D,); a deviation of 0 is replaced by 1."""
    deviation, mean = torch.std_mean(vectors.double(), 0, correction=0)
    return mean, torch.where(deviation > 0, deviation, 1.0)


def select(folds: Sequence[tuple[Problem, Problem]]) -> tuple[float, float, list[Tensor]]:
    """Selects the strength with the best held-out score; ties go to the strongest.

    Args:
        folds: the problem to fit and the held-out problem of each fold.

    Returns:
        The strength, its score, and its head in each fold; without folds, DEFAULT_STRENGTH, nan
        and no heads.
    """
    if not folds:  # no class has two images
        return DEFAULT_STRENGTH, math.nan, []
    heads = [fitted.start() for fitted, _ in folds]
    best = STRENGTHS[0], -1.0, heads
    since = 0
    for strength in STRENGTHS:
        heads = [
            fitted.minimize(head, strength, SELECTION_TOLERANCE)[0]
            for (fitted, _), head in zip(folds, heads, strict=True)
        ]
        score = held_out_score([held for _, held in folds], heads)
        since = 0 if score > best[1] else since + 1
        best = (strength, score, heads) if since == 0 else best
        if since == PATIENCE:
            break
    return best


def held_out_score(folds: Sequence[Problem], heads: Sequence[Tensor]) -> float:
    """Returns the score of each head (classes, D + 1) on its held-out images, over all folds.

    This is the accuracy, weighted by `Balance.importance`, or, if an image can have several labels,
    the mean average precision of the classes.
    """
    pairs = [*zip(folds, heads, strict=True)]
    if folds[0].labels.ndim == 2:
        labels = torch.cat([held.labels for held in folds])
        logits = torch.cat([part for held, head in pairs for part in held.logits(head)])
        return macro_average_precision(labels.cpu().numpy(), logits.cpu().numpy())
    correct = sum(held.num_correct(head) for held, head in pairs)
    return correct / sum(held.count(held.labels) for held in folds)


class Problem:
    """Mean cross-entropy of a linear classifier, with an L2 penalty on its weights.

    If an image can have several labels, it is the sum of the binary cross-entropies of the classes.

    Args:
        vectors: (n, D); logits are computed in this dtype, and losses are added in float64.
        labels: (n,), or 0 and 1, (n, classes).
        check: called before each evaluation.
        balance: changes to the cross-entropy, in float64.
    """

    def __init__(
        self,
        vectors: Tensor,
        labels: Tensor,
        num_classes: int,
        check: Check | None = None,
        balance: Balance = NO_BALANCE,
    ) -> None:
        self.vectors, self.labels, self.num_classes, self.check, self.balance = (
            vectors, labels, num_classes, check, balance,
        )  # fmt: skip
        self.rows = max(1, LOGITS_PER_BATCH // num_classes)

    def start(self) -> Tensor:
        """Returns the initial head, (classes, D + 1), all zero."""
        shape = self.num_classes, self.vectors.shape[1] + 1
        return self.vectors.new_zeros(shape, dtype=torch.float64)

    def minimize(
        self, head: Tensor, strength: float, tolerance: float = TOLERANCE
    ) -> tuple[Tensor, float]:
        """Minimizes the loss; returns the head (classes, D + 1), bias last, and its cross-entropy.

        Args:
            head: initial head.
            strength: the penalty is strength / 2 times the squared norm of the weights.
            tolerance: stops when the largest gradient component is below this.
        """
        head = head.clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS(
            [head],
            max_iter=MAX_ITERATIONS,
            tolerance_grad=tolerance,
            history_size=10,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            loss, gradient = self.loss(head.detach())
            penalized = torch.cat([head.detach()[:, :-1], torch.zeros_like(head[:, -1:])], 1)
            head.grad = gradient + strength * penalized
            return loss + strength / 2 * penalized.square().sum()

        optimizer.step(closure)
        head = head.detach()
        return head, self.loss(head)[0].item()

    def loss(self, head: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean cross-entropy and its gradient, without the penalty."""
        if self.check is not None:
            self.check()
        total, gradient = head.new_zeros(()), torch.zeros_like(head)
        weight, bias = head[:, :-1].to(self.vectors.dtype), head[:, -1]
        bias = bias if self.balance.shift is None else bias + self.balance.shift
        bias, weights = bias.to(self.vectors.dtype), self.balance.weights
        for x, y in zip(self.vectors.split(self.rows), self.labels.split(self.rows), strict=True):
            own, error = _log_likelihood(F.linear(x, weight, bias), y)
            if weights is not None:
                factors = weights[y, None].to(error.dtype)
                own, error = own * factors, error * factors
            total -= own.sum(dtype=head.dtype)
            gradient[:, :-1] += error.T @ x
            gradient[:, -1] += error.sum(0)
        return total / len(self.labels), gradient / len(self.labels)

    def num_correct(self, head: Tensor) -> float:
        """Returns the `count` of vectors that a head (classes, D + 1) classifies correctly."""
        classes = torch.cat([logits.argmax(1) for logits in self.logits(head)])
        return self.count(self.labels[classes == self.labels])

    def probabilities(self, head: Tensor) -> Tensor:
        """Returns the probabilities that a head (classes, D + 1) predicts, (n, classes)."""
        return torch.cat([logits.softmax(1).float() for logits in self.logits(head)])

    def logits(self, head: Tensor) -> Iterator[Tensor]:
        """Yields the logits of some of the vectors, (rows, classes), in order."""
        head = head.to(self.vectors.dtype)
        return (F.linear(x, head[:, :-1], head[:, -1]) for x in self.vectors.split(self.rows))

    def count(self, labels: Tensor) -> float:
        """Returns the number of labels (n,), each counted by the importance of its class."""
        importance = self.balance.importance
        if importance is None:
            return len(labels)
        # Counts first, so that equal counts give equal results.
        counts = torch.bincount(labels.cpu(), minlength=self.num_classes)
        return float(counts.to(importance.dtype) @ importance.cpu())


def _log_likelihood(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log-likelihoods of the labels, (n, 1), and gradients of their negative, (n, classes).

    Args:
        logits: (n, classes); overwritten.
        labels: (n,), or 0 and 1, (n, classes).
    """
    if labels.ndim == 2:
        own = F.logsigmoid(torch.where(labels > 0, logits, -logits)).sum(1, keepdim=True)
        return own, logits.sigmoid_().sub_(labels)
    log_p = F.log_softmax(logits, 1)
    own, error = log_p.gather(1, labels[:, None]), log_p.exp_()
    error[torch.arange(len(labels)), labels] -= 1
    return own, error
