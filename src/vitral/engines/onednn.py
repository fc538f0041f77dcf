"""Inference on a CPU at about twice the speed: the model's own result, to rounding.

Two things, each measured with ViT-Ti/16 and ViT-S/16 on an AMD EPYC:

* oneDNN computes the linear layers, and the GELU with the one before it. torch gives them to MKL,
  which uses only half of the width of an AMD processor's vectors, and a tanh of its own costs an
  eighth of the whole.
* Few images go through all layers at a time, so that what one layer writes is still in the cache
  when the next reads it.
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
TOKENS_PER_SLICE = 8 * 196  # patches; half and twice as many are a little slower


def for_inference(model: ViT) -> ViT:
    """A twin of `model` that shares its weights and hooks, for forward passes without gradients.

    The model itself where torch or the processor offers nothing quicker: on a GPU, in another
    precision than float32, on other processors than x86.
    """
    fit = all(p.is_cpu and p.dtype == torch.float32 for p in model.parameters())
    return _shared_copy(model) if kernels.has_onednn() and fit else model


def _shared_copy(module: M) -> M:
    twin = copy.copy(module)
    # By vars: a module from torch.compile hands what is set on it to the one that it was made of.
    vars(twin)["_modules"] = {name: _shared_copy(child) for name, child in module.named_children()}
    if quick := _FAST_CLASSES.get(type(module)):
        twin.__class__ = quick  # pyright: ignore
    return twin


class _LinearMode(TorchFunctionMode):
    """Gives linear layers to oneDNN, those too whose weights are scaled by a norm."""

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
        # Under autocast oneDNN would get operands of two kinds, which it refuses.
        with torch.autocast("cpu", enabled=False), _LinearMode():
            return torch.cat([*map(super().forward_features, slices)])


_FAST_CLASSES: dict[type[nn.Module], type[nn.Module]] = {FeedForward: _FeedForward, ViT: _ViT}
