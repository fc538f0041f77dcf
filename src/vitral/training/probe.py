"""A linear classifier on features: multinomial logistic regression by L-BFGS."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitral.data.sampling import held_out
from vitral.training.frozen import Features

STRENGTHS = tuple(10 ** (1 - k / 2) for k in range(15))  # 10 to 1e-6
HELD_OUT = 0.1  # of the images of each class, to select the strength with
PATIENCE = 3  # weaker penalties that are tried after the best
ITERATIONS = 200
TOLERANCE = 1e-5  # largest component of the gradient
LOGITS = 1 << 22  # computed at a time
EXACT = 1 << 24  # logits up to which they are computed in float64; more take float32's half


Check = Callable[[], None]


class Probe(NamedTuple):
    """A fitted head."""

    weight: Tensor
    """(classes, D), float32."""
    bias: Tensor
    """(classes,), float32."""
    strength: float
    """Of the L2 penalty, over the mean cross-entropy."""
    held_out: float
    """Accuracy on the images that the strength was selected with."""
    loss: float
    """Mean cross-entropy of all images, in nats."""

    def predict(self, vectors: Tensor) -> Tensor:
        """The likeliest class of each vector: (n, D) to (n,)."""
        return (vectors @ self.weight.T + self.bias).argmax(1)


def fit(
    features: Features,
    num_classes: int,
    seed: int,
    check: Check | None = None,
    device: str | torch.device = "cpu",
) -> Probe:
    """Fits a head to standardized features, with the L2 strength that held-out images favor.

    The strengths are tried from strong to weak, each fit starting from the one before. The views of
    an image are all fitted or all held out, where the first view is scored. The standardization
    becomes part of the weights.

    Args:
        check: called before each evaluation of the loss; may raise to stop.
        device: one with float64, where the loss is computed.
    """
    vectors, labels = features.vectors.to(device), features.labels.to(device)
    mean, deviation = standardization(vectors)
    dtype = torch.float64 if len(labels) * num_classes <= EXACT else torch.float32
    images, first, inverse = np.unique(features.images, return_index=True, return_inverse=True)
    held = held_out(images, features.labels.numpy()[first], HELD_OUT, seed, "probe")
    fitted, scored = torch.from_numpy(~held[inverse]), torch.from_numpy(first[held])

    def problem(rows: Tensor) -> Problem:
        chosen = rows.to(device)
        standardized = (vectors[chosen].double() - mean) / deviation
        return Problem(standardized.to(dtype), labels[chosen], num_classes, check)

    strength, accuracy, head = select(problem(fitted), problem(scored))
    head, loss = problem(torch.arange(len(features.labels))).minimize(head, strength)
    weight = head[:, :-1] / deviation
    bias = head[:, -1] - weight @ mean
    return Probe(weight.float().cpu(), bias.float().cpu(), strength, accuracy, loss)


def standardization(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature, (D,), the latter 1 where it is 0."""
    deviation, mean = torch.std_mean(vectors.double(), 0, correction=0)
    return mean, torch.where(deviation > 0, deviation, 1.0)


def select(fitted: Problem, scored: Problem) -> tuple[float, float, Tensor]:
    """The strength whose fit scores best, its accuracy, and its head; ties take the lower loss."""
    shape = fitted.num_classes, fitted.vectors.shape[1] + 1
    head = fitted.vectors.new_zeros(shape, dtype=torch.float64)
    found: list[tuple[float, float, float, Tensor]] = []
    for strength in STRENGTHS:
        head, _ = fitted.minimize(head, strength)
        accuracy, loss = scored.score(head)
        found.append((accuracy, -loss, strength, head))
        if len(found) - found.index(_best(found)) > PATIENCE:
            break
    accuracy, _, strength, head = _best(found)
    return strength, accuracy, head


def _best(found: list[tuple[float, float, float, Tensor]]) -> tuple[float, float, float, Tensor]:
    return max(found, key=lambda item: item[:2])


class Problem:
    """Mean cross-entropy of a linear classifier, with an L2 penalty on its weights.

    Args:
        vectors: (n, D); logits are computed in their dtype and added in float64.
        labels: (n,).
        check: called before each evaluation.
    """

    def __init__(
        self, vectors: Tensor, labels: Tensor, num_classes: int, check: Check | None = None
    ) -> None:
        self.vectors, self.labels, self.num_classes, self.check = (
            vectors, labels, num_classes, check,
        )  # fmt: skip
        self.rows = max(1, LOGITS // num_classes)

    def minimize(self, head: Tensor, strength: float) -> tuple[Tensor, float]:
        """The head (classes, D + 1), bias last, that minimizes the loss, and its cross-entropy.

        Args:
            head: where to start.
            strength: of the penalty, strength / 2 times the squared norm of the weights.
        """
        head = head.clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS(
            [head],
            max_iter=ITERATIONS,
            tolerance_grad=TOLERANCE,
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
        """Mean cross-entropy and its gradient, without the penalty."""
        if self.check is not None:
            self.check()
        total, gradient = head.new_zeros(()), torch.zeros_like(head)
        weight, bias = head[:, :-1].to(self.vectors.dtype), head[:, -1].to(self.vectors.dtype)
        for x, y in zip(self.vectors.split(self.rows), self.labels.split(self.rows), strict=True):
            log_p = F.log_softmax(F.linear(x, weight, bias), 1)
            total -= log_p.gather(1, y[:, None]).sum(dtype=head.dtype)
            error = log_p.exp_()
            error[torch.arange(len(y)), y] -= 1
            gradient[:, :-1] += error.T @ x
            gradient[:, -1] += error.sum(0)
        return total / len(self.labels), gradient / len(self.labels)

    def score(self, head: Tensor) -> tuple[float, float]:
        """Accuracy and mean cross-entropy."""
        head = head.to(self.vectors.dtype)
        right, loss = 0, 0.0
        for x, y in zip(self.vectors.split(self.rows), self.labels.split(self.rows), strict=True):
            logits = F.linear(x, head[:, :-1], head[:, -1])
            right += int((logits.argmax(1) == y).sum())
            loss += F.cross_entropy(logits, y, reduction="sum").item()
        return right / len(self.labels), loss / len(self.labels)
