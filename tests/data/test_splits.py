"""Datasets: held-out images and fingerprints."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from vitral.config import DataConfig
from vitral.data import records, splits
from vitral.data.formats import open_dataset
from vitral.data.records import Pixels, Spans
from vitral.data.splits import Dataset

from .image_files import error_message, opened, paths, put, put_split

pytestmark = pytest.mark.usefixtures("nothing_printed")


def test_digits_hold_out_training_images():
    full = open_dataset(DataConfig(), 8, 0)
    first, other = (open_dataset(DataConfig(hold_out=True), 8, seed) for seed in (0, 1))
    tenth = np.rint(np.bincount(full.train.labels) / 10)
    assert np.bincount(first.val.labels).tolist() == tenth.tolist()
    assert len(first.train) + len(first.val) == 1437
    known = {image.numpy().tobytes() for image in full.train.images}
    held = [image.numpy().tobytes() for image in first.val.images]
    assert known.issuperset(held)
    assert not {image.numpy().tobytes() for image in first.train.images} & {*held}
    assert first.fingerprint != other.fingerprint


def test_one_image_of_each_class_stays_in_train(tmp_path):
    put_split(tmp_path, "train", 2)
    dataset = opened(tmp_path, val_fraction=0.99)
    assert np.bincount(dataset.train.labels).tolist() == [1, 1]


def test_the_held_out_part_depends_only_on_seed_and_relative_paths(tmp_path):
    put(tmp_path, *(f"one/{name}/{i}.png" for name in "ab" for i in range(40)))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    one, two = opened(tmp_path / "one"), opened(tmp_path / "two")
    assert paths(one.val) == paths(two.val)
    assert one.fingerprint == two.fingerprint
    assert paths(one.val) != paths(opened(tmp_path / "one", seed=1).val)
    # It does not depend on the number of preceding images, either.
    (tmp_path / "two" / paths(two.train)[0]).unlink()
    assert paths(opened(tmp_path / "two").val) == paths(one.val)


def test_classes_that_differ(tmp_path):
    put_split(tmp_path, "train", 1, [f"c{i}" for i in range(9)])
    put_split(tmp_path, "val", 1, ["c0", "c1", "c2", "c3", "x"])
    message = error_message(tmp_path)
    assert "only in the training split: c4, c5, c6 and 2 more, only in validation: x;" in message


def test_nothing_to_hold_out(tmp_path):
    put_split(tmp_path, "train", 1)
    assert "no class has enough images" in error_message(tmp_path)


def test_the_fingerprint_distinguishes_datasets(tmp_path):
    put_split(tmp_path, "train")
    put_split(tmp_path, "val")
    seen = {opened(tmp_path).fingerprint}
    assert {opened(tmp_path).fingerprint} == seen
    for change in (
        lambda: (tmp_path / "train/cat/000.png").rename(tmp_path / "train/cat/a.png"),
        lambda: (tmp_path / "train/cat/001.png").write_bytes(b"other"),
        lambda: (tmp_path / "train/cat/a.png").rename(tmp_path / "train/dog/a.png"),
        lambda: (tmp_path / "val/cat/000.png").unlink(),
        lambda: [(tmp_path / s / "dog").rename(tmp_path / s / "eel") for s in ("train", "val")],
    ):
        before = len(seen)
        change()
        seen.add(opened(tmp_path).fingerprint)
        assert len(seen) == before + 1


def test_the_fingerprint_distinguishes_pixel_datasets():
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), np.array([0, 1])
    changed = images.clone()
    changed[1, 2, 3, 3] = 1
    one, other = Pixels(images, labels), Pixels(changed, labels)
    wide, turned = Pixels(images.view(2, 3, 2, 8), labels), Pixels(images, labels[::-1])
    sets = [Dataset("", ("a", "b"), one, val) for val in (one, other, wide, turned)]
    sets += [Dataset("", ("a", "c"), one, one), Dataset("", ("a", "b"), other, one)]
    sets += [Dataset("", ("a", "b"), one, None), Dataset("", ("a", "b"), None, one)]
    assert len({dataset.fingerprint for dataset in sets}) == len(sets)
    again = Dataset("elsewhere", ("a", "b"), one, one, choices=("read me",))
    assert again.fingerprint == sets[0].fingerprint


def test_the_fingerprint_is_computed_once(monkeypatch):
    dataset = opened("digits")
    before = dataset.fingerprint
    monkeypatch.setattr(splits.hashlib, "sha256", None)
    assert dataset.fingerprint == before


@pytest.mark.parametrize(("limit", "kept"), [(1024, 64), (64, 8), (7, 1)])
def test_the_number_of_open_archives_is_limited(tmp_path, monkeypatch, limit, kept):
    monkeypatch.setattr(records, "max_open_files", lambda: limit)
    paths = [tmp_path / f"{k}.tar" for k in range(kept + 9)]
    for k, path in enumerate(paths):
        path.write_bytes(b"%04d" % k)
    stamps = tuple((path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    everything = np.arange(len(paths))
    columns = (np.zeros_like(everything), np.full(len(paths), 4), np.array([b"x"] * len(paths)))
    spans = Spans(tuple(paths), stamps, everything, *columns, everything)
    before = len([*Path("/proc/self/fd").iterdir()])
    for i in [*everything, *everything[::-1], 0, len(paths) - 1]:
        assert spans.read(i) == b"%04d" % i
    assert len([*Path("/proc/self/fd").iterdir()]) - before == kept
