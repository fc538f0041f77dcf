"""Grids of images, as a batch looks to the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from vitral.config import Config, DataConfig
from vitral.data.loader import STILL, train_batches
from vitral.data.sources import open_dataset

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


def preview(config: Config, path: Path, count: int = 16) -> None:
    """A picture of the first training images: rows as in validation, and below them augmented."""
    dataset = open_dataset(config.data, config.model.image_size, config.train.seed)
    assert dataset.train is not None
    plain = dataclasses.replace(STILL, repeats=config.augment.repeats)
    shown = []
    for augmentation in (plain, config.augment):
        batches = train_batches(
            dataset.train,
            dataclasses.replace(config, augment=augmentation),
            len(dataset.classes),
            steps=range(1),
            total_steps=1,
            micro_batch=count,
            workers=0,
            device=torch.device("cpu"),
        )
        shown.append(to_pixels(next(batches).images, config.data).split(8))
    rows = [row for pair in zip(*shown, strict=True) for row in pair]
    save(grid(torch.cat(rows)), path)
