"""Weight directories: saving, finding, describing, loading, rejecting, initializing from them."""

import dataclasses
import json
import os
import shutil

import pytest
import torch

import vitral
from vitral import storage, weights
from vitral.config import Config, DataConfig, TrainConfig, ViTConfig
from vitral.errors import UserError
from vitral.model import ViT
from vitral.rundir import RunDir
from vitral.weights import initialize, read_description

CLASSES = ("cat", "dog", "owl")
SHAPE = ViTConfig(
    dim=16, depth=2, num_heads=2, num_kv_heads=1, patch_size=4, image_size=16, dropout=0.2
)
CONFIG = Config(
    model=SHAPE,
    data=DataConfig(mean=(0.1, 0.2, 0.3), std=(1, 2, 3)),
    train=TrainConfig(epochs=7, progressive=((8, 0.5), (16, 0.5))),
)
METRICS = {"step": 9, "val_top1": 0.5, "ema_top1": 0.75}


def state(seed=0):
    """Weights in which all values are random."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ViT(SHAPE, len(CLASSES)).state_dict()
    return {name: torch.randn(value.shape, generator=draw) for name, value in shapes.items()}


def save(directory, states=None, **changes):
    directory.parent.mkdir(parents=True, exist_ok=True)
    known = weights.describe(CONFIG, CLASSES, "f" * 64, METRICS)
    states = states or {"model": state(0), "ema": state(1)}
    weights.save(directory, states, dataclasses.replace(known, **changes))
    return directory


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path / "best")


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not found[name].equal(value)] == []


def garble(path):
    """Replaces the content of a file by zeros."""
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(("which", "seed"), [(None, 1), ("ema", 1), ("model", 0)])
def test_saved_weights_can_be_loaded(saved, which, seed):
    found = weights.load(saved, which=which)
    assert_equal(found.model.state_dict(), state(seed))
    assert found.path == saved
    assert not found.model.training
    assert not any(p.requires_grad or p.is_meta for p in found.model.parameters())
    assert found.model.config == found.description.config.model
    expected = weights.describe(CONFIG, CLASSES, "f" * 64, METRICS)
    assert found.description == dataclasses.replace(expected, default=which or "ema")
    assert vitral.load(saved, which=which).description == found.description


def test_a_loaded_model_gives_the_same_logits(saved):
    torch.manual_seed(0)
    model, images = ViT(SHAPE, len(CLASSES)).eval(), torch.randn(2, 3, 16, 24)
    model.load_state_dict(state(1))
    assert weights.load(saved).model(images).equal(model(images))


@pytest.mark.parametrize(
    ("metrics", "default"),
    [
        ({"val_top1": 0.5, "ema_top1": 0.6}, "ema"),
        ({"val_top1": 0.6, "ema_top1": 0.5}, "model"),
        ({"val_top1": 0.5, "ema_top1": 0.5}, "model"),
        ({"val_top1": 0.5}, "model"),
        ({}, "model"),
    ],
)
def test_the_better_weights_are_the_default(metrics, default):
    assert weights.describe(CONFIG, CLASSES, "", metrics).default == default


def test_a_description_is_self_contained(tmp_path, monkeypatch):
    """It contains the fields of the preset, which may change, and the absolute path of the data."""
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    config = Config(model=ViTConfig(size="ti"), data=DataConfig(path="photos"))
    found = weights.describe(config, CLASSES, "", {}).config
    assert (found.model.dim, found.model.depth) == (192, 12)
    assert (found.model.num_heads, found.model.num_kv_heads) == (3, 1)
    assert found.data.path == str(tmp_path / "photos")
    named = dataclasses.replace(config, data=DataConfig(path="cifar10"))
    assert weights.describe(named, CLASSES, "", {}).config.data.path == "cifar10"


def test_a_description_is_read_without_tensors(saved, monkeypatch):
    """Even if the tensors are damaged; loading them is an error."""
    expected = weights.load(saved).description
    for name in ("model", "ema"):
        garble(saved / f"{name}.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_tensors", pytest.fail)
        assert read_description(saved) == (saved, expected)
    for name in ("model", "ema"):
        with pytest.raises(UserError, match=rf"weights: {saved}/{name}\.safetensors: .*copy it"):
            weights.load(saved, which=name)


def test_only_the_requested_file_is_read(saved):
    garble(saved / "model.safetensors")
    assert_equal(weights.load(saved).model.state_dict(), state(1))
    with pytest.raises(UserError, match=r"model\.safetensors: "):
        weights.load(saved, which="model")


@pytest.mark.parametrize("action", [weights.load, read_description])
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", "deleted"),
        ("ema.safetensors", "shortened"),
        ("manifest.json", "deleted"),
        ("manifest.json", "garbled"),
        ("config.json", "shortened"),
        ("config.json", "garbled"),
        ("unknown.safetensors", "added"),
    ],
)
def test_missing_and_damaged_files_are_named(saved, action, name, damage):
    path = saved / name
    if damage == "deleted":
        path.unlink()
    elif damage == "shortened":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "added":
        path.touch()
    else:
        garble(path)
    with pytest.raises(UserError) as error:
        action(saved)
    assert str(error.value).startswith(f"weights: {path}: ")
    assert "copy it again, or repeat `vitral train`" in str(error.value)


def test_missing_ema_weights_are_rejected(tmp_path):
    bare = save(tmp_path / "bare", {"model": state()}, default="model")
    with pytest.raises(UserError, match=f"{bare} contains no ema weights, only model"):
        weights.load(bare, which="ema")


def test_a_run_directory_selects_its_best_or_else_its_last_weights(tmp_path):
    run = RunDir(tmp_path / "run")
    assert save(run.last) == weights.find(run.path) == weights.find(run.last)
    assert save(run.best) == weights.find(run.path)
    assert weights.find(str(run.last)) == run.last
    assert RunDir.of_weights(weights.find(run.path)).path == run.path


def test_a_file_means_the_directory_that_it_is_in(tmp_path):
    run = RunDir(tmp_path / "run")
    save(run.best)
    run.config.write_text("")
    (run.path / "photo.jpg").write_text("")
    assert weights.find(run.config) == run.best
    for path in run.best.iterdir():
        assert weights.find(path) == run.best
    for which in ("model", "ema"):
        file = run.best / f"{which}.safetensors"
        loaded, expected = weights.load(file), weights.load(run.best, which=which)
        assert loaded.description.default == which
        for name, tensor in expected.model.state_dict().items():
            assert loaded.model.state_dict()[name].equal(tensor)
    with pytest.raises(UserError, match=r"photo\.jpg: no weights found"):
        weights.find(run.path / "photo.jpg")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", "no such directory; expected a directory with config.json"),
        ("empty", "no weights found; expected"),
        ("some/one", "no such directory; .*; if it is on the Hugging Face Hub, use hf-hub:some/o"),
    ],
)
def test_paths_without_weights(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for action in (weights.find, weights.load, read_description):
        with pytest.raises(UserError, match=f"weights: {path}: {message}"):
            action(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 1}, "expected schema 2, got 1; install the version"),
        ({"default": "best"}, "default: expected one of model, ema, got 'best'; install vitral"),
        ({"classes": None}, "does not match this version of vitral"),
        ({"config": {"model": {"dimm": 3}}}, "does not match this version of vitral: .*dimm"),
        ({"color": "red"}, "does not match this version of vitral: .*color"),
    ],
)
def test_descriptions_of_other_versions_are_rejected(saved, change, message):
    document = {**json.loads((saved / "config.json").read_text()), **change}
    tensors = {name: storage.read_tensors(saved, name) for name in ("model", "ema")}
    storage.write(saved, tensors, {"config": document})
    with pytest.raises(UserError, match=f"weights: {saved}: .*{message}"):
        weights.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("cls"),
            r"cls: expected float32 \(16,\) according to config.json, got none",
        ),
        (
            lambda tensors: tensors.update(more=torch.ones(2)),
            r"more: expected none according to config.json, got float32 \(2,\)",
        ),
        (
            lambda tensors: tensors.update({"head.bias": torch.ones(4)}),
            r"head.bias: expected float32 \(3,\) according to config.json, got float32 \(4,\)",
        ),
        (
            lambda tensors: tensors.update({"head.bias": torch.ones(3).half()}),
            r"head.bias: expected float32 \(3,\) according to config.json, got float16 \(3,\)",
        ),
    ],
    ids=["missing", "unknown", "other shape", "other dtype"],
)
def test_tensors_of_another_model_are_rejected(tmp_path, change, message):
    tensors = state()
    change(tensors)
    found = save(tmp_path / "odd", {"model": tensors}, default="model")
    with pytest.raises(UserError, match=rf"model\.safetensors: {message}; .*different models"):
        weights.load(found)


def test_saving_again_replaces_all_files(saved):
    save(saved, {"model": state(5)}, default="model")
    assert_equal(weights.load(saved).model.state_dict(), state(5))
    assert {path.name for path in saved.iterdir()} == {
        "config.json",
        "manifest.json",
        "model.safetensors",
    }


def model_of(classes=3, **changes):
    torch.manual_seed(3)
    return ViT(dataclasses.replace(SHAPE, **changes), classes)


@pytest.mark.parametrize("changes", [{}, {"image_size": 32, "rope_grid": 4}, {"dropout": 0.0}])
def test_a_model_is_initialized_with_the_default_weights(saved, changes):
    model = model_of(**changes)
    assert initialize(model, saved) == []
    assert_equal(model.state_dict(), state(1))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_classes_are_compared_by_name_and_order(saved):
    known = weights.load(saved).description.classes
    assert initialize(model_of(), saved, known) == []
    assert initialize(model_of(), saved, known[::-1]) == ["head.bias", "head.weight"]


def test_other_classes_get_a_new_head(saved):
    model = model_of(classes=5)
    head = {name: value.clone() for name, value in model.head.state_dict().items()}
    assert initialize(model, saved) == ["head.bias", "head.weight"]
    assert_equal(model.head.state_dict(), head)
    rest = {name: value for name, value in state(1).items() if not name.startswith("head.")}
    found = {name: v for name, v in model.state_dict().items() if not name.startswith("head.")}
    assert_equal(found, rest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 32}, "has a different shape in this model"),
        ({"depth": 1}, "does not exist in this model"),
        ({"depth": 3}, "is missing"),
        ({"layer_scale": 0.1}, r"is missing \(4 such parameters\)"),
        ({"qkv_bias": False}, "does not exist in this model"),
        ({"image_size": 32}, "on a grid of 4 patches per side, got 8; add --model.rope-grid 4"),
    ],
)
def test_a_model_is_unchanged_if_the_weights_do_not_fit(saved, changes, message):
    model = model_of(**changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=f"init: .*{message}"):
        initialize(model, saved)
    assert_equal(model.state_dict(), before)


def test_the_error_suggests_the_settings_of_the_run(tmp_path):
    run = RunDir(tmp_path / "run")
    save(run.best)
    with pytest.raises(UserError, match="use the model settings that it was trained with"):
        initialize(model_of(dim=32), run.path)
    run.write_config(CONFIG)
    message = f"`vitral train {run.config} --init {run.path}`"
    with pytest.raises(UserError, match=message):
        initialize(model_of(dim=32), run.path)


def test_a_recipe_uses_the_model_of_weights_without_reading_tensors(saved, tmp_path):
    for name in ("model", "ema"):
        with (saved / f"{name}.safetensors").open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(bytes(100))
    recipe = tmp_path / "tune.yaml"
    recipe.write_text("train: {epochs: 20}\nmodel: {image_size: 32, dropout: 0.5}")
    found = weights.load_settings(str(recipe), ["--init", str(saved), "--model.qk-norm"])
    assert found.model == dataclasses.replace(
        SHAPE, image_size=32, dropout=0.5, qk_norm=True, rope_grid=4
    )
    assert (found.data.mean, found.data.std) == ((0.1, 0.2, 0.3), (1, 2, 3))
    assert (found.train.epochs, found.train.progressive) == (20, ())
    recipe.write_text("train: {epochs: 20}\nmodel: {dim: 48}")
    own = weights.load_settings(str(recipe), ["--init", str(saved)]).model
    assert own == ViTConfig(dim=48)  # a recipe with a model keeps it
    shutil.rmtree(saved)
    recipe.write_text("train: {epochs: 20}")
    with pytest.raises(
        UserError, match=r"no such directory.*--init specifies the weights to start"
    ):
        weights.load_settings(str(recipe), ["--init", str(saved)])
