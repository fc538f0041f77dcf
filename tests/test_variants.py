"""benchmarks/variants.py: variants against independent references."""

import errno
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitral import storage
from vitral.config import OptimConfig, ViTConfig
from vitral.model import ViT, count_flops, rotate
from vitral.training import Interrupted, Parts, checkpoint, train
from vitral.training.optim import Optimizer

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


def drawn(build, config=CONFIG):
    """A model in float64 all of whose weights are noise, those too that start at 0 or 1."""
    torch.manual_seed(0)
    model = build(config, 3).double().eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.4)
    return model


def noise(rows=4, columns=4):
    return torch.randn(2, 3, 4 * rows, 4 * columns, dtype=torch.float64)


def shuffled(images, order, columns=4):
    """The same patches of 4 by 4 pixels in another order."""
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, order]
    return torch.cat([torch.cat([*row.unbind(2)], 3) for row in patches.split(columns, 2)], 2)


@pytest.mark.parametrize("name", MODELS)
def test_costs_and_starts_as_vitrals_own(variants, name):
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


def test_without_positions_the_order_of_patches_is_nothing(variants):
    model, images, order = drawn(variants.WithoutPositions), noise(), torch.randperm(16)
    logits, again = model(images), model(shuffled(images, order))
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-12)
    own = drawn(ViT)
    assert (own(images) - own(shuffled(images, order))).abs().max() > 1e-3


def test_learned_positions_go_with_the_patches(variants):
    """Patches that take their rows of the table with them change nothing; alone they do."""
    model, images, order = drawn(variants.LearnedPositions), noise(), torch.randperm(16)
    logits, moved = model(images), shuffled(images, order)
    assert (model(moved) - logits).abs().max() > 1e-3
    table = model.patch_embedding.positions
    table.data = table.data.flatten(0, 1)[order].view_as(table)
    torch.testing.assert_close(model(moved), logits, rtol=0, atol=1e-12)


def test_the_table_is_itself_on_its_own_grid(variants):
    patches = drawn(variants.LearnedPositions).patch_embedding
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
    patches = drawn(variants.LearnedPositions).float().patch_embedding
    table = patches.positions.flatten(0, 1)[None]
    expected = layers.resample_abs_pos_embed(table, [*grid], [4, 4], num_prefix_tokens=0)[0]
    torch.testing.assert_close(patches.table(*grid), expected)
    images = noise(*grid).float()
    added = patches(images) - patches.projection(
        images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    )
    torch.testing.assert_close(added, expected.expand_as(added), rtol=1e-4, atol=1e-5)


def with_layer_norm(model, images):
    """A ViT's logits, with torch's LayerNorm before attention, network and head."""

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


def test_layer_norm_is_torchs(variants):
    model, images = drawn(variants.WithLayerNorm), noise()
    expected = with_layer_norm(model, images)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-10)
    own = drawn(ViT)
    own.load_state_dict(model.state_dict())
    assert (own(images) - expected).abs().max() > 1e-3


def stepping(build, config=CONFIG, scale=1.0, **optim):
    """A model and optimiser whose gradients are noise of the same seed."""
    torch.manual_seed(0)
    model = ViT(config, 3)
    optimizer = build(model, OptimConfig(weight_decay=0.1, layer_decay=0.5, **optim))
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn_like(parameter)
    return model, optimizer


def matrices(model):
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if name.startswith("blocks.") and isinstance(module, nn.Linear)
    }


def test_muon_orthogonalises_the_blocks_matrices(variants):
    """Against the singular vectors of the gradient, which a first step's momentum is a part of."""
    model, optimizer = stepping(variants.Muon)
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    gradients = {name: p.grad.double() for name, p in model.named_parameters()}
    optimizer.step(0.01, torch.tensor(1.0))
    parameters, found = dict(model.named_parameters()), matrices(model)
    assert len(found) == 2 * 4
    for name in found:
        lr = 0.01 * 0.5 ** (2 - int(name.split(".")[1]))  # blocks below the head
        A, B = before[name].shape
        moved = before[name] * (1 - lr * 0.1) - parameters[name].detach().double()
        update = moved / (lr * 0.2 * max(A, B) ** 0.5)
        U, _, Vh = torch.linalg.svd(gradients[name], full_matrices=False)
        inner = U.T @ update @ Vh.T
        assert (inner - inner.diag().diag()).abs().max() < 0.05  # bf16
        assert inner.diag().min() > 0.3
        assert inner.diag().max() < 1.3
        assert (update - U @ inner @ Vh).abs().max() < 0.05  # nothing beside them


