"""The included facts about ImageNet, against those in torchvision and well-known ones."""

import numpy as np
import pytest
from torchvision.models._meta import _IMAGENET_CATEGORIES

from vitral.data.imagenet import display, human_name, validation_labels, wnids


def test_classes_are_a_thousand_sorted_wnids_in_torchvisions_order():
    names = [human_name(wnid) for wnid in wnids()]
    assert len(set(wnids())) == 1000
    assert list(wnids()) == sorted(wnids())
    first = [name.split(", ")[0] for name in names]
    renamed = [pair for pair in zip(first, _IMAGENET_CATEGORIES, strict=True) if len({*pair}) == 2]
    assert renamed == [("crane", "crane bird"), ("maillot", "maillot tank suit")]


@pytest.mark.parametrize(
    ("wnid", "name"),
    [
        ("n01440764", "tench, Tinca tinca"),
        ("n02268443", "dragonfly, darning needle, devil's darning needle, sewing needle, "
         "snake feeder, snake doctor, mosquito hawk, skeeter hawk"),
        ("n15075141", "toilet tissue, toilet paper, bathroom tissue"),
        ("n00000001", None),
        ("cat", None),
    ],
)  # fmt: skip
def test_names(wnid, name):
    assert human_name(wnid) == name


def test_validation_labels():
    labels = validation_labels()
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [50] * 1000
    # the start of the published ground truth, as wnids and as positions of sorted wnids
    first = ["n01751748", "n09193705", "n02105855", "n04263257", "n03125729", "n01735189"]
    assert [wnids()[label] for label in labels[:6]] == first
    assert labels[:6].tolist() == [65, 970, 230, 809, 516, 57]
    with pytest.raises(ValueError, match="read-only"):
        labels[0] = 1


def test_display():
    assert [display(name) for name in ("n01440764", "cat")] == ["n01440764 tench", "cat"]
