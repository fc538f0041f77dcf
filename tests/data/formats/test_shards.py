"""Tar shards, against the same images in folders."""

import json
import os

import numpy as np
import pytest

from vitral.data.decode import SUFFIXES
from vitral.errors import UserError

from ..archive_files import (
    NUMBER,
    TRAIN,
    WNIDS,
    assert_same,
    base,
    both,
    cls,
    contents,
    error_message,
    js,
    opened,
    put_folder,
    put_ilsvrc,
    put_shards,
    shard,
    tarred,
    text,
    two,
    val_images,
)

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("about", [cls, js, both, text])
@pytest.mark.parametrize("pattern", ["test-{}-{:04d}.tar", "{}/{:06d}.tar"])
def test_shards_equal_the_folder(tmp_path, about, pattern):
    val = val_images(numbered_on=False)
    root = put_shards(tmp_path / "shards", val, pattern, about)
    assert_same(root, put_folder(tmp_path / "folder", val), workers=2 * (about is cls))


def anonymous(label):
    """Returns a writer of shards whose keys are numbers; `label` adds the labels of an image."""

    def put(root, split, images, first=0):
        named = {f"x{first + i:03d}": name for i, name in enumerate(sorted(images))}
        members = []
        for key, name in named.items():
            members += [(f"{key}.png", images[name]), *label(key, name)]
        root.mkdir(exist_ok=True)
        (root / f"{split}.tar").write_bytes(tarred(members))

    return put


def test_wnids_from_json_of_one_split_name_the_other(tmp_path):
    val = val_images(numbered_on=True)
    label_of = {"n01440764": 3, "n02012849": 2, "n03126707": 1, "n07753592": 0}

    def by_file_name(key, name):
        fields = {"label": label_of[name[:9]], "filename": base(name)}
        return [(f"{key}.json", json.dumps(fields).encode())]

    anonymous(by_file_name)(tmp_path, "train", TRAIN)
    anonymous(lambda key, name: [(f"{key}.cls", b"%d" % label_of[name[:9]])])(tmp_path, "val", val)
    for train in (True, False):
        found = opened(tmp_path, train=train)
        assert found.classes == WNIDS
        assert contents(found.val) == [val[name] for name in sorted(val)]
    assert contents(opened(tmp_path).train) == [TRAIN[name] for name in sorted(TRAIN)]


def test_each_split_prefers_its_own_wnids(tmp_path):
    val = val_images(numbered_on=False)
    (tmp_path / "train-0.tar").write_bytes(shard(TRAIN.items()))
    other = {name: b"%d" % (9 - NUMBER[name[:9]]) for name in val}
    (tmp_path / "val-0.tar").write_bytes(shard(val.items(), lambda name: {"cls": other[name]}))
    found = opened(tmp_path)
    assert found.classes == WNIDS
    assert found.val.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert contents(found.val) == [val[name] for name in sorted(val)]
    assert contents(found.train) == [TRAIN[name] for name in sorted(TRAIN)]


