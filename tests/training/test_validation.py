"""Validation during training: every image is scored once, unless a signal arrives."""

import dataclasses
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitral import settings
from vitral.data.augment import finish
from vitral.data.formats import open_dataset
from vitral.errors import UserError
from vitral.evaluation import merge
from vitral.training import Interrupted, validation
from vitral.training.distributed import World
from vitral.training.parallel import AveragedGradients
from vitral.training.resolved import Resolved, build_model
from vitral.training.signals import Signals
from vitral.training.validation import Validation

QUIET = SimpleNamespace(until_signal=lambda items: items)
TINY = "--model.dim 16 --model.depth 1 --model.dropout 0.5".split()
RESOLVED = Resolved("cpu", "fp32", False, 1, 2, 1, "cpu", False)


class PartialWorld(World):
    """One of several processes, which gathers only its own scores."""

    def gather(self, value):
        return [value]


def validated(data, *words, world=None, resolved=RESOLVED):
    """Returns a validation of a model with a random head."""
    config = settings.load("digits", [*TINY, *words, "--data", str(data)])
    dataset = open_dataset(config.data, config.model.image_size, 0)
    model = build_model(config, len(dataset.classes))
    torch.manual_seed(1)
    torch.nn.init.normal_(model.head.weight)
    accumulator, device = (
        AveragedGradients(model, config.train, resolved, World()),
        torch.device("cpu"),
    )
    return Validation(
        config, dataset, model, accumulator.forward, resolved, world or World(), 0, device
    )


@pytest.mark.parametrize(("batch", "fused"), [(7, False), (360, True), (512, False)])
def test_scores_by_hand(monkeypatch, batch, fused):
    """Dropout is off, and the last batch may be smaller."""
    monkeypatch.setattr(validation, "EVAL_BATCH", batch)
    work = validated("digits", resolved=dataclasses.replace(RESOLVED, fused=fused))
    found = work.measure(QUIET)
    images, labels = work.records.images, torch.from_numpy(np.asarray(work.records.labels))
    with torch.no_grad():
        logits = work.model(finish(images, None, (0.5,) * 3, (0.5,) * 3))
    assert len(found.labels) == len(labels) == 360
    assert found.labels.tolist() == labels.tolist()
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    for k, accuracy in ((1, found.top1), (5, found.top5)):
        assert accuracy == pytest.approx((ranks < k).double().mean().item())
    assert 0.02 < found.top1 < 0.4


def test_validation_uses_the_resolved_precision():
    precise = validated("digits").measure(QUIET).losses
    resolved = Resolved("cpu", "bf16", False, 1, 2, 1, "cpu", False)
    rounded = validated("digits", resolved=resolved).measure(QUIET).losses
    assert 1e-4 < np.abs(precise - rounded).max() < 0.2


def test_temperature_of_the_validation_logits():
    work = validated("digits")
    found = work.measure(QUIET)
    with torch.no_grad():
        logits = work.model(finish(work.records.images, None, (0.5,) * 3, (0.5,) * 3))

    def loss(temperature):
        return F.cross_entropy(logits / temperature, torch.from_numpy(found.labels)).item()

    T = found.temperature
    assert loss(T) < min(loss(0.99 * T), loss(1.01 * T))
    np.testing.assert_allclose(found.calibrated, (logits / T).softmax(1).amax(1), rtol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_processes_share_the_images(monkeypatch, image_folder, size):
    """Their parts are contiguous, can be empty, and add up to all images."""
    monkeypatch.setattr(validation, "EVAL_BATCH", 4)  # three batches
    expected = validated(image_folder).measure(QUIET)
    parts = [
        validated(image_folder, world=PartialWorld(k, size)).measure(QUIET) for k in range(size)
    ]
    assert sum(len(part.labels) for part in parts) == len(expected.labels) == 12
    joined = merge(parts)
    for name in ("labels", "ranked", "losses", "confidence"):
        assert np.array_equal(getattr(joined, name), getattr(expected, name))


def test_a_signal_stops_a_single_process(image_folder, monkeypatch):
    monkeypatch.setattr(validation, "EVAL_BATCH", 4)
    signals = Signals(World())
    signals.received = signal.SIGTERM
    for work in (validated(image_folder).measure, validated(image_folder).check_images):
        with pytest.raises(Interrupted) as error:
            work(signals)
        assert error.value.exit_code == 143
    one = validated(image_folder, world=PartialWorld(0, 2))
    signals.world = one.world
    assert len(one.measure(signals).labels) == 4  # other processes would wait for it


def test_images_that_need_decoding_are_checked(image_folder, tmp_path):
    assert not validated("digits").needs_decoding
    work = validated(image_folder)
    assert work.needs_decoding
    work.check_images(QUIET)
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(image_folder / split)
    (tmp_path / "val").unlink()
    for path in (image_folder / "val").glob("*/*"):
        copy = tmp_path / "val" / path.relative_to(image_folder / "val")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes()[:-200] if path.name == "05.jpg" else path.read_bytes())
    bad = validated(tmp_path)
    with pytest.raises(UserError, match=rf"data: {tmp_path}/val/dark/05.jpg: "):
        bad.check_images(QUIET)
