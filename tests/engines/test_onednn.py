"""The faster forward pass against that of the model."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from vitral.config import ViTConfig
from vitral.engines import onednn
from vitral.engines.onednn import by_onednn
from vitral.model import ViT

SMALL = {"dim": 32, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "patch_size": 4}
needs_x86 = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="x86 only"
)


def trained(**settings):
    """A model in which all weights affect the result."""
    torch.manual_seed(0)
    model = ViT(ViTConfig(**{**SMALL, **settings}), 7).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@needs_x86
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pooling": "mean", "num_registers": 2, "rope": "mixed"},
        {"qk_norm": True, "layer_scale": 0.5, "qkv_bias": False, "ffn_bias": False},
        {"num_kv_heads": 4, "dropout": 0.5, "stochastic_depth": 0.5},
    ],
)
@torch.no_grad()
def test_equals_the_model(settings):
    model = trained(**settings)
    fast = by_onednn(model)
    assert fast is not model
    for shape in ((5, 3, 16, 24), (1, 3, 4, 4)):
        images = torch.randn(shape)
        torch.testing.assert_close(fast(images), model(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            fast.forward_features(images), model.forward_features(images), rtol=1e-4, atol=1e-5
        )


@needs_x86
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@torch.no_grad()
def test_large_attention_equals_the_model(num_kv_heads, monkeypatch):
    monkeypatch.setattr(onednn, "MIN_SCORES", 1)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    fast = by_onednn(trained(num_kv_heads=num_kv_heads))
    images = torch.randn(3, 3, 16, 24)
    found = fast(images)
    monkeypatch.undo()
    expected = trained(num_kv_heads=num_kv_heads)(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@needs_x86
@torch.no_grad()
def test_autocast_changes_nothing():
    """Users may predict under autocast; oneDNN rejects operands of two dtypes."""
    model, images = trained(), torch.randn(2, 3, 16, 16)
    expected = model.forward_features(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = by_onednn(model).forward_features(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@needs_x86
@torch.no_grad()
def test_images_are_processed_in_slices():
    model, images = trained(), torch.randn(5, 3, 160, 80)  # 800 patches each
    sizes = []
    hook = model.norm.register_forward_hook(lambda *io: sizes.append(len(io[2])))
    found = by_onednn(model)(images)
    assert sizes == [1] * 5
    sizes.clear()
    by_onednn(model)(images[..., :80, :])
    assert sizes == [3, 2]
    hook.remove()
    torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-5)


@needs_x86
@torch.no_grad()
def test_onednn_computes_linear_layers_and_gelu():
    model, images = trained(), torch.randn(2, 3, 16, 16)
    called = {}
    for name, forward in (("model", model), ("fast", by_onednn(model))):
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
            forward(images)
        called[name] = {event.key: event.count for event in profiled.key_averages()}
    assert {"aten::linear", "aten::gelu"} <= called["model"].keys()
    assert "aten::gelu" not in called["fast"]
    assert "aten::linear" not in called["fast"]


@needs_x86
@torch.no_grad()
def test_weights_are_shared_and_the_model_is_unchanged():
    model, images = trained(), torch.randn(2, 3, 16, 16)
    before = model(images)
    fast = by_onednn(model)
    assert torch.equal(model(images), before)
    assert not any(type(m).__module__ == "vitral.engines.onednn" for m in model.modules())
    other = ViT(model.config, 7).state_dict()
    model.load_state_dict(other)
    torch.testing.assert_close(fast(images), model(images), rtol=1e-4, atol=1e-5)
    assert (fast(images) - before).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # from torch 2.11 itself
@needs_x86
@pytest.mark.parametrize("place", ["model", "block"])
@torch.no_grad()
def test_a_compiled_model_is_unchanged(place):
    model, images = trained(), torch.randn(2, 3, 16, 16)
    expected = model(images)
    if place == "model":
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = model
        model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    torch.testing.assert_close(by_onednn(compiled)(images), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(images), expected)
    assert torch.equal(compiled(images), expected)
