"""What a model attends to, and whether that says anything about its prediction.

Fused kernels give no attention weights, so they are computed again from each layer's queries and
keys, and must give the layer's own output when they are put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitral.model import GroupedQueryAttention, ViT

STEPS = 20  # parts that a deletion curve is cut into, where there are as many patches
BATCH = 32  # images of a forward pass


@torch.inference_mode()
def attention_weights(model: ViT, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits and attention weights of every layer and head.

    Args:
        model: in evaluation mode, not under autocast.
        images: (B, C, H, W), normalised.

    Returns:
        Logits (B, num_classes), and for each layer weights (B, Q, N, N), whose rows sum to one: row
        i says how much of each token's value token i takes. All layers are held at once: 4 Q N^2
        bytes each in float32.

    Raises:
        AssertionError: if they do not give a layer's output again.
    """
    assert not model.training
    weights: list[Tensor] = []
    layers = [m for m in model.modules() if isinstance(m, GroupedQueryAttention)]
    hooks = [layer.register_forward_hook(partial(_recompute, weights)) for layer in layers]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # training lowers it, and TF32 keeps 3 digits
    try:
        return model(images), weights
    finally:
        torch.set_float32_matmul_precision(precision)
        for hook in hooks:
            hook.remove()


def _recompute(
    weights: list[Tensor], layer: GroupedQueryAttention, inputs: tuple[Any, ...], output: Tensor
) -> None:
    q, k, v = layer.heads(*inputs)
    group = layer.num_heads // layer.num_kv_heads
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    probabilities = (q @ k.mT / layer.head_size**0.5).softmax(-1)
    recomputed = layer.projection((probabilities @ v).transpose(1, 2).reshape(output.shape))
    error, largest = (recomputed - output).abs().max(), output.abs().max()
    assert error <= 1e-4 * largest, f"recomputed attention is off by {error:.1g} of {largest:.1g}"
    weights.append(probabilities)


def rollout(weights: Sequence[Tensor]) -> Tensor:
    """How much of each input token reaches each output token (Abnar and Zuidema 2020).

    With A_l the mean over the heads of layer l, R_l = (A_l / 2 + I / 2) R_(l-1) and R_0 = I: half
    of a token comes by the attention and half by the path around it.

    Args:
        weights: of each layer, (B, Q, N, N).

    Returns:
        (B, N, N), whose rows sum to one.
    """
    identity = torch.eye(weights[0].shape[-1], device=weights[0].device, dtype=weights[0].dtype)
    flow = identity
    for layer in weights:
        flow = (layer.mean(1) / 2 + identity / 2) @ flow
    return flow


def read(model: ViT, weights: Tensor) -> Tensor:
    """What the tokens that the head reads take from each patch.

    That is the row of the CLS token or, where the head reads the mean of the patches, theirs.

    Args:
        weights: attention or rollout, (..., N, N).

    Returns:
        (..., patches); the rest up to one comes from the CLS token and the registers.
    """
    read_by = slice(0, 1) if model.config.pooling == "cls" else slice(model.num_prefix, None)
    return weights[..., read_by, model.num_prefix :].mean(-2)


@torch.inference_mode()
def position_similarity(
    model: ViT, layer: int, rows: int, columns: int, patch: tuple[int, int]
) -> Tensor:
    """How well a key at each patch fits a query at `patch`, by their rotary positions alone.

    The mean over the key heads and channel pairs of a layer of cos(dx fx + dy fy), the angle that a
    pair is turned by between the two. It is the score of a query with an equal key whose pairs all
    have the same length, as a share of the score in the same place: 1 at `patch`, and a function of
    the offset alone.

    Args:
        layer: counted from 0; with axial frequencies all layers are alike.
        patch: row and column, counted from 0.

    Returns:
        (rows, columns), from -1 to 1.
    """
    cosine, sine = model.rope(rows, columns, model.device)[layer]
    cosine, sine = cosine[:, model.num_prefix :], sine[:, model.num_prefix :]
    here = slice(patch[0] * columns + patch[1], patch[0] * columns + patch[1] + 1)
    between = cosine[:, here] * cosine + sine[:, here] * sine
    return between.mean((0, 2)).view(rows, columns)


class Curve(NamedTuple):
    """Probability of a class against the share of the patches that is missing, or that is seen."""

    fractions: Tensor
    """From 0 to 1. Shape (points,), float64, on the CPU."""
    probabilities: Tensor
    """Shape (points,), float64, on the CPU."""

    @property
    def area(self) -> float:
        """The area under the curve, from 0 to 1."""
        return float(torch.trapezoid(self.probabilities, self.fractions))


@torch.inference_mode()
def deletion(model: ViT, image: Tensor, target: int, order: Tensor) -> Curve:
    """The probability of a class while patches give way to the image's mean colour, in order.

    A map that means something names first what the prediction rests on, and makes the area under
    the curve small (Petsiuk et al. 2018).

    Args:
        image: (C, H, W), normalised.
        target: the class.
        order: of the patches, (patches,), on the image's device.
    """
    _, H, W = image.shape
    P, N = model.config.patch_size, len(order)
    counts = torch.linspace(0, N, min(STEPS, N) + 1, dtype=torch.float64).round()
    rank = order.argsort().view(1, H // P, W // P)
    gone = rank < counts.to(rank.device, rank.dtype).view(-1, 1, 1)
    gone = gone.repeat_interleave(P, 1).repeat_interleave(P, 2)[:, None]
    mean = image.mean((1, 2), keepdim=True)
    probabilities = [
        model(torch.where(part, mean, image)).softmax(-1)[:, target] for part in gone.split(BATCH)
    ]
    return Curve(counts / N, torch.cat(probabilities).cpu().double())


@torch.inference_mode()
def insertion(model: ViT, image: Tensor, target: int, order: Tensor) -> Curve:
    """The probability of a class while patches appear, in order, on the image's mean colour.

    A good map makes the area under it large. It is the deletion in reverse order read backwards, so
    that over random orders both areas have the same mean.
    """
    fractions, probabilities = deletion(model, image, target, order.flip(0))
    return Curve(1 - fractions.flip(0), probabilities.flip(0))
