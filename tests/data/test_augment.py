"""Augmentation: batches against torchvision's functionals, draws against their distributions."""

from typing import get_args

import numpy as np
import pytest
import torch
from torchvision.transforms import AutoAugment as AutoAugmentV1
from torchvision.transforms import AutoAugmentPolicy, TrivialAugmentWide
from torchvision.transforms import RandAugment as RandAugmentV1
from torchvision.transforms.v2 import CutMix, RandomErasing
from torchvision.transforms.v2 import functional as TF

from vitral.config import AugmentConfig, Policy
from vitral.data import augment as module
from vitral.data.augment import (
    _AUTOAUGMENT,
    AugmentPlan,
    Mix,
    augment,
    draw_mix,
    draw_plan,
    finish,
    magnitudes,
    mix,
)
from vitral.data.ops import Op

from .reference_ops import apply_reference, pictures, values_of

POLICIES = [p for p in get_args(Policy) if p != "none"]
FULL = AugmentConfig(
    policy="autoaugment-imagenet",
    rotation=9,
    zoom=0.1,
    shear=7,
    shift=2,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    erasing=0.5,
)
NAMES = {op: "".join(word.title() for word in op.name.split("_")) for op in Op} | {
    Op.SATURATION: "Color",
    Op.AUTOCONTRAST: "AutoContrast",
}


def kolmogorov_smirnov(a, b):
    """The two-sample statistic for samples of equal size; above 2.23 with a probability of 1e-4."""
    a, b, at = np.sort(a), np.sort(b), np.union1d(a, b)
    distance = abs(np.searchsorted(a, at, "right") - np.searchsorted(b, at, "right")).max()
    return distance / len(a) * np.sqrt(len(a) / 2)


def test_policies_equal_torchvision():
    for ours, name in zip(_AUTOAUGMENT.values(), ("IMAGENET", "CIFAR10"), strict=True):
        expected = AutoAugmentV1(AutoAugmentPolicy[name]).policies
        named = [
            tuple((NAMES[Op(int(op))], float(p), int(level)) for op, p, level in pair)
            for pair in ours
        ]
        assert named == [tuple((op, p, level or 0) for op, p, level in pair) for pair in expected]


def test_magnitudes_equal_torchvision():
    auto, rand, trivial = AutoAugmentV1(), RandAugmentV1(), TrivialAugmentWide()
    for ours, space in [
        (magnitudes(10, 224), auto._augmentation_space(10, (224, 224))),
        (magnitudes(10, 33), auto._augmentation_space(10, (33, 33))),
        (magnitudes(31, 224), rand._augmentation_space(31, (224, 224))),
        (magnitudes(31, 224, wide=True), trivial._augmentation_space(31)),
    ]:
        names = list(space)
        assert [NAMES[op] for op in Op if NAMES[op] in names] == names
        for op in Op:
            if NAMES[op] in names:
                expected = space[NAMES[op]][0].double().expand(ours.shape[1]).numpy()
                assert (ours[op] == expected).all(), op


