"""Converts the parameters of pretrained Vision Transformers to vitral's architecture, exactly.

vitral's blocks use RMSNorm, and most pretrained models use LayerNorm. The two are equal for
zero-mean tokens, so everything that writes to the residual stream (embedding, tokens, positions,
both branches) is centered: C subtracts the mean over the output axis. The bias of a norm moves into
the bias of the linear layer after it. A different eps becomes a factor on everything that writes to
the stream. LayerScale g after a weight W becomes g and g^-1 C(g W). Rotary channel pairs are
permuted.

All steps are in one file because they depend on each other: a change to the residual stream must
be applied to everything that writes to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitral.config import ViTConfig
from vitral.errors import UserError
from vitral.kernels import EPS

MIN_SCALE = 1e-6  # smaller LayerScale channels are folded into the weights
ACTIVATIONS = {
    "GELU": "gelu",
    "GELUTanh": "gelu-tanh",
    "GELU_tanh": "gelu-tanh",
    "QuickGELU": "quick-gelu",
}


class Norm(NamedTuple):
    """A LayerNorm or RMSNorm of a pretrained model, in float64."""

    scale: Tensor
    bias: Tensor | None
    eps: float
    centered: bool

    @property
    def factor(self) -> float:
        """The factor on the norm's input that replaces its eps with vitral's."""
        return (EPS / self.eps) ** 0.5


class Block:
    """An encoder block of a pretrained model, with uniform names."""

    def __init__(self, index: int, block: Any) -> None:
        self.place = f"blocks.{index}"
        allowed = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
        for name, child in block.named_children():
            if name not in allowed:
                raise _unsupported(f"{self.place}.{name}", child)
        self.attn, self.mlp = block.attn, block.mlp
        self.norm1 = read_norm(f"{self.place}.norm1", block.norm1)
        self.norm2 = read_norm(f"{self.place}.norm2", block.norm2)
        for owner in ("attn", "mlp"):
            for part in ("norm", "gate"):
                child = getattr(getattr(block, owner), part, None)
                if isinstance(child, nn.Module) and not isinstance(child, nn.Identity):
                    raise _unsupported(f"{self.place}.{owner}.{part}", child)
        self.scales = [_layer_scale(block, k) for k in (1, 2)]
        self.num_heads = self.attn.num_heads
        self.num_kv_heads = getattr(self.attn, "num_kv_heads", self.num_heads)
        self.qk_norms = [
            None if isinstance(norm, nn.Identity) else read_norm(f"{self.place}.attn.q_norm", norm)
            for norm in (self.attn.q_norm, self.attn.k_norm)
        ]

    def qkv(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """Returns weights (heads * S, D) and biases of queries, keys and values."""
        attn = self.attn
        if attn.qkv is None:
            layers = [attn.q_proj, attn.k_proj, attn.v_proj]
            return [_double(x.weight) for x in layers], [_optional(x.bias) for x in layers]
        weights = list(_double(attn.qkv.weight).chunk(3))
        if attn.qkv.bias is not None:
            return weights, list(_double(attn.qkv.bias).chunk(3))
        q_bias, v_bias = (getattr(attn, f"{name}_bias", None) for name in "qv")
        return weights, [_optional(q_bias), None, _optional(v_bias)]

    def ffn(self) -> tuple[str, Tensor, Tensor | None]:
        """Returns activation, weight, bias of the first linear layer; for SwiGLU gate, value."""
        mlp, kind = self.mlp, type(self.mlp).__name__
        if kind == "SwiGLU":
            layers = [mlp.fc1_g, mlp.fc1_x]
        elif kind in ("GluMlp", "Mlp") and not getattr(mlp, "gate_last", False):
            layers = [mlp.fc1]
        else:
            raise _unsupported(f"{self.place}.mlp", mlp)
        act = type(mlp.act).__name__
        if (kind != "Mlp" and act != "SiLU") or (kind == "Mlp" and act not in ACTIVATIONS):
            raise _unsupported(f"{self.place}.mlp.act", mlp.act)
        activation = "swiglu" if kind != "Mlp" else ACTIVATIONS[act]
        if act == "GELU" and getattr(mlp.act, "approximate", "none") == "tanh":
            activation = "gelu-tanh"
        weight = torch.cat([_double(layer.weight) for layer in layers])
        bias = None if layers[0].bias is None else torch.cat([_double(x.bias) for x in layers])
        return activation, weight, bias


def read_config(source: Any, blocks: list[Block]) -> ViTConfig:
    """Returns the architecture of a pretrained model.

    Raises:
        UserError: if vitral does not support a part of the model; the message names it.
    """
    if source.global_pool not in ("token", "avg") or getattr(source, "attn_pool", None) is not None:
        raise UserError(f"model: expected pooling token or avg, got {source.global_pool!r}")
    if getattr(source, "pool_include_prefix", False):
        raise UserError("model: pooling over the prefix tokens is not supported")
    norms = [isinstance(source.norm, nn.Identity), isinstance(source.fc_norm, nn.Identity)]
    if all(norms) or not any(norms) or (source.global_pool == "token" and norms[0]):
        raise UserError("model: expected one norm after the blocks")
    pooling = "cls" if source.global_pool == "token" else "mean-norm" if norms[0] else "mean"
    patch = source.patch_embed
    if patch.proj.kernel_size != patch.proj.stride or len({*patch.patch_size}) > 1:
        raise UserError("model: expected non-overlapping square patches")
    if source.pos_embed is not None and len({*patch.img_size}) > 1:
        raise UserError("model: expected learned positions of square images")
    embed_norm = "none"
    if not isinstance(patch.norm, nn.Identity):
        embed_norm = "patches"
        if read_norm("patch_embed.norm", patch.norm).centered:
            raise _unsupported("patch_embed.norm", patch.norm)
    if not isinstance(source.norm_pre, nn.Identity):
        if embed_norm != "none" or not read_norm("norm_pre", source.norm_pre).centered:
            raise _unsupported("norm_pre", source.norm_pre)
        embed_norm = "tokens"
    first, dim = blocks[0], source.embed_dim
    activation, expand, _ = first.ffn()
    hidden = len(expand) // (2 if activation == "swiglu" else 1)
    head_size = len(first.qkv()[0][0]) // first.num_heads
    if head_size * first.num_heads != dim:
        raise UserError(f"model: expected heads of {dim // first.num_heads} channels")
    kv_heads = {block.num_kv_heads for block in blocks}
    biased = [first.norm1.bias is not None or any(b is not None for b in first.qkv()[1])]
    biased += [first.norm2.bias is not None or any(x is not None for x in _ffn_biases(first))]
    return ViTConfig(
        dim=dim,
        depth=len(blocks),
        num_heads=first.num_heads,
        num_kv_heads=kv_heads.pop() if len(kv_heads) == 1 else first.num_heads,
        mlp_ratio=hidden / dim,
        patch_size=patch.patch_size[0],
        image_size=patch.img_size[0],
        num_registers=0 if source.reg_token is None else source.reg_token.shape[1],
        cls_token=source.cls_token is not None,
        pooling=pooling,
        activation=activation,  # pyright: ignore[reportArgumentType]
        positions="none" if source.pos_embed is None else "learned",
        embed_norm=embed_norm,
        norm_bias=read_norm("norm", _final_norm(source)).bias is not None,
        qk_norm=first.qk_norms[0] is not None,
        layer_scale=1e-5 if any(g is not None for b in blocks for g in b.scales) else 0.0,
        qkv_bias=biased[0],
        ffn_bias=biased[1],
        **_read_rope(source),
    )


def _read_rope(source: Any) -> dict[str, Any]:
    """Returns the kind, theta, grid and origin of the rotary positions."""
    rope = getattr(source, "rope", None)
    if rope is None:
        return {"rope": "none"}
    grid_size = source.patch_embed.grid_size[0]
    kind, offset = type(rope).__name__, float(getattr(rope, "grid_offset", 0.0))
    if kind == "RotaryEmbeddingMixed":
        return {"rope": "mixed", "rope_theta": float(rope.temperature)}
    if kind == "RotaryEmbeddingDinoV3":
        span = 4 * torch.pi
        origin = span / 2 - offset * span / grid_size
        return {"rope_theta": rope.temperature, "rope_grid": span, "rope_origin": origin}
    if kind != "RotaryEmbeddingCat" or rope.in_pixels or rope.temperature is None:
        raise _unsupported("rope", rope)
    reference = rope.ref_feat_shape[0] if rope.ref_feat_shape else grid_size
    origin = (0.5 - offset) * reference / grid_size
    return {
        "rope_theta": float(rope.temperature),
        "rope_grid": float(reference),
        "rope_origin": origin,
    }


def convert_state(
    source: Any, blocks: list[Block], config: ViTConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yields the names and values of vitral's state dict, in float64."""
    norms = [norm for block in blocks for norm in (block.norm1, block.norm2)]
    final = read_norm("norm", _final_norm(source))
    if len({(norm.eps, norm.centered) for norm in (*norms, final)}) > 1:
        raise UserError("model: expected norms with the same type and eps in all blocks")
    yield from _embedding(source, config, final)
    yield "norm.scale", final.scale
    if final.bias is not None:
        yield "norm.bias", final.bias
    if source.num_classes:
        yield "head.weight", _double(source.head.weight)
        yield "head.bias", _zeros_for(source.head.weight, source.head.bias)
    order = _rotary_order(source, config)
    if config.rope == "mixed":
        fx, fy = _double(source.rope.freqs)
        if source.rope.grid_indexing == "ij":
            fx, fy = fy, fx
        yield "rope.mixed", torch.stack([fx, fy], dim=1)
    for i, block in enumerate(blocks):
        for name, value in _block(block, config, final, order):
            yield f"blocks.{i}.{name}", value