def test_muon_leaves_the_rest_to_adamw(variants):
    """Clipped by one norm over all gradients."""
    (muon, optimizer), (own, other) = stepping(variants.Muon), stepping(Optimizer)
    norm, skipped = optimizer.step(0.01, torch.tensor(1.0))
    expected, _ = other.step(0.01, torch.tensor(1.0))
    assert norm == expected > 1
    assert skipped == 0
    known = dict(own.named_parameters())
    for name, parameter in muon.named_parameters():
        assert torch.equal(parameter, known[name]) == (name not in matrices(muon)), name
        assert parameter.grad is None
    buffers = [value for key, value in optimizer.state().items() if key.endswith("_buffer")]
    unclipped = sum(0.05**2 * p.numel() for name, p in known.items() if name in matrices(own))
    squares = sum(buffer.double().square().sum().item() for buffer in buffers)
    assert squares == pytest.approx(unclipped / norm.item() ** 2, rel=0.1)


@pytest.mark.parametrize("place", ["blocks.0.ffn.expand.weight", "head.bias", "loss"])
def test_muon_skips_what_is_not_finite(variants, place):
    model, optimizer = stepping(variants.Muon)
    optimizer.step(0.01, torch.tensor(1.0))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    if place != "loss":
        optimizer.named[place].grad.view(-1)[0] = float("nan")
    before = [p.detach().clone() for p in model.parameters()]
    state = {key: value.clone() for key, value in optimizer.state().items()}
    _, skipped = optimizer.step(0.01, torch.tensor(float("nan" if place == "loss" else 1)))
    assert skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert any(key.endswith("momentum_buffer") for key in state)
    assert all(torch.equal(value, state[key]) for key, value in optimizer.state().items())


TINY = "--model.dim 24 --model.depth 1 --model.num-heads 6 --model.num-kv-heads 2 --train.threads 1"
TINY += " --train.epochs 1 --train.batch-size 128 --optim.warmup-epochs 0 --train.micro-batch 128"


def test_muon_resumes_exactly(variants, tmp_path):
    class Interrupting(variants.Muon):
        count = 0

        def step(self, lr, loss):
            Interrupting.count += 1
            if Interrupting.count == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(lr, loss)

    words = TINY.split()
    assert variants.main(["muon", "digits", *words, "--out", str(tmp_path / "whole")]) == 0
    again = ["digits", *words, "--out", str(tmp_path / "cut")]
    with pytest.raises(Interrupted):
        train(*again, parts=Parts(name="muon", optimizer=Interrupting))
    assert checkpoint.latest(tmp_path / "cut" / "checkpoints", pytest.fail).step == 5
    assert variants.main(["muon", *again]) == 0
    whole, cut = (
        checkpoint.latest(tmp_path / name / "checkpoints", pytest.fail) for name in ("whole", "cut")
    )
    assert whole.step == cut.step == 12
    assert any(name.endswith("momentum_buffer") for name in whole.tensors["optimizer"])
    for kind, tensors in whole.tensors.items():
        for name, value in tensors.items():
            assert torch.equal(value, cut.tensors[kind][name]), (kind, name)
    # Weights of vitral's own model are in a weight folder, whoever trained them.
    last = storage.read_tensors(tmp_path / "cut" / "weights" / "last", "model")
    assert torch.equal(last["head.weight"], cut.tensors["model"]["head.weight"])


def test_a_full_disk_is_told(variants, capsys):
    def run():
        raise OSError(errno.ENOSPC, "No space left on device", "place")

    assert variants.exit_code("variants", run) == 1
    told = capsys.readouterr().err
    assert "No space left on device: 'place'; make room and repeat the command" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["muon"], ["adam", "digits"], ["muon", "--out", "x"]])
def test_a_mistake_is_told(variants, words, capsys):
    assert variants.main(words) == 2
    told = capsys.readouterr().err
    assert "learned-positions" in told
    assert told.count("\n") == 1
