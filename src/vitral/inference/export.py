"""Weights as one file that needs no vitral to run, kept only if it does what the model does.

onnx    for onnxruntime and the like, by torch's exporter
pt2     for torch: the archive of torch.export, a zip of raw weights and JSON. torch.export.load
        would run a pickle if there were one: load no such file from a stranger

Both take float32 images "images" (B, C, H, W), normalised, and give logits (B, classes). B, H and W
are free, H and W multiples of the patch and at least two patches: the rotary tables are part of the
graph. What it takes to use them lies in the file as JSON: property "vitral" of ONNX, extra file
"vitral.json" of pt2.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from tqdm import tqdm

from vitral.config import Config
from vitral.data.augment import finish
from vitral.data.formats import open_dataset
from vitral.data.imagenet import human_name
from vitral.data.loader import fetch_eval_crops
from vitral.errors import Messages, UserError, counted, printable
from vitral.files import check_output, expand
from vitral.model import CHANNELS, ViT
from vitral.rundir import RunDir
from vitral.storage import naming
from vitral.weights import Weights, Which, load

Format = Literal["onnx", "pt2"]
Forward = Callable[[Tensor], Tensor]
Comparison = tuple[str, Iterable[Tensor]]  # what the images are, and batches of them

TOLERANCE = 1e-4
MAX_FILE_BYTES = 2_000_000_000  # bytes of weights; an ONNX file ends at 2 GiB, its graph included
BATCH = 32


class ExportError(Exception):
    """The file written did not do what the model does, and is gone; one line says how it failed."""


@dataclass(frozen=True)
class Agreement:
    """How far the file does on some images what the model does in float32."""

    what: str
    """The images."""
    images: int
    same: int
    """Images whose likeliest class is the same."""
    error: float
    """The largest absolute difference of a logit."""

    @property
    def good(self) -> bool:
        """Whether all classes are the same and no logit is over the tolerance, or not a number."""
        return self.same == self.images and self.error <= TOLERANCE

    def __str__(self) -> str:
        fraction = self.same / self.images
        return f"{self.what}: largest error {self.error:.1e}, top-1 agreement {fraction:.2%}"


@dataclass(frozen=True)
class Exported:
    """What was written, and what it was compared on."""

    files: tuple[Path, ...]
    """The file, and weights above 2 GB beside it."""
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
    """Writes weights as one file, runs it beside the model, and keeps it if the two agree.

    They are compared on random images of three sizes in batches of one and of three, and on
    validation images. A file that is there already is replaced by one that agrees, and by no other.
    ONNX weights above 2 GB go into a second file beside it, of the same name and `.data`.

    Args:
        path: a weight directory, or a run directory.
        format: "onnx", or "pt2" for torch.
        out: the file; None takes the run's name, in the current folder.
        which: "model" or "ema"; None takes the one that the weights name.
        opset: of ONNX.
        data: an image folder or a known set to compare on; None takes the set that the weights were
            trained on, if it is there.
        images: how many of it, spread evenly; 0 for none.

    Raises:
        UserError: for weights, data or a name that cannot be used, or a package that is missing.
        ExportError: if the file does something else than the model.
    """
    if format == "onnx":
        _require_onnx()
    weights = load(path, which=which)
    description = weights.description
    out = Path(out or f"{_name(weights.path)}.{format}")
    if out.suffix != f".{format}" or out.is_dir():
        raise UserError(f"out: expected a file name that ends in .{format}, got {out}")
    if printable(out) != str(out):  # the exporters' own code would fail to open it
        raise UserError(f"out: expected a path in UTF-8 without control characters, got {out}")
    check_output(out)
    if format == "onnx":  # for large weights
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
        for name in reversed(names):  # the file itself comes last
            (Path(folder) / name).replace(out.parent / name)
    return Exported(tuple(out.parent / name for name in names), agreements)


def _write(
    model: ViT, file: Path, document: str, opset: int, comparisons: Sequence[Comparison]
) -> tuple[Agreement, ...]:
    """Writes the file and runs it beside the model."""
    how: dict[str, Any] = {"leave": False, "disable": None, "file": Messages(sys.stderr)}
    with _quiet(), tqdm(desc="tracing", unit=" images", **how) as bar:
        program = _trace(model)
        bar.set_description_str("writing")
        if file.suffix == ".onnx":
            _write_onnx(program, file, document, opset)
        else:
            _write_pt2(program, file, document)
        bar.set_description_str("checking")
        exported = _open(file)
        return tuple(_compare(*each, model, exported, bar) for each in comparisons)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings, which the user cannot act on."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def _require_onnx() -> None:
    """Imports what ONNX takes, without the telemetry that onnxruntime starts when it is imported.

    Raises:
        UserError: a package is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"format: onnx takes the package {error.name}, which is not installed; "
            "`pip install 'vitral[onnx]'`, or give --format pt2"
        ) from None


