"""Tests crop boxes against torchvision's distribution and resampling against F.interpolate."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.transforms import CenterCrop, RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from vitral.config import AugmentConfig, DataConfig
from vitral.data.crops import crop_resize, eval_boxes, eval_crop, five_boxes, random_boxes, resample

SIZES = np.array([[300, 400], [401, 333], [33, 47], [64, 64], [500, 40]])


def picture(*shape, seed=0):
    """Smooth random colors with some noise, uint8, shape (..., 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    *batch, height, width = shape
    coarse = torch.rand(int(np.prod(batch)), 3, 6, 6, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    noise = 0.05 * torch.randn(smooth.shape, generator=generator)
    return ((smooth + noise).clamp(0, 1) * 255).to(torch.uint8).view(*batch, 3, height, width)


def draw(config, sizes, count, seed=3, epochs=1, indices=None):
    indices = np.arange(count) if indices is None else indices
    sizes = np.broadcast_to(sizes, (len(indices), 2))
    return random_boxes(config, 0.875, 224, sizes, seed, epochs, indices)


@pytest.mark.parametrize("fraction", [1.0, 0.875])
def test_eval_box_is_the_central_square(fraction):
    sizes = np.concatenate([SIZES, [[34, 31], [31, 34], [40, 33]]])  # halves are rounded to even
    for (height, width), box in zip(sizes, eval_boxes(sizes, fraction), strict=True):
        side = round(fraction * min(height, width))
        image = torch.arange(height * width).view(1, height, width)
        top, left, h, w = box
        assert (h, w) == (side, side)
        assert torch.equal(image[:, top : top + h, left : left + w], CenterCrop(side)(image))


def test_no_crop_is_the_eval_box():
    boxes = random_boxes(AugmentConfig(crop="none"), 0.9, 8, SIZES, 0, 0, np.arange(5))
    assert (boxes == eval_boxes(SIZES, 0.9)).all()


def test_padded_crop_shifts_are_uniform_up_to_the_padding():
    config = AugmentConfig(crop="padded", crop_padding=4)
    boxes = random_boxes(config, 1.0, 32, np.full((9000, 2), 32), 0, 0, np.arange(9000))
    assert (boxes[:, 2:] == 32).all()
    for axis in (0, 1):
        shifts, counts = np.unique(boxes[:, axis], return_counts=True)
        assert shifts.tolist() == list(range(-4, 5))
        assert abs(counts - 1000).max() < 150  # five standard deviations
    larger = random_boxes(config, 1.0, 32, np.full((9000, 2), 96), 0, 0, np.arange(9000))
    assert (larger[:, :2] == 3 * boxes[:, :2]).all()


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        ((300, 400), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((300, 400), (0.9, 1.0), (3 / 4, 4 / 3)),  # ten tries often fail
        ((500, 40), (0.5, 1.0), (3 / 4, 4 / 3)),  # always falls back, too tall
        ((40, 500), (0.5, 1.0), (3 / 4, 4 / 3)),  # too wide
        ((8, 8), (0.2, 0.5), (1.0, 1.5)),
    ],
)
def test_resized_crop_follows_torchvision(size, scale, ratio):
    torch.manual_seed(0)
    count = 3000
    image = torch.empty(3, *size)
    expected = np.array(
        [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)]
    )
    ours = draw(AugmentConfig(crop_scale=scale, crop_ratio=ratio), size, count)
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= size).all()
    assert len(np.unique(ours, axis=0)) > 1 or len(np.unique(expected, axis=0)) == 1
    features = {
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 3] / b[:, 2],
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
    }
    for name, feature in features.items():
        a, b = np.sort(feature(ours)), np.sort(feature(expected))
        at = np.union1d(a, b)
        distance = abs(np.searchsorted(a, at, "right") - np.searchsorted(b, at, "right")).max()
        # Two-sample Kolmogorov-Smirnov at a level of one in ten thousand.
        assert distance / count < 2.23 * np.sqrt(2 / count), name


