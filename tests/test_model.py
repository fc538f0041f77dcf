"""The model against a reimplementation from the papers: softmax, complex rotation, loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from vitral import kernels
from vitral.config import ViTConfig
from vitral.errors import UserError
from vitral.model import (
    GroupedQueryAttention,
    PreNorm,
    Residual,
    RMSNorm,
    RoPE2D,
    ViT,
    count_flops,
    forward_flops,
    rotate,
    take,
)

CPU = torch.device("cpu")
HEADS = [(4, 4), (4, 2), (4, 1), (6, 2), (6, 3), (3, 1)]
VARIANTS = {
    "plain": {},
    "registers": {"num_registers": 3},
    "mean": {"pooling": "mean", "num_registers": 1},
    "mixed": {"rope": "mixed", "num_registers": 1},
    "theta": {"rope_theta": 7.0, "rope_grid": 3},
    "qk_norm": {"qk_norm": True, "rope": "mixed"},
    "layer_scale": {"layer_scale": 0.1},
    "no_bias": {"qkv_bias": False, "ffn_bias": False},
    "multi_head": {"num_kv_heads": 6, "mlp_ratio": 2.5},
    "multi_query": {"num_kv_heads": 1, "depth": 3},
}


def tiny(**changes):
    """A configuration with heads of eight channels and three query heads per group."""
    fields = {"dim": 48, "depth": 2, "num_heads": 6, "num_kv_heads": 2}
    return ViTConfig(**{**fields, "patch_size": 4, "image_size": 16, **changes})


def randomize(module):
    """Randomizes all parameters, so that no zero or one hides a term; float64, evaluation mode."""
    torch.manual_seed(1)
    for parameter in module.double().parameters():
        if parameter.ndim > 1:  # zero-mean, otherwise all tokens become equal
            nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
        else:
            nn.init.normal_(parameter, 0.8, 0.3)
    return module.eval()


def vit(**changes):
    return randomize(ViT(tiny(**changes), num_classes=5))


def images(height=16, width=16, batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)


def tokens(*shape):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def norm_by_formula(x, scale):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale


def gelu_by_formula(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def centers(count, trained):
    """Centers of `count` patches that span `trained` positions, which are numbered from 0."""
    width = trained / count
    return [width * i + width / 2 - 0.5 for i in range(count)]


def phases(rows, columns, trained, prefix, frequencies):
    """Unit complex numbers (tokens, S/2), for frequencies along x and along y."""
    fx, fy = frequencies
    angles = [torch.zeros_like(fx)] * prefix
    angles += [x * fx + y * fy for y in centers(rows, trained) for x in centers(columns, trained)]
    return torch.polar(torch.ones(len(angles), len(fx), dtype=torch.float64), torch.stack(angles))


def axial_frequencies(head_size, theta):
    """Frequencies along x and y; the first half of the pairs depends only on x, the second on y."""
    quarter = head_size // 4
    frequencies = torch.tensor([theta ** (-4 * j / head_size) for j in range(quarter)]).double()
    zeros = torch.zeros(quarter, dtype=torch.float64)
    return torch.cat([frequencies, zeros]), torch.cat([zeros, frequencies])


def rotate_complex(x, phase):
    """Multiplies the pairs (i, i + S/2) of (..., N, S), as complex numbers, by `phase`."""
    half = x.shape[-1] // 2
    rotated = torch.complex(x[..., :half], x[..., half:]) * phase
    return torch.cat([rotated.real, rotated.imag], dim=-1)


def softmax_attention(q, k, v):
    """Attention of one head; all tensors are (B, N, S)."""
    scores = torch.einsum("bns,bms->bnm", q, k) / math.sqrt(q.shape[-1])
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("bnm,bms->bns", weights, v)


def reference(model, images):
    """Logits from the weights of `model`, by loops over patches, blocks and heads."""
    config, state = model.config, model.state_dict(keep_vars=True)
    D, depth, Q, K = config.shape
    S, P = D // Q, config.patch_size
    rows, columns = images.shape[2] // P, images.shape[3] // P
    prefix, trained = 1 + config.num_registers, config.rope_grid or config.image_size // P

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    def patch(row, column):
        cut = images[:, :, row * P : (row + 1) * P, column * P : (column + 1) * P]
        return linear(cut.flatten(1), "patch_embedding.projection")

    first = [state["cls"], *state.get("registers", [])]
    sequence = [token.expand(len(images), D) for token in first]
    sequence += [patch(row, column) for row in range(rows) for column in range(columns)]
    x = torch.stack(sequence, dim=1)
    for i in range(depth):
        name = f"blocks.{i}"
        heads = linear(
            norm_by_formula(x, state[f"{name}.attention_norm.scale"]), f"{name}.attention.qkv"
        )
        heads = heads.split(S, dim=-1)
        outputs = []
        for head in range(Q):
            shared = head // (Q // K)
            q, k, v = heads[head], heads[Q + shared], heads[Q + K + shared]
            if config.qk_norm:
                q = norm_by_formula(q, state[f"{name}.attention.q_norm.scale"])
                k = norm_by_formula(k, state[f"{name}.attention.k_norm.scale"])
            frequencies = axial_frequencies(S, config.rope_theta)
            if config.rope == "mixed":
                frequencies = state["rope.mixed"][i, :, shared]
            phase = phases(rows, columns, trained, prefix, frequencies)
            q, k = rotate_complex(q, phase), rotate_complex(k, phase)
            outputs.append(softmax_attention(q, k, v))
        branch = linear(torch.cat(outputs, dim=-1), f"{name}.attention.projection")
        x = x + branch * state.get(f"{name}.attention_residual.scale", 1)
        hidden = linear(norm_by_formula(x, state[f"{name}.ffn_norm.scale"]), f"{name}.ffn.expand")
        branch = linear(gelu_by_formula(hidden), f"{name}.ffn.contract")
        x = x + branch * state.get(f"{name}.ffn_residual.scale", 1)
    x = norm_by_formula(x, state["norm.scale"])
    return linear(x[:, 0] if config.pooling == "cls" else x[:, prefix:].mean(1), "head")


@pytest.mark.parametrize("size", [(16, 16), (8, 20)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_model_equals_plain_reimplementation(variant, size):
    model = vit(**VARIANTS[variant])
    # The rotary tables are float32 by design.
    assert relative_error(model(images(*size)), reference(model, images(*size))) < 1e-6


# Attention


def attention(num_heads, num_kv_heads):
    """Attention with an identity projection, its norm, and rotary tables that rotate nothing."""
    config = tiny(dim=8 * num_heads, num_heads=num_heads, num_kv_heads=num_kv_heads)
    module, norm = randomize(GroupedQueryAttention(config)), randomize(PreNorm(config.shape.dim))
    nn.init.eye_(module.projection.weight)
    nn.init.zeros_(module.projection.bias)
    return module, norm, torch.ones(1, 7, 8), torch.zeros(1, 7, 8)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@torch.no_grad()
def test_grouped_queries_equal_repeated_keys_and_values(num_heads, num_kv_heads):
    module, norm, *tables = attention(num_heads, num_kv_heads)
    x = tokens(2, 7, 8 * num_heads)
    normed = norm_by_formula(x, norm.scale)
    heads = F.linear(normed, module.qkv.weight, module.qkv.bias).view(2, 7, -1, 8).unbind(2)
    group = num_heads // num_kv_heads
    keys = [k for k in heads[num_heads : num_heads + num_kv_heads] for _ in range(group)]
    values = [v for v in heads[num_heads + num_kv_heads :] for _ in range(group)]
    expected = [softmax_attention(*qkv) for qkv in zip(heads, keys, values, strict=False)]
    torch.testing.assert_close(module(norm(x), *tables), torch.cat(expected, dim=-1))


@torch.no_grad()
def test_attention_output_may_have_another_memory_layout(monkeypatch):
    """As with the GPU's float32 kernel, where the heads are adjacent instead of the tokens."""
    model = vit()
    expected = model(images())

    def like_a_gpu(*qkv):
        return original(*qkv).transpose(1, 2).contiguous().transpose(1, 2)

    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", like_a_gpu)
    torch.testing.assert_close(model(images()), expected)