@pytest.mark.parametrize("groups", [3, 8])
def test_wnids_that_contradict_the_labels_are_ignored(tmp_path, groups):
    label = {name: b"%d" % (i * groups // 24) for i, name in enumerate(sorted(TRAIN))}
    (tmp_path / "all.tar").write_bytes(shard(TRAIN.items(), lambda name: {"cls": label[name]}))
    assert opened(tmp_path).classes == tuple("01234567"[:groups])


@pytest.mark.parametrize(
    ("lines", "classes"),
    [
        ("", ("0", "2", "7", "10")),
        ("d\n-\nb\n-3\n-4\n-5\n-6\na\n-8\n-9\nc\n", None),
    ],
)
def test_names_of_numbered_labels(tmp_path, lines, classes):
    label_of = {"n01440764": 7, "n02012849": 2, "n03126707": 10, "n07753592": 0}
    put = anonymous(lambda key, name: [(f"{key}.cls", b"%02d" % label_of[name[:9]])])
    put(tmp_path, "train", TRAIN)
    put(tmp_path, "validation", val_images(numbered_on=True))
    if lines:
        (tmp_path / "classes.txt").write_text(lines)
    found = opened(tmp_path)
    assert found.classes == (classes or tuple(sorted(lines.split())))
    shown = {c: set() for c in "abcd"}
    names = dict(zip(("0", "2", "7", "10"), "dbac", strict=True))
    for content, label in zip(contents(found.train), found.train.labels, strict=True):
        shown[names.get(found.classes[label], found.classes[label])].add(content)
    for letter, wnid in zip("abcd", WNIDS, strict=True):
        assert shown[letter] == {data for name, data in TRAIN.items() if name.startswith(wnid)}


@pytest.mark.parametrize("kind", ["ilsvrc", "shards"])
def test_without_validation_a_part_is_held_out(tmp_path, kind):
    if kind == "ilsvrc":
        put_ilsvrc(tmp_path)
    else:
        (tmp_path / "all-000.tar").write_bytes(shard(TRAIN.items()))
    found = opened(tmp_path, val_fraction=0.34)
    assert np.bincount(found.val.labels).tolist() == [2, 2, 2, 2]
    assert sorted(contents(found.train) + contents(found.val)) == sorted(TRAIN.values())
    assert "held out" in found.notes[0]
    again = opened(tmp_path, train=False, val_fraction=0.34)
    assert len(again.val) == (8 if kind == "ilsvrc" else 24)  # without splits, all shards


def test_validation_on_test_shards_is_reported(tmp_path):
    (tmp_path / "train-0.tar").write_bytes(shard(TRAIN.items()))
    (tmp_path / "test-0.tar").write_bytes(shard(val_images(numbered_on=False).items()))
    found = opened(tmp_path)
    assert len(found.val) == 12
    assert "test" in found.notes[0]


def test_validation_only_does_not_read_training_archives(tmp_path):
    val = val_images(numbered_on=False)
    tars, shards = put_ilsvrc(tmp_path / "tars", val), put_shards(tmp_path / "shards", val)
    broken = tarred([(f"{w}.tar", b"?") for w in WNIDS])
    (tars / "ILSVRC2012_img_train.tar").write_bytes(broken)
    (shards / "test-train-0001.tar").write_bytes(b"?")
    for root in (tars, shards):
        assert opened(root, train=False).classes == WNIDS
        with pytest.raises(UserError, match="train"):
            opened(root)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (two(("c.jpg", b"?")), "a number or text in c.cls"),
        (two(("c.jpg", b"?"), ("c.json", b'{"caption": "dog"}')), 'as "label" in c.json, got None'),
        (two(("c.jpg", b"?"), ("c.json", b'{"label": 1.5}')), 'as "label" in c.json, got 1.5'),
        (two(("c.jpg", b"?"), ("c.json", b'{"label": true}')), 'as "label" in c.json, got True'),
        (two(("c.jpg", b"?"), ("c.json", b"{label: 3}")), "c.json: expected JSON"),
        (two(("c.jpg", b"?"), ("c.cls", b" \n")), "a number or text in c.cls"),
        (two(("c.cls", b"1"), ("d.cls", b"1")), "an image for each label"),
        (two(("a.jpg", b"?")), "each name once, got a more than once"),
        (two(("a.png", b"?")), "each name once, got a more than once"),
        (two(("a.cls", b"2")), "each name once, got a.cls more than once"),
        (two(("c.jpg", b"?"), ("c.cls", b"cat")), "all text, got numbers 1, 2 and text cat"),
        (two(("c.jpg", b"?"), ("c.cls", b"-1")), "all text, got numbers 1, 2 and text -1"),
        (two(("c.jpg", b"?"), ("c.cls", b"1" * 5000)), "at most 255 bytes, got one of 5,000"),
        (two(("c.jpg", b"?"), ("c.cls", b" " * 2**20 + b"1")), "at most 1,048,576 bytes, got"),
        (two(("c.jpg", b"?"), ("c.json", b"[" * 100_000)), "c.json: expected JSON, got deep"),
        (two(("c.jpg", b"?"), ("c.json", b'{"label": 1, "label": 2}')), "JSON, got duplicate key"),
        (
            two(("c.left.jpg", b"?"), ("c.right.jpg", b"?"), ("c.cls", b"1")),
            "for the label of c, got c.left.jpg and c.right.jpg; rename one of them to c.jpg",
        ),
        (tarred([("README", b"?"), ("._a.jpg", b"?"), ("__MACOSX/a.jpg", b"?")]), "got none"),
        (tarred([]), "got none"),
    ],
)
def test_bad_labels_are_rejected(tmp_path, content, words, cache):
    (tmp_path / "train-0.tar").write_bytes(content)
    assert words in error_message(tmp_path)
    assert not cache.exists()


