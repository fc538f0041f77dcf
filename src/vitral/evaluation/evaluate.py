"""Evaluating saved weights: on a labelled set, or on one at several image sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from vitral.config import Config, UserError
from vitral.data.fetch import resolve_workers
from vitral.data.loader import eval_batches
from vitral.data.records import Records
from vitral.data.sources import open_dataset
from vitral.evaluation.scores import Scores, measure
from vitral.weights import Description, Weights, Which, load

EVAL_BATCH = 256  # images of a forward pass


def evaluate(
    weights: Weights | str | Path,
    data: str | None = None,
    *,
    which: Which | None = None,
    batch_size: int = EVAL_BATCH,
    workers: int | None = None,
    device: str = "auto",
) -> Scores:
    """Top-1, top-5, per-class accuracy and calibration over every validation image once.

    Args:
        weights: loaded weights, or a weight or run folder.
        data: an image folder or a known set; None takes the set that the weights were trained on.
        which: "model" or "ema"; None takes the one that the weights name.
        batch_size: images of a forward pass.
        workers: decoding processes; None takes the cores but one.
        device: "cpu", "cuda", or "auto" for the GPU if there is one.

    Raises:
        UserError: for weights or data that cannot be read, or whose classes differ.
    """
    weights = prepare(weights, which, device)
    records, config = _open(weights, data, workers)
    return score(weights, records, weights.description.classes, config, batch_size)


def sweep(
    weights: Weights | str | Path,
    resolutions: Sequence[int],
    data: str | None = None,
    *,
    which: Which | None = None,
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
        resolutions: sides of the images that the model sees, in pixels.
        data, which, batch_size, workers, device: as for `evaluate`.

    Raises:
        UserError: for a size that is no multiple of the patch size, before anything is evaluated,
            and where `evaluate` raises it.
    """
    weights = prepare(weights, which, device)
    model = weights.description.config.model
    try:
        models = [dataclasses.replace(model, image_size=side) for side in resolutions]
    except UserError as error:
        raise UserError(f"resolutions: {str(error).removeprefix('image_size: ')}") from None
    records, config = _open(weights, data, workers)
    configs = [dataclasses.replace(config, model=model) for model in models]
    classes = weights.description.classes
    return (
        (config.model.image_size, score(weights, records, classes, config, batch_size))
        for config in configs
    )


def prepare(weights: Weights | str | Path, which: Which | None, device: str) -> Weights:
    """Weights on a device, loaded if they are not yet.

    Raises:
        UserError: for weights that cannot be read, or a device that is not there.
    """
    place = pick_device(device)
    if not isinstance(weights, Weights):
        return load(weights, which=which, device=str(place))
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
        classes: some of those that the weights know, or all; the others' logits are left out, as
            if the weights had never known them.
        config: how images are read and cropped, and in `model.image_size` how large they become.
        batch_size: images of a forward pass.

    Raises:
        UserError: for an image that cannot be decoded.
    """
    place = weights.model.cls.device
    position = {name: i for i, name in enumerate(weights.description.classes)}
    columns = torch.tensor([position[name] for name in classes], device=place)
    workers = resolve_workers(config.data, records)
    batches = eval_batches(records, config, batch_size, workers, place)
    return measure(lambda images: weights.model(images)[:, columns], batches, tuple(classes))


def _open(weights: Weights, data: str | None, workers: int | None) -> tuple[Records, Config]:
    """The validation images to evaluate on, and the settings to read them with."""
    description = weights.description
    trained_on = description.config.data.path
    settings = dataclasses.replace(
        description.config.data, path=data or trained_on, workers=workers
    )
    config = dataclasses.replace(description.config, data=settings)
    # What training held out alone counts of its set; of another all counts.
    own = is_own_set(description, data)
    dataset = open_dataset(settings, config.model.image_size, config.train.seed, train=own)
    _refuse_other_classes(description.classes, dataset.classes, config)
    assert dataset.val is not None
    return dataset.val, config


def is_own_set(description: Description, data: str | None) -> bool:
    """Whether `data`, None for the set trained on, is that set, which is opened as training did."""
    trained_on = Path(description.config.data.path)
    return data is None or Path(data).expanduser().resolve() == trained_on.resolve()


def pick_device(name: str) -> torch.device:
    """The device called "cpu" or "cuda"; "auto" is the GPU if there is one.

    Raises:
        UserError: if the GPU asked for is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: expected a GPU that torch can use, got none; give --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _refuse_other_classes(ours: tuple[str, ...], theirs: tuple[str, ...], config: Config) -> None:
    if ours == theirs:
        return
    pairs = [(i, a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
    first = ", ".join(f"class {i} is {b!r}, not {a!r}" for i, a, b in pairs[:3])
    raise UserError(
        f"data: {config.data.path}: expected the {len(ours)} classes that the weights know, got "
        f"{len(theirs)}{': ' + first if first else ''}; evaluate on a set with the same classes"
    )
