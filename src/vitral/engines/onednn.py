"""Inference on a CPU at about twice the speed, with the same results up to rounding.

Two optimizations, both measured with ViT-Ti/16 and ViT-S/16 on an AMD EPYC:

* oneDNN computes the linear layers and fuses GELU into the layer before it. torch uses MKL, which
  uses only half the vector width of AMD processors, and a separate tanh takes an eighth of the
  time.
* Only a small slice of the images goes through the layers at a time, so that the output of one
  layer is still in the cache when the next layer reads it.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitral import kernels
from vitral.model import FeedForward, Normed, ViT

M = TypeVar("M", bound=nn.Module)
TOKENS_PER_SLICE = 8 * 196  # patches; half or twice as many are slightly slower


def for_inference(model: ViT) -> ViT:
    """Returns a copy of `model` that shares its weights and hooks, for inference.

    The copy computes no gradients. Returns the model itself where nothing faster is available: on a
    GPU, in a precision other than float32, or on processors other than x86.
    """
    supported = all(p.is_cpu and p.dtype == torch.float32 for p in model.parameters())
    return _shared_copy(model) if kernels.has_onednn() and supported else model


def _shared_copy(module: M) -> M:
    copied = copy.copy(module)
    children = {name: _shared_copy(child) for name, child in module.named_children()}
    # Use vars: a compiled module forwards attributes that are set on it to the original module.
    vars(copied)["_modules"] = children
    if fast := _FAST_CLASSES.get(type(module)):
        copied.__class__ = fast  # pyright: ignore
    return copied


class _LinearMode(TorchFunctionMode):
    """Computes all linear layers with oneDNN, including those with weights scaled by a norm."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear:
            return kernels.onednn_product(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _FeedForward(FeedForward):
    def forward(self, x: Normed) -> Tensor:
        if self.activation != "gelu-tanh":
            return super().forward(x)
        weight = self.expand.weight * x.scale
        return self.contract(
            kernels.onednn_product(x.tokens, weight, self.expand.bias, ("gelu", "tanh"))
        )


class _ViT(ViT):
    def forward_features(self, images: Tensor) -> Tensor:
        patches = images.shape[2:].numel() // self.config.patch_size**2
        slices = images.split(max(1, TOKENS_PER_SLICE // max(1, patches)))
        # Under autocast, oneDNN would receive operands of two dtypes, which it rejects.
        with torch.autocast("cpu", enabled=False), _LinearMode():
            return torch.cat([*map(super().forward_features, slices)])


_FAST_CLASSES: dict[type[nn.Module], type[nn.Module]] = {FeedForward: _FeedForward, ViT: _ViT}
