"""Parquet files in the Hub's layout, against an image folder with the same images."""

import dataclasses
import io
import json
import os
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vitral.config import AugmentConfig, Config, DataConfig, TrainConfig, ViTConfig
from vitral.data.decode import DecodeError
from vitral.data.formats import open_dataset, parquet
from vitral.data.imagenet import human_name, wnids
from vitral.data.loader import eval_batches, train_batches
from vitral.errors import UserError

CPU = torch.device("cpu")
CLASSES = ("cat", "dog", "owl")
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def jpeg(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    target = io.BytesIO()
    Image.fromarray(pixels).resize((24, 20)).save(target, "JPEG", quality=90)
    return target.getvalue()


def draw(count, first=0, classes=CLASSES):
    """Bytes, file name and class of images; the file names are in random order."""
    order = np.random.default_rng(first).permutation(count)
    return [(jpeg(first + i), f"{order[i]:03d}.jpg", i % len(classes)) for i in range(count)]


def write_folder(root, images, classes=CLASSES):
    for content, name, label in images:
        path = root / classes[label] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_rows(path, images, classes=CLASSES, group=4, column="label", kind=None):
    """Writes a file as `datasets` does; `classes` None omits the description of the labels."""
    images = [({"bytes": content, "path": name}, label) for content, name, label in images]
    pictures, labels = zip(*images, strict=True) if images else ((), ())
    table = pa.table(
        {"image": pa.array(pictures, IMAGE), column: pa.array(labels, kind or "int64")}
    )
    if classes is not None:
        feature = {"names": list(classes), "_type": "ClassLabel"}
        features = {"image": {"_type": "Image"}, column: feature}
        described = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": described})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group, compression="snappy")


def open_at(root, **kwargs):
    return open_dataset(DataConfig(path=str(root)), 16, 0, **kwargs)


def batches(root, workers):
    config = Config(
        model=ViTConfig(image_size=16, patch_size=4),
        data=DataConfig(path=str(root)),
        augment=AugmentConfig(policy="trivialaugment", erasing=0.5, mixup=0.8),
        train=TrainConfig(batch_size=12),
    )
    dataset = open_dataset(config.data, 16, 0)
    training = train_batches(
        dataset.train, config, len(dataset.classes), steps=range(6), total_steps=6,
        micro_batch=6, workers=workers, device=CPU,
    )  # fmt: skip
    return [*training, *eval_batches(dataset.val, config, 5, workers, CPU)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same images in an image folder, and in three files of shuffled rows."""
    folder, hub = (tmp_path_factory.mktemp(name) for name in ("folder", "hub"))
    training, validation = draw(31), draw(11, first=100)
    write_folder(folder / "train", training)
    write_folder(folder / "val", validation)
    write_rows(hub / "data/train-00000-of-00002.parquet", training[:17])
    write_rows(hub / "data/train-00001-of-00002.parquet", training[17:])
    write_rows(hub / "data/validation-00000-of-00001.parquet", validation)
    write_rows(hub / "data/test-00000-of-00001.parquet", [(jpeg(0), "0.jpg", -1)])
    return folder, hub


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache_bytes", [parquet.MAX_CACHE_BYTES, 1])
def test_batches_equal_those_of_the_image_folder(both, workers, cache_bytes, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_CACHE_BYTES", cache_bytes)
    expected, found = batches(both[0], 0), batches(both[1], workers)
    assert len(expected) == 15
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets, b.targets)
        assert b.broken == []


def test_order_is_by_label_and_file_name(both):
    train = open_at(both[1]).train
    rows = list(zip(train.labels.tolist(), train.names.tolist(), strict=True))
    assert rows == sorted(rows)
    assert len(set(rows)) == len(train) == 31
    half = train.take(train.labels == 1)
    chosen = np.flatnonzero(train.labels == 1)
    assert [half.read(i) for i in range(len(half))] == [train.read(i) for i in chosen]
    file, group, row = half.places[0]
    assert half.where(0) == f"{half.files[file]}: row group {group}, row {row}"


def test_fingerprint_depends_on_names_and_sizes_not_location(both, tmp_path):
    train, validation = draw(31), draw(11, first=100)
    for rows, same in ((train, True), ([*train[:30], (jpeg(31), "x.jpg", 2)], False)):
        write_rows(tmp_path / "data/train-00000-of-00002.parquet", rows[:17])
        write_rows(tmp_path / "data/train-00001-of-00002.parquet", rows[17:])
        write_rows(tmp_path / "data/validation-0.parquet", validation)
        assert (open_at(tmp_path).fingerprint == open_at(both[1]).fingerprint) == same


@pytest.mark.parametrize(
    "names",
    [
        ("train-0.parquet", "validation-0.parquet"),
        ("train/0000.parquet", "val/0000.parquet"),
        ("train/a.parquet", "test/a.parquet"),
        ("data/train.parquet", "data/test.parquet"),
    ],
)
def test_splits_are_found_by_name(tmp_path, names):
    for name, count in zip(names, (9, 6), strict=True):
        write_rows(tmp_path / name, draw(count))
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data/._train-0.parquet").write_bytes(b"what macOS leaves")
    dataset = open_at(tmp_path)
    assert (len(dataset.train), len(dataset.val), dataset.classes) == (9, 6, CLASSES)
    note = f"{dataset.name} has no validation-*.parquet: using test for validation"
    assert dataset.notes == ((note,) if "test" in names[1] else ())
    (tmp_path / names[0]).write_bytes(b"not read")
    assert open_at(tmp_path, train=False).train is None


@pytest.mark.parametrize("name", ["train-0.parquet", "images.parquet"])
def test_without_validation_a_tenth_is_held_out(tmp_path, name):
    write_rows(tmp_path / name, draw(60))
    dataset = open_at(tmp_path)
    assert np.bincount(dataset.val.labels).tolist() == [2, 2, 2]
    read = [r.read(i) for r in (dataset.train, dataset.val) for i in range(len(r))]
    assert sorted(read) == sorted(content for content, *_ in draw(60))
    if name == "images.parquet":
        assert len(open_at(tmp_path, train=False).val) == 60


def test_without_names_classes_are_the_labels_in_order(tmp_path):
    rows = [(jpeg(i), None, (10, 9, 2)[i % 3]) for i in range(9)]
    write_rows(tmp_path / "train.parquet", rows, classes=None, column="labels")
    write_rows(tmp_path / "val.parquet", rows, classes=None, column="labels")
    dataset = open_at(tmp_path)
    assert dataset.classes == ("2", "9", "10")
    expected = [content for label in (2, 9, 10) for content, _, of in rows if of == label]
    assert [dataset.val.read(i) for i in range(9)] == expected
    assert dataset.val.names[0] == b"val.parquet/0/2"


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_labels_may_be_strings(tmp_path, kind):
    rows = [(content, name, "bca"[label]) for content, name, label in draw(9)]
    for split in ("train", "val"):
        write_rows(tmp_path / f"{split}.parquet", rows, classes=None, kind=kind)
    assert open_at(tmp_path).classes == ("a", "b", "c")
    assert open_at(tmp_path).train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_imagenet_names_become_wnids(tmp_path):
    names = ["crane2" if wnid == "n03126707" else human_name(wnid) for wnid in wnids()]
    files = [f"n01440764_{i}_n01440764.JPEG" for i in (1000, 100)]
    rows = [(jpeg(i), name, 0) for i, name in enumerate(files)]
    for split in ("train", "validation"):
        write_rows(tmp_path / f"data/{split}-0.parquet", rows, names)
    dataset = open_at(tmp_path)
    assert dataset.classes == wnids()
    # as in an image folder with the names of the archive
    assert dataset.train.names.tolist() == [b"n01440764_100.JPEG", b"n01440764_1000.JPEG"]
    assert dataset.train.read(0) == rows[1][0]
    write_rows(tmp_path / "data/train-0.parquet", rows, names[::-1])
    with pytest.raises(UserError, match="the same classes in both splits"):
        open_at(tmp_path)


def set_column(path, name, values):
    table = pq.read_table(path)
    column = table.column_names.index(name)
    pq.write_table(table.set_column(column, name, values), path)


def other_columns(path):
    pq.write_table(pa.table({"a": pa.array([b"x"]), "b": pa.array([b"x"]), "label": [0]}), path)


def test_a_single_class_can_be_validated_but_not_trained(tmp_path):
    write_rows(tmp_path / "train.parquet", draw(4, classes=("cat",)), None)
    with pytest.raises(UserError, match="two or more classes, got only 0; add images of other"):
        open_at(tmp_path)
    (tmp_path / "train.parquet").rename(tmp_path / "test.parquet")
    assert open_at(tmp_path, train=False).classes == ("0",)


def test_columns_can_be_named(tmp_path):
    """They take precedence over the usual names."""
    pictures = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(4)]
    usual, other = pa.array(pictures, IMAGE), pa.array(pictures[::-1], IMAGE)
    columns = {"image": usual, "photo": other, "label": [0, 1, 0, 1], "kind": ["b", "b", "a", "a"]}
    pq.write_table(pa.table(columns), tmp_path / "validation.parquet")

    def opened(**names):
        config = DataConfig(path=str(tmp_path), **names)
        return open_dataset(config, 16, 0, train=False)

    found = opened(image_column="photo", label_column="kind")
    assert found.classes == ("a", "b")
    assert [found.val.read(i) for i in range(4)] == [jpeg(i) for i in (0, 1, 2, 3)]
    assert found.val.labels.tolist() == [0, 0, 1, 1]
    assert opened().classes == ("0", "1")
    with pytest.raises(UserError, match=r"a column kinds of integers.*name them with --image-col"):
        opened(label_column="kinds")


def describe(path, described):
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"huggingface": described}), path)


def names(value):
    return json.dumps({"info": {"features": {"label": {"names": value}}}})


BAD = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "a Parquet file, got Parquet"),
    "not Parquet": (lambda p: p.write_bytes(b"PAR?" * 9), "a Parquet file, got Parquet magic"),
    "empty file": (lambda p: p.write_bytes(b""), "a Parquet file, got Parquet file size is 0"),
    "other columns": (other_columns, "image or img .*, got a: binary, b: binary, label"),
    "plain bytes": (lambda p: set_column(p, "image", pa.array([b"x"] * 9)), "columns, labels and"),
    "fractions": (lambda p: set_column(p, "label", pa.array([0.5] * 9)), "label: double"),
    "no label": (lambda p: set_column(p, "label", pa.array([0] * 8 + [None])), "got none in 1 row"),
    "test split": (lambda p: set_column(p, "label", pa.array([-1] * 9)), "0 to 2, got -1; if it"),
    "too large": (lambda p: set_column(p, "label", pa.array([3] * 9)), "from 0 to 2, got 3"),
    "other names": (lambda p: write_rows(p, draw(9), ("cat", "dog", "eel")), "class names as in"),
    "other type": (lambda p: set_column(p, "label", pa.array(["cat"] * 9)), "labels and class"),
    "not JSON": (lambda p: describe(p, "{not"), "expected JSON in its metadata, got Expecting"),
    "deep JSON": (lambda p: describe(p, "[" * 100_000), "JSON in its metadata, got deep nesting"),
    "a number": (lambda p: describe(p, names(7)), "a list of class names in its metadata, got 7"),
    "no names": (lambda p: describe(p, names([None])), "a list of class names in its metadata"),
    "no split": (lambda p: p.rename(p.with_name("more.parquet")), "test in the name of each file"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_bad_file(tmp_path, case):
    damage, message = BAD[case]
    for name in ("train-0", "train-1", "val-0"):
        write_rows(tmp_path / f"{name}.parquet", draw(9))
    damage(tmp_path / "train-1.parquet")
    with pytest.raises(UserError, match=message) as error:
        open_at(tmp_path)
    at = "more.parquet" if case == "no split" else "train-1.parquet"
    assert str(error.value).startswith(f"data: {tmp_path / at}: expected ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("described", ["[]", '{"info": 3}', '{"info": {"features": []}}'])
def test_unrelated_metadata_is_ignored(tmp_path, described):
    write_rows(tmp_path / "train.parquet", draw(9), column="label")
    describe(tmp_path / "train.parquet", described)
    assert open_at(tmp_path).classes == ("0", "1", "2")


def test_class_names_are_text(tmp_path):
    write_rows(tmp_path / "train.parquet", draw(9))
    describe(tmp_path / "train.parquet", names([7, 8, 9]))
    assert open_at(tmp_path).classes == ("7", "8", "9")


STRUCTS = [{"bytes": jpeg(i), "path": f"{i:03d}.jpg"} for i in range(9)]
BYTES = [jpeg(i) for i in range(9)]
NUMBERS = [i % 2 for i in range(9)]


@pytest.mark.parametrize(
    ("columns", "classes"),
    [
        ({"img": STRUCTS, "label": NUMBERS}, ("0", "1")),  # CIFAR-10 as published
        ({"img": STRUCTS, "fine_label": NUMBERS, "coarse_label": NUMBERS}, ("0", "1")),
        ({"image": BYTES, "label": NUMBERS}, ("0", "1")),
        ({"jpg": BYTES, "cls": NUMBERS}, ("0", "1")),  # the only ones of their types
        ({"image": STRUCTS, "mask": BYTES, "label": NUMBERS, "width": NUMBERS}, ("0", "1")),
        ({"image": STRUCTS, "label": [n == 1 for n in NUMBERS]}, ("false", "true")),
        (
            {"image": STRUCTS, "label": pa.array(["b" * (1 + n) for n in NUMBERS])},
            ("b", "bb"),
        ),
        (
            {"image": STRUCTS, "label": pa.array(["dc"[n] for n in NUMBERS]).dictionary_encode()},
            ("c", "d"),
        ),
    ],
)
def test_columns_are_found_by_name_or_type(tmp_path, columns, classes):
    pq.write_table(pa.table(columns), tmp_path / "val.parquet")
    dataset = open_at(tmp_path, train=False)
    assert dataset.classes == classes
    images = [dataset.val.read(i) for i in range(9)]
    assert sorted(images) == sorted(BYTES)
    truth = ["dc"[n] if classes[-1] == "d" else classes[n] for n in NUMBERS]
    found = [classes[label] for label in dataset.val.labels]
    assert dict(zip(images, found, strict=True)) == dict(zip(BYTES, truth, strict=True))


def test_missing_rows_training_files_or_pyarrow_are_errors(tmp_path, monkeypatch):
    write_rows(tmp_path / "val.parquet", draw(9))
    with pytest.raises(UserError, match=r"expected train-\*.parquet, got only val.parquet"):
        open_at(tmp_path)
    write_rows(tmp_path / "train.parquet", [])
    with pytest.raises(UserError, match=r"train.parquet: expected images, got no rows"):
        open_at(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'vitral\[parquet\]'"):
        open_at(tmp_path)


def test_rows_that_cannot_be_read_are_broken_images(tmp_path):
    rows = draw(9)
    rows[4] = (None, *rows[4][1:])
    for split in ("train", "val"):
        write_rows(tmp_path / f"{split}.parquet", rows, group=3)
    train = open_at(tmp_path).train
    bad = int(np.flatnonzero((train.places == [0, 1, 1]).all(1))[0])
    with pytest.raises(DecodeError, match="the row contains no image"):
        train.read(bad)
    path = tmp_path / "train.parquet"
    first = pq.read_metadata(path).row_group(2).column(0)
    damaged = bytearray(path.read_bytes())
    damaged[first.data_page_offset : first.data_page_offset + 40] = bytes(40)
    path.write_bytes(damaged)
    train = open_at(tmp_path).train
    intact = train.places[:, 1] == 0
    for i in np.flatnonzero(intact):
        assert train.read(i) == rows[train.places[i, 2]][0]
    with pytest.raises(DecodeError, match="row group 2 is damaged"):
        train.read(int(np.flatnonzero(train.places[:, 1] == 2)[0]))


def test_a_changed_file_is_noticed(both, tmp_path):
    for split in ("train", "val"):
        write_rows(tmp_path / f"{split}.parquet", draw(9))
    train = open_at(tmp_path).train
    status = train.files[0].stat()
    os.utime(train.files[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(FileNotFoundError, match="has changed since it was opened"):
        train.read(0)


def test_row_groups_are_cached_up_to_a_limit(both, monkeypatch):
    train = open_at(both[1]).train
    sizes = {}
    for i in range(len(train)):
        sizes.setdefault(tuple(train.places[i, :2]), []).append(len(train.read(i)))
    monkeypatch.setattr(parquet, "MAX_CACHE_BYTES", 3 * max(map(sum, sizes.values())))
    fresh = dataclasses.replace(train)
    for i in range(len(train)):
        fresh.read(i)
        assert tuple(train.places[i, :2]) == [*fresh._cache][-1]
    assert 2 <= len(fresh._cache) <= 4 < len(train._cache) == len(sizes)
