"""The model against references written from the papers: plain softmax, complex rotation, loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitral.config import PRESETS, UserError, ViTConfig
from vitral.model import (
    Branch,
    EncoderBlock,
    FeedForward,
    GroupedQueryAttention,
    PatchEmbedding,
    RMSNorm,
    RoPE2D,
    ViT,
    count_flops,
    rotate,
)

CPU = torch.device("cpu")
HEADS = [(4, 4), (4, 2), (4, 1), (6, 2), (6, 3), (3, 1)]
VARIANTS = {
    "plain": {},
    "registers": {"num_registers": 3},
    "mean": {"pooling": "mean", "num_registers": 1},
    "mixed": {"rope": "mixed", "num_registers": 1},
    "theta": {"rope_theta": 7.0},
    "qk_norm": {"qk_norm": True, "rope": "mixed"},
    "layer_scale": {"layer_scale": 0.1},
    "no_bias": {"qkv_bias": False, "ffn_bias": False},
    "multi_head": {"num_kv_heads": 6, "mlp_ratio": 2.5},
    "multi_query": {"num_kv_heads": 1, "depth": 3},
}


def tiny(**changes):
    """Heads of eight channels, three query heads a group."""
    fields = {"dim": 48, "depth": 2, "num_heads": 6, "num_kv_heads": 2}
    return ViTConfig(**{**fields, "patch_size": 4, "image_size": 16, **changes})


def stir(module):
    """`module` in float64 and in evaluation, all parameters random: no zero hides a term."""
    torch.manual_seed(1)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, 0.2, 0.5 / max(1, parameter.shape[-1]) ** 0.5)
    return module.eval()


def vit(**changes):
    return stir(ViT(tiny(**changes), num_classes=5))


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


def phases(rows, columns, prefix, frequencies):
    """Unit complex numbers (tokens, S/2); `frequencies` are those along x and those along y."""
    fx, fy = frequencies
    angles = [torch.zeros_like(fx)] * prefix
    angles += [x * fx + y * fy for y in range(rows) for x in range(columns)]
    return torch.polar(torch.ones(len(angles), len(fx), dtype=torch.float64), torch.stack(angles))


def axial_frequencies(head_size, theta):
    """The first half of the pairs turns with x alone, the second with y alone."""
    quarter = head_size // 4
    falling = torch.tensor([theta ** (-4 * j / head_size) for j in range(quarter)]).double()
    still = torch.zeros(quarter, dtype=torch.float64)
    return torch.cat([falling, still]), torch.cat([still, falling])


def turn(x, phase):
    """Multiplies the pairs (i, i + S/2) of (..., N, S), read as complex numbers, by `phase`."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * phase
    return torch.cat([turned.real, turned.imag], dim=-1)


def softmax_attention(q, k, v):
    """One head, (B, N, S) each."""
    scores = torch.einsum("bns,bms->bnm", q, k) / math.sqrt(q.shape[-1])
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("bnm,bms->bns", weights, v)


def reference(model, images):
    """Logits from the weights of `model`, image by patch by block by head."""
    config, state = model.config, model.state_dict()
    D, depth, Q, K = config.shape
    S, P = D // Q, config.patch_size
    rows, columns = images.shape[2] // P, images.shape[3] // P
    prefix = 1 + config.num_registers

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    def patch(row, column):
        cut = images[:, :, row * P : (row + 1) * P, column * P : (column + 1) * P]
        return linear(cut.flatten(1), "patch_embedding.projection")

    first = [state["cls"], *state["registers"]]
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
            phase = phases(rows, columns, prefix, frequencies)
            outputs.append(softmax_attention(turn(q, phase), turn(k, phase), v))
        branch = linear(torch.cat(outputs, dim=-1), f"{name}.attention.projection")
        x = x + branch * state.get(f"{name}.attention_drop.scale", 1)
        hidden = linear(norm_by_formula(x, state[f"{name}.ffn_norm.scale"]), f"{name}.ffn.expand")
        branch = linear(gelu_by_formula(hidden), f"{name}.ffn.contract")
        x = x + branch * state.get(f"{name}.ffn_drop.scale", 1)
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
    """Heads of eight channels, output projection the identity, nothing turned."""
    config = tiny(dim=8 * num_heads, num_heads=num_heads, num_kv_heads=num_kv_heads)
    module = stir(GroupedQueryAttention(config))
    nn.init.eye_(module.projection.weight)
    nn.init.zeros_(module.projection.bias)
    return module, torch.ones(1, 7, 4), torch.zeros(1, 7, 4)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@torch.no_grad()
