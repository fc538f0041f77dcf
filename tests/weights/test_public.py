"""Converted models against randomly initialized timm models: outputs, features, gradients."""

import json
import re
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import vitral
from vitral import weights
from vitral.cli import main
from vitral.config import Config, OptimConfig
from vitral.data.imagenet import wnids
from vitral.engines.choice import for_inference
from vitral.errors import UserError
from vitral.inference.export import export
from vitral.model import ViT
from vitral.training.frozen import freeze, train_mode
from vitral.training.optim import Optimizer
from vitral.weights import public

timm = pytest.importorskip("timm")

SMALL = {"embed_dim": 48, "num_heads": 4, "depth": 2}
RANDOM_MODELS = {
    "vit_tiny_patch16_224": SMALL,
    "vit_small_patch16_224.dino": {**SMALL, "num_classes": 0},
    "deit3_small_patch16_224": SMALL,
    "vit_small_patch14_dinov2": {**SMALL, "img_size": 56},
    "vit_small_patch14_reg4_dinov2": {**SMALL, "img_size": 56},
    "vit_small_patch16_rope_224": SMALL,
    "vit_small_patch16_rope_mixed_224": SMALL,
    "vit_small_patch16_rope_ape_224": SMALL,
    "vit_small_patch16_rope_mixed_ape_224": SMALL,
    "vit_little_patch16_reg4_gap_256": SMALL,
    "vit_wee_patch16_reg1_gap_256": SMALL,
    "vit_mediumd_patch16_rope_reg1_gap_256": SMALL,
    "vit_betwixt_patch16_reg4_gap_256": SMALL,
    "vit_so150m2_patch16_reg1_gap_256": SMALL,
    "vit_base_patch16_siglip_gap_224": SMALL,
    "eva02_tiny_patch14_224": SMALL,
    "eva02_small_patch14_336": SMALL,
    "vit_small_patch16_dinov3": SMALL,
    "vit_small_plus_patch16_dinov3": SMALL,
    "vit_base_patch16_clip_224": SMALL,
    "vit_base_patch32_clip_quickgelu_224": {**SMALL, "num_classes": 0},
    "aimv2_large_patch14_224": SMALL,
    "vit_base_patch16_sapiens2": {**SMALL, "img_size": (64, 48), "num_kv_heads": (4, 2)},
}


def random_model(name, dtype=torch.float32):
    """A timm model in which all parameters are random, so that all of them affect the result."""
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):
        model = timm.create_model(name.partition(".")[0], pretrained=False, **RANDOM_MODELS[name])
    for parameter in model.parameters():
        std = 0.05 if parameter.ndim > 1 else 0.3
        parameter.data += std * torch.randn_like(parameter)
    return model.eval().to(dtype)


def relative(found, expected):
    return ((found - expected).abs().max() / expected.square().mean().sqrt()).item()


@pytest.mark.parametrize("name", RANDOM_MODELS)
def test_outputs_and_features_equal_timm(name):
    source = random_model(name)
    imported = public.convert(source)
    assert imported.error <= 1e-5
    images = torch.randn(2, 3, *source.patch_embed.img_size)
    with torch.no_grad():
        features = source.forward_head(source.forward_features(images), pre_logits=True)
        own = imported.model.pool(imported.model.forward_features(images))
    assert relative(own, features) <= 1e-5


@pytest.mark.parametrize("name", RANDOM_MODELS)
def test_the_last_block_of_every_model_can_be_trained_alone(name):
    source = random_model(name)
    model = public.convert(source).model
    images = torch.randn(2, 3, *source.patch_embed.img_size)
    before = {n: tensor.clone() for n, tensor in model.state_dict().items()}
    with torch.no_grad():
        features = model.pool(model.forward_features(images))
        engine = for_inference(model)
        assert relative(engine.pool(engine.forward_features(images)), features) <= 1e-5
    freeze(model, 1)
    train_mode(model, 1)
    optimizer = Optimizer(model, OptimConfig())
    loss = model(images).square().sum()
    loss.backward()
    optimizer.step(0.1, loss)
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert {name.partition(".")[0] for name in changed} <= {"blocks", "norm", "head"}
    assert {name.split(".")[1] for name in changed if name.startswith("blocks")} == {"1"}


