"""Writing packs: their content, and resuming after a kill at any moment."""

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

from vitral.data.decode import decode
from vitral.data.formats.packed import matches, verify
from vitral.data.tools import packing
from vitral.errors import UserError
from vitral.storage import read_json

from ..pack_files import KINDS, SIDE, draw, opened, packed

pytestmark = pytest.mark.usefixtures("small_chunks")


def tree(root):
    """All files in a folder, with their contents."""
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def pillow(image, size):
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    small = picture.resize(size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def test_squares_are_squashed_images(source, tmp_path):
    packed(source, tmp_path / "pack")
    original, ours = opened(source), opened(tmp_path / "pack")
    assert (ours.name, ours.classes, ours.notes) == ("pack", original.classes, ())
    for before, after in ((original.train, ours.train), (original.val, ours.val)):
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
    original, ours = opened(source), opened(tmp_path / "pack")
    short_sides = set()
    for before, after in ((original.train, ours.train), (original.val, ours.val)):
        assert after.labels.tolist() == before.labels.tolist()
        assert after.names.tolist() == before.names.tolist()
        for i in range(len(before)):
            image, again = decode(before.read(i)), decode(after.read(i))
            height, width = image.shape[1:]
            scale = min(1, SIDE / min(height, width))
            assert again.shape == (3, round(height * scale), round(width * scale))
            short_sides.add(min(again.shape[1:]))
            expected = io.BytesIO()
            small = pillow(image, again.shape[:0:-1]).permute(1, 2, 0).numpy()
            Image.fromarray(small).save(expected, "JPEG", quality=90)
            tables = [
                Image.open(file).quantization for file in (expected, io.BytesIO(after.read(i)))
            ]
            assert tables[0] == tables[1]
            difference = again.int() - decode(expected.getvalue()).int()
            assert difference.abs().float().mean() < 1
    assert min(short_sides) < SIDE  # small images are not enlarged
    assert max(short_sides) == SIDE


@KINDS
def test_workers_do_not_change_the_pack(source, tmp_path, jpeg):
    for workers in (0, 2):
        packed(source, tmp_path / str(workers), jpeg, workers=workers)
    assert tree(tmp_path / "0") == tree(tmp_path / "2")
    assert verify(tmp_path / "0") == []


def kill_at_flush(number, *arguments):
    """Packs in a forked process that kills itself before flush `number` to the disk."""

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
def test_a_kill_at_any_time(source, tmp_path, jpeg, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK", 7)
    packed(source, tmp_path / "reference", jpeg)
    expected = tree(tmp_path / "reference")
    decoded = []
    monkeypatch.setattr(packing, "decode", lambda data: decoded.append(1) or decode(data))
    unfinished, number = 0, 0
    while kill_at_flush(number, source, tmp_path / f"{number}", jpeg):
        dst = tmp_path / f"{number}"
        assert matches(dst)
        if not (dst / "index/pack.json").exists():
            unfinished += 1
            with pytest.raises(UserError, match=r"finished pack.*to finish it, repeat"):
                opened(dst)
        lines = map(json.loads, (dst / "progress.jsonl").read_bytes().splitlines()[1:])
        written = sum(len(line["each"]) for line in lines)
        decoded.clear()
        packed(source, dst, jpeg)
        assert len(decoded) == 24 - written
        assert tree(dst) == expected
        number += 1
    assert tree(tmp_path / f"{number}") == expected
    assert unfinished > 2 * 4  # two flushes for each of four chunks


@KINDS
@pytest.mark.parametrize("cut", [1, 50])
def test_an_incomplete_line_of_progress_is_ignored(source, tmp_path, jpeg, cut):
    packed(source, tmp_path / "reference", jpeg)
    assert kill_at_flush(9, source, tmp_path / "pack", jpeg)
    progress = tmp_path / "pack/progress.jsonl"
    progress.write_bytes(progress.read_bytes()[:-cut])
    assert kill_at_flush(3, source, tmp_path / "pack", jpeg)
    packed(source, tmp_path / "pack", jpeg)
    assert tree(tmp_path / "pack") == tree(tmp_path / "reference")


@KINDS
def test_two_kills_and_more_workers(source, tmp_path, jpeg):
    packed(source, tmp_path / "reference", jpeg)
    for number in (5, 4):
        assert kill_at_flush(number, source, tmp_path / "pack", jpeg, SIDE, 2)
    packed(source, tmp_path / "pack", jpeg, workers=2)
    assert tree(tmp_path / "pack") == tree(tmp_path / "reference")


@KINDS
def test_corrupted_chunks_are_detected_and_repacked(source, tmp_path, jpeg):
    dst = tmp_path / "pack"
    assert kill_at_flush(9, source, dst, jpeg)
    images = dst / ("train.jpegs" if jpeg else "train.pixels")
    content = bytearray(images.read_bytes())
    content[70] ^= 1
    images.write_bytes(content)
    with pytest.raises(UserError, match="different data in 1 chunk of images; check the disk"):
        packed(source, dst, jpeg)
    assert not (dst / "index").exists()
    packed(source, dst, jpeg)
    assert verify(dst) == []
    packed(source, tmp_path / "reference", jpeg)
    ours, reference = opened(dst).train, opened(tmp_path / "reference").train
    if jpeg:
        assert [ours.read(i) for i in range(18)] == [reference.read(i) for i in range(18)]
    else:
        assert (ours.images == reference.images).all()


def broken(path):
    path.write_bytes(path.read_bytes()[:60])


@KINDS
def test_broken_images_are_listed_and_can_be_fixed(source, tmp_path, jpeg, monkeypatch):
    packed(source, tmp_path / "reference", jpeg)
    dst, kept = tmp_path / "pack", tmp_path / "kept"
    shutil.copytree(source, kept)
    for name in ("train/cat/1.jpg", "train/dog/8.jpg", "val/dog/0.jpg"):
        broken(source / name)
    with pytest.raises(UserError, match=r"3 broken: .*cat/1.jpg: .*dog/8.jpg: .*val/dog/0"):
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
    ours, reference = opened(dst), opened(tmp_path / "reference")
    for records, other in ((ours.train, reference.train), (ours.val, reference.val)):
        for i in range(len(records)):
            if jpeg:
                assert records.read(i) == other.read(i)
            else:
                assert (records.images[i] == other.images[i]).all()


def test_at_most_ten_broken_images_are_named(source, tmp_path):
    for path in (source / "train").rglob("*.jpg"):
        broken(path)
    with pytest.raises(UserError, match="18 broken") as caught:
        packed(source, tmp_path / "pack")
    assert str(caught.value).count(".jpg: ") == 10


def test_the_source_must_not_change_during_packing(source, tmp_path):
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


def test_a_pack_in_use_is_rejected(source, tmp_path):
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
        with pytest.raises(UserError, match="another process that is packing there; wait for it"):
            packed(source, dst)
    finally:
        over.set()
        holder.join()
    packed(source, dst)


@pytest.mark.parametrize("begun", [True, False], ids=["unfinished", "finished"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 32}, "expected a pack with size 32, got size 24; specify another"),
        ({"jpeg": True}, "expected a pack with jpeg True, got jpeg False"),
        ({"source": "other"}, "expected a pack of these images, got a pack of different images"),
    ],
)
def test_nothing_else_is_overwritten(source, tmp_path, begun, change, message):
    dst = tmp_path / "pack"
    if begun:
        assert kill_at_flush(5, source, dst)
    else:
        packed(source, dst)
        assert packed(source, dst).endswith("24 images, already packed")
    for name in ("train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png"):
        draw(tmp_path / "other" / name, seed=1)
    before = tree(dst)
    arguments = {"source": source, **change}
    arguments["source"] = tmp_path / arguments["source"]
    with pytest.raises(UserError, match=message):
        packed(dst=dst, **arguments)
    assert tree(dst) == before


