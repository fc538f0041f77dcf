"""Grids of images, as a batch looks to the model."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from vitral.config import DataConfig

SIDE = 96  # pixels that an image is at least shown with


def to_pixels(images: Tensor, config: DataConfig) -> Tensor:
    """Undoes the normalisation: images (B, C, H, W), float32, to uint8 on the CPU."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    return ((images.cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def grid(images: Tensor, columns: int = 8) -> Tensor:
    """One picture (C, H, W), uint8, of images (B, C, H, W), uint8; small ones are enlarged."""
    factor = max(1, -(-SIDE // images.shape[-1]))
    larger = F.interpolate(images, scale_factor=factor, mode="nearest")
    return make_grid(larger, nrow=columns, padding=4, pad_value=255)


def save(picture: Tensor, path: Path) -> None:
    """Writes a picture (C, H, W), uint8, in the format that the path's ending names."""
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path, quality=92)