def test_affine_equals_torchvision():
    images = pictures(33)
    config = AugmentConfig(flip=0, rotation=40, zoom=0.4, shear=30, shift=5)
    plan = draw_plan(config, 33, 0, 0, np.arange(len(images)))
    assert plan.affine is not None
    for ours, image, row in zip(augment(images, plan), images, plan.affine.tolist(), strict=True):
        angle, scale, shear, dx, dy = row
        expected = TF.affine(
            image, angle, [dx, dy], scale, [shear, 0.0], TF.InterpolationMode.BILINEAR
        )
        assert (ours.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("policy", POLICIES)
def test_batch_equals_functionals_one_image_at_a_time(policy):
    images = pictures(33).repeat(8, 1, 1, 1)
    config = AugmentConfig(policy=policy, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    plan = draw_plan(config, 33, 5, 0, np.arange(len(images)))
    before = images.clone()
    ours = augment(images, plan)
    assert torch.equal(images, before)
    wrong = 0
    for image, flip, ops, values, result in zip(
        images, plan.flip, plan.ops, plan.values.tolist(), ours, strict=True
    ):
        expected = image.flip(2) if flip else image
        for op, value in zip(ops, values, strict=True):
            expected = apply_reference(expected, Op(op), value)
        wrong += int(((result.int() - expected.int()).abs() > 1).sum())
    assert wrong <= ours.numel() / 1000


CONFIGS = [
    FULL,
    *[
        AugmentConfig(policy=p)
        for p in ("autoaugment-cifar10", "randaugment", "trivialaugment", "3-augment")
    ],
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.policy)
def test_plan_and_pixels_do_not_depend_on_the_batch(config):
    images = pictures(32).repeat(3, 1, 1, 1)
    indices = np.arange(100, 136)
    plan = draw_plan(config, 32, 1, 2, indices)
    full = augment(images, plan)
    finished = finish(full, plan, (0.5,) * 3, (0.2,) * 3)
    for rows in ([5], [35, 5, 0], list(range(10, 24))):
        part = draw_plan(config, 32, 1, np.full(len(rows), 2), indices[rows])
        for name in ("flip", "affine", "ops", "values", "erase"):
            ours, expected = getattr(part, name), getattr(plan, name)
            assert (ours is expected is None) or (ours == expected[rows]).all(), name
        pixels = augment(images[rows], part)
        assert torch.equal(pixels, full[rows])
        assert torch.equal(finish(pixels, part, (0.5,) * 3, (0.2,) * 3), finished[rows])
    other = draw_plan(config, 32, 1, 3, indices)
    assert (other.values != plan.values).any()
    assert (draw_plan(config, 32, 2, 2, indices).values != plan.values).any()


@pytest.mark.parametrize("limits", [(5 * 3 * 32 * 32, 1 << 16), (1 << 20, 3 * 32 * 32 - 1)])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.policy)
def test_cpu_chunks_do_not_change_results(monkeypatch, config, limits):
    """Five images at a time, and one at a time."""
    images = pictures(32).repeat(3, 1, 1, 1)
    plan = draw_plan(config, 32, 1, 2, np.arange(len(images)))
    pixels = augment(images, plan)
    finished = finish(pixels, plan, (0.5,) * 3, (0.2,) * 3)
    for name, limit in zip(("CPU_CHUNK", "CPU_LARGE"), limits, strict=True):
        monkeypatch.setattr(module, name, limit)
    parts = list(module._chunks(images))
    assert [part.start for part in parts] == list(range(0, 36, 5 if limits[0] < 1 << 20 else 1))
    assert torch.equal(augment(images, plan), pixels)
    assert torch.equal(finish(pixels, plan, (0.5,) * 3, (0.2,) * 3), finished)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.policy)
def test_nothing_synchronizes_with_the_device(config):
    images = torch.empty(64, 3, 32, 32, dtype=torch.uint8, device="meta")  # has no values to read
    plan = draw_plan(config, 32, 1, 2, np.arange(64))
    finished = finish(augment(images, plan), plan, (0.5,) * 3, (0.2,) * 3)
    mixed, _ = mix(finished, torch.empty(64, 10, device="meta"), Mix(0.75, (2, 4, 10, 12)))
    assert mixed.shape == images.shape


def test_frequencies_of_drawn_operations():
    B = 20_000
    indices = np.arange(B)
    plan = draw_plan(AugmentConfig(flip=0.3, policy="3-augment"), 32, 0, 0, indices)
    assert abs(plan.flip.mean() - 0.3) < 0.015
    assert [abs((plan.ops == op).mean() - 1 / 3) < 0.015 for op in (11, 16, 17)] == [True] * 3
    assert (plan.values[plan.ops == Op.SOLARIZE] == 128).all()
    sigma = plan.values[plan.ops == Op.BLUR]
    assert 0.1 <= sigma.min() < 0.11
    assert 1.99 < sigma.max() <= 2.0
    assert abs(sigma.mean() - 1.05) < 0.03

    plan = draw_plan(AugmentConfig(policy="trivialaugment"), 32, 0, 0, indices)
    assert abs(np.bincount(plan.ops[:, 0], minlength=14) / B - 1 / 14).max() < 0.008
    rotation = plan.values[plan.ops == Op.ROTATE]
    assert len(np.unique(rotation)) == 61  # 31 strengths of either sign, one of them zero
    assert abs((rotation > 0).mean() - 15 / 31) < 0.05
    assert set(plan.values[plan.ops == Op.POSTERIZE]) == set(range(2, 9))

    config = AugmentConfig(policy="randaugment", randaugment_ops=3, randaugment_magnitude=15)
    plan = draw_plan(config, 64, 0, 0, indices)
    assert plan.ops.shape == (B, 3)
    assert abs(np.bincount(plan.ops.ravel(), minlength=14) / 3 / B - 1 / 14).max() < 0.005
    pairs = np.histogram2d(plan.ops[:, 0], plan.ops[:, 2], bins=14)[0] / B
    assert abs(pairs - 1 / 196).max() < 0.003  # slots are independent
    assert set(plan.values[plan.ops == Op.ROTATE]) == {-15.0, 15.0}
    assert set(np.round(plan.values[plan.ops == Op.BRIGHTNESS], 6)) == {0.55, 1.45}
    assert set(plan.values[plan.ops == Op.TRANSLATE_X]) == {-14.0, 14.0}

    plan = draw_plan(AugmentConfig(policy="autoaugment-imagenet"), 32, 0, 0, indices)
    table = _AUTOAUGMENT["autoaugment-imagenet"]
    for slot in (0, 1):
        for op in range(1, 15):
            expected = table[:, slot, 1][table[:, slot, 0] == op].sum() / 25
            assert abs((plan.ops[:, slot] == op).mean() - expected) < 0.015
    rotation = plan.values[plan.ops == Op.ROTATE]
    assert abs((rotation > 0).mean() - 0.5) < 0.03
    assert set(np.round(abs(rotation), 3)) == {10.0, 26.667, 30.0}
    # The sign in one slot is independent of whether the operation in the other slot is applied.
    rotated = plan.ops[:, 0] == Op.ROTATE
    second, positive = plan.ops[rotated, 1] > 0, plan.values[rotated, 0] > 0
    assert abs(second[positive].mean() - second[~positive].mean()) < 0.1


