"""Classifies and embeds images, from files or in memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from glob import glob, has_magic
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vitral import weights
from vitral.config import DataConfig, ViTConfig
from vitral.data import augment, crops
from vitral.data.decode import SUFFIXES, decode, decode_pillow
from vitral.data.formats.folder import list_images
from vitral.data.workers import in_workers
from vitral.engines.choice import for_inference
from vitral.errors import UserError, data_error, reason_of, unreadable
from vitral.evaluation.tta import NUM_CROPS, Tta, check_tta, mean_probabilities
from vitral.files import read_regular
from vitral.machine import available_cores, input_device
from vitral.model import ViT

ImageLike = str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor
T = TypeVar("T")
_Ranked = tuple[tuple[int, ...], tuple[float, ...]]  # the most likely classes, their probabilities
_Result = tuple[T | None, str | None]  # result for an image, or the reason why it cannot be read


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The most likely classes of an image, most likely first; empty if it could not be read.

    If an image can have several labels, these are all predicted classes, possibly none.
    """

    path: str | None
    """Path of the file; None for an image in memory."""
    classes: tuple[int, ...] = ()
    """Indices into the classes of the weights."""
    names: tuple[str, ...] = ()
    """Names of these classes, as stored with the weights."""
    probabilities: tuple[float, ...] = ()
    """Probabilities of these classes, from 0 to 1."""
    error: str | None = None
    """Reason why the image could not be read."""
    calibrated: bool = False
    """Whether the probabilities are calibrated: whether the weights have a temperature."""
    unknown: bool = False
    """Whether the highest probability is below `min_confidence`."""


class Classifier(weights.Weights):
    """Weights that classify images and compute their feature vectors."""

    def predict(
        self,
        images: ImageLike | Sequence[ImageLike],
        top: int = 5,
        *,
        min_confidence: float = 0.0,
        tta: Tta = "none",
        image_size: int | None = None,
        batch_size: int = 64,
        workers: int | None = None,
    ) -> list[Prediction]:
        """Returns the most likely classes of each image, in order, on the device of the model.

        The logits are divided by the temperature of the weights, if they have one.
        With weights for several labels per image, these are all classes whose probability is at
        least their threshold, and `top` is not used.

        Args:
            images: one image or several, each the path of a file, a PIL image, or uint8 RGB as an
                array or tensor of shape (H, W, 3) or (3, H, W).
            top: number of classes per image.
            min_confidence: probability of the most likely class below which an image is `unknown`.
            tta: test-time augmentation: averages the probabilities of an image and its mirror image
                ("flip"), or of crops at its four corners and center ("five-crop").
            image_size: side length of the model's input, in pixels; None uses the training size.
            batch_size: images per forward pass.
            workers: number of decoding processes for files; None uses all cores but one.

        Raises:
            UserError: if an argument is invalid. If an image cannot be read, its Prediction
                contains the reason.
        """
        options: dict[str, Any] = {
            "image_size": image_size,
            "batch_size": batch_size,
            "workers": workers,
        }
        options |= {"min_confidence": min_confidence, "tta": tta}
        return list(predictions(self, _as_list(images), top, **options))

    @torch.no_grad()
    def embed(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        image_size: int | None = None,
        batch_size: int = 64,
        workers: int | None = None,
    ) -> NDArray[np.float32]:
        """Returns the head's input: the CLS token or the mean patch token, after the last norm.

        It is useful for probes, search and clustering. The arguments are those of `predict`.

        Returns:
            Vectors (n, D), float32, in the order of the images. The row of an image that cannot be
            read is NaN; `predict` reports why.

        Raises:
            UserError: if an argument is invalid.
        """
        many = _as_list(images)
        model = for_inference(self.model)

        def pooled(pixels: Tensor) -> NDArray[np.float32]:
            return model.features(pixels).float().cpu().numpy()

        vectors = np.full((len(many), model.config.shape.dim), np.nan, np.float32)
        results = _process_images(self, many, pooled, image_size, batch_size, workers)
        for row, (vector, _) in zip(vectors, results, strict=True):
            if vector is not None:
                row[:] = vector
        return vectors


def load(
    path: str | Path, *, which: weights.Which | None = None, device: str = "cpu"
) -> Classifier:
    """Loads weights for use with `predict(images)`, `embed(images)`, `model` and `description`.

    Args:
        path: a weight directory, a run directory (its best weights are loaded), weights on the Hub,
            hf-hub:owner/name or hf-hub:owner/name@revision, or a pretrained model, timm:NAME.
        which: "model" or "ema"; None uses the default of the weights.
        device: device for the model.

    Raises:
        UserError: if the path has no weights, or they are corrupt or from a newer version.
    """
    found = weights.load(path, which=which, device=device)
    return Classifier(found.model, found.description, found.path)


