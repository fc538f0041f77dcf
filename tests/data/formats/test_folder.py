import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from vitral.config import DataConfig
from vitral.data import records
from vitral.data.decode import decode
from vitral.data.formats import folder as sources
from vitral.data.formats import open_dataset
from vitral.data.records import Dataset, Files, Pixels
from vitral.data.tools.packing import pack
from vitral.errors import UserError


@pytest.fixture(autouse=True)
def _nothing_printed(capfd):
    yield
    assert capfd.readouterr() == ("", "")


def put(root, *paths):
    """Writes a small image of its own colour at each path."""
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


def refusal(root, **options):
    with pytest.raises(UserError) as caught:
        opened(root, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(root) in message
    assert "expected" in message
    assert "got" in message
    assert "; " in message
    return message


def test_train_and_val(tmp_path):
    put_split(tmp_path, "train", 3, ("dog", "cat"))
    put_split(tmp_path, "val", 2)
    dataset = opened(tmp_path)
    assert (dataset.name, dataset.classes, dataset.notes) == (tmp_path.name, ("cat", "dog"), ())
    assert isinstance(dataset.train, Files)
    assert isinstance(dataset.val, Files)
    expected = [f"train/{name}/{i:03d}.png" for name in ("cat", "dog") for i in range(3)]
    assert paths(dataset.train) == expected
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.val.labels.tolist() == [0, 0, 1, 1]
    assert dataset.train.labels.dtype == dataset.train.sizes.dtype == np.int64
    for i, path in enumerate(expected):
        data = (tmp_path / path).read_bytes()
        assert dataset.train.read(i) == data
        assert dataset.train.sizes[i] == len(data)
        assert dataset.train.where(i) == str(tmp_path / path)
    assert decode(dataset.val.read(0)).shape == (3, 6, 8)


VALS = ["val", "VAL", "validation", "Validation", "valid", "Valid", "VALID", "dev", "test", "Test"]


@pytest.mark.parametrize("val", VALS)
def test_names_of_splits(tmp_path, val):
    put_split(tmp_path, "Train")
    put_split(tmp_path, val)
    dataset = opened(tmp_path)
    assert {path.split("/")[0] for path in paths(dataset.train)} == {"Train"}
    assert {path.split("/")[0] for path in paths(dataset.val)} == {val}
    assert [val in note for note in dataset.notes] == ([True] if val.lower() == "test" else [])


def test_the_test_set_is_validated_on_only_where_there_is_no_other(tmp_path):
    splits = ("val", "validation", "valid", "dev", "test")
    for split in ("train", *splits):
        put_split(tmp_path, split)
    for split in splits:
        assert paths(opened(tmp_path).val)[0].startswith(f"{split}/")
        shutil.rmtree(tmp_path / split)


def test_what_counts_as_an_image(tmp_path):
    kinds = ("jpg", "JPEG", "png", "WebP", "bmp", "gif", "TIF", "tiff", "avif", "jpe", "JFIF")
    good = [f"a/{i}.{kind}" for i, kind in enumerate(kinds)]
    put(tmp_path, *good, "a/deep/er/x.png", "b/x.y.png", "b/y.png")
    put(tmp_path, "a/.hidden.png", "a/.git/x.png", "a/__MACOSX/x.png", ".cache/x.png")
    put(tmp_path, "__MACOSX/a/x.png", "a/x.txt", "a/png", "stray.png")
    dataset = opened(tmp_path, train=False)
    assert dataset.classes == ("a", "b")
    assert paths(dataset.val) == [*sorted(good), "a/deep/er/x.png", "b/x.y.png", "b/y.png"]


def test_links_are_followed_but_not_round_in_circles(tmp_path):
    put(tmp_path, "elsewhere/1.png", "elsewhere/in/2.png", "single.png", "set/b/9.png")
    root = tmp_path / "set"
    (root / "a").symlink_to(tmp_path / "elsewhere")
    (root / "b/in").symlink_to(tmp_path / "elsewhere/in")
    (root / "b/one.png").symlink_to(tmp_path / "single.png")
    (root / "b/circle").symlink_to(root / "b")
    (root / "b/gone.png").symlink_to(tmp_path / "gone.png")
    val = opened(root, train=False).val
    assert paths(val) == [
        *("a/1.png", "a/in/2.png", "b/9.png", "b/gone.png", "b/in/2.png", "b/one.png"),
    ]
    assert val.sizes.tolist()[3] == 0
    with pytest.raises(OSError, match="gone"):
        val.read(3)


def test_a_link_to_the_root_is_opened(tmp_path):
    put_split(tmp_path / "real", "train")
    put_split(tmp_path / "real", "val")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert opened(tmp_path / "link").fingerprint == opened(tmp_path / "real").fingerprint


def test_names_that_are_no_utf8(tmp_path):
    put(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    os.rename(os.fsencode(tmp_path / "b"), os.fsencode(tmp_path) + b"/b\xe9")  # noqa: PTH104
    dataset = opened(tmp_path)
    assert dataset.classes == ("a", "b\\xe9")
    assert decode(dataset.train.read(1)).shape == (3, 6, 8)
    assert dataset.train.where(1).startswith(f"{tmp_path}/b\\xe9/")
    assert len(dataset.fingerprint) == 64


@pytest.mark.parametrize("split", ["", "train/"])
def test_a_part_is_held_out_where_there_is_no_validation_split(tmp_path, split):
    put(tmp_path, f"{split}a/0.png")
    put(tmp_path, *(f"{split}b/{i}.png" for i in range(2)))
    put(tmp_path, *(f"{split}c/{i}.png" for i in range(30)))
    dataset = opened(tmp_path, val_fraction=0.2)
    assert sorted(paths(dataset.train) + paths(dataset.val)) == sorted(
        os.path.relpath(path, tmp_path) for path in tmp_path.rglob("*.png")
    )
    assert np.bincount(dataset.train.labels).tolist() == [1, 1, 24]
    assert np.bincount(dataset.val.labels).tolist() == [0, 1, 6]
    (note,) = dataset.notes
    assert "7 of 33 training images (20% of each class) are held out, drawn by seed 0" in note
    assert tmp_path.name in note


def test_held_out_of_a_set_whose_own_validation_images_are_left_alone(tmp_path):
    put_split(tmp_path, "train", 10)
    put_split(tmp_path, "test", 4)
    whole, chosen = opened(tmp_path), opened(tmp_path, hold_out=True, val_fraction=0.3)
    assert sorted(paths(chosen.train) + paths(chosen.val)) == paths(whole.train)
    assert np.bincount(chosen.val.labels).tolist() == [3, 3]
    assert chosen.notes == (
        f"the validation images of {tmp_path.name} are not used: 6 of 20 training images "
        "(30% of each class) are held out, drawn by seed 0",
    )
    assert chosen.fingerprint != whole.fingerprint
    # Where nothing is trained, as for a test at the end, the set is what it always is.
    assert paths(opened(tmp_path, hold_out=True, train=False).val) == paths(whole.val)


def test_what_is_held_out_anyway_is_held_out_once(tmp_path):
    put_split(tmp_path, "train", 10)
    asked, plain = opened(tmp_path, hold_out=True), opened(tmp_path)
    assert asked.fingerprint == plain.fingerprint
    assert asked.notes == plain.notes


@pytest.mark.parametrize("jpeg", [False, True])
def test_a_pack_holds_out_what_its_folder_does(tmp_path, capfd, jpeg):
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
        whole = opened(tmp_path / "pack").train
        assert len(packed.val) == 2
        for i, name in enumerate(packed.val.names):
            (row,) = np.flatnonzero((whole.names == name) & (whole.labels == packed.val.labels[i]))
            assert (packed.val.squares(np.array([i])) == whole.squares(np.array([row]))).all()


def test_digits_are_held_out_of_those_to_train_on():
    whole = open_dataset(DataConfig(), 8, 0)
    first, other = (open_dataset(DataConfig(hold_out=True), 8, seed) for seed in (0, 1))
    tenth = np.rint(np.bincount(whole.train.labels) / 10)
    assert np.bincount(first.val.labels).tolist() == tenth.tolist()
    assert len(first.train) + len(first.val) == 1437
    known = {image.numpy().tobytes() for image in whole.train.images}
    held = [image.numpy().tobytes() for image in first.val.images]
    assert known.issuperset(held)
    assert not {image.numpy().tobytes() for image in first.train.images} & {*held}
    assert first.fingerprint != other.fingerprint


def test_one_image_of_each_class_stays_in_train(tmp_path):
    put_split(tmp_path, "train", 2)
    dataset = opened(tmp_path, val_fraction=0.99)
    assert np.bincount(dataset.train.labels).tolist() == [1, 1]


def test_the_held_out_part_depends_on_seed_and_relative_paths_alone(tmp_path):
    put(tmp_path, *(f"one/{name}/{i}.png" for name in "ab" for i in range(40)))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    one, two = opened(tmp_path / "one"), opened(tmp_path / "two")
    assert paths(one.val) == paths(two.val)
    assert one.fingerprint == two.fingerprint
    assert paths(one.val) != paths(opened(tmp_path / "one", seed=1).val)
    # Nor does whether an image is held out hang on how many come before it.
    (tmp_path / "two" / paths(two.train)[0]).unlink()
    assert paths(opened(tmp_path / "two").val) == paths(one.val)


def test_only_the_validation_split_is_opened_where_that_is_enough(tmp_path):
    put_split(tmp_path, "val", 2)
    dataset = opened(tmp_path, train=False)
    assert dataset.train is None
    assert len(dataset.val) == 4
    whole = opened(tmp_path / "val", train=False)
    assert (whole.train, whole.notes, whole.name) == (None, (), "val")
    assert paths(whole.val)[0] == "cat/000.png"
    (tmp_path / "train/cat").mkdir(parents=True)  # is not even looked at
    assert opened(tmp_path, train=False).fingerprint == dataset.fingerprint


def test_only_train_gives_the_held_out_part_for_evaluation(tmp_path):
    put_split(tmp_path, "train", 20)
    assert paths(opened(tmp_path, train=False).val) == paths(opened(tmp_path).val)


def test_a_class_may_be_called_train(tmp_path):
    put_split(tmp_path, "test", 3, ("bus", "test", "train"))
    assert opened(tmp_path / "test", train=False).classes == ("bus", "test", "train")
    put_split(tmp_path, "train", 3, ("bus", "test", "train"))
    assert len(opened(tmp_path).train) == 9


def test_the_fingerprint_tells_sets_apart(tmp_path):
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


def test_the_fingerprint_tells_pixel_sets_apart():
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), np.array([0, 1])
    changed = images.clone()
    changed[1, 2, 3, 3] = 1
    one, other = Pixels(images, labels), Pixels(changed, labels)
    wide, turned = Pixels(images.view(2, 3, 2, 8), labels), Pixels(images, labels[::-1])
    sets = [Dataset("", ("a", "b"), one, val) for val in (one, other, wide, turned)]
    sets += [Dataset("", ("a", "c"), one, one), Dataset("", ("a", "b"), other, one)]
    sets += [Dataset("", ("a", "b"), one, None), Dataset("", ("a", "b"), None, one)]
    assert len({dataset.fingerprint for dataset in sets}) == len(sets)
    again = Dataset("elsewhere", ("a", "b"), one, one, notes=("read me",))
    assert again.fingerprint == sets[0].fingerprint


def test_the_fingerprint_does_not_hang_on_the_order_of_listing(tmp_path, monkeypatch):
    put_split(tmp_path, "train", 5)
    before = opened(tmp_path)
    listed = sources._entries
    monkeypatch.setattr(sources, "_entries", lambda folder: reversed(list(listed(folder))))
    after = opened(tmp_path)
    assert paths(after.train) == paths(before.train)
    assert after.fingerprint == before.fingerprint


def test_the_fingerprint_is_computed_once(monkeypatch):
    dataset = opened("digits")
    before = dataset.fingerprint
    monkeypatch.setattr(records.hashlib, "sha256", None)
    assert dataset.fingerprint == before


def test_a_missing_folder(tmp_path):
    assert "nothing of that name" in refusal(tmp_path / "none")
    assert "known sets are digits, synthetic, cifar10" in refusal(tmp_path / "none")


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("cifra10", "cifar10"), ("CIFAR-100", "cifar100"), ("imagenete", "imagenette")],
)
def test_a_misspelt_name(asked, meant):
    assert refusal(asked).endswith(f"did you mean {meant}?")


