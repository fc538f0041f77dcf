"""The Vision Transformer, in one file because a model is read from top to bottom.

Dosovitskiy et al. 2020, "An image is worth 16x16 words", with pre-normalisation by RMSNorm, rotary
positions in two dimensions and grouped-query attention.

Sizes, in comments and docstrings alike:
    B  images in a batch        N  tokens: the prefix (CLS, registers), then the patches
    C  colour channels, 3       D  width of a token, `dim`
    H  height in pixels         Q  query heads, `num_heads`
    W  width in pixels          K  key/value heads, `num_kv_heads`
    P  side of a patch          S  size of a head, D / Q

Initialisation:
    weights of the linear layers       normal of deviation 1 / sqrt(fan-in), cut at two deviations
    biases                             0
    weights and bias of the head       0, so that training starts at the uniform prediction
    CLS token, registers               normal, standard deviation 0.02
    scale of an RMSNorm                1
    LayerScale                         `layer_scale`
    mixed rotary frequencies           the axial magnitudes, each head turned by a random angle
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitral import kernels
from vitral.config import ViTConfig
from vitral.errors import UserError

CHANNELS = 3


class ViT(nn.Module):
    """A Vision Transformer classifier.

    Args:
        config: the architecture.
        num_classes: outputs of the head; 0 for a model without a head, which returns features.

    Examples:
        >>> import torch
        >>> from vitral import ViT, ViTConfig
        >>> model = ViT(ViTConfig(size="ti"), num_classes=10)
        >>> model(torch.zeros(2, 3, 224, 160)).shape
        torch.Size([2, 10])
    """

    def __init__(self, config: ViTConfig, num_classes: int) -> None:
        super().__init__()
        dim, depth, _, _ = config.shape
        self.config = config
        self.num_classes = num_classes
        self.num_prefix = config.num_prefix
        self.patch_embedding = PatchEmbedding(config.patch_size, dim)
        self.cls = nn.Parameter(torch.empty(dim)) if config.cls_token else None
        shape = (config.num_registers, dim)
        self.registers = nn.Parameter(torch.empty(shape)) if config.num_registers else None
        grid_size = config.image_size // config.patch_size
        table = torch.empty(grid_size, grid_size, dim)
        self.positions = nn.Parameter(table) if config.positions == "learned" else None
        if config.embed_norm != "none":
            self.embed_norm = (EmbedNorm if config.embed_norm == "tokens" else RMSNorm)(dim)
        self.rope = RoPE2D(config)
        rates = [config.stochastic_depth * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(EncoderBlock(config, rate) for rate in rates)
        self.norm = RMSNorm(dim, config.norm_bias)
        self.head = Linear(dim, num_classes) if num_classes else nn.Identity()
        self.reset_parameters()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W)."""
        return self.head(self.pool(self.forward_features(images)))

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens after the last norm.

        Args:
            images: (B, C, H, W), normalised; H and W multiples of the patch size, otherwise free.

        Returns:
            (B, N, D): the CLS token, the registers, then the patches row by row.

        Raises:
            UserError: for images of another shape.
        """
        x = self.encode(*self.embed(images))
        return x if self.config.pooling == "mean-norm" else self.norm(x)

    def embed(self, images: Tensor) -> tuple[Tensor, int, int]:
        """What the first block reads, tokens (B, N, D), and the rows and columns of patches."""
        P = self.config.patch_size
        if images.ndim != 4 or images.shape[1] != CHANNELS:
            raise UserError(f"images: expected (B, {CHANNELS}, H, W), got {tuple(images.shape)}")
        rows, columns = images.shape[2] // P, images.shape[3] // P
        if (rows * P, columns * P) != tuple(images.shape[2:]):
            got = " by ".join(map(str, images.shape[2:]))
            raise UserError(f"images: expected sides that are multiples of {P} pixels, got {got}")
        x = self.patch_embedding(images)
        # Without autocast there is one dtype; with it the residual stream stays in float32.
        x = x.to(self.norm.scale.dtype)
        if self.config.embed_norm == "patches":
            x = self.embed_norm(x)
        if self.positions is not None:
            x = x + resample(self.positions, rows, columns).flatten(0, 1)
        x = self.add_prefix(x)
        if self.config.embed_norm == "tokens":
            x = self.embed_norm(x)
        return x, rows, columns

    def add_prefix(self, x: Tensor) -> Tensor:
        """Patch tokens (B, patches, D) with the CLS token and registers in front, (B, N, D)."""
        tokens = [] if self.cls is None else [self.cls[None]]
        tokens += [] if self.registers is None else [self.registers]
        # len would fix the batch size in an export
        return torch.cat([*(t.expand(x.shape[0], -1, -1) for t in tokens), x], dim=1)

    def encode(
        self, x: Tensor, rows: int, columns: int, first: int = 0, end: int | None = None
    ) -> Tensor:
        """Tokens (B, N, D) of a grid of patches, after the blocks `first` to `end`. (B, N, D)."""
        tables: list[Any] = [(None, None)] * len(self.blocks)
        if self.config.rope != "none":
            tables = self.rope(rows, columns, x.device)
        for block, (cosine, sine) in [*zip(self.blocks, tables, strict=True)][first:end]:
            if self.training and self.config.activation_checkpointing:
                x = checkpoint(block, x, cosine, sine, use_reentrant=False)
            else:
                x = block(x, cosine, sine)
        return x

    def pool(self, x: Tensor) -> Tensor:
        """What the head reads of all tokens (B, N, D): CLS, or the mean of the patches. (B, D)."""
        if self.config.pooling == "cls":
            return x[:, 0]
        mean = x[:, self.num_prefix :].mean(1)
        return self.norm(mean) if self.config.pooling == "mean-norm" else mean

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all weights, by the table at the top of this file."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                deviation = module.in_features**-0.5
                nn.init.trunc_normal_(module.weight, 0, deviation, -2 * deviation, 2 * deviation)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.scale)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Residual) and module.scale is not None:
                nn.init.constant_(module.scale, self.config.layer_scale)
        for tokens in (self.cls, self.registers, self.positions):
            if tokens is not None:
                nn.init.normal_(tokens, std=0.02)
        if isinstance(self.head, Linear):
            nn.init.zeros_(self.head.weight)
        if self.rope.mixed is not None:
            magnitudes = self.rope.axial(self.device).sum(1)  # (1, 1, S/2)
            turn = torch.rand(*self.rope.mixed[:, 0, :, :1].shape, device=self.device)
            # The second half of the pairs starts at a right angle to the first, as in axial RoPE.
            right = torch.tensor([0.0, 0.25], device=self.device)
            turn = 2 * torch.pi * (turn + right.repeat_interleave(self.rope.head_size // 4))
            self.rope.mixed[:, 0] = magnitudes * turn.cos()
            self.rope.mixed[:, 1] = magnitudes * turn.sin()

    def fuse(self, fused: bool) -> None:
        """Turns vitral's own kernels on or off, on a device that has some.

        With `kernels` plain they stay off.
        """
        fused = fused and self.config.kernels == "auto"
        gelu = self.config.activation == "gelu-tanh"
        for module in self.modules():
            if isinstance(module, Linear):
                module.fused = fused
            elif isinstance(module, FeedForward):
                module.fused = fused and gelu and kernels.has_feed_forward(self.device)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.norm.scale.device

    @property
    def num_parameters(self) -> int:
        """Number of learned numbers."""
        return sum(p.numel() for p in self.parameters())


class EncoderBlock(nn.Module):
    """x + drop(attention(norm(x))), then x + drop(ffn(norm(x))): tokens (B, N, D) to (B, N, D)."""

    def __init__(self, config: ViTConfig, skip: float) -> None:
        super().__init__()
        self.attention_norm = PreNorm(config.shape.dim)
        self.attention = GroupedQueryAttention(config)
        self.attention_residual = Residual(config, skip)
        self.ffn_norm = PreNorm(config.shape.dim)
        self.ffn = FeedForward(config)
        self.ffn_residual = Residual(config, skip)

    def forward(self, x: Tensor, cosine: Tensor | None, sine: Tensor | None) -> Tensor:
        attention, ffn, rope = self.attention, self.ffn, (cosine, sine)
        x = x + self.attention_residual(x, lambda x: attention(self.attention_norm(x), *rope))
        return x + self.ffn_residual(x, lambda x: ffn(self.ffn_norm(x)))


class Residual(nn.Module):
    """drop(branch(x)) for tokens (B, N, D): dropout, LayerScale, stochastic depth.

    Stochastic depth skips the branch for a random share of the images and scales the others up. A
    small share is drawn per image. A large share is B times the share, rounded, with at least one
    image kept; the skipped images are not computed (Oquab et al. 2023), so `forward` takes the
    branch as a function.
    """

    # Below it, gathering the others moves more bytes of a GPU's than it spares it work.
    MIN_SKIP_FRACTION = 0.1

    def __init__(self, config: ViTConfig, skip: float) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.skip = skip
        initial = torch.full((config.shape.dim,), config.layer_scale)
        self.scale = nn.Parameter(initial) if config.layer_scale else None

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        if not (self.training and self.skip):
            return self.drop(branch(x))
        B = len(x)
        if self.skip < self.MIN_SKIP_FRACTION:
            keep = torch.empty(B, 1, 1, device=x.device, dtype=x.dtype).bernoulli_(1 - self.skip)
            return self.drop(branch(x)) * (keep / (1 - self.skip))
        kept = max(1, B - round(self.skip * B))
        order = torch.randperm(B, device=x.device)
        added = self.drop(branch(kernels.take_rows(x, order, kept))) * (B / kept)
        return kernels.put_rows(added, order)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout and LayerScale; shapes stay."""
        x = F.dropout(x, self.dropout, self.training)
        return x if self.scale is None else x * self.scale