def find_images(places: Iterable[str]) -> list[str]:
    """Returns paths of the images in files, folders and glob patterns, in the given order.

    A folder is replaced by all images in it and its subfolders, sorted. A file is returned as is,
    even if it does not exist. `-` reads paths from standard input, one per line.

    Raises:
        UserError: if one of the paths contains no images.
    """
    images: list[str] = []
    for place in places:
        if place == "-":
            lines = sys.stdin.buffer.read().splitlines()
            found = [path for line in lines if line for path in _images_in(os.fsdecode(line))]
        elif has_magic(place) and not os.path.lexists(place):
            names = sorted(glob(place, recursive=True), key=os.fsencode)  # noqa: PTH207
            # With **, both a folder and its content match.
            found = list(dict.fromkeys(path for name in names for path in _images_in(name)))
        else:
            found = _images_in(place)
        if not found:
            expected = f"images ({', '.join(SUFFIXES)})"
            raise data_error(place, expected, "none", "pass image files or a folder of them")
        images += found
    return images


def _images_in(name: str) -> list[str]:
    if not os.path.isdir(name):  # noqa: PTH112, as Path's raises for some names
        return [name]
    try:
        paths, _ = list_images(Path(name), os.fsencode(Path(name)))
        return [*map(os.fsdecode, paths.tolist())]
    except OSError as error:
        raise unreadable(name, error) from error


def predictions(
    source: weights.Weights,
    images: Sequence[ImageLike],
    top: int = 5,
    *,
    min_confidence: float = 0.0,
    tta: Tta = "none",
    image_size: int | None = None,
    batch_size: int = 64,
    workers: int | None = None,
) -> Iterator[Prediction]:
    """Yields the results of `Classifier.predict` one by one; takes the same arguments."""
    _check_minimum(1, top=top)
    if not 0 <= min_confidence <= 1:
        raise UserError(
            f"min_confidence: expected a probability from 0 to 1, got {min_confidence:g}"
        )
    weights.require_head(source)
    description = source.description
    check_tta(tta, description)
    if min_confidence and description.multi_label:
        raise UserError(
            "min_confidence: expected 0 for weights with several labels per image, which may have "
            f"no label, got {min_confidence:g}"
        )
    rank = partial(_rank, for_inference(source.model), top, tta, description)
    results = _process_images(source, images, rank, image_size, batch_size, workers, NUM_CROPS[tta])
    return map(partial(_prediction, description, min_confidence), results, images)


def _prediction(
    description: weights.Description,
    min_confidence: float,
    result: _Result[_Ranked],
    image: ImageLike,
) -> Prediction:
    path = os.fspath(image) if isinstance(image, str | os.PathLike) else None
    ranked, error = result
    if ranked is None:
        return Prediction(path=path, error=error)
    top_classes, probabilities = ranked
    return Prediction(
        path=path,
        classes=top_classes,
        names=tuple(description.classes[c] for c in top_classes),
        probabilities=probabilities,
        calibrated=description.temperature is not None,
        # Also if it is NaN. An image with any number of labels may have none.
        unknown=not description.multi_label and not probabilities[0] >= min_confidence,
    )


def _as_list(images: Any) -> list[ImageLike]:
    kinds = str | os.PathLike | Image.Image | np.ndarray | Tensor
    single = isinstance(images, kinds | bytes) or not isinstance(images, Iterable)
    many: list[Any] = [images] if single else list(images)
    for image in many:
        if not isinstance(image, kinds):
            raise UserError(
                f"images: expected paths, PIL images, arrays or tensors, got {type(image).__name__}"
            )
    return many


def _check_minimum(minimum: int, **settings: int) -> None:
    for name, value in settings.items():
        if value < minimum:
            raise UserError(f"{name}: expected {minimum} or more, got {value}")


def _process_images(
    source: weights.Weights,
    images: Sequence[ImageLike],
    compute: Callable[[Tensor], Iterable[T]],
    image_size: int | None,
    batch_size: int,
    workers: int | None,
    num_crops: int = 1,
) -> Iterator[_Result[T]]:
    """Calls `compute` with normalized batches on the device; yields one result per image.

    A batch has the shape (B * num_crops, C, S, S), with B images and B results.
    """
    _check_minimum(1, batch_size=batch_size)
    _check_minimum(0, workers=workers or 0)
    config = source.description.config
    size = resolve_image_size(config.model, image_size)
    dataset = _CropDataset(images, config.data, size, num_crops)
    starts = range(0, len(images), batch_size)
    batches = [range(first, min(first + batch_size, len(images))) for first in starts]
    if not all(isinstance(image, str | os.PathLike) for image in images):
        workers = 0  # images in memory stay in this process
    elif workers is None:
        workers = max(0, min(16, available_cores() - 1, len(batches) - 1))
    return _results(dataset, batches, workers, source.model.norm.scale, compute)


