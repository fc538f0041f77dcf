"""Evaluating saved weights on a labelled set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from vitral.config import Config, UserError
from vitral.data.fetch import resolve_workers
from vitral.data.loader import eval_batches
from vitral.data.sources import open_dataset
from vitral.evaluation.scores import Scores, measure
from vitral.weights import Weights, Which, load

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
    place = pick_device(device)
    if not isinstance(weights, Weights):
        weights = load(weights, which=which)
    elif which is not None:
        raise UserError("which: expected none beside loaded weights, which are of one kind")
    weights.model.to(place)
    description = weights.description
    trained_on = description.config.data.path
    own = data is None or Path(data).expanduser().resolve() == Path(trained_on).resolve()
    settings = dataclasses.replace(
        description.config.data, path=data or trained_on, workers=workers
    )
    config = dataclasses.replace(description.config, data=settings)
    # A set without a validation split is opened as training did, so that only what it held out
    # counts; of another set all counts.
    dataset = open_dataset(settings, config.model.image_size, config.train.seed, train=own)
    _refuse_other_classes(description.classes, dataset.classes, config)
    assert dataset.val is not None
    batches = eval_batches(
        dataset.val, config, batch_size, resolve_workers(config.data, dataset.val), place
    )
    return measure(weights.model, batches, dataset.classes)


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