def test_boxes_do_not_depend_on_the_batch():
    for config in (AugmentConfig(), AugmentConfig(crop="padded")):
        full = random_boxes(config, 0.9, 32, np.tile(SIZES, (4, 1)), 1, 2, np.arange(20))
        for chosen in ([7], [19, 3, 7, 0]):
            sizes, epochs = SIZES[np.array(chosen) % 5], np.full(len(chosen), 2)
            part = random_boxes(config, 0.9, 32, sizes, 1, epochs, np.array(chosen))
            assert (part == full[chosen]).all()
        other = random_boxes(config, 0.9, 32, np.tile(SIZES, (4, 1)), 1, 3, np.arange(20))
        assert (other != full).any(axis=1).mean() > 0.7  # the tall image always falls back


INSIDE = np.array([[0, 0, 90, 70], [13, 5, 60, 31], [40, 30, 24, 24], [7, 9, 10, 50], [3, 3, 1, 2]])
OUTSIDE = np.array([[-6, -9, 50, 50], [60, 50, 40, 40], [-5, 10, 100, 20], [-40, 0, 24, 24]])


def reference(image, box, size, interpolation):
    """Crops the image padded with black, and resizes with F.interpolate."""
    padded = F.pad(image, (100, 100, 100, 100))
    top, left, height, width = box
    crop = padded[:, top + 100 : top + height + 100, left + 100 : left + width + 100]
    return F.interpolate(crop[None], (size, size), mode=interpolation, antialias=True)[0]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [24, 57])
@pytest.mark.parametrize("boxes", [INSIDE, OUTSIDE], ids=["inside", "outside"])
def test_both_resizers_equal_interpolate(boxes, size, interpolation):
    images = picture(len(boxes), 90, 70)
    images[0, :, 20:40] = 255  # hard edges, where the cubic filter overshoots
    images[0, :, 25:30] = 0
    batched = resample(images, boxes, size, interpolation)
    assert batched.dtype == torch.uint8
    assert batched.is_contiguous()
    for image, box, ours in zip(images, boxes, batched, strict=True):
        expected = reference(image, box, size, interpolation)
        difference = (ours.int() - expected.int()).abs()
        # torch uses 16-bit weights, so a few values round differently between the passes; the cubic
        # filter can amplify this.
        assert difference.max() <= (1 if interpolation == "bilinear" else 2)
        assert (difference > 1).float().mean() < 1e-3
        for strides in (torch.contiguous_format, torch.channels_last):
            single = crop_resize(
                image[None].contiguous(memory_format=strides)[0], box, size, interpolation
            )
            assert single.is_contiguous()
            assert (single.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_crop_of_the_target_size_is_not_resampled(interpolation):
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    for box in ([4, 7, 24, 24], [-3, -5, 24, 24], [30, 40, 24, 24]):
        top, left = box[:2]
        padded = F.pad(image, (30, 30, 30, 30))
        expected = padded[:, top + 30 : top + 54, left + 30 : left + 54]
        assert torch.equal(crop_resize(image, np.array(box), 24, interpolation), expected)
        assert torch.equal(resample(image[None], np.array([box]), 24, interpolation)[0], expected)


def test_a_constant_image_stays_constant():
    images = torch.full((3, 3, 90, 70), 255, dtype=torch.uint8)
    for interpolation in ("bilinear", "bicubic"):
        assert (resample(images, INSIDE[:3], 32, interpolation) == 255).all()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("shape", "size"), [((20, 17), 40), ((130, 90), 13)])
@pytest.mark.parametrize("shift", [0, 0.3], ids=["integer", "fractional"])
def test_resampling_does_not_depend_on_other_images_of_the_batch(shape, size, interpolation, shift):
    rng = np.random.default_rng(1)
    height, width = rng.integers(1, [[shape[0]], [shape[1]]], (2, 30))
    # Some boxes extend beyond their image, so that batches have different margins.
    top, left = (rng.integers(-5, n - k + 6) for n, k in zip(shape, (height, width), strict=True))
    boxes, images = np.stack([top, left, height, width], axis=1) + shift, picture(30, *shape)
    full = resample(images, boxes, size, interpolation)
    for part in [slice(0, 30, 2), *(slice(i, i + 1) for i in range(30))]:
        assert torch.equal(resample(images[part], boxes[part], size, interpolation), full[part])


FRACTIONAL = np.array(
    [[0.4, 7.7, 80.3, 60.1], [3.25, 0.5, 40.5, 69.5], [30.9, 20.2, 12.6, 9.3], [61.5, 50, 28.5, 20]]
)