def _results(
    dataset: _CropDataset,
    batches: list[range],
    workers: int,
    reference: Tensor,
    compute: Callable[[Tensor], Iterable[T]],
) -> Iterator[_Result[T]]:
    mean, std = dataset.config.mean, dataset.config.std
    cropped = in_workers(dataset, batches, workers, reference.is_cuda)
    for batch, (pixels, broken) in zip(batches, cropped, strict=True):
        found = iter(())
        if len(pixels):
            pixels = pixels.to(input_device(reference.device), non_blocking=True)
            finished = augment.finish(pixels, None, mean, std)
            found = iter(compute(finished.to(reference.device, reference.dtype)))
        for i in batch:
            yield (None, broken[i]) if i in broken else (next(found), None)


def resolve_image_size(config: ViTConfig, image_size: int | None) -> int:
    """Returns the input size; raises UserError if it is not a multiple of the patch size."""
    if image_size is None:
        return config.image_size
    P = config.patch_size
    if image_size < 1 or image_size % P:
        nearest = max(1, round(image_size / P)) * P
        raise UserError(
            f"image_size: expected a multiple of the patch size {P}, got {image_size}; "
            f"the nearest is {nearest}"
        )
    return image_size


@torch.no_grad()
def _rank(
    model: ViT, top: int, tta: Tta, description: weights.Description, images: Tensor
) -> list[_Ranked]:
    probabilities = mean_probabilities(model, images, tta, description)
    if description.multi_label:
        return [_above(row, description.thresholds) for row in probabilities.tolist()]
    top_classes = probabilities.topk(min(top, model.num_classes))
    rows = zip(top_classes.indices.tolist(), top_classes.values.tolist(), strict=True)
    return [(tuple(classes), tuple(probabilities)) for classes, probabilities in rows]


def _above(probabilities: Sequence[float], thresholds: Sequence[float]) -> _Ranked:
    """Returns the classes whose probability is at least their threshold, most likely first."""
    pairs = zip(probabilities, thresholds, strict=True)
    chosen = [i for i, (p, threshold) in enumerate(pairs) if p >= threshold]
    chosen.sort(key=lambda i: -probabilities[i])
    return tuple(chosen), tuple(probabilities[i] for i in chosen)


class _CropDataset(Dataset[tuple[Tensor, dict[int, str]]]):
    """Crops readable images, and collects errors of the others; runs in worker processes."""

    def __init__(
        self, images: Sequence[ImageLike], config: DataConfig, image_size: int, num_crops: int
    ) -> None:
        self.images = images
        self.config = config
        self.image_size = image_size
        self.num_crops = num_crops

    def __getitem__(self, batch: range) -> tuple[Tensor, dict[int, str]]:
        config, image_size, broken, done = self.config, self.image_size, {}, 0
        shape = len(batch), self.num_crops, 3, image_size, image_size
        cropped = torch.empty(shape, dtype=torch.uint8)
        for i in batch:
            try:
                pixels = to_pixels(self.images[i])
            except (OSError, ValueError) as error:
                broken[i] = reason_of(error)
                continue
            crop = crops.eval_crop if self.num_crops == 1 else crops.five_crops
            cropped[done] = crop(pixels, config, image_size)
            done += 1
        return cropped[:done].flatten(0, 1), broken


def to_pixels(image: ImageLike) -> Tensor:
    """Returns uint8 RGB (3, H, W); raises OSError, DecodeError, or UserError for an array."""
    if isinstance(image, Image.Image):
        return decode_pillow(image)
    if isinstance(image, str | os.PathLike):
        return decode(read_regular(image))
    kind, shape = str(image.dtype).removeprefix("torch."), tuple(image.shape)
    if kind != "uint8" or len(shape) != 3 or 3 not in (shape[0], shape[2]) or 0 in shape:
        raise UserError(
            f"images: expected uint8 of shape (H, W, 3) or (3, H, W), got {kind} of shape {shape}"
        )
    # Copied because torch does not support read-only arrays or negative strides.
    pixels = torch.from_numpy(np.array(image)) if isinstance(image, np.ndarray) else image.cpu()
    return pixels.permute(2, 0, 1) if shape[2] == 3 else pixels
