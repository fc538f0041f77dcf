"""Augmentation after cropping. Parameters are drawn on the host and applied on the images' device.

An `AugmentPlan` contains all random parameters of a batch, each row a pure function of (seed,
epoch, index). The policies and their ranges are torchvision's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitral.config import AugmentConfig
from vitral.data.crops import NUM_TRIES, Floats, rectangles
from vitral.data.ops import Op, Ops, affine_matrices, apply_slot, apply_to_rows, to_device, warp
from vitral.data.sampling import Integers, derive_seed, uniforms

# Sub-policies of two operations, each with its probability and its level from 0 to 9.
_IMAGENET = """
posterize .4 8 rotate .6 9 | solarize .6 5 autocontrast .6 0 | equalize .8 0 equalize .6 0
posterize .6 7 posterize .6 6 | equalize .4 0 solarize .2 4 | equalize .4 0 rotate .8 8
solarize .6 3 equalize .6 0 | posterize .8 5 equalize 1 0 | rotate .2 3 solarize .6 8
equalize .6 0 posterize .4 6 | rotate .8 8 saturation .4 0 | rotate .4 9 equalize .6 0
equalize 0 0 equalize .8 0 | invert .6 0 equalize 1 0 | saturation .6 4 contrast 1 8
rotate .8 8 saturation 1 2 | saturation .8 8 solarize .8 7 | sharpness .4 7 invert .6 0
shear_x .6 5 equalize 1 0 | saturation .4 0 equalize .6 0 | equalize .4 0 solarize .2 4
solarize .6 5 autocontrast .6 0 | invert .6 0 equalize 1 0 | saturation .6 4 contrast 1 8
equalize .8 0 equalize .6 0
"""
_CIFAR10 = """
invert .1 0 contrast .2 6 | rotate .7 2 translate_x .3 9 | sharpness .8 1 sharpness .9 3
shear_y .5 8 translate_y .7 9 | autocontrast .5 0 equalize .9 0 | shear_y .2 7 posterize .3 7
saturation .4 3 brightness .6 7 | sharpness .3 9 brightness .7 9 | equalize .6 0 equalize .5 0
contrast .6 7 sharpness .6 5 | saturation .7 7 translate_x .5 8 | equalize .3 0 autocontrast .4 0
translate_y .4 3 sharpness .2 6 | brightness .9 6 saturation .2 8 | solarize .5 2 invert 0 0
equalize .2 0 autocontrast .6 0 | equalize .2 0 equalize .6 0 | saturation .9 9 equalize .6 0
autocontrast .8 0 solarize .2 8 | brightness .1 3 saturation .7 0 | solarize .4 5 autocontrast .9 0
translate_y .9 9 translate_y .7 9 | autocontrast .9 0 solarize .8 3 | equalize .8 0 invert .1 0
translate_y .7 9 autocontrast .9 0
"""


def _parse(policy: str) -> Floats:
    """Returns operation, probability and level of each slot, shape (25, 2, 3)."""
    words = policy.replace("|", " ").split()
    names = [float(Op[name.upper()]) for name in words[::3]]
    numbers = [[float(p), float(level)] for p, level in zip(words[1::3], words[2::3], strict=True)]
    return np.column_stack([names, numbers]).reshape(-1, 2, 3)


_AUTOAUGMENT = {
    "autoaugment-imagenet": _parse(_IMAGENET),
    "autoaugment-cifar10": _parse(_CIFAR10),
}
CPU_CHUNK = 1 << 20  # elements processed together on a CPU, so that they stay in cache
# Elements per image above which processing one image at a time is faster: it needs no gather.
CPU_LARGE = 1 << 16
_RANDAUGMENT_OPS = 14
_BINS = 31
_SIGNED = np.isin(np.arange(len(Op)), np.arange(Op.SHEAR_X, Op.SHARPNESS + 1))
_FACTOR = np.isin(np.arange(len(Op)), np.arange(Op.BRIGHTNESS, Op.SHARPNESS + 1))
_INTEGER_VALUED = np.isin(np.arange(len(Op)), [Op.TRANSLATE_X, Op.TRANSLATE_Y])


@dataclass(frozen=True)
class AugmentPlan:
    """Augmentation parameters of a batch of B samples, on the host."""

    flip: NDArray[np.bool_]
    """Whether to flip left to right, shape (B,)."""
    affine: Floats | None
    """Angle in degrees, scale, x shear in degrees, x and y shift in pixels, shape (B, 5)."""
    ops: Ops
    """Operations (`Op`) of the policy and of color jitter, slot by slot, shape (B, slots)."""
    values: Floats
    """Values of the operations, shape (B, slots)."""
    erase: Integers
    """Top, left, height and width of the erased box, zeros if there is none, shape (B, 4)."""

    def rows(self, chunk: slice) -> AugmentPlan:
        """Returns the plan of a part of the batch."""
        affine = None if self.affine is None else self.affine[chunk]
        ops, values = self.ops[chunk], self.values[chunk]
        return AugmentPlan(self.flip[chunk], affine, ops, values, self.erase[chunk])


def draw_plan(
    config: AugmentConfig, image_size: int, seed: int, epochs: int | Integers, indices: Integers
) -> AugmentPlan:
    """Draws the plan of a batch, each row a pure function of (seed, epoch, index).

    Args:
        image_size: size of the images, in pixels.
        epochs: epoch of all samples, or of each sample, shape (B,).
        indices: indices of the samples in the dataset, shape (B,).
    """

    def draw(count: int, purpose: str) -> Floats:
        return uniforms(seed, epochs, indices, count, purpose)

    affine = None
    limits = np.array([config.rotation, config.zoom, config.shear, config.shift, config.shift])
    if limits.any():
        affine = (2 * draw(5, "affine") - 1) * limits + [0, 1, 0, 0, 0]
    slots = [
        _draw_policy(config, image_size, draw(3 * max(config.randaugment_ops, 2), "policy")),
        _draw_jitter(config, draw(8, "jitter")),
    ]
    return AugmentPlan(
        flip=draw(1, "flip")[:, 0] < config.flip,
        affine=affine,
        ops=np.hstack([ops for ops, _ in slots]).astype(np.int8),
        values=np.hstack([values for _, values in slots]),
        erase=_draw_erase(config.erasing, image_size, draw(2 * NUM_TRIES + 3, "erase")),
    )


def magnitudes(num_bins: int, image_size: int, *, wide: bool = False) -> Floats:
    """Returns the unsigned magnitudes of each operation, in ascending order.

    Args:
        num_bins: number of levels.
        image_size: image size in pixels; translations are proportional to it unless `wide`.
        wide: whether to use TrivialAugment's ranges instead of those of AutoAugment and
            RandAugment.

    Returns:
        Shape (number of operations, num_bins).
    """
    shear, rotate, factor, bits = (0.99, 135.0, 0.99, 6) if wide else (0.3, 30.0, 0.9, 4)
    translate = 32.0 if wide else 150.0 / 331.0 * image_size
    table = np.zeros((len(Op), num_bins))

    def rise(stop: float) -> Floats:
        # Uses torch.linspace in float32, so that thresholds round to the same gray levels as
        # torchvision's.
        return torch.linspace(0.0, stop, num_bins).double().numpy()

    table[[Op.SHEAR_X, Op.SHEAR_Y]] = rise(shear)
    table[[Op.TRANSLATE_X, Op.TRANSLATE_Y]] = rise(translate)
    table[Op.ROTATE] = rise(rotate)
    table[Op.BRIGHTNESS : Op.SHARPNESS + 1] = rise(factor)
    table[Op.POSTERIZE] = 8 - np.rint(np.arange(num_bins) / ((num_bins - 1) / bits))
    table[Op.SOLARIZE] = torch.linspace(255.0, 0.0, num_bins).double().numpy()
    return table


def _draw_policy(config: AugmentConfig, image_size: int, uniform: Floats) -> tuple[Ops, Floats]:
    """Draws operations and values, both of shape (B, slots), from at least 6 numbers per sample."""
    B = len(uniform)
    if config.policy == "none":
        return np.zeros((B, 0), np.int8), np.zeros((B, 0))
    if config.policy == "3-augment":
        return _draw_three_augment(uniform)
    if config.policy in _AUTOAUGMENT:  # Cubuk et al. 2018
        policy = _AUTOAUGMENT[config.policy]
        chosen = policy[(uniform[:, 0] * len(policy)).astype(int)]  # (B, 2, 3)
        ops = np.where(uniform[:, 1:3] < chosen[:, :, 1], chosen[:, :, 0], Op.IDENTITY).astype(int)
        strength = magnitudes(10, image_size)[ops, chosen[:, :, 2].astype(int)]
        negative = uniform[:, 3:5] < 0.5
    elif config.policy == "randaugment":  # Cubuk et al. 2019
        by_slot = uniform.reshape(B, -1, 3)[:, : config.randaugment_ops]
        ops = (by_slot[:, :, 0] * _RANDAUGMENT_OPS).astype(int)
        strength = magnitudes(_BINS, image_size)[ops, config.randaugment_magnitude]
        negative = by_slot[:, :, 1] < 0.5
    else:  # TrivialAugment, Müller and Hutter 2021
        ops = (uniform[:, :1] * _RANDAUGMENT_OPS).astype(int)
        level = (uniform[:, 1:2] * _BINS).astype(int)
        strength = magnitudes(_BINS, image_size, wide=True)[ops, level]
        negative = uniform[:, 2:3] < 0.5
    values = np.where(negative & _SIGNED[ops], -strength, strength) + _FACTOR[ops]
    return ops.astype(np.int8), np.where(_INTEGER_VALUED[ops], np.trunc(values), values)


def _draw_three_augment(uniform: Floats) -> tuple[Ops, Floats]:
    """Draws one of three operations with equal probability (Touvron et al. 2022, "DeiT III")."""
    choice = (uniform[:, :1] * 3).astype(int)
    ops = np.array([Op.GRAYSCALE, Op.SOLARIZE, Op.BLUR], np.int8)[choice]
    sigma = 0.1 + 1.9 * uniform[:, 1:2]
    return ops, np.choose(choice, [np.zeros_like(sigma), np.full_like(sigma, 128), sigma])


def _draw_jitter(config: AugmentConfig, uniform: Floats) -> tuple[Ops, Floats]:
    """Draws the enabled operations and their values in random order, both (B, number enabled)."""
    ops = np.array([Op.BRIGHTNESS, Op.CONTRAST, Op.SATURATION, Op.HUE], np.int8)
    limits = np.array([config.brightness, config.contrast, config.saturation, config.hue])
    low = np.append(np.maximum(1 - limits[:3], 0), -limits[3])
    high = np.append(1 + limits[:3], limits[3])
    values = low + (high - low) * uniform[:, :4]
    order = np.argsort(uniform[:, 4:8][:, limits > 0], axis=1)
    return ops[limits > 0][order], np.take_along_axis(values[:, limits > 0], order, axis=1)


def _draw_erase(chance: float, image_size: int, uniform: Floats) -> Integers:
    """Draws the boxes of Random Erasing (Zhong et al. 2017), shape (B, 4)."""
    ratio, scale = (0.3, 3.3), (0.02, 0.33)
    h, w = rectangles(uniform[:, : 2 * NUM_TRIES], image_size**2, scale, ratio)
    fits = (h < image_size) & (w < image_size)
    first = fits.argmax(axis=1, keepdims=True)
    size = np.hstack([np.take_along_axis(h, first, 1), np.take_along_axis(w, first, 1)])
    corner = np.floor(uniform[:, -3:-1] * (image_size - size + 1))
    erased = (uniform[:, -1:] < chance) & fits.any(axis=1, keepdims=True)
    return np.where(erased, np.hstack([corner, size]), 0).astype(np.int64)


def augment(images: Tensor, plan: AugmentPlan) -> Tensor:
    """Applies flips, affine transforms, the slots of the policy, and color jitter, in this order.

    Args:
        images: uint8, shape (B, 3, S, S), on any device; not modified.

    Returns:
        uint8, shape (B, 3, S, S).
    """
    images = images.clone(memory_format=torch.contiguous_format)
    for chunk in _chunks(images):
        _augment(images[chunk], plan.rows(chunk))
    return images


def _augment(images: Tensor, plan: AugmentPlan) -> None:
    apply_to_rows(images, np.flatnonzero(plan.flip), lambda x: x.flip(3))
    if plan.affine is not None:
        images.copy_(warp(images, affine_matrices(plan.affine), "bilinear"))
    for slot in range(plan.ops.shape[1]):
        apply_slot(images, plan.ops[:, slot], plan.values[:, slot])


def finish(
    images: Tensor, plan: AugmentPlan | None, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Scales to [0, 1], normalizes, and fills the boxes to be erased with zeros.

    Args:
        images: uint8, shape (B, 3, S, S).
        mean, std: mean and standard deviation of the three channels, on a scale of 0 to 1.

    Returns:
        float32, shape (B, 3, S, S).
    """
    levels = np.array([mean, std], np.float32).reshape(2, 1, 3, 1, 1)
    center, deviation = to_device(levels, images.device)
    result = torch.empty(images.shape, device=images.device)
    for chunk in _chunks(images):
        pixels = result[chunk].copy_(images[chunk]).mul_(1 / 255).sub_(center).div_(deviation)
        if plan is not None:
            box = plan.erase[chunk]
            rows = np.flatnonzero(box[:, 2])
            apply_to_rows(pixels, rows, partial(_erase, box=box[rows]))
    return result


