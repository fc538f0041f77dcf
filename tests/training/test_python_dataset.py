"""Training on Python datasets is bit-identical to training on a folder of the same images."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

import vitral
from vitral import settings
from vitral.cli import main
from vitral.errors import UserError
from vitral.training import train

from .processes import digests, fork, make_config, wait_for

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(image_folder, tmp_path_factory):
    """The images of `image_folder` as PNGs, which Pillow and torchcodec decode identically."""
    root = tmp_path_factory.mktemp("png")
    for path in image_folder.rglob("*.jpg"):
        place = root / path.relative_to(image_folder).with_suffix(".png")
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(place)
    return root


def splits(folder):
    """Returns datasets that cannot be pickled, due to a lambda, as in a notebook."""
    names = {"dataset": "train", "val_dataset": "val"}
    return {n: ImageFolder(folder / s, transform=lambda image: image) for n, s in names.items()}


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    """A run on the folder."""
    return train(make_config(folder, tmp_path_factory.mktemp("expected") / "run"))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run on the datasets."""
    out = tmp_path_factory.mktemp("python") / "run"
    return train(make_config("digits", out, data__workers=2), **splits(folder))


def test_training_on_datasets_equals_the_folder(run, expected):
    assert digests(run) == digests(expected)
    assert settings.load(str(run / "config.yaml")).data.path == "python:dataset"
    assert (run / "report.html").is_file()


def test_a_killed_run_resumes_exactly(folder, expected, tmp_path):
    config = make_config("digits", tmp_path / "run", data__workers=2)
    child = fork(lambda: train(config, **splits(folder)) and 0)
    wait_for([child], tmp_path / "run", 10)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    config = make_config("digits", tmp_path / "run", data__workers=0)
    assert digests(train(config, **splits(folder))) == digests(expected)


def test_other_images_and_the_command_cannot_resume_a_run(run, folder, capsys):
    config = make_config("digits", run)
    other = splits(folder)
    other["dataset"].transform = lambda image: Image.eval(image, lambda level: level ^ 1)
    with pytest.raises(UserError, match="python:dataset is not the dataset that the run in"):
        train(config, **other)
    assert main(["train", str(run / "config.yaml"), "--out", str(run)]) == 2
    assert "call vitral.train(..., dataset=...) in Python to resume its run" in (
        capsys.readouterr().err
    )


def test_evaluating_equals_the_folder(run, folder):
    val = splits(folder)["val_dataset"]
    scores = vitral.evaluate(run, val, device="cpu")
    assert scores.top1 == vitral.evaluate(run, str(folder), device="cpu").top1
    assert scores.loss == vitral.evaluate(run, str(folder), device="cpu").loss
    val.classes = ["dark", "bright"]
    with pytest.raises(UserError, match="got bright, which the weights do not have"):
        vitral.evaluate(run, val, device="cpu")


class Flaky:
    """Ten random images. The label of item 3 changes when it is read for the third time."""

    classes = ("a", "b")

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return 10

    def __getitem__(self, i):
        self.reads += i == 3
        level = np.random.default_rng(i).integers(256, size=(8, 8), dtype=np.uint8)
        return level, (i + (i == 3 and self.reads > 2)) % 2


def test_a_fraction_is_held_out_and_a_changing_label_is_an_error(tmp_path):
    config = make_config("digits", tmp_path / "run", data__workers=0, data__val_fraction=0.2)
    with pytest.raises(UserError, match=r"1 of 8 training images is broken.*item 3 \(the first"):
        train(config, dataset=Flaky())
    log = (tmp_path / "run/train.log").read_text()
    assert "2 of 10 training images (20% of each class) are held out" in log
    assert "item 3: label changed from 1 to 0" in log


def test_dataset_options_need_a_dataset(tmp_path):
    with pytest.raises(UserError, match="dataset: expected one with val_dataset"):
        train("digits", "--out", str(tmp_path / "run"), classes=["a", "b"])
    assert not Path(tmp_path / "run").exists()


def test_a_subset_trains(folder, tmp_path):
    full = splits(folder)
    every = {name: Subset(each, range(0, len(each), 2)) for name, each in full.items()}
    config = make_config("digits", tmp_path / "run", train__epochs=2)
    run = train(config, **every, fingerprint="every second")
    assert "20 training images, 6 validation images, 2 classes" in (run / "train.log").read_text()