@torch.no_grad()
def test_ungrouped_attention_equals_torch_multi_head_attention():
    module, norm, *tables = attention(4, 4)
    other = nn.MultiheadAttention(32, 4, batch_first=True).double()
    other.in_proj_weight.copy_(module.qkv.weight)
    other.in_proj_bias.copy_(module.qkv.bias)
    other.out_proj.load_state_dict(module.projection.state_dict())
    x = tokens(2, 7, 32)
    normed = norm_by_formula(x, norm.scale)
    expected, _ = other(normed, normed, normed, need_weights=False)
    torch.testing.assert_close(module(norm(x), *tables), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@torch.no_grad()
def test_grouped_queries_on_gpu(num_heads, num_kv_heads, dtype):
    module, norm, *tables = attention(num_heads, num_kv_heads)
    x = tokens(2, 7, 8 * num_heads)
    expected = module(norm(x), *tables)
    tables = [table.cuda() for table in tables]
    got = module.to("cuda", dtype)(norm.to("cuda", dtype)(x.to("cuda", dtype)), *tables)
    assert got.dtype == dtype
    assert relative_error(got.double().cpu(), expected) < (3e-2 if dtype.itemsize == 2 else 1e-3)


# Rotary positions


@pytest.mark.parametrize("rope", ["axial", "mixed"])
@pytest.mark.parametrize("grid", [(4, 4), (2, 5), (7, 1)], ids=str)
@pytest.mark.parametrize("num_registers", [0, 2])
@torch.no_grad()
def test_rotation_equals_complex_multiplication(rope, grid, num_registers):
    config = tiny(rope=rope, num_registers=num_registers, rope_theta=50.0)
    module = randomize(RoPE2D(config))
    tables = module(*grid, CPU)
    assert len(tables) == config.depth
    assert all(table.dtype == torch.float32 for pair in tables for table in pair)
    x = tokens(2, 8, 1 + num_registers + grid[0] * grid[1], 8)
    for i, (cosine, sine) in enumerate(tables):
        expected = []
        for head in range(8):  # six query heads, then two key heads
            frequencies = axial_frequencies(8, 50.0)
            if module.mixed is not None:
                frequencies = module.mixed[i, :, head // 3 if head < 6 else head - 6]
            expected.append(
                rotate_complex(x[:, head], phases(*grid, 4, 1 + num_registers, frequencies))
            )
        assert relative_error(rotate(x, cosine, sine), torch.stack(expected, dim=1)) < 1e-6


@pytest.mark.parametrize("rope", ["axial", "mixed"])
@torch.no_grad()
def test_scores_depend_only_on_the_offset(rope):
    rows, columns = 5, 4
    module = RoPE2D(tiny(rope=rope))
    if module.mixed is not None:
        nn.init.normal_(module.mixed)
    cosine, sine = module(rows, columns, CPU)[-1]
    same = tokens(8, 1, 8).expand(8, 1 + rows * columns, 8)  # one vector at all positions
    q, k = rotate(same, cosine, sine)[:, 1:].split([6, 2])
    scores = q @ k.repeat_interleave(3, dim=0).mT
    scores = scores.view(6, rows, columns, rows, columns)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(scores[:, 1:, :, 1:], scores[:, :-1, :, :-1], **close)
    torch.testing.assert_close(scores[:, :, 1:, :, 1:], scores[:, :, :-1, :, :-1], **close)
    for line in (scores[:, 0, 0, :, 0], scores[:, 0, 0, 0, :]):
        assert (line.std(dim=-1) > 1e-2).all()  # and they do depend on it, along both axes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope", ["axial", "mixed"])
@torch.no_grad()
def test_prefix_tokens_are_not_rotated(rope, dtype):
    x = tokens(2, 8, 4 + 6, 8).to(dtype)
    for cosine, sine in randomize(RoPE2D(tiny(rope=rope, num_registers=3)))(3, 2, CPU):
        rotated = rotate(x, cosine, sine)
        assert rotated.dtype == dtype
        assert rotated[:, :, :4].equal(x[:, :, :4])
        assert not torch.isclose(rotated[:, :, 4:], x[:, :, 4:]).all(-1).any()


@pytest.mark.parametrize(("count", "grid"), [(1, 1), (4, 5), (14, 14), (7, 14), (42, 14)])
def test_images_of_all_sizes_span_the_same_positions(count, grid):
    module = RoPE2D(tiny(rope_grid=grid))
    positions, finer = module.positions(count, CPU), module.positions(3 * count, CPU)
    torch.testing.assert_close(finer.view(count, 3).mean(1), positions)  # the center of its three
    assert positions.mean().item() == pytest.approx((grid - 1) / 2)
    if count == grid:
        assert positions.tolist() == list(range(grid))


def test_mixed_frequencies_start_as_axial_magnitudes_in_random_directions():
    mixed = ViT(tiny(rope="mixed", num_heads=4, num_kv_heads=4), 5).rope.mixed.detach()
    frequencies = torch.complex(mixed[:, 0], mixed[:, 1])  # (depth, K, S/2)
    magnitudes = 100.0 ** (-torch.arange(3) / 3)
    torch.testing.assert_close(frequencies.abs(), magnitudes.repeat(2).expand(2, 4, 6))
    directions = frequencies / frequencies.abs()
    torch.testing.assert_close(directions[..., :3], directions[..., :1].expand(2, 4, 3))
    torch.testing.assert_close(directions[..., 3:], directions[..., :3] * 1j)
    assert len({round(angle, 3) for angle in directions[..., 0].angle().flatten().tolist()}) == 8


# Layers


@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_by_formula(dtype, magnitude):
    module = RMSNorm(64)
    nn.init.normal_(module.scale, 1, 0.3)
    if dtype == torch.float64:
        module.double()
    x = (tokens(5, 7, 64) * magnitude).to(dtype)
    got = module(x)
    assert got.dtype == dtype
    expected = norm_by_formula(x.double(), module.scale.double())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    if dtype.itemsize == 2:  # computed in float32 and rounded once
        assert (got != expected.to(dtype)).double().mean() < 0.005
    else:
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=0)


def test_dropout_drops_its_fraction_and_keeps_the_mean():
    torch.manual_seed(0)
    residual = Residual(tiny(dim=48, dropout=0.3), skip=0)
    x = torch.ones(20_000, 2, 3)
    dropped = residual(x, None)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert dropped.mean() == pytest.approx(1, abs=0.03)
    assert residual.eval()(x, None).equal(x)


def added_by(residual, x):
    """The output for the branch x^2, and the number of images that the branch computed."""
    drawn = residual.draw(x)
    taken = take(x, drawn)
    return residual(taken**2, drawn), len(taken)


@pytest.mark.parametrize(("batch", "kept"), [(20, 14), (6, 4), (2, 1), (1, 1)])
def test_high_stochastic_depth_computes_only_the_kept_images(batch, kept):
    torch.manual_seed(0)
    residual, x = Residual(tiny(dim=48), 0.3), tokens(batch, 2, 3).requires_grad_()
    added, computed = added_by(residual, x)
    is_kept = (added != 0).all(2).all(1)
    assert computed == is_kept.sum() == kept
    expected = torch.where(is_kept[:, None, None], x**2 * batch / kept, 0)
    torch.testing.assert_close(added, expected)
    weight = tokens(3, batch, 2, 3)[2]
    gradients = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (added, expected))
    torch.testing.assert_close(*gradients)
    assert residual.eval().draw(x) is None


