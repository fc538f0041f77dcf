"""Inference on a CPU in onnxruntime or OpenVINO, with an ONNX file in the user's cache directory.

The file computes the head's input. It is exported once for a backbone and a version of vitral and
torch, and is compared with the model before each use.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vitral import storage
from vitral.caches import cache_dir
from vitral.engines import onnx
from vitral.engines.plain import SlicedViT, replace_classes
from vitral.errors import Messages, UserError, printable, reason_of
from vitral.model import CHANNELS, ViT
from vitral.weights import backbone_digest

Runtime = Literal["onnxruntime", "openvino"]
TOLERANCE = 1e-3  # of the largest feature
MAX_BYTES = 1_900_000_000  # of the weights; the limit of ONNX is 2 GiB, including the graph


def by_runtime(model: ViT, runtime: Runtime) -> ViT:
    """Returns a copy of `model` for inference whose features a runtime computes.

    It uses the current weights of the model, on a CPU, in float32.

    Raises:
        UserError: if a package is not installed, the model is too large, or the outputs do not
            match those of the model.
    """
    _import(runtime)
    size = sum(p.nbytes for p in model.parameters())
    if size > MAX_BYTES:
        raise UserError(
            f"engine: expected at most {MAX_BYTES / 1e9:g} GB of weights for {runtime}, "
            f"got {size / 1e9:.1f} GB; use another engine"
        )
    file = cache_dir() / "onnx" / f"{_key(model)}.onnx"
    features = _open(file, model, runtime)
    copied = replace_classes(model, {ViT: _ViT})
    assert isinstance(copied, _ViT)
    copied.run = features
    return copied


class _ViT(SlicedViT):
    run: onnx.Forward

    def features(self, images: Tensor) -> Tensor:
        return torch.cat([*map(self.run, self.slices(images))])


class _Features(ViT):
    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


def _import(runtime: Runtime) -> None:
    try:
        onnx.import_onnx()
        if runtime == "openvino":
            import openvino  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        extra = "openvino" if error.name == "openvino" else "'vitral[onnx]'"
        raise UserError(
            f"engine: {runtime} requires the package {error.name}, which is not installed; "
            f"run `pip install {extra}`, or use another engine"
        ) from None


def _key(model: ViT) -> str:
    """Returns a digest of everything that determines the content of the file."""
    versions = [version(name) for name in ("vitral", "torch", "onnxscript")]
    parts = [dataclasses.asdict(model.config), backbone_digest(model), *versions]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _open(file: Path, model: ViT, runtime: Runtime) -> onnx.Forward:
    """Opens the cached file if it matches the model; otherwise exports it again."""
    try:
        return _open_matching(file.read_bytes(), model, runtime)
    except FileNotFoundError:
        pass
    except Exception as error:  # runtimes raise errors of any type
        _say(f"{file} cannot be used and is replaced: {reason_of(error)}")
    _say(f"exporting the model for {runtime}")
    content = _export(model)
    try:
        features = _open_matching(content, model, runtime)
    except Exception as error:
        raise UserError(
            f"engine: {runtime} cannot run this model: {reason_of(error)}; use another engine"
        ) from error
    try:
        storage.make_directory(file.parent)
        with storage.replacing(file) as building:
            building.write_bytes(content)
    except OSError as error:
        _say(f"{file.parent} cannot be written: {reason_of(error)}; the export is not stored")
    return features


def _export(model: ViT) -> bytes:
    content = io.BytesIO()
    with onnx.quiet(), torch.no_grad():
        program = onnx.trace(replace_classes(model, {ViT: _Features}))
        content.write(onnx.to_onnx(program, "features").model_proto.SerializeToString())
    return content.getvalue()


@torch.no_grad()
def _open_matching(content: bytes, model: ViT, runtime: Runtime) -> onnx.Forward:
    """Opens the content; raises ValueError if it does not match the model on random images."""
    openers: dict[Runtime, Callable[[bytes], onnx.Forward]] = {
        "onnxruntime": onnx.open_onnx,
        "openvino": onnx.open_openvino,
    }
    features = openers[runtime](content)
    config = model.config
    size = max(config.image_size, 2 * config.patch_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, CHANNELS, size, size, generator=generator)
    expected, got = model.features(images), features(images)
    if got.shape != expected.shape:
        raise ValueError(f"expected features of shape {expected.shape}, got {got.shape}")
    error, bound = (got - expected).abs().max(), TOLERANCE * expected.abs().max()
    if not error <= bound:
        raise ValueError(f"expected errors of at most {bound:.1e}, got {error:.1e}")
    return features


def _say(text: str) -> None:
    print(f"engine: {printable(text)}", file=Messages(sys.stderr))
