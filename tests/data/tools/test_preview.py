"""Image grids against torchvision's, and pictures of batches before and after augmentation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import make_grid

from vitral.config import AugmentConfig, Config, DataConfig, TrainConfig, ViTConfig
from vitral.data.augment import finish
from vitral.data.formats import open_dataset
from vitral.data.loader import NO_AUGMENTATION, eval_batches
from vitral.data.tools.preview import GAP, MIN_TILE_SIZE, grid, preview, save, to_pixels


def noise(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("columns", [1, 3, 8])
@pytest.mark.parametrize("count", [2, 3, 7, 8, 9, 16, 21])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (33, 33), (96, 96), (112, 112), (20, 30)])
def test_a_grid_equals_torchvision(count, columns, height, width):
    images = noise(count, 3, height, width)
    factor = -(-96 // width)
    larger = F.interpolate(images, scale_factor=factor, mode="nearest")
    expected = make_grid(larger, nrow=columns, padding=4, pad_value=255)
    ours = grid(images, columns)
    assert ours.dtype == torch.uint8
    assert torch.equal(ours, expected)


def test_a_single_image_has_the_same_frame():
    """torchvision returns it without a frame."""
    image = noise(1, 3, 96, 96)
    assert torch.equal(grid(image), F.pad(image[0], (4, 4, 4, 4), value=255))


def test_pixels_undo_the_normalization():
    config = DataConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert torch.equal(to_pixels(finish(pixels, None, config.mean, config.std), config), pixels)
    assert to_pixels(torch.tensor([-99.0, 99.0]).view(1, 1, 1, 2), config)[0, 0].tolist() == [
        [0, 255]
    ]


@pytest.mark.parametrize("augment", [NO_AUGMENTATION, AugmentConfig(flip=1.0, crop="none")])
def test_each_image_is_above_its_augmented_version(image_folder, tmp_path, augment):
    config = Config(
        model=ViTConfig(image_size=16, patch_size=4),
        data=DataConfig(path=str(image_folder)),
        augment=augment,
        train=TrainConfig(batch_size=20),
    )
    preview(config, tmp_path / "preview.png", count=10)
    with Image.open(tmp_path / "preview.png") as picture:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    step = MIN_TILE_SIZE + GAP
    assert pixels.shape == (3, 3 * step + GAP, 8 * step + GAP)  # 2 and 2 images in the last row
    tiles = pixels[:, GAP:, GAP:].unfold(1, MIN_TILE_SIZE, step).unfold(2, MIN_TILE_SIZE, step)
    tiles = tiles.permute(1, 2, 0, 3, 4).flatten(0, 1)
    plain, augmented = tiles[[*range(8), 16, 17]], tiles[[*range(8, 16), 18, 19]]
    assert torch.equal(augmented, plain if augment is NO_AUGMENTATION else plain.flip(3))
    assert (tiles[20:] == 255).all()
    train = open_dataset(config.data, 16, 0).train
    (batch,) = eval_batches(train, config, 40, 0, torch.device("cpu"))
    enlarged = F.interpolate(to_pixels(batch.images, config.data), scale_factor=6, mode="nearest")
    known = {image.numpy().tobytes() for image in enlarged}
    assert {image.contiguous().numpy().tobytes() for image in plain} <= known


def test_a_picture_is_written_unchanged(tmp_path):
    picture = noise(3, 5, 7)
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "a.png").symlink_to(tmp_path / "precious")  # is replaced
    save(picture, tmp_path / "a.png")
    assert (tmp_path / "precious").read_text() == "kept"
    with Image.open(tmp_path / "a.png") as written:
        assert written.size == (7, 5)
        assert torch.equal(torch.from_numpy(np.array(written)).permute(2, 0, 1), picture)