def test_low_stochastic_depth_masks_images_and_keeps_the_mean():
    torch.manual_seed(0)
    x = tokens(20_000, 2, 3)
    added, computed = added_by(Residual(tiny(dim=48), 0.09), x)
    assert computed == 20_000
    skipped = (added == 0).all(2).all(1)
    assert skipped.double().mean() == pytest.approx(0.09, abs=0.01)
    torch.testing.assert_close(added[~skipped], x[~skipped] ** 2 / 0.91)


def test_stochastic_depth_rises_with_depth_and_draws_each_branch_separately():
    model = ViT(tiny(depth=4, stochastic_depth=0.6), 5).train()
    torch.manual_seed(0)
    x = torch.ones(20_000, 1, 1)

    def skipped(block, name):
        residual = getattr(block, f"{name}_residual")
        return added_by(residual, x)[0].flatten() == 0

    for name in ("attention", "ffn"):
        rates = [skipped(block, name).double().mean() for block in model.blocks]
        assert rates == pytest.approx([0, 0.2, 0.4, 0.6], abs=1e-9)
    both = skipped(model.blocks[-1], "attention") & skipped(model.blocks[-1], "ffn")
    assert both.double().mean() == pytest.approx(0.36, abs=0.02)


@pytest.mark.parametrize(
    ("flag", "gone"),
    [
        ("qkv_bias", ["attention.qkv.bias"]),
        ("ffn_bias", ["ffn.expand.bias", "ffn.contract.bias"]),
    ],
)
def test_bias_flags_remove_only_their_biases(flag, gone):
    removed = {f"blocks.{i}.{name}" for i in range(2) for name in gone}
    assert ViT(tiny(**{flag: False}), 5).state_dict().keys() == vit().state_dict().keys() - removed


