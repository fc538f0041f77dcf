"""Tests of benchmarks/variants.py: variants compared with independent references."""

import errno

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitral import weights
from vitral.config import Config, ViTConfig
from vitral.model import ViT, count_flops, rotate

CONFIG = ViTConfig(
    dim=48, depth=2, num_heads=6, num_kv_heads=2, patch_size=4, image_size=16, num_registers=2,
    qk_norm=True, layer_scale=0.5,
)  # fmt: skip
MODELS = ("learned-positions", "no-positions", "layer-norm")


@pytest.fixture(scope="module")
def variants(benchmarks):
    """The program as a module."""
    import variants

    return variants


def random_model(build, config=CONFIG):
    """A model in float64 with random weights, including those that are initialized to 0 or 1."""
    torch.manual_seed(0)
    model = build(config, 3).double().eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.4)
    return model


def noise(rows=4, columns=4):
    return torch.randn(2, 3, 4 * rows, 4 * columns, dtype=torch.float64)


def shuffled(images, order, columns=4):
    """The same patches of 4x4 pixels in another order."""
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, order]
    return torch.cat([torch.cat([*row.unbind(2)], 3) for row in patches.split(columns, 2)], 2)


@pytest.mark.parametrize("name", MODELS)
def test_costs_and_initial_weights_equal_vitral(variants, name):
    build = variants.PARTS[name].model
    assert count_flops(CONFIG, 3, build=build) == count_flops(CONFIG, 3)
    torch.manual_seed(1)
    own = ViT(CONFIG, 3).state_dict()
    torch.manual_seed(1)
    other = build(CONFIG, 3).state_dict()
    assert all(torch.equal(other[key], value) for key, value in own.items())
    new = {key: value for key, value in other.items() if key not in own}
    if name != "learned-positions":
        assert not new
    else:
        ((key, table),) = new.items()
        assert key == "patch_embedding.positions"
        assert table.shape == (4, 4, 48)
        assert table.std().item() == pytest.approx(0.02, rel=0.1)


def test_without_positions_patch_order_does_not_matter(variants):
    model, images, order = random_model(variants.WithoutPositions), noise(), torch.randperm(16)
    torch.testing.assert_close(model(shuffled(images, order)), model(images), rtol=0, atol=1e-12)
    own = random_model(ViT)
    assert (own(images) - own(shuffled(images, order))).abs().max() > 1e-3


def test_learned_positions_follow_their_patches(variants):
    """Logits change if patches are shuffled alone, but not together with their table rows."""
    model, images, order = random_model(variants.LearnedPositions), noise(), torch.randperm(16)
    logits, moved = model(images), shuffled(images, order)
    assert (model(moved) - logits).abs().max() > 1e-3
    table = model.patch_embedding.positions
    table.data = table.data.flatten(0, 1)[order].view_as(table)
    torch.testing.assert_close(model(moved), logits, rtol=0, atol=1e-12)


def test_the_table_is_unchanged_on_its_own_grid(variants):
    patches = random_model(variants.LearnedPositions).patch_embedding
    assert torch.equal(patches.table(4, 4), patches.positions.flatten(0, 1))
    same = F.interpolate(
        patches.positions.permute(2, 0, 1)[None], (4, 4), mode="bicubic", antialias=True
    )
    torch.testing.assert_close(
        patches.table(4, 4), same[0].permute(1, 2, 0).flatten(0, 1), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("grid", [(7, 7), (3, 3), (5, 2)])
def test_the_table_is_interpolated_as_timm_does(variants, grid):
    layers = pytest.importorskip("timm.layers")
    patches = random_model(variants.LearnedPositions).float().patch_embedding
    table = patches.positions.flatten(0, 1)[None]
    expected = layers.resample_abs_pos_embed(table, [*grid], [4, 4], num_prefix_tokens=0)[0]
    torch.testing.assert_close(patches.table(*grid), expected)
    images = noise(*grid).float()
    added = patches(images) - patches.projection(
        images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    )
    torch.testing.assert_close(added, expected.expand_as(added), rtol=1e-4, atol=1e-5)


def with_layer_norm(model, images):
    """Logits of a ViT with torch's LayerNorm before attention, FFN and head."""

    def norm(x, scale):
        layer = nn.LayerNorm(x.shape[-1], eps=1e-6, bias=False, dtype=x.dtype)
        layer.weight.data = scale
        return layer(x)

    patches = model.patch_embedding(images)
    prefix = torch.cat([model.cls[None], model.registers]).expand(len(images), -1, -1)
    x = torch.cat([prefix, patches], 1)
    for block, (cosine, sine) in zip(model.blocks, model.rope(4, 4, x.device), strict=True):
        layer = block.attention
        heads = (
            layer.qkv(norm(x, block.attention_norm.scale)).unflatten(-1, (-1, 8)).transpose(1, 2)
        )
        q, k, v = heads.split([6, 2, 2], 1)
        q, k = rotate(layer.q_norm(q), cosine, sine), rotate(layer.k_norm(k), cosine, sine)
        k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
        attended = ((q @ k.mT) / 8**0.5).softmax(-1) @ v
        x = x + block.attention_residual.scale * layer.projection(
            attended.transpose(1, 2).flatten(2)
        )
        hidden = F.gelu(block.ffn.expand(norm(x, block.ffn_norm.scale)), approximate="tanh")
        x = x + block.ffn_residual.scale * block.ffn.contract(hidden)
    return model.head(norm(x, model.norm.scale)[:, 0])


def test_layer_norm_equals_torch(variants):
    model, images = random_model(variants.WithLayerNorm), noise()
    expected = with_layer_norm(model, images)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-10)
    own = random_model(ViT)
    own.load_state_dict(model.state_dict())
    assert (own(images) - expected).abs().max() > 1e-3


def test_a_full_disk_is_an_error(variants, capsys):
    def run():
        raise OSError(errno.ENOSPC, "No space left on device", "place")

    assert variants.exit_code("variants", run) == 1
    output = capsys.readouterr().err
    assert "No space left on device: 'place'; free up space and repeat the command" in output
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    "words", [[], ["no-positions"], ["adam", "digits"], ["layer-norm", "--out", "x"]]
)
def test_user_errors_are_reported(variants, words, capsys):
    assert variants.main(words) == 2
    output = capsys.readouterr().err
    assert "learned-positions" in output
    assert output.count("\n") == 1


def test_lora_equals_the_merged_weights_and_trains_only_the_updates(variants, tmp_path):
    own = ViT(CONFIG, 3)
    for parameter in own.parameters():
        parameter.data.normal_(0, 0.4)
    description = weights.describe(Config(model=CONFIG), tuple("abc"), "", {})
    weights.save(tmp_path / "weights", {"model": own.state_dict()}, description)
    model = variants.with_lora(CONFIG, 3)
    variants.freeze_all_but_lora(model, str(tmp_path / "weights"), ("a", "b", "c"))
    model, own, images = model.double().eval(), own.double().eval(), noise()
    torch.testing.assert_close(model(images), own(images), rtol=0, atol=1e-9)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[1] for name in trained} == {"up", "down", "weight", "bias"}
    assert len(trained) == 2 * 4 * 2 + 2  # two factors of four layers of two blocks, and the head
    for name, layer in model.named_modules():
        if isinstance(layer, variants.LowRankLinear):
            layer.up.data.normal_(0, 0.4)
            own.get_submodule(name).weight.data += layer.up.data @ layer.down.data
    torch.testing.assert_close(model(images), own(images), rtol=0, atol=1e-9)