def _erase(pixels: Tensor, box: Integers) -> Tensor:
    start, size = to_device(box[:, :, None], pixels.device).split(2, 1)
    along = torch.arange(pixels.shape[-1], device=pixels.device)
    inside = (along >= start) & (along < start + size)  # (B, 2, S)
    return pixels.masked_fill_((inside[:, 0, :, None] & inside[:, 1, None, :])[:, None], 0)


def _chunks(images: Tensor) -> Iterator[slice]:
    """Yields one slice on a GPU, and small slices on a CPU, which is up to twice as fast."""
    size = len(images)
    if images.device.type == "cpu":
        values = images[0].numel()
        size = 1 if values > CPU_LARGE else CPU_CHUNK // values
    for first in range(0, len(images), size):
        yield slice(first, first + size)


@dataclass(frozen=True)
class Mix:
    """How to mix the images of a batch with their partners."""

    fraction: float
    """Fraction of an image that is kept, and weight of its target; the partner has the rest."""
    box: tuple[int, int, int, int] | None
    """For CutMix, top, left, bottom and right of the region from the partner. For Mixup, None."""


def draw_mix(config: AugmentConfig, image_size: int, seed: int, step: int) -> Mix | None:
    """Draws Mixup (Zhang et al. 2017) or CutMix (Yun et al. 2019) for global batch `step`.

    A pure function of (seed, step). Returns None if both are disabled.
    """
    if not config.mixes:
        return None
    generator = np.random.default_rng(derive_seed("mix", seed, step))
    cut = generator.random() < (0.5 if config.mixup and config.cutmix else float(config.cutmix > 0))
    alpha = config.cutmix if cut else config.mixup
    fraction = float(generator.beta(alpha, alpha))
    if not cut:
        return Mix(fraction, None)
    center = generator.integers(image_size, size=2)
    half = int(0.5 * np.sqrt(1 - fraction) * image_size)
    top, left = (int(x) for x in np.maximum(center - half, 0))
    bottom, right = (int(x) for x in np.minimum(center + half, image_size))
    return Mix(1 - (bottom - top) * (right - left) / image_size**2, (top, left, bottom, right))


def mix(images: Tensor, targets: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """Mixes image i of a batch, or of an even slice of one, with image i xor 1.

    Args:
        images: float, shape (B, 3, S, S).
        targets: probabilities of the classes, shape (B, num_classes).

    Returns:
        Mixed images and targets, of the same shapes.
    """
    if mix.box is None:
        mixed = _blend(images, mix.fraction)
    else:
        top, left, bottom, right = mix.box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = _partners(images[:, :, top:bottom, left:right])
    return mixed, _blend(targets, mix.fraction)


def _blend(x: Tensor, fraction: float) -> Tensor:
    return x * fraction + _partners(x) * (1 - fraction)


def _partners(x: Tensor) -> Tensor:
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