@pytest.mark.parametrize(("interpolation", "support"), [("bilinear", 1), ("bicubic", 2)])
@pytest.mark.parametrize("size", [16, 57])
def test_fractional_boxes_equal_pillow(size, interpolation, support):
    images = picture(len(FRACTIONAL), 90, 70)
    for image, box, ours in zip(
        images, FRACTIONAL, resample(images, FRACTIONAL, size, interpolation), strict=True
    ):
        top, left, height, width = box.tolist()
        expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
            (size, size),
            getattr(Image.Resampling, interpolation.upper()),
            box=(left, top, left + width, top + height),
        )
        difference = (
            ours.int() - torch.from_numpy(np.array(expected)).permute(2, 0, 1).int()
        ).abs()
        # Pillow's filter includes pixels around the box; where it reaches none, the results agree.
        y, x = (math.ceil(support * max(1, size / n)) for n in (height, width))
        inner = difference[:, y : size - y, x : size - x]
        assert inner.max() <= support, inner.max()
        assert (inner > 1).float().mean() < 2e-3


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("length", [1e-3, 0.4, 1 - 1e-7, 1, 1.6, 7.3, 20])
def test_a_fractional_box_uses_pixels_whose_centers_it_contains(length, interpolation):
    rng = np.random.default_rng(2)
    starts = rng.uniform(0, 20 - length, (300, 2))
    starts[:60] = np.floor(2 * starts[:60]) / 2  # centers on the edges
    boxes = np.hstack([starts, np.full((300, 2), length)])
    middle, half = starts + length / 2, max(length, 1) / 2
    inside = abs(np.arange(20) + 0.5 - middle[:, :, None]) <= half + 1e-3  # (300, 2, 20)
    mask = torch.from_numpy(inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]
    images = torch.where(mask, 77, 255).to(torch.uint8).expand(-1, 3, -1, -1)
    assert (resample(images, boxes, 9, interpolation) == 77).all()


def test_each_pixel_whose_center_is_inside_counts():
    boxes = np.array([[2.6, 3.4, 5.0, 4.0]])  # rows 3 to 7, columns 3 to 6
    images = torch.full((1, 3, 10, 10), 90, dtype=torch.uint8)
    for y in range(10):
        for x in range(10):
            changed = images.clone()
            changed[:, :, y, x] = 250
            counts = bool((resample(changed, boxes, 8, "bilinear") != 90).any())
            assert counts == (3 <= y <= 7 and 3 <= x <= 6), (y, x)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_integer_boxes_may_be_floats(interpolation):
    boxes = np.concatenate([INSIDE, OUTSIDE])
    images = picture(len(boxes), 90, 70)
    full = resample(images, boxes, 24, interpolation)
    assert torch.equal(resample(images, boxes.astype(np.float64), 24, interpolation), full)


def test_resampling_does_not_read_images_on_the_host():
    images = torch.empty(2, 3, 20, 30, dtype=torch.uint8, device="meta")
    resampled = resample(images, np.array([[0, 0, 9, 9], [-3, 5, 20, 40]]), 16, "bicubic")
    assert resampled.is_meta
    assert resampled.shape == (2, 3, 16, 16)


@pytest.mark.parametrize(("height", "width"), [(5, 8), (8, 5), (6, 9), (11, 4), (7, 7), (1, 4)])
def test_the_central_square_equals_torchvision(height, width):
    """Also for odd margins, where torchvision rounds half a pixel to even."""
    ((top, left, h, w),) = eval_boxes(np.array([[height, width]]), 1.0)
    side = min(height, width)
    assert (h, w) == (side, side)
    image = torch.arange(height * width).view(1, height, width)
    expected = torchvision.transforms.functional.center_crop(image, [side, side])
    assert image[:, top : top + h, left : left + w].equal(expected)


def test_squashing_crops_the_same_fraction_of_both_sides():
    (box,) = eval_boxes(np.array([[40, 81]]), 0.5, "squash")
    assert box.tolist() == [10, 20, 20, 40]


