"""Inference with torch's own kernels, on a slice of the images at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from vitral.model import ViT

M = TypeVar("M", bound=nn.Module)
TOKENS_PER_SLICE = 8 * 196  # patches; half or twice as many are slightly slower


def by_torch(model: ViT) -> ViT:
    """Returns a copy of `model` that shares its weights and hooks, for inference on a CPU.

    Only a small slice of the images goes through the layers at a time, so that the output of one
    layer is still in the cache when the next layer reads it.
    """
    return replace_classes(model, {ViT: SlicedViT})


class SlicedViT(ViT):
    """A ViT for inference that splits the images into slices."""

    def forward_features(self, images: Tensor) -> Tensor:
        return torch.cat([*map(super().forward_features, self.slices(images))])

    def slices(self, images: Tensor) -> tuple[Tensor, ...]:
        """Splits images (B, C, H, W) into slices of fewer images."""
        patches = images.shape[2:].numel() // self.config.patch_size**2
        return images.split(max(1, TOKENS_PER_SLICE // max(1, patches)))


def replace_classes(module: M, classes: Mapping[type[nn.Module], type[nn.Module]]) -> M:
    """Returns a copy of `module` that shares its weights, with other classes for its modules."""
    copied = copy.copy(module)
    children = {name: replace_classes(child, classes) for name, child in module.named_children()}
    # Use vars: a compiled module forwards attributes that are set on it to the original module.
    vars(copied)["_modules"] = children
    if other := classes.get(type(module)):
        copied.__class__ = other  # pyright: ignore
    return copied
