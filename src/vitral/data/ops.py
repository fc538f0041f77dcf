"""Operations of AutoAugment, color jitter and similar policies, on batches with a value per image.

Each operation equals torchvision's functional for a single uint8 image. Operations that map gray
levels to gray levels become one table of 256 entries per image and channel. Operations that move
pixels become one matrix per image. Any mixture of operations thus takes one lookup and one gather.
The host stores the operation of each image, so this module never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitral.data.crops import Floats

Ops = NDArray[np.int8]


class Op(IntEnum):
    """An operation; the comments describe its value. The first 14 are RandAugment's."""

    IDENTITY = 0
    SHEAR_X = 1  # tangent of the angle
    SHEAR_Y = 2
    TRANSLATE_X = 3  # whole pixels
    TRANSLATE_Y = 4
    ROTATE = 5  # degrees, counterclockwise
    BRIGHTNESS = 6  # factor
    SATURATION = 7  # factor
    CONTRAST = 8  # factor
    SHARPNESS = 9  # factor
    POSTERIZE = 10  # bits to keep
    SOLARIZE = 11  # lowest gray level to invert
    AUTOCONTRAST = 12
    EQUALIZE = 13
    INVERT = 14
    HUE = 15  # fraction of the color circle
    GRAYSCALE = 16
    BLUR = 17  # standard deviation in pixels


def apply_slot(images: Tensor, ops: Ops, values: Floats) -> None:
    """Applies one operation to each image of a batch, in place.

    Args:
        images: uint8, shape (B, 3, S, S).
        ops: of type `Op`, on the host, shape (B,).
        values: values of the operations, shape (B,).
    """
    kinds = _KIND[ops]
    for kind, function in enumerate(_FUNCTIONS, start=1):
        rows = np.flatnonzero(kinds == kind)
        apply_to_rows(images, rows, partial(function, ops=ops[rows], values=values[rows]))


def apply_to_rows(tensor: Tensor, rows: NDArray, function: Callable[[Tensor], Tensor]) -> None:
    """Replaces the given rows of a tensor with `function` applied to them."""
    if len(rows) == len(tensor):
        tensor.copy_(function(tensor))
    elif rows.size:
        index = to_device(rows, tensor.device)
        tensor.index_copy_(0, index, function(tensor.index_select(0, index)))


