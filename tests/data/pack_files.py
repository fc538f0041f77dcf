"""Packs of small images."""

import numpy as np
import pytest
from PIL import Image

from vitral.config import DataConfig
from vitral.data.formats import open_dataset
from vitral.data.tools.packing import pack

SIDE = 24
KINDS = pytest.mark.parametrize("jpeg", [False, True], ids=["pixels", "jpegs"])


def draw(path, seed, size=None):
    """Writes smooth random colors, by default at a random size."""
    rng = np.random.default_rng(seed)
    size = size or tuple(rng.integers(15, 70, 2).tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    coarse.resize(size, Image.Resampling.BICUBIC).save(path, quality=95)


def packed(source, dst, jpeg=False, size=SIDE, workers=0):
    return pack(DataConfig(path=str(source)), 0, dst, size, jpeg, workers)


def opened(path, train=True):
    return open_dataset(DataConfig(path=str(path)), 224, 0, train=train)
