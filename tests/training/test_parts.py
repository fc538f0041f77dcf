"""An experiment's model and optimizer in vitral's own loop."""

import json
import os
import signal

import pytest
import torch
from torch import nn

from vitral import settings, storage
from vitral.data.augment import finish
from vitral.data.formats import open_dataset
from vitral.errors import UserError
from vitral.rundir import read_run
from vitral.training import Interrupted, Parts, checkpoint, train
from vitral.training.optim import Optimizer

WORDS = "--train.epochs 2 --train.batch-size 128 --train.micro-batch 64 --optim.warmup-epochs 0"
WORDS += " --train.threads 1 --train.ema-decay 0.9 --train.checkpoint-steps 100 --train.log-every 1"
STEPS = 23  # twice 1,437 images in batches of 128, the last filled from the next epoch


class Pixels(nn.Module):
    """Logistic regression on the pixels."""

    def __init__(self, config, num_classes):
        super().__init__()
        self.num_classes, self.blocks = num_classes, nn.ModuleList()
        self.norm = nn.Identity()
        self.head = nn.Linear(3 * config.image_size**2, num_classes)

    def forward(self, images):
        return self.head(images.flatten(1))


class Interrupting(Optimizer):
    """Sends this process a signal at its fifth step."""

    count = 0

    def step(self, lr, loss):
        Interrupting.count += 1
        if Interrupting.count == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(lr, loss)


def run(out, parts, *words):
    return train("digits", "--out", str(out), *WORDS.split(), *words, parts=parts)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """An uninterrupted run of another model."""
    return run(tmp_path_factory.mktemp("parts") / "run", Parts(name="pixels", model=Pixels))


def newest(path):
    return checkpoint.latest(path / "checkpoints", pytest.fail)


def test_another_model_learns(uninterrupted):
    """Its last score equals the one computed by hand with the weights in its checkpoint."""
    found, state = newest(uninterrupted), read_run(uninterrupted)
    assert found.step == STEPS
    weights = found.tensors["model"]
    assert {*weights} == {"head.weight", "head.bias"}
    config = state.config
    val = open_dataset(config.data, 8, 0).val
    images = finish(val.images, None, config.data.mean, config.data.std).flatten(1)
    guesses = (images @ weights["head.weight"].T + weights["head.bias"]).argmax(1)
    top1 = (guesses == torch.from_numpy(val.labels)).double().mean().item()
    assert state.validations[-1]["val_top1"] == pytest.approx(top1, abs=1e-9)
    assert top1 > 0.5


def test_flops_of_another_model_are_counted(uninterrupted):
    environment = json.loads((uninterrupted / "env.json").read_text())
    assert environment["flops_per_image"] == 2 * 3 * 64 * 10
    assert environment["parameters"] == 3 * 64 * 10 + 10
    assert environment["parts"] == "pixels"


def test_no_vit_weights_are_written(uninterrupted):
    assert not (uninterrupted / "weights").exists()
    page = (uninterrupted / "report.html").read_text(encoding="utf-8")
    assert "not vitral&#39;s: pixels" in page or "not vitral's: pixels" in page


def test_another_model_resumes_exactly(uninterrupted, tmp_path):
    parts = Parts(name="pixels", model=Pixels, optimizer=Interrupting)
    Interrupting.count = 0
    with pytest.raises(Interrupted):
        run(tmp_path / "run", parts)
    assert newest(tmp_path / "run").step == 5
    run(tmp_path / "run", parts)
    there, here = newest(uninterrupted), newest(tmp_path / "run")
    for kind, tensors in there.tensors.items():
        for name, value in tensors.items():
            assert torch.equal(value, here.tensors[kind][name]), (kind, name)
    with pytest.raises(UserError, match="uses pixels, not vitral's") as caught:
        run(tmp_path / "run", Parts())
    assert "--out" in str(caught.value)


def test_vitral_weights_are_written_with_another_optimizer(tmp_path):
    class Halved(Optimizer):
        def step(self, lr, loss):
            return super().step(lr / 2, loss)

    small = "--model.dim 16 --model.depth 1 --train.epochs 1".split()
    run(tmp_path / "half", Parts(name="halved", optimizer=Halved), *small)
    lr = settings.load("digits").optim.lr / 2
    run(tmp_path / "plain", Parts(), *small, "--optim.lr", str(lr))
    half, plain = (
        storage.read_tensors(tmp_path / name / "weights" / "last", "model")
        for name in ("half", "plain")
    )
    assert all(torch.equal(half[name], plain[name]) for name in plain)


def test_running_statistics_are_rejected(tmp_path):
    class Statistics(Pixels):
        def __init__(self, config, num_classes):
            super().__init__(config, num_classes)
            self.norm = nn.BatchNorm1d(3)

    with pytest.raises(ValueError, match=r"got norm\.num_batches_tracked"):
        run(tmp_path / "run", Parts(name="statistics", model=Statistics))
    assert not (tmp_path / "run").exists()


def test_custom_parts_need_a_name():
    with pytest.raises(ValueError, match="name"):
        Parts(model=Pixels)
    with pytest.raises(ValueError, match="name"):
        Parts(initialize=lambda model, path, classes: [])
