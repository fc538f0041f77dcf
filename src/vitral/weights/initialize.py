"""Initializes a training run from weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from vitral import settings
from vitral.config import PRESETS, Config, DataConfig, ViTConfig
from vitral.errors import UserError, counted
from vitral.model import ViT, resample
from vitral.rundir import CONFIG, RunDir
from vitral.settings import OptionValues, Request
from vitral.weights.store import load

PREPROCESSING = ("fit", "interpolation", "eval_crop", "mean", "std")


def load_settings(source: str, given: OptionValues | Sequence[str] = ()) -> Config:
    """Returns the settings that `request` finds for a recipe and options."""
    return request(source, given).config


def request(source: str, given: OptionValues | Sequence[str] = ()) -> Request:
    """Returns `settings.request`; a recipe without a model uses the model of `train.init`.

    It also uses the preprocessing of these weights. Settings in the recipe or the options, such as
    the image size, take precedence; the grid of rotary positions remains that of the weights. The
    config.yaml of a run always contains its model.

    Raises:
        UserError: for an unknown recipe, key or value, or missing weights.
    """
    recipe = settings.read(source)
    given = given if isinstance(given, Mapping) else settings.parse_options(given)
    values = {**recipe, **given}
    (path,) = values.get("train.init", ["None"])
    if path in ("None", "") or {"model.size", "model.dim"} & recipe.keys():
        return settings.request(source, given)
    try:
        # Read the shapes of the tensors, because config.json alone could describe any size.
        known = load(path, device="meta").description.config
    except UserError as error:
        raise UserError(
            f"{error}; --init specifies the weights to start from; to resume a run, use its "
            f"{CONFIG}"
        ) from None
    data = DataConfig(**{name: getattr(known.data, name) for name in PREPROCESSING})
    model = dataclasses.replace(_as_preset(known.model), rope_grid=known.model.grid)
    return settings.request(source, given, default=Config(model=model, data=data))


def _as_preset(model: ViTConfig) -> ViTConfig:
    """Removes the fields that a size preset determines, so that a new size takes effect."""
    if model.shape != PRESETS[model.size]:
        return model
    return dataclasses.replace(model, **dict.fromkeys(model.shape._fields))


def initialize(model: ViT, path: str | Path, classes: Sequence[str] | None = None) -> list[str]:
    """Copies weights into `model` and returns the names of parameters that were not copied.

    The head is not copied if the classes differ. The image size may differ if the grid of rotary
    positions is the same. For a model on the meta device, only the shapes are read and compared.

    Args:
        path: weights, as for `load`.
        classes: names of the classes of `model`. If None, only their number is compared.

    Raises:
        UserError: if the architectures or the grids of rotary positions differ.
    """
    loaded = load(path, device=model.device.type)
    source_model, other_classes = loaded.model, classes not in (None, loaded.description.classes)
    source, own = source_model.state_dict(), model.state_dict()
    if other_classes or source_model.num_classes != model.num_classes:
        source = {name: value for name, value in source.items() if not name.startswith("head.")}
    if source_model.positions is not None and model.positions is not None:
        source["positions"] = resample(source_model.positions, *model.positions.shape[:2])
    unknown = sorted(source.keys() - own.keys())
    other = [n for n in source if n in own and source[n].shape != own[n].shape]
    missing = sorted(name for name in own.keys() - source.keys() if not name.startswith("head."))
    for names, what in (
        (other, "has a different shape in this model"),
        (unknown, "does not exist in this model"),
        (missing, "is missing"),
    ):
        if names:
            raise UserError(
                f"init: {path}: {names[0]} {what} ({counted(len(names), 'such parameter')}); "
                f"{_matching_model_hint(path)}"
            )
    grid = source_model.config.grid
    if model.config.grid != grid:
        raise UserError(
            f"init: {path} was trained with rotary positions on a grid of {grid} patches per side, "
            f"got {model.config.grid}; add --model.rope-grid {grid}"
        )
    model.load_state_dict(source, strict=False)
    return sorted(own.keys() - source.keys())


def _matching_model_hint(path: str | Path) -> str:
    """Returns advice on how to get a model that matches the weights."""
    recipe = "the recipe imagenet-finetune uses the model of the weights"
    own = RunDir(path).config
    if not own.is_file():
        return f"use the model settings that it was trained with; {recipe}"
    return f"use the settings of that run, `vitral train {own} --init {path}`; {recipe}"
