"""Choosing a decoder, and what its measurement reads; the tests of `bench data` cover the rates."""

import dataclasses

import numpy as np
import pytest
import torch

from vitral.config import AugmentConfig, Config, DataConfig, TrainConfig, ViTConfig
from vitral.data.formats import open_dataset
from vitral.data.records import Pixels
from vitral.data.tools import rates
from vitral.data.tools.rates import choose_decoder, decoders, endless_batches, measure_rates
from vitral.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PIXELS = Pixels(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), np.arange(2))


@pytest.fixture
def folder(image_folder):
    """Settings and training records."""
    config = Config(
        model=ViTConfig(image_size=16, patch_size=8),
        data=DataConfig(path=str(image_folder)),
        augment=AugmentConfig(crop="none", flip=0.0),
        train=TrainConfig(batch_size=8),
    )
    return config, open_dataset(config.data, 16, 0).train


@pytest.fixture
def measured(monkeypatch):
    """Two decoders with fixed rates; returns a list of the decoders and parts that are measured."""
    found = []

    def rate(records, config, workers, device, decoder, seconds, part):
        found.append((decoder, part))
        return {"cpu": 300.0, "gpu": 500.0}[decoder]

    monkeypatch.setattr(rates, "decoders", lambda records, device: ("cpu", "gpu"))
    monkeypatch.setattr(rates, "measure_rate", rate)
    return found


def test_the_faster_of_two_decoders_is_chosen(folder, measured):
    config, records = folder
    assert choose_decoder(records, config, 2, GPU) == ("gpu", {"cpu": 300.0, "gpu": 500.0})
    assert measured == [("cpu", 0), ("gpu", 1)]  # the second reads no files that the first cached


def test_a_requested_decoder_is_not_measured(folder, measured):
    config, records = folder
    for decoder in ("cpu", "gpu"):
        data = dataclasses.replace(config.data, decode=decoder)
        given = dataclasses.replace(config, data=data)
        assert choose_decoder(records, given, 2, GPU) == (decoder, {})
    assert measured == []


def test_a_reproducible_run_does_not_depend_on_a_measurement(folder, measured):
    config, records = folder
    config = dataclasses.replace(config, train=TrainConfig(batch_size=8, reproducible=True))
    assert choose_decoder(records, config, 2, GPU) == ("cpu", {})
    assert measured == []


def test_a_gpu_decodes_if_torchcodec_can(folder, monkeypatch):
    config, records = folder

    def without(contents, mode, device):
        raise RuntimeError("nvJPEG is not available")

    monkeypatch.setattr(rates, "decode_jpeg", without)
    assert decoders(records, GPU) == ("cpu",)
    asked = dataclasses.replace(config, data=dataclasses.replace(config.data, decode="gpu"))
    with pytest.raises(
        UserError, match=r"got a torchcodec without nvJPEG; pass --data\.decode cpu"
    ):
        choose_decoder(records, asked, 0, GPU)
    monkeypatch.setattr(rates, "decode_jpeg", lambda contents, mode, device: [])
    assert decoders(records, GPU) == ("cpu", "gpu")
    assert decoders(records, CPU) == ("cpu",)
    assert decoders(PIXELS, GPU) == ("cpu",)


def test_each_decoder_is_measured(folder):
    config, records = folder
    found = measure_rates(records, config, 0, CPU, seconds=0.01)
    assert list(found) == ["cpu"]
    assert found["cpu"] > 0


def test_parts_have_different_images(folder):
    config, records = folder
    first, again, other = (
        next(endless_batches(records, config, 2, 8, 0, CPU, "cpu", part)) for part in (0, 0, 1)
    )
    assert first.images.shape == (8, 3, 16, 16)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
