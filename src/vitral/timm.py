"""vitral's models by `timm.create_model`, once this module is imported.

>>> import timm
>>> import vitral.timm
>>> model = timm.create_model("vitral_vit_tiny_patch16_224", num_classes=10)

"vitral" takes trained weights, by path or from the Hugging Face Hub; the others are the size
presets, untrained, which take the settings of `ViTConfig` by name, or by timm's where it has one.
Images of any size in whole patches will do; img_size says which one is meant, and on which grid a
new model counts positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitral.config import DataConfig, ViTConfig
from vitral.errors import UserError
from vitral.model import CHANNELS, ViT, matrices
from vitral.weights import Which, load

try:
    from timm.models import generate_default_cfgs, register_model, resolve_pretrained_cfg
except ImportError as error:
    raise ImportError(
        f"vitral.timm takes the package {error.name}, which is not installed; "
        "`pip install 'vitral[timm]'`"
    ) from None

SIZES = {"ti": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge"}
POOLS = {"cls": "token", "mean": "avg"}
RENAMED = {
    "img_size": "image_size",
    "drop_path_rate": "stochastic_depth",
    "proj_drop_rate": "dropout",
}


class TimmViT(ViT):
    """A ViT with the methods that timm gives its models.

    Args:
        config: the architecture.
        num_classes: outputs of the head; 0 leaves it out.
        in_chans: colour channels, of which there are three.
        drop_rate: dropout before the head.
        global_pool: "token", "avg", or "" for all tokens; None takes what `config` says.

    Raises:
        UserError: for other channels or another pooling.
    """

    head: nn.Module
    pretrained_cfg: dict[str, Any]
    default_cfg: dict[str, Any]

    def __init__(
        self,
        config: ViTConfig,
        num_classes: int,
        *,
        in_chans: int = CHANNELS,
        drop_rate: float = 0.0,
        global_pool: str | None = None,
    ) -> None:
        super().__init__(config, num_classes or 1)
        if in_chans != CHANNELS:
            raise UserError(f"in_chans: expected {CHANNELS}, got {in_chans}")
        self.num_features = self.head_hidden_size = self.embed_dim = config.shape.dim
        self.drop_rate = drop_rate
        self.global_pool = POOLS[config.pooling]
        if not num_classes or global_pool is not None:
            self.reset_classifier(num_classes, global_pool)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, which starts at zero as that of a new ViT; the features stay."""
        pools = [*POOLS.values(), ""]
        if global_pool is not None and global_pool not in pools:
            raise UserError(f"global_pool: expected one of {pools}, got {global_pool!r}")
        self.global_pool = self.global_pool if global_pool is None else global_pool
        for pooling, name in POOLS.items():
            if name == self.global_pool:
                self.config = dataclasses.replace(self.config, pooling=pooling)
        self.num_classes = num_classes
        like = {"device": self.device, "dtype": self.norm.scale.dtype}
        head = nn.Linear(self.num_features, num_classes, **like) if num_classes else nn.Identity()
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
        self.head = head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether each block is computed again in the backward pass, which saves memory."""
        self.config = dataclasses.replace(self.config, activation_checkpointing=enable)

    def no_weight_decay(self) -> set[str]:
        """Parameters to leave out of weight decay: all but the matrices of linear layers."""
        decayed = matrices(self)
        return {name for name, p in self.named_parameters() if p not in decayed}

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layers for timm's layer decay, as vitral's: what matches none goes with the head."""
        stem = r"^(?:cls|registers|patch_embedding|rope)\b"
        return {"stem": stem, "blocks": r"^blocks" if coarse else r"^blocks\.(\d+)"}

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) of tokens (B, N, D), or what the head would read, (B, D)."""
        if self.global_pool:
            x = self.pool(x)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def vitral(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: Any = None,
    *,
    weights: str | None = None,
    which: Which | None = None,
    num_classes: int | None = None,
    **settings: Any,
) -> TimmViT:
    """Trained weights, in training mode as all that timm creates.

    Args:
        pretrained: of no effect, as `weights` says it all.
        pretrained_cfg: what timm shall take for the weights' own description.
        pretrained_cfg_overlay: single entries of it.
        cache_dir: of no effect; HF_HUB_CACHE says where the Hub's files lie.
        weights: whatever `vitral.load` takes.
        which: "model" or "ema"; None takes the one that the weights name.
        num_classes: outputs of a new head, unless there are so many; None keeps the trained one.
        settings: img_size, drop_path_rate, proj_drop_rate, and those of `TimmViT`.

    Raises:
        UserError: as `vitral.load` does, and for settings that do not fit.
    """
    if weights is None:
        raise UserError(
            "weights: expected a run or weight folder or hf-hub:owner/name, got none; "
            "give timm.create_model('vitral', weights=...)"
        )
    loaded = load(weights, which=which)
    description = loaded.description
    count = len(description.classes)
    trained = description.config.model
    config = dataclasses.replace(trained, rope_grid=trained.grid, **_pop(settings, RENAMED))
    with torch.device("meta"):
        model = TimmViT(config, count, **settings)
    model.load_state_dict(loaded.model.state_dict(), assign=True)
    if num_classes is not None and num_classes != count:
        model.reset_classifier(num_classes)
    own = pretrained_cfg or _cfg(config, description.config.data, description.classes)
    return _described(model, "vitral", own, pretrained_cfg_overlay)


def _preset(size: str, name: str) -> Callable[..., TimmViT]:
    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: Any = None,
        *,
        num_classes: int = 1000,
        **settings: Any,
    ) -> TimmViT:
        if pretrained:
            raise UserError(
                f"pretrained: {name} has no weights of its own; "
                "give yours to timm.create_model as ('vitral', weights=...)"
            )
        fields = {field.name: field.name for field in dataclasses.fields(ViTConfig)}
        config = ViTConfig(**{"size": size, **_pop(settings, {**fields, **RENAMED})})
        model = TimmViT(config, num_classes, **settings)
        own = pretrained_cfg or _cfg(config, DataConfig())
        return _described(model, name, own, pretrained_cfg_overlay)

    create.__name__ = name  # which timm registers it by
    return create


def _pop(settings: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Removes the settings that `names` has, and returns them by their names there."""
    taken = {names[key]: settings.pop(key) for key in names.keys() & settings.keys()}
    size = taken.get("image_size")
    if isinstance(size, tuple | list):  # timm takes height and width, too
        if len({*size}) != 1:
            raise UserError(
                f"img_size: expected a side, or twice the same, got {size}; "
                "images of other sizes in whole patches will do whatever it is"
            )
        taken["image_size"] = size[0]
    return taken


def _cfg(
    model: ViTConfig, data: DataConfig, classes: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """What `timm.data.resolve_model_data_config` asks for, as timm's PretrainedCfg has it."""
    return {
        "input_size": (CHANNELS, model.image_size, model.image_size),
        "interpolation": data.interpolation,
        "crop_pct": data.eval_crop,
        "mean": data.mean,
        "std": data.std,
        "num_classes": len(classes) if classes else 1000,
        "label_names": classes,
        "classifier": "head",
    }


def _described(model: TimmViT, name: str, cfg: Any, overlay: dict[str, Any] | None) -> TimmViT:
    model.pretrained_cfg = resolve_pretrained_cfg(name, cfg, overlay).to_dict()
    model.default_cfg = model.pretrained_cfg  # its older name
    return model


PRESETS = {f"vitral_vit_{word}_patch16_224": size for size, word in SIZES.items()}
# Where timm looks for what its registry says of each.
default_cfgs = generate_default_cfgs({name: _cfg(ViTConfig(), DataConfig()) for name in PRESETS})
register_model(vitral)
for _name, _size in PRESETS.items():
    register_model(_preset(_size, _name))
