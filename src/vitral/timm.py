"""Makes vitral's models available in `timm.create_model`; import this module to register them.

>>> import timm
>>> import vitral.timm
>>> model = timm.create_model("vitral_vit_tiny_patch16_224", num_classes=10)

The model "vitral" loads trained weights, from a path or from the Hugging Face Hub. The other models
are the size presets, untrained; they accept the fields of `ViTConfig` and timm's names for them.
All models accept images of any size that is a multiple of the patch size. `img_size` sets the
intended size and, for a new model, the grid of its positions.
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
        f"vitral.timm requires the package {error.name}, which is not installed; "
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
    """A ViT with the interface of timm's models.

    Args:
        config: the architecture.
        num_classes: number of classes; 0 for a model without a head.
        in_chans: number of color channels, always 3.
        drop_rate: dropout before the head.
        global_pool: "token", "avg", or "" for all tokens. Default: the pooling of `config`.

    Raises:
        UserError: if `in_chans` is not 3, or for an unknown pooling.
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
        """Replaces the head, initialized to zero as in a new ViT; the features do not change."""
        pools = [*POOLS.values(), ""]
        if global_pool is not None and global_pool not in pools:
            raise UserError(f"global_pool: expected one of {pools}, got {global_pool!r}")
        self.global_pool = self.global_pool if global_pool is None else global_pool
        for pooling, name in POOLS.items():
            if name == self.global_pool:
                self.config = dataclasses.replace(self.config, pooling=pooling)
        self.num_classes = num_classes
        kwargs = {"device": self.device, "dtype": self.norm.scale.dtype}
        head = nn.Linear(self.num_features, num_classes, **kwargs) if num_classes else nn.Identity()
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
        self.head = head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enables or disables activation checkpointing, which recomputes blocks to save memory."""
        self.config = dataclasses.replace(self.config, activation_checkpointing=enable)

    def no_weight_decay(self) -> set[str]:
        """Returns the parameters without weight decay: all but the weights of linear layers."""
        decayed = matrices(self)
        return {name for name, p in self.named_parameters() if p not in decayed}

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Returns timm's patterns for layer decay; unmatched parameters belong to the head."""
        stem = r"^(?:cls|registers|patch_embedding|rope)\b"
        return {"stem": stem, "blocks": r"^blocks" if coarse else r"^blocks\.(\d+)"}

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Returns logits (B, num_classes) for tokens (B, N, D), or the head's input (B, D)."""
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
    """Loads trained weights; the model is in training mode, like all models that timm creates.

    Args:
        pretrained: ignored; `weights` is used instead.
        pretrained_cfg: replaces the configuration derived from the weights.
        pretrained_cfg_overlay: replaces single entries of the configuration.
        cache_dir: ignored; set HF_HUB_CACHE for files from the Hub.
        weights: any argument of `vitral.load`.
        which: "model" or "ema". Default: as stored with the weights.
        num_classes: replaces the head if the number of classes differs. Default: keep the head.
        settings: img_size, drop_path_rate, proj_drop_rate, and the arguments of `TimmViT`.

    Raises:
        UserError: if `vitral.load` raises it, or for invalid settings.
    """
    if weights is None:
        raise UserError(
            "weights: expected a run or weight directory or hf-hub:owner/name, got none; "
            "call timm.create_model('vitral', weights=...)"
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
    cfg = pretrained_cfg or _cfg(config, description.config.data, description.classes)
    return _with_cfg(model, "vitral", cfg, pretrained_cfg_overlay)


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
                f"pretrained: {name} has no pretrained weights; "
                "load yours with timm.create_model('vitral', weights=...)"
            )
        fields = {field.name: field.name for field in dataclasses.fields(ViTConfig)}
        config = ViTConfig(**{"size": size, **_pop(settings, {**fields, **RENAMED})})
        model = TimmViT(config, num_classes, **settings)
        cfg = pretrained_cfg or _cfg(config, DataConfig())
        return _with_cfg(model, name, cfg, pretrained_cfg_overlay)

    create.__name__ = name  # timm registers it under this name
    return create


def _pop(settings: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Removes the settings listed in `names` and returns them under their new names."""
    taken = {names[key]: settings.pop(key) for key in names.keys() & settings.keys()}
    size = taken.get("image_size")
    if isinstance(size, tuple | list):  # timm also accepts height and width
        if len({*size}) != 1:
            raise UserError(
                f"img_size: expected one number, or two equal ones, got {size}; "
                "the model accepts images of any size that is a multiple of the patch size"
            )
        taken["image_size"] = size[0]
    return taken


def _cfg(
    model: ViTConfig, data: DataConfig, classes: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Returns the PretrainedCfg entries that `timm.data.resolve_model_data_config` reads."""
    return {
        "input_size": (CHANNELS, model.image_size, model.image_size),
        "interpolation": data.interpolation,
        "crop_pct": 1.0 if data.fit == "pad" else data.eval_crop,
        "crop_mode": {"crop": "center", "squash": "squash", "pad": "border"}[data.fit],
        "mean": data.mean,
        "std": data.std,
        "num_classes": len(classes) if classes else 1000,
        "label_names": classes,
        "classifier": "head",
    }


def _with_cfg(model: TimmViT, name: str, cfg: Any, overlay: dict[str, Any] | None) -> TimmViT:
    model.pretrained_cfg = resolve_pretrained_cfg(name, cfg, overlay).to_dict()
    model.default_cfg = model.pretrained_cfg  # its older name
    return model


PRESETS = {f"vitral_vit_{word}_patch16_224": size for size, word in SIZES.items()}
# timm's registry reads this variable.
default_cfgs = generate_default_cfgs({name: _cfg(ViTConfig(), DataConfig()) for name in PRESETS})
register_model(vitral)
for _name, _size in PRESETS.items():
    register_model(_preset(_size, _name))