def test_a_file_instead_of_a_folder(tmp_path):
    (tmp_path / "set.zip").write_bytes(b"tar")
    assert "got a file; if it is an archive, extract it" in refusal(tmp_path / "set.zip")


@pytest.mark.parametrize("folders", [[], ["a"], ["a", "b"], ["train/a", "train/b", "val/a"]])
def test_no_images_at_all(tmp_path, folders):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "notes.txt").touch()
    assert refusal(tmp_path)


def test_folders_without_images_tell_what_images_are(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert "(.jpg, .jpeg, .jpe, .jfif, .png, .webp, .bmp, .gif, .tif, .tiff, .avif)" in refusal(
        tmp_path
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_class_folder(tmp_path, split):
    put_split(tmp_path, "train")
    put_split(tmp_path, "val")
    (tmp_path / split / "eel").mkdir()
    message = refusal(tmp_path)
    assert f"{split}: " in message
    assert "none of eel" in message


def test_a_flat_val(tmp_path):
    put_split(tmp_path, "train")
    put(tmp_path, "val/1.png", "val/2.png")
    (tmp_path / "docs").mkdir()
    message = refusal(tmp_path)
    assert str(tmp_path / "val") in message
    assert "images directly in it; make one folder a class as in train/" in message


@pytest.mark.parametrize("split", ["train", ""])
def test_a_flat_train(tmp_path, split):
    put(tmp_path, *(f"{split}/{i}.png".lstrip("/") for i in range(3)))
    if split:
        put_split(tmp_path, "val")
    message = refusal(tmp_path)
    assert f"{tmp_path / split}: " in message
    assert message.endswith("images directly in it; make one folder a class")


def test_a_validation_split_alone(tmp_path):
    put_split(tmp_path, "val")
    assert "expected train/ beside val/" in refusal(tmp_path)


def test_splits_by_other_names_are_not_learned_as_classes(tmp_path):
    for split in ("training", "testing", "evaluation"):
        put_split(tmp_path, split)
    message = refusal(tmp_path)
    assert "got evaluation, testing, training, which hold the same folders cat, dog; " in message
    assert "rename them to train/ and val/" in message
    assert len(opened(tmp_path, train=False).val) == 18  # where nothing is learned of them
    (tmp_path / "train").mkdir()
    for split in ("training", "testing", "evaluation"):
        (tmp_path / split).rename(tmp_path / "train" / split)
    assert opened(tmp_path).classes == ("evaluation", "testing", "training")


@pytest.mark.parametrize("more", ["training/cat.png", "training/eel/1.png", "dusk/1.png"])
def test_classes_may_hold_folders_of_one_name(tmp_path, more):
    for name in ("training", "testing"):
        put_split(tmp_path, name)
    put(tmp_path, more)
    assert {"training", "testing"} <= {*opened(tmp_path).classes}
    shutil.rmtree(tmp_path)
    put(tmp_path, *(f"{name}/images/{i}.png" for name in ("cat", "dog") for i in range(2)))
    assert opened(tmp_path).classes == ("cat", "dog")


def test_classes_that_differ(tmp_path):
    put_split(tmp_path, "train", 1, [f"c{i}" for i in range(9)])
    put_split(tmp_path, "val", 1, ["c0", "c1", "c2", "c3", "x"])
    message = refusal(tmp_path)
    assert "only in the training split: c4, c5, c6 and 2 more, only in validation: x;" in message


@pytest.mark.parametrize("split", ["train/", ""])
def test_one_class_only(tmp_path, split):
    put(tmp_path, f"{split}cat/1.png", f"{split}cat/2.png")
    assert "two classes or more, got cat alone" in refusal(tmp_path)


def test_nothing_to_hold_out(tmp_path):
    put_split(tmp_path, "train", 1)
    assert "no class has two images" in refusal(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read(tmp_path):
    put_split(tmp_path, "train")
    (tmp_path / "train/cat").chmod(0)
    assert "Permission denied" in refusal(tmp_path)


def test_a_folder_that_vanishes(tmp_path, monkeypatch):
    put_split(tmp_path, "train")
    monkeypatch.setattr(sources, "_class_folders", lambda base, split: ["cat", "gone"])
    assert "train/gone: expected to read it, got No such file" in refusal(tmp_path)


def test_digits():
    dataset = opened("digits")
    raw, labels = load_digits(return_X_y=True)
    assert (dataset.name, dataset.classes) == ("digits", tuple("0123456789"))
    assert isinstance(dataset.train, Pixels)
    assert dataset.train.images.shape == (1437, 3, 8, 8)
    assert dataset.val.images.shape == (360, 3, 8, 8)
    assert dataset.val.images.dtype == torch.uint8
    both = torch.cat([dataset.train.images, dataset.val.images]).double()
    exact = torch.from_numpy(raw).view(-1, 1, 8, 8) * 255 / 16
    assert (both - exact).abs().max() <= 0.5
    assert both.max() == 255
    assert np.concatenate([dataset.train.labels, dataset.val.labels]).tolist() == labels.tolist()


def test_synthetic_is_a_function_of_the_size_alone():
    one, two = (open_dataset(DataConfig(path="synthetic", workers=k), 16, seed=k) for k in range(2))
    assert one.fingerprint == two.fingerprint
    assert one.train.images.shape == (2560, 3, 16, 16)
    assert one.val.images.shape == (512, 3, 16, 16)
    assert one.train.images.dtype == torch.uint8
    assert len(one.classes) == 10
    assert np.bincount(one.train.labels).tolist() == [256] * 10
    assert open_dataset(DataConfig(path="synthetic"), 7, 0).val.images.shape == (512, 3, 7, 7)


def test_synthetic_images_can_be_learnt_but_not_from_one():
    dataset = open_dataset(DataConfig(path="synthetic"), 16, 0)
    train, val = (s.images.flatten(1).double() / 255 for s in (dataset.train, dataset.val))
    fitted = LogisticRegression().fit(train[:500], dataset.train.labels[:500])
    assert fitted.score(val, dataset.val.labels) > 0.9
    same = train[dataset.train.labels == 3]
    assert same.std(0).mean() > 0.1  # noise
    assert len(torch.unique(torch.cat([train, val]), dim=0)) == 3072


class FakeCifar:
    """The array and the labels that torchvision's class has after a download."""

    filename = "cifar-10-python.tar.gz"
    classes = ("plane", "car")

    def __init__(self, root, train, download):
        assert download
        self.root = root
        self.targets = [0, 1, 1] if train else [1]
        draw = np.random.default_rng(train)
        self.data = draw.integers(0, 256, (len(self.targets), 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_arrays_become_pixels(monkeypatch, tmp_path, name):
    monkeypatch.setenv("VITRAL_DATA", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets, name.upper(), FakeCifar)
    dataset = opened(name)
    assert (dataset.name, dataset.classes) == (name, ("plane", "car"))
    assert dataset.train.labels.tolist() == [0, 1, 1]
    assert dataset.val.labels.tolist() == [1]
    expected = FakeCifar(None, train=True, download=True).data
    assert np.array_equal(dataset.train.images.numpy().transpose(0, 2, 3, 1), expected)
    assert dataset.train.images.is_contiguous()


def test_imagenette_is_the_extracted_folder(monkeypatch, tmp_path):
    def extract(root, size, download):
        assert (size, download) == ("160px", True)
        for split in ("train", "val"):
            put_split(root / "imagenette2-160", split, 2, ("n01440764", "n02102040"))

    monkeypatch.setenv("VITRAL_DATA", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets, "Imagenette", extract)
    dataset = opened("imagenette")
    assert dataset.classes == ("n01440764", "n02102040")
    assert paths(dataset.train)[0] == "train/n01440764/000.png"
    assert len(dataset.val) == 4


@pytest.mark.parametrize(
    ("name", "archive"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("imagenette", "imagenette2-160.tgz"),
    ],
)
def test_without_a_network_it_says_how_to_go_on(monkeypatch, tmp_path, name, archive):
    def no_network(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("VITRAL_DATA", str(tmp_path / "sets"))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    message = refusal(name)
    assert str(tmp_path / "sets") in message
    assert "Name or service not known" in message
    assert f"put {archive} into that folder, or point --data at an image folder" in message
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert f"for the folder of that name here give ./{name}" in refusal(name)


def test_a_broken_archive_is_told(monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("VITRAL_DATA", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half an archive")
    assert "cifar-10-python.tar.gz" in refusal("cifar10")


def test_a_download_folder_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VITRAL_DATA", str(tmp_path / "file/sets"))
    assert "cifar10: expected it in" in refusal("cifar10")
