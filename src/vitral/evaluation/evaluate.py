"""Evaluates weights on a labeled dataset, at one image size or several."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from vitral.config import Config, ViTConfig
from vitral.data.fetch import resolve_workers
from vitral.data.formats import open_dataset
from vitral.data.formats.known import KNOWN_SETS
from vitral.data.formats.objects import own_names, records_of
from vitral.data.loader import EVAL_BATCH, Batch, eval_batches
from vitral.data.objects import PATH, Source
from vitral.data.records import Records
from vitral.data.splits import Dataset, class_name, hold_out
from vitral.engines.choice import for_inference
from vitral.errors import UserError, counted, data_error, first_few
from vitral.evaluation import multilabel
from vitral.evaluation.multilabel import MultiLabelScores
from vitral.evaluation.scores import Scores, measure
from vitral.evaluation.tta import NUM_CROPS, Tta, check_tta, mean_probabilities
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
    tta: Tta = "none",
    batch_size: int = EVAL_BATCH,
    workers: int | None = None,
    device: str = "auto",
    keep_probabilities: bool = False,
) -> Scores | MultiLabelScores:
    """Evaluates weights on a validation set: top-1, top-5, per-class accuracy and calibration.

    Each validation image counts exactly once. If the dataset has only some of the weights'
    classes, `classes` selects the candidate classes. With weights for several labels per image, the
    scores contain average precisions, and F1 at the stored thresholds, instead.

    Args:
        weights: loaded weights, or anything that `load` accepts: a weight or run directory,
            hf-hub:owner/name, or timm:NAME.
        data: an image folder, the name of a known dataset, the result of `open_set`, or a Python
            dataset as for `train`; None uses the dataset that the weights were trained on.
        which: "model" or "ema"; None uses the default of the weights.
        classes: "subset" removes the logits of classes that are not in the dataset; "all" keeps
            them, after the classes of the dataset in `Scores.classes`. None means "all" for a
            dataset with a single class and "subset" otherwise.
        tta: test-time augmentation: averages the probabilities of an image and its mirror image
            ("flip"), or of crops at its four corners and center ("five-crop"), after temperature
            scaling.
        batch_size: images per forward pass.
        workers: number of decoding processes; None uses all cores but one.
        device: "cpu", "cuda", "mps", "xpu", or "auto" to use a GPU if there is one.
        keep_probabilities: keep the probabilities of all classes in `Scores.probabilities`.

    Raises:
        UserError: if the weights or the data cannot be read, or the dataset has a class that the
            weights do not have.
    """
    weights = prepare(weights, which, device)
    check_tta(tta, weights.description)
    dataset, config = _open(weights.description, data, workers)
    competing = competing_classes(weights.description, dataset.classes, classes)
    records = _validation_records(dataset)
    if weights.description.multi_label:
        return score_labels(weights, records, competing, config, batch_size)
    how = {"tta": tta, "keep_probabilities": keep_probabilities}
    return score(weights, records, competing, config, batch_size, **how)


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
    """Evaluates weights at several image sizes; returns an iterator over sizes and scores.

    Images of any size are mapped to the range of rotary positions used in training, so any multiple
    of the patch size works. The crop covers the same fraction of the image at every size; only the
    size to which it is resized changes. Objects appear larger in the random crops of training than
    in the crops of evaluation, so the best size is often larger than the training size (Touvron et
    al. 2019).

    Args:
        image_sizes: side lengths of the model's input, in pixels.
        data, which, classes, batch_size, workers, device: as for `evaluate`.

    Raises:
        UserError: as for `evaluate`, and if a size is not a multiple of the patch size, which is
            checked before anything is evaluated.
    """
    weights = prepare(weights, which, device)
    if weights.description.multi_label:
        raise UserError(
            "image-sizes: expected weights with one label per image, got several; omit it"
        )
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
    """Returns the model config for each size.

    Raises:
        UserError: if a size is not a multiple of the patch size.
    """
    model = description.config.model
    try:
        return [dataclasses.replace(model, image_size=image_size) for image_size in image_sizes]
    except UserError as error:
        raise UserError(f"image-sizes: {str(error).removeprefix('image_size: ')}") from None


def prepare(weights: Weights | str | Path, which: Which | None, device: str) -> Weights:
    """Returns weights on a device, loading them from a path if necessary.

    Raises:
        UserError: if the weights cannot be read, or the device is not available.
    """
    target = pick_device(device)
    if not isinstance(weights, Weights):
        return require_head(load(weights, which=which, device=str(target)))
    require_head(weights)
    if which is not None:
        raise UserError(f"which: expected None for loaded weights, got {which}; pass it to `load`")
    weights.model.to(target)
    return weights


def score(
    weights: Weights,
    records: Records,
    classes: Sequence[str],
    config: Config,
    batch_size: int,
    *,
    tta: Tta = "none",
    keep_probabilities: bool = False,
) -> Scores:
    """Returns the scores of weights on labeled images.

    Args:
        weights: weights on the device to evaluate on.
        records: images whose labels are indices into `classes`.
        classes: candidate classes: some or all of the classes of the weights. The logits of the
            others are removed.
        config: settings for reading and cropping images; `model.image_size` is the input size.
        batch_size: images per forward pass.
        tta: test-time augmentation. With it, the loss and the confidence are those of the mean
            probabilities, which are already calibrated.
        keep_probabilities: as for `evaluate`.

    Raises:
        UserError: if an image cannot be decoded.
    """
    logits, batches = _outputs(weights, records, classes, config, batch_size, tta)

    def log_probabilities(images: Tensor) -> Tensor:
        return mean_probabilities(logits, images, tta, weights.description).log()

    return measure(
        logits if tta == "none" else log_probabilities,
        batches,
        tuple(classes),
        keep_probabilities=keep_probabilities,
        temperature=weights.description.temperature if tta == "none" else None,
    )


def score_labels(
    weights: Weights, records: Records, classes: Sequence[str], config: Config, batch_size: int
) -> MultiLabelScores:
    """Returns the scores of weights on images with several labels, at the stored thresholds.

    The arguments are those of `score`.
    """
    forward, batches = _outputs(weights, records, classes, config, batch_size)
    known = map(class_name, weights.description.classes)
    thresholds = dict(zip(known, weights.description.thresholds, strict=True))
    chosen = tuple(thresholds[name] for name in classes)
    return multilabel.measure(forward, batches, tuple(classes), chosen)


def _outputs(
    weights: Weights,
    records: Records,
    classes: Sequence[str],
    config: Config,
    batch_size: int,
    tta: Tta = "none",
) -> tuple[Callable[[Tensor], Tensor], Iterator[Batch]]:
    """Returns a function from images to the logits of `classes`, and batches for it."""
    _check_task(weights.description, records, config)
    data_device = weights.model.device
    position = {class_name(name): i for i, name in enumerate(weights.description.classes)}
    columns = torch.tensor([position[name] for name in classes], device=data_device)
    workers = resolve_workers(config.data, records)
    batches = eval_batches(
        records, config, batch_size, workers, data_device, num_crops=NUM_CROPS[tta]
    )
    model = for_inference(weights.model)
    return lambda images: model(images)[:, columns], batches


def _check_task(description: Description, records: Records, config: Config) -> None:
    """Raises UserError if images have one label and the weights are for several, or vice versa."""
    one, several = "one label per image", "any number of labels per image"
    if description.multi_label != (records.labels.ndim == 2):
        expected, got = (several, one) if description.multi_label else (one, several)
        fix = "evaluate on a dataset with labels as in training"
        raise data_error(config.data.path, f"{expected}, as the weights predict", got, fix)


def competing_classes(
    description: Description, classes: tuple[str, ...], which: CompetingClasses | None
) -> tuple[str, ...]:
    """Returns the classes of the dataset, followed by the other candidate classes."""
    if which == "subset" or (which is None and len(classes) > 1):
        return classes
    return classes + tuple(
        name for name in map(class_name, description.classes) if name not in classes
    )


def open_set(
    description: Description, data: str | None, columns: Mapping[str, str] = MappingProxyType({})
) -> Dataset:
    """Opens the dataset to evaluate on; None opens the one that the weights were trained on.

    If training held out a part of that dataset, only that part is used, even if `data` is another
    path to the same dataset. All images of other datasets without a validation split are used.

    Args:
        columns: settings of the columns, such as `label_column`, if the data is a table.

    Raises:
        UserError: if the data cannot be read, or has a class that the weights do not have.
    """
    path = data_path(description, data)
    settings = dataclasses.replace(description.config.data, path=path, **columns)
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
    """Returns `data`, or the training set if it is None; raises UserError if that is missing."""
    trained_on = description.config.data.path
    exists = trained_on in KNOWN_SETS or os.path.exists(expand(trained_on))  # noqa: PTH110
    if data is None and not exists:
        raise UserError(
            f"data: {trained_on}, which the weights were trained on, does not exist; "
            "pass its new location with --data PATH"
        )
    return data or trained_on


def _as_trained_on(dataset: Dataset, description: Description, config: Config) -> Dataset | None:
    """Splits a dataset as in training; returns None if it is not the training set."""
    if dataset.held_out:
        return None  # already split as in training
    with contextlib.suppress(UserError):  # a dataset that cannot be split is not the training set
        if config.data.hold_out:
            split = open_dataset(config.data, config.model.image_size, config.train.seed)
        else:  # the images are already open, so there is no need to read the dataset again
            unsplit = dataclasses.replace(dataset, train=dataset.val, val=None)
            split = hold_out(
                unsplit, config.data.path, config.data.val_fraction, config.train.seed, ""
            )
        return split if split.fingerprint == description.fingerprint else None
    return None


def _open(
    description: Description, data: str | Dataset | Source | None, workers: int | None
) -> tuple[Dataset, Config]:
    """Returns the dataset to evaluate on and the settings for reading it."""
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
    known = {*map(class_name, expected)}
    unknown = [name for name in found if name not in known]
    if unknown:
        got = f"{first_few(unknown)}, which the weights do not have"
        fix = "evaluate on a dataset whose classes are among those of the weights"
        classes = counted(len(known), "class")
        raise data_error(config.data.path, f"only the {classes} of the weights", got, fix)
