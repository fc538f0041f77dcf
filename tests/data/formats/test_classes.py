"""Tables with several labels per image: cells with separators, lists, and columns of 0 and 1."""

import json

import numpy as np
import pytest

from vitral.config import DataConfig
from vitral.data.tools.packing import pack

from ..image_files import error_message, opened, paths, put

pytestmark = pytest.mark.usefixtures("nothing_printed")

LABELS = {
    "0.png": "sky;sea", "1.png": "sea", "2.png": "", "3.png": "cat;sea;sky", "4.png": "cat",
    "5.png": "sky", "6.png": "sea;cat", "7.png": "sky;cat",
}  # fmt: skip
SEMICOLON = {"label_separator": ";"}
CLASSES = ("cat", "sea", "sky")


@pytest.fixture
def images(tmp_path):
    put(tmp_path, *LABELS)
    return tmp_path


def write(root, lines, name="labels.csv"):
    (root / name).write_text("\n".join(lines) + "\n")
    return root / name


def listed(root, separator=";"):
    rows = [f'{name},"{cell.replace(";", separator)}"' for name, cell in LABELS.items()]
    return write(root, ["image,label", *rows])


def hot(cell):
    return [int(name in cell.split(";")) for name in CLASSES]


def binary(root, order=(2, 0, 1), values=("0", "1"), header="image,"):
    """Writes a table with a column for each class, in another order than that of the classes."""
    rows = [
        f"{name}," + ",".join(values[hot(cell)[i]] for i in order) for name, cell in LABELS.items()
    ]
    return write(root, [header + ",".join(CLASSES[i] for i in order), *rows], "binary.csv")


def found(dataset):
    """Returns the names of the labels of each image, by its path."""
    return {
        path: {dataset.classes[i] for i in np.flatnonzero(row)}
        for records in (dataset.train, dataset.val)
        if records is not None
        for path, row in zip(paths(records), records.labels, strict=True)
    }


EXPECTED = {name: {*cell.split(";")} - {""} for name, cell in LABELS.items()}


@pytest.mark.parametrize("separator", [";", "|", " ", "--", " ; "])
def test_labels_in_one_cell(images, separator):
    dataset = opened(listed(images, separator), label_separator=separator.strip() or " ")
    assert dataset.multi_label
    assert dataset.classes == CLASSES
    assert found(dataset) == EXPECTED
    assert dataset.train.labels.dtype == np.uint8
    assert "labels.csv: 1 image without labels" in dataset.notes


def test_all_forms_are_the_same_dataset(images):
    prints = {opened(listed(images), label_separator=";").fingerprint}
    for values in (("0", "1"), ("0.0", "1.0"), ("False", "TRUE")):
        prints.add(opened(binary(images, values=values)).fingerprint)
    items = [{"image": name, "label": [*EXPECTED[name]]} for name in LABELS]
    jsonl = write(images, map(json.dumps, items), "labels.jsonl")
    prints.add(opened(jsonl).fingerprint)
    prints.add(
        opened(write(images, reversed([*map(json.dumps, items)]), "labels.jsonl")).fingerprint
    )
    pa, pq = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    columns = {
        name: [hot(cell)[i] == 1 for cell in LABELS.values()] for i, name in enumerate(CLASSES)
    }
    for table in ({"label": [item["label"] for item in items]}, columns):
        pq.write_table(pa.table({"image": [*LABELS], **table}), images / "labels.parquet")
        prints.add(opened(images / "labels.parquet").fingerprint)
    assert len(prints) == 1
    changed = listed(images).read_text().replace('1.png,"sea"', '1.png,"sky"')
    (images / "labels.csv").write_text(changed)
    assert opened(images / "labels.csv", label_separator=";").fingerprint not in prints


def test_one_column_of_labels_is_never_split(images):
    rows = [f"{name},{i % 2}" for i, name in enumerate(LABELS)]
    dataset = opened(write(images, ["image,label", *rows]))
    assert not dataset.multi_label
    assert dataset.classes == ("0", "1")
    table = write(images, ["image,label", *(f"{name},a;{i % 2}" for i, name in enumerate(LABELS))])
    assert opened(table).classes == ("a;0", "a;1")


def test_columns_that_may_be_the_label_are_not_ignored(images):
    rows = [f"{name},bird,{i % 2},{i // 4}" for i, name in enumerate(LABELS)]
    table = write(images, ["image,species,cat,sea", *rows])
    message = error_message(table)
    assert "expected a column for the label, such as label, got image, species" in message
    assert message.endswith(
        "--label-column, or --task multi for columns of 0 and 1, one for each class"
    )
    assert opened(table, task="multi").classes == ("cat", "sea")
    assert "column for the label" in error_message(table, task="single")


