"""The models to measure: vitral, and timm's models of the same shape if timm is installed.

timm (Wightman 2019) is the library that most people use to train Vision Transformers. A peer has
vitral's width, depth, heads, patch size and options wherever timm supports them, and timm's own
layers elsewhere: LayerNorm, exact GELU, a convolution for the patches.

* "timm" is timm's plain ViT, with learned positions.
* "timm-rope" is the rotary ViT of Heo et al. 2024: among timm's rotary models, the one with
  vitral's axial positions, CLS token and GELU. Its LayerScale is turned off unless the
  configuration has one.
* "timm-rope-gqa" is the same model with vitral's grouped queries, the closest one in arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from torch import nn

from vitral.config import ViTConfig
from vitral.errors import UserError
from vitral.machine import has_gpu
from vitral.model import ViT

Builder = Callable[[ViTConfig, int], nn.Module]  # from architecture and number of classes


def plain(config: ViTConfig, num_classes: int) -> nn.Module:
    """Builds vitral's model without the custom kernels."""
    return ViT(dataclasses.replace(config, kernels="plain"), num_classes)


def timm_vit(config: ViTConfig, num_classes: int) -> nn.Module:
    """Builds timm's vit_*_patch16_224 in any shape."""
    return _timm("vit_base_patch16_224", config, num_classes, reg_tokens=config.num_registers)


def timm_rope(config: ViTConfig, num_classes: int, **groups: Any) -> nn.Module:
    """Builds timm's vit_*_patch16_rope_224 in any shape."""
    return _timm(
        "vit_base_patch16_rope_224",
        config,
        num_classes,
        num_reg_tokens=config.num_registers,
        rope_type="mixed" if config.rope == "mixed" else "cat",
        rope_temperature=config.rope_theta,
        **groups,
    )


def timm_rope_gqa(config: ViTConfig, num_classes: int) -> nn.Module:
    """Builds timm_rope with grouped queries, which timm supports only with separate projections."""
    groups = config.shape.num_kv_heads
    return timm_rope(config, num_classes, num_kv_heads=groups, qkv_fused=False)


def _timm(name: str, config: ViTConfig, num_classes: int, **others: Any) -> nn.Module:
    import timm

    # timm.create_model would drop the None that disables LayerScale.
    model: Any = timm.model_entrypoint(name)(
        **timm_shape(config, num_classes),
        qk_norm=config.qk_norm,
        init_values=config.layer_scale or None,
        qkv_bias=config.qkv_bias,
        **others,
    )
    model.set_grad_checkpointing(config.activation_checkpointing)
    return model


def timm_shape(config: ViTConfig, num_classes: int) -> dict[str, Any]:
    """Returns sizes, pooling and dropout as arguments of timm's models."""
    dim, depth, num_heads, _ = config.shape
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "num_classes": num_classes,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": config.mlp_ratio,
        "global_pool": {"cls": "token", "mean": "avg"}[config.pooling],
        "proj_drop_rate": config.dropout,
        "drop_path_rate": config.stochastic_depth,
    }


VITRAL_MODELS: dict[str, Builder] = {"vitral": ViT, "vitral-plain": plain}
PEERS: dict[str, Builder] = {
    "timm": timm_vit,
    "timm-rope": timm_rope,
    "timm-rope-gqa": timm_rope_gqa,
}


def select_models(peers: Sequence[str]) -> dict[str, Builder]:
    """Returns vitral and the named peers; without timm, only vitral.

    On a GPU, vitral is included with and without the custom kernels; on a CPU,
    `--model.kernels plain` measures it without them.

    Raises:
        UserError: for an unknown peer.
    """
    for name in peers:
        if name not in PEERS:
            raise UserError(f"peers: expected some of {', '.join(PEERS)}, got {name}")
    own = VITRAL_MODELS if has_gpu() else {"vitral": ViT}
    return own | {name: PEERS[name] for name in peers if has_timm()}


def has_timm() -> bool:
    """Returns whether timm is installed."""
    return find_spec("timm") is not None
