"""The Vision Transformer, in one file because a model is easiest to read from top to bottom.

A ViT (Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words") with pre-normalization (RMSNorm),
two-dimensional rotary position embedding and grouped-query attention.

Shapes in comments and docstrings:
    B  batch size                  N  tokens: prefix (CLS, registers), then patches
    C  color channels, 3           D  embedding dimension, `dim`
    H  image height in pixels      Q  query heads, `num_heads`
    W  image width in pixels       K  key/value heads, `num_kv_heads`
    P  patch size in pixels        S  head size, D / Q

Initialization:
    weights of linear layers       normal, standard deviation 1 / sqrt(fan-in), truncated at two
                                   standard deviations
    biases                         0
    weights and bias of the head   0, so that training starts from the uniform prediction
    CLS token, registers           normal, standard deviation 0.02
    learned positions              normal, standard deviation 0.02
    scale of an RMSNorm            1
    LayerScale                     `layer_scale`
    mixed rotary frequencies       axial magnitudes, in a random direction for each head
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitral import kernels
from vitral.config import ViTConfig
from vitral.errors import UserError

CHANNELS = 3
BATCH = 1024  # images over which the operations that stochastic depth skips are averaged


class ViT(nn.Module):
    """A Vision Transformer classifier.

    Args:
        config: the architecture.
        num_classes: number of classes; 0 for a model without a head, which returns features.

    Examples:
        >>> import torch
        >>> from vitral import ViT, ViTConfig
        >>> model = ViT(ViTConfig(size="ti"), num_classes=10)
        >>> model(torch.zeros(2, 3, 224, 160)).shape
        torch.Size([2, 10])
    """

    def __init__(self, config: ViTConfig, num_classes: int) -> None:
        super().__init__()
        dim = config.shape.dim
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
        self.blocks = nn.ModuleList(EncoderBlock(config, rate) for rate in skip_rates(config))
        self.norm = RMSNorm(dim, config.norm_bias)
        self.head = Linear(dim, num_classes) if num_classes else nn.Identity()
        self.reset_parameters()

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits (B, num_classes) of images (B, C, H, W)."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Returns the head's input (B, D) for images (B, C, H, W)."""
        return self.pool(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Returns all tokens after the last norm.

        Args:
            images: (B, C, H, W), normalized; H and W can be any multiples of the patch size.

        Returns:
            (B, N, D): the CLS token, the registers, then the patches row by row.

        Raises:
            UserError: if the images have a different shape.
        """
        x = self.encode(*self.embed(images))
        return x if self.config.pooling == "mean-norm" else self.norm(x)

    def embed(self, images: Tensor) -> tuple[Tensor, int, int]:
        """Returns the first block's input (B, N, D) and the number of patch rows and columns."""
        P = self.config.patch_size
        if images.ndim != 4 or images.shape[1] != CHANNELS:
            raise UserError(f"images: expected (B, {CHANNELS}, H, W), got {tuple(images.shape)}")
        rows, columns = images.shape[2] // P, images.shape[3] // P
        if (rows * P, columns * P) != tuple(images.shape[2:]):
            got = " by ".join(map(str, images.shape[2:]))
            raise UserError(f"images: expected H and W in multiples of {P} pixels, got {got}")
        x = self.patch_embedding(images)
        # Under autocast the residual stream stays in float32; otherwise this changes nothing.
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
        """Prepends the CLS token and registers to patch tokens (B, patches, D): (B, N, D)."""
        tokens = [] if self.cls is None else [self.cls[None]]
        tokens += [] if self.registers is None else [self.registers]
        # len(x) would make the batch size a constant in an export
        return torch.cat([*(t.expand(x.shape[0], -1, -1) for t in tokens), x], dim=1)

    def encode(
        self, x: Tensor, rows: int, columns: int, first: int = 0, end: int | None = None
    ) -> Tensor:
        """Applies blocks[first:end] to tokens (B, N, D) of a patch grid; returns (B, N, D)."""
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
        """Pools tokens (B, N, D) into the head's input (B, D): CLS token or patch mean."""
        if self.config.pooling == "cls":
            return x[:, 0]
        mean = x[:, self.num_prefix :].mean(1)
        return self.norm(mean) if self.config.pooling == "mean-norm" else mean

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initializes all parameters as in the table at the top of this file."""
        if self.device.type == "meta":  # no values, and torch imports torch.compile to draw them
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                nn.init.trunc_normal_(module.weight, 0, std, -2 * std, 2 * std)
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
            turns = torch.rand(*self.rope.mixed[:, 0, :, :1].shape, device=self.device)
            # The second half of the pairs is perpendicular to the first, as in axial RoPE.
            offsets = torch.tensor([0.0, 0.25], device=self.device)
            angles = 2 * torch.pi * (turns + offsets.repeat_interleave(self.rope.head_size // 4))
            self.rope.mixed[:, 0] = magnitudes * angles.cos()
            self.rope.mixed[:, 1] = magnitudes * angles.sin()

    def fuse(self, fused: bool) -> None:
        """Enables or disables the custom kernels, on a device that supports them.

        They stay disabled if `kernels` is "plain".
        """
        fused = fused and self.config.kernels == "auto"
        gelu = self.config.activation == "gelu-tanh"
        for module in self.modules():
            if isinstance(module, Linear):
                module.fused = fused and kernels.has_onednn()
            elif isinstance(module, FeedForward):
                module.fused = fused and gelu and kernels.has_feed_forward(self.device)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.norm.scale.device

    @property
    def num_parameters(self) -> int:
        """The number of parameters."""
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
        self.compiled: Callable[..., Tensor] | None = None  # see compile_blocks

    def forward(self, x: Tensor, cosine: Tensor | None, sine: Tensor | None) -> Tensor:
        first = self.attention_residual.draw(x)
        if self.compiled is not None:
            return self.compiled(self, x, first, self.ffn_residual.draw(x), cosine, sine)
        x = self.attend(x, first, cosine, sine)
        return self.feed_forward(x, self.ffn_residual.draw(x))

    def apply_drawn(
        self, x: Tensor, first: Drawn, second: Drawn, cosine: Tensor | None, sine: Tensor | None
    ) -> Tensor:
        """Applies the block with the images drawn for both branches; for compilation."""
        return self.feed_forward(self.attend(x, first, cosine, sine), second)

    def attend(self, x: Tensor, drawn: Drawn, cosine: Tensor | None, sine: Tensor | None) -> Tensor:
        """Applies the first half of the block; keeps the shape."""
        normed = self.attention_norm(take(x, drawn))
        return x + self.attention_residual(self.attention(normed, cosine, sine), drawn)

    def feed_forward(self, x: Tensor, drawn: Drawn) -> Tensor:
        """Applies the second half of the block; keeps the shape."""
        return x + self.ffn_residual(self.ffn(self.ffn_norm(take(x, drawn))), drawn)


def compile_blocks(module: nn.Module) -> int:
    """Compiles the encoder blocks in a module, in place; returns their number.

    All blocks share the compiled code. It is compiled once for each shape of the tokens and kind of
    stochastic depth, so compilation takes as long for a deep model as for a shallow one.
    """
    blocks = [block for block in module.modules() if isinstance(block, EncoderBlock)]
    for block in blocks:
        block.compiled = _compiled_block()
    return len(blocks)


@functools.cache
def _compiled_block() -> Callable[..., Tensor]:
    return torch.compile(EncoderBlock.apply_drawn, dynamic=False)


class Gathered(NamedTuple):
    """The images for which a branch is computed: order[:num_kept] of B."""

    order: Tensor
    """A permutation of the images, int64, (B,)."""
    num_kept: int


Drawn: TypeAlias = Gathered | Tensor | None


def take(x: Tensor, drawn: Drawn) -> Tensor:
    """Returns the images of x (B, N, D) for which a branch is computed."""
    return kernels.take_rows(x, *drawn) if isinstance(drawn, Gathered) else x


class Residual(nn.Module):
    """drop(branch) for the output of a branch (B, N, D): dropout, LayerScale, stochastic depth.

    Stochastic depth (Huang et al. 2016) skips the branch for a random fraction of the images and
    scales up its output for the others. A small fraction is the probability of skipping each image.
    With a large fraction, round(fraction * B) images are skipped, but at least one is kept, and the
    branch is not computed for the skipped images (Oquab et al. 2023).

    `draw` and `forward` are separate so that `forward` does not depend on the fraction: then all
    blocks share their compiled code.
    """

    # Below this, gathering the kept images on a GPU costs more than skipping the others saves.
    MIN_SKIP_FRACTION = 0.1

    def __init__(self, config: ViTConfig, skip: float) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.skip = skip
        initial = torch.full((config.shape.dim,), config.layer_scale)
        self.scale = nn.Parameter(initial) if config.layer_scale else None

    @property
    def gathers(self) -> bool:
        """Whether the branch is computed only for the images that are kept."""
        return self.skip >= self.MIN_SKIP_FRACTION

    def draw(self, x: Tensor) -> Drawn:
        """Returns the images to keep, factors (B, 1, 1) for the images, or None for all images."""
        if not (self.training and self.skip):
            return None
        B = len(x)
        if not self.gathers:
            keep = torch.empty(B, 1, 1, device=x.device, dtype=x.dtype).bernoulli_(1 - self.skip)
            return keep / (1 - self.skip)
        return Gathered(torch.randperm(B, device=x.device), self.num_kept(B, self.skip))

    @classmethod
    def num_kept(cls, num_images: int, skip: float) -> int:
        """Returns for how many images of a batch a branch is computed in training."""
        if skip < cls.MIN_SKIP_FRACTION:
            return num_images
        return max(1, num_images - round(skip * num_images))

    def forward(self, branch: Tensor, drawn: Drawn) -> Tensor:
        """Returns the addend of the residual stream, (B, N, D)."""
        x = F.dropout(branch, self.dropout, self.training)
        x = x if self.scale is None else x * self.scale
        if isinstance(drawn, Gathered):
            order, num_kept = drawn
            return kernels.put_rows(x * (len(order) / num_kept), order)
        return x if drawn is None else x * drawn


class GroupedQueryAttention(nn.Module):
    """Self-attention in which Q / K query heads share a key and a value (Ainslie et al. 2023).

    `forward` takes normalized tokens (B, N, D) and the block's rotary tables; it returns (B, N, D).
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
        """Returns rotated queries (B, Q, N, S) and keys (B, K, N, S), and values (B, K, N, S)."""
        B, N, _ = x.tokens.shape
        Q, K = self.num_heads, self.num_kv_heads
        heads = self.qkv(x).view(B, N, -1, self.head_size)
        q, k, v = heads.split([Q, K, K], dim=2)  # (B, N, Q or K, S)
        q, k = self.q_norm(q), self.k_norm(k)
        if cosine is not None and sine is not None:
            # Rotated before the transpose, while the heads of a token are adjacent in memory:
            # torch.compile then concatenates their gradients without float32 copies. Axial tables
            # have one entry for all heads, which both slices select.
            cosine, sine = cosine.transpose(0, 1), sine.transpose(0, 1)  # (N, 1 or Q + K, S)
            q = rotate(q, cosine[:, :Q], sine[:, :Q])
            k = rotate(k, cosine[:, -K:], sine[:, -K:])
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(S)) v for queries (B, Q, N, S), keys and values (B, K, N, S)."""
        B, Q, N, S = q.shape
        # Only the half-precision CUDA kernels support groups; elsewhere enable_gqa silently falls
        # back to the slow kernel, which materializes the attention matrix. Queries do not interact,
        # so those of a group can be concatenated into one sequence.
        if q.is_cuda and q.dtype.itemsize == 2:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=k.shape[1] != Q)
        groups = q.reshape(B, self.num_kv_heads, -1, S)
        return F.scaled_dot_product_attention(groups, k, v).reshape(B, Q, N, S)


class FeedForward(nn.Module):
    """Linear layer, activation, linear layer.

    For SwiGLU the first layer computes the gates, then the values. `forward` takes normalized
    tokens (B, N, D) and returns (B, N, D).
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim = config.shape.dim
        hidden = round(dim * config.mlp_ratio)
        self.activation = config.activation
        width = 2 * hidden if self.activation == "swiglu" else hidden
        self.expand = Linear(dim, width, bias=config.ffn_bias)
        self.contract = Linear(hidden, dim, bias=config.ffn_bias)
        self.fused = False  # training enables it if that is faster: see ViT.fuse

    def forward(self, x: Normed) -> Tensor:
        if self.fused and kernels.can_fuse(x.tokens):
            weight, last = self.expand.weight * x.scale, (self.contract.weight, self.contract.bias)
            return kernels.feed_forward(x.tokens, weight, self.expand.bias, *last)
        return self.contract(self.activate(self.expand(x)))

    def activate(self, x: Tensor) -> Tensor:
        """Applies the activation, (..., width) to (..., width), or (..., width / 2) for SwiGLU."""
        if self.activation == "swiglu":
            gate, value = x.chunk(2, dim=-1)
            return F.silu(gate) * value
        if self.activation == "quick-gelu":
            return x * torch.sigmoid(1.702 * x)
        return F.gelu(x, approximate="tanh" if self.activation == "gelu-tanh" else "none")