def test_grouped_queries_equal_repeated_keys_and_values(num_heads, num_kv_heads):
    module, cosine, sine = attention(num_heads, num_kv_heads)
    x = tokens(2, 7, 8 * num_heads)
    heads = F.linear(x, module.qkv.weight, module.qkv.bias).view(2, 7, -1, 8).unbind(2)
    group = num_heads // num_kv_heads
    keys = [k for k in heads[num_heads : num_heads + num_kv_heads] for _ in range(group)]
    values = [v for v in heads[num_heads + num_kv_heads :] for _ in range(group)]
    expected = [softmax_attention(*qkv) for qkv in zip(heads, keys, values, strict=False)]
    torch.testing.assert_close(module(x, cosine, sine), torch.cat(expected, dim=-1))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@torch.no_grad()
def test_query_heads_listen_to_their_groups_key_value_head_alone(num_heads, num_kv_heads):
    module, cosine, sine = attention(num_heads, num_kv_heads)
    x = tokens(2, 7, 8 * num_heads)
    before = module(x, cosine, sine).split(8, dim=-1)
    for shared in range(num_kv_heads):
        changed = [num_heads + shared, num_heads + num_kv_heads + shared]
        weights = module.qkv.weight.view(-1, 8, 8 * num_heads)
        kept = weights.clone()
        weights[changed] += 1
        after = module(x, cosine, sine).split(8, dim=-1)
        weights.copy_(kept)
        heard = {h for h, (a, b) in enumerate(zip(after, before, strict=True)) if not a.equal(b)}
        group = num_heads // num_kv_heads
        assert heard == set(range(shared * group, (shared + 1) * group))