def test_jitter_draws_in_random_order_and_range():
    config = AugmentConfig(brightness=0.4, contrast=2.0, hue=0.1)
    plan = draw_plan(config, 32, 0, 0, np.arange(12_000))
    orders, counts = np.unique(plan.ops, axis=0, return_counts=True)
    assert len(orders) == 6
    assert abs(counts / 12_000 - 1 / 6).max() < 0.02
    ranges = {Op.BRIGHTNESS: (0.6, 1.4), Op.CONTRAST: (0, 3), Op.HUE: (-0.1, 0.1)}
    for op, (low, high) in ranges.items():
        values = plan.values[plan.ops == op]
        assert len(values) == 12_000
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.02 * (high - low)
        position = (plan.ops == op).argmax(axis=1)
        assert abs(np.corrcoef(values, position)[0, 1]) < 0.04


def test_affine_draws_in_range():
    config = AugmentConfig(rotation=9, zoom=0.1, shear=7, shift=0.8)
    affine = draw_plan(config, 8, 0, 0, np.arange(5000)).affine
    assert affine is not None
    center, limits = np.array([0, 1, 0, 0, 0]), np.array([9, 0.1, 7, 0.8, 0.8])
    relative = (affine - center) / limits
    assert abs(relative).max() <= 1
    assert abs(relative.mean(axis=0)).max() < 0.04
    assert abs(relative.std(axis=0) - 3**-0.5).max() < 0.02
    assert abs(np.corrcoef(relative.T) - np.eye(5)).max() < 0.06


@pytest.mark.parametrize("size", [8, 64])
def test_erased_boxes_follow_torchvision(size):
    torch.manual_seed(0)
    expected = [
        [params[key] for key in ("i", "j", "h", "w")]
        for params in (
            RandomErasing(p=1.0).make_params([torch.empty(3, size, size)]) for _ in range(3000)
        )
    ]
    erase = draw_plan(AugmentConfig(erasing=0.25), size, 0, 0, np.arange(12_000)).erase
    assert abs((erase[:, 2:] > 0).any(axis=1).mean() - 0.25) < 0.02
    ours = draw_plan(AugmentConfig(erasing=1.0), size, 0, 0, np.arange(3000)).erase
    assert (ours[:, :2] + ours[:, 2:] <= size).all()
    for column in range(4):
        assert kolmogorov_smirnov(ours[:, column], np.array(expected)[:, column]) < 2.23


def test_finish_normalizes_then_erases_with_zeros():
    images = pictures(33)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = TF.normalize(TF.to_dtype(images, torch.float32, scale=True), list(mean), list(std))
    assert torch.allclose(finish(images, None, mean, std), expected, atol=1e-6)
    plan = draw_plan(AugmentConfig(erasing=0.6), 33, 0, 0, np.arange(len(images)))
    erased = finish(images, plan, mean, std)
    assert 0 < (plan.erase[:, 2] > 0).sum() < len(images)
    for i, (top, left, height, width) in enumerate(plan.erase):
        expected[i, :, top : top + height, left : left + width] = 0
    assert torch.allclose(erased, expected, atol=1e-6)


