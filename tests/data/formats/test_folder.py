"""Image folders: which images, splits and classes are found in them."""

import os
import shutil

import numpy as np
import pytest

from vitral.data.decode import SUFFIXES, decode
from vitral.data.formats import folder
from vitral.data.records import Files

from ..image_files import error_message, opened, paths, put, put_split

pytestmark = pytest.mark.usefixtures("nothing_printed")


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


def test_the_test_set_is_the_last_choice_for_validation(tmp_path):
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
    put(
        tmp_path,
        "a/folder.png/x.png",
        "a/.hidden.png",
        "a/.git/x.png",
        "a/__MACOSX/x.png",
        ".cache/x.png",
    )
    put(tmp_path, "__MACOSX/a/x.png", "a/x.txt", "a/png", "stray.png")
    dataset = opened(tmp_path, train=False)
    assert dataset.classes == ("a", "b")
    good += ["a/deep/er/x.png", "a/folder.png/x.png"]
    assert paths(dataset.val) == [*sorted(good), "b/x.y.png", "b/y.png"]


def test_links_are_followed_without_cycles(tmp_path):
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
    sizes = [path.stat().st_size if path.exists() else 0 for path in map(root.joinpath, paths(val))]
    assert val.sizes.tolist() == sizes
    assert sizes.index(0) == 3
    with pytest.raises(OSError, match="gone"):
        val.read(3)


def test_a_link_to_the_root_is_opened(tmp_path):
    put_split(tmp_path / "real", "train")
    put_split(tmp_path / "real", "val")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert opened(tmp_path / "link").fingerprint == opened(tmp_path / "real").fingerprint


def test_names_that_are_not_utf8(tmp_path):
    put(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    os.rename(os.fsencode(tmp_path / "b"), os.fsencode(tmp_path) + b"/b\xe9")  # noqa: PTH104
    dataset = opened(tmp_path)
    assert dataset.classes == ("a", "b\\xe9")
    assert decode(dataset.train.read(1)).shape == (3, 6, 8)
    assert dataset.train.where(1).startswith(f"{tmp_path}/b\\xe9/")
    assert len(dataset.fingerprint) == 64


@pytest.mark.parametrize("split", ["", "train/"])
def test_images_are_held_out_without_a_validation_split(tmp_path, split):
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
    assert "7 of 33 training images (20% of each class) are held out, drawn with seed 0" in note
    assert tmp_path.name in note


def test_only_the_validation_split_is_opened_if_sufficient(tmp_path):
    put_split(tmp_path, "val", 2)
    dataset = opened(tmp_path, train=False)
    assert dataset.train is None
    assert len(dataset.val) == 4
    full = opened(tmp_path / "val", train=False)
    assert (full.train, full.notes, full.name) == (None, (), "val")
    assert paths(full.val)[0] == "cat/000.png"
    (tmp_path / "train/cat").mkdir(parents=True)  # is ignored
    assert opened(tmp_path, train=False).fingerprint == dataset.fingerprint


def test_without_a_validation_split_evaluation_uses_the_held_out_images(tmp_path):
    put_split(tmp_path, "train", 20)
    assert paths(opened(tmp_path, train=False).val) == paths(opened(tmp_path).val)


def test_a_class_may_be_named_train(tmp_path):
    put_split(tmp_path, "test", 3, ("bus", "test", "train"))
    assert opened(tmp_path / "test", train=False).classes == ("bus", "test", "train")
    put_split(tmp_path, "train", 3, ("bus", "test", "train"))
    assert len(opened(tmp_path).train) == 9


def test_the_fingerprint_does_not_depend_on_listing_order(tmp_path, monkeypatch):
    put_split(tmp_path, "train", 5)
    before = opened(tmp_path)
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda place: sorted(listed(place), reverse=True))
    after = opened(tmp_path)
    assert paths(after.train) == paths(before.train)
    assert after.fingerprint == before.fingerprint


@pytest.mark.parametrize("folders", [[], ["a"], ["a", "b"], ["train/a", "train/b", "val/a"]])
def test_no_images_at_all(tmp_path, folders):
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "notes.txt").touch()
    assert error_message(tmp_path)


