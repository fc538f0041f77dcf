"""vitral's models through the interface of timm."""

import builtins
import sys

import pytest
import timm
import timm.data
import torch
from timm.models import list_models
from timm.optim import create_optimizer_v2

import vitral
import vitral.timm
from vitral import weights
from vitral.config import Config, DataConfig, OptimConfig, ViTConfig
from vitral.errors import UserError
from vitral.model import ViT
from vitral.training.optim import parameter_groups
from vitral.weights.public import read_data

SHAPE = {"dim": 16, "depth": 2, "num_heads": 2, "num_kv_heads": 1, "patch_size": 4}
CLASSES = ("dark", "light", "neither")
PRESETS = [f"vitral_vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large", "huge")]


def randomized(model, seed=0):
    """Randomizes all weights, so that a missing one changes the result, unlike a zero head."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.3)
    return model


@pytest.fixture(scope="module", params=["cls", "mean"])
def place(request, tmp_path_factory):
    """A weight directory with different EMA weights and unusual preprocessing."""
    shape = ViTConfig(**SHAPE, image_size=24, num_registers=2, pooling=request.param)
    data = DataConfig(eval_crop=0.8, interpolation="bicubic", mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    description = weights.describe(Config(model=shape, data=data), CLASSES, "", {})
    states = {
        kind: randomized(ViT(shape, len(CLASSES)), seed).state_dict()
        for seed, kind in enumerate(("model", "ema"))
    }
    folder = tmp_path_factory.mktemp("weights") / "best"
    weights.save(folder, states, description)
    return folder


@pytest.fixture
def images():
    return torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("which", [None, "model", "ema"])
def test_weights_give_the_same_logits(place, images, which):
    model = timm.create_model("vitral", weights=str(place), which=which)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model(images).equal(vitral.load(place, which=which).model(images))
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_preprocessing_matches_the_weights(place):
    model = timm.create_model("vitral", weights=str(place))
    assert timm.data.resolve_model_data_config(model) == {
        "input_size": (3, 24, 24),
        "interpolation": "bicubic",
        "mean": (0.1, 0.2, 0.3),
        "std": (1, 2, 3),
        "crop_pct": 0.8,
        "crop_mode": "center",
    }
    assert model.default_cfg is model.pretrained_cfg
    assert model.pretrained_cfg["label_names"] == CLASSES
    assert (model.num_classes, model.pretrained_cfg["num_classes"]) == (3, 3)
    over = timm.create_model("vitral", weights=str(place), pretrained_cfg_overlay={"crop_pct": 1.0})
    assert timm.data.resolve_model_data_config(over)["crop_pct"] == 1.0


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_preprocessing_of_an_export_is_read_back(fit):
    data = DataConfig(fit=fit, eval_crop=1.0, interpolation="bicubic", mean=(0.1, 0.2, 0.3))
    assert read_data(vitral.timm._cfg(ViTConfig(), data)) == data


def test_features_head_and_logits(place, images):
    model = timm.create_model("vitral", weights=str(place)).eval()
    tokens = model.forward_features(images)
    assert tokens.shape == (2, 1 + 2 + 6 * 4, 16)
    before = model.forward_head(tokens, pre_logits=True)
    assert before.shape == (2, model.num_features)
    assert model.get_classifier()(before).equal(model(images))
    assert model.forward_head(tokens).equal(model(images))


def test_a_new_head_does_not_change_the_features(place, images):
    model = timm.create_model("vitral", weights=str(place)).double().eval()
    tokens = model.forward_features(images.double())
    model.reset_classifier(5)
    assert (model.num_classes, model.get_classifier().out_features) == (5, 5)
    assert model.forward_features(images.double()).equal(tokens)
    assert model(images.double()).equal(torch.zeros(2, 5, dtype=torch.float64))
    model.reset_classifier(0)
    assert model(images.double()).equal(model.forward_head(tokens, pre_logits=True))
    model.reset_classifier(0, "avg")
    assert model(images.double()).equal(tokens[:, 3:].mean(1))
    model.reset_classifier(0, "token")
    assert model(images.double()).equal(tokens[:, 0])
    model.reset_classifier(0, "")
    assert model(images.double()).equal(tokens)


def test_settings_for_fine_tuning(place, images):
    settings = {"drop_path_rate": 0.5, "proj_drop_rate": 0.2, "img_size": 32, "num_classes": 7}
    model = timm.create_model("vitral", weights=str(place), **settings)
    assert (model.config.stochastic_depth, model.config.dropout) == (0.5, 0.2)
    assert model.blocks[1].attention_residual.skip == 0.5
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 32, 32)
    assert model(images).shape == (2, 7)
    features = vitral.load(place).model.forward_features(images)
    assert model.eval().forward_features(images).equal(features)  # the positions do not change
    model = timm.create_model("vitral", weights=str(place), num_classes=3, drop_rate=1.0)
    assert model(images).equal(model.head.bias.expand(2, 3))  # the head's entire input is dropped
    assert model.eval()(images).equal(vitral.load(place).model(images))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"in_chans": 1}, UserError, "in_chans: expected 3, got 1"),
        ({"global_pool": "max"}, UserError, "global_pool: expected one of"),
        ({"weights": None}, UserError, "weights: expected a run or weight directory"),
        ({"img_size": (160, 96)}, UserError, r"img_size: expected one number, .*got \(160, 96\)"),
        ({"img_size": 30}, UserError, "image_size: expected a multiple of patch_size 4"),
        ({"which": "emma"}, UserError, "contains no emma weights"),
        ({"dim": 32}, TypeError, "dim"),
        ({"drop_path": 0.1}, TypeError, "drop_path"),
    ],
)
def test_invalid_settings(place, settings, error, message):
    with pytest.raises(error, match=message):
        timm.create_model("vitral", **{"weights": str(place), **settings})


def test_height_and_width_may_be_given(place):
    settings = {"weights": str(place), "img_size": (32, 32)}
    assert timm.create_model("vitral", **settings).config.image_size == 32
    model = timm.create_model(PRESETS[0], img_size=[32, 32], dim=16, num_heads=1, num_kv_heads=1)
    assert model.config.image_size == 32


def test_timm_groups_parameters_as_vitral_does():
    settings = {**SHAPE, "num_registers": 2, "rope": "mixed", "layer_scale": 0.1, "qk_norm": True}
    model = timm.create_model(PRESETS[0], **settings, num_classes=3)
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1, layer_decay=0.5))

    def by_parameter(groups, factor):
        return {id(p): (g["weight_decay"], g[factor]) for g in groups for p in g["params"]}

    assert by_parameter(optimizer.param_groups, "lr_scale") == by_parameter(groups, "lr_factor")


def test_checkpointing_saves_less_and_gives_the_same_gradients(place, images):
    model = timm.create_model("vitral", weights=str(place))

    def step(enable):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            loss = model(images).square().sum()
        loss.backward()
        return len(saved), [parameter.grad.clone() for parameter in model.parameters()]

    (count, gradients), (fewer, recomputed) = step(False), step(True)
    assert fewer < count / 2
    assert all(map(torch.equal, gradients, recomputed))


def test_presets_are_in_the_registry():
    assert set(list_models("vitral*")) == {"vitral", *PRESETS}
    assert list_models("vitral*", pretrained=True) == []


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_shapes_of_their_sizes(name):
    config = ViTConfig(size={"tiny": "ti"}.get(name.split("_")[2], name.split("_")[2][0]))
    with torch.device("meta"):
        model, expected = timm.create_model(name, num_classes=10), ViT(config, 10)
    assert model.num_features == config.shape.dim
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in expected.state_dict().items()}
    config = timm.data.resolve_model_data_config(model)
    assert (config["input_size"], config["interpolation"]) == ((3, 224, 224), "bilinear")
    assert (config["crop_pct"], config["mean"]) == (0.875, (0.485, 0.456, 0.406))


def test_presets_accept_the_names_of_timm_and_of_vitral():
    settings = {**SHAPE, "num_registers": 1, "img_size": 8, "drop_path_rate": 0.5, "num_classes": 0}
    torch.manual_seed(0)
    model = timm.create_model("vitral_vit_small_patch16_224", **settings, global_pool="avg").eval()
    torch.manual_seed(0)
    plain = ViT(ViTConfig(**SHAPE, num_registers=1, image_size=8, stochastic_depth=0.5), 1).eval()
    images = torch.randn(2, 3, 12, 8)
    assert model(images).equal(plain.forward_features(images)[:, 2:].mean(1))
    assert model.config.image_size == 8
    with pytest.raises(UserError, match="vitral_vit_small_patch16_224 has no pretrained weights"):
        timm.create_model("vitral_vit_small_patch16_224", pretrained=True)
    with pytest.raises(TypeError, match="num_register"):
        timm.create_model("vitral_vit_small_patch16_224", num_register=4)


def test_a_missing_timm_is_an_import_error(monkeypatch):
    before = builtins.__import__

    def fail(name, *rest):
        if name.partition(".")[0] == "timm":
            raise ModuleNotFoundError("No module named 'timm'", name="timm")
        return before(name, *rest)

    monkeypatch.delitem(sys.modules, "vitral.timm")
    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ImportError, match=r"package timm, .*pip install 'vitral\[timm\]'"):
        import vitral.timm  # noqa: F401
