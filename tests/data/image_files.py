"""Small image folders, opened successfully or with an error."""

import os

import pytest
from PIL import Image

from vitral.config import DataConfig
from vitral.data.formats import open_dataset
from vitral.errors import UserError


def put(root, *paths):
    """Writes a small image at each path, each with its own color."""
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (len(path) * 7 % 256, hash(path) % 256, 9)).save(file, "PNG")


def put_split(root, split, count=3, classes=("cat", "dog")):
    put(root, *(f"{split}/{name}/{i:03d}.png" for name in classes for i in range(count)))


def opened(root, seed=0, **options):
    train = options.pop("train", True)
    return open_dataset(DataConfig(path=str(root), **options), 32, seed, train=train)


def paths(records):
    return [os.fsdecode(path) for path in records.names]


def error_message(root, **options):
    with pytest.raises(UserError) as caught:
        opened(root, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(root) in message
    assert "expected" in message
    assert "got" in message
    assert "; " in message
    return message