def test_folders_without_images_are_an_error_with_the_suffixes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert (
        "(.jpg, .jpeg, .jpe, .jfif, .png, .webp, .bmp, .gif, .tif, .tiff, .avif"
        in error_message(tmp_path)
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_class_folder(tmp_path, split):
    put_split(tmp_path, "train")
    put_split(tmp_path, "val")
    (tmp_path / split / "eel").mkdir()
    message = error_message(tmp_path)
    assert f"{split}: " in message
    assert "none for eel" in message


def test_a_flat_val(tmp_path):
    put_split(tmp_path, "train")
    put(tmp_path, "val/1.png", "val/2.png")
    (tmp_path / "docs").mkdir()
    message = error_message(tmp_path)
    assert str(tmp_path / "val") in message
    assert "images directly in it; create one folder per class, as in train/" in message


@pytest.mark.parametrize("split", ["train", ""])
def test_a_flat_train(tmp_path, split):
    put(tmp_path, *(f"{split}/{i}.png".lstrip("/") for i in range(3)))
    if split:
        put_split(tmp_path, "val")
    message = error_message(tmp_path)
    assert f"{tmp_path / split}: " in message
    assert message.endswith("images directly in it; create one folder per class")


def test_only_a_validation_split(tmp_path):
    put_split(tmp_path, "val")
    assert "expected train/ next to val/" in error_message(tmp_path)


def test_splits_with_other_names_are_not_classes(tmp_path):
    for split in ("training", "testing", "evaluation"):
        put_split(tmp_path, split)
    message = error_message(tmp_path)
    assert "got evaluation, testing, training, which contain the same folders cat, dog; " in message
    assert "rename them to train/ and val/" in message
    assert len(opened(tmp_path, train=False).val) == 18  # accepted if nothing is trained
    (tmp_path / "train").mkdir()
    for split in ("training", "testing", "evaluation"):
        (tmp_path / split).rename(tmp_path / "train" / split)
    assert opened(tmp_path).classes == ("evaluation", "testing", "training")


@pytest.mark.parametrize("more", ["training/cat.png", "training/eel/1.png", "dusk/1.png"])
def test_classes_may_contain_folders_of_the_same_name(tmp_path, more):
    for name in ("training", "testing"):
        put_split(tmp_path, name)
    put(tmp_path, more)
    assert {"training", "testing"} <= {*opened(tmp_path).classes}
    shutil.rmtree(tmp_path)
    put(tmp_path, *(f"{name}/images/{i}.png" for name in ("cat", "dog") for i in range(2)))
    assert opened(tmp_path).classes == ("cat", "dog")


@pytest.mark.parametrize("split", ["train/", ""])
def test_one_class_only(tmp_path, split):
    put(tmp_path, f"{split}cat/1.png", f"{split}cat/2.png")
    assert "two or more classes, got only cat" in error_message(tmp_path)


def test_a_folder_that_vanishes(tmp_path, monkeypatch):
    put_split(tmp_path, "train")
    monkeypatch.setattr(folder, "_class_folders", lambda *_: ["cat", "gone"])
    assert "train/gone: expected to read it, got No such file" in error_message(tmp_path)


@pytest.mark.parametrize("val", [False, True])
def test_folders_of_classes_are_splits_despite_other_folders(tmp_path, val):
    put_split(tmp_path, "train", 4)
    put(tmp_path, "train/stray.png", "unlabeled/1.png", "unlabeled/2.png")
    if val:
        put_split(tmp_path, "val")
        put(tmp_path, "val/stray.png")
    dataset = opened(tmp_path)
    assert dataset.classes == ("cat", "dog")
    used = paths(dataset.train) + paths(dataset.val)
    assert len(used) == (8 + 6 if val else 8)
    assert not any("stray" in path or "unlabeled" in path for path in used)
    assert f"{tmp_path.name}: skipped folders next to train/: unlabeled" in dataset.notes
    files = "2 files are" if val else "1 file is"
    count = 2 if val else 1
    line = f"{tmp_path.name}: {files} skipped: images outside class folders {count}"
    assert line in dataset.notes


@pytest.mark.parametrize(
    "folders",
    [
        ["train/1.png", "unlabeled/1.png"],  # a class named train, or unlabeled images
        ["train/1.png", "val/1.png", "bus/1.png", "car/1.png"],
        ["train/steam/1.png", "train/diesel/1.png", "bus/1.png", "car/1.png"],
        ["train/cat/1.png", "train/dog/1.png", "Train/cat/1.png", "Train/dog/1.png"],
        ["train/cat/1.png", "train/dog/1.png", "train/1.png", "train/2.png", "train/3.png"],
    ],
)
def test_ambiguous_folders_are_rejected(tmp_path, folders):
    put(tmp_path, *folders)
    assert error_message(tmp_path)


def test_a_class_named_train_among_others(tmp_path):
    put(tmp_path, *(f"{name}/{i}.png" for name in ("bus", "car", "train") for i in range(3)))
    assert opened(tmp_path).classes == ("bus", "car", "train")


SYSTEM_FILES = ["@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN", "System Volume Information"]


@pytest.mark.parametrize("name", [*SYSTEM_FILES, "__MACOSX", ".git", "@EADIR"])
def test_system_files_are_skipped_and_counted(tmp_path, name):
    put_split(tmp_path, ".", 3)
    clean = opened(tmp_path)
    put(tmp_path, f"{name}/x.png", f"cat/{name}/000.png/thumb_m.jpg", f"cat/{name}/deep/y.png")
    dataset = opened(tmp_path)
    assert dataset.fingerprint == clean.fingerprint
    assert dataset.notes[-1] == f"{tmp_path.name}: 3 files are skipped: {name} 3"


@pytest.mark.parametrize("name", SYSTEM_FILES)
def test_an_empty_system_folder_is_not_a_class(tmp_path, name):
    put_split(tmp_path, ".")
    (tmp_path / name).mkdir()
    assert opened(tmp_path).classes == ("cat", "dog")


@pytest.mark.skipif(".heic" in SUFFIXES, reason="HEIC is read")
def test_unreadable_heic_is_counted(tmp_path):
    put_split(tmp_path, ".")
    put(tmp_path, *(f"cat/{i}.HEIC" for i in range(100)), "dog/notes.txt")
    (note,) = opened(tmp_path).notes[1:]
    assert note == (
        f"{tmp_path.name}: 101 files are skipped: .heic 100, .txt 1; "
        "run `pip install 'vitral[heic]'` to read .heic"
    )
    put(tmp_path, "eel/1.heif")
    assert "got none for eel, but .heic 100, .heif 1, .txt 1; run `pip install" in error_message(
        tmp_path
    )


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def test_class_names_are_normalized_to_nfc(tmp_path):
    put_split(tmp_path, "train", 2, (COMPOSED, "caff"))
    put_split(tmp_path, "val", 1, (DECOMPOSED, "caff"))
    dataset = opened(tmp_path)
    assert dataset.classes == ("caff", COMPOSED)  # sorted by composed name
    assert [path.split("/")[1] for path in paths(dataset.val)] == ["caff", DECOMPOSED]
    assert dataset.val.labels.tolist() == [0, 1]
    assert opened(tmp_path / "val", train=False).classes == dataset.classes


def test_folders_that_normalize_to_one_class_are_rejected(tmp_path):
    put_split(tmp_path, ".", 2, (COMPOSED, DECOMPOSED, "dog"))
    assert r"got 'cafe\u0301' and 'caf\xe9', which" in error_message(tmp_path)


@pytest.mark.parametrize("depth", [1, 2])
def test_splits_in_a_single_nested_folder_are_found(tmp_path, depth):
    inner = tmp_path.joinpath(*["flowers"] * depth)
    put_split(inner, "train")
    put_split(inner, "val")
    assert opened(tmp_path).fingerprint == opened(inner).fingerprint
    assert opened(tmp_path, train=False).fingerprint == opened(inner, train=False).fingerprint


def test_classes_in_a_single_nested_folder_are_found(tmp_path):
    put_split(tmp_path, "flowers", 2, ("daisy", "rose"))
    message = error_message(tmp_path)
    assert "got only flowers; if daisy, rose in it are the classes, pass " in message
    assert message.endswith(f"pass {tmp_path / 'flowers'}")


def test_a_test_set_may_have_one_class_or_an_empty_one(tmp_path):
    put(tmp_path, "cat/1.png")
    assert opened(tmp_path, train=False).classes == ("cat",)
    (tmp_path / "eel").mkdir()
    dataset = opened(tmp_path, train=False)
    assert dataset.classes == ("cat", "eel")
    assert dataset.val.labels.tolist() == [0]


def test_special_files_are_not_read(tmp_path):
    put_split(tmp_path, ".", 2)
    os.mkfifo(tmp_path / "cat/fifo.jpg")
    (tmp_path / "cat/zero.jpg").symlink_to("/dev/zero")
    val = opened(tmp_path, train=False).val
    assert paths(val)[2:4] == ["cat/fifo.jpg", "cat/zero.jpg"]
    for i in (2, 3):
        with pytest.raises(OSError, match="not a regular file"):
            val.read(i)
