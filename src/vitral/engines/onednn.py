"""Inference on a CPU with oneDNN, with the same results up to rounding.

Three optimizations, measured with ViT-Ti/16 and ViT-S/16 on an AMD EPYC:

* oneDNN computes the linear layers and fuses GELU into the layer before it. torch uses MKL, which
  uses only half the vector width of AMD processors, and a separate tanh takes an eighth of the
  time.
* oneDNN also computes the products of attention if they are large.
* A small slice of the images goes through the layers at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitral import kernels
from vitral.engines.plain import SlicedViT, replace_classes
from vitral.model import FeedForward, GroupedQueryAttention, Linear, Normed, ViT

MIN_SCORES = 1 << 16  # of a key head and an image: for fewer, torch's attention is faster


def is_supported(model: ViT) -> bool:
    """Returns whether oneDNN can run a model: in float32, on an x86 processor."""
    exact = all(p.is_cpu and p.dtype == torch.float32 for p in model.parameters())
    return exact and kernels.has_onednn()


def by_onednn(model: ViT) -> ViT:
    """Returns a copy of `model` that shares its weights and hooks, for inference with oneDNN.

    The copy computes no gradients.
    """
    return replace_classes(model, CLASSES)


class _Linear(Linear):
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor | Normed
    ) -> Tensor:
        x, weight = (x.tokens, self.weight * x.scale) if isinstance(x, Normed) else (x, self.weight)
        return kernels.onednn_product(x, weight, self.bias)


class _FeedForward(FeedForward):
    def forward(self, x: Normed) -> Tensor:
        if self.activation != "gelu-tanh":
            return super().forward(x)
        weight = self.expand.weight * x.scale
        return self.contract(
            kernels.onednn_product(x.tokens, weight, self.expand.bias, ("gelu", "tanh"))
        )


class _Attention(GroupedQueryAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, Q, N, S = q.shape
        K = k.shape[1]
        if Q // K * N * N < MIN_SCORES:
            return super().attend(q, k, v)
        queries = (q * S**-0.5).reshape(B * K, -1, S)
        # With rows that are not adjacent in memory, oneDNN is hundreds of times slower.
        keys, values = (t.reshape(B * K, N, S).contiguous() for t in (k, v))
        attended = []
        for query, key, value in zip(queries, keys, values, strict=True):
            scores = kernels.onednn_product(query, key)
            attended.append(kernels.onednn_product(scores.softmax(-1), value.mT))
        return torch.stack(attended).view(B, Q, N, S)


class _ViT(SlicedViT):
    # Under autocast, oneDNN would receive operands of two dtypes, which it rejects.
    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(images)

    def forward_features(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward_features(images)


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    FeedForward: _FeedForward,
    GroupedQueryAttention: _Attention,
    Linear: _Linear,
    ViT: _ViT,
}