@torch.no_grad()
def test_equal_heads_make_torchs_multi_head_attention():
    module, cosine, sine = attention(4, 4)
    other = nn.MultiheadAttention(32, 4, batch_first=True).double()
    other.in_proj_weight.copy_(module.qkv.weight)
    other.in_proj_bias.copy_(module.qkv.bias)
    other.out_proj.load_state_dict(module.projection.state_dict())
    x = tokens(2, 7, 32)
    expected, _ = other(x, x, x, need_weights=False)
    torch.testing.assert_close(module(x, cosine, sine), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@torch.no_grad()
def test_grouped_queries_on_gpu(num_heads, num_kv_heads, dtype):
    module, cosine, sine = attention(num_heads, num_kv_heads)
    x = tokens(2, 7, 8 * num_heads)
    expected = module(x, cosine, sine)
    got = module.to("cuda", dtype)(x.to("cuda", dtype), cosine.cuda(), sine.cuda())
    assert got.dtype == dtype
    assert relative_error(got.double().cpu(), expected) < (3e-2 if dtype.itemsize == 2 else 1e-3)


# Rotary positions


@pytest.mark.parametrize("rope", ["axial", "mixed"])
@pytest.mark.parametrize("grid", [(4, 4), (2, 5), (7, 1)], ids=str)
@pytest.mark.parametrize("num_registers", [0, 2])
@torch.no_grad()
def test_rotation_equals_complex_multiplication(rope, grid, num_registers):
    config = tiny(rope=rope, num_registers=num_registers, rope_theta=50.0)
    module = stir(RoPE2D(config))
    tables = module(*grid, CPU)
    assert len(tables) == config.depth
    assert all(table.dtype == torch.float32 for pair in tables for table in pair)
    x = tokens(2, 8, 1 + num_registers + grid[0] * grid[1], 8)
    for i, (cosine, sine) in enumerate(tables):
        expected = []
        for head in range(8):  # six of queries, then two of keys
            frequencies = axial_frequencies(8, 50.0)
            if module.mixed is not None:
                frequencies = module.mixed[i, :, head // 3 if head < 6 else head - 6]
            expected.append(turn(x[:, head], phases(*grid, 1 + num_registers, frequencies)))
        assert relative_error(rotate(x, cosine, sine), torch.stack(expected, dim=1)) < 1e-6


def test_first_half_of_pairs_turns_with_x_and_second_with_y():
    cosine, sine = RoPE2D(tiny())(2, 3, CPU)[0]
    angles = torch.atan2(sine, cosine)[0, 1:].view(2, 3, 2, 2)  # (row, column, half, frequency)
    x = torch.arange(3.0)[:, None] * torch.tensor([1.0, 0.1])
    y = torch.arange(2.0)[:, None] * torch.tensor([1.0, 0.1])
    torch.testing.assert_close(angles[:, :, 0], x.expand(2, 3, 2))
    torch.testing.assert_close(angles[:, :, 1], y[:, None].expand(2, 3, 2))


@pytest.mark.parametrize("rope", ["axial", "mixed"])
@torch.no_grad()
def test_scores_depend_on_the_offset_alone(rope):
    rows, columns = 5, 4
    module = RoPE2D(tiny(rope=rope))
    if module.mixed is not None:
        nn.init.normal_(module.mixed)
    cosine, sine = module(rows, columns, CPU)[-1]
    same = tokens(8, 1, 8).expand(8, 1 + rows * columns, 8)  # one vector at every place
    q, k = rotate(same, cosine, sine)[:, 1:].split([6, 2])
    scores = q @ k.repeat_interleave(3, dim=0).mT
    scores = scores.view(6, rows, columns, rows, columns)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(scores[:, 1:, :, 1:], scores[:, :-1, :, :-1], **close)
    torch.testing.assert_close(scores[:, :, 1:, :, 1:], scores[:, :, :-1, :, :-1], **close)
    for line in (scores[:, 0, 0, :, 0], scores[:, 0, 0, 0, :]):
        assert (line.std(dim=-1) > 1e-2).all()  # and on it in both directions


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope", ["axial", "mixed"])
@torch.no_grad()
def test_prefix_tokens_are_exactly_untouched(rope, dtype):
    x = tokens(2, 8, 4 + 6, 8).to(dtype)
    for cosine, sine in RoPE2D(tiny(rope=rope, num_registers=3))(3, 2, CPU):
        turned = rotate(x, cosine, sine)
        assert turned.dtype == dtype
        assert turned[:, :, :5].equal(x[:, :, :5])  # and the patch in the corner
        assert not turned[:, :, 5:].equal(x[:, :, 5:])


@pytest.mark.parametrize(("rope", "learned"), [("axial", []), ("mixed", ["rope.mixed"])])
def test_only_mixed_frequencies_are_kept(rope, learned):
    assert [key for key in ViT(tiny(rope=rope), 5).state_dict() if "rope" in key] == learned


def test_mixed_frequencies_start_as_axial_magnitudes_turned_by_head():
    mixed = ViT(tiny(rope="mixed", num_heads=4, num_kv_heads=4), 5).rope.mixed.detach()
    frequencies = torch.complex(mixed[:, 0], mixed[:, 1])  # (depth, K, S/2)
    falling = 100.0 ** (-torch.arange(3) / 3)
    torch.testing.assert_close(frequencies.abs(), falling.repeat(2).expand(2, 4, 6))
    directions = frequencies / frequencies.abs()
    torch.testing.assert_close(directions[..., :3], directions[..., :1].expand(2, 4, 3))
    torch.testing.assert_close(directions[..., 3:], directions[..., :3] * 1j)
    assert len({round(angle, 3) for angle in directions[..., 0].angle().flatten().tolist()}) == 8


# Parts


@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_by_formula(dtype, magnitude):
    module = RMSNorm(64)
    assert [(name, *p.shape) for name, p in module.named_parameters()] == [("scale", 64)]
    assert (module.scale == 1).all()
    nn.init.normal_(module.scale, 1, 0.3)
    if dtype == torch.float64:
        module.double()
    x = (tokens(5, 7, 64) * magnitude).to(dtype)
    got = module(x)
    assert got.dtype == dtype
    expected = norm_by_formula(x.double(), module.scale.double())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    if dtype.itemsize == 2:  # float32 inside: only the last rounding is seen
        assert (got != expected.to(dtype)).double().mean() < 0.005
    else:
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=0)


def test_rms_norm_does_not_overflow_in_half_precision():
    assert RMSNorm(8)(torch.full((1, 8), 1000.0, dtype=torch.float16)).eq(1).all()


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (12, 4)], ids=str)
def test_patch_embedding_equals_strided_convolution(size):
    module = stir(PatchEmbedding(4, 10))
    kernel = module.projection.weight.view(10, 3, 4, 4)
    convolved = F.conv2d(images(*size), kernel, module.projection.bias, stride=4)
    torch.testing.assert_close(module(images(*size)), convolved.flatten(2).mT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mlp_ratio", [4.0, 1.5])
def test_feed_forward_by_formula(bias, mlp_ratio):
    module = stir(FeedForward(tiny(ffn_bias=bias, mlp_ratio=mlp_ratio)))
    state = module.state_dict()
    assert state["expand.weight"].shape == (48 * mlp_ratio, 48)
    x = tokens(2, 3, 48)
    hidden = x @ state["expand.weight"].T + state.get("expand.bias", 0)
    expected = gelu_by_formula(hidden) @ state["contract.weight"].T + state.get("contract.bias", 0)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("training", [False, True])
def test_block_is_attention_then_feed_forward_each_added_after_its_norm(training):
    config = tiny(dropout=0.3, layer_scale=0.1)
    block = stir(EncoderBlock(config, skip=0.5)).train(training)
    cosine, sine = RoPE2D(config)(2, 2, CPU)[0]
    x = tokens(3, 5, 48)
    torch.manual_seed(3)
    got = block(x, cosine, sine)
    torch.manual_seed(3)
    y = x + block.attention_drop(block.attention(block.attention_norm(x), cosine, sine))
    assert got.equal(y + block.ffn_drop(block.ffn(block.ffn_norm(y))))


@pytest.mark.parametrize(
    ("dropout", "skip"), [(0.3, 0.0), (0.0, 0.3)], ids=["dropout", "stochastic depth"]
)
def test_branches_drop_their_share_and_keep_the_mean(dropout, skip):
    torch.manual_seed(0)
    branch = Branch(tiny(dim=48, dropout=dropout), skip)
    x = torch.ones(20_000, 2, 3)
    dropped = branch(x)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert dropped.mean() == pytest.approx(1, abs=0.03)
    spread = dropped.amax(dim=(1, 2)) - dropped.amin(dim=(1, 2))
    assert (spread == 0).all() == (skip > 0)  # whole images
    assert branch.eval()(x).equal(x)


def test_stochastic_depth_rises_with_depth_and_draws_each_branch_anew():
    model = ViT(tiny(depth=4, stochastic_depth=0.6), 5).train()
    torch.manual_seed(0)
    x = torch.ones(20_000, 1, 1)
    for name in ("attention_drop", "ffn_drop"):
        shares = [(getattr(block, name)(x) == 0).double().mean() for block in model.blocks]
        assert shares == pytest.approx([0, 0.2, 0.4, 0.6], abs=0.02)
    block = model.blocks[-1]
    both = (block.attention_drop(x) == 0) & (block.ffn_drop(x) == 0)
    assert both.double().mean() == pytest.approx(0.36, abs=0.02)


@torch.no_grad()
def test_layer_scale_multiplies_both_branches():
    model = ViT(tiny(layer_scale=1e-3), 5)
    scales = {k: v for k, v in model.state_dict().items() if k.endswith("drop.scale")}
    assert len(scales) == 4
    assert all(s.equal(torch.full((48,), 1e-3)) for s in scales.values())
    branch = model.blocks[0].ffn_drop
    branch.scale.copy_(torch.arange(48))
    assert branch(torch.ones(2, 3, 48)).equal(torch.arange(48.0).expand(2, 3, 48))
    assert not [k for k in ViT(tiny(), 5).state_dict() if k.endswith("drop.scale")]


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"qkv_bias": False}, ["attention.qkv.bias"]),
        ({"ffn_bias": False}, ["ffn.expand.bias", "ffn.contract.bias"]),
    ],
)
def test_bias_flags_remove_their_biases_alone(changes, gone):
    kept = ViT(tiny(), 5).state_dict().keys()
    removed = {f"blocks.{i}.{name}" for i in range(2) for name in gone}
    assert ViT(tiny(**changes), 5).state_dict().keys() == kept - removed


