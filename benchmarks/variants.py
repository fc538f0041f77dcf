"""Trains models that are not part of vitral in vitral's training loop, for comparison.

    python benchmarks/variants.py VARIANT RECIPE [--section.key value ...]

Works like `vitral train RECIPE`, with the same order, augmentation, schedule and log. Repeat the
command to resume an interrupted run. VARIANT is one of

    learned-positions   a learned table of positions instead of RoPE (Dosovitskiy et al. 2020)
    no-positions        no position encoding
    layer-norm          LayerNorm instead of RMSNorm
    timm, timm-rope     timm's Vision Transformers instead of vitral's (timm_models.py)
    folded              LayerScale of `train.init` multiplied into the preceding weights
    lora                low-rank updates of the linear layers of `train.init`, and the head
    timm:NAME           timm's model of that name; `train.init` is its import

Except for timm's, the models need as many FLOPs as vitral's, and start from the same weights for
the same seed.
"""

from __future__ import annotations

import dataclasses
import errno
import sys
from collections.abc import Callable, Sequence
from typing import Any

import timm_models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitral import weights
from vitral.config import ViTConfig
from vitral.errors import UserError
from vitral.model import Linear, Normed, PatchEmbedding, RoPE2D, ViT
from vitral.training import Interrupted, Parts, train
from vitral.weights import public


class IdentityRoPE(RoPE2D):
    """Rotary positions with all angles zero, at the cost of real ones."""

    def axial(self, device: torch.device | None) -> Tensor:
        """Frequencies (1, 2, 1, S/2), all zero."""
        return torch.zeros_like(super().axial(device))


