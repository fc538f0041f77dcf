"""ILSVRC2012 from its archives, against the same images in folders."""

import io
import shutil
import tarfile

import numpy as np
import pytest
from scipy.io import savemat

from vitral.data.imagenet import wnids

from ..archive_files import (
    TRAIN,
    WNIDS,
    assert_same,
    base,
    contents,
    endless,
    error_message,
    inner_tars,
    opened,
    put_folder,
    put_ilsvrc,
    tarred,
    val_images,
)

pytestmark = pytest.mark.usefixtures("cache")

DEVKIT = "ILSVRC2012_devkit_t12"
IDS = {"n02012849": 1, "n07753592": 2, "n01440764": 3, "n03126707": 4}


def kit_files(val, ids):
    """meta.mat, including a synset with children, and the ground truth."""
    fields = ["ILSVRC2012_ID", "WNID", "words", "num_children"]
    synsets = np.zeros((len(ids) + 1, 1), [(field, object) for field in fields])
    for i, (wnid, number) in enumerate([*ids.items(), ("n00001740", 1001)]):
        synsets[i, 0] = (number, wnid, "entity, thing", 3 if number > 1000 else 0)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    in_order = sorted(val, key=base)
    truth = "".join(f"{ids[name[:9]]}\n" for name in in_order)
    return {
        f"{DEVKIT}/data/meta.mat": meta.getvalue(),
        f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }


def put_kit(root, val, ids=IDS, packed=True, change=lambda files: None):
    files = kit_files(val, ids)
    change(files)
    if packed:
        with tarfile.open(root / f"{DEVKIT}.tar.gz", "w:gz") as tar:
            for name, data in files.items():
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    else:
        (root / DEVKIT / "data").mkdir(parents=True)
        for name, data in files.items():
            (root / name).write_bytes(data)


@pytest.mark.parametrize("workers", [0, 2])
def test_ilsvrc_without_devkit_equals_the_folder(tmp_path, workers):
    val = val_images(numbered_on=False)
    root = put_ilsvrc(tmp_path / "tars", val)
    folder = put_folder(tmp_path / "folder", val)
    assert_same(root, folder, workers)
    assert_same(root / "ILSVRC2012_img_train.tar", folder)
    name = "n01440764.tar/n01440764_10.JPEG"
    assert opened(root).train.where(0) == f"{root}/ILSVRC2012_img_train.tar: {name}"


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_devkit_ids_are_mapped_to_wnids(tmp_path, packed, train):
    val = val_images(numbered_on=True)
    root = put_ilsvrc(tmp_path / "tars", val, train)
    put_kit(root, val, packed=packed)
    if train:
        assert_same(root, put_folder(tmp_path / "folder", val))
    else:
        found = opened(root, train=False)
        assert found.classes == WNIDS
        assert contents(found.val) == [val[name] for name in sorted(val)]
        assert found.val.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


def test_a_validation_tar_without_a_training_tar_has_all_classes(tmp_path):
    val = val_images(numbered_on=False)
    root = put_ilsvrc(tmp_path / "tars", val, train=False)
    for path in (root, root / "ILSVRC2012_img_val.tar"):
        found = opened(path, train=False)
        assert found.classes == wnids()
        assert [wnids()[label] for label in found.val.labels] == [name[:9] for name in sorted(val)]


def test_extracted_folders_take_precedence(tmp_path):
    val = val_images(numbered_on=False)
    put_ilsvrc(put_folder(tmp_path, val), val)
    (tmp_path / "val.tar.gz").write_bytes(b"?")
    assert opened(tmp_path).train.where(0).startswith(str(tmp_path / "train"))
    (tmp_path / "train/backup.tar").write_bytes(b"?")
    assert opened(tmp_path / "train").train.where(0).startswith(str(tmp_path / "train/n"))
    shutil.rmtree(tmp_path / "val")  # partially extracted
    assert "ILSVRC2012_img_train.tar" in opened(tmp_path).train.where(0)


def train_tar(**changed):
    tars = inner_tars() | changed
    return tarred([(f"{name}.tar", content) for name, content in tars.items()])