# The complete model


@torch.no_grad()
def test_weights_do_not_depend_on_the_resolution():
    model = vit()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first = model(images())
    for height, width in ((32, 32), (4, 4), (8, 24)):
        assert model(images(height, width)).shape == (2, 5)
        assert model.forward_features(images(height, width)).shape[1] == 1 + height * width // 16
    assert model(images()).equal(first)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(after[key].equal(value) for key, value in before.items())
    assert ViT(tiny(image_size=64), 5).state_dict().keys() == before.keys()


@pytest.mark.parametrize(
    ("shape", "expected", "got"),
    [
        ((2, 3, 18, 16), "H and W in multiples of 4 pixels", "18 by 16"),
        ((2, 3, 16, 6), "H and W in multiples of 4 pixels", "16 by 6"),
        ((2, 1, 16, 16), "(B, 3, H, W)", "(2, 1, 16, 16)"),
        ((2, 4, 16, 16), "(B, 3, H, W)", "(2, 4, 16, 16)"),
        ((3, 16, 16), "(B, 3, H, W)", "(3, 16, 16)"),
    ],
)
def test_images_of_other_shapes_are_rejected(shape, expected, got):
    with pytest.raises(UserError) as error:
        vit()(torch.zeros(shape, dtype=torch.float64))
    message = str(error.value)
    assert message.startswith("images: ")
    assert f"got {got}" in message
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_recomputes_the_same(dropout):
    results, calls = [], []
    for on in (False, True):
        model = vit(activation_checkpointing=on, dropout=dropout, stochastic_depth=dropout)
        for block in model.blocks:
            block.register_forward_pre_hook(lambda _, __, on=on: calls.append(on))
        torch.manual_seed(4)
        logits = model.train()(images())
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))
    assert (calls.count(False), calls.count(True)) == (2, 4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_those_of_the_reference(variant):
    model = vit(**VARIANTS[variant])
    gradients = []
    for run in (model, lambda x: reference(model, x)):
        model.zero_grad()
        F.cross_entropy(run(images()), torch.tensor([0, 3])).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.numel()})
    for name, got in gradients[0].items():
        assert relative_error(got, gradients[1][name]) < 1e-5, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_reaches_every_parameter(variant):
    model = vit(**VARIANTS[variant]).train()
    F.cross_entropy(model(images()), torch.tensor([0, 3])).backward()
    for name, parameter in model.named_parameters():
        if parameter.numel():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.norm() > 1e-9, name