# The whole


@pytest.mark.parametrize("num_registers", [0, 3])
@torch.no_grad()
def test_tokens_are_class_then_registers_then_patches(num_registers):
    model = vit(num_registers=num_registers)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features = model.forward_features(images(8, 12))
    assert features.shape == (2, 1 + num_registers + 6, 48)
    for sequence in seen[0]:
        assert sequence[0].equal(model.cls)
        assert sequence[1 : 1 + num_registers].equal(model.registers)
    assert seen[0][:, 1 + num_registers :].equal(model.patch_embedding(images(8, 12)))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@torch.no_grad()
def test_head_reads_the_class_token_or_the_mean_of_the_patches(pooling):
    model = vit(pooling=pooling, num_registers=2)
    features = model.forward_features(images())
    # norm is the last step: root mean square one, once its scale is taken out
    root = (features / model.norm.scale).square().mean(-1).sqrt()
    torch.testing.assert_close(root, torch.ones_like(root), rtol=1e-4, atol=0)
    pooled = features[:, 0] if pooling == "cls" else features[:, 3:].mean(1)
    torch.testing.assert_close(model(images()), model.head(pooled))


@torch.no_grad()
def test_another_resolution_needs_no_other_weights():
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
        ((2, 3, 18, 16), "multiples of 4", "18 by 16"),
        ((2, 3, 16, 6), "multiples of 4", "16 by 6"),
        ((2, 1, 16, 16), "(B, 3, H, W)", "(2, 1, 16, 16)"),
        ((2, 4, 16, 16), "(B, 3, H, W)", "(2, 4, 16, 16)"),
        ((3, 16, 16), "(B, 3, H, W)", "(3, 16, 16)"),
    ],
)
def test_other_images_are_refused(shape, expected, got):
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
def test_gradient_reaches_every_parameter(variant):
    model = vit(**VARIANTS[variant]).train()
    F.cross_entropy(model(images()), torch.tensor([0, 3])).backward()
    for name, parameter in model.named_parameters():
        if parameter.numel():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.norm() > 1e-9, name


