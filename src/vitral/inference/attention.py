"""Computes attention weights of a model, and measures their relevance to its prediction.

Fused kernels do not return attention weights, so they are recomputed from the queries and keys of
each layer, and must reproduce the output of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitral.model import GroupedQueryAttention, ViT

STEPS = 20  # steps of a deletion curve, or one per patch if there are fewer patches
BATCH = 32  # images per forward pass


@torch.inference_mode()
def attention_weights(model: ViT, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Computes the logits, and the attention weights of every layer and head.

    Args:
        model: model in evaluation mode, not under autocast.
        images: normalized, (B, C, H, W).

    Returns:
        Logits (B, num_classes), and for each layer weights (B, Q, N, N) whose rows sum to one: row
        i contains the attention of token i to each token. All layers are in memory at once, with
        4 Q N^2 bytes per image and layer in float32.

    Raises:
        AssertionError: if the weights do not reproduce the output of a layer.
    """
    assert not model.training
    weights: list[Tensor] = []
    layers = [m for m in model.modules() if isinstance(m, GroupedQueryAttention)]
    hooks = [layer.register_forward_hook(partial(_recompute, weights)) for layer in layers]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # training lowers it, and TF32 has only 3 digits
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
    same = error <= 1e-4 * largest or largest.isnan()  # of weights that are not finite
    assert same, f"recomputed attention is off by {error:.1g} of {largest:.1g}"
    weights.append(probabilities)


def rollout(weights: Sequence[Tensor]) -> Tensor:
    """Computes how much of each input token reaches each output token (Abnar and Zuidema 2020).

    With A_l the mean over the heads of layer l, R_l = (A_l / 2 + I / 2) R_(l-1) and R_0 = I: half
    of each token comes from the attention and half from the residual connection.

    Args:
        weights: weights of each layer, (B, Q, N, N).

    Returns:
        The rollout, (B, N, N). Its rows sum to one.
    """
    identity = torch.eye(weights[0].shape[-1], device=weights[0].device, dtype=weights[0].dtype)
    flow = identity
    for layer in weights:
        flow = (layer.mean(1) / 2 + identity / 2) @ flow
    return flow


def read(model: ViT, weights: Tensor) -> Tensor:
    """Returns the attention to each patch from the tokens that the head reads.

    This is the row of the CLS token or, if the head reads the mean of the patches, the mean of
    their rows.

    Args:
        weights: attention or rollout, (..., N, N).

    Returns:
        Weights (..., patches); the rest of the attention is to the CLS token and the registers.
    """
    read_by = slice(0, 1) if model.config.pooling == "cls" else slice(model.num_prefix, None)
    return weights[..., read_by, model.num_prefix :].mean(-2)


@torch.inference_mode()
def position_similarity(
    model: ViT, layer: int, rows: int, columns: int, patch: tuple[int, int]
) -> Tensor:
    """Computes how well a key at each patch matches a query at `patch` by rotary position alone.

    This is the mean of cos(dx fx + dy fy) over the key heads and channel pairs of a layer, where
    dx fx + dy fy is the angle between the rotations of a pair at the two patches. It equals the
    score of a query and an identical key whose pairs all have the same length, divided by the score
    at the same position. It is 1 at `patch` and depends only on the offset.

    Args:
        layer: counted from 0; with axial frequencies, all layers are the same.
        patch: row and column, counted from 0.

    Returns:
        Similarity (rows, columns), from -1 to 1.
    """
    cosine, sine = model.rope(rows, columns, model.device)[layer]
    cosine, sine = cosine[:, model.num_prefix :], sine[:, model.num_prefix :]
    here = slice(patch[0] * columns + patch[1], patch[0] * columns + patch[1] + 1)
    between = cosine[:, here] * cosine + sine[:, here] * sine
    return between.mean((0, 2)).view(rows, columns)


class Curve(NamedTuple):
    """Probability of a class against the fraction of patches that are deleted or inserted."""

    fractions: Tensor
    """From 0 to 1. Shape (points,), float64, on the CPU."""
    probabilities: Tensor
    """Shape (points,), float64, on the CPU."""

    @property
    def area(self) -> float:
        """The area under the curve, from 0 to 1."""
        return float(torch.trapezoid(self.probabilities, self.fractions))


@torch.inference_mode()
def deletion(
    model: ViT,
    image: Tensor,
    target: int,
    order: Tensor,
    probabilities: Callable[[Tensor], Tensor],
) -> Curve:
    """Computes the probability of a class as patches are deleted, in order.

    Deleted patches are filled with the mean color of the image. A meaningful map puts the patches
    that the prediction depends on first, which makes the area under the curve small (Petsiuk et
    al. 2018).

    Args:
        image: normalized, (C, H, W).
        target: index of the class.
        order: order of the patches, (patches,), on the device of the image.
        probabilities: maps logits (B, classes) to probabilities.
    """
    _, H, W = image.shape
    P, N = model.config.patch_size, len(order)
    counts = torch.linspace(0, N, min(STEPS, N) + 1, dtype=torch.float64).round()
    rank = order.argsort().view(1, H // P, W // P)
    deleted = rank < counts.to(rank.device, rank.dtype).view(-1, 1, 1)
    deleted = deleted.repeat_interleave(P, 1).repeat_interleave(P, 2)[:, None]
    mean = image.mean((1, 2), keepdim=True)
    found = [
        probabilities(model(torch.where(part, mean, image)))[:, target]
        for part in deleted.split(BATCH)
    ]
    return Curve(counts / N, torch.cat(found).cpu().double())


@torch.inference_mode()
def insertion(
    model: ViT,
    image: Tensor,
    target: int,
    order: Tensor,
    probabilities: Callable[[Tensor], Tensor],
) -> Curve:
    """Computes the probability of a class as patches are inserted into a blank image, in order.

    The blank image has the mean color of the image. A meaningful map makes the area under the curve
    large. The curve is that of deletion in reverse order, read backwards, so both mean areas over
    random orders are the same.
    """
    fractions, found = deletion(model, image, target, order.flip(0), probabilities)
    return Curve(1 - fractions.flip(0), found.flip(0))