class GroupedQueryAttention(nn.Module):
    """Self-attention in which Q / K query heads share one key and value (Ainslie et al. 2023).

    `forward` takes normed tokens (B, N, D) and the block's rotary tables, and returns (B, N, D).
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim, _, self.num_heads, self.num_kv_heads = config.shape
        self.head_size = dim // self.num_heads
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        self.qkv = Linear(dim, width, bias=config.qkv_bias)
        self.projection = Linear(dim, dim)
        self.q_norm = RMSNorm(self.head_size) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_size) if config.qk_norm else nn.Identity()

    def forward(self, x: Normed, cosine: Tensor | None, sine: Tensor | None) -> Tensor:
        attended = self.attend(*self.heads(x, cosine, sine))
        return self.projection(attended.transpose(1, 2).reshape(x.tokens.shape))

    def heads(
        self, x: Normed, cosine: Tensor | None, sine: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, Q, N, S) and keys (B, K, N, S), and values (B, K, N, S)."""
        B, N, _ = x.tokens.shape
        Q, K = self.num_heads, self.num_kv_heads
        heads = self.qkv(x).view(B, N, -1, self.head_size)
        q, k, v = heads.split([Q, K, K], dim=2)  # (B, N, Q or K, S)
        q, k = self.q_norm(q), self.k_norm(k)
        if cosine is not None and sine is not None:
            # Rotated while a token's heads are adjacent, as in the product before: a compiler then
            # joins their gradients without float32 copies. Axial tables have one entry for all
            # heads, which both slices select.
            cosine, sine = cosine.transpose(0, 1), sine.transpose(0, 1)  # (N, 1 or Q + K, S)
            q = rotate(q, cosine[:, :Q], sine[:, :Q])
            k = rotate(k, cosine[:, -K:], sine[:, -K:])
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(S)) v for queries (B, Q, N, S), keys and values (B, K, N, S)."""
        B, Q, N, S = q.shape
        # Only the half-precision CUDA kernels know groups; elsewhere enable_gqa falls silently to
        # the slow kernel that writes the whole attention matrix. As no query minds another, those
        # of a group may follow each other in one sequence.
        if q.is_cuda and q.dtype.itemsize == 2:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=k.shape[1] != Q)
        groups = q.reshape(B, self.num_kv_heads, -1, S)
        return F.scaled_dot_product_attention(groups, k, v).reshape(B, Q, N, S)


class FeedForward(nn.Module):
    """Linear, GELU (or SwiGLU, with two halves: gate and value), linear.

    `forward` takes normed tokens (B, N, D) and returns (B, N, D).
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim = config.shape.dim
        hidden = round(dim * config.mlp_ratio)
        self.activation = config.activation
        width = 2 * hidden if self.activation == "swiglu" else hidden
        self.expand = Linear(dim, width, bias=config.ffn_bias)
        self.contract = Linear(hidden, dim, bias=config.ffn_bias)
        self.fused = False  # until training has tried it: see ViT.fuse

    def forward(self, x: Normed) -> Tensor:
        if self.fused and kernels.can_fuse(x.tokens):
            weight, last = self.expand.weight * x.scale, (self.contract.weight, self.contract.bias)
            return kernels.feed_forward(x.tokens, weight, self.expand.bias, *last)
        return self.contract(self.activate(self.expand(x)))

    def activate(self, x: Tensor) -> Tensor:
        """The activation, (..., F) to (..., F), or to (..., F / 2) for SwiGLU."""
        if self.activation == "swiglu":
            gate, value = x.chunk(2, dim=-1)
            return F.silu(gate) * value
        if self.activation == "quick-gelu":
            return x * torch.sigmoid(1.702 * x)
        return F.gelu(x, approximate="tanh" if self.activation == "gelu-tanh" else "none")