def test_images_are_held_out_by_their_rarest_label(tmp_path):
    names = [f"{i:03d}.png" for i in range(120)]
    put(tmp_path, *names)
    cells = ["a" + ";b" * (i % 2) + ";c" * (i % 12 == 0) for i in range(120)]
    table = write(tmp_path, ["image,label", *map(",".join, zip(names, cells, strict=True))])
    dataset = opened(table, label_separator=";", val_fraction=0.2)
    # 10 images have c, 60 b and not c, 50 neither; a fifth of each is held out
    held = dataset.val.labels
    assert len(held) == 24
    assert held.sum(0).tolist() == [24, 12, 2]
    assert "20% of each class by the rarest label of each image" in dataset.choices[0]


@pytest.mark.parametrize("jpeg", [False, True])
def test_packs_store_several_labels(images, tmp_path, jpeg, capfd):
    source = DataConfig(path=str(listed(images)), label_separator=";")
    pack(source, 0, tmp_path / "packed", 8, jpeg, 0)
    capfd.readouterr()
    packed, expected = (
        opened(tmp_path / "packed"),
        opened(images / "labels.csv", label_separator=";"),
    )
    assert packed.multi_label
    assert found(packed) == found(expected) == EXPECTED
    assert np.array_equal(packed.train.labels, expected.train.labels)


@pytest.mark.parametrize(
    ("lines", "options", "fragment"),
    [
        (["0.png,a;;b"], SEMICOLON, "row 2, column label: expected labels separated by ';', got"),
        (["0.png,a;b", "1.png,a;"], SEMICOLON, "row 3, column label: expected labels separated"),
        (["0.png,a"], {"task": "multi"}, "expected a separator of labels, got column label and"),
        (["0.png,a;b", "0.png,a"], SEMICOLON, "row 3, column label: expected 'a;b' as in row 2"),
        (["0.png,a;a", "1.png,a"], SEMICOLON, "expected two or more classes, got only a"),
    ],
)  # fmt: skip
def test_errors_in_cells(images, lines, options, fragment):
    assert fragment in error_message(write(images, ["image,label", *lines]), **options)


@pytest.mark.parametrize(
    ("lines", "fragment"),
    [
        (["0.png,1,0", "1.png,0,2", "2.png,0,1"], "row 3, column b: expected 0 or 1, got '2'"),
        (["0.png,1,0", "1.png,,1", "2.png,0,1"], "row 3, column a: expected 0 or 1, got nothing"),
        (["0.png,1,yes", "1.png,0,1", "2.png,0,1"], "row 2, column b: expected 0 or 1, got 'yes'"),
        (["0.png,1,0", "1.png,1,0"], "column b: expected 1 in a row, got no image with this class"),
        (["0.png,1,0", "1.png,0,1", "0.png,1,1"], "row 4, column b: expected '0' as in row 2"),
    ],
)  # fmt: skip
def test_errors_in_columns_of_0_and_1(images, lines, fragment):
    assert fragment in error_message(write(images, ["image,a,b", *lines]))


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (
            "image,label\n0.png,b\n1.png,tênch\n",
            "row 3, column label: expected UTF-8 text, got t\\xe",
        ),
        (
            "image,a,tênch\n0.png,1,0\n1.png,0,1\n",
            "expected UTF-8 text, got column t\\xeanch; save",
        ),
    ],
)
def test_names_of_classes_are_utf8(images, text, fragment):
    table = images / "latin.csv"
    table.write_bytes(text.encode("latin-1"))
    assert fragment in error_message(table)
    table.write_text(text, encoding="utf-8")
    assert "tênch" in opened(table, train=False).classes


def test_a_class_that_no_training_image_has(images):
    rows = ["0.png,train,1,0", "1.png,train,0,0", "2.png,val,1,1"]
    message = error_message(write(images, ["image,split,a,b", *rows]))
    assert "row 4, column b: expected a class of the training images, got b" in message
    rows = ["0.png,train,a;c", "1.png,train,", "2.png,val,c;b"]
    message = error_message(write(images, ["image,split,label", *rows]), label_separator=";")
    assert "row 4, column label: expected a class of the training images, got b" in message


def test_the_task_is_checked_for_every_format(images):
    put(images / "folder", "cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")
    for options in ({"task": "multi"}, {"label_separator": ";"}):
        assert "got one label per image" in error_message(images / "folder", **options)
    assert "a column for the label" in error_message(binary(images), task="single")
