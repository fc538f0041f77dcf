import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms.v2 import functional as reference

from vitral.config import AugmentConfig, Config, DataConfig, TrainConfig, ViTConfig
from vitral.data import loader
from vitral.data.decode import decode
from vitral.data.formats import open_dataset
from vitral.data.loader import NO_AUGMENTATION, eval_batches, train_batches

EVERYTHING = AugmentConfig(
    policy="trivialaugment", brightness=0.4, erasing=0.5, mixup=0.8, cutmix=1.0, rotation=5.0
)
CPU = torch.device("cpu")


def make_config(path, augment=EVERYTHING, batch_size=24, **train):
    return Config(
        model=ViTConfig(image_size=16, patch_size=4),
        data=DataConfig(path=str(path)),
        augment=augment,
        train=TrainConfig(batch_size=batch_size, label_smoothing=0.1, **train),
    )


def batches(config, *, steps=range(4), micro_batch=24, workers=0, shard=(0, 1)):
    dataset = open_dataset(config.data, config.model.image_size, config.train.seed)
    found = train_batches(
        dataset.train,
        config,
        len(dataset.classes),
        steps=steps,
        total_steps=8,
        micro_batch=micro_batch,
        workers=workers,
        device=CPU,
        shard=shard,
    )
    return list(found)


@pytest.mark.parametrize("path", ["folder", "digits"])
@pytest.mark.parametrize(("micro_batch", "workers"), [(10, 0), (8, 2), (2, 1)])
def test_micro_batches_and_workers_do_not_change_results(image_folder, path, micro_batch, workers):
    config = make_config(image_folder if path == "folder" else path)
    full, cut = batches(config), batches(config, micro_batch=micro_batch, workers=workers)
    assert len(full) == 4
    assert [b.step for b in cut] == sorted(b.step for b in cut)
    for name in ("images", "targets"):
        parts = [torch.cat([getattr(b, name) for b in found]) for found in (full, cut)]
        assert torch.equal(*parts)


