"""Pretrained Vision Transformers: timm's models by name, converted exactly and cached."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vitral import hub, storage
from vitral.caches import cache_dir
from vitral.config import Config, DataConfig
from vitral.errors import UserError, did_you_mean, printable
from vitral.model import ViT
from vitral.weights.conversion import Block, convert_state, num_folded, read_config
from vitral.weights.description import Description

PREFIX = "timm:"
FAMILIES = ("vision_transformer", "deit", "eva")  # timm's modules
MAX_REASON = 300  # characters of timm's message
FITS: Mapping[str, Literal["squash", "pad"]] = {
    "squash": "squash",
    "border": "pad",
}  # by timm's crop mode
TOLERANCE = 1e-4  # largest difference of the outputs, relative to their rms


class Imported(NamedTuple):
    """A converted model, and how far its outputs are from the original's."""

    model: ViT
    error: float
    """Largest difference, relative to the rms of the original's outputs."""
    folded: int
    """LayerScale channels folded into the weights because they are too small to divide by."""


def fetch(name: str) -> Path:
    """Returns the weight directory of a pretrained model, converted at the first use and cached.

    A cached model requires neither timm nor a network. It does not change if its publisher changes
    it; `source` in config.json contains the commit.

    Args:
        name: `timm:NAME` or `timm:NAME.tag`, of the newest commit or `@revision`.

    Raises:
        UserError: if there is no such model, it cannot be downloaded, or it is not supported.
    """
    bare = name.removeprefix(PREFIX)
    place = cache_dir() / "public" / bare.replace("/", "--")  # revisions may contain a slash
    if not (place / "config.json").is_file():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"weights: cannot write {place.parent}: {error.strerror}; set VITRAL_CACHE to "
                "another directory"
            ) from None
        write(bare, create(bare), place)
    return place


def write(name: str, public: Any, place: Path) -> tuple[Imported, Description]:
    """Converts a timm model and writes it as a weight directory. Raises UserError, OSError."""
    imported, source = convert(public), public.pretrained_cfg
    commit = "" if source.get("file") else (source.get("hf_hub_id") or "").partition("@")[2]
    if commit:  # include the tag, because the default may differ in other versions of timm
        tagged = filter(None, (source["architecture"], source.get("tag")))
        name = f"{'.'.join(tagged)}@{commit}"
    description = Description(
        config=Config(model=imported.model.config, data=read_data(source)),
        classes=class_names(public.num_classes),
        fingerprint="",
        default="model",
        metrics={},
        vitral=version("vitral"),
        source=f"{PREFIX}{name}",
        license=source.get("license") or "",
        difference=imported.error,
    )
    storage.write(
        place, {"model": imported.model.state_dict()}, {"config": description.to_document()}
    )
    return imported, description


def create(name: str, file: str | None = None, **changes: Any) -> Any:
    """Creates timm's pretrained model of this name.

    Args:
        name: NAME or NAME.tag in timm, optionally with @revision of the Hub.
        file: weights with timm's or the original parameter names, to load instead of downloading.
        changes: other arguments of `timm.create_model`.

    Raises:
        UserError: if timm is missing, there is no such model, or its weights cannot be loaded.
    """
    try:
        import timm
    except ImportError:
        raise UserError(
            f"{PREFIX}{name}: expected the package timm, got none; pip install 'vitral[timm]'"
        ) from None
    tagged, _, revision = name.partition("@")
    base = tagged.partition(".")[0]
    if not timm.is_model(base):
        hint = did_you_mean(base, timm.list_models())
        raise UserError(f"{PREFIX}{name}: timm has no model of that name{hint}")
    if not timm.models.is_model_in_modules(base, FAMILIES):
        kind = timm.models.model_entrypoint(base).__module__.rpartition(".")[2]
        raise UserError(
            f"{PREFIX}{name}: expected a plain Vision Transformer, of timm's "
            f"{', '.join(FAMILIES)}, got one of {kind}; use a different one, such as "
            f"{PREFIX}vit_small_patch14_dinov2"
        )
    # This allows `convert` to compare the two models at several image sizes.
    changes = {"dynamic_img_size": True, **changes}
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports each retry
    try:
        head = _head_of(file) if file else {}
        overlay = {"file": file, **head} if file else _pinned(tagged, revision)
        with warnings.catch_warnings(action="ignore"):
            return timm.create_model(
                tagged, pretrained=True, pretrained_cfg_overlay=overlay, **{**head, **changes}
            ).eval()
    except Exception as error:  # timm and the Hub's client raise many types
        raise _failure(name, file, error) from None


