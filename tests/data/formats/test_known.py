"""Datasets known by name; none of these tests downloads anything."""

import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from vitral.config import DataConfig
from vitral.data.formats import open_dataset
from vitral.data.records import Pixels

from ..image_files import error_message, opened, paths, put_split

pytestmark = pytest.mark.usefixtures("nothing_printed")


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


def test_synthetic_depends_only_on_the_size():
    one, two = (open_dataset(DataConfig(path="synthetic", workers=k), 16, seed=k) for k in range(2))
    assert one.fingerprint == two.fingerprint
    assert one.train.images.shape == (2560, 3, 16, 16)
    assert one.val.images.shape == (512, 3, 16, 16)
    assert one.train.images.dtype == torch.uint8
    assert len(one.classes) == 10
    assert np.bincount(one.train.labels).tolist() == [256] * 10
    assert open_dataset(DataConfig(path="synthetic"), 7, 0).val.images.shape == (512, 3, 7, 7)


def test_synthetic_images_need_more_than_one_example():
    dataset = open_dataset(DataConfig(path="synthetic"), 16, 0)
    train, val = (s.images.flatten(1).double() / 255 for s in (dataset.train, dataset.val))
    fitted = LogisticRegression().fit(train[:500], dataset.train.labels[:500])
    assert fitted.score(val, dataset.val.labels) > 0.9
    same = train[dataset.train.labels == 3]
    assert same.std(0).mean() > 0.1  # noise
    assert len(torch.unique(torch.cat([train, val]), dim=0)) == 3072


class FakeCifar:
    """Array and labels as in torchvision's class after a download."""

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
def test_without_a_network_the_error_says_what_to_do(monkeypatch, tmp_path, name, archive):
    def no_network(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("VITRAL_DATA", str(tmp_path / "sets"))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    message = error_message(name)
    assert str(tmp_path / "sets") in message
    assert "Name or service not known" in message
    assert f"put {archive} into that folder, or pass an image folder with --data" in message
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert f"for the local folder of that name, pass ./{name}" in error_message(name)


def test_a_broken_archive_is_an_error(monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("VITRAL_DATA", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half an archive")
    assert "cifar-10-python.tar.gz" in error_message("cifar10")


def test_a_download_folder_that_cannot_be_created(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VITRAL_DATA", str(tmp_path / "file/sets"))
    assert "cifar10: expected it in" in error_message("cifar10")
