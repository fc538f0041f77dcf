"""Exports weights to a file that runs without vitral and matches the outputs of the model.

onnx    for onnxruntime and other ONNX runtimes, written by torch's exporter
pt2     for torch: an archive of torch.export, a zip of raw weights and JSON. torch.export.load
        also loads pickles: do not load archives from untrusted sources

Both take normalized float32 images "images" (B, C, H, W) and return logits (B, classes). B, H and W
are dynamic; H and W are multiples of the patch size and at least two patches long. The rotary
tables are part of the graph. The file contains metadata for its use as JSON, in the property
"vitral" of ONNX files and the extra file "vitral.json" of pt2 archives.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from tqdm import tqdm

from vitral.config import Config
from vitral.data.augment import finish
from vitral.data.formats import open_dataset
from vitral.data.imagenet import human_name
from vitral.data.loader import fetch_eval_crops
from vitral.engines import onnx
from vitral.engines.onnx import Forward
from vitral.errors import Messages, UserError, counted, printable
from vitral.files import check_output, expand
from vitral.model import CHANNELS, ViT
from vitral.rundir import RunDir
from vitral.storage import naming
from vitral.weights import Weights, Which, load

Format = Literal["onnx", "pt2"]
Comparison = tuple[str, Iterable[Tensor]]  # a description of the images, and batches

TOLERANCE = 1e-4
MAX_FILE_BYTES = 2_000_000_000  # bytes of weights; the limit of ONNX is 2 GiB, including the graph
BATCH = 32


class ExportError(Exception):
    """The exported file does not match the model and was removed; the message is one line."""


@dataclass(frozen=True)
class Agreement:
    """Agreement of the file with the model in float32 on some images."""

    what: str
    """Description of the images."""
    images: int
    same: int
    """Number of images with the same most likely class."""
    error: float
    """Largest absolute difference between logits."""

    @property
    def good(self) -> bool:
        """Whether all classes are the same and the error is within the tolerance and not NaN."""
        return self.same == self.images and self.error <= TOLERANCE

    def __str__(self) -> str:
        fraction = self.same / self.images
        return f"{self.what}: largest error {self.error:.1e}, top-1 agreement {fraction:.2%}"


@dataclass(frozen=True)
class Exported:
    """The files that were written, and the comparisons with the model."""

    files: tuple[Path, ...]
    """The exported file, and a second file if the weights exceed 2 GB."""
    agreements: tuple[Agreement, ...]


def export(
    path: str | Path,
    *,
    format: Format = "onnx",
    out: str | Path | None = None,
    which: Which | None = None,
    opset: Literal[20, 23] = 20,
    data: str | None = None,
    images: int = 256,
) -> Exported:
    """Exports weights to one file, and keeps it only if its outputs match those of the model.

    The outputs are compared on random images of three sizes, in batches of one and three, and on
    validation images. An existing file is replaced only if the new one matches. ONNX weights that
    exceed 2 GB are written to a second file, whose name is that of the first plus `.data`.

    Args:
        path: a weight or run directory.
        format: "onnx", or "pt2" for torch.
        out: file to write; None uses the name of the run, in the current directory.
        which: "model" or "ema"; None uses the default of the weights.
        opset: ONNX opset version.
        data: an image folder or a known dataset to compare on; None uses the dataset that the
            weights were trained on, if it exists.
        images: number of validation images to compare on, evenly spaced; 0 for none.

    Raises:
        UserError: if the weights, data or file name is invalid, or a package is missing.
        ExportError: if the file does not match the model.
    """
    if format == "onnx":
        _require_onnx()
    weights = load(path, which=which)
    description = weights.description
    out = Path(out or f"{_name(weights.path)}.{format}")
    if out.suffix != f".{format}" or out.is_dir():
        raise UserError(f"out: expected a file name that ends in .{format}, got {out}")
    check_output(out)
    if format == "onnx" and _is_large(weights.model.state_dict()):
        if printable(out) != str(out):  # onnxruntime opens both files itself
            raise UserError(f"out: expected a path in UTF-8 without control characters, got {out}")
        check_output(out.with_name(f"{out.name}.data"))
    comparisons = [_random_images(description.config)]
    data = data or _local_dataset(description.config)
    if data and images:
        comparisons.append(_validation_images(description.config, data, images))
    document = json.dumps(_describe(weights, which or description.default))
    with naming(out), TemporaryDirectory(prefix=".vitral.", dir=out.parent) as folder:
        file = Path(folder) / out.name
        agreements = _write(weights.model, file, document, opset, comparisons)
        names = sorted(made.name for made in Path(folder).iterdir())
        for name in reversed(names):  # the main file comes last
            (Path(folder) / name).replace(out.parent / name)
    return Exported(tuple(out.parent / name for name in names), agreements)


def _write(
    model: ViT, file: Path, document: str, opset: int, comparisons: Sequence[Comparison]
) -> tuple[Agreement, ...]:
    """Writes the file and compares it with the model."""
    options: dict[str, Any] = {"leave": False, "disable": None, "file": Messages(sys.stderr)}
    with onnx.quiet(), tqdm(desc="tracing", unit=" images", **options) as bar:
        program = onnx.trace(model)
        bar.set_description_str("writing")
        if file.suffix == ".onnx":
            _write_onnx(program, file, document, opset)
        else:
            _write_pt2(program, file, document)
        bar.set_description_str("checking")
        exported = _open(file)
        return tuple(_compare(*each, model, exported, bar) for each in comparisons)


def _require_onnx() -> None:
    """Raises UserError if a package for ONNX is not installed."""
    try:
        onnx.import_onnx()
    except ImportError as error:
        raise UserError(
            f"format: onnx requires the package {error.name}, which is not installed; "
            "run `pip install 'vitral[onnx]'`, or use --format pt2"
        ) from None


def _name(directory: Path) -> str:
    """Returns a name for weights: the name of their run, if they belong to one."""
    place = directory.resolve()
    if place.parent.name == "snapshots":  # in the Hub's cache: models--owner--name/snapshots/commit
        return place.parents[1].name.split("--")[-1]
    run = RunDir.of_weights(place)
    return place.name if run is None else run.path.name


def _local_dataset(config: Config) -> str | None:
    """Returns the training set, or None if it no longer exists or has to be downloaded."""
    path = config.data.path
    # Path.exists raises for a name that is too long.
    exists = path in ("digits", "synthetic") or os.path.exists(expand(path))  # noqa: PTH110
    return path if exists else None


def _describe(weights: Weights, which: Which) -> dict[str, Any]:
    """Returns the metadata for using the file.

    With `fit` "crop", the input of the model is the central square whose side is `eval_crop` times
    the shorter side. With "squash", it is the central rectangle whose sides are `eval_crop` times
    the image's sides. With "pad", it is the entire image, in the center of a square whose side is
    the longer side and whose color is `fill`, from 0 to 255; `eval_crop` is 1. This is resized to a
    square of `image_size` pixels with antialiasing, scaled to [0, 1], and normalized with `mean`
    and `std`. With `task` "single", the probabilities are the softmax of the logits divided by
    `temperature`; null stands for 1, because the weights are not calibrated. With "multi", they are
    the sigmoid of the logits, and an image has each class whose probability is at least its value
    in `thresholds`.
    """
    description = weights.description
    config = description.config
    data = {
        key: getattr(config.data, key) for key in ("fit", "fill", "interpolation", "mean", "std")
    }
    return {
        "vitral": version("vitral"),
        "weights": which,
        "fingerprint": description.fingerprint,
        "image_size": config.model.image_size,
        "patch_size": config.model.patch_size,
        "eval_crop": 1.0 if config.data.fit == "pad" else config.data.eval_crop,
        **data,
        "temperature": description.temperature,
        "task": "multi" if description.multi_label else "single",
        **({"thresholds": description.thresholds} if description.multi_label else {}),
        "classes": description.classes,
        "names": [human_name(name) or name for name in description.classes],
    }


def _write_onnx(program: ExportedProgram, file: Path, document: str, opset: int) -> None:
    made = onnx.to_onnx(program, "logits", opset)
    made.model.metadata_props["vitral"] = document
    made.save(file, external_data=_is_large(program.state_dict))


def _is_large(state: Mapping[str, Any]) -> bool:
    """Returns whether ONNX stores the weights in a second file."""
    return sum(value.nbytes for value in state.values()) > MAX_FILE_BYTES


def _write_pt2(program: ExportedProgram, file: Path, document: str) -> None:
    program.example_inputs = None  # nothing else would be pickled
    content = io.BytesIO()  # torch's own writer aborts the process if the disk is full
    torch.export.save(program, content, extra_files={"vitral.json": document})
    file.write_bytes(content.getbuffer())


def _open(file: Path) -> Forward:
    try:
        if file.suffix == ".onnx":
            large = file.with_name(f"{file.name}.data").exists()
            return onnx.open_onnx(file if large else file.read_bytes())
        # The libraries' own code can only open paths in UTF-8.
        return torch.export.load(io.BytesIO(file.read_bytes())).module()
    except Exception as error:
        raise _cannot_run(error) from error


def _cannot_run(error: Exception) -> ExportError:
    return ExportError(f"the exported file cannot be run: {' '.join(str(error).split())}")


def _random_images(config: Config) -> Comparison:
    """Returns random images of three sizes, one not square, in batches of 1 and 3."""
    P = config.model.patch_size
    grid_size = max(2, config.model.image_size // P)
    larger_grid = grid_size + max(1, grid_size // 2)
    sizes = [
        (grid_size * P, grid_size * P),
        (larger_grid * P, larger_grid * P),
        (larger_grid * P, grid_size * P),
    ]
    generator = torch.Generator().manual_seed(0)
    shapes = [(count, CHANNELS, *size) for size in sizes for count in (1, 3)]
    batches = [torch.randn(shape, generator=generator) for shape in shapes]
    named = ", ".join(f"{height} by {width}" for height, width in sizes)
    return f"{sum(map(len, batches))} random images, {named}", batches


def _validation_images(config: Config, path: str, count: int) -> Comparison:
    """Returns validation images, cropped as in evaluation and evenly spaced over the dataset."""
    data = dataclasses.replace(config.data, path=path)
    dataset = open_dataset(data, config.model.image_size, config.train.seed, train=False)
    assert dataset.val is not None
    chosen = np.unique(np.linspace(0, len(dataset.val) - 1, count).round().astype(np.int64))
    parts = np.array_split(chosen, -(-len(chosen) // BATCH))
    config = dataclasses.replace(config, data=data)
    fetched = fetch_eval_crops(dataset.val, config, parts, 0, torch.device("cpu"))
    batches = (finish(part.images, None, data.mean, data.std) for part in fetched)
    return f"{counted(len(chosen), 'image')} of {dataset.name}", batches


@torch.no_grad()
def _compare(
    what: str, batches: Iterable[Tensor], model: Forward, exported: Forward, bar: tqdm
) -> Agreement:
    """Compares outputs on some images; raises ExportError if they do not match."""
    errors, same = [], []
    for images in batches:
        expected = model(images)
        try:
            got = exported(images)
        except Exception as error:
            raise _cannot_run(error) from error
        errors.append((got - expected).abs().max())
        same.append(got.argmax(1) == expected.argmax(1))
        bar.update(len(images))
    same_classes = torch.cat(same)
    agreement = Agreement(
        what, len(same_classes), int(same_classes.sum()), float(torch.stack(errors).max())
    )
    if not agreement.good:
        raise ExportError(f"the exported file does not match the model: {agreement}")
    return agreement
