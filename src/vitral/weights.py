"""Weights that describe themselves: a folder with the model, its EMA and all that using them takes.

config.json         architecture, class names, preprocessing, recipe, metrics, which file to use
model.safetensors   the weights as trained
ema.safetensors     their moving average, where the run kept one
manifest.json       sizes and SHA-256 of the above
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vitral import hub, recipes, storage
from vitral.config import PRESETS, Config, DataConfig, UserError, ViTConfig, from_sections
from vitral.model import ViT

SCHEMA = 2
Which = Literal["model", "ema"]


@dataclass(frozen=True, kw_only=True)
class Description:
    """What the weights say of themselves."""

    config: Config
    """The settings they were trained with: architecture, preprocessing, recipe."""
    classes: tuple[str, ...]
    """Names, in the order of the logits."""
    fingerprint: str
    """Of the data set."""
    default: Which
    """The file to use if none is asked for."""
    metrics: Mapping[str, float]
    """What validation measured, by the names of the metrics log."""
    vitral: str
    """The version that wrote them."""


@dataclass(frozen=True)
class Weights:
    """A model ready to use, in evaluation mode, and what is known about it."""

    model: ViT
    description: Description
    path: Path


def save(
    directory: Path, states: Mapping[str, Mapping[str, Tensor]], description: Description
) -> None:
    """Writes a weight folder, replacing one that is there. Raises OSError."""
    document = {"schema": SCHEMA, **dataclasses.asdict(description)}
    storage.write(directory, states, {"config": document})


def load(path: str | Path, *, which: Which | None = None, device: str = "cpu") -> Weights:
    """Loads weights for use.

    Args:
        path: a weight folder, a run folder, whose best weights are taken, or weights on the Hugging
            Face Hub, `hf-hub:owner/name` or `hf-hub:owner/name@revision`.
        which: "model" or "ema"; None takes the one that the weights name.
        device: where the model shall be.

    Raises:
        UserError: for a path without weights, corrupt ones, or those of a newer vitral.
    """
    directory = find(path)
    try:
        storage.verify(directory)
        description = _read_description(directory, storage.read_json(directory, "config.json"))
        which = which or description.default
        if not (directory / f"{which}.safetensors").exists():
            raise UserError(
                f"weights: {directory} holds no {which} weights, only {description.default}"
            )
        state = storage.read_tensors(directory, which)
    except storage.CorruptError as error:
        mend = "copy it anew, or repeat its `vitral train`, which mends it from a checkpoint"
        if str(path).startswith(hub.PREFIX):
            mend = "remove it from the cache with `hf cache` and try again, or tell its owner"
        raise UserError(f"weights: {error}; {mend}") from None
    with torch.device("meta"):
        model = ViT(description.config.model, len(description.classes))
    _refuse_others(model.state_dict(), state, directory / f"{which}.safetensors")
    model.load_state_dict(state, assign=True)
    return Weights(model.to(device).eval().requires_grad_(False), description, directory)


def find(path: str | Path) -> Path:
    """The weight folder that `path` means: itself, or a run's best, or else its last.

    Only `hf-hub:owner/name` asks the network; it means the folder that this was downloaded to.

    Raises:
        UserError: if there is none.
    """
    if str(path).startswith(hub.PREFIX):
        return hub.download(str(path))
    path = Path(path)
    for candidate in (path, path / "weights" / "best", path / "weights" / "last"):
        if (candidate / "config.json").is_file():
            return candidate
    what = "no such folder" if not path.exists() else "it holds no weights"
    named = hub.NAME.fullmatch(str(path).partition("@")[0]) and not path.exists()
    hint = f"; if it is on the Hugging Face Hub, say {hub.PREFIX}{path}" if named else ""
    raise UserError(
        f"weights: {path}: {what}; expected a folder with config.json and model.safetensors, "
        f"such as runs/NAME or runs/NAME/weights/best{hint}"
    )


def load_settings(
    source: str, arguments: Sequence[str] = (), *, program: str = "vitral train", about: str = ""
) -> Config:
    """`recipes.load`, where a recipe that names no model takes that of the weights in `train.init`.

    It also takes the mean and deviation that their images are normalised with. What the recipe or
    the arguments say of either still holds, such as the image size; the grid of rotary positions
    stays that of the weights. A run's `config.yaml` names its model, so that it neither asks the
    weights nor hangs on them.

    Raises:
        UserError: for an unknown recipe, key or value, or weights that are not there.
    """
    init, default = recipes.weights_to_fit(source, arguments), None
    if init is not None:
        try:
            begun = load(init).description.config
        except UserError as error:
            raise UserError(
                f"{error}; --init names the weights to start from, and a run that has begun goes "
                "on by its config.yaml"
            ) from None
        data = DataConfig(mean=begun.data.mean, std=begun.data.std)
        model = dataclasses.replace(_as_preset(begun.model), rope_grid=begun.model.grid)
        default = Config(model=model, data=data)
    return recipes.load(source, arguments, default=default, program=program, about=about)


def _as_preset(model: ViTConfig) -> ViTConfig:
    """The same model without the fields that its size gives, so that another size alters them."""
    if model.shape != PRESETS[model.size]:
        return model
    return dataclasses.replace(model, **dict.fromkeys(model.shape._fields))


def start_from(model: ViT, path: str | Path) -> list[str]:
    """Copies weights into `model` and returns the names that keep their own initialisation.

    The head does so where the number of classes differs. Images may be of another size, spread over
    the same grid of rotary positions.

    Raises:
        UserError: if the architectures differ, or the grids of rotary positions.
    """
    given = load(path).model
    source, own = given.state_dict(), model.state_dict()
    if source["head.weight"].shape[0] != model.num_classes:
        source = {name: value for name, value in source.items() if not name.startswith("head.")}
    strange = sorted(source.keys() - own.keys())
    other = [n for n in source if n in own and source[n].shape != own[n].shape]
    missing = sorted(name for name in own.keys() - source.keys() if not name.startswith("head."))
    for names, what in ((other, "another shape"), (strange, "no place"), (missing, "no value")):
        if names:
            raise UserError(
                f"init: {names[0]} of {path} has {what} in this model "
                f"({len(names)} such weights); {_fitting(path)}"
            )
    grid = given.config.grid
    if model.config.grid != grid:
        raise UserError(
            f"init: {path} was trained with rotary positions over {grid} patches a side, "
            f"got {model.config.grid}; add --model.rope-grid {grid}"
        )
    model.load_state_dict(source, strict=False)
    return sorted(own.keys() - source.keys())


def _fitting(path: str | Path) -> str:
    """How to have a model that the weights fit."""
    recipe = "the recipe imagenet-finetune takes its model from the weights"
    settings = Path(path) / "config.yaml"
    if not settings.is_file():
        return f"give the model settings that it was trained with; {recipe}"
    return f"give the settings of that run, `vitral train {settings} --init {path}`; {recipe}"


def describe(
    config: Config, classes: tuple[str, ...], fingerprint: str, metrics: Mapping[str, float]
) -> Description:
    """The description of a run's weights: the default is what validated best, raw or EMA.

    The architecture is written out, so that it does not hang on what a preset means later, and
    so is the path of an image folder, so that it does not hang on where one stands.
    """
    better = metrics.get("ema_top1", -1.0) > metrics.get("val_top1", 0.0)
    model = dataclasses.replace(config.model, **config.model.shape._asdict())
    place = Path(config.data.path).expanduser()
    path = str(place.resolve()) if place.is_dir() else config.data.path
    data = dataclasses.replace(config.data, path=path)
    return Description(
        config=dataclasses.replace(config, model=model, data=data),
        classes=classes,
        fingerprint=fingerprint,
        default="ema" if better else "model",
        metrics=metrics,
        vitral=version("vitral"),
    )


def _read_description(directory: Path, document: dict[str, Any]) -> Description:
    schema = document.pop("schema", None)
    if schema != SCHEMA:
        raise UserError(
            f"weights: {directory}: expected schema {SCHEMA}, got {schema}; "
            "install the vitral that wrote them"
        )
    try:
        config, classes = from_sections(document["config"]), tuple(document["classes"])
        if document["default"] not in get_args(Which):
            raise TypeError(f"default is {document['default']!r}")
        return Description(**{**document, "config": config, "classes": classes})
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"weights: {directory}: config.json is not this vitral's: {error}; "
            f"install vitral {document.get('vitral')}, which wrote it"
        ) from None


def _refuse_others(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], file: Path) -> None:
    """Raises UserError unless the tensors are those of the model that config.json describes."""
    for name in sorted(expected.keys() | found.keys()):
        wanted, got = (_form(tensors.get(name)) for tensors in (expected, found))
        if wanted != got:
            raise UserError(
                f"weights: {file}: {name}: config.json asks for {wanted}, got {got}; "
                "the two are not of one model: copy the folder anew"
            )


def _form(tensor: Tensor | None) -> str:
    if tensor is None:
        return "none"
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
