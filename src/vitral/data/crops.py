"""Draws crop boxes and resamples crops.

Boxes are int64 arrays of shape (B, 4): top, left, height and width in pixels of the source. A box
may extend beyond its image, where pixels have the color `fill`. Boxes that are scaled to squashed
images are fractional, of type float64.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitral.config import AugmentConfig, DataConfig
from vitral.data.sampling import Integers, uniforms

Floats = NDArray[np.float64]
Fit = Literal["crop", "squash", "pad"]
Color = tuple[int, int, int]

NUM_TRIES = 10
BLACK = (0, 0, 0)


def eval_boxes(sizes: Integers, fraction: float, fit: Fit = "crop") -> Integers:
    """Returns the central squares whose side is `fraction` times the shorter side.

    If `fit` is "squash", returns the central boxes whose sides are `fraction` times the image's
    sides, to be squashed. If it is "pad", returns the smallest squares that contain the images.

    Args:
        sizes: height and width of each image, shape (B, 2).

    Returns:
        Boxes, shape (B, 4).
    """
    if fit == "squash":
        sides = np.maximum(np.rint(fraction * sizes), 1)
        return np.concatenate([np.rint((sizes - sides) / 2), sides], axis=1).astype(np.int64)
    if fit == "pad":
        side = sizes.max(axis=1, keepdims=True)
    else:
        side = np.maximum(np.rint(fraction * sizes.min(axis=1, keepdims=True)), 1)
    return np.concatenate([np.rint((sizes - side) / 2), side, side], axis=1).astype(np.int64)


def five_boxes(sizes: Integers, fraction: float, views: Integers) -> Integers:
    """Returns one of the boxes of torchvision's FiveCrop for each image.

    Args:
        sizes: height and width of each image, shape (B, 2).
        fraction: side of the squares as a fraction of the shorter side.
        views: 0 to 4 for top left, top right, bottom left, bottom right and center, shape (B,).

    Returns:
        Boxes, shape (B, 4).
    """
    boxes = eval_boxes(sizes, fraction)
    bottom_right = np.stack([views // 2, views % 2], axis=1) * (sizes - boxes[:, 2:])
    boxes[:, :2] = np.where(views[:, None] < 4, bottom_right, boxes[:, :2])
    return boxes


def random_boxes(
    config: AugmentConfig,
    fraction: float,
    image_size: int,
    sizes: Integers,
    seed: int,
    epochs: int | Integers,
    indices: Integers,
    fit: Fit = "crop",
) -> Integers:
    """Draws the crop of each sample, a pure function of (seed, epoch, index) and the image size.

    Args:
        fraction: side of the evaluation crop as a fraction of the shorter side.
        image_size: size of the model's input, in pixels.
        sizes: height and width of each image, shape (B, 2).
        epochs: epoch of all samples, or of each sample, shape (B,).
        indices: indices of the samples in the dataset, shape (B,).

    Returns:
        Boxes, shape (B, 4).
    """
    if config.crop == "none":
        return eval_boxes(sizes, fraction, fit)
    if config.crop == "resized":
        uniform = uniforms(seed, epochs, indices, 2 * NUM_TRIES + 2, purpose="crop")
        return _resized_boxes(config.crop_scale, config.crop_ratio, sizes, uniform, fit)
    boxes = eval_boxes(sizes, fraction, fit)
    uniform = uniforms(seed, epochs, indices, 2, purpose="crop")
    shift = np.floor(uniform * (2 * config.crop_padding + 1)) - config.crop_padding
    boxes[:, :2] += np.rint(shift * boxes[:, 2:] / image_size).astype(np.int64)
    return boxes


def rectangles(
    uniform: Floats, area: Floats | float, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Floats, Floats]:
    """Returns sides a and b of candidate rectangles for Inception-style crops and Random Erasing.

    Args:
        uniform: numbers in [0, 1), shape (B, 2 * NUM_TRIES).
        area: area of the image, in pixels, a number or shape (B, 1).
        scale: range of the rectangle's area as a fraction of `area`, sampled uniformly.
        ratio: range of a / b, sampled log-uniformly.

    Returns:
        Sides a and b as integers, both of shape (B, NUM_TRIES).
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    target = area * (scale[0] + (scale[1] - scale[0]) * uniform[:, :NUM_TRIES])
    aspect = np.exp(low + (high - low) * uniform[:, NUM_TRIES:])
    return np.rint(np.sqrt(target * aspect)), np.rint(np.sqrt(target / aspect))


