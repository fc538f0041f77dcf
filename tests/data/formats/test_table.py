"""Tables of labels: columns, paths, splits, groups, and errors with file, row and column."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from vitral import settings
from vitral.config import Config, DataConfig
from vitral.data.formats import labels
from vitral.data.loader import train_batches
from vitral.data.records import Files
from vitral.data.sampling import held_out_groups
from vitral.weights import absolute_paths

from ..image_files import error_message, opened, paths, put, put_split

pytestmark = pytest.mark.usefixtures("nothing_printed")


def write(root, text, name="labels.csv"):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def flat(root, count=4, classes=("cat", "dog")):
    """Writes images with names that are unique over the classes; returns their names and labels."""
    rows = [(f"{i:02d}{name[0]}.png", name) for name in classes for i in range(count)]
    put(root, *(name for name, _ in rows))
    return rows


def csv_text(rows, header="image,label"):
    return "\n".join([header, *map(",".join, rows)]) + "\n"


def pairs(dataset, records):
    names = [dataset.classes[label] for label in records.labels]
    return [*zip(paths(records), names, strict=True)]


def everything(dataset):
    return sorted(pairs(dataset, dataset.train) + pairs(dataset, dataset.val))


@pytest.fixture
def rows(tmp_path):
    return flat(tmp_path)


def test_the_same_batches_as_from_the_equivalent_folder(tmp_path, rows):
    folder, table = tmp_path / "folder", tmp_path / "flat"
    for name, label in rows:
        for place in (folder / label, table):
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / name, place)
    shuffled = [rows[i] for i in (5, 2, 7, 0, 3, 6, 1, 4)]
    options = ["--augment.mixup", "0.2", "--train.batch-size", "4", "--model.image-size", "8"]
    config = settings.load("digits", [*options, "--model.patch-size", "4"])

    def batches(path):
        dataset = opened(path, seed=3, val_fraction=0.25)
        split = [[Path(name).name for name in paths(each)] for each in (dataset.train, dataset.val)]
        cpu = torch.device("cpu")
        return split, *train_batches(
            dataset.train, config, 2, steps=range(5), total_steps=5, micro_batch=4, workers=0,
            device=cpu,
        )  # fmt: skip

    expected, *first = batches(folder)
    found, *second = batches(write(table, csv_text(shuffled)))
    assert found == expected
    assert [len(names) for names in found] == [6, 2]
    assert len(first) == len(second) == 5
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets, b.targets)
    assert not torch.equal(first[0].images, first[1].images)


def test_records_are_ordered_by_class_and_path(tmp_path, rows):
    dataset = opened(write(tmp_path, csv_text(rows[::-1])), train=False)
    assert isinstance(dataset.val, Files)
    assert (dataset.name, dataset.classes) == ("labels.csv", ("cat", "dog"))
    assert pairs(dataset, dataset.val) == rows
    assert dataset.val.sizes.tolist() == [(tmp_path / name).stat().st_size for name, _ in rows]
    assert dataset.val.read(5) == (tmp_path / rows[5][0]).read_bytes()
    assert dataset.val.where(5) == str(tmp_path / rows[5][0])


def as_jsonl(rows):
    return "".join(json.dumps({"file_name": a, "label": b}) + "\n\n" for a, b in rows)


@pytest.mark.parametrize(
    ("name", "convert"),
    [
        ("a.csv", lambda rows: "\ufeff" + csv_text(rows)),
        ("a.csv", lambda rows: csv_text(rows).replace("\n", "\r\n")),
        ("a.CSV", lambda rows: csv_text([(f'"{a}"', f'  "{b}" ') for a, b in rows])),
        ("a.csv", lambda rows: csv_text([(f" {a} ", f"\t{b} ") for a, b in rows], " Image, Label")),
        ("a.csv", lambda rows: csv_text(rows).replace(",", ";")),
        ("a.csv", lambda rows: csv_text(rows).replace("\n", "\n\n") + " ,\n"),
        ("a.csv", lambda rows: csv_text([("1,5", *row) for row in rows], "id,n,File Name,Target")),
        ("a.tsv", lambda rows: csv_text(rows, "path,class").replace(",", "\t")),
        ("a.jsonl", as_jsonl),
        ("a.jsonl", lambda rows: "\ufeff" + as_jsonl(rows).replace("\n", "\r\n")),
    ],
)  # fmt: skip
def test_forms_of_a_table(tmp_path, rows, name, convert):
    assert everything(opened(write(tmp_path, convert(rows), name))) == sorted(rows)


def test_a_parquet_table(tmp_path, rows):
    pa, pq = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    names, classes = zip(*rows, strict=True)
    numbers = [len(name) % 3 + (name == "dog") for name in classes]
    for labels_column, expected in (
        (pa.array(classes).dictionary_encode(), classes),
        (numbers, map(str, numbers)),
    ):
        table = pa.table({"file_name": names, "label": labels_column, "size": [1.0] * len(names)})
        pq.write_table(table, tmp_path / "a.parquet")
        assert everything(opened(tmp_path / "a.parquet")) == sorted(
            zip(names, expected, strict=True)
        )
    message = error_message(tmp_path / "a.parquet", label_column="sise")
    assert message.endswith(
        "expected a column sise, got file_name, label, size; did you mean size?"
    )


def test_a_parquet_file_with_images_is_not_a_table(tmp_path, rows):
    pa, pq = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    images = [{"bytes": (tmp_path / name).read_bytes(), "path": name} for name, _ in rows]
    table = pa.table({"image": images, "label": [label for _, label in rows]})
    pq.write_table(table, tmp_path / "a.parquet")
    dataset = opened(tmp_path / "a.parquet", train=False)
    assert pairs(dataset, dataset.val) == rows
    assert dataset.val.read(0) == images[0]["bytes"]
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert "expected a Parquet file" in error_message(tmp_path / "a.parquet")


def test_columns_can_be_given(tmp_path, rows):
    text = csv_text([(f"x{name}", "all", name, label) for name, label in rows], "path,label,a,b")
    table = write(tmp_path, text)
    dataset = opened(table, image_column="a", label_column="b")
    assert everything(dataset) == sorted(rows)
    message = error_message(table, image_column="a", label_column="lable")
    assert message.endswith("expected a column lable, got path, label, a and 1 more; "
                            "did you mean label?")  # fmt: skip
    text = csv_text([(name, label) for name, label in rows], "thing,label")
    message = error_message(write(tmp_path, text))
    assert "expected a column for the image, such as image, got thing, label" in message
    assert "--image-column" in message
    message = error_message(write(tmp_path, csv_text(rows, "label,label")))
    assert "column for the image" in message
    message = error_message(write(tmp_path, csv_text(rows, "label,label")), image_column="label")
    assert "expected one column label, got several" in message


def test_paths_outside_the_folder_and_of_windows(tmp_path, rows):
    put(tmp_path, "sub/dir/x.png", "sub/dir/y.png")
    put(tmp_path.parent, f"{tmp_path.name}-2/z.png")
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(tmp_path)
    listed = [
        ("sub\\dir\\x.png", "sub/dir/x.png"),
        (str(tmp_path / "sub/dir/y.png"), "sub/dir/y.png"),
        (f"./sub/..//{rows[0][0]}", rows[0][0]),
        (f"../{tmp_path.name}-2/z.png", f"../{tmp_path.name}-2/z.png"),
        (str(tmp_path / rows[1][0]), rows[1][0]),
        (str(link / rows[2][0]), rows[2][0]),
    ]
    text = csv_text([(path, "ab"[i % 2]) for i, (path, _) in enumerate(listed)])
    dataset = opened(write(tmp_path, text), train=False)
    assert sorted(paths(dataset.val)) == sorted(name for _, name in listed)
    assert all(dataset.val.read(i) for i in range(6))
    # Absolute paths do not depend on how the folder is reached.
    through_link = opened(link / "labels.csv", train=False)
    assert through_link.fingerprint == dataset.fingerprint
    outside = tmp_path.parent / f"{tmp_path.name}-2/z.png"
    dataset = opened(write(tmp_path, csv_text([(str(outside), "a")])), train=False)
    assert paths(dataset.val) == [str(outside)]
    assert dataset.val.read(0) == outside.read_bytes()


def test_a_link_to_a_table_is_relative_to_the_folder_of_the_link(tmp_path, rows):
    (tmp_path / "link").symlink_to(tmp_path)
    table = write(tmp_path, csv_text(rows), "elsewhere/table.csv")
    (tmp_path / "labels.csv").symlink_to(table)
    config = Config(data=DataConfig(path=str(tmp_path / "link/labels.csv")))
    path = absolute_paths(config).data.path
    assert path == str(tmp_path / "labels.csv")
    assert everything(opened(path)) == sorted(rows)


def test_names_that_are_not_utf8(tmp_path):
    put(tmp_path, "a.png", "b.png")
    name = b"\xe9.png"
    shutil.copy(tmp_path / "a.png", bytes(tmp_path) + b"/" + name)
    text = b"image,label\n\xe9.png,cafe\nb.png,caf\xc3\xa9\na.png,cafe\xcc\x81\n"
    dataset = opened(write(tmp_path, text), train=False)
    assert dataset.classes == ("cafe", "caf\u00e9")  # composed and decomposed are the same
    assert dataset.val.names.tolist() == [name, b"a.png", b"b.png"]


@pytest.mark.parametrize(
    ("line", "place", "fragment"),
    [
        ("00c.png,", "row 3, column label", "a class, got nothing"),
        (" ,cat", "row 3, column image", "an image file, got nothing"),
        ("gone.png,cat", "row 3, column image", "got nothing named 'gone.png'; paths are relative"),
        ("/none/x.png,cat", "row 3, column image", "got nothing named '/none/x.png'"),
        ("C:\\pictures\\x.png,cat", "row 3, column image", "x.png'"),
        (".,cat", "row 3, column image", "an image file, got nothing named '.'"),
        ("a\0.png,cat", "row 3, column image", "an image file"),
        (f"{'x' * 300}.png,cat", "row 3, column image", "an image file"),
        ("00c.png,dog", "row 3, column label", "expected 'cat' as in row 2 for the same image"),
        ("./00c.png,dog", "row 3, column label", "got 'dog'; remove one of the rows"),
        ("00c.png,cat,1", "row 3", "expected 2 cells, got 3; check the quotes"),
        ("00c.png", "row 3", "expected 2 cells, got 1"),
        (
            '00d.png,"dog\nx.png,cat',
            "row 3, column label",
            "a class on one line, got 'dog\\nx.png,cat'",
        ),
    ],
)
def test_errors_name_file_row_and_column(tmp_path, line, place, fragment):
    put(tmp_path, "00c.png", "00d.png")
    header = "image,label\n"
    good = "00c.png,cat\n" if "00c" in line else "00d.png,dog\n"
    table = write(tmp_path, f"{header}{good}{line}\n")
    message = error_message(table)
    assert message.startswith(f"data: {table}: {place}: ")
    assert fragment in message


def test_missing_files_are_counted(tmp_path, rows):
    (tmp_path / rows[2][0]).unlink()
    (tmp_path / rows[6][0]).unlink()
    message = error_message(write(tmp_path, csv_text(rows)))
    assert (
        f"row 4, column image: expected an image file, got nothing named '{rows[2][0]}', "
        in message
    )
    assert "and 1 more missing file" in message


@pytest.mark.parametrize(
    ("text", "fragment", "name"),
    [
        ("", "names of columns in the first row, got nothing", "labels.csv"),
        ("image,label\n", "rows with images, got none", "labels.csv"),
        ("image,label\n".encode("utf-16"), "UTF-8 text, got UTF-16", "labels.csv"),
        ("", "a column for the image", "a.jsonl"),
        ('{"image": "00c.png", "label": 1}\n\n{"image"', "row 3: expected JSON", "a.jsonl"),
        ("[1]\n", "row 1: expected a JSON object, got [1]", "a.jsonl"),
        ("[" * 100_000, "row 1: expected JSON", "a.jsonl"),
        ('{"image": "a.png", "label": 1, "label": 2}', "got duplicate key; fix this", "a.jsonl"),
        ('{"image": "00c.png", "label": {"a": 1}}', "column label: expected text", "a.jsonl"),
        ('{"image": "00c.png", "label": null}', "row 1, column label: expected", "a.jsonl"),
        ('{"image": "00c.png", "label": 1}\n{"image": "0d"}', "row 2, column label", "a.jsonl"),
        (f'image,label\n"{"x" * 200_000}",a', "row 2: expected CSV, got field larger", "a.csv"),
    ],
)  # fmt: skip
def test_errors_in_the_file(tmp_path, rows, text, fragment, name):
    assert fragment in error_message(write(tmp_path, text, name))


def test_labels_of_json_are_text(tmp_path, rows):
    values = [1, "1", True, "true"]
    lines = [
        json.dumps({"image": name, "label": values[i % 4]}) for i, (name, _) in enumerate(rows)
    ]
    dataset = opened(write(tmp_path, "\n".join(lines), "a.jsonl"), train=False)
    assert dataset.classes == ("1", "true")
    assert np.bincount(dataset.val.labels).tolist() == [4, 4]


def test_one_class(tmp_path, rows):
    text = csv_text([(name, "cat") for name, _ in rows])
    assert "two or more classes, got only cat" in error_message(write(tmp_path, text))
    assert opened(tmp_path / "labels.csv", train=False).classes == ("cat",)


def test_identical_duplicates_are_merged(tmp_path, rows):
    single = opened(write(tmp_path, csv_text(rows)))
    table = write(tmp_path, csv_text([*rows, rows[3], (f"./{rows[3][0]}", "cat"), rows[0]]))
    dataset = opened(table)
    assert dataset.fingerprint == single.fingerprint
    assert dataset.notes[-1] == "labels.csv: 3 duplicate rows merged"
    assert len(dataset.notes) == len(single.notes) + 1


def with_splits(rows, splits):
    return [(*row, split) for row, split in zip(rows, splits, strict=True)]


@pytest.mark.parametrize("val", ["val", "Validation", " VALID ", "dev", "test"])
def test_a_split_column(tmp_path, rows, val):
    splits = ["train", val, "Training", "train", "train", "train", val, "train"]
    table = write(tmp_path, csv_text(with_splits(rows, splits), "image,label,split"))
    dataset = opened(table)
    assert pairs(dataset, dataset.val) == [rows[1], rows[6]]
    assert len(dataset.train) == 6
    assert not dataset.held_out
    expected = ("labels.csv has no rows of val: using test for validation",) * (val == "test")
    assert dataset.notes == expected
    only = opened(table, train=False)
    assert only.train is None
    assert pairs(only, only.val) == [rows[1], rows[6]]


def test_rows_of_other_splits_are_not_used(tmp_path, rows):
    splits = ["train", "val", "train", "test", "train", "train", "val", "test"]
    unlabeled = [
        row if split != "test" else (row[0], "") for row, split in zip(rows, splits, strict=True)
    ]
    table = write(tmp_path, csv_text(with_splits(unlabeled, splits), "image,label,subset"))
    dataset = opened(table)
    assert everything(dataset) == sorted(row for i, row in enumerate(rows) if i not in (3, 7))
    assert dataset.notes == ("labels.csv: rows of test are not used",)


def test_errors_of_splits(tmp_path, rows):
    def message(splits, listed=rows):
        return error_message(
            write(tmp_path, csv_text(with_splits(listed, splits), "image,label,split"))
        )

    assert "row 3, column split: expected one of train, val, " in message(["train", "fold1"] * 4)
    assert "row 4, column split: " in message(["train", "val", "", *["train"] * 5])
    assert "rows of the split train, got only val" in message(["val"] * 8)
    splits = ["train"] * 4 + ["val"] * 4
    got = "row 6, column label: expected a class of the training images, got dog, which no training"
    assert got in message(splits)
    both = [*rows[:-1], (rows[0][0], "cat")]
    got = "row 9, column split: expected 'train' as in row 2 for the same image, got 'val'"
    assert got in message(["train"] * 7 + ["val"], both)


def test_a_validation_split_may_lack_classes(tmp_path, rows):
    splits = ["val", *["train"] * 7]
    dataset = opened(write(tmp_path, csv_text(with_splits(rows, splits), "image,label,split")))
    assert (dataset.classes, pairs(dataset, dataset.val)) == (("cat", "dog"), [rows[0]])


def test_splits_in_the_paths(tmp_path):
    put_split(tmp_path, "train", 3)
    put_split(tmp_path, "val", 2)
    folder = opened(tmp_path)
    rows = everything(folder)
    dataset = opened(write(tmp_path, csv_text(rows)))
    assert dataset.fingerprint == folder.fingerprint
    assert dataset.train.labels.tolist() == folder.train.labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("splits", [("",), ("train", "val"), ("train", "test")])
def test_metadata_next_to_the_images(tmp_path, name, splits):
    expected = []
    for split in splits:
        rows = flat(tmp_path / split)
        text = csv_text(rows, "file_name,label") if name.endswith("csv") else as_jsonl(rows)
        write(tmp_path / split, text, name)
        expected.append([(f"{split}/{path}".lstrip("/"), label) for path, label in rows])
    dataset = opened(tmp_path)
    assert everything(dataset) == sorted(row for rows in expected for row in rows)
    if len(splits) == 2:
        assert [pairs(dataset, dataset.train), pairs(dataset, dataset.val)] == expected
        (tmp_path / expected[1][0][0]).unlink()
        first = 2 if name.endswith("csv") else 1
        place = f"{tmp_path}/{splits[1]}/{name}: row {first}, column file_name"
        assert place in error_message(tmp_path)
        (tmp_path / "train" / name).write_text((tmp_path / "train" / name).read_text() + "\n,\n{")
        assert f"{tmp_path}/train/{name}: row" in error_message(tmp_path)


def test_metadata_of_class_folders_is_ignored(tmp_path):
    put_split(tmp_path, ".", 3)
    folder = opened(tmp_path)
    write(tmp_path, "file_name,caption\ncat/000.png,a cat\n", "metadata.csv")
    assert opened(tmp_path).fingerprint == folder.fingerprint
    write(
        tmp_path, "file_name,label\ncat/000.png,x\ndog/000.png,y\ndog/001.png,y\n", "metadata.csv"
    )
    assert opened(tmp_path).classes == ("x", "y")


def grouped(root, count=60):
    """A table with 6 groups for each of two classes, and one group with both."""
    rows = flat(root, count)
    groups = [f"{name}{i % count % 6}" for i, (_, name) in enumerate(rows)]
    groups[0] = groups[count] = "both"
    return [(*row, group) for row, group in zip(rows, groups, strict=True)]


@pytest.mark.parametrize("seed", range(3))
def test_groups_are_not_divided(tmp_path, seed):
    rows = grouped(tmp_path)
    table = write(tmp_path, csv_text(rows, "image,label,patient_id"))
    group_of = {name: group for name, _, group in rows}
    dataset = opened(table, seed, val_fraction=0.3)
    train, val = ({group_of[name] for name in paths(each)} for each in (dataset.train, dataset.val))
    assert not train & val
    assert train | val == {*group_of.values()}
    assert np.abs(np.bincount(dataset.val.labels) - 0.3 * 60).max() <= 6
    assert "(30% of each class, without dividing groups)" in dataset.notes[0]
    # The same with hold_out; other groups, and other images of these, do not change the draw.
    more = [*rows, *((f"n{i}.png", "ape", f"ape{i % 4}") for i in range(40))]
    put(tmp_path, *(name for name, _, _ in more[len(rows) :]))
    dataset = opened(write(tmp_path, csv_text(more[::-1], "image,label,patient_id")), seed,
                     val_fraction=0.3)  # fmt: skip
    assert {group_of.get(name) for name in paths(dataset.val)} - {None} == val


def test_another_seed_holds_out_other_groups(tmp_path):
    table = write(tmp_path, csv_text(grouped(tmp_path), "image,label,camera"))
    found = {tuple(paths(opened(table, seed, group_column="camera").val)) for seed in range(4)}
    assert len(found) > 1


def test_errors_of_groups(tmp_path, rows):
    def message(groups, header="image,label,group", **options):
        text = csv_text([(*row, group) for row, group in zip(rows, groups, strict=True)], header)
        return error_message(write(tmp_path, text), **options)

    assert "row 4, column group: expected a group, got nothing" in message(["a", "b", "", *"cdefg"])
    assert "no class has enough groups" in message([*"aaaabbbb"])
    got = message([*"aabbaabb"], "image,label,camera", group_column="kamera")
    assert "expected a column kamera" in got
    splits = [f"{group},train" for group in "abcdefg"] + ["a,val"]
    got = message(splits, "image,label,group,split")
    assert "row 9, column group: expected a group in one split, got 'a', which is in both" in got


def test_a_group_belongs_to_its_rarest_class():
    # Class 1 is in two groups, each with many images of class 0: one of them must be held out.
    groups = np.repeat(np.arange(12), 10)
    labels = np.zeros(120, np.int64)
    labels[[0, 10]] = 1
    for seed in range(10):
        held = held_out_groups(groups, labels, 0.1, seed, "test")
        assert held.reshape(12, 10).all(1).sum() == held.sum() / 10
        assert np.bincount(labels[held], minlength=2)[1] == 1
        assert np.array_equal(
            held_out_groups(groups[::-1], labels[::-1], 0.1, seed, "test"), held[::-1]
        )


def test_the_held_out_fraction_of_groups_of_different_sizes():
    sizes = np.arange(1, 101)
    groups, labels = np.repeat(np.arange(100), sizes), np.zeros(sizes.sum(), np.int64)
    for seed in range(5):
        held = held_out_groups(groups, labels, 0.2, seed, "test")
        assert abs(held.mean() - 0.2) <= 50 / sizes.sum()  # half of the largest group


def test_groups_are_not_needed_to_validate(tmp_path, rows):
    table = write(tmp_path, csv_text(rows))
    options = {"group_column": "patient"}
    assert len(opened(table, train=False, **options).val) == 8
    assert "expected a column patient" in error_message(table, **options)


def test_common_names_are_distinct():
    names = [name for group in labels.COLUMNS.values() for name in group]
    assert len({*names}) == len(names)