def num_folded(blocks: list[Block]) -> int:
    """Returns the number of LayerScale channels that are folded into the weights."""
    scales = [(scale, block.norm1) for block in blocks for scale in block.scales]
    return sum(int(_is_folded(scale, norm).sum()) for scale, norm in scales if scale is not None)


def _is_folded(scale: Tensor, norm: Norm) -> Tensor:
    """Returns which channels of a LayerScale are too small to divide by, (D,)."""
    return (scale.abs() < MIN_SCALE) & norm.centered


def _embedding(source: Any, config: ViTConfig, norm: Norm) -> Iterator[tuple[str, Tensor]]:
    """Yields the patch projection, tokens, positions and their norm."""
    writes = _StreamWrite(norm.factor, norm.centered)
    first = writes  # for parameters before the norm of the embedded tokens
    if config.embed_norm == "tokens":
        own = read_norm("norm_pre", source.norm_pre)
        first = _StreamWrite(own.factor, own.centered)
        yield "embed_norm.scale", own.scale * norm.factor
        bias = torch.zeros_like(own.scale) if own.bias is None else own.bias
        yield "embed_norm.bias", bias * norm.factor
    projection = source.patch_embed.proj
    weight, bias = _double(projection.weight).flatten(1), _optional(projection.bias)
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    if config.embed_norm == "patches":
        own = read_norm("patch_embed.norm", source.patch_embed.norm)
        yield "embed_norm.scale", own.scale * norm.factor
        yield "patch_embedding.projection.weight", weight * own.factor
        yield "patch_embedding.projection.bias", bias * own.factor
    else:
        yield "patch_embedding.projection.weight", first(weight)
        yield "patch_embedding.projection.bias", first(bias)
    tokens = [x[0] for x in (source.cls_token, source.reg_token) if x is not None]
    prefix = _double(torch.cat(tokens)) if tokens else weight.new_zeros(0, len(weight))
    if source.pos_embed is not None:
        table = _double(source.pos_embed[0])
        if not source.no_embed_class:
            prefix, table = prefix + table[: len(prefix)], table[len(prefix) :]
        grid_size = config.image_size // config.patch_size
        yield "positions", first(table.view(grid_size, grid_size, -1), axis=-1)
    prefix = first(prefix, axis=-1)
    if config.cls_token:
        yield "cls", prefix[0]
    if config.num_registers:
        yield "registers", prefix[-config.num_registers :]


