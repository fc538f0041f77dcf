"""The description of weights, and a model loaded with them."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from vitral.config import TABLES, Config
from vitral.documents import convert_json
from vitral.errors import UserError, printable, short
from vitral.model import ViT

SCHEMA = 2
Which = Literal["model", "ema"]


@dataclass(frozen=True, kw_only=True)
class Description:
    """The content of config.json."""

    config: Config
    """The settings of the training run: architecture, preprocessing, recipe."""
    classes: tuple[str, ...]
    """Class names, in the order of the logits."""
    fingerprint: str
    """Fingerprint of the dataset."""
    default: Which
    """The file to load if none is requested; for loaded weights, the file that was loaded."""
    metrics: Mapping[str, float]
    """Validation results, by the names of the metrics log, and the temperatures fitted on the
    validation images: val_temperature and ema_temperature."""
    vitral: str
    """The version that wrote the weights."""
    source: str = ""
    """The pretrained model that was converted, such as timm:NAME."""
    license: str = ""
    """License of the pretrained model, as stated by its publisher."""
    difference: float = 0.0
    """Largest difference from the pretrained model's outputs, relative to their rms."""
    all_thresholds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """If an image can have several labels, the lowest probability at which an image has each class,
    for each file: "model" and "ema"."""

    @property
    def multi_label(self) -> bool:
        """Whether an image can have any number of labels."""
        return bool(self.all_thresholds)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Thresholds of the classes for the file `default`; empty if an image has one label."""
        return self.all_thresholds.get(self.default, ())

    def probabilities(self, logits: Tensor) -> Tensor:
        """Returns the probability of each class given logits, (..., classes) each, in float32.

        They are calibrated if the weights have a temperature. If an image can have several labels,
        each is independent of the others.
        """
        if self.multi_label:
            return logits.float().sigmoid()
        return (logits.float() / (self.temperature or 1.0)).softmax(-1)

    @property
    def temperature(self) -> float | None:
        """Number by which to divide the logits of `default` to calibrate the probabilities.

        None if the weights are not calibrated.
        """
        return self.metrics.get(f"{'ema' if self.default == 'ema' else 'val'}_temperature")

    def to_document(self) -> dict[str, Any]:
        """Returns the JSON object that `from_document` reads."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_document(cls, document: dict[str, Any], directory: Path) -> Description:
        """Returns the description in a config.json, which is untrusted: names are made printable.

        Args:
            document: the JSON object.
            directory: where it was read, for error messages.

        Raises:
            UserError: if it was written by another version of vitral, or is damaged.
        """
        document = dict(document)
        schema = document.pop("schema", None)
        if schema != SCHEMA:
            raise UserError(
                f"weights: {directory}: expected schema {SCHEMA}, got {short(schema)}; "
                "install the version of vitral that wrote them"
            )
        try:
            found = convert_json(cls, document)
        except UserError as error:
            writer = short(document.get("vitral")).strip("'")
            raise UserError(
                f"weights: {directory}: config.json does not match this version of vitral: "
                f"{error}; install vitral {writer}, which wrote it"
            ) from None
        for name in ("val_temperature", "ema_temperature"):
            if not 0 < (temperature := found.metrics.get(name, 1.0)) < math.inf:
                raise UserError(
                    f"weights: {directory}: config.json: {name}: expected a number above 0, got "
                    f"{temperature:g}; copy the weights again"
                )
        for kind, thresholds in found.all_thresholds.items():
            if len(thresholds) != len(found.classes) or not all(0 <= t <= 1 for t in thresholds):
                raise UserError(
                    f"weights: {directory}: config.json: expected a threshold from 0 to 1 for each "
                    f"of the {len(found.classes)} classes of {printable(kind)}; copy the weights "
                    "again"
                )
        texts = {name: printable(getattr(found, name)) for name in ("vitral", "source", "license")}
        classes = tuple(map(printable, found.classes))
        return dataclasses.replace(found, classes=classes, **texts)


@dataclass(frozen=True)
class Weights:
    """A model ready to use, in evaluation mode, and its description."""

    model: ViT
    description: Description
    path: Path


def require_head(weights: Weights) -> Weights:
    """Returns the weights. Raises UserError if they have no classifier."""
    if weights.description.classes:
        return weights
    raise UserError(
        f"weights: {weights.path}: no classifier, only features; train one with `vitral train "
        f"--init {weights.description.source or weights.path} --data FOLDER`, "
        "or save the features of images with `vitral embed`"
    )


def absolute_paths(config: Config) -> Config:
    """Returns the settings with absolute paths of data, weights and tables that exist.

    This allows repeating a run from another directory.
    """
    from vitral.data.formats.known import KNOWN_SETS  # imports Pillow

    def absolute(path: str) -> str:
        place = os.path.expanduser(path)  # noqa: PTH111
        if os.path.isfile(place):  # noqa: PTH113
            # Links of tables are not followed: the images are next to the link.
            folder, name = os.path.split(place)
            return os.path.join(os.path.realpath(folder), name)  # noqa: PTH118
        return os.path.realpath(place) if os.path.exists(place) else path  # noqa: PTH110

    path, init = config.data.path, config.train.init
    data = dataclasses.replace(config.data, path=path if path in KNOWN_SETS else absolute(path))
    table = config.train.class_weights
    table = absolute(table) if table.endswith(TABLES) else table
    train = dataclasses.replace(config.train, init=init and absolute(init), class_weights=table)
    return dataclasses.replace(config, data=data, train=train)


def describe(
    config: Config,
    classes: tuple[str, ...],
    fingerprint: str,
    metrics: Mapping[str, float],
    thresholds: Mapping[str, tuple[float, ...]] = MappingProxyType({}),
) -> Description:
    """Returns the description of a run's weights; the default is the better of raw and EMA weights
    by `train.best_by`.

    It contains all fields of the architecture, because presets may change, and the absolute path
    of the data.
    """
    better = config.train.rank(metrics, "ema_") > config.train.rank(metrics, "val_")
    model = dataclasses.replace(config.model, **config.model.shape._asdict())
    return Description(
        config=dataclasses.replace(config, model=model, data=absolute_paths(config).data),
        classes=classes,
        fingerprint=fingerprint,
        default="ema" if better else "model",
        metrics=metrics,
        vitral=version("vitral"),
        all_thresholds=dict(thresholds),
    )
