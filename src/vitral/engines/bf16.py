"""Inference on a CPU with the linear layers in bfloat16.

Their products are computed in bfloat16 and added in float32, by oneDNN. The residual stream, the
norms and attention stay in float32: on a CPU, attention in bfloat16 is slower.
"""

from __future__ import annotations

from torch import Tensor

from vitral import kernels
from vitral.compat import has_bf16_products
from vitral.engines import onednn
from vitral.engines.plain import replace_classes
from vitral.model import FeedForward, Linear, Normed, ViT


def is_supported(model: ViT) -> bool:
    """Returns whether the processor has instructions for products in bfloat16."""
    return onednn.is_supported(model) and has_bf16_products()


def by_bf16(model: ViT) -> ViT:
    """Returns a copy of `model` for inference, with its current weights in bfloat16."""
    copied = replace_classes(model, {**onednn.CLASSES, FeedForward: _FeedForward, Linear: _Linear})
    for module in copied.modules():
        if isinstance(module, _Linear):
            module.halves = None
    return copied


class _Linear(Linear):
    halves: tuple[Tensor, Tensor | None] | None

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor | Normed
    ) -> Tensor:
        return self.product(x).float()

    def product(self, x: Tensor | Normed, then: tuple[str, str] = ("none", "")) -> Tensor:
        """Returns the output of the layer and an elementwise function, in bfloat16."""
        x, scale = x if isinstance(x, Normed) else (x, None)
        if self.halves is None:  # the scale belongs to the norm before this layer
            weight = self.weight if scale is None else self.weight * scale
            self.halves = weight.bfloat16(), None if self.bias is None else self.bias.bfloat16()
        return kernels.onednn_product(x.bfloat16(), *self.halves, then)


class _FeedForward(FeedForward):
    expand: _Linear  # pyright: ignore[reportIncompatibleVariableOverride]

    def forward(self, x: Normed) -> Tensor:
        if self.activation != "gelu-tanh":
            return super().forward(x)
        return self.contract(self.expand.product(x, ("gelu", "tanh")))
