"""Opening the dataset at a path, in any format."""

import os
from pathlib import Path

import numpy as np
import pytest

from vitral.config import DataConfig
from vitral.data.formats import FORMATS, folder, ilsvrc, packed, parquet, shards
from vitral.data.tools.packing import pack

from ..image_files import error_message, opened, paths, put_split

pytestmark = pytest.mark.usefixtures("nothing_printed")


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("index/pack.json", packed),
        ("progress.jsonl", packed),
        ("train.parquet", parquet),
        ("data/train-00000-of-00001.parquet", parquet),
        ("ILSVRC2012_img_train.tar", ilsvrc),
        ("ILSVRC2012_img_val.tar", ilsvrc),
        ("train-0000.tar", shards),
        ("val/0000.tar.gz", shards),
        ("cat/1.png", folder),
        ("notes.txt", folder),
    ],
)
def test_the_first_format_that_matches(tmp_path, file, expected):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    assert next(each for each in FORMATS if each.matches(tmp_path)) is expected
    assert not any(each.matches(tmp_path / "nowhere") for each in FORMATS)


def test_a_missing_folder(tmp_path):
    assert "nothing of that name" in error_message(tmp_path / "none")
    assert "known datasets are digits, synthetic, cifar10" in error_message(tmp_path / "none")


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("cifra10", "cifar10"), ("CIFAR-100", "cifar100"), ("imagenete", "imagenette")],
)
def test_a_misspelled_name(asked, meant):
    assert error_message(asked).endswith(f"did you mean {meant}?")


def test_a_file_instead_of_a_folder(tmp_path):
    (tmp_path / "set.zip").write_bytes(b"tar")
    assert "got a file; if it is an archive, extract it" in error_message(tmp_path / "set.zip")


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_a_folder_that_cannot_be_read(tmp_path):
    put_split(tmp_path, "train")
    (tmp_path / "train/cat").chmod(0)
    assert "Permission denied" in error_message(tmp_path)


def test_hold_out_leaves_the_validation_split_unused(tmp_path):
    put_split(tmp_path, "train", 10)
    put_split(tmp_path, "test", 4)
    full, chosen = opened(tmp_path), opened(tmp_path, hold_out=True, val_fraction=0.3)
    assert sorted(paths(chosen.train) + paths(chosen.val)) == paths(full.train)
    assert np.bincount(chosen.val.labels).tolist() == [3, 3]
    assert chosen.notes == (
        f"the validation images of {tmp_path.name} are not used: 6 of 20 training images "
        "(30% of each class) are held out, drawn with seed 0",
    )
    assert chosen.fingerprint != full.fingerprint
    # Without training, as for a final test, the dataset is the same as without hold_out.
    assert paths(opened(tmp_path, hold_out=True, train=False).val) == paths(full.val)


def test_images_are_held_out_only_once(tmp_path):
    put_split(tmp_path, "train", 10)
    asked, plain = opened(tmp_path, hold_out=True), opened(tmp_path)
    assert asked.fingerprint == plain.fingerprint
    assert asked.notes == plain.notes


@pytest.mark.parametrize("jpeg", [False, True])
def test_a_pack_holds_out_the_images_of_its_folder(tmp_path, capfd, jpeg):
    put_split(tmp_path / "set", "train", 10)
    put_split(tmp_path / "set", "val", 2)
    config = DataConfig(path=str(tmp_path / "set"))
    pack(config, 0, tmp_path / "pack", 8, jpeg, 0)
    capfd.readouterr()
    folder, packed = (opened(tmp_path / name, hold_out=True) for name in ("set", "pack"))
    for split in ("train", "val"):
        here, there = getattr(folder, split), getattr(packed, split)
        assert [Path(path).name for path in paths(here)] == [
            Path(path).name for path in paths(there)
        ]
        assert here.labels.tolist() == there.labels.tolist()
    seeds = {opened(tmp_path / "pack", seed, hold_out=True).fingerprint for seed in range(3)}
    assert len(seeds) == 3
    if not jpeg:
        full = opened(tmp_path / "pack").train
        assert len(packed.val) == 2
        for i, name in enumerate(packed.val.names):
            (row,) = np.flatnonzero((full.names == name) & (full.labels == packed.val.labels[i]))
            assert (packed.val.squares(np.array([i])) == full.squares(np.array([row]))).all()