def _resized_boxes(
    scale: tuple[float, float],
    ratio: tuple[float, float],
    sizes: Integers,
    uniform: Floats,
    fit: Fit,
) -> Integers:
    """Draws random resized crops (Szegedy et al. 2014), with torchvision's distribution.

    They are drawn from the image, or from the square that evaluation makes of it, so that objects
    and padding have the same proportions in both. The center of a crop is never in the padding.
    """
    canvas, origin = sizes, np.zeros_like(sizes)
    if fit != "crop":
        canvas = np.broadcast_to(sizes.max(axis=1, keepdims=True), sizes.shape)
    if fit == "pad":
        origin = eval_boxes(sizes, 1.0, fit)[:, :2]
    boxes = _boxes_on(canvas, origin, sizes if fit == "pad" else canvas, scale, ratio, uniform)
    if fit != "squash":
        return boxes
    starts = np.minimum(np.rint(boxes[:, :2] * sizes / canvas), sizes - 1)
    ends = np.rint((boxes[:, :2] + boxes[:, 2:]) * sizes / canvas)
    return np.hstack([starts, np.maximum(ends - starts, 1)]).astype(np.int64)


def _boxes_on(
    canvas: Integers,
    origin: Integers,
    sizes: Integers,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    uniform: Floats,
) -> Integers:
    """Draws random resized crops of canvases, whose centers are inside the images on them.

    Args:
        canvas: height and width of each canvas, shape (B, 2).
        origin: top and left of each canvas in pixels of its image, 0 or less, shape (B, 2).
        sizes: height and width of each image, shape (B, 2).

    Returns:
        Boxes in pixels of the images, shape (B, 4).
    """
    height, width = canvas[:, :1].astype(np.float64), canvas[:, 1:].astype(np.float64)
    w, h = rectangles(uniform[:, : 2 * NUM_TRIES], height * width, scale, ratio)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(axis=1, keepdims=True)
    lengths = np.hstack([np.take_along_axis(h, first, 1), np.take_along_axis(w, first, 1)])
    low = np.maximum(origin, np.ceil(-lengths / 2))
    high = np.minimum(origin + canvas - lengths, np.floor(sizes - lengths / 2))
    starts = low + np.floor(uniform[:, -2:] * (high - low + 1))

    most_h = np.minimum(height, np.rint(width / ratio[0]))
    most_w = np.minimum(width, np.rint(height * ratio[1]))
    most = np.hstack([most_h, most_w])
    found = fits.any(axis=1, keepdims=True)
    central = np.hstack([origin + (canvas - most) // 2, most])
    return np.where(found, np.hstack([starts, lengths]), central).astype(np.int64)


def eval_crop(image: Tensor, config: DataConfig, size: int) -> Tensor:
    """Returns the evaluation crop of one image: `crop_resize` with the box from `eval_boxes`."""
    box = eval_boxes(np.array([image.shape[1:]]), config.eval_crop, config.fit)[0]
    return crop_resize(image, box, size, config.interpolation, config.fill)


def five_crops(image: Tensor, config: DataConfig, size: int) -> Tensor:
    """Returns the crops of one image in the boxes of `five_boxes`, shape (5, 3, size, size)."""
    sizes = np.tile(image.shape[1:], (5, 1))
    boxes = five_boxes(sizes, config.eval_crop, np.arange(5))
    return torch.stack([crop_resize(image, box, size, config.interpolation) for box in boxes])


def crop_resize(
    image: Tensor, box: Integers, size: int, interpolation: str, fill: Color = BLACK
) -> Tensor:
    """Crops an image and resizes the crop with antialiasing, on the CPU.

    Args:
        image: uint8, shape (3, H, W), with any strides.
        box: top, left, height and width, shape (4,).
        size: side length of the result, in pixels.
        interpolation: "bilinear" or "bicubic".
        fill: color of the box outside the image, added before the box is resized.

    Returns:
        uint8, shape (3, size, size), contiguous.
    """
    top, left, height, width = (int(x) for x in box)
    bottom, right = top + height, left + width
    crop = image[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    if crop.shape[1:] != (height, width):
        y, x = max(-top, 0), max(-left, 0)
        padded = image.new_tensor(fill).repeat(height, width, 1).permute(2, 0, 1)
        padded[:, y : y + crop.shape[1], x : x + crop.shape[2]] = crop
        crop = padded
    if (height, width) != (size, size):
        # Channels last, the format of a decoded image, selects torch's fastest kernel.
        crop = F.interpolate(crop[None], (size, size), mode=interpolation, antialias=True)[0]
    return crop.contiguous()


def resample(
    images: Tensor,
    boxes: Integers | Floats,
    size: int,
    interpolation: str,
    fill: Color = BLACK,
) -> Tensor:
    """Crops and resizes a batch with antialiasing on any device, as two batched matmuls.

    Matches `crop_resize` within one gray level (two in a few pixels of a bicubic enlargement), and
    exactly if nothing is resized.

    Args:
        images: uint8, shape (B, 3, H, W).
        boxes: on the host, in whole or fractional pixels, shape (B, 4).
        size: side length of the result, in pixels.
        interpolation: "bilinear" or "bicubic".
        fill: color of the boxes outside the images.

    Returns:
        uint8, shape (B, 3, size, size).
    """
    B, C, H, W = images.shape
    starts_lengths = torch.from_numpy(boxes).to(images.device, torch.float32, non_blocking=True)
    top, left, height, width = starts_lengths.unbind(1)
    margin_y = _margin(boxes[:, 0], boxes[:, 2], H)
    margin_x = _margin(boxes[:, 1], boxes[:, 3], W)
    along_y = _filter_weights(top, height, H, margin_y, size, interpolation)
    along_x = _filter_weights(left, width, W, margin_x, size, interpolation)

    # Relative to the fill, so that pixels outside the images are 0.
    color = torch.tensor(fill, dtype=torch.float32, device=images.device).view(C, 1, 1)
    rows = images.float().sub_(color).reshape(B, C * H, W) @ along_x.transpose(1, 2)
    # Rounded and clipped between the two passes, as F.interpolate does with uint8.
    rows = rows.round_().view(B, C, H, size).clamp_(-color, 255 - color)
    rows = rows.transpose(1, 2)  # (B, H, C, size)
    pixels = along_y @ rows.reshape(B, H, C * size)
    pixels = pixels.view(B, size, C, size).transpose(1, 2).add(color)
    return pixels.round().clamp_(0, 255).to(torch.uint8, memory_format=torch.contiguous_format)


def _margin(starts: Integers | Floats, lengths: Integers | Floats, source: int) -> int:
    """Returns the most pixels by which a box extends beyond an axis of `source` pixels."""
    return math.ceil(max(0, -starts.min(), (starts + lengths).max() - source))


def _filter_weights(
    start: Tensor, length: Tensor, source: int, margin: int, size: int, interpolation: str
) -> Tensor:
    """Computes antialiasing weights along an axis, from `length` pixels at `start` to `size`.

    The filter is widened by the downscaling factor and normalized over the pixels of the box. These
    include pixels outside the image, whose weights are not returned. A pixel on an edge of the box
    belongs to the box if its center does. Each pixel is thus either in or out, as in a crop of
    whole pixels, and no pixel that is mostly outside contributes. A box counts as at least one
    pixel long, so that it always contains a center.

    Args:
        start, length: in source pixels, both of shape (B,).
        source: pixels of the image along the axis.
        margin: number of pixels that a box may extend beyond the image.

    Returns:
        Shape (B, size, source).
    """
    scale = (length / size)[:, None, None]
    pixel = torch.arange(-margin, source + margin, device=start.device) - start[:, None, None]
    center = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    distance = ((pixel + 0.5 - center) / scale.clamp(min=1)).abs()  # (B, size, source + 2 margin)
    if interpolation == "bilinear":
        weights = (1 - distance).clamp(min=0)
    else:  # Keys 1981 with a = -0.5
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
    half = length[:, None, None] / 2
    # The last term keeps a box's only center inside despite float32 rounding.
    weights = weights * ((pixel + 0.5 - half).abs() <= half.clamp(min=0.5) + 1e-4)
    # Summed in float64, because the order of the sum depends on the margin and so on the batch.
    weights = weights / weights.sum(2, keepdim=True, dtype=torch.float64).float()
    return weights[:, :, margin : margin + source]
