"""Every operation against torchvision's functional for one image."""

import numpy as np
import pytest
import torch

from vitral.data.ops import Op, apply_slot, apply_to_rows

from .reference_ops import apply_reference, pictures, values_of

SIZES = [8, 33, 64]


def applied(images, op, value):
    """Returns copies of the images after one operation with one value."""
    images, B = images.clone(), len(images)
    apply_slot(images, np.full(B, op, np.int8), np.full(B, value, np.float64))
    return images


@pytest.mark.parametrize("op", list(Op), ids=lambda op: op.name.lower())
@pytest.mark.parametrize("size", SIZES)
def test_operation_equals_torchvision(op, size):
    images = pictures(size)
    geometric = Op.SHEAR_X <= op <= Op.ROTATE
    wrong = total = 0
    for value in values_of(op, size):
        ours = applied(images, op, value)
        expected = torch.stack([apply_reference(image, op, float(value)) for image in images])
        difference = (ours.int() - expected.int()).abs()
        wrong += int((difference > 0).sum())
        total += difference.numel()
        if not geometric:
            assert difference.max() <= 1, value
    assert wrong <= total / 1000, f"{wrong} of {total} values differ"


@pytest.mark.parametrize("op", [Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.ROTATE])
def test_large_images_equal_torchvision(op):
    """Shears put entire rows halfway between pixels, where rounding depends on the processor."""
    image = pictures(224)[:1]
    for value in [*values_of(op, 224)[::15], *([0.04, 0.2] if op <= Op.SHEAR_Y else [])]:
        ours = applied(image, op, value)[0]
        expected = apply_reference(image[0], op, float(value))
        assert (ours != expected).any(dim=0).float().mean() <= 2 / 224, value


def test_each_image_can_have_a_different_operation():
    images = pictures(33)[[0, 1, 2, 6, 7]]
    ops = [Op.ROTATE, Op.IDENTITY, Op.POSTERIZE, Op.HUE, Op.SHARPNESS]
    values = [20.0, 0.0, 3.0, 0.25, 1.7]
    mixed = images.clone()
    apply_slot(mixed, np.array(ops, np.int8), np.array(values))
    for image, result, op, value in zip(images, mixed, ops, values, strict=True):
        assert torch.equal(result, applied(image[None], op, value)[0])
    assert torch.equal(mixed[1], images[1])
    assert not any(torch.equal(mixed[i], images[i]) for i in (0, 2, 3, 4))


def test_functions_read_and_change_only_the_given_rows():
    rows = torch.arange(4.0)[:, None].expand(4, 3).clone()
    seen = []
    apply_to_rows(rows, np.array([3, 1]), lambda part: seen.append(part.clone()) or part + 10)
    assert seen[0][:, 0].tolist() == [3, 1]
    assert rows[:, 2].tolist() == [0, 11, 2, 13]
    apply_to_rows(rows, np.arange(0), lambda part: pytest.fail("called for no rows"))