def _failure(name: str, file: str | None, error: Exception) -> UserError:
    if isinstance(error.__cause__, pickle.UnpicklingError):
        return UserError(
            f"{PREFIX}{name}: {file}: expected only tensors, got a pickle with other objects, "
            "which could run code; save only the state dict, preferably as safetensors"
        )
    # The second line of torch's message names the keys that do not match.
    lines = [line.strip() for line in str(error).splitlines()[:2]]
    reason = printable(" ".join(lines)[:MAX_REASON] or type(error).__name__)
    fix = (
        "pass the weights of this model, with timm's or the original parameter names"
        if file
        else "without a network, download its model.safetensors from huggingface.co/timm "
        f"elsewhere and pass it to `vitral import {PREFIX}{name} DIR --file`"
    )
    what = f"{file} cannot be loaded" if file else "cannot be downloaded"
    return UserError(f"{PREFIX}{name}: {what}: {reason}; {fix}")


def _pinned(name: str, revision: str) -> dict[str, Any]:
    """Downloads a model; returns changes to its timm configuration that specify the commit.

    Fails within seconds if there is no network; timm's download retries for minutes.
    """
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(name)
    if known is None or not known.hf_hub_id:
        return {}
    file = known.hf_hub_filename or "model.safetensors"
    commit = hub.download_file(known.hf_hub_id, revision, file)
    return {"hf_hub_id": f"{known.hf_hub_id}@{commit}", "custom_load": known.custom_load}


def _head_of(file: str) -> dict[str, int]:
    """Returns the number of classes of a file with timm's parameter names, 0 without a head.

    timm requires all parameters to be in the file only if this number is in its configuration.
    Returns nothing for other names, which timm converts.
    """
    from timm.models import load_state_dict

    if file.endswith((".npz", ".npy")):
        return {}
    state = load_state_dict(file)
    if "head.weight" in state:
        return {"num_classes": len(state["head.weight"])}
    return {"num_classes": 0} if "patch_embed.proj.weight" in state else {}


def convert(public: Any) -> Imported:
    """Converts an instantiated timm model to a vitral model that computes the same function.

    Raises:
        UserError: if vitral does not support a part of the model, or if the outputs of the two
            models differ.
    """
    kind = type(public).__name__
    if kind not in ("VisionTransformer", "Eva"):
        raise UserError(f"model: expected a plain Vision Transformer, got timm's {kind}")
    blocks = [Block(i, block) for i, block in enumerate(public.blocks)]
    config = read_config(public, blocks)
    model = ViT(config, public.num_classes)
    _load(model, dict(convert_state(public, blocks, config)))
    error = difference(model.eval(), public)
    if not error <= TOLERANCE:
        raise UserError(
            f"model: expected the outputs of timm's {kind} to {TOLERANCE:g} of their rms, got a "
            f"difference of {error:.2g}; this variant is not supported"
        )
    return Imported(model, error, num_folded(blocks))


@torch.no_grad()
def difference(model: ViT, public: Any) -> float:
    """Returns the largest difference of the outputs on noise, relative to the rms of `public`'s."""
    draw = torch.Generator().manual_seed(0)
    image_size, patch, worst = model.config.image_size, model.config.patch_size, 0.0
    shapes = [tuple(public.patch_embed.img_size)]
    if public.dynamic_img_size and model.config.rope == "none":
        shapes += [
            (image_size + 2 * patch, image_size + 2 * patch),
            (image_size, image_size + patch),
        ]
    for height, width in shapes:
        images = torch.randn(2, 3, height, width, generator=draw)
        expected = public(images)
        error = (model(images) - expected).abs().max() / expected.square().mean().sqrt()
        worst = max(worst, error.item())
    return worst


def _load(model: ViT, state: Mapping[str, Tensor]) -> None:
    expected = model.state_dict()
    missing = sorted(expected.keys() ^ state.keys())
    assert not missing, missing
    model.load_state_dict({name: value.to(expected[name].dtype) for name, value in state.items()})


def read_data(known: Mapping[str, Any]) -> DataConfig:
    """Returns the preprocessing in timm's configuration of a pretrained model."""
    interpolation = known.get("interpolation", "bicubic")
    return DataConfig(
        mean=tuple(known["mean"]),
        std=tuple(known["std"]),
        interpolation="bilinear" if interpolation == "bilinear" else "bicubic",
        eval_crop=min(1.0, known.get("crop_pct") or 0.875),
        fit=FITS.get(known.get("crop_mode", ""), "crop"),
    )


def class_names(num_classes: int) -> tuple[str, ...]:
    """Returns WordNet ids if timm knows the number of classes, such as that of ImageNet-12K."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if subset := infer_imagenet_subset({"num_classes": num_classes}):
        return tuple(ImageNetInfo(subset).label_names())
    return tuple(f"class {i}" for i in range(num_classes))