class PatchEmbedding(nn.Module):
    """Cuts images into square patches, flattens them and projects each linearly.

    `forward` takes images (B, C, H, W), H and W multiples of P, and gives tokens
    (B, H / P * W / P, D), row by row.
    """

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = Linear(CHANNELS * patch_size**2, dim)

    def forward(self, images: Tensor) -> Tensor:
        B, C, H, W = images.shape
        P = self.patch_size
        patches = images.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5)
        return self.projection(patches.reshape(B, (H // P) * (W // P), C * P * P))


def resample(table: Tensor, rows: int, columns: int) -> Tensor:
    """Learned positions (rows, columns, D) of another grid, bicubic and antialiased, as in timm."""
    if table.shape[:2] == (rows, columns):
        return table
    channels = table.permute(2, 0, 1)[None].float()
    size = (rows, columns)
    resized = F.interpolate(channels, size, mode="bicubic", antialias=True)[0]
    return resized.permute(1, 2, 0).to(table.dtype)


class RoPE2D(nn.Module):
    """Sines and cosines of rotary positions in x and y (Su et al. 2021; Heo et al. 2024).

    Channel pair (i, i + S/2) of a head at patch (x, y) turns by x * fx[i] + y * fy[i]. Axial: the
    first half of the pairs turns with x alone, the second with y alone, both at frequencies
    theta^(-4j/S). Mixed: fx and fy are learned, per block and per key/value head, as the queries of
    a group must turn as their key does. Prefix tokens do not turn.

    Patch i of n in a row or column is at (i + 1/2) * grid / n - origin, for n = grid at i. An
    image of any size spans what one of `image_size` does (after Fang et al. 2023, EVA-02), and no
    patch lies more than half a patch beyond what training has shown. The tables follow any grid of
    patches; nothing but mixed frequencies is in the state dict.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim, self.depth, self.num_heads, self.num_kv_heads = config.shape
        self.theta, self.grid, self.origin = config.rope_theta, config.grid, config.rope_origin
        self.head_size = dim // self.num_heads
        self.num_prefix = config.num_prefix
        shape = (self.depth, 2, self.num_kv_heads, self.head_size // 2)
        self.mixed = nn.Parameter(torch.empty(shape)) if config.rope == "mixed" else None

    def axial(self, device: torch.device | None) -> Tensor:
        """Frequencies (1, 2, 1, S/2): along x, then along y."""
        quarter = self.head_size // 4
        exponents = torch.arange(quarter, device=device, dtype=torch.float32) / quarter
        falling = self.theta**-exponents
        still = torch.zeros_like(falling)
        rows = [torch.cat([falling, still]), torch.cat([still, falling])]
        return torch.stack(rows)[None, :, None]

    def positions(self, count: int, device: torch.device) -> Tensor:
        """Those of `count` patches side by side: (count,), float32."""
        middles = torch.arange(count, device=device, dtype=torch.float32) + 0.5
        return middles * (self.grid / count) - self.origin

    def forward(self, rows: int, columns: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Cosine and signed sine of all channels for each block, as `rotate` takes them.

        Float32, (1, N, S) or, mixed, (Q + K, N, S).
        """
        x = self.positions(columns, device).expand(rows, -1).flatten()
        # Expanded: torch exports repeat_interleave by a size that varies to a wrong ONNX graph.
        y = self.positions(rows, device)[:, None].expand(-1, columns).flatten()
        frequencies = self.axial(device) if self.mixed is None else self.mixed.float()
        fx, fy = frequencies[:, 0, :, None], frequencies[:, 1, :, None]
        angles = x[:, None] * fx + y[:, None] * fy  # (1 or depth, 1 or K, patches, S/2)
        angles = F.pad(angles, (0, 0, self.num_prefix, 0))  # an angle of zero turns nothing
        if self.mixed is not None:
            group = self.num_heads // self.num_kv_heads
            angles = torch.cat([angles.repeat_interleave(group, dim=1), angles], dim=1)
        cosine, sine = angles.cos(), angles.sin()
        cosine, sine = torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)
        tables = list(zip(cosine.unbind(), sine.unbind(), strict=True))
        return tables * self.depth if len(tables) == 1 else tables


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turns the channel pairs (i, i + S/2) of heads (..., N, S); keeps shape and dtype.

    Args:
        cosine: of each channel's angle, (..., N, S).
        sine: likewise, with a minus for the first half.
    """
    exact = x.float() if x.dtype.itemsize < 4 else x
    # As two products of whole heads, not of halves: a compiler makes one kernel of each direction,
    # and a CPU takes two thirds of the time.
    return (exact * cosine + exact.roll(x.shape[-1] // 2, dims=-1) * sine).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * scale over the last axis (Zhang and Sennrich 2019).

    Computed in float32, returned in the input's dtype; shapes stay.
    """

    def __init__(self, dim: int, bias: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        # A bf16 input beside a float32 scale leaves torch's fused path and warns; so does autocast.
        exact = x if x.dtype == self.scale.dtype else x.float()
        normed = F.rms_norm(exact, self.scale.shape, self.scale, eps=kernels.EPS)
        return (normed if self.bias is None else normed + self.bias).to(x.dtype)


class EmbedNorm(RMSNorm):
    """The norm of embedded tokens in CLIP: RMSNorm with a bias, then centered over the channels.

    With zero-mean tokens RMSNorm equals LayerNorm; centering keeps the residual stream so.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x - x.mean(-1, keepdim=True)


class PreNorm(RMSNorm):
    """An RMSNorm in front of a linear layer, which applies the scale."""

    def forward(self, x: Tensor) -> Normed:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Normed(kernels.normalize(x), self.scale)


class Normed(NamedTuple):
    """The result of a norm in front of a linear layer: tokens * scale, not yet multiplied.

    The layer multiplies its weights by the scale, which are fewer than the tokens. The gradient of
    the scale then comes from that of the weights, without a sum over all tokens.
    """

    tokens: Tensor
    """x / sqrt(mean(x^2) + 1e-6), (B, N, D)."""
    scale: Tensor
    """(D,)."""


class Linear(nn.Linear):
    """x W^T + b over the last axis, (..., D) to (..., width)."""

    fused = False  # until training turns it on: see ViT.fuse

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor | Normed
    ) -> Tensor:
        """Takes tokens, or a norm's result, whose scale is multiplied into the weights."""
        x, weight = (x.tokens, self.weight * x.scale) if isinstance(x, Normed) else (x, self.weight)
        # Only in training, so that a validation gives what the same weights give everywhere.
        by_onednn = self.training and self.fused and kernels.can_train_by_onednn(x)
        return (kernels.onednn_linear if by_onednn else F.linear)(x, weight, self.bias)


def matrices(module: nn.Module) -> set[Tensor]:
    """The weights of its linear layers, which alone decay."""
    return {m.weight for m in module.modules() if isinstance(m, nn.Linear)}


def count_flops(
    config: ViTConfig,
    num_classes: int,
    image_size: int | None = None,
    *,
    training: bool = False,
    build: Callable[[ViTConfig, int], nn.Module] = ViT,
) -> float:
    """Floating-point operations of one image's forward pass: matrix products, two a multiply-add.

    A training step takes three times as many. In training they are fewer than in evaluation where
    stochastic depth skips work. `build` makes another model than a ViT of the same settings.
    """
    with torch.device("meta"):
        model = build(config, num_classes).train(training)
    return forward_flops(model, image_size or config.image_size)


def forward_flops(model: nn.Module, image_size: int) -> float:
    """`count_flops` of any model on the meta device, as torch counts it, in the mode that it is in.

    Of a model in training they are the mean of a batch of 1,024.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    images, counter = 1024 if model.training else 1, FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(images, CHANNELS, image_size, image_size, device="meta"))
    return counter.get_total_flops() / images