def test_initialisation_is_that_of_the_table():
    config = ViTConfig(size="ti", depth=2, num_registers=40, qk_norm=True, layer_scale=0.1)
    torch.manual_seed(0)
    model = ViT(config, 100)
    # A normal cut at two deviations keeps this share of its deviation.
    density = math.exp(-2) / math.sqrt(2 * math.pi)
    cut = math.sqrt(1 - 4 * density / math.erf(math.sqrt(2)))
    for name, values in model.state_dict().items():
        n = values.numel()
        if name.startswith("head.") or name.endswith("bias"):
            assert (values == 0).all(), name
        elif name.endswith("drop.scale"):
            assert (values == 0.1).all(), name
        elif name.endswith("scale"):
            assert (values == 1).all(), name
        else:
            is_token = name in ("cls", "registers")
            deviation = 0.02 if is_token else cut / math.sqrt(values.shape[1])
            assert values.mean().abs() < 5 * deviation / n**0.5, name
            assert values.std() == pytest.approx(deviation, rel=5 / (2 * n) ** 0.5), name
            if not is_token:
                assert values.abs().max() <= 2 / math.sqrt(values.shape[1]), name
                assert values.abs().max() > 1.9 / math.sqrt(values.shape[1]), name


def test_fresh_model_predicts_uniformly_and_follows_the_seed():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = ViT(tiny(rope="mixed", num_registers=1), 5)
        assert (model(images().float()) == 0).all()
        states.append(model.state_dict())
    first, same, other = states
    assert all(first[key].equal(same[key]) for key in first)
    drawn = [key for key in first if not first[key].equal(other[key])]
    weights = {k for k in first if k.endswith("weight") and k != "head.weight"}
    assert set(drawn) == weights | {"cls", "registers", "rope.mixed"}


