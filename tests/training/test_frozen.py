"""Frozen parameters, and the features of a frozen backbone."""

import dataclasses
import shutil

import pytest
import torch

from vitral.config import Config, DataConfig, TrainConfig, ViTConfig
from vitral.data.formats import open_dataset
from vitral.data.loader import eval_batches, train_batches
from vitral.errors import UserError
from vitral.model import ViT
from vitral.training import frozen
from vitral.training.frozen import FeaturePass, Features, freeze, read_features, train_mode
from vitral.training.resolved import resolve

from .processes import damage

MODEL = ViTConfig(
    dim=16, depth=4, num_heads=2, num_kv_heads=1, patch_size=4, image_size=16, dropout=0.5,
    stochastic_depth=0.5,
)  # fmt: skip


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(frozen, "PART", 16)


@pytest.fixture(scope="module")
def config(image_folder):
    data = DataConfig(path=str(image_folder))
    return Config(model=MODEL, data=data, train=TrainConfig(batch_size=8, micro_batch=6))


@pytest.fixture(scope="module")
def dataset(config):
    return open_dataset(config.data, config.model.image_size, 0)


def make_model(seed=0):
    torch.manual_seed(seed)
    return ViT(MODEL, 2)


def make_pass(config, dataset, directory, model=None, **changes):
    model = model or make_model()
    resolved = dataclasses.replace(resolve(config, model, model.device), **changes)
    return FeaturePass(model, config, resolved, 0, dataset.fingerprint, directory)


def compute(found, dataset, views=1, shard=(0, 1), check=lambda _: None):
    return found(dataset.train, "train", views, shard, check)


def joined(parts):
    return Features.concatenate(parts[key] for key in sorted(parts))


@pytest.mark.parametrize(
    ("trainable", "blocks", "norm"),
    [("all", 4, True), ("head", 0, False), (1, 1, True), (4, 4, True)],
)
def test_which_parameters_are_trained(trainable, blocks, norm):
    model = make_model()
    freeze(model, trainable)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    found = {int(name.split(".")[1]) for name in trained if name.startswith("blocks.")}
    assert found == {*range(4 - blocks, 4)}
    assert ("norm.scale" in trained) == norm
    assert {"head.weight", "head.bias"} <= trained
    assert ("cls" in trained) == (trainable == "all")


def test_frozen_blocks_have_no_dropout():
    model, images = make_model(), torch.randn(2, 3, 16, 16)
    freeze(model, "head")
    train_mode(model, "head")
    torch.testing.assert_close(model(images), model.eval()(images), rtol=0, atol=0)
    train_mode(model, 1)
    assert [block.training for block in model.blocks] == [False, False, False, True]


def test_features_are_the_input_of_the_head(config, dataset, tmp_path, small_parts):
    model = make_model().eval()
    found = joined(compute(make_pass(config, dataset, tmp_path, model), dataset))
    batches = eval_batches(dataset.train, config, 40, 0, torch.device("cpu"))
    with torch.no_grad():
        (expected,) = [model.pool(model.forward_features(batch.images)) for batch in batches]
    torch.testing.assert_close(found.vectors, expected, rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == dataset.train.labels.tolist()
    assert found.images.tolist() == [*range(40)]
    again = read_features(tmp_path)
    assert torch.equal(again.vectors, found.vectors)


def test_later_views_are_augmented_as_in_training(config, dataset, tmp_path):
    """View 1 equals the images of the second epoch of training."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=40))
    model = make_model().eval()
    parts = compute(make_pass(config, dataset, tmp_path, model), dataset, views=2)
    (batch,) = train_batches(
        dataset.train, config, 2, steps=range(1, 2), total_steps=2, micro_batch=40, workers=0,
        device=torch.device("cpu"),
    )  # fmt: skip
    with torch.no_grad():
        expected = model.pool(model.forward_features(batch.images))
    view = parts[frozen.PartKey(1, 0)].vectors
    distances = torch.cdist(expected.double(), view.double()).min(1)
    assert distances.values.max() < 1e-3
    assert sorted(distances.indices.tolist()) == [*range(40)]  # in the order of the epoch


def test_an_interrupted_pass_continues_with_the_missing_part(
    config, dataset, tmp_path, small_parts
):
    expected = joined(compute(make_pass(config, dataset, tmp_path / "whole"), dataset))
    computed = []

    def stop(count):
        computed.append(count)
        if len(computed) == 5:  # in the second of three parts: 6 + 6 + 4, 6 + 6
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute(make_pass(config, dataset, tmp_path / "cut"), dataset, check=stop)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["train-view0-0000000"]
    computed.clear()
    found = compute(make_pass(config, dataset, tmp_path / "cut"), dataset, check=computed.append)
    assert sum(computed) == 40 - 16
    assert torch.equal(joined(found).vectors, expected.vectors)


@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing"])
def test_a_damaged_part_is_computed_again(config, dataset, tmp_path, small_parts, kind):
    expected = joined(compute(make_pass(config, dataset, tmp_path), dataset))
    damage(tmp_path / "train-view0-0000016" / "features.safetensors", kind)
    computed = []
    found = compute(make_pass(config, dataset, tmp_path), dataset, check=computed.append)
    assert sum(computed) == 16
    assert torch.equal(joined(found).vectors, expected.vectors)


def test_features_of_another_model_or_size_are_rejected(config, dataset, tmp_path):
    compute(make_pass(config, dataset, tmp_path), dataset)
    with pytest.raises(UserError, match="with different weights, images or settings; remove"):
        compute(make_pass(config, dataset, tmp_path, make_model(1)), dataset)
    larger = dataclasses.replace(config, model=dataclasses.replace(MODEL, image_size=20))
    with pytest.raises(UserError, match="with different weights, images or settings; remove"):
        compute(make_pass(larger, dataset, tmp_path), dataset)


def test_features_of_other_hardware_are_computed_again(config, dataset, tmp_path):
    compute(make_pass(config, dataset, tmp_path), dataset)
    for expected in (40, 0):
        computed = []
        other = make_pass(config, dataset, tmp_path, threads=99)
        compute(other, dataset, check=computed.append)
        assert sum(computed) == expected


def test_two_processes_share_the_parts(config, dataset, tmp_path, small_parts):
    expected = joined(compute(make_pass(config, dataset, tmp_path / "one"), dataset, views=2))
    halves = [
        compute(make_pass(config, dataset, tmp_path / "two"), dataset, views=2, shard=(rank, 2))
        for rank in range(2)
    ]
    assert not halves[0].keys() & halves[1].keys()
    assert torch.equal(joined(halves[0] | halves[1]).vectors, expected.vectors)


def test_a_broken_image_has_no_vector(config, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "data")
    (tmp_path / "data" / "train" / "dark" / "03.jpg").write_bytes(b"no image")
    config = dataclasses.replace(config, data=DataConfig(path=str(tmp_path / "data")))
    dataset = open_dataset(config.data, 16, 0)
    found = joined(compute(make_pass(config, dataset, tmp_path / "features"), dataset))
    assert found.images.tolist() == [i for i in range(40) if i != 3]
    assert [*found.broken] == [3]
    assert read_features(tmp_path / "features").broken == found.broken
