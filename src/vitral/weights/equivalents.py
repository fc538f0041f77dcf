"""timm's names for models that are on the Hub in the format of the package transformers."""

from __future__ import annotations

from vitral.errors import UserError
from vitral.hub import NoWeightsError

LETTERS = {"s": "small", "b": "base", "l": "large"}
DINOV3 = {"s": "small", "splus": "small_plus", "b": "base", "l": "large", "hplus": "huge_plus"}
TIMM = {
    **{
        f"facebook/dinov2-{infix}{size}": f"vit_{size}_patch14_{name}.lvd142m"
        for infix, name in (("", "dinov2"), ("with-registers-", "reg4_dinov2"))
        for size in ("small", "base", "large", "giant")
    },
    **{
        f"facebook/dinov3-vit{short}16-pretrain-lvd1689m": f"vit_{size}_patch16_dinov3.lvd1689m"
        for short, size in DINOV3.items()
    },
    "facebook/dinov3-vitl16-pretrain-sat493m": "vit_large_patch16_dinov3.sat493m",
    **{
        f"facebook/dino-vit{short}{patch}": f"vit_{LETTERS[short]}_patch{patch}_224.dino"
        for short in "sb"
        for patch in (8, 16)
    },
    **{
        f"facebook/deit-{size}-patch16-224": f"deit_{size}_patch16_224.fb_in1k"
        for size in ("tiny", "small", "base")
    },
    "facebook/deit-base-patch16-384": "deit_base_patch16_384.fb_in1k",
    "google/vit-base-patch16-224-in21k": "vit_base_patch16_224.orig_in21k",
    "google/vit-base-patch32-224-in21k": "vit_base_patch32_224.orig_in21k",
    "google/vit-large-patch16-224-in21k": "vit_large_patch16_224.orig_in21k",
    "google/vit-large-patch32-224-in21k": "vit_large_patch32_224.orig_in21k",
    "openai/clip-vit-base-patch16": "vit_base_patch16_clip_quickgelu_224.openai",
    "openai/clip-vit-base-patch32": "vit_base_patch32_clip_quickgelu_224.openai",
    "openai/clip-vit-large-patch14": "vit_large_patch14_clip_quickgelu_224.openai",
    "openai/clip-vit-large-patch14-336": "vit_large_patch14_clip_quickgelu_336.openai",
}
FAMILIES = {  # part of timm's names, by model_type of transformers
    "clip": "clip",
    "clip_vision_model": "clip",
    "deit": "deit",
    "dinov2": "dinov2",
    "dinov2_with_registers": "reg4_dinov2",
    "dinov3_vit": "dinov3",
    "siglip": "siglip_gap",
    "siglip_vision_model": "siglip_gap",
    "vit": "vit",
}


def explain(error: NoWeightsError) -> UserError:
    """Returns the error for a repository without vitral weights, with timm's name if known."""
    if not error.model_type:
        return error
    what = (
        f"hub: {error.repository}: expected vitral weights, got a model of transformers "
        f"({error.model_type})"
    )
    if name := TIMM.get(error.repository):
        return UserError(f"{what}; use timm:{name}, the same model")
    if word := FAMILIES.get(error.model_type):
        search = f"https://huggingface.co/timm/models?search={word}"
        return UserError(f"{what}; find the same model at {search} and use timm:NAME")
    return UserError(f"{what}; vitral loads its own weights and timm's Vision Transformers")