def test_a_folder_with_other_files_is_left_untouched(source, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes").write_text("other")
    (tmp_path / "file").write_text("other")
    for dst in (tmp_path / "other", tmp_path / "file", source):
        with pytest.raises(UserError, match="an empty folder, or none, got something else"):
            packed(source, dst)
    assert tree(tmp_path / "other") == {Path("notes"): b"other"}
    assert not (source / "progress.jsonl").exists()


def test_packs_and_pixel_sets_are_rejected(source, tmp_path):
    packed(source, tmp_path / "pack")
    for path in (tmp_path / "pack", "digits"):
        with pytest.raises(UserError, match="expected encoded images"):
            packed(path, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@KINDS
def test_without_disk_space_nothing_is_written(source, tmp_path, jpeg, monkeypatch, capsys):
    packed(source, tmp_path / "reference", jpeg)
    written = sum(path.stat().st_size for path in (tmp_path / "reference").glob("*.*"))
    assert jpeg or written == 24 * 3 * SIDE * SIDE
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=written - 1))
    capsys.readouterr()
    with pytest.raises(UserError, match=r"of free disk space, got 0\.000 GB; free some"):
        packed(source, tmp_path / "new/pack", jpeg)
    assert "24 images take about 0.000 GB; the disk has 0.000 GB free" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()
    # The size of JPEGs is estimated from a sample, here from all of them.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=written + 1))
    packed(source, tmp_path / "new/pack", jpeg)


def test_the_index_records_its_source(source, tmp_path):
    packed(source, tmp_path / "pack")
    index = read_json(tmp_path / "pack/index", "pack.json")
    assert index["source"] == opened(source).fingerprint
    assert (index["size"], index["images"]) == (SIDE, {"train": 18, "val": 6})
