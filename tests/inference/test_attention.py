from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from vitral.config import ViTConfig
from vitral.inference.attention import (
    STEPS,
    attention_weights,
    deletion,
    insertion,
    position_similarity,
    read,
    rollout,
)
from vitral.model import ViT

SOFTMAX = partial(torch.softmax, dim=-1)
OPTIONS = [
    {},
    {"pooling": "mean"},
    {"num_kv_heads": 1},
    {"num_kv_heads": 4},
    {"qk_norm": True, "qkv_bias": False, "layer_scale": 0.1},
    {"rope": "mixed"},
    {"num_registers": 3, "rope": "mixed", "qk_norm": True, "pooling": "mean"},
]
KEYS = {"dim": 32, "depth": 3, "num_heads": 4, "num_kv_heads": 2, "patch_size": 4, "image_size": 16}


def tiny(**options):
    """A model whose weights are all random, so that no branch or position is neutral."""
    torch.manual_seed(0)
    model = ViT(ViTConfig(**{**KEYS, **options}), num_classes=5).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_weights_recombine_to_the_output_of_each_layer(options, dtype):
    """The reference starts from the inputs of each layer and loops over the heads."""
    model = tiny(**options).to(dtype)
    calls = []
    for block in model.blocks:
        block.attention.register_forward_hook(
            lambda layer, inputs, out: calls.append((inputs, out))
        )
    images = torch.randn(2, 3, 16, 12, dtype=dtype)
    logits, weights = attention_weights(model, images)
    assert len(weights) == 3
    for block, attention, ((x, _, _), output) in zip(model.blocks, weights, calls, strict=True):
        layer = block.attention
        assert attention.shape == (2, 4, x.tokens.shape[1], x.tokens.shape[1])
        torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
        values = layer.qkv(x).split(layer.head_size, dim=-1)[-layer.num_kv_heads :]
        group = 4 // layer.num_kv_heads
        mixed = [attention[:, head] @ values[head // group] for head in range(4)]
        recombined = layer.projection(torch.cat(mixed, dim=-1))
        tolerance = 1e-4 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(recombined, output, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(logits, model(images))
    # Only the hooks of this test are left.
    assert all(len(block.attention._forward_hooks) == 1 for block in model.blocks)


def test_a_layer_with_another_formula_is_detected():
    model = tiny()
    attend = model.blocks[1].attention.attend
    model.blocks[1].attention.attend = lambda q, k, v: attend(1.01 * q, k, v)
    with pytest.raises(AssertionError, match="recomputed attention is off"):
        attention_weights(model, torch.randn(1, 3, 16, 16))
    assert not any(block.attention._forward_hooks for block in model.blocks)


def test_precision_is_raised_temporarily():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        attention_weights(tiny(), torch.randn(1, 3, 16, 16))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_rollout_matches_the_paper():
    """Abnar and Zuidema 2020, equation 1, summed path by path through the layers in numpy."""
    rng = np.random.default_rng(0)
    raw = rng.random((3, 2, 4, 5, 5))  # layers, images, heads, N, N
    weights = raw / raw.sum(-1, keepdims=True)
    expected = np.zeros((2, 5, 5))
    for image in range(2):
        step = [0.5 * weights[i, image].mean(0) + 0.5 * np.eye(5) for i in range(3)]
        for a, b, c, d in np.ndindex(5, 5, 5, 5):
            expected[image, a, d] += step[2][a, b] * step[1][b, c] * step[0][c, d]
    flow = rollout([torch.from_numpy(layer) for layer in weights])
    np.testing.assert_allclose(flow.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(flow.sum(-1).numpy(), 1)


def test_read_selects_the_tokens_of_the_head():
    weights = torch.arange(49.0).view(7, 7)  # CLS, two registers, four patches
    by_cls = read(tiny(num_registers=2), weights)
    assert by_cls.tolist() == [3, 4, 5, 6]
    by_mean = read(tiny(num_registers=2, pooling="mean"), weights)
    assert by_mean.tolist() == [34.5, 35.5, 36.5, 37.5]  # the mean of rows 3 to 6, which is 4.5


@pytest.mark.parametrize("rope", ["axial", "mixed"])
def test_similarity_depends_only_on_relative_positions(rope):
    model = tiny(rope=rope, num_registers=1)
    first = position_similarity(model, 1, 6, 5, (2, 1))
    second = position_similarity(model, 1, 6, 5, (3, 3))
    assert first.shape == (6, 5)
    torch.testing.assert_close(first[:5, :3], second[1:, 2:])
    torch.testing.assert_close(first[2, 1], torch.tensor(1.0))
    assert first.flatten().topk(2).values[1] < 0.999
    assert first.argmax() == 2 * 5 + 1
    assert first.min() >= -1
    reverse = position_similarity(model, 1, 6, 5, (4, 4))
    torch.testing.assert_close(first[4, 4], reverse[2, 1])
    other = position_similarity(model, 2, 6, 5, (2, 1))
    assert torch.equal(first, other) == (rope == "axial")


def test_axial_similarity_matches_the_formula():
    """Head size 8: x rotates one quarter of the pairs by 1 radian per patch, another by 1/10."""
    model = tiny(rope_theta=100.0)
    found = position_similarity(model, 0, 4, 4, (1, 0))
    dy, dx = np.mgrid[-1:3, 0:4]
    expected = (np.cos(dx) + np.cos(dx / 10) + np.cos(dy) + np.cos(dy / 10)) / 4
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


class OnePatch(nn.Module):
    """Predicts 0.9 while one patch is unchanged, and 0.2 if it has another color."""

    def __init__(self, place, image):
        super().__init__()
        self.config = ViTConfig(**KEYS)
        row, column = divmod(place, 4)
        self.part = slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4)
        self.original = image[:, *self.part]

    def forward(self, images):
        kept = (images[:, :, *self.part] == self.original).all((1, 2, 3))
        probability = torch.where(kept, 0.9, 0.2)
        return torch.stack([1 - probability, probability], dim=1).log()


@pytest.mark.parametrize("position", [0, 5, 15])
def test_deletion_and_insertion_with_one_relevant_patch(position):
    """The patch is at `position` in the order: one trapezoid of 16 goes from 0.9 to 0.2."""
    torch.manual_seed(0)
    image, order = torch.rand(3, 16, 16), torch.randperm(16)
    model = OnePatch(int(order[position]), image)
    deleted, inserted = (
        function(model, image, 1, order, SOFTMAX) for function in (deletion, insertion)
    )
    assert deleted.fractions.tolist() == [i / 16 for i in range(17)]
    before = [0.9] * (position + 1) + [0.2] * (16 - position)
    np.testing.assert_allclose(deleted.probabilities, before, atol=1e-6)
    after = [0.2] * (position + 1) + [0.9] * (16 - position)
    np.testing.assert_allclose(inserted.probabilities, after, atol=1e-6)
    assert deleted.area == pytest.approx((0.9 * position + 0.55 + 0.2 * (15 - position)) / 16)
    assert inserted.area == pytest.approx((0.2 * position + 0.55 + 0.9 * (15 - position)) / 16)


def test_curves_of_many_patches_end_at_the_image_and_its_mean_color():
    model, image = tiny(), torch.randn(3, 24, 40)
    order = torch.randperm(60)
    deleted, inserted = (
        function(model, image, 3, order, SOFTMAX) for function in (deletion, insertion)
    )
    complete = model(image[None]).softmax(-1)[0, 3]
    flat = image.mean((1, 2))[None, :, None, None].expand(1, 3, 24, 40)
    blank = model(flat).softmax(-1)[0, 3]
    for curve, ends in ((deleted, [complete, blank]), (inserted, [blank, complete])):
        assert len(curve.fractions) == STEPS + 1
        assert curve.fractions[[0, -1]].tolist() == [0, 1]
        np.testing.assert_allclose(curve.probabilities[[0, -1]], ends, rtol=1e-5)
    backwards = deletion(model, image, 3, order.flip(0), SOFTMAX)
    assert backwards.area == pytest.approx(inserted.area)