class PatchEmbedding(nn.Module):
    """Splits images into square patches, flattens each one and projects it linearly.

    `forward` takes images (B, C, H, W), H and W multiples of P, and returns tokens
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
    """Resizes learned positions to (rows, columns, D), bicubic with antialiasing, as in timm."""
    if table.shape[:2] == (rows, columns):
        return table
    channels = table.permute(2, 0, 1)[None].float()
    size = (rows, columns)
    resized = F.interpolate(channels, size, mode="bicubic", antialias=True)[0]
    return resized.permute(1, 2, 0).to(table.dtype)


class RoPE2D(nn.Module):
    """Sines and cosines of rotary positions in x and y (Su et al. 2021; Heo et al. 2024).

    In each head, channel pair (i, i + S/2) of the patch at (x, y) is rotated by the angle
    x * fx[i] + y * fy[i]. Axial frequencies: the first half of the pairs depends only on x, the
    second only on y, both with frequencies theta^(-4j/S). Mixed frequencies: fx and fy are learned
    for each block and key/value head; the queries of a group share those of their key. Prefix
    tokens are not rotated.

    Patch i of n in a row or column is at position (i + 1/2) * grid / n - origin; with the default
    origin of 1/2, that is i for n = grid. Images of all sizes span the positions of an image of
    `image_size` (after Fang et al. 2023, EVA-02), and no patch lies more than half a patch outside
    the range seen in training. The tables are computed for any patch grid; the state dict contains
    only mixed frequencies.
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
        """Returns the frequencies (1, 2, 1, S/2): along x, then along y."""
        quarter = self.head_size // 4
        exponents = torch.arange(quarter, device=device, dtype=torch.float32) / quarter
        frequencies = self.theta**-exponents
        zeros = torch.zeros_like(frequencies)
        fx, fy = torch.cat([frequencies, zeros]), torch.cat([zeros, frequencies])
        return torch.stack([fx, fy])[None, :, None]

    def positions(self, count: int, device: torch.device) -> Tensor:
        """Returns the positions of `count` patches in a row or column: (count,), float32."""
        centers = torch.arange(count, device=device, dtype=torch.float32) + 0.5
        return centers * (self.grid / count) - self.origin

    def forward(self, rows: int, columns: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Returns cosine and sine for each block, in the form that `rotate` takes.

        Both are float32, (1, N, S) for axial and (Q + K, N, S) for mixed frequencies.
        """
        x = self.positions(columns, device).expand(rows, -1).flatten()
        # Use expand: torch exports repeat_interleave with a dynamic size as an incorrect ONNX
        # graph.
        y = self.positions(rows, device)[:, None].expand(-1, columns).flatten()
        frequencies = self.axial(device) if self.mixed is None else self.mixed.float()
        fx, fy = frequencies[:, 0, :, None], frequencies[:, 1, :, None]
        angles = x[:, None] * fx + y[:, None] * fy  # (1 or depth, 1 or K, patches, S/2)
        angles = F.pad(angles, (0, 0, self.num_prefix, 0))  # zero: no rotation
        if self.mixed is not None:
            group = self.num_heads // self.num_kv_heads
            angles = torch.cat([angles.repeat_interleave(group, dim=1), angles], dim=1)
        cosine, sine = angles.cos(), angles.sin()
        cosine, sine = torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)
        tables = list(zip(cosine.unbind(), sine.unbind(), strict=True))
        return tables * self.depth if len(tables) == 1 else tables


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates the channel pairs (i, i + S/2) of heads (..., N, S); keeps shape and dtype.

    Args:
        x: queries or keys, (..., N, S).
        cosine: cosine of each channel's angle, (..., N, S).
        sine: sine of each channel's angle, negated in the first half, (..., N, S).
    """
    exact = x.float() if x.dtype.itemsize < 4 else x
    # Two products of full heads instead of half heads: torch.compile generates one kernel for each
    # direction, and on a CPU it takes two thirds of the time.
    return (exact * cosine + exact.roll(x.shape[-1] // 2, dims=-1) * sine).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * scale over the last axis (Zhang and Sennrich 2019).

    Computes in at least float32 and keeps the shape and dtype of the input.
    """

    def __init__(self, dim: int, bias: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        # torch warns and does not use its fused kernel if the dtypes of input and scale differ, as
        # they do under autocast.
        exact = x if x.dtype == self.scale.dtype else x.float()
        normed = F.rms_norm(exact, self.scale.shape, self.scale, eps=kernels.EPS)
        return (normed if self.bias is None else normed + self.bias).to(x.dtype)


class EmbedNorm(RMSNorm):
    """The norm of the embedded tokens in CLIP: RMSNorm with a bias, then centering over channels.

    For zero-mean tokens RMSNorm equals LayerNorm; centering keeps the residual stream zero-mean.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x - x.mean(-1, keepdim=True)


class PreNorm(RMSNorm):
    """RMSNorm before a linear layer, which applies the scale."""

    def forward(self, x: Tensor) -> Normed:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Normed(kernels.normalize(x), self.scale)


class Normed(NamedTuple):
    """The output of a norm before a linear layer, tokens * scale, as its two factors.

    The layer multiplies its weights, rather than the tokens, by the scale, because they have fewer
    elements. The gradient of the scale then follows from that of the weights, without a sum over
    all tokens.
    """

    tokens: Tensor
    """x / sqrt(mean(x^2) + 1e-6), (B, N, D)."""
    scale: Tensor
    """(D,)."""


class Linear(nn.Linear):
    """x W^T + b over the last axis, (..., D) to (..., width)."""

    fused = False  # training enables it: see ViT.fuse

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor | Normed
    ) -> Tensor:
        """Applies the layer to tokens or a norm's output, whose scale multiplies the weights."""
        x, weight = (x.tokens, self.weight * x.scale) if isinstance(x, Normed) else (x, self.weight)
        # Inference with oneDNN uses a copy of the model, in engines/onednn.py.
        use_onednn = self.training and self.fused and kernels.can_train_by_onednn(x)
        return (kernels.onednn_linear if use_onednn else F.linear)(x, weight, self.bias)


def matrices(module: nn.Module) -> set[Tensor]:
    """Returns the weights of a module's linear layers, the only parameters with weight decay."""
    return {m.weight for m in module.modules() if isinstance(m, nn.Linear)}


def skip_rates(config: ViTConfig) -> list[float]:
    """Returns the fraction of the images that skip the branches of each block in training."""
    depth = config.shape.depth
    return [config.stochastic_depth * i / max(depth - 1, 1) for i in range(depth)]


def count_flops(
    config: ViTConfig,
    num_classes: int,
    image_size: int | None = None,
    *,
    training: bool = False,
    build: Callable[[ViTConfig, int], nn.Module] = ViT,
) -> float:
    """Returns the floating-point operations (FLOPs) of the forward pass for one image.

    Only matrix multiplications are counted, and a multiply-add counts as two operations. A training
    step takes three times as many.

    Args:
        config: the architecture.
        num_classes: number of classes.
        image_size: side length of the image, in pixels. Default: the image size of `config`.
        training: whether to exclude operations that stochastic depth skips, on average in a batch
            of 1,024 images.
        build: constructs the model from `config` and `num_classes`. For any other model than the
            ViT, the operations are counted by `forward_flops`.
    """
    image_size = image_size or config.image_size
    if build is not ViT:
        with torch.device("meta"):
            return forward_flops(build(config, num_classes).train(training), image_size)
    D, _, num_heads, num_kv_heads = config.shape
    patches = (image_size // config.patch_size) ** 2
    N, hidden = config.num_prefix + patches, round(D * config.mlp_ratio)
    qkv = (num_heads + 2 * num_kv_heads) * (D // num_heads)
    ffn = (3 if config.activation == "swiglu" else 2) * hidden
    block = N * D * (qkv + D + ffn + 2 * N)  # the last term is attention
    skipped = skip_rates(config) if training else [0.0] * config.shape.depth
    blocks = block * sum(Residual.num_kept(BATCH, skip) for skip in skipped) / BATCH
    embedding = patches * CHANNELS * config.patch_size**2 * D
    return 2 * (embedding + blocks + D * num_classes)


def forward_flops(model: nn.Module, image_size: int) -> float:
    """Returns `count_flops` for any model that is already on the meta device, in its current mode.

    In training mode, the count is the mean over a batch of 1,024 images. Imports torch.compile,
    which takes as long as importing torch.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    images, counter = BATCH if model.training else 1, FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(images, CHANNELS, image_size, image_size, device="meta"))
    return counter.get_total_flops() / images