DYNAMIC = ["vit_tiny_patch16_224", "vit_base_patch32_clip_quickgelu_224", "eva02_tiny_patch14_224",
           "vit_small_patch16_rope_mixed_224", "vit_small_patch16_dinov3"]  # fmt: skip


@pytest.mark.parametrize("name", DYNAMIC)
def test_models_for_all_image_sizes_are_compared_at_several(name, monkeypatch):
    """Models as `create` returns them; those with rotary positions only at the native size."""
    monkeypatch.setitem(RANDOM_MODELS, name, {**RANDOM_MODELS[name], "dynamic_img_size": True})
    source, shapes = random_model(name), set()
    source.register_forward_pre_hook(lambda _, given: shapes.add(tuple(given[0].shape[2:])))
    assert public.convert(source).error <= 1e-5
    assert len(shapes) == (1 if getattr(source, "rope", None) is not None else 3)


QUICK = {"vit_wee_patch16_reg1_gap_256", "vit_small_patch16_rope_mixed_ape_224",
         "vit_base_patch32_clip_quickgelu_224"}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in RANDOM_MODELS]
)
def test_onnx_files_compute_the_outputs_of_timm(name, tmp_path):
    """`export` also compares the file with vitral's model at other image sizes."""
    source = random_model(name)
    model = public.convert(source).model
    classes = public.class_names(source.num_classes)
    description = weights.describe(Config(model=model.config), classes, "", {})
    weights.save(tmp_path / "weights", {"model": model.state_dict()}, description)
    export(tmp_path / "weights", out=tmp_path / "model.onnx", images=0)
    session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "model.onnx")
    images = torch.randn(2, 3, *source.patch_embed.img_size)
    (found,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        assert relative(torch.from_numpy(found), source(images)) <= 1e-4


EXACT = ["vit_tiny_patch16_224", "vit_base_patch32_clip_quickgelu_224", "aimv2_large_patch14_224"]


@pytest.mark.parametrize("name", EXACT)
def test_outputs_equal_timm_in_float64(name):
    """Without rotary positions, whose tables are float32."""
    source = random_model(name, torch.float64)
    imported = public.convert(random_model(name)).model.double()
    imported.load_state_dict(dict(_state(source)))  # not rounded to float32
    images = torch.randn(1, 3, *source.patch_embed.img_size, dtype=torch.float64)
    with torch.no_grad():
        assert relative(imported(images), source(images)) <= 1e-10


def _state(source):
    from vitral.weights.conversion import Block, convert_state, read_config

    blocks = [Block(i, block) for i, block in enumerate(source.blocks)]
    config = read_config(source, blocks)
    return convert_state(source, blocks, config)


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch16_dinov3",
     "vit_base_patch32_clip_quickgelu_224", "eva02_tiny_patch14_224"],
)  # fmt: skip
def test_image_gradients_equal_timm(name):
    source = random_model(name)
    model = public.convert(source).model
    images = torch.randn(1, 3, *source.patch_embed.img_size, requires_grad=True)
    gradients = [torch.autograd.grad(m(images).square().sum(), images)[0] for m in (model, source)]
    assert relative(*gradients) <= 1e-4


def test_tiny_layer_scales_are_folded_and_counted():
    source = random_model("deit3_small_patch16_224")
    source.blocks[0].ls1.gamma.data[3] = 0.0
    source.blocks[1].ls2.gamma.data[:2] = 1e-9
    imported = public.convert(source)
    assert imported.folded == 3
    assert imported.error <= 1e-5