COLOR = (124, 116, 104)  # the default mean


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(90, 70), (40, 81), (31, 90), (24, 24), (5, 80)])
def test_padded_images_match_torchvision_and_pillow(height, width, interpolation):
    image = picture(height, width)
    side, size = max(height, width), 24
    top, left = round((side - height) / 2), round((side - width) / 2)
    gaps = [left, top, side - width - left, side - height - top]
    padded = TF.pad(image, gaps, COLOR)
    mode = torchvision.transforms.InterpolationMode(interpolation)
    expected = TF.resize(padded, [size, size], mode, antialias=True)
    data = DataConfig(fit="pad", interpolation=interpolation, eval_crop=0.5)
    assert data.fill == COLOR
    found = eval_crop(image, data, size)
    assert torch.equal(found, expected)
    picture_of = Image.fromarray(image.permute(1, 2, 0).numpy())
    square = Image.new("RGB", (side, side), COLOR)
    square.paste(picture_of, (left, top))
    small = square.resize((size, size), Image.Resampling[interpolation.upper()])
    assert (found.permute(1, 2, 0).int() - torch.tensor(np.array(small)).int()).abs().max() <= 1
    boxes = eval_boxes(np.array([[height, width]]), 0.5, "pad")
    batched = resample(image[None], boxes, size, interpolation, COLOR)
    assert (batched[0].int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_the_largest_training_crop_is_that_of_evaluation(fit):
    config = AugmentConfig(crop_scale=(1, 1), crop_ratio=(1, 1))
    boxes = random_boxes(config, 1.0, 32, SIZES, 0, 0, np.arange(5), fit)
    assert (boxes == eval_boxes(SIZES, 1.0, fit)).all()


def test_training_crops_of_squashed_images_are_those_of_their_squares():
    """Relative to the sides, the crops of a wide and of a square image are the same."""
    count = 2000
    of_wide, of_square = (
        random_boxes(AugmentConfig(), 1.0, 32, np.tile(size, (count, 1)), 0, 0, np.arange(count), f)
        for size, f in (([100, 400], "squash"), ([400, 400], "crop"))
    )
    scaled = of_square * [0.25, 1, 0.25, 1]
    assert abs(of_wide - scaled).max() <= 1
    assert (of_wide[:, :2] >= 0).all()
    assert (of_wide[:, :2] + of_wide[:, 2:] <= [100, 400]).all()
    narrow = np.tile([1, 400], (count, 1))
    thin = random_boxes(AugmentConfig(), 1.0, 32, narrow, 0, 0, np.arange(count), "squash")
    assert (thin[:, [0, 2]] == [0, 1]).all()


@pytest.mark.parametrize("size", [(300, 400), (400, 100), (500, 40), (64, 64)])
def test_training_crops_of_padded_images_are_those_of_their_squares(size):
    """They are moved only if their center would be in the padding."""
    count, side = 3000, max(size)
    sizes = np.tile(size, (count, 1))
    found, on_square = (
        random_boxes(AugmentConfig(), 1.0, 32, each, 0, 0, np.arange(count), fit)
        for each, fit in ((sizes, "pad"), (np.full_like(sizes, side), "crop"))
    )
    origin = eval_boxes(np.array([size]), 1.0, "pad")[:, :2]
    assert (found[:, 2:] == on_square[:, 2:]).all()
    assert (found[:, :2] >= origin).all()
    assert (found[:, :2] + found[:, 2:] <= origin + side).all()
    centers = found[:, :2] + found[:, 2:] / 2
    assert ((centers >= 0) & (centers <= size)).all()
    roomy = (found[:, 2:] >= side - np.array(size)).all(1)  # no crop of this size has it outside
    assert roomy.any()
    assert (found[roomy, :2] == (on_square[:, :2] + origin)[roomy]).all()


def test_padded_crops_of_padded_images_shift_the_square():
    config = AugmentConfig(crop="padded", crop_padding=4)
    (box,) = random_boxes(config, 1.0, 32, np.array([[64, 128]]), 0, 0, np.arange(1), "pad")
    assert box[2:].tolist() == [128, 128]
    assert (abs(box[:2] - [-32, 0]) <= 16).all()


@pytest.mark.parametrize(("height", "width"), [(50, 80), (81, 40), (33, 33)])
def test_five_boxes_equal_torchvision(height, width):
    image = torch.arange(height * width).view(1, height, width)
    side = round(0.8 * min(height, width))
    boxes = five_boxes(np.tile([height, width], (5, 1)), 0.8, np.arange(5))
    for (top, left, h, w), expected in zip(boxes, TF.five_crop(image, [side]), strict=True):
        assert torch.equal(image[:, top : top + h, left : left + w], expected)
