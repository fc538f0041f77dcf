"""Corrections for rare classes: weights of the loss, and adjustment of the logits."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitral.config import Config
from vitral.data.sampling import Integers, Labels, count_labels, quotas
from vitral.data.splits import class_name
from vitral.errors import UserError, did_you_mean, first_few, printable, reason_of, short
from vitral.files import read_regular
from vitral.settings import parse_yaml

BETA = 0.999  # of the effective number of images
MAX_TABLE = 1 << 24  # bytes of a file with class weights


@dataclass(frozen=True, eq=False)
class Balance:
    """Changes to the training loss by class; None changes nothing."""

    weights: Tensor | None = None
    """Factor on the loss of an image of each class, (classes,). Its mean over the training images
    is 1."""
    shift: Tensor | None = None
    """Added to the logits in the training loss, (classes,): tau times the logarithm of the class
    frequencies (Menon et al. 2021, equation 10)."""

    @classmethod
    def of(
        cls, config: Config, classes: Sequence[str], labels: Labels, *, each_once: bool = False
    ) -> Self:
        """Returns the changes that the settings select, in float64 on the CPU.

        Args:
            labels: labels of all training images.
            each_once: for a fit that uses each image once, so that weights replace
                `data.sampling`.

        Raises:
            UserError: if the table of weights cannot be used.
        """
        counts, train, sampling = (
            count_labels(labels, len(classes)),
            config.train,
            config.data.sampling,
        )
        weights = class_weights(train.class_weights, classes, counts)
        if each_once and sampling != "uniform":
            present = np.maximum(counts, 1)
            repetition = quotas(present, sampling) / present
            weights = repetition if weights is None else weights * repetition
        shift = None
        if train.logit_adjustment:
            prior = np.maximum(counts, 1) / counts.sum()
            shift = torch.from_numpy(train.logit_adjustment * np.log(prior))
        if weights is None:
            return cls(None, shift)
        return cls(torch.from_numpy(weights / np.average(weights, weights=counts)), shift)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Balance:
        """Returns a copy on a device."""
        parts = (self.weights, self.shift)
        return Balance(*(None if part is None else part.to(device, dtype) for part in parts))

    @property
    def importance(self) -> Tensor | None:
        """Weight of each class in the accuracy that the changes aim at, (classes,).

        The accuracy is the balanced accuracy if the weights are balanced or tau is 1.
        """
        if self.shift is None:
            return self.weights
        importance = torch.exp(-self.shift)
        return importance if self.weights is None else importance * self.weights


NO_BALANCE = Balance()


def class_weights(
    kind: str, classes: Sequence[str], counts: Integers
) -> NDArray[np.float64] | None:
    """Returns the weights of `train.class_weights`, up to a factor; None if there are none.

    Args:
        counts: training images of each class, shape (classes,); 0 counts as 1.

    Raises:
        UserError: if the table of weights cannot be used.
    """
    number = np.maximum(counts, 1).astype(np.float64)
    if kind == "none":
        return None
    if kind == "balanced":
        return np.reciprocal(number)
    if kind == "effective":  # Cui et al. 2019, proposition 1
        return (1 - BETA) / (1 - np.power(BETA, number))
    return _read_table(kind, [class_name(name) for name in classes])


def _read_table(path: str, classes: Sequence[str]) -> NDArray[np.float64]:
    """Reads a weight for each class."""
    found: dict[str, float] = {}
    for place, name, text in _entries(path):
        where = f"train.class_weights: {printable(path)}: {place}"
        try:
            weight = math.nan if isinstance(text, bool) else float(text)
        except (TypeError, ValueError):
            weight = math.nan
        if not isinstance(name, str):
            raise UserError(f"{where}: expected the name of a class, got {short(name)}; quote it")
        name = class_name(name)
        if name not in classes:
            hint = did_you_mean(name, classes)
            raise UserError(f"{where}: expected the name of a class, got {short(name)}{hint}")
        if name in found:
            raise UserError(f"{where}: expected each class once, got {name} twice; remove one")
        if not 0 < weight < math.inf:
            raise UserError(f"{where}: expected a weight above 0, got {short(text)}")
        found[name] = weight
    if missing := [name for name in classes if name not in found]:
        raise UserError(
            f"train.class_weights: {printable(path)}: expected a weight for each class, got none "
            f"for {first_few(missing)}; add them"
        )
    return np.array([found[name] for name in classes])


def _entries(path: str) -> Iterator[tuple[str, Any, Any]]:
    """Yields place, class and weight of each entry; the first row of a CSV file may be a header."""
    try:
        content = read_regular(path, MAX_TABLE).decode("utf-8-sig")
        if not path.endswith(".csv"):
            table = parse_yaml(content)
            if not isinstance(table, dict):
                raise ValueError("expected 'class: weight' lines")
            yield from ((f"class {short(name)}", name, value) for name, value in table.items())
            return
        rows = [*csv.reader(content.splitlines(), strict=True)]
    except (OSError, ValueError, csv.Error, UserError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeError) else reason_of(error)
        raise UserError(f"train.class_weights: cannot read {printable(path)}: {reason}") from None
    for number, row in enumerate(rows, start=1):
        cells = [cell.strip() for cell in row]
        if not any(cells) or (number == 1 and cells == ["class", "weight"]):
            continue
        if len(cells) != 2:
            raise UserError(
                f"train.class_weights: {printable(path)}: row {number}: expected two columns, "
                f"class and weight, got {len(cells)}"
            )
        yield f"row {number}", cells[0], cells[1]
