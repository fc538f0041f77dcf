"""Selects the engine for inference: by the machine profile, or by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch

from vitral.config import Device, Engine
from vitral.engines import bf16, onednn, profile
from vitral.engines.onednn import by_onednn
from vitral.engines.plain import TOKENS_PER_SLICE, SlicedViT, by_torch
from vitral.errors import UserError
from vitral.machine import pick_device
from vitral.model import ViT
from vitral.weights import Weights

W = TypeVar("W", bound=Weights)


def for_inference(model: ViT, engine: Engine = "auto") -> ViT:
    """Returns a copy of `model` for inference with an engine; it shares the weights and hooks.

    "auto" uses oneDNN or torch's kernels on a CPU, whichever the machine profile shows to be
    faster. It returns the model itself if it is already for an engine, and on other devices.

    Raises:
        UserError: if the engine cannot run this model.
    """
    if isinstance(model, SlicedViT) or (engine == "auto" and model.device.type != "cpu"):
        return model
    if engine == "auto":
        return _fastest(model)(model)
    if engine == "plain":
        return by_torch(model)
    if engine in ("onednn", "bf16"):
        if not {"onednn": onednn, "bf16": bf16}[engine].is_supported(model):
            needed = "x86" if engine == "onednn" else "AVX-512 BF16"
            raise UserError(
                f"engine: {engine} requires a processor with {needed} and a model in float32; "
                "use --engine auto"
            )
        return {"onednn": by_onednn, "bf16": bf16.by_bf16}[engine](model)
    from vitral.engines.exported import by_runtime  # imports torch.export

    return by_runtime(model, engine)


def with_engine(weights: W, engine: Engine) -> W:
    """Returns weights whose model is for inference with an engine; see `for_inference`.

    With "auto", returns the weights themselves: the engine is then selected when they are used.
    """
    if engine == "auto":
        return weights
    return dataclasses.replace(weights, model=for_inference(weights.model, engine))


def pick_engine_device(engine: Engine, device: Device) -> str:
    """Returns the device for an engine: a CPU, except with "auto".

    Raises:
        UserError: if the engine or torch does not support the device.
    """
    if engine == "auto":
        return str(pick_device(device))
    if device not in ("auto", "cpu"):
        raise UserError(f"engine: {engine} requires --device cpu, got --device {device}")
    return "cpu"


def _fastest(model: ViT) -> Callable[[ViT], ViT]:
    """Returns the faster engine, measured with an encoder block of the model."""
    if not onednn.is_supported(model):
        return by_torch
    config = model.config
    grid = config.image_size // config.patch_size
    images = max(1, TOKENS_PER_SLICE // grid**2)
    block = ViT(dataclasses.replace(config, depth=1), 0).eval()
    x = torch.zeros(images, profile.num_tokens(config), config.shape.dim)
    engines = {"oneDNN": by_onednn, "torch": by_torch}

    def forward(engine: Callable[[ViT], ViT]) -> Callable[[], object]:
        copied = engine(block)
        return lambda: copied.encode(x, grid, grid)

    candidates = {name: forward(engine) for name, engine in engines.items()}
    with torch.no_grad():
        found = profile.fastest("prediction", profile.block_shape(config, images), candidates)
    return engines[found]
