"""Reading packs, and rejecting invalid ones."""

import dataclasses
import shutil

import pytest
import torch
from PIL import Image

from vitral import storage
from vitral.config import AugmentConfig, Config, TrainConfig, ViTConfig
from vitral.data.formats.packed import matches, verify
from vitral.data.loader import train_batches
from vitral.errors import UserError
from vitral.storage import read_json

from ..pack_files import KINDS, draw, opened, packed

pytestmark = pytest.mark.usefixtures("small_chunks")


def test_crops_equal_those_of_the_encoded_images(source, tmp_path):
    packed(source, tmp_path / "pack", size=64)
    config = Config(
        model=ViTConfig(image_size=32, patch_size=8),
        augment=AugmentConfig(),
        train=TrainConfig(batch_size=6),
    )

    def crops(path, seed=0):
        again = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        records = opened(path).train
        device = torch.device("cpu")
        found = train_batches(
            records,
            again,
            2,
            steps=range(6),
            total_steps=6,
            micro_batch=6,
            workers=0,
            device=device,
        )
        return torch.cat([batch.images for batch in found])

    encoded, squares = crops(source), crops(tmp_path / "pack")
    gray = 0.226 * 255  # gray levels per standard deviation
    assert (encoded - squares).abs().mean() * gray < 1.5
    assert (encoded - crops(tmp_path / "pack", seed=1)).abs().mean() * gray > 20


def test_held_out_images_stay_held_out(source, tmp_path):
    folder = source / "train"
    assert "packed and read back" in packed(folder, tmp_path / "pack")
    original, ours = opened(folder), opened(tmp_path / "pack")
    assert ours.val.names.tolist() == original.val.names.tolist()
    assert ours.train.names.tolist() == original.train.names.tolist()
    validation = opened(tmp_path / "pack", train=False)
    assert validation.train is None
    assert validation.val.names.tolist() == original.val.names.tolist()


def test_the_fingerprint_is_that_of_the_pixels(source, tmp_path):
    packed(source, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    fingerprint = opened(tmp_path / "a").fingerprint
    assert opened(tmp_path / "b").fingerprint == fingerprint
    # Resuming depends on it: for a complete pack, it is the same as before packs had subsets.
    full = opened(tmp_path / "a").train
    assert [*full.identity()] == [full.digest.encode(), full.sides.astype("<i8").tobytes()]
    one = source / "train/cat/0.jpg"
    with Image.open(one) as picture:
        size = picture.size
    draw(one, seed=5, size=size)
    packed(source, tmp_path / "c")
    assert opened(tmp_path / "c").fingerprint != fingerprint


@KINDS
def test_verify_names_the_images(source, tmp_path, jpeg):
    dst = tmp_path / "pack"
    packed(source, dst, jpeg)
    images = dst / ("train.jpegs" if jpeg else "train.pixels")
    content = bytearray(images.read_bytes())
    content[-1] ^= 128
    images.write_bytes(content)
    assert verify(dst) == [f"{images}: images 16 to 17 differ from what was written"]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("train.pixels", lambda data: data[:-1], "train.pixels: expected 31,104 bytes, got 31,103"),
        ("val.pixels", None, "val.pixels: expected to read it, got No such file"),
        ("index/train.safetensors", lambda data: data[:-9] + bytes(9), "train.safetensors: its co"),
        ("index/val.safetensors", lambda data: data[:-9], "val.safetensors: its content differs"),
        ("index/val.safetensors", None, "val.safetensors: No such file"),
        ("index/manifest.json", None, "manifest.json: No such file"),
        ("index/pack.json", lambda data: data[:-9], "pack.json: its content differs"),
        ("index/pack.json", lambda data: data.replace(b"cat", b"cow"), "pack.json: its content"),
        ("index/pack.json", None, "expected a finished pack"),
    ],
)
def test_incomplete_packs_are_rejected(source, tmp_path, file, change, message):
    dst = tmp_path / "pack"
    packed(source, dst)
    (dst / "progress.jsonl").touch()
    if change:
        (dst / file).write_bytes(change((dst / file).read_bytes()))
    else:
        (dst / file).unlink()
    with pytest.raises(UserError, match=message) as caught:
        opened(dst)
    assert "\n" not in str(caught.value)


def test_another_version_is_rejected(source, tmp_path):
    packed(source, tmp_path / "pack")
    index = tmp_path / "pack/index"
    documents = {"pack": {**read_json(index, "pack.json"), "version": 2}}
    names = [path.stem for path in index.glob("*.safetensors")]
    storage.write(index, {name: storage.read_tensors(index, name) for name in names}, documents)
    with pytest.raises(UserError, match="expected a pack of version 1, got version 2"):
        opened(tmp_path / "pack")


def test_truncated_jpegs_are_rejected(source, tmp_path):
    packed(source, tmp_path / "pack", jpeg=True)
    images = tmp_path / "pack/val.jpegs"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"val.jpegs: expected [\d,]+ bytes, got [\d,]+; copy"):
        opened(tmp_path / "pack")


def test_a_class_may_be_named_index(tmp_path):
    for name in ("index/1.png", "index/2.png", "other/1.png", "other/2.png"):
        draw(tmp_path / "set" / name, seed=3)
    assert not matches(tmp_path / "set")
    assert opened(tmp_path / "set").classes == ("index", "other")