def to_device(array: NDArray, device: torch.device) -> Tensor:
    """Returns a small array as a tensor; the copy does not wait for pending work on the device."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def _column(values: Floats, device: torch.device) -> Tensor:
    """Returns values as float32 of shape (B, 1, 1, 1)."""
    return to_device(values.astype(np.float32), device).view(-1, 1, 1, 1)


def _to_uint8(x: Tensor) -> Tensor:
    return x.clamp_(0, 255).to(torch.uint8)


# ---- Geometry: one matrix per image.


def warp(images: Tensor, matrices: Floats, mode: str) -> Tensor:
    """Samples every image on its own affine grid; pixels outside an image are black.

    Args:
        images: uint8, shape (B, 3, S, S).
        matrices: from positions in the result to positions in the source, both in pixels from the
            image's center, shape (B, 2, 3).
        mode: "nearest" or "bilinear".
    """
    S = images.shape[-1]
    # Elementwise, because a matmul may run in TF32 on a GPU. Rounds where torchvision's
    # matmul rounds, so that positions halfway between pixels go to the same side.
    theta = to_device(matrices.astype(np.float32), images.device)[..., None, None] / (0.5 * S)
    x = torch.arange(S, device=images.device) - 0.5 * (S - 1)
    grid = torch.addcmul(theta[:, :, 0] * x, theta[:, :, 1], x[:, None]) + theta[:, :, 2]
    grid = grid.permute(0, 2, 3, 1)  # (B, S, S, 2)
    return F.grid_sample(images.float(), grid, mode, align_corners=False).round_().to(torch.uint8)


def affine_matrices(parameters: Floats) -> Floats:
    """Returns inverse matrices of random affine transforms, composed as in torchvision.

    Args:
        parameters: angle in degrees, scale, shear along x in degrees, and shift in x and y in
            pixels, shape (B, 5).

    Returns:
        Shape (B, 2, 3), for `warp`.
    """
    angle, scale, shear, dx, dy = parameters.T
    cos, sin, tan = np.cos(np.radians(angle)), np.sin(np.radians(angle)), np.tan(np.radians(shear))
    x = np.stack([cos - sin * tan, cos * tan + sin], axis=1) / scale[:, None]
    y = np.stack([-sin, cos], axis=1) / scale[:, None]
    linear = np.stack([x, y], axis=1)  # (B, 2, 2)
    shift = -linear @ np.stack([dx, dy], axis=1)[:, :, None]
    return np.concatenate([linear, shift], axis=2)


def _geometric(images: Tensor, ops: Ops, values: Floats) -> Tensor:
    matrices = np.tile(np.eye(2, 3), (len(ops), 1, 1))
    # A shear starts at the top left corner, a rotation at the center.
    corner = images.shape[-1] / 2
    for op, axis in ((Op.SHEAR_X, 0), (Op.SHEAR_Y, 1)):
        rows = ops == op
        matrices[rows, axis, 1 - axis] = values[rows]
        matrices[rows, axis, 2] = values[rows] * corner
    for op, axis in ((Op.TRANSLATE_X, 0), (Op.TRANSLATE_Y, 1)):
        rows = ops == op
        matrices[rows, axis, 2] = -values[rows]
    rows = ops == Op.ROTATE
    rotations = np.zeros((rows.sum(), 5))
    rotations[:, 0], rotations[:, 1] = -values[rows], 1
    matrices[rows] = affine_matrices(rotations)
    return warp(images, matrices, "nearest")


# ---- Gray levels: one table per image and channel. Each function takes images (B, 3, S, S), gray
# ---- levels 0 to 255 as float32 and values (B, 1, 1); its result can expand to (B, 3, 256).


def _gray(images: Tensor) -> Tensor:
    """Returns the unrounded luma with the weights of ITU-R 601-2, shape (B, S, S)."""
    r, g, b = images.unbind(1)
    return r.mul(0.2989).add_(g, alpha=0.587).add_(b, alpha=0.114)


def _posterize(images: Tensor, levels: Tensor, values: Tensor) -> Tensor:
    dropped = (8 - values).int()
    return levels.int().bitwise_right_shift(dropped).bitwise_left_shift(dropped).float()


def _contrast(images: Tensor, levels: Tensor, values: Tensor) -> Tensor:
    # In float64, the sum of integers is exact in any order.
    mean = _gray(images).floor_().mean((1, 2), dtype=torch.float64).float()
    return levels * values + mean[:, None, None] * (1 - values)


def _autocontrast(images: Tensor, levels: Tensor, values: Tensor) -> Tensor:
    low, high = (x.float()[..., None] for x in images.flatten(2).aminmax(dim=2))
    scaled = (levels - low) / ((high - low) * (1 / 255))
    return torch.where(low == high, levels, scaled)


def _equalize(images: Tensor, levels: Tensor, values: Tensor) -> Tensor:
    pixels = images.flatten(2).long()
    histogram = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int32, device=images.device)
    one = torch.ones(1, dtype=torch.int32, device=images.device)
    histogram.scatter_add_(2, pixels, one.expand_as(pixels))
    below = histogram.cumsum(2, dtype=torch.int32) - histogram
    # Pillow's step: the number of pixels below the brightest level in the image, divided by 255.
    brightest = images.flatten(2).amax(2, keepdim=True).long()
    step = below.gather(2, brightest) // 255
    equalized = (below + step // 2) // step.clamp(min=1)
    return torch.where(step == 0, levels, equalized.float())


_TABLES: dict[Op, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    Op.BRIGHTNESS: lambda images, levels, values: levels * values,
    Op.CONTRAST: _contrast,
    Op.POSTERIZE: _posterize,
    Op.SOLARIZE: lambda images, levels, values: torch.where(levels < values, levels, 255 - levels),
    Op.AUTOCONTRAST: _autocontrast,
    Op.EQUALIZE: _equalize,
    Op.INVERT: lambda images, levels, values: 255 - levels,
}


def _pointwise(images: Tensor, ops: Ops, values: Floats) -> Tensor:
    B, C, S, _ = images.shape
    levels = torch.arange(256, device=images.device, dtype=torch.float32)
    tables = torch.empty(B, C, 256, dtype=torch.uint8, device=images.device)
    for op in np.unique(ops):
        rows = np.flatnonzero(ops == op)
        index = to_device(rows, images.device)
        strength = to_device(values[rows].astype(np.float32), images.device)[:, None, None]
        chosen = images if len(rows) == B else images.index_select(0, index)
        table = _to_uint8(_TABLES[Op(op)](chosen, levels, strength))
        tables.index_copy_(0, index, table.expand(len(rows), C, 256))
    return tables.gather(2, images.flatten(2).long()).view(B, C, S, S)


# ---- Operations on several channels or pixels.


def _saturation(images: Tensor, ops: Ops, values: Floats) -> Tensor:
    factor, rest = (_column(x, images.device) for x in (values, 1 - values))
    return _to_uint8((images * factor).addcmul_(_gray(images).floor_()[:, None], rest))


def _grayscale(images: Tensor, ops: Ops, values: Floats) -> Tensor:
    return _gray(images).to(torch.uint8)[:, None].expand_as(images).contiguous()


def _sharpness(images: Tensor, ops: Ops, values: Floats) -> Tensor:
    if images.shape[-1] <= 2:
        return images
    sharp = images.float()
    inner = sharp[:, :, 1:-1, 1:-1]
    # Sums of shifted images are exact and, on a CPU, ten times as fast as a convolution.
    rows = sharp[:, :, :-2] + sharp[:, :, 1:-1] + sharp[:, :, 2:]
    smooth = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner
    smooth = smooth.div_(13).round_()
    inner.addcmul_(smooth.sub_(inner), _column(1 - values, images.device))
    return _to_uint8(sharp)


def _hue(images: Tensor, ops: Ops, values: Floats) -> Tensor:
    turn = _column(values, images.device)
    rgb = images.float().mul_(1 / 255)
    r, g, b = rgb.unbind(1)
    low, value = rgb.aminmax(dim=1)
    chroma = value - low
    divisor = chroma + (chroma == 0)
    sector = torch.where(
        value == r,
        (g - b) / divisor,
        torch.where(value == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor),
    )
    hue = sector[:, None] / 6 + turn  # (B, 1, S, S)
    sixth = 6 * hue.sub_(hue.floor())
    # Difference of each channel from the brightest one, as a fraction of the chroma: positive for
    # red from 1 to 5, for green more than 1 from 2, and for blue more than 1 from 4.
    drop = torch.cat(
        [2 - (sixth - 3).abs_(), (sixth - 2).abs_() - 1, (sixth - 4).abs_() - 1], dim=1
    ).clamp_(0, 1)
    # Converted to uint8 as in torchvision: multiplied by slightly less than 256 and truncated.
    return _to_uint8((value[:, None] - chroma[:, None] * drop).mul_(255.999))


def _blur(images: Tensor, ops: Ops, values: Floats) -> Tensor:
    B, C, S, _ = images.shape
    radius = min(6, S - 1)  # three standard deviations of the strongest blur
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / values[:, None]) ** 2)
    kernel = (kernel / kernel.sum(axis=1, keepdims=True)).astype(np.float32).repeat(C, axis=0)
    weights = to_device(kernel, images.device)[:, None, :]  # (B * C, 1, taps)
    x = F.pad(images.float(), (radius,) * 4, mode="reflect").view(1, B * C, S + 2 * radius, -1)
    x = F.conv2d(x, weights[:, :, None, :], groups=B * C)
    x = F.conv2d(x, weights[:, :, :, None], groups=B * C)
    return _to_uint8(x.round_()).view(B, C, S, S)


_FUNCTIONS = (_geometric, _pointwise, _saturation, _sharpness, _hue, _grayscale, _blur)
_KIND = np.zeros(len(Op), np.int8)  # 0 is the identity
_KIND[Op.SHEAR_X : Op.ROTATE + 1] = 1
_KIND[list(_TABLES)] = 2
_KIND[[Op.SATURATION, Op.SHARPNESS, Op.HUE, Op.GRAYSCALE, Op.BLUR]] = range(3, 8)
