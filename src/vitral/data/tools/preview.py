"""Image grids, and a preview of a dataset before and after augmentation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vitral.config import Config, DataConfig
from vitral.data.formats import open_dataset
from vitral.data.loader import NO_AUGMENTATION, train_batches
from vitral.storage import replacing

MIN_TILE_SIZE = 96  # minimum side of a tile, in pixels
GAP = 4  # pixels between tiles


def to_pixels(images: Tensor, config: DataConfig) -> Tensor:
    """Undoes the normalization of images (B, C, H, W), float32; returns uint8 on the CPU."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    return ((images.cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def grid(images: Tensor, columns: int = 8) -> Tensor:
    """Arranges images (B, C, H, W), uint8, in one image (C, H, W), uint8; enlarges small ones."""
    factor = max(1, -(-MIN_TILE_SIZE // images.shape[-1]))
    tiles = F.interpolate(images, scale_factor=factor, mode="nearest")
    tiles = F.pad(tiles, (GAP, 0, GAP, 0), value=255)
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    blank = tiles.new_full((rows * columns - len(tiles), *tiles.shape[1:]), 255)
    tiles = torch.cat([tiles, blank]).unflatten(0, (rows, columns))
    picture = tiles.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return F.pad(picture, (0, GAP, 0, GAP), value=255)


def save(picture: Tensor, path: Path) -> None:
    """Writes an image (C, H, W), uint8, as PNG or JPEG according to its suffix, atomically."""
    kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
    with replacing(path) as building:
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(building, kind, quality=92)


def preview(config: Config, path: Path, count: int = 16) -> None:
    """Draws the first training images and, below each row, the same images after augmentation."""
    dataset = open_dataset(config.data, config.model.image_size, config.train.seed)
    assert dataset.train is not None
    plain = dataclasses.replace(NO_AUGMENTATION, repeats=config.augment.repeats)
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