def _block(
    block: Block, config: ViTConfig, norm: Norm, order: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    yield "attention_norm.scale", block.norm1.scale
    yield "ffn_norm.scale", block.norm2.scale
    weights, biases = block.qkv()
    heads, parts = (config.num_heads, config.num_kv_heads, config.num_kv_heads), []
    for k, (weight, bias, count) in enumerate(zip(weights, biases, heads, strict=True)):
        assert count is not None
        own = block.num_heads if k == 0 else block.num_kv_heads
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        if block.norm1.bias is not None:
            bias = bias + weight @ block.norm1.bias
        both = torch.cat([weight, bias[:, None]], dim=1).unflatten(0, (own, -1))  # (heads, S, D+1)
        both = both.repeat_interleave(count // own, dim=0)
        inner = block.qk_norms[k] if k < 2 else None
        if inner is not None:
            if inner.bias is not None and inner.bias.abs().max() > 0:
                raise UserError(
                    f"model: {block.place}.attn: a bias in the norm of the heads is not supported"
                )
            both = _StreamWrite(inner.factor, inner.centered)(both, axis=1)
            scale = inner.scale if order is None else inner.scale[order]
            yield f"attention.{'qk'[k]}_norm.scale", scale
        if order is not None and k < 2:
            both = both[:, order]
        parts.append(both.flatten(0, 1))
    joined = torch.cat(parts)
    yield "attention.qkv.weight", joined[:, :-1]
    if config.qkv_bias:
        yield "attention.qkv.bias", joined[:, -1]
    _, expand, bias = block.ffn()
    bias = expand.new_zeros(len(expand)) if bias is None else bias
    if block.norm2.bias is not None:
        bias = bias + expand @ block.norm2.bias
    yield "ffn.expand.weight", expand
    if config.ffn_bias:
        yield "ffn.expand.bias", bias
    writes = _StreamWrite(norm.factor, norm.centered)
    for branch, layer, scale in (
        ("attention", block.attn.proj, block.scales[0]),
        ("ffn", block.mlp.fc2, block.scales[1]),
    ):
        name = "attention.projection" if branch == "attention" else "ffn.contract"
        weight, bias = _double(layer.weight), _zeros_for(layer.weight, layer.bias)
        both = torch.cat([weight, bias[:, None]], dim=1)
        if config.layer_scale:
            scale = weight.new_ones(len(weight)) if scale is None else scale
            kept = torch.where(_is_folded(scale, norm), 1.0, scale)
            yield f"{branch}_residual.scale", kept
            # Without centering, LayerScale commutes with the change to the weights.
            both = writes(both * scale[:, None]) / kept[:, None] if norm.centered else writes(both)
        else:
            both = writes(both)
        weight, bias = both[:, :-1], both[:, -1]
        yield f"{name}.weight", weight
        if name == "attention.projection" or config.ffn_bias:
            yield f"{name}.bias", bias


class _StreamWrite(NamedTuple):
    """The change to a tensor that writes to the residual stream before a norm."""

    factor: float
    centered: bool

    def __call__(self, x: Tensor, axis: int = 0) -> Tensor:
        x = x * self.factor
        return x - x.mean(axis, keepdim=True) if self.centered else x


def _rotary_order(source: Any, config: ViTConfig) -> Tensor | None:
    """Returns the source channel of each channel of a head, or None to keep the order."""
    if config.rope == "none":
        return None
    size = config.shape.dim // config.shape.num_heads
    pairs = torch.arange(size // 2)
    if config.rope == "axial" and getattr(source.rope, "grid_indexing", "ij") == "ij":
        pairs = pairs.roll(size // 4)  # the pretrained model has y first
    half = getattr(source.blocks[0].attn, "rotate_half", False)
    if half:
        return torch.cat([pairs, pairs + size // 2])
    return torch.cat([2 * pairs, 2 * pairs + 1])


def read_norm(place: str, norm: Any) -> Norm:
    """Returns a norm's parameters. Raises UserError for an unsupported norm."""
    if isinstance(norm, nn.LayerNorm):
        centered = True
    elif type(norm).__name__.startswith("RmsNorm") or isinstance(norm, nn.RMSNorm):
        centered = False
    else:
        raise _unsupported(place, norm)
    scale = torch.ones(norm.normalized_shape) if norm.weight is None else norm.weight
    eps = float(norm.eps or torch.finfo(torch.float32).eps)
    return Norm(_double(scale), _optional(getattr(norm, "bias", None)), eps, centered)


def _final_norm(source: Any) -> nn.Module:
    return source.fc_norm if isinstance(source.norm, nn.Identity) else source.norm


def _ffn_biases(block: Block) -> list[Tensor | None]:
    return [block.ffn()[2], _optional(block.mlp.fc2.bias)]


def _layer_scale(block: Any, k: int) -> Tensor | None:
    found = getattr(block, f"gamma_{k}", None)
    module = getattr(block, f"ls{k}", None)
    if module is not None and not isinstance(module, nn.Identity):
        found = module.gamma
    return _optional(found)


def _double(x: Tensor) -> Tensor:
    return x.detach().double()


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else _double(x)


def _zeros_for(weight: Tensor, bias: Tensor | None) -> Tensor:
    return _double(weight).new_zeros(len(weight)) if bias is None else _double(bias)


def _unsupported(place: str, module: nn.Module) -> UserError:
    return UserError(f"model: {place}: {type(module).__name__} is not supported")
