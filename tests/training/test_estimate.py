"""Estimates of training time from one block: the timed parts add up to the full model."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitral import settings, weights
from vitral.bench.train import plan
from vitral.config import Config, TrainConfig, ViTConfig
from vitral.data.formats import open_dataset
from vitral.errors import UserError
from vitral.model import ViT, count_flops
from vitral.rundir import RunDir
from vitral.training import estimate
from vitral.training.distributed import World
from vitral.training.plan import Plan
from vitral.training.run import prepare
from vitral.training.work import Training

SHAPES = [
    ViTConfig(size="ti", patch_size=32, kernels="plain"),
    ViTConfig(dim=48, depth=3, num_heads=4, num_kv_heads=2, patch_size=16, kernels="plain"),
    ViTConfig(
        dim=32, depth=2, num_heads=2, num_kv_heads=1, mlp_ratio=2.5, patch_size=4, image_size=16,
        num_registers=3, cls_token=False, pooling="mean", positions="learned", rope="mixed",
        qk_norm=True, layer_scale=1e-4, qkv_bias=False, activation="swiglu", kernels="plain",
    ),
]  # fmt: skip


PLAIN = ["--model.kernels", "plain", "--train.threads", "1"]


def flops_of(work, *_):
    """Replaces the clock: returns the FLOPs of the work, with kernels that the counter supports."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(estimate, "MIN_TIME", 0.0)
    monkeypatch.setattr(estimate, "NUM_TRIALS", 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_meta_model_equals_the_model(shape):
    built = ViT(shape, 7)
    meta_model = estimate.meta_model(Config(model=shape), 7)
    assert meta_model.num_parameters == sum(p.numel() for p in built.parameters())
    assert all(p.is_meta for p in meta_model.parameters())
    images = torch.zeros(1, 3, shape.image_size, shape.image_size)
    assert count_flops(shape, 7) == flops_of(lambda: built.eval()(images))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_timed_parts_add_up_to_a_step(shape, monkeypatch):
    monkeypatch.setattr(estimate, "_seconds", flops_of)
    config = Config(model=shape, train=TrainConfig(batch_size=4, device="cpu"))
    found = estimate.estimate(config, 7).per_image
    assert found > count_flops(shape, 7)
    training = Training(config, 7, shape.image_size)
    assert found == pytest.approx(flops_of(lambda: training.step(training.batch)) / 4, rel=1e-6)


def test_skipped_work_and_smaller_images_take_less(monkeypatch):
    monkeypatch.setattr(estimate, "_seconds", flops_of)
    shape = {"size": "ti", "patch_size": 32, "kernels": "plain"}
    train = {"batch_size": 4, "device": "cpu"}
    full = Config(model=ViTConfig(**shape), train=TrainConfig(**train))
    deep = Config(model=ViTConfig(**shape, stochastic_depth=0.5), train=TrainConfig(**train))
    sizes = ((64, 0.5), (224, 0.5))
    grown = Config(model=ViTConfig(**shape), train=TrainConfig(**train, progressive=sizes))
    expected = count_flops(deep.model, 7, training=True) / count_flops(full.model, 7)
    per_image = [estimate.estimate(config, 7).per_image for config in (full, deep, grown)]
    # All layers take three times a forward pass, except the embedding: images need no gradient.
    assert per_image[1] / per_image[0] == pytest.approx(expected, rel=0.02)
    small = count_flops(full.model, 7, 64) / count_flops(full.model, 7)
    assert per_image[2] / per_image[0] == pytest.approx((small + 1) / 2)


@pytest.mark.parametrize(
    ("per_image", "counts", "seconds"), [(0.001, [2, 4, 8], 0.018 / 8), (0.2, [2], 0.41 / 2)]
)
def test_warmup_time_is_excluded(monkeypatch, per_image, counts, seconds):
    """Each pass advances the clock by 0.01 s plus a time per image; the first one by more."""
    now, seen = 0.0, []

    def run(count):
        nonlocal now
        now += 0.01 + per_image * count + (0 if seen else 5)
        seen.append(count)

    monkeypatch.setattr(estimate, "MIN_TIME", 0.3)
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: now))
    found = estimate._seconds_per_image(run, 8, torch.device("cpu"))
    assert found == pytest.approx(seconds)
    assert seen == [count for count in counts for _ in range(2)]


def test_an_estimate_preserves_random_state_and_threads():
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    config = settings.load("digits", ["--train.threads", str(threads + 1)])
    assert min(estimate.estimate(config, 10)) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_long_run_from_scratch_is_compared_with_a_public_model(monkeypatch, saved):
    """With a clock of one second per GFLOP, three passes of 100,608 images take 1,947 s."""
    monkeypatch.setattr(estimate, "MIN_FLOP_RATE", 1.0)
    monkeypatch.setattr(estimate, "_seconds", lambda work, _: flops_of(work) / 1e9)

    def compare(*options):
        config = settings.load("digits", [*options, "--train.device", "cpu", *PLAIN])
        dataset = open_dataset(config.data, config.model.image_size, 0)
        steps = Plan.of(config, len(dataset.train)).total
        return estimate.compare_with_frozen(config, dataset, steps)

    name = "timm:vit_small_patch14_reg4_dinov2.lvd142m"
    frozen = count_flops(replace(estimate.PUBLIC_SHAPE, image_size=14), 0) * 1797 / 1e9
    assert round(frozen / 60) == 8
    found = compare()
    assert found == (f"from scratch: about 32 min on this machine; with --init {name}: about 8 min")
    assert compare("--epochs", "350").startswith("from scratch: about 3 h on this machine; ")
    assert compare("--epochs", "10") == compare("--init", str(saved)) == ""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Weights for the recipes that start from weights."""
    place = tmp_path_factory.mktemp("weights") / "tiny"
    config = Config(model=ViTConfig(dim=16, depth=1, num_heads=1, num_kv_heads=1, image_size=64))
    description = weights.describe(config, tuple("abc"), "", {})
    weights.save(place, {"model": ViT(config.model, 3).state_dict()}, description)
    return place


@pytest.mark.parametrize("name", settings.recipes())
def test_each_recipe_is_planned_without_its_model(name, saved, tmp_path):
    options = ["--data", "digits", "--train.device", "cpu", "--out", str(tmp_path / "out")]
    if settings.load(name).train.init:
        options += ["--init", str(saved)]
    request = weights.request(name, options)
    _, _, _, model = prepare(request.config, RunDir(tmp_path / "out"), World(), device="meta")
    assert all(p.is_meta for p in model.parameters())
    assert f"parameters  {model.num_parameters:,}\n" in plan(request)
    assert not (tmp_path / "out").exists()


def test_initial_weights_are_compared_by_shape(saved):
    """Damaged values are found only when they are read."""
    file = saved / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"\xff\xff\xff\x7f")
    try:
        model = weights.load(saved, device="meta").model
        assert all(p.is_meta for p in model.parameters())
        with pytest.raises(UserError, match="its content differs from what was written"):
            weights.load(saved)
        assert weights.initialize(model, saved) == []
        other = estimate.meta_model(Config(model=model.config), 5)
        assert weights.initialize(other, saved) == ["head.bias", "head.weight"]
        file.write_bytes(b"\xff" * len(content))
        with pytest.raises(UserError, match="not a safetensors file"):
            weights.load(saved, device="meta")
    finally:
        file.write_bytes(content)
