"""Evaluating saved weights: on a labelled set, or on one at several image sizes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch

from vitral.config import Config, ViTConfig
from vitral.data.fetch import resolve_workers
from vitral.data.formats import open_dataset
from vitral.data.formats.known import KNOWN_SETS
from vitral.data.formats.objects import own_names, records_of
from vitral.data.loader import EVAL_BATCH, eval_batches
from vitral.data.objects import PATH, Source
from vitral.data.records import Dataset, Records, class_name, hold_out
from vitral.errors import UserError, first_few, printable
from vitral.evaluation.scores import Scores, measure
from vitral.files import expand
from vitral.machine import pick_device
from vitral.weights import Description, Weights, Which, load, require_head

CompetingClasses = Literal["subset", "all"]


def evaluate(
    weights: Weights | str | Path,
    data: str | Dataset | Source | None = None,
    *,
    which: Which | None = None,
    classes: CompetingClasses | None = None,
    batch_size: int = EVAL_BATCH,
    workers: int | None = None,
    device: str = "auto",
) -> Scores:
    """Top-1, top-5, per-class accuracy and calibration over every validation image once.

    Where the set has only some of the classes that the weights know, `classes` says what its
    predictions compete with.

    Args:
        weights: loaded weights, or a weight or run directory.
        data: an image folder, a known set, what `open_set` gave, or a Python dataset as for
            `train`; None takes the set that the weights were trained on.
        which: "model" or "ema"; None takes the one that the weights name.
        classes: "subset" removes the logits of classes that the set does not have, "all" keeps
            them, behind those of the set in `Scores.classes`; None is "all" for a set of one class
            and else "subset".
        batch_size: images of a forward pass.
        workers: decoding processes; None takes the cores but one.
        device: "cpu", "cuda", "mps", "xpu", or "auto" for a GPU if there is one.

    Raises:
        UserError: for weights or data that cannot be read, or a class that the weights do not know.
    """
    weights = prepare(weights, which, device)
    dataset, config = _open(weights.description, data, workers)
    competing = competing_classes(weights.description, dataset.classes, classes)
    return score(weights, _validation_records(dataset), competing, config, batch_size)


def sweep(
    weights: Weights | str | Path,
    image_sizes: Sequence[int],
    data: str | Dataset | Source | None = None,
    *,
    which: Which | None = None,
    classes: CompetingClasses | None = None,
    batch_size: int = EVAL_BATCH,
    workers: int | None = None,
    device: str = "auto",
) -> Iterator[tuple[int, Scores]]:
    """The same set at several image sizes: each size, and what `evaluate` gives at it.

    An image of any size is spread over the rotary positions of training, so any will do that is
    whole patches. What is cropped from an image is the same share of its short side at every size;
    only what it is resized to changes. Models see objects larger in training's random crops than in
    evaluation's, so the best size is often above that of training (Touvron et al. 2019).

    Args:
        image_sizes: sides of the images that the model sees, in pixels.
        data, which, classes, batch_size, workers, device: as for `evaluate`.

    Raises:
        UserError: for a size that is no multiple of the patch size, before anything is evaluated,
            and where `evaluate` raises it.
    """
    weights = prepare(weights, which, device)
    models = at_sizes(weights.description, image_sizes)
    dataset, config = _open(weights.description, data, workers)
    records = _validation_records(dataset)
    competing = competing_classes(weights.description, dataset.classes, classes)
    configs = [dataclasses.replace(config, model=model) for model in models]
    return (
        (config.model.image_size, score(weights, records, competing, config, batch_size))
        for config in configs
    )


def at_sizes(description: Description, image_sizes: Sequence[int]) -> list[ViTConfig]:
    """The model for images of other sizes; raises UserError for one that is not whole patches."""
    model = description.config.model
    try:
        return [dataclasses.replace(model, image_size=image_size) for image_size in image_sizes]
    except UserError as error:
        raise UserError(f"image-sizes: {str(error).removeprefix('image_size: ')}") from None


def prepare(weights: Weights | str | Path, which: Which | None, device: str) -> Weights:
    """Weights on a device, loaded if they are not yet.

    Raises:
        UserError: for weights that cannot be read, or a device that is not there.
    """
    place = pick_device(device)
    if not isinstance(weights, Weights):
        return require_head(load(weights, which=which, device=str(place)))
    require_head(weights)
    if which is not None:
        raise UserError("which: expected none beside loaded weights, which are of one kind")
    weights.model.to(place)
    return weights


def score(
    weights: Weights, records: Records, classes: Sequence[str], config: Config, batch_size: int
) -> Scores:
    """The scores of weights on labelled images.

    Args:
        weights: on the device to evaluate on.
        records: labelled by positions in `classes`.
        classes: those that predictions compete with, some that the weights know or all; the others'
            logits are left out.
        config: how images are read and cropped, and in `model.image_size` how large they become.
        batch_size: images of a forward pass.

    Raises:
        UserError: for an image that cannot be decoded.
    """
    data_device = weights.model.device
    position = {class_name(name): i for i, name in enumerate(weights.description.classes)}
    columns = torch.tensor([position[name] for name in classes], device=data_device)
    workers = resolve_workers(config.data, records)
    batches = eval_batches(records, config, batch_size, workers, data_device)
    return measure(lambda images: weights.model(images)[:, columns], batches, tuple(classes))


def competing_classes(
    description: Description, classes: tuple[str, ...], which: CompetingClasses | None
) -> tuple[str, ...]:
    """The classes of a set, followed by the others that its predictions compete with."""
    if which == "subset" or (which is None and len(classes) > 1):
        return classes
    return classes + tuple(
        name for name in map(class_name, description.classes) if name not in classes
    )


def open_set(description: Description, data: str | None) -> Dataset:
    """The set to evaluate on, None for the one trained on, by whatever path.

    Of that one only those images are to validate on that training held out; of another without a
    validation split all.

    Raises:
        UserError: for data that cannot be read, or a class that the weights do not know.
    """
    settings = dataclasses.replace(description.config.data, path=data_path(description, data))
    config = dataclasses.replace(description.config, data=settings)
    image_size, seed = config.model.image_size, config.train.seed
    trained_on = Path(description.config.data.path)
    if data is None or expand(data).resolve() == trained_on.resolve():
        dataset = open_dataset(config.data, image_size, seed)
    else:
        dataset = open_dataset(config.data, image_size, seed, train=False)
        dataset = _as_trained_on(dataset, description, config) or dataset
    _check_classes(description.classes, dataset.classes, config)
    return dataset


def data_path(description: Description, data: str | None) -> str:
    """Path or name of the data, None for the set trained on; raises UserError if that is gone."""
    trained_on = description.config.data.path
    there = trained_on in KNOWN_SETS or os.path.exists(expand(trained_on))  # noqa: PTH110
    if data is None and not there:
        raise UserError(
            f"data: {trained_on}, which the weights were trained on, is not there; "
            "give --data PATH where it is now"
        )
    return data or trained_on


def _as_trained_on(dataset: Dataset, description: Description, config: Config) -> Dataset | None:
    """The set that was opened to validate on, as training divided it; None for another."""
    if dataset.held_out:
        return None  # in any case
    with contextlib.suppress(UserError):  # what cannot be divided was not trained on
        if config.data.hold_out:
            divided = open_dataset(config.data, config.model.image_size, config.train.seed)
        else:  # not read once more: where all of it was opened, training opened no more
            whole = dataclasses.replace(dataset, train=dataset.val, val=None)
            divided = hold_out(
                whole, config.data.path, config.data.val_fraction, config.train.seed, ""
            )
        return divided if divided.fingerprint == description.fingerprint else None
    return None


def _open(
    description: Description, data: str | Dataset | Source | None, workers: int | None
) -> tuple[Dataset, Config]:
    """The set to evaluate on, and the settings to read it with."""
    settings = dataclasses.replace(description.config.data, workers=workers)
    if data is None or isinstance(data, str | Dataset):
        dataset = data if isinstance(data, Dataset) else open_set(description, data)
    else:
        classes = own_names(data) or description.classes
        _check_classes(description.classes, classes, description.config)
        dataset = Dataset(PATH, classes, None, records_of("data", data, classes, settings, ""))
    return dataset, dataclasses.replace(description.config, data=settings)


def _validation_records(dataset: Dataset) -> Records:
    assert dataset.val is not None
    return dataset.val


def _check_classes(expected: tuple[str, ...], found: tuple[str, ...], config: Config) -> None:
    expected = tuple(map(class_name, expected))
    unknown = [name for name in found if name not in expected]
    if not unknown:
        return
    pairs = [(i, a, b) for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b]
    first = ", ".join(f"class {i} is {b!r}, not {a!r}" for i, a, b in pairs[:3])
    if len(expected) != len(found):
        first = f"{first_few(unknown)}, which they do not know"
    place = printable(config.data.path)
    raise UserError(
        f"data: {place}: expected the {len(expected)} classes that the weights know, got "
        f"{len(found)}: {printable(first)}; evaluate on a set with the same classes"
    )
