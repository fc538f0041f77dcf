"""timm's Vision Transformers as timm has them, in the shape of a recipe, and how timm trains them.

Where src/vitral/bench/peers.py gives timm's models vitral's options, so that equal work is timed,
these keep timm's own: LayerNorm, biases, learned positions, a class token and timm's
initialisation; no registers, QK-norm or grouped queries, and LayerScale for the rotary model alone,
which timm starts at 1e-5. From the recipe come width, depth, heads, patch, image size, the width of
the feed-forward network, dropout, stochastic depth (by timm, a coin an image), and what the head
reads: the class token, as timm has it, or the mean, an option of timm's without which a recipe that
pools so would favour vitral.

`pretrained` is another control: a public model as timm loads it, to fine-tune next to its import.
"""

from __future__ import annotations

import dataclasses
import math
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
    """The model that timm knows as `name`, in the shape of `config`.

    Raises:
        UserError: without timm.
    """
    if not has_timm():
        raise UserError("timm: expected it installed, got none; pip install timm")
    import timm

    model: Any = timm.create_model(name, **timm_shape(config, num_classes))
    model.set_grad_checkpointing(config.activation_checkpointing)
    return model


def pretrained(source: str) -> Parts:
    """timm's model `timm:NAME` with its own pretrained weights and a new head of zeros.

    `train.init` names the directory that they are imported to. The file DIR.safetensors next to it,
    if there is one, is loaded instead of downloading the weights.
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


def _load_timm(model: Any, path: str) -> list[str]:
    """Loads what `path` was imported from, without a head of other classes, as vitral does."""
    directory, description = weights.read_description(path)
    file = directory.parent / f"{directory.name}.safetensors"
    state = public.create(
        description.source.removeprefix(public.PREFIX),
        str(file) if file.exists() else None,
        img_size=model.patch_embed.img_size,  # positions are resampled once, as in vitral
        num_classes=model.num_classes,
    ).state_dict()
    other = len(description.classes) != model.num_classes
    new = [name for name in state if other and name.startswith("head.")]
    model.load_state_dict({n: v for n, v in state.items() if n not in new}, strict=False)
    return new


class TimmGroups(Optimizer):
    """vitral's optimizer with timm's choice of what decays, and vitral's layer decay.

    Every weight of two or more dimensions decays, the convolution that embeds the patches among
    them; biases, norms, LayerScale, positions and tokens do not.

    Raises:
        UserError: for layer decay of a model whose last norm is not called `norm`.
    """

    def __init__(self, model: Any, config: OptimConfig) -> None:
        from timm.optim import param_groups_weight_decay

        if config.layer_decay != 1 and isinstance(model.norm, nn.Identity):
            raise UserError(
                f"optim.layer_decay: expected 1 for timm's models that norm the mean of the "
                f"patches, got {config.layer_decay:g}; leave it out"
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
                    self.adamw.add_param_group(own)


def own_settings(optim: OptimConfig, batch_size: int) -> OptimConfig:
    """The optimiser that timm's ViT was made known with, under the schedule of `optim`.

    Touvron et al. 2020, "Training data-efficient image transformers" (DeiT), trained timm's ViT
    with timm's AdamW and scheduler: rate 5e-4 * batch / 512, betas 0.9 and 0.999, decay 0.05, no
    clipping, in batches of 1,024. From its rate there, 1e-3, that of other batches follows by the
    square root, the rule of timm's train.py for Adam: smaller batches get more than by DeiT's
    line, which would leave them far from the end of a short training, and larger ones less.
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