def test_mixup_and_cutmix_are_drawn_as_configured():
    assert draw_mix(AugmentConfig(), 32, 0, 0) is None
    mixup = [draw_mix(AugmentConfig(mixup=0.2), 32, 0, step) for step in range(3000)]
    assert all(m.box is None for m in mixup)
    fractions = np.array([m.fraction for m in mixup])
    # Beta(a, a) has mean 1/2 and variance 1 / (8 a + 4).
    assert abs(fractions.mean() - 0.5) < 0.03
    assert abs(fractions.var() - 1 / 5.6) < 0.01
    both = [draw_mix(AugmentConfig(mixup=0.8, cutmix=1.0), 32, 0, step) for step in range(3000)]
    assert abs(np.mean([m.box is None for m in both]) - 0.5) < 0.04
    assert both[7] == draw_mix(AugmentConfig(mixup=0.8, cutmix=1.0), 32, 0, 7)
    assert both[7] != draw_mix(AugmentConfig(mixup=0.8, cutmix=1.0), 32, 1, 7)

    cutmix = [draw_mix(AugmentConfig(cutmix=1.0), 32, 0, step) for step in range(3000)]
    boxes = np.array([m.box for m in cutmix])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= 32).all()
    sides = boxes[:, 2:] - boxes[:, :2]
    assert np.allclose([m.fraction for m in cutmix], 1 - sides.prod(axis=1) / 1024)
    assert abs((boxes[:, :2] + boxes[:, 2:]).mean() - 32) < 1
    torch.manual_seed(0)
    reference = CutMix(alpha=1.0, num_classes=2)
    expected = [reference.make_params([torch.empty(2, 3, 32, 32)])["lam_adjusted"] for _ in cutmix]
    assert kolmogorov_smirnov(np.array([m.fraction for m in cutmix]), np.array(expected)) < 2.23


@pytest.mark.parametrize(
    "how", [Mix(0.3, None), Mix(0.75, (2, 4, 10, 12))], ids=["mixup", "cutmix"]
)
def test_mixing_with_the_partner_in_any_even_slice(how):
    images = torch.randn(8, 3, 16, 16)
    targets = torch.eye(8)
    mixed, mixed_targets = mix(images, targets, how)
    for i in range(8):
        partner = i ^ 1
        expected = how.fraction * images[i] + (1 - how.fraction) * images[partner]
        if how.box is not None:
            expected = images[i].clone()
            expected[:, 2:10, 4:12] = images[partner, :, 2:10, 4:12]
        assert torch.allclose(mixed[i], expected)
        assert mixed_targets[i, i] == pytest.approx(how.fraction)
        assert mixed_targets[i, partner] == pytest.approx(1 - how.fraction)
        assert mixed_targets[i].sum() == pytest.approx(1)
    for cuts in ([2, 6], [4, 4], [2, 2, 2, 2]):
        parts = [
            mix(x, y, how) for x, y in zip(images.split(cuts), targets.split(cuts), strict=True)
        ]
        assert torch.equal(torch.cat([x for x, _ in parts]), mixed)
        assert torch.equal(torch.cat([y for _, y in parts]), mixed_targets)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.policy)
def test_augmenting_does_not_read_images_on_the_host(config):
    """Tensors on the meta device have no data to read."""
    plan = draw_plan(config, 32, 0, 0, np.arange(200))
    images = torch.empty(200, 3, 32, 32, dtype=torch.uint8, device="meta")
    assert augment(images, plan).is_meta
    assert finish(images, plan, (0.5,) * 3, (0.2,) * 3).is_meta


def plan_of(ops, values):
    """A plan with only operations; both arguments have shape (B, slots)."""
    B = len(ops)
    ops, values = np.asarray(ops, np.int8), np.asarray(values, np.float64)
    return AugmentPlan(np.zeros(B, bool), None, ops, values, np.zeros((B, 4), np.int64))


@pytest.mark.parametrize("op", list(Op), ids=lambda op: op.name.lower())
def test_the_layout_of_images_in_memory_does_not_matter(op):
    images = pictures(16)
    plan = plan_of([[op]] * len(images), [[values_of(op, 16)[-1]]] * len(images))
    interleaved = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(interleaved, plan), augment(images, plan))