# Sizes

SIZES = {
    "ti": (192, 12, 3, 1),
    "s": (384, 12, 6, 2),
    "b": (768, 12, 12, 4),
    "l": (1024, 24, 16, 4),
    "h": (1280, 32, 16, 4),
}


def test_presets():
    assert PRESETS == SIZES


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch_size", [14, 16])
def test_number_of_parameters(size, patch_size):
    D, depth, Q, K = SIZES[size]
    embedding = 3 * patch_size**2 * D + D + D
    qkv = (D + 1) * (Q + 2 * K) * (D // Q)
    ffn = (D + 1) * 4 * D + (4 * D + 1) * D
    block = D + qkv + (D + 1) * D + D + ffn
    with torch.device("meta"):
        model = ViT(ViTConfig(size=size, patch_size=patch_size), num_classes=1000)
    assert model.num_parameters == embedding + depth * block + D + (D + 1) * 1000


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [None, 160])
def test_flops(size, side):
    D, depth, Q, K = SIZES[size]
    patches = ((side or 224) // 16) ** 2
    N = patches + 1
    qkv = N * D * (Q + 2 * K) * (D // Q)
    block = qkv + 2 * N * N * D + N * D * D + 2 * N * D * 4 * D
    multiply_adds = patches * 3 * 16**2 * D + depth * block + D * 10
    assert count_flops(ViTConfig(size=size), 10, side) == 2 * multiply_adds


# What surrounds the model


@pytest.mark.parametrize(("rope", "backend"), [("axial", "eager"), ("mixed", "aot_eager")])
def test_compiles_into_one_graph(rope, backend):
    changes = {"num_registers": 1, "qk_norm": True, "layer_scale": 0.1, "pooling": "mean"}
    changes |= {"dropout": 0.1, "stochastic_depth": 0.2, "activation_checkpointing": True}
    model = vit(rope=rope, **changes)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), model(images()))
    F.cross_entropy(compiled.train()(images()), torch.tensor([0, 3])).backward()
    assert model.cls.grad.norm() > 0


@pytest.mark.parametrize("variant", ["mixed", "qk_norm", "layer_scale", "mean"])
def test_bfloat16_stays_close(variant):
    model = vit(**VARIANTS[variant]).float()
    exact = model(images().float())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images().float())
    mixed.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert relative_error(mixed.float(), exact) < 0.03
    rounded = model.bfloat16()(images().bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert relative_error(rounded.float(), exact) < 0.1


def test_residual_stream_stays_in_float32_under_autocast():
    model = vit().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.forward_features(images().float()).dtype == torch.float32
