"""Items of Python datasets: pixels, labels, class names, fingerprints, and errors."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from vitral.config import DataConfig
from vitral.data.decode import DecodeError, decode
from vitral.data.formats.objects import PythonDatasets, open_objects
from vitral.data.objects import read_item
from vitral.errors import UserError

CONFIG = DataConfig(workers=0)
LEVELS = np.random.default_rng(0).integers(256, size=(12, 5, 7, 3), dtype=np.uint8)


class Listed(list):
    """A list as a dataset, which counts how often it is read."""

    reads = 0

    def __init__(self, items, **more):
        super().__init__(items)
        vars(self).update(more)

    def __getitem__(self, i):
        self.reads += 1
        return super().__getitem__(i)


def dataset(**more):
    """Two classes with six images each."""
    items = [(levels, i % 2) for i, levels in enumerate(LEVELS)]
    return Listed(items, **({"classes": ["a", "b"]} | more))


def opened(train, val=None, classes=None, fingerprint=None):
    return open_objects(PythonDatasets(train, val or dataset(), classes, fingerprint), CONFIG, 0)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(LEVELS[0]), LEVELS[0]),
        (LEVELS[0], LEVELS[0]),
        (LEVELS[0][::-1], LEVELS[0][::-1]),
        (torch.from_numpy(LEVELS[0]).permute(2, 0, 1), LEVELS[0]),
        (LEVELS[0][:, :, 0], LEVELS[0][:, :, [0, 0, 0]]),
        (torch.from_numpy(LEVELS[0][None, :, :, 0].copy()), LEVELS[0][:, :, [0, 0, 0]]),
        (np.concatenate([LEVELS[0], LEVELS[1][:, :, :1]], 2), LEVELS[0]),
    ],
)
@pytest.mark.parametrize("label", [1, np.int32(1), torch.tensor(1)])
def test_an_image_becomes_rgb_with_its_channels_innermost(image, expected, label):
    for item in ((image, label), {"image": image, "label": label}, {"img": image, "labels": label}):
        pixels, found = read_item([item], 0)
        assert found == 1
        assert pixels.dtype == torch.uint8
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)
        assert pixels.permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (("cat.jpg", 0), "expected a PIL image, a uint8 tensor .* got str"),
        (
            (LEVELS[0] / 255, 0),
            r"shape \(H, W, C\) .* got float64 of shape \(5, 7",
        ),
        (
            (torch.zeros(5, 7, 3, dtype=torch.uint8), 0),
            r"shape \(C, H, W\) .* shape \(5, 7, 3\)",
        ),
        ((LEVELS[0], 0.5), r"expected \(image, integer label\): 'float' object"),
        ((LEVELS[0],), r"expected \(image, integer label\): not enough values"),
        ({"image": LEVELS[0]}, "expected a key label or labels or fine_label, got image"),
    ],
)
def test_an_item_that_is_not_a_labeled_image(item, message):
    with pytest.raises(DecodeError, match=message):
        read_item([item], 0)
    items = Listed([*dataset(), item], classes=["a", "b"])
    with pytest.raises(UserError, match=f"^data: dataset: item 12: .*{message}"):
        opened(items)


def test_records_have_the_images_and_labels():
    found = opened(dataset(), val=Subset(dataset(), [3, 4]))
    assert found.train.labels.tolist() == [0, 1] * 6
    assert found.val.labels.tolist() == [1, 0]
    for image in (found.train.image(4), decode(found.train.read(4)), found.val.image(1)):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), LEVELS[4])
    assert found.train.where(4) == "item 4"


@pytest.mark.parametrize(
    ("more", "classes", "expected"),
    [
        ({}, None, ("a", "b")),
        ({}, ["x", "y"], ("x", "y")),
        ({"classes": None, "features": {"label": SimpleNamespace(names=["c", "d"])}}, None, "cd"),
        ({"classes": None, "features": np.zeros(2)}, [3, 4], "34"),
    ],
)
def test_class_names(more, classes, expected):
    train = dataset(**more)
    val = dataset(classes=None)
    assert opened(train, val, classes).classes == tuple(expected)
    assert opened(Subset(train, range(12)), val, classes).classes == tuple(expected)


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (Listed([], classes=["a", "b"]), None, "dataset: expected images, got an empty dataset"),
        (dataset(), Listed([], classes=["a", "b"]), "val_dataset: expected images, got an empty"),
        (dataset(classes=None), None, "expected class names in .classes or .features, got none"),
        (dataset(classes=["a", "a"]), None, "two or more different class names, got 2: a, a"),
        (dataset(classes=["a"]), None, "two or more different class names, got 1: a"),
        (
            dataset(),
            Listed([(LEVELS[0], 2)], classes=["a", "b"]),
            "val_dataset: expected labels from 0 to 1, got 2 for item 0",
        ),
        (dataset(), dataset(classes=["b", "a"]), "val_dataset: expected the classes of dataset"),
    ],
)
def test_datasets_that_cannot_be_used(train, val, message):
    with pytest.raises(UserError, match=f"^data: .*{message}"):
        open_objects(PythonDatasets(train, val), CONFIG, 0)


def test_random_transforms_are_rejected():
    class Random(Listed):
        def __getitem__(self, i):
            return np.random.randint(0, 256, (5, 7, 3)).astype(np.uint8), i % 2  # noqa: NPY002

    with pytest.raises(UserError, match="item 0: expected the same image each time, got two"):
        opened(Random(range(12), classes=["a", "b"]))


def test_the_fingerprint_depends_on_images_labels_and_order():
    def fingerprint(items, **more):
        return opened(Listed(items, classes=["a", "b"]), **more).fingerprint

    items = list(dataset())
    base = fingerprint(items)
    assert fingerprint([(Image.fromarray(image), label) for image, label in items]) == base
    assert fingerprint([items[1], items[0], *items[2:]]) != base
    assert fingerprint([*items[:11], (items[11][0], 0)]) != base
    changed = items[11][0].copy()
    changed[-1, -1, -1] ^= 1
    assert fingerprint([*items[:11], (changed, 1)]) != base
    assert fingerprint(items, classes=["b", "a"]) != base
    assert fingerprint(items, fingerprint="one") == fingerprint(items, fingerprint="one")
    assert fingerprint(items, fingerprint="one") != fingerprint(items, fingerprint="two")


def test_a_fingerprint_and_listed_labels_avoid_reading_images():
    train = dataset(targets=[0, 1] * 6)
    val = Subset(dataset(targets=[0, 1] * 6), [5, 6])
    found = opened(train, val, fingerprint="given")
    assert found.val.labels.tolist() == [1, 0]
    assert (train.reads, val.dataset.reads) == (0, 0)
    train = dataset(targets=[9] * 12, target_transform=lambda label: label % 2)
    assert opened(train, val, fingerprint="given").train.labels.tolist() == [0, 1] * 6


def test_the_held_out_part_is_stratified_and_seeded():
    items = [(levels, i // 6) for i, levels in enumerate(LEVELS)]
    train = Listed(items, classes=["a", "b"])  # sorted labels stay the same for any selection
    parts = [open_objects(PythonDatasets(train), CONFIG, seed) for seed in (0, 0, 1)]
    for part in parts:
        assert part.held_out
        assert np.bincount(part.val.labels).tolist() == [1, 1]
        assert sorted([*part.train.rows, *part.val.rows]) == list(range(12))
    assert parts[0].fingerprint == parts[1].fingerprint != parts[2].fingerprint