class WithoutPositions(ViT):
    """A ViT without position encoding."""

    def __init__(self, config: ViTConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.rope = IdentityRoPE(config)


class PositionedPatches(PatchEmbedding):
    """A patch embedding that adds a learned table of positions to the tokens.

    For grids other than `grid_size` by `grid_size` patches, the table is resampled with antialiased
    bicubic interpolation, as in timm (Touvron et al. 2020 use no antialiasing).
    """

    def __init__(self, projection: nn.Linear, patch_size: int, grid_size: int) -> None:
        super().__init__(patch_size, projection.out_features)
        self.projection = projection
        self.positions = nn.Parameter(torch.empty(grid_size, grid_size, projection.out_features))
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        rows, columns = (length // self.patch_size for length in images.shape[2:])
        return super().forward(images) + self.table(rows, columns)

    def table(self, rows: int, columns: int) -> Tensor:
        """Positions of a grid, row by row: (rows * columns, D)."""
        table = self.positions
        if table.shape[:2] != (rows, columns):
            channels = table.permute(2, 0, 1)[None]
            size = (rows, columns)
            table = F.interpolate(channels, size, mode="bicubic", antialias=True)[0]
            table = table.permute(1, 2, 0)
        return table.flatten(0, 1)


class LearnedPositions(WithoutPositions):
    """A ViT with learned absolute positions (Dosovitskiy et al. 2020) instead of RoPE.

    CLS and register tokens have no positions, because they are learned vectors themselves.
    """

    def __init__(self, config: ViTConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        grid_size = config.image_size // config.patch_size
        projection = self.patch_embedding.projection
        self.patch_embedding = PositionedPatches(projection, config.patch_size, grid_size)


class WithLayerNorm(ViT):
    """A ViT with LayerNorm (Ba et al. 2016) before attention, feed-forward network and head.

    LayerNorm without a bias is RMSNorm of centered tokens. QK-norm, if enabled, is unchanged.
    """

    def __init__(self, config: ViTConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        normed: list[Any] = [self.norm]
        for block in self.blocks:
            normed += [block.attention_norm, block.ffn_norm]
        for module in normed:
            module.register_forward_pre_hook(_center)


def _center(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Subtracts the mean over the channels from the tokens, the first input."""
    x, *others = inputs
    return (x - x.mean(-1, keepdim=True), *others)


def without_layer_scale(config: ViTConfig, num_classes: int) -> ViT:
    """vitral's ViT without LayerScale."""
    return ViT(dataclasses.replace(config, layer_scale=0.0), num_classes)


def fold(model: ViT, path: str, classes: Sequence[str]) -> list[str]:
    """`weights.initialize`, with LayerScale multiplied into the preceding weights and biases."""
    scaled = ViT(dataclasses.replace(model.config, layer_scale=1.0), model.num_classes)
    new = weights.initialize(scaled, path, classes)
    state = scaled.state_dict()
    for branch, layer in (("attention", "attention.projection"), ("ffn", "ffn.contract")):
        for i in range(len(model.blocks)):
            scale = state.pop(f"blocks.{i}.{branch}_residual.scale")
            state[f"blocks.{i}.{layer}.weight"] *= scale[:, None]
            if f"blocks.{i}.{layer}.bias" in state:
                state[f"blocks.{i}.{layer}.bias"] *= scale
    model.load_state_dict(state)
    return new


class LowRankLinear(Linear):
    """A frozen linear layer with a trained low-rank update (Hu et al. 2021): W x + B A x."""

    RANK = 8

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.down = nn.Parameter(torch.empty(self.RANK, layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, self.RANK))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: Tensor | Normed) -> Tensor:
        tokens, down = (x.tokens, self.down * x.scale) if isinstance(x, Normed) else (x, self.down)
        return super().forward(x) + F.linear(F.linear(tokens, down), self.up)


def with_lora(config: ViTConfig, num_classes: int) -> ViT:
    """vitral's ViT with a low-rank update in each linear layer of the blocks."""
    model = ViT(config, num_classes)
    for block in model.blocks:
        for parent in (block.attention, block.ffn):
            for name, child in list(parent.named_children()):
                if isinstance(child, Linear):
                    setattr(parent, name, LowRankLinear(child))
    return model


def freeze_all_but_lora(model: ViT, path: str, classes: Sequence[str]) -> list[str]:
    """`weights.initialize`, and freezes everything except the updates and the head."""
    plain = ViT(model.config, model.num_classes)
    new = weights.initialize(plain, path, classes)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in missing or name.startswith("head."))
    return [*new, *missing]


PARTS = {
    parts.name: parts
    for parts in (
        Parts(name="learned-positions", model=LearnedPositions),
        Parts(name="no-positions", model=WithoutPositions),
        Parts(name="layer-norm", model=WithLayerNorm),
        Parts(name="folded", model=without_layer_scale, initialize=fold),
        Parts(name="lora", model=with_lora, initialize=freeze_all_but_lora),
        *timm_models.PARTS,
    )
}


def find(name: str) -> Parts:
    """The parts with that name, or vitral's own for an empty name. Raises KeyError if unknown."""
    if name.startswith(public.PREFIX):
        return timm_models.pretrained(name)
    return PARTS[name] if name else Parts()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 2 for a user error, or a signal's exit code."""
    return exit_code("variants", lambda: run(sys.argv[1:] if arguments is None else arguments))


def run(words: Sequence[str]) -> int:
    """Trains the variant and recipe that the arguments name.

    Raises:
        UserError: if the arguments are invalid.
    """
    name, recipe = (*words, "", "")[:2]
    known = name in PARTS or name.startswith(public.PREFIX)
    if not known or not recipe or recipe.startswith("-"):
        names, got = ", ".join([*PARTS, f"{public.PREFIX}NAME"]), " ".join(words[:2]) or "nothing"
        raise UserError(f"expected {names}, followed by a recipe, got {got}")
    train(recipe, *words[2:], parts=find(name))
    return 0


def exit_code(program: str, run: Callable[[], int]) -> int:
    """Runs a command; returns its exit code, 2 for a user error, or the code of a signal."""
    try:
        return run()
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"{program}: {error}; free up space and repeat the command", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        return interrupted.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