def test_bad_folders_of_shards_are_rejected(tmp_path):
    (tmp_path / "train-0.tar").write_bytes(two())
    (tmp_path / "train-1.tar").write_bytes(tarred([("b.png", b"?"), ("b.cls", b"2")]))
    assert "each name once, got b more than once" in error_message(tmp_path)
    (tmp_path / "train-1.tar").rename(tmp_path / "extra-1.tar")
    assert "got extra-1.tar" in error_message(tmp_path)
    (tmp_path / "extra-1.tar").rename(tmp_path / "train-1.tar.gz")
    assert "decompress it" in error_message(tmp_path)
    (tmp_path / "train-1.tar.gz").unlink()
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert "classes.txt: expected 2 labels, got 2;" in error_message(tmp_path)
    (tmp_path / "classes.txt").write_text("cat\ndog\ncat\n")
    assert "each name once, got cat more than once" in error_message(tmp_path)
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "train-0.tar").rename(tmp_path / "val-0.tar")
    assert "train shards in addition to those of val" in error_message(tmp_path)
    (tmp_path / "val-0.tar").write_bytes(tarred([("c.jpg", b"?"), ("c.cls", b"3")]))
    assert opened(tmp_path, train=False).classes == ("3",)
    (tmp_path / "val-0.tar").rename(tmp_path / "train-0.tar")
    assert "two or more classes, got only 3" in error_message(tmp_path)


@pytest.mark.skipif(".heic" in SUFFIXES, reason="pillow-heif reads HEIC")
def test_system_files_in_archives_are_skipped_and_counted(tmp_path, cache):
    members = [("@eaDir/a.jpg/thumb.jpg", b"?"), ("x/#recycle/b.jpg", b"?"), ("c.heic", b"?")]
    (tmp_path / "val-0.tar").write_bytes(two(*members))
    for _ in range(2):  # the second time from the cache
        dataset = opened(tmp_path, train=False)
        assert dataset.val.names.tolist() == [b"a.jpg", b"b.jpg"]
        assert dataset.skipped == {"@eaDir": 1, "#recycle": 1, ".heic": 1}
        assert "3 files are skipped: #recycle 1, .heic 1, @eaDir 1" in dataset.notes[-1]
    assert len([*cache.iterdir()]) == 1


def test_the_key_of_a_label_ends_at_the_first_dot(tmp_path):
    """As in webdataset; or at the last dot, if a label has that name."""
    images = [("a.left.jpg", b"1"), ("b.2.jpg", b"2"), ("c.jpg", b"3"), ("c.mask.png", b"?")]
    labels = [("a.cls", b"0"), ("b.2.cls", b"1"), ("c.cls", b"1")]
    (tmp_path / "val-0.tar").write_bytes(tarred([*labels, *images]))
    val = opened(tmp_path, train=False).val
    assert val.names.tolist() == [b"a.left.jpg", b"b.2.jpg", b"c.jpg"]
    assert contents(val) == [b"1", b"2", b"3"]
    assert val.labels.tolist() == [0, 1, 1]
    assert opened(tmp_path, train=False).skipped == {".mask.png": 1}


def test_numbers_of_any_length_are_sorted_by_value(tmp_path):
    long = b"7" * 250
    (tmp_path / "val-0.tar").write_bytes(two(("c.jpg", b"?"), ("c.cls", long)))
    classes = opened(tmp_path, train=False).classes
    assert classes == ("1", "2", long.decode())


def test_a_fifo_is_not_a_shard(tmp_path):
    os.mkfifo(tmp_path / "val-0.tar")
    assert "got not a regular file" in error_message(tmp_path, train=False)


def test_names_of_text_labels_are_normalized(tmp_path):
    labels = [b"caff", "cafe\u0301".encode()]
    members = [member for i in (0, 1) for member in ((f"{i}.jpg", b"?"), (f"{i}.cls", labels[i]))]
    (tmp_path / "val-0.tar").write_bytes(tarred(members))
    assert opened(tmp_path, train=False).classes == ("caff", "caf\u00e9")