class OnMeta(TorchDispatchMode):
    """Records the operations whose result is on the meta device."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.is_meta for x in tree_leaves(result)):
            self.seen.add(func)
        return result


@pytest.mark.parametrize("path", ["folder", "digits"])
def test_an_accelerator_other_than_cuda_gets_finished_batches(image_folder, path, monkeypatch):
    """The meta device stands in for one."""
    monkeypatch.setattr(loader, "input_device", lambda device: CPU)
    config = make_config(image_folder if path == "folder" else path)
    dataset = open_dataset(config.data, 16, 0)
    meta, count = torch.device("meta"), len(dataset.classes)
    options = {"steps": range(2), "total_steps": 8, "micro_batch": 24, "workers": 0}
    with OnMeta() as mode:
        found = [*train_batches(dataset.train, config, count, device=meta, **options)]
        found += eval_batches(dataset.val, config, 8, 0, meta)
    assert len(found) > 2
    assert all(batch.images.is_meta and batch.targets.is_meta for batch in found)
    assert mode.seen == {torch.ops.aten._to_copy.default}


def test_any_step_can_be_the_first(image_folder):
    config = make_config(image_folder)
    for a, b in zip(batches(config)[2:], batches(config, steps=range(2, 4)), strict=True):
        assert a.step == b.step
        assert torch.equal(a.images, b.images)


def test_epochs_differ_and_seeds_differ(image_folder):
    config = make_config(image_folder, batch_size=40)
    first, second = batches(config, steps=range(2), micro_batch=40)
    other = batches(
        make_config(image_folder, batch_size=40, seed=1), steps=range(1), micro_batch=40
    )
    assert not torch.equal(first.images, second.images)
    assert not torch.equal(first.images, other[0].images)


def test_targets_are_smoothed_labels_that_sum_to_one(image_folder):
    plain = make_config(image_folder, NO_AUGMENTATION, batch_size=40)
    (batch,) = batches(plain, steps=range(1), micro_batch=40)
    assert torch.equal(batch.targets.unique(), torch.tensor([0.05, 0.95]))
    assert batch.targets.sum(0).tolist() == pytest.approx([20, 20])
    mixed = batches(make_config(image_folder))
    assert all(torch.allclose(b.targets.sum(1), torch.ones(24)) for b in mixed)


def test_mixing_stops_at_mix_until(image_folder):
    config = make_config(image_folder, dataclasses.replace(EVERYTHING, mix_until=0.5))
    pure = [len(b.targets.unique()) == 2 for b in batches(config, steps=range(8))]
    assert pure[4:] == [True] * 4
    assert not all(pure[:4])


@pytest.mark.parametrize("path", ["folder", "digits"])
def test_evaluation_sees_every_image_once_in_order(image_folder, path):
    config = make_config(image_folder if path == "folder" else path)
    val = open_dataset(config.data, 16, 0).val
    found = list(eval_batches(val, config, 5, 1, CPU))
    assert {b.images.shape for b in found} == {(5, 3, 16, 16)}
    labels = np.concatenate([b.targets.numpy() for b in found])
    assert labels.tolist() == val.labels.tolist()


def test_evaluation_is_a_central_crop_resized_and_normalized(image_folder):
    config = make_config(image_folder)
    val = open_dataset(config.data, 16, 0).val
    (batch,) = eval_batches(val, config, len(val), 0, CPU)
    image = decode(val.read(3))  # 20 rows of 24 pixels: the central 18 by 18
    crop = reference.resize(image[:, 1:19, 3:21], [16, 16], antialias=True)
    mean, std = list(config.data.mean), list(config.data.std)
    expected = reference.normalize(reference.to_dtype(crop, scale=True), mean, std)
    assert (batch.images[3] - expected).abs().max() < 1.01 / 255 / min(std)


def test_image_sizes_follow_the_progressive_schedule(image_folder):
    config = make_config(image_folder, progressive=((8, 0.5), (16, 0.5)))
    found = batches(config, steps=range(8), micro_batch=12, workers=2)
    sides = [b.images.shape[2:] for b in found]
    assert sides == [(8, 8)] * 8 + [(16, 16)] * 8
    plain = batches(make_config(image_folder), steps=range(4, 8))
    later = torch.cat([b.images for b in found[8:]])
    assert torch.equal(later, torch.cat([b.images for b in plain]))


@pytest.mark.parametrize("path", ["folder", "digits"])
@pytest.mark.parametrize("processes", [2, 3])
def test_shards_of_processes_make_up_the_global_batches(image_folder, path, processes):
    config = make_config(image_folder if path == "folder" else path)
    full = batches(config)
    shards = [batches(config, shard=(k, processes), micro_batch=4) for k in range(processes)]
    parts = sorted((b for shard in shards for b in shard), key=lambda b: (b.step, b.first))
    assert torch.equal(torch.cat([b.images for b in full]), torch.cat([b.images for b in parts]))
    assert torch.equal(torch.cat([b.targets for b in full]), torch.cat([b.targets for b in parts]))


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_sharded_evaluation_equals_evaluation(image_folder, processes):
    config = make_config(image_folder)
    val = open_dataset(config.data, 16, 0).val
    full = list(eval_batches(val, config, 5, 0, CPU))
    shards = [eval_batches(val, config, 5, 0, CPU, (k, processes)) for k in range(processes)]
    parts = [batch for shard in shards for batch in shard]
    assert [b.step for b in parts] == [b.step for b in full]
    for a, b in zip(full, parts, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets, b.targets)


class SynchronousCopies(TorchDispatchMode):
    """Records copies between devices that wait for pending work on a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
        crosses = len({x.device for x in tensors if x.ndim}) > 1
        if crosses and not (kwargs.get("non_blocking") or args[2:] == (True,)):
            self.found.append((str(function), *(tuple(x.shape) for x in tensors)))
        return result


@pytest.mark.parametrize("path", ["folder", "digits"])
def test_no_batch_synchronizes_with_the_device(image_folder, path):
    config, meta = make_config(image_folder if path == "folder" else path), torch.device("meta")
    dataset = open_dataset(config.data, 16, 0)
    options = {"steps": range(4), "total_steps": 4, "micro_batch": 24, "workers": 0}
    training = train_batches(dataset.train, config, len(dataset.classes), device=meta, **options)
    for found in (training, eval_batches(dataset.val, config, 5, 0, meta)):
        next(found)  # the first batch copies a pixel dataset to the device
        with SynchronousCopies() as waits:
            assert {batch.images.device for batch in found} == {meta}
        assert waits.found == []