def _name(directory: Path) -> str:
    """What to call weights: by their run, where they lie in one."""
    place = directory.resolve()
    if place.parent.name == "snapshots":  # of the Hub's cache: models--owner--name/snapshots/commit
        return place.parents[1].name.split("--")[-1]
    run = RunDir.of_weights(place)
    return place.name if run is None else run.path.name


def _local_dataset(config: Config) -> str | None:
    """The set that was trained on, unless it has gone or would have to be downloaded."""
    path = config.data.path
    # Path.is_dir raises for a name that is too long.
    there = path in ("digits", "synthetic") or os.path.isdir(expand(path))  # noqa: PTH112
    return path if there else None


def _describe(weights: Weights, which: Which) -> dict[str, Any]:
    """What using the file takes: the central square of `eval_crop` times the short side, resized to
    `image_size` with antialiasing, scaled to [0, 1], less `mean`, over `std`."""
    description = weights.description
    config = description.config
    data = {
        key: getattr(config.data, key)
        for key in ("eval_crop", "fit", "interpolation", "mean", "std")
    }
    return {
        "vitral": version("vitral"),
        "weights": which,
        "fingerprint": description.fingerprint,
        "image_size": config.model.image_size,
        "patch_size": config.model.patch_size,
        **data,
        "classes": description.classes,
        "names": [human_name(name) or name for name in description.classes],
    }


def _trace(model: ViT) -> ExportedProgram:
    P = model.config.patch_size
    # One row or one column would be a case of its own to torch.
    rows, columns = Dim("rows", min=2), Dim("columns", min=2)
    shapes = {"images": {0: Dim("batch", min=1), 2: P * rows, 3: P * columns}}
    sample = torch.zeros(2, CHANNELS, 3 * P, 4 * P)
    program = torch.export.export(model, (sample,), dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which the file would tell
    return program


def _write_onnx(program: ExportedProgram, file: Path, document: str, opset: int) -> None:
    made = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        opset_version=opset,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: "batch", 2: "height", 3: "width"}},
    )
    assert made is not None
    made.model.metadata_props["vitral"] = document
    size = sum(value.nbytes for value in program.state_dict.values())
    made.save(file, external_data=size > MAX_FILE_BYTES)


def _write_pt2(program: ExportedProgram, file: Path, document: str) -> None:
    program.example_inputs = None  # they alone would be pickled
    content = io.BytesIO()  # torch's own writer aborts the process where a disk is full
    torch.export.save(program, content, extra_files={"vitral.json": document})
    file.write_bytes(content.getbuffer())


def _open(file: Path) -> Forward:
    try:
        return _open_onnx(file) if file.suffix == ".onnx" else torch.export.load(file).module()
    except Exception as error:
        raise _cannot_run(error) from error


def _open_onnx(file: Path) -> Forward:
    import onnxruntime

    onnxruntime.disable_telemetry_events()  # where it was imported before
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised as well
    session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _cannot_run(error: Exception) -> ExportError:
    return ExportError(f"the file cannot be run: {' '.join(str(error).split())}")


def _random_images(config: Config) -> Comparison:
    """Images of the size trained on, of a larger one and of neither, in batches of 1 and 3."""
    P = config.model.patch_size
    grid_size = max(2, config.model.image_size // P)
    larger_grid = grid_size + max(1, grid_size // 2)
    sizes = [
        (grid_size * P, grid_size * P),
        (larger_grid * P, larger_grid * P),
        (larger_grid * P, grid_size * P),
    ]
    draw = torch.Generator().manual_seed(0)
    shapes = [(count, CHANNELS, *size) for size in sizes for count in (1, 3)]
    batches = [torch.randn(shape, generator=draw) for shape in shapes]
    named = ", ".join(f"{height} by {width}" for height, width in sizes)
    return f"{sum(map(len, batches))} random images, {named}", batches


def _validation_images(config: Config, path: str, count: int) -> Comparison:
    """Images as evaluation sees them, spread evenly over the set."""
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
    """Raises ExportError if the two do not agree."""
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
        raise ExportError(f"the file does not do what the model does: {agreement}")
    return agreement