INNER = inner_tars()["n02012849"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (train_tar()[:-12_000], "cut off or damaged at n01440764.tar"),
        (endless(train_tar()), "cut off or damaged at n01440764.tar"),
        (train_tar(n02012849=INNER[:1100]), "n02012849.tar: expected a complete tar archive"),
        (train_tar(n02012849=endless(INNER)), "cut off or damaged at n02012849_6.JPEG"),
        (train_tar(n02012849=INNER[:512]), "cut off or damaged at n02012849_11.JPEG"),
        (train_tar(n02012849=b""), "n02012849.tar: expected an uncompressed tar"),
        (train_tar(n02012849=b"?" * 1024), "n02012849.tar: expected an uncompressed tar"),
        (train_tar(n02012849=tarred([("../a.JPEG", b"?")])), "inside the archive, got ../a.JPEG"),
        (train_tar(n02012849=tarred([("a.txt", b"?")])), "n02012849.tar: expected images"),
        (train_tar(n02012849=tarred([("a.jpg", b"?")] * 2)), "got a.jpg more than once"),
        (tarred([("a/n1.tar", INNER), ("b/n1.tar", INNER)]), "got n1 more than once"),
        (tarred([("n01440764.tar", INNER)]), "two or more classes, got n01440764.tar"),
        (tarred((base(name), data) for name, data in TRAIN.items()), "got n01440764_6.JPEG"),
        (tarred([]), "two or more classes, got none"),
    ],
)
def test_a_bad_training_tar_is_rejected(tmp_path, content, words, cache):
    path = tmp_path / "ILSVRC2012_img_train.tar"
    path.write_bytes(content)
    assert words in error_message(tmp_path)
    assert words in error_message(path)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (tarred([("ILSVRC2012_val_00050001.JPEG", b"?")]), "got labels for 50,000"),
        (tarred([("ILSVRC2012_val_00000000.JPEG", b"?")]), "got labels for 50,000"),
        (tarred([("val_1.JPEG", b"?")]), "names like ILSVRC2012_val_00000001.JPEG, got val_1"),
        (tarred([("ILSVRC2012_val_00000001.JPEG", b"?")] * 2), "each name once"),
        (tarred([("ILSVRC2012_val_00000001.JPEG", b"?")]), "the 4 classes of ILSVRC2012_img_train"),
        (tarred([("README", b"?")]), "expected images"),
    ],
)
def test_a_bad_validation_tar_is_rejected(tmp_path, content, words):
    put_ilsvrc(tmp_path)
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(content)
    assert words in error_message(tmp_path)


def replace_truth(change):
    def apply(files):
        name = f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt"
        files[name] = change(files[name])

    return apply


def replace_meta(content):
    def apply(files):
        files[f"{DEVKIT}/data/meta.mat"] = content

    return apply


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("change", "ids", "words"),
    [
        (replace_truth(lambda t: t[:-2]), IDS, "12 images up to number 12 in ILSVRC2012_img"),
        (replace_truth(lambda t: t + b"1\n"), IDS, "got labels for 13"),
        (replace_truth(lambda t: b"5" + t[1:]), IDS, "an ILSVRC2012_ID of data/meta.mat in each"),
        (replace_truth(lambda t: b"1001" + t[1:]), IDS, "got 1001"),  # an inner synset
        (replace_truth(lambda t: b"?" + t[1:]), IDS, "got ?"),
        (replace_truth(lambda t: b""), IDS, "got none"),
        (replace_truth(lambda t: t), dict.fromkeys(IDS, 4) | {"n99999999": 4}, "got n99999999"),
        (replace_meta(b"no MATLAB file " * 99), IDS, "expected synsets with ILSVRC2012_ID"),
        (replace_meta(b""), IDS, "expected synsets with ILSVRC2012_ID"),
        (dict.popitem, IDS, "ILSVRC2012_validation_ground_truth.txt"),
    ],
)
def test_a_wrong_devkit_is_rejected(tmp_path, packed, change, ids, words):
    val = val_images(numbered_on=True)
    put_ilsvrc(tmp_path, val)
    put_kit(tmp_path, val, ids, packed, change)
    assert words in error_message(tmp_path)


def test_a_truncated_devkit_is_rejected(tmp_path):
    val = val_images(numbered_on=True)
    put_ilsvrc(tmp_path, val)
    put_kit(tmp_path, val)
    path = tmp_path / f"{DEVKIT}.tar.gz"
    for end in (0, 15, len(path.read_bytes()) // 2):
        path.write_bytes(path.read_bytes()[:end])
        assert "a complete archive with data/meta.mat" in error_message(tmp_path)


def test_training_requires_the_training_tar(tmp_path):
    put_ilsvrc(tmp_path, val_images(numbered_on=False), train=False)
    assert "expected ILSVRC2012_img_train.tar, got none" in error_message(tmp_path)