def test_initialization_matches_the_table():
    config = ViTConfig(size="ti", depth=2, num_registers=40, qk_norm=True, layer_scale=0.1)
    torch.manual_seed(0)
    model = ViT(config, 100)
    # Truncation at two standard deviations reduces the standard deviation by this factor.
    density = math.exp(-2) / math.sqrt(2 * math.pi)
    factor = math.sqrt(1 - 4 * density / math.erf(math.sqrt(2)))
    for name, values in model.state_dict().items():
        n = values.numel()
        if name.startswith("head.") or name.endswith("bias"):
            assert (values == 0).all(), name
        elif name.endswith("residual.scale"):
            assert (values == 0.1).all(), name
        elif name.endswith("scale"):
            assert (values == 1).all(), name
        else:
            is_token = name in ("cls", "registers")
            std = 0.02 if is_token else factor / math.sqrt(values.shape[1])
            assert values.mean().abs() < 5 * std / n**0.5, name
            assert values.std() == pytest.approx(std, rel=5 / (2 * n) ** 0.5), name
            if not is_token:
                assert values.abs().max() <= 2 / math.sqrt(values.shape[1]), name
                assert values.abs().max() > 1.9 / math.sqrt(values.shape[1]), name


# Sizes

SIZES = {
    "ti": (192, 12, 3, 1),
    "s": (384, 12, 6, 2),
    "b": (768, 12, 12, 4),
    "l": (1024, 24, 16, 4),
    "h": (1280, 32, 16, 4),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("patch_size", "image_size"), [(16, None), (14, 168)])
