"""timm's Vision Transformers in the shape of a recipe, with timm's parts and optimizer settings.

src/vitral/bench/peers.py gives timm's models the options of vitral, so that speed is compared at
equal work. The models here keep timm's options: LayerNorm, biases, learned positions, a class token
and timm's initialization; no registers, QK-norm or grouped queries; and LayerScale, initialized to
1e-5, only in the rotary model. The recipe sets the width, depth, heads, patch size, image size,
width of the feed-forward network, dropout, stochastic depth (per image, as in timm), and pooling:
the class token, which is timm's default, or the mean, so that a recipe with mean pooling does not
favor vitral.

`pretrained` is another control: a public model as timm loads it, to fine-tune next to its import.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from vitral import weights
from vitral.bench.peers import has_timm, timm_shape
from vitral.config import OptimConfig, ViTConfig
from vitral.errors import UserError
from vitral.training import Parts
from vitral.training.optim import Optimizer
from vitral.weights import public

NAMES = {"timm": "vit_small_patch16_224", "timm-rope": "vit_small_patch16_rope_224"}


def build(name: str, config: ViTConfig, num_classes: int) -> nn.Module:
    """Builds the timm model `name` in the shape of `config`.

    Raises:
        UserError: if timm is not installed.
    """
    if not has_timm():
        raise UserError("timm: expected it installed, got none; pip install timm")
    import timm

    model: Any = timm.create_model(name, **timm_shape(config, num_classes))
    model.set_grad_checkpointing(config.activation_checkpointing)
    return model


def pretrained(source: str) -> Parts:
    """Parts of timm's model `timm:NAME` with its own pretrained weights and a new head of zeros.

    `train.init` is the directory of their import. If there is a file DIR.safetensors next to it,
    the weights are read from this file instead of being downloaded.
    """
    name = source.removeprefix(public.PREFIX)

    def model(config: ViTConfig, num_classes: int) -> nn.Module:
        import timm

        built: Any = timm.create_model(
            name,
            img_size=config.image_size,
            dynamic_img_size=True,
            num_classes=num_classes,
            proj_drop_rate=config.dropout,
            drop_path_rate=config.stochastic_depth,
        )
        built.set_grad_checkpointing(config.activation_checkpointing)
        for parameter in built.head.parameters():
            nn.init.zeros_(parameter)
        return built

    return Parts(name=source, model=model, optimizer=TimmGroups, initialize=_load_timm)


def _load_timm(model: Any, path: str, classes: Sequence[str]) -> list[str]:
    """Loads the source of the import at `path`, without the head if the classes differ."""
    directory, description = weights.read_description(path)
    file = directory.parent / f"{directory.name}.safetensors"
    state = public.create(
        description.source.removeprefix(public.PREFIX),
        str(file) if file.exists() else None,
        img_size=model.patch_embed.img_size,  # positions are resampled once, as in vitral
        num_classes=model.num_classes,
    ).state_dict()
    other = description.classes != tuple(classes)
    new = [name for name in state if other and name.startswith("head.")]
    model.load_state_dict({n: v for n, v in state.items() if n not in new}, strict=False)
    return new


class TimmGroups(Optimizer):
    """vitral's optimizer with timm's choice of decayed parameters, and vitral's layer decay.

    All weights with two or more dimensions decay, including the convolution that embeds the
    patches. Biases, norms, LayerScale, positions and tokens do not.

    Raises:
        UserError: if layer decay is requested for a model whose last norm is not named `norm`.
    """

    def __init__(self, model: Any, config: OptimConfig) -> None:
        from timm.optim import param_groups_weight_decay

        if config.layer_decay != 1 and isinstance(model.norm, nn.Identity):
            raise UserError(
                f"optim.layer_decay: expected 1 for timm models that normalize the mean of the "
                f"patches, got {config.layer_decay:g}; remove it"
            )
        super().__init__(model, config)
        by_factor: dict[float, set[nn.Parameter]] = {}
        for group in self.adamw.param_groups:
            by_factor.setdefault(group["lr_factor"], set()).update(group["params"])
        self.adamw.param_groups.clear()
        never = model.no_weight_decay()
        for group in param_groups_weight_decay(model, config.weight_decay, True, never):
            for factor, selected in by_factor.items():
                if members := [p for p in group["params"] if p in selected]:
                    own = {**group, "params": members, "lr_factor": factor}
                    self.adamw.param_groups.append(own)


def own_settings(optim: OptimConfig, batch_size: int) -> OptimConfig:
    """DeiT's optimizer settings for timm's ViT, with the schedule of `optim`.

    Touvron et al. 2020, "Training data-efficient image transformers" (DeiT), train timm's ViT with
    timm's AdamW and scheduler: learning rate 5e-4 * batch / 512, betas 0.9 and 0.999, weight decay
    0.05, no clipping, in batches of 1,024. Their learning rate at that batch size, 1e-3, is scaled
    to other batch sizes by the square root, which is the rule of timm's train.py for Adam. Compared
    with DeiT's linear rule, smaller batches get a higher rate, without which a short training would
    not converge, and larger batches a lower one.
    """
    return dataclasses.replace(
        optim,
        name="adamw",
        lr=1e-3 * math.sqrt(batch_size / 1024),
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.05,
        clip_norm=0.0,
    )


PARTS = tuple(
    Parts(name=peer, model=partial(build, name), optimizer=TimmGroups)
    for peer, name in NAMES.items()
)
