"""The selection of an engine, and the agreement of all engines with the model."""

import json
import sys

import pytest
import torch
from tests.engines.test_onednn import trained

from vitral.engines import bf16, exported, onednn, profile
from vitral.engines.choice import for_inference, pick_engine_device
from vitral.errors import UserError
from vitral.model import ViT

needs_x86 = pytest.mark.skipif(not onednn.is_supported(trained()), reason="x86 only")
needs_bf16 = pytest.mark.skipif(not bf16.is_supported(trained()), reason="AVX-512 BF16 only")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITRAL_CACHE", str(tmp_path))
    return tmp_path / "onnx"


@torch.no_grad()
def test_plain_equals_the_model_in_slices():
    model, images = trained(), torch.randn(5, 3, 160, 80)
    expected = torch.cat([model.forward_features(image) for image in images.split(1)])
    assert torch.equal(for_inference(model, "plain").forward_features(images), expected)


@needs_bf16
@torch.no_grad()
def test_bf16_is_close_to_the_model_and_rounds_products():
    model, images = trained(), torch.randn(5, 3, 16, 24)
    found, expected = for_inference(model, "bf16")(images), model(images)
    error = (found - expected).abs().max() / expected.abs().max()
    assert 1e-4 < error < 3e-2  # one bfloat16 product has a relative error of 2^-9
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("activation", ["gelu-tanh", "swiglu"])
@needs_bf16
@torch.no_grad()
def test_bf16_uses_the_scales_of_the_norms(activation):
    model, images = trained(activation=activation), torch.randn(2, 3, 16, 16)
    model.blocks[0].ffn_norm.scale[:16] *= 50
    expected = model.features(images)
    error = (for_inference(model, "bf16").features(images) - expected).abs().max()
    assert error < 0.05 * expected.abs().max()


@pytest.mark.slow  # the exporter takes several seconds
@torch.no_grad()
def test_an_exported_model_is_cached_and_replaced_if_it_is_wrong(cache, capsys, monkeypatch):
    """Also tests images of another shape than that of the export."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, images = trained(depth=1), torch.randn(5, 3, 16, 24)

    def check():
        found = for_inference(model, "onnxruntime")
        for name in ("forward", "features"):
            got, expected = (getattr(m, name)(images) for m in (found, model))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        return capsys.readouterr().err

    assert "exporting the model" in check()
    (file,) = cache.iterdir()
    content = file.read_bytes()
    exports = []
    monkeypatch.setattr(exported, "_export", lambda model: exports.append(1) or content)
    assert check() == ""
    assert not exports
    for wrong in (b"", b"not a model", content[:-1000]):
        file.write_bytes(wrong)
        assert "cannot be used and is replaced" in check()
        assert file.read_bytes() == content
    assert len(exports) == 3
    file.unlink()
    cache.rmdir()
    cache.write_text("a file in place of the directory")
    assert "the export is not stored" in check()
    with torch.no_grad():  # content is now that of another model
        model.blocks[0].ffn.expand.weight.mul_(2)
    with pytest.raises(UserError, match="onnxruntime cannot run this model: expected errors of"):
        for_inference(model, "onnxruntime")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_missing_package_is_a_user_error(runtime, monkeypatch):
    monkeypatch.setitem(sys.modules, runtime, None)
    with pytest.raises(UserError, match=f"{runtime} requires the package .*; run `pip install"):
        for_inference(trained(), runtime)


def test_unsupported_engines_are_user_errors(monkeypatch):
    with pytest.raises(UserError, match=r"engine: onednn requires .* a model in float32"):
        for_inference(trained().double(), "onednn")
    with pytest.raises(UserError, match="plain requires --device cpu, got --device cuda"):
        pick_engine_device("plain", "cuda")
    monkeypatch.setattr(exported, "MAX_BYTES", 1000)
    pytest.importorskip("onnxscript")
    with pytest.raises(UserError, match="engine: expected at most"):
        for_inference(trained(), "onnxruntime")


@needs_x86
def test_auto_follows_the_machine_profile(cache, monkeypatch):
    monkeypatch.setattr(profile, "SECONDS", 0.01)
    model = trained(image_size=16)
    assert isinstance(for_inference(model), onednn.CLASSES[ViT])  # the profile is off
    monkeypatch.delenv("VITRAL_PROFILE")
    for_inference(model)
    (file,) = (cache.parent / "profile").iterdir()
    measured = json.loads(file.read_text())
    assert measured["decision"] == "prediction"
    for fastest, expected in (("oneDNN", True), ("torch", False)):
        measured["seconds"] = {"oneDNN": 2.0, "torch": 2.0} | {fastest: 1.0}
        file.write_text(json.dumps(measured))
        profile._recalled.clear()
        found = for_inference(model)
        assert isinstance(found, onednn.CLASSES[ViT]) == expected
        assert found is not model
        assert for_inference(found) is found


def test_auto_uses_torch_where_onednn_does_not_work(monkeypatch):
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model = trained().double()
    assert torch.equal(for_inference(model)(images), model(images))
    meta = trained().to("meta")
    assert for_inference(meta) is meta
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not isinstance(for_inference(trained()), onednn.CLASSES[ViT])