def test_parameters_and_operations_are_as_counted_by_hand(size, patch_size, image_size):
    D, depth, Q, K = SIZES[size]
    config = ViTConfig(size=size, patch_size=patch_size)
    qkv = (Q + 2 * K) * (D // Q)
    weights = D * qkv + D * D + 2 * D * 4 * D
    block = weights + qkv + D + 4 * D + D + 2 * D
    embedding = 3 * patch_size**2 * D
    with torch.device("meta"):
        model = ViT(config, num_classes=10)
    assert model.num_parameters == embedding + 2 * D + depth * block + D + (D + 1) * 10
    patches = ((image_size or 224) // patch_size) ** 2
    N = patches + 1
    multiply_adds = patches * embedding + depth * (N * weights + 2 * N * N * D) + D * 10
    assert count_flops(config, 10, image_size) == 2 * multiply_adds
    assert count_flops(config, 10, image_size, training=True) == 2 * multiply_adds


def test_skipped_branches_are_not_counted():
    """Half of the images skip the last of three blocks, and a quarter the one before it."""
    config = tiny(depth=3, stochastic_depth=0.5)
    none = count_flops(tiny(depth=3), 5)
    block = none - count_flops(tiny(depth=2), 5)
    assert count_flops(config, 5) == none
    assert count_flops(config, 5, training=True) == none - 0.75 * block


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "swiglu", "mlp_ratio": 2.7, "num_registers": 3, "stochastic_depth": 0.5},
        {"pooling": "mean", "cls_token": False, "stochastic_depth": 0.05},
    ],
)
def test_operations_are_as_counted_by_torch(changes, training):
    config = tiny(depth=3, **changes)
    with torch.device("meta"):
        model = ViT(config, 5).train(training)
    assert count_flops(config, 5, 8, training=training) == forward_flops(model, 8)


# Kernels, compilation and precision


@pytest.mark.parametrize(("kind", "runs"), [("auto", True), ("plain", False)])
def test_custom_kernels_run_only_when_enabled(kind, runs, monkeypatch):
    monkeypatch.setattr(kernels, "has_feed_forward", lambda device: True)
    model = ViT(tiny(kernels=kind), 5)
    assert not any(block.ffn.fused for block in model.blocks)
    model.fuse(True)
    assert [block.ffn.fused for block in model.blocks] == [runs, runs]
    model.fuse(False)
    assert not any(block.ffn.fused for block in model.blocks)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # from torch 2.11 itself
@pytest.mark.parametrize("rope", ["axial", "mixed"])
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_compiles_once_without_graph_breaks(rope, checkpointing):
    """Steps after the first one compile nothing."""
    changes = {"num_registers": 1, "qk_norm": True, "layer_scale": 0.1, "pooling": "mean"}
    changes |= {"dropout": 0.1, "stochastic_depth": 0.5}
    model = vit(rope=rope, activation_checkpointing=checkpointing, **changes).train()
    torch.compiler.reset()
    # The backend "eager" would draw new random numbers when it recomputes.
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(3):
        found = []
        for forward in (model, compiled):
            torch.manual_seed(step)
            logits = forward(images(batch=4) + step)
            gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
            found.append([logits, *gradients])
        torch.testing.assert_close(*found)
    assert counter.frame_count == 1
    compiled(images(batch=6))  # also with a dynamic batch size
    assert counter.frame_count == 2


@pytest.mark.parametrize("variant", ["qk_norm", "mean"])
def test_bfloat16_stays_close(variant):
    model = vit(**VARIANTS[variant]).float()
    exact = model(images().float())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images().float())
        assert (
            model.forward_features(images().float()).dtype == torch.float32
        )  # the residual stream
    mixed.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert relative_error(mixed.float(), exact) < 0.03
    rounded = model.bfloat16()(images().bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert relative_error(rounded.float(), exact) < 0.1