@pytest.mark.parametrize(
    ("name", "changes", "part"),
    [
        ("vit_base_patch16_siglip_224", {}, "pooling"),
        ("vit_small_patch16_36x1_224", {"depth": 1, "global_pool": "avgmax"}, "pooling"),
        ("vit_small_patch16_18x2_224", {"depth": 1}, "blocks.0."),
        ("eva02_base_patch14_224", {"depth": 1}, "blocks.0.mlp.norm"),
        ("swin_tiny_patch4_window7_224", {}, "SwinTransformer"),
        ("beit_base_patch16_224", {"depth": 1}, "Beit"),
    ],
)
def test_unsupported_parts_are_named(name, changes, part):
    with warnings.catch_warnings(action="ignore"):
        source = timm.create_model(name, pretrained=False, **changes).eval()
    with pytest.raises(UserError, match=part):
        public.convert(source)


@pytest.fixture
def file(tmp_path):
    """Weights of a tiny model in timm's layout, and the name of the model."""
    source = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    safetensors.torch.save_file(source.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", source


@pytest.mark.slow
def test_import_save_load_and_export(file, tmp_path, capsys):
    path, source = file
    place = tmp_path / "made"
    assert main(["import", "timm:vit_tiny_patch16_224", str(place), "--file", str(path)]) == 0
    assert "largest difference from timm's outputs" in capsys.readouterr().out
    found = vitral.load(place)
    known = found.description
    assert known.source == "timm:vit_tiny_patch16_224"
    assert known.license
    assert known.difference <= 1e-5
    assert known.classes[0] == "n01440764"
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert relative(found.model(images), source(images)) <= 1e-5
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8))
    picture.save(tmp_path / "a.png")
    assert main(["predict", str(place), str(tmp_path / "a.png")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(str(tmp_path / "a.png"))
    pytest.importorskip("onnxruntime")
    exported = export(place, out=tmp_path / "made.onnx", images=0)
    assert (tmp_path / "made.onnx").exists()
    assert exported.agreements


def test_errors_are_one_line_and_write_nothing(file, tmp_path, capsys, monkeypatch):
    path, _ = file
    place = tmp_path / "made"

    def refused(*words):
        assert main(["import", *map(str, words)]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        assert not place.exists()
        return text

    assert "did you mean vit_tiny_patch16_224?" in refused("timm:vit_tiny_patch16_22", place)
    assert "timm:NAME" in refused("vit_tiny_patch16_224", place)
    for name, kind in (
        ("resnet18", "resnet"), ("swin_tiny_patch4_window7_224", "swin_transformer"),
        ("convnext_tiny", "convnext"), ("beit_base_patch16_224", "beit"),
    ):  # fmt: skip
        assert (
            f"plain Vision Transformer, of timm's vision_transformer, deit, eva, got one of {kind};"
            in (refused(f"timm:{name}", place))
        )
    assert "which does not exist or is not a file" in refused(
        "timm:vit_tiny_patch16_224", place, "--file", tmp_path / "no"
    )
    other = ("timm:vit_small_patch16_224", place, "--file", path)
    text = refused(*other)
    assert "cannot be loaded" in text
    assert "size mismatch for cls_token" in text
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    assert "pip install 'vitral[timm]'" in refused("timm:vit_tiny_patch16_224", place)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pth_files_are_read_without_running_code(file, tmp_path, capsys):
    _, source = file
    words = ["import", "timm:vit_tiny_patch16_224", str(tmp_path / "made"), "--file"]
    torch.save({**source.state_dict(), "x": Malicious(tmp_path / "ran")}, tmp_path / "bad.pth")
    assert main([*words, str(tmp_path / "bad.pth")]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"vitral: timm:\S+: \S+bad.pth: expected only tensors, got .+\n", error)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "made").exists()
    torch.save(source.state_dict(), tmp_path / "good.pth")
    assert main([*words, str(tmp_path / "good.pth")]) == 0
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert relative(vitral.load(tmp_path / "made").model(images), source(images)) <= 1e-5


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.pth.tar"])
def test_a_file_may_have_a_head_of_any_size(name, tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    state, path = source.state_dict(), tmp_path / name
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:  # as timm's train.py writes them, with the weights that timm prefers
        other = {name: torch.zeros_like(value) for name, value in state.items()}
        torch.save({"epoch": 1, "state_dict": other, "state_dict_ema": state}, path)
    created = public.create("vit_tiny_patch16_224", str(path)).state_dict()
    assert created.keys() == state.keys()
    assert all(torch.equal(created[name], state[name]) for name in state)


def test_a_file_without_the_parameters_of_the_model_is_rejected(file, tmp_path):
    _, source = file
    state = {f"encoder.{name}": value for name, value in source.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"cannot be loaded: .*Missing key"):
        public.create("vit_tiny_patch16_224", str(tmp_path / "other.safetensors"))


def test_a_public_name_is_converted_once_and_verified(file, tmp_path, monkeypatch):
    path, _ = file
    monkeypatch.setenv("VITRAL_CACHE", str(tmp_path / "cache"))
    create, calls = public.create, []
    monkeypatch.setattr(
        public, "create", lambda name: calls.append(name) or create(name, str(path))
    )
    first = weights.load("timm:vit_tiny_patch16_224")
    second = weights.load("hf-hub:timm/vit_tiny_patch16_224")
    assert calls == ["vit_tiny_patch16_224"]
    assert first.path == second.path
    tensors = first.path / "model.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(UserError, match="its content differs from what was written; remove"):
        weights.load("timm:vit_tiny_patch16_224")


def test_weights_without_a_head(tmp_path, capsys, image_folder):
    model = public.convert(random_model("vit_small_patch16_224.dino")).model
    config = Config(model=model.config)
    description = weights.describe(config, (), "", {})
    weights.save(tmp_path / "features", {"model": model.state_dict()}, description)
    photo = next((image_folder / "val").rglob("*.jpg"))
    assert main(["predict", str(tmp_path / "features"), str(photo)]) == 2
    assert "no classifier" in capsys.readouterr().err
    out = tmp_path / "features.npz"
    words = ["embed", str(tmp_path / "features"), str(photo), "--out", str(out), "--normalize"]
    assert main(words) == 0
    with np.load(out) as stored:
        assert stored["paths"].tolist() == [str(photo)]
        assert stored["features"].shape == (1, 48)
        assert np.linalg.norm(stored["features"]) == pytest.approx(1, abs=1e-6)
    larger = ViT(vitral.ViTConfig(**{**_fields(model.config), "image_size": 256}), 3)
    assert weights.initialize(larger, tmp_path / "features") == ["head.bias", "head.weight"]


def _fields(config):
    import dataclasses

    return {**dataclasses.asdict(config), "rope_grid": config.grid}


@pytest.mark.parametrize(
    ("count", "position", "wnid"),
    [
        (1000, 0, "n01440764"),  # tench
        (1000, 999, "n15075141"),  # toilet tissue
        (11221, 11220, "n15102894"),  # knothole
        (11821, 0, "n00005787"),  # benthos
        (21841, 0, "n00004475"),  # organism
        (21843, 2, "n00006024"),  # heterotroph
    ],
)
def test_classes_of_imagenet_heads_are_wordnet_ids(count, position, wnid):
    names = public.class_names(count)
    assert len(set(names)) == count
    assert names[position] == wnid
    if count == 1000:
        assert names == wnids()


def test_an_imported_head_has_wordnet_ids(tmp_path, monkeypatch):
    monkeypatch.setitem(RANDOM_MODELS, "vit_tiny_patch16_224", {**SMALL, "num_classes": 11821})
    public.write("x", random_model("vit_tiny_patch16_224"), tmp_path / "made")
    assert weights.load(tmp_path / "made").description.classes[-1] == "n15102894"


def test_classes_of_other_heads_are_numbered():
    assert public.class_names(2) == ("class 0", "class 1")
    assert public.class_names(0) == ()


def test_old_descriptions_have_no_source(tmp_path):
    document = {
        "schema": 2, "config": {}, "classes": ["a"], "fingerprint": "", "default": "model",
        "metrics": {}, "vitral": "0.1.0",
    }  # fmt: skip
    found = weights.Description.from_document(json.loads(json.dumps(document)), tmp_path)
    assert (found.source, found.license, found.difference) == ("", "", 0.0)
