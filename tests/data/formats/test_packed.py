"""Packs: what is in them, that a kill at any moment costs nothing, and what is refused."""

import dataclasses
import io
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitral import storage
from vitral.config import AugmentConfig, Config, DataConfig, TrainConfig, ViTConfig
from vitral.data.decode import decode
from vitral.data.formats import open_dataset
from vitral.data.formats.packed import matches, verify
from vitral.data.loader import train_batches
from vitral.data.tools import packing
from vitral.data.tools.packing import pack
from vitral.errors import UserError
from vitral.storage import read_json

SIDE = 24
KINDS = pytest.mark.parametrize("jpeg", [False, True], ids=["pixels", "jpegs"])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(packing, "CHUNK", 4)


def draw(path, seed, size=None):
    """Smooth colours, drawn at a size of their own."""
    rng = np.random.default_rng(seed)
    size = size or tuple(rng.integers(15, 70, 2).tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    coarse.resize(size, Image.Resampling.BICUBIC).save(path, quality=95)


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "source"
    for split, count in (("train", 9), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                draw(root / split / name / f"{i}.jpg", seed=100 * label + 10 * count + i)
    return root


def packed(source, dst, jpeg=False, size=SIDE, workers=0):
    return pack(DataConfig(path=str(source)), 0, dst, size, jpeg, workers)


def opened(path, train=True):
    return open_dataset(DataConfig(path=str(path)), 224, 0, train=train)


def tree(root):
    """All that is in a folder."""
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def pillow(image, size):
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    small = picture.resize(size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def test_squares_are_the_images_squashed(source, tmp_path):
    packed(source, tmp_path / "pack")
    theirs, ours = opened(source), opened(tmp_path / "pack")
    assert (ours.name, ours.classes, ours.notes) == ("pack", theirs.classes, ())
    for before, after in ((theirs.train, ours.train), (theirs.val, ours.val)):
        assert after.labels.tolist() == before.labels.tolist()
        assert after.names.tolist() == before.names.tolist()
        assert after.images.shape == (len(before), 3, SIDE, SIDE)
        assert isinstance(after.images, np.memmap)
        assert not after.images.flags.writeable
        for i in range(len(before)):
            image = decode(before.read(i))
            assert after.sides[i].tolist() == list(image.shape[1:])
            difference = torch.tensor(after.images[i]).int() - pillow(image, (SIDE, SIDE)).int()
            assert difference.abs().max() <= 1


def test_jpegs_are_smaller_and_keep_their_shape(source, tmp_path):
    packed(source, tmp_path / "pack", jpeg=True)
    theirs, ours = opened(source), opened(tmp_path / "pack")
    shorts = set()
    for before, after in ((theirs.train, ours.train), (theirs.val, ours.val)):
        assert after.labels.tolist() == before.labels.tolist()
        assert after.names.tolist() == before.names.tolist()
        for i in range(len(before)):
            image, again = decode(before.read(i)), decode(after.read(i))
            height, width = image.shape[1:]
            share = min(1, SIDE / min(height, width))
            assert again.shape == (3, round(height * share), round(width * share))
            shorts.add(min(again.shape[1:]))
            expected = io.BytesIO()
            small = pillow(image, again.shape[:0:-1]).permute(1, 2, 0).numpy()
            Image.fromarray(small).save(expected, "JPEG", quality=90)
            tables = [
                Image.open(file).quantization for file in (expected, io.BytesIO(after.read(i)))
            ]
            assert tables[0] == tables[1]
            difference = again.int() - decode(expected.getvalue()).int()
            assert difference.abs().float().mean() < 1
    assert min(shorts) < SIDE  # some were smaller and stayed so
    assert max(shorts) == SIDE


def test_crops_are_those_of_the_encoded_images(source, tmp_path):
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
    grey = 0.226 * 255  # a standard deviation
    assert (encoded - squares).abs().mean() * grey < 1.5
    assert (encoded - crops(tmp_path / "pack", seed=1)).abs().mean() * grey > 20


@KINDS
def test_workers_change_nothing(source, tmp_path, jpeg):
    for workers in (0, 2):
        packed(source, tmp_path / str(workers), jpeg, workers=workers)
    assert tree(tmp_path / "0") == tree(tmp_path / "2")
    assert verify(tmp_path / "0") == []


def test_held_out_images_stay_held_out(source, tmp_path):
    alone = source / "train"
    assert "packed and read back" in packed(alone, tmp_path / "pack")
    theirs, ours = opened(alone), opened(tmp_path / "pack")
    assert ours.val.names.tolist() == theirs.val.names.tolist()
    assert ours.train.names.tolist() == theirs.train.names.tolist()
    only = opened(tmp_path / "pack", train=False)
    assert only.train is None
    assert only.val.names.tolist() == theirs.val.names.tolist()


def test_the_fingerprint_is_that_of_the_pixels(source, tmp_path):
    packed(source, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    fingerprint = opened(tmp_path / "a").fingerprint
    assert opened(tmp_path / "b").fingerprint == fingerprint
    # Runs are resumed by it: of a whole pack it is what it was before parts could be taken.
    whole = opened(tmp_path / "a").train
    assert [*whole.identity()] == [whole.digest.encode(), whole.sides.astype("<i8").tobytes()]
    one = source / "train/cat/0.jpg"
    with Image.open(one) as picture:
        size = picture.size
    draw(one, seed=5, size=size)
    packed(source, tmp_path / "c")
    assert opened(tmp_path / "c").fingerprint != fingerprint


def kill_at_flush(number, *arguments):
    """Packs in a forked process that kills itself where it is about to flush to the disk."""

    def run():
        flush, left = os.fsync, [number]

        def counting(descriptor):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(descriptor)

        os.fsync = counting
        packed(*arguments)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


@KINDS
def test_a_kill_at_any_moment(source, tmp_path, jpeg, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK", 7)
    packed(source, tmp_path / "whole", jpeg)
    expected = tree(tmp_path / "whole")
    decoded = []
    monkeypatch.setattr(packing, "decode", lambda data: decoded.append(1) or decode(data))
    unfinished, number = 0, 0
    while kill_at_flush(number, source, tmp_path / f"{number}", jpeg):
        dst = tmp_path / f"{number}"
        assert matches(dst)
        if not (dst / "index/pack.json").exists():
            unfinished += 1
            with pytest.raises(UserError, match=r"finished pack.*goes on with it"):
                opened(dst)
        lines = map(json.loads, (dst / "progress.jsonl").read_bytes().splitlines()[1:])
        there = sum(len(line["each"]) for line in lines)
        decoded.clear()
        packed(source, dst, jpeg)
        assert len(decoded) == 24 - there
        assert tree(dst) == expected
        number += 1
    assert tree(tmp_path / f"{number}") == expected
    assert unfinished > 2 * 4  # two flushes for each of four chunks


@KINDS
@pytest.mark.parametrize("cut", [1, 50])
def test_a_torn_line_of_the_progress(source, tmp_path, jpeg, cut):
    packed(source, tmp_path / "whole", jpeg)
    assert kill_at_flush(9, source, tmp_path / "pack", jpeg)
    progress = tmp_path / "pack/progress.jsonl"
    progress.write_bytes(progress.read_bytes()[:-cut])
    assert kill_at_flush(3, source, tmp_path / "pack", jpeg)
    packed(source, tmp_path / "pack", jpeg)
    assert tree(tmp_path / "pack") == tree(tmp_path / "whole")


@KINDS
def test_two_kills_and_more_workers(source, tmp_path, jpeg):
    packed(source, tmp_path / "whole", jpeg)
    for number in (5, 4):
        assert kill_at_flush(number, source, tmp_path / "pack", jpeg, SIDE, 2)
    packed(source, tmp_path / "pack", jpeg, workers=2)
    assert tree(tmp_path / "pack") == tree(tmp_path / "whole")


@KINDS
def test_what_the_disk_spoils_is_found_and_packed_anew(source, tmp_path, jpeg):
    dst = tmp_path / "pack"
    assert kill_at_flush(9, source, dst, jpeg)
    images = dst / ("train.jpegs" if jpeg else "train.pixels")
    content = bytearray(images.read_bytes())
    content[70] ^= 1
    images.write_bytes(content)
    with pytest.raises(UserError, match="1 chunks of images that read otherwise; check the disk"):
        packed(source, dst, jpeg)
    assert not (dst / "index").exists()
    packed(source, dst, jpeg)
    assert verify(dst) == []
    packed(source, tmp_path / "whole", jpeg)
    ours, whole = opened(dst).train, opened(tmp_path / "whole").train
    if jpeg:
        assert [ours.read(i) for i in range(18)] == [whole.read(i) for i in range(18)]
    else:
        assert (ours.images == whole.images).all()


@KINDS
def test_verify_names_the_images(source, tmp_path, jpeg):
    dst = tmp_path / "pack"
    packed(source, dst, jpeg)
    images = dst / ("train.jpegs" if jpeg else "train.pixels")
    content = bytearray(images.read_bytes())
    content[-1] ^= 128
    images.write_bytes(content)
    assert verify(dst) == [f"{images}: images 16 to 17 are not what was written"]


def broken(path):
    path.write_bytes(path.read_bytes()[:60])


@KINDS
def test_broken_images_are_listed_and_mended(source, tmp_path, jpeg, monkeypatch):
    packed(source, tmp_path / "whole", jpeg)
    dst, kept = tmp_path / "pack", tmp_path / "kept"
    shutil.copytree(source, kept)
    for name in ("train/cat/1.jpg", "train/dog/8.jpg", "val/dog/0.jpg"):
        broken(source / name)
    with pytest.raises(UserError, match=r"3 that cannot: .*cat/1.jpg: .*dog/8.jpg: .*val/dog/0"):
        packed(source, dst, jpeg)
    with pytest.raises(UserError, match="a finished pack"):
        opened(dst)
    shutil.rmtree(source)
    kept.rename(source)
    decoded = []
    monkeypatch.setattr(packing, "decode", lambda data: decoded.append(1) or decode(data))
    packed(source, dst, jpeg)
    assert len(decoded) == 4 + 2 + 4  # the chunks of the three
    assert verify(dst) == []
    ours, whole = opened(dst), opened(tmp_path / "whole")
    for mine, other in ((ours.train, whole.train), (ours.val, whole.val)):
        for i in range(len(mine)):
            if jpeg:
                assert mine.read(i) == other.read(i)
            else:
                assert (mine.images[i] == other.images[i]).all()


def test_of_many_broken_images_ten_are_named(source, tmp_path):
    for path in (source / "train").rglob("*.jpg"):
        broken(path)
    with pytest.raises(UserError, match="18 that cannot") as caught:
        packed(source, tmp_path / "pack")
    assert str(caught.value).count(".jpg: ") == 10


def test_the_source_may_not_change_under_an_unfinished_pack(source, tmp_path):
    dst = tmp_path / "pack"
    assert kill_at_flush(5, source, dst)  # two chunks of four are there
    with (source / "train/cat/1.jpg").open("ab") as file:
        file.write(b"more")
    before = tree(dst)
    with pytest.raises(UserError, match=r"pack of these images.*source has changed"):
        packed(source, dst)
    (source / "train/dog/9.jpg").write_bytes((source / "train/dog/8.jpg").read_bytes())
    with pytest.raises(UserError, match="source has changed"):
        packed(source, dst)
    assert tree(dst) == before


def test_another_process_packs_there(source, tmp_path):
    dst = tmp_path / "pack"
    assert kill_at_flush(5, source, dst)
    context = multiprocessing.get_context("fork")
    ready, over = context.Event(), context.Event()

    def hold():
        with (dst / "progress.jsonl").open("a+b") as file:
            packing.fcntl.lockf(file, packing.fcntl.LOCK_EX)
            ready.set()
            over.wait()

    holder = context.Process(target=hold)
    holder.start()
    ready.wait()
    try:
        with pytest.raises(UserError, match="another process that packs there; wait for it"):
            packed(source, dst)
    finally:
        over.set()
        holder.join()
    packed(source, dst)


@pytest.mark.parametrize("begun", [True, False], ids=["unfinished", "finished"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 32}, "expected a pack with size 32, got size 24; give another"),
        ({"jpeg": True}, "expected a pack with jpeg True, got jpeg False"),
        ({"source": "other"}, "expected a pack of these images, got a pack of others"),
    ],
)
def test_nothing_else_is_overwritten(source, tmp_path, begun, change, message):
    dst = tmp_path / "pack"
    if begun:
        assert kill_at_flush(5, source, dst)
    else:
        packed(source, dst)
        assert packed(source, dst).endswith("24 images, packed before")
    for name in ("train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png"):
        draw(tmp_path / "other" / name, seed=1)
    before = tree(dst)
    arguments = {"source": source, **change}
    arguments["source"] = tmp_path / arguments["source"]
    with pytest.raises(UserError, match=message):
        packed(dst=dst, **arguments)
    assert tree(dst) == before


def test_a_folder_with_other_things_is_left_alone(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for dst in (tmp_path / "mine", tmp_path / "file", source):
        with pytest.raises(UserError, match="an empty folder, or none, got something else"):
            packed(source, dst)
    assert tree(tmp_path / "mine") == {Path("notes"): b"mine"}
    assert not (source / "progress.jsonl").exists()


def test_a_pack_or_pixels_are_not_packed(source, tmp_path):
    packed(source, tmp_path / "pack")
    for path in (tmp_path / "pack", "digits"):
        with pytest.raises(UserError, match="expected encoded images"):
            packed(path, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@KINDS
def test_without_room_nothing_is_written(source, tmp_path, jpeg, monkeypatch, capsys):
    packed(source, tmp_path / "whole", jpeg)
    written = sum(path.stat().st_size for path in (tmp_path / "whole").glob("*.*"))
    assert jpeg or written == 24 * 3 * SIDE * SIDE
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=written - 1))
    capsys.readouterr()
    with pytest.raises(UserError, match=r"of free disk, got 0\.000 GB; make room"):
        packed(source, tmp_path / "new/pack", jpeg)
    assert "24 images take about 0.000 GB; the disk has 0.000 GB" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()
    # The size of JPEGs is that of a sample, here of all.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=written + 1))
    packed(source, tmp_path / "new/pack", jpeg)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("train.pixels", lambda data: data[:-1], "train.pixels: expected 31,104 bytes, got 31,103"),
        ("val.pixels", None, "val.pixels: expected to read it, got No such file"),
        ("index/train.safetensors", lambda data: data[:-9] + bytes(9), "train.safetensors: its co"),
        ("index/val.safetensors", lambda data: data[:-9], "val.safetensors: its content is not"),
        ("index/val.safetensors", None, "val.safetensors: No such file"),
        ("index/manifest.json", None, "manifest.json: No such file"),
        ("index/pack.json", lambda data: data[:-9], "pack.json: its content is not"),
        ("index/pack.json", lambda data: data.replace(b"cat", b"cow"), "pack.json: its content"),
        ("index/pack.json", None, "expected a finished pack"),
    ],
)
def test_what_is_not_whole_is_refused(source, tmp_path, file, change, message):
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


def test_another_version_is_refused(source, tmp_path):
    packed(source, tmp_path / "pack")
    index = tmp_path / "pack/index"
    documents = {"pack": {**read_json(index, "pack.json"), "version": 2}}
    names = [path.stem for path in index.glob("*.safetensors")]
    storage.write(index, {name: storage.read_tensors(index, name) for name in names}, documents)
    with pytest.raises(UserError, match="expected a pack of version 1, got version 2"):
        opened(tmp_path / "pack")


def test_jpegs_cut_short_are_refused(source, tmp_path):
    packed(source, tmp_path / "pack", jpeg=True)
    images = tmp_path / "pack/val.jpegs"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"val.jpegs: expected [\d,]+ bytes, got [\d,]+; copy"):
        opened(tmp_path / "pack")


def test_a_class_may_be_called_index(tmp_path):
    for name in ("index/1.png", "index/2.png", "other/1.png", "other/2.png"):
        draw(tmp_path / "set" / name, seed=3)
    assert not matches(tmp_path / "set")
    assert opened(tmp_path / "set").classes == ("index", "other")


def test_the_index_says_where_it_comes_from(source, tmp_path):
    packed(source, tmp_path / "pack")
    index = read_json(tmp_path / "pack/index", "pack.json")
    assert index["source"] == opened(source).fingerprint
    assert (index["size"], index["images"]) == (SIDE, {"train": 18, "val": 6})
