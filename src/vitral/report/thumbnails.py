"""Creates small images for embedding in a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vitral.data.augment import finish
from vitral.data.decode import DecodeError, decode
from vitral.data.loader import fetch_eval_crops
from vitral.data.records import Packed, Pixels, Records
from vitral.inference.attention import attention_weights, read, rollout
from vitral.weights import Weights

THUMBNAIL_SIZE = 112  # pixels of the longer side
NUM_ATTENTION_IMAGES = 8  # images whose attention is shown


def thumbnail(records: Records, index: int) -> str | None:
    """Returns an uncropped image of the dataset as a data URI; None if it cannot be read."""
    try:
        if isinstance(records, Pixels):
            image = _image(records.images[index])
        elif isinstance(records, Packed):
            H, W = (int(length) for length in records.sides[index])
            image = _image(torch.from_numpy(records.squares(np.array([index]))[0])).resize((W, H))
        else:
            image = _image(decode(records.read(index)))
    except (OSError, DecodeError):
        return None
    return data_uri(image, THUMBNAIL_SIZE)


def data_uri(image: Image.Image, size: int) -> str:
    """Encodes an image as a JPEG whose longer side has at most `size` pixels, in a data URI.

    Small images are enlarged by an integer factor without blurring.
    """
    factor = size / max(image.size)
    resampling = Image.Resampling.LANCZOS
    if factor > 1:
        resampling, factor = Image.Resampling.NEAREST, int(factor)
    W, H = (max(1, round(length * factor)) for length in image.size)
    content = io.BytesIO()
    image.convert("RGB").resize((W, H), resampling).save(content, "JPEG", quality=80, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def png_uri(content: bytes) -> str:
    """Encodes a PNG in a data URI."""
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def attention_examples(weights: Weights, records: Records) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields the indices of evenly spaced images, and their `attention_pictures` by name."""
    for i in np.unique(np.linspace(0, len(records) - 1, NUM_ATTENTION_IMAGES).astype(int)).tolist():
        pictures = attention_pictures(weights, records, i)
        if pictures is not None:
            yield i, dict(zip(("input", "attended"), pictures, strict=True))


def attention_pictures(weights: Weights, records: Records, index: int) -> tuple[str, str] | None:
    """Returns the model's input, and the same image with brightness given by attention rollout.

    Both are data URIs. Returns None if the image cannot be read.
    """
    config = weights.description.config
    (fetched,) = fetch_eval_crops(records, config, [np.array([index])], 0, torch.device("cpu"))
    if fetched.broken:
        return None
    data_device = weights.model.device
    images = finish(fetched.images, None, config.data.mean, config.data.std).to(data_device)
    _, attention = attention_weights(weights.model, images)
    grid = config.model.image_size // config.model.patch_size
    flow = read(weights.model, rollout(attention)).view(1, 1, grid, grid).cpu()
    light = F.interpolate(flow, images.shape[-2:], mode="bilinear")[0]
    light = (light - light.min()) / (light.max() - light.min()).clamp_min(1e-9)
    original = fetched.images[0]
    attended = (original * (0.15 + 0.85 * light)).to(torch.uint8)
    return data_uri(_image(original), THUMBNAIL_SIZE), data_uri(_image(attended), THUMBNAIL_SIZE)


def _image(pixels: Tensor) -> Image.Image:
    """Converts uint8 pixels, (3, H, W), to an image."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
