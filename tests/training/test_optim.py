"""Groups, AdamW, losses and averages against values computed by hand."""

import math

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

from vitral.config import OptimConfig, ViTConfig
from vitral.model import ViT
from vitral.training.optim import EMA, Optimizer, loss_sum, parameter_groups

NAN, INF = math.nan, math.inf


def tiny(**changes):
    torch.manual_seed(0)
    fields = {"dim": 16, "depth": 2, "num_heads": 2, "num_kv_heads": 1, "num_registers": 1}
    fields |= {"patch_size": 2, "image_size": 4, "layer_scale": 0.1, "qk_norm": True}
    model = ViT(ViTConfig(**fields, **changes), num_classes=3)
    nn.init.normal_(model.head.weight, std=0.1)
    return model


def fill_gradients(model, step, scale=1.0):
    """Gives every parameter a gradient that depends on `step`."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = (noise * scale).to(parameter.dtype)


def bits(model, optimizer):
    """Returns a copy of everything that a step changes."""
    named = {**dict(model.named_parameters()), **optimizer.state()}
    return {name: value.detach().clone() for name, value in named.items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not first[name].equal(second[name])] == []


@pytest.mark.parametrize("changes", [{}, {"rope": "mixed"}, {"qkv_bias": False, "ffn_bias": False}])
def test_only_matrices_of_linear_layers_decay(changes):
    model = tiny(**changes)
    groups = parameter_groups(model, OptimConfig(weight_decay=0.3))
    by_id = {id(p): name for name, p in model.named_parameters()}
    names = {group["weight_decay"]: {by_id[id(p)] for p in group["params"]} for group in groups}
    layers = ["attention.qkv", "attention.projection", "ffn.expand", "ffn.contract"]
    matrices = {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers}
    matrices |= {"patch_embedding.projection.weight", "head.weight"}
    assert names == {0.3: matrices, 0.0: set(by_id.values()) - matrices}
    assert sum(len(group["params"]) for group in groups) == len(by_id)  # none twice
    assert {group["lr_factor"] for group in groups} == {1}


def test_layer_decay_by_hand():
    model = tiny(rope="mixed")
    factors = {}
    for group in parameter_groups(model, OptimConfig(layer_decay=0.5)):
        factors |= {id(p): group["lr_factor"] for p in group["params"]}
    expected = {"head": 1, "norm": 1, "blocks.1": 1 / 2, "blocks.0": 1 / 4}
    expected |= dict.fromkeys(["patch_embedding", "cls", "registers", "rope"], 1 / 8)
    for name, parameter in model.named_parameters():
        part = next(part for part in expected if name.startswith(part))
        assert factors[id(parameter)] == expected[part], name


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 1000.0])
def test_steps_equal_adamw_by_formula(clip_norm):
    config = OptimConfig(
        betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3, clip_norm=clip_norm, layer_decay=0.5
    )
    model = tiny().double()
    optimizer = Optimizer(model, config)
    matrices = {n for n, p in model.named_parameters() if p.ndim == 2 and n != "registers"}
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    mean = {name: torch.zeros_like(value) for name, value in expected.items()}
    square = {name: torch.zeros_like(value) for name, value in expected.items()}
    for t, lr in enumerate([0.01, 0.02, 0.005], start=1):
        fill_gradients(model, t, scale=10.0 ** (2 - t))
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        factor = min(1, clip_norm / (norm + 1e-6)) if clip_norm else 1
        for name, value in expected.items():
            below = 1 + (name[7] == "0") if name.startswith("blocks.") else 3
            below = 0 if name.startswith(("norm.", "head.")) else below
            rate, g = lr * 0.5**below, gradients[name] * factor
            mean[name] = 0.8 * mean[name] + 0.2 * g
            square[name] = 0.95 * square[name] + 0.05 * g**2
            value *= 1 - rate * 0.3 * (name in matrices)
            corrected = (square[name] / (1 - 0.95**t)).sqrt() + 1e-3
            value -= rate * mean[name] / (1 - 0.8**t) / corrected
        got, skipped = optimizer.step(lr, torch.tensor(1.0))
        assert got.item() == pytest.approx(norm, rel=1e-12)
        assert skipped.item() == 0
        assert all(p.grad is None for p in model.parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("place", ["cls", "blocks.1.ffn.expand.weight"])
@pytest.mark.parametrize("good_before", [0, 2])
@pytest.mark.parametrize(
    ("gradient", "loss"),
    [(NAN, 1.0), (INF, 1.0), (-INF, 1.0), (1.0, NAN), (1.0, INF), (NAN, NAN)],
)
def test_a_non_finite_step_changes_nothing(gradient, loss, good_before, place, name):
    model, other = tiny(), tiny()
    optimizer, other_optimizer = (Optimizer(m, OptimConfig(name=name)) for m in (model, other))
    for step in range(good_before):
        for m, o in ((model, optimizer), (other, other_optimizer)):
            fill_gradients(m, step)
            o.step(1e-2, torch.tensor(1.0))
    before = bits(model, optimizer)
    fill_gradients(model, 99)
    optimizer.named[place].grad.view(-1)[3] = gradient
    norm, skipped = optimizer.step(1e-2, torch.tensor(loss))
    assert skipped.item() == 1
    assert norm.isfinite() == math.isfinite(gradient)
    after = bits(model, optimizer)
    assert_equal({name: after[name] for name in before}, before)
    assert all(p.grad is None for p in model.parameters())
    for m, o in ((model, optimizer), (other, other_optimizer)):
        fill_gradients(m, 7)
        assert o.step(2e-2, torch.tensor(1.0))[1].item() == 0
    assert_equal(bits(model, optimizer), bits(other, other_optimizer))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("adamw", {"step", "exp_avg", "exp_avg_sq"}),
        ("muon", {"step", "exp_avg", "exp_avg_sq", "momentum"}),
    ],
)
def test_restored_state_continues_bit_identically(name, kept):
    config = OptimConfig(name=name, layer_decay=0.7)
    model = tiny()
    optimizer = Optimizer(model, config)
    for step in range(3):
        fill_gradients(model, step)
        optimizer.step(1e-2, torch.tensor(1.0))
    state = {name: value.clone() for name, value in optimizer.state().items()}
    assert {key.rpartition(".")[2] for key in state} == kept
    again = tiny()
    again.load_state_dict(model.state_dict())
    resumed = Optimizer(again, config)
    resumed.load_state(state)
    for step in range(3, 5):
        for m, o in ((model, optimizer), (again, resumed)):
            fill_gradients(m, step)
            o.step(2e-2, torch.tensor(1.0))
    assert_equal(bits(model, optimizer), bits(again, resumed))


TAKEN, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_skipped_step_does_not_move_the_average(device):
    model = tiny().to(device)
    optimizer, ema = Optimizer(model, OptimConfig()), EMA(model, 0.5)
    fill_gradients(model, 0)
    ema.update(1, optimizer.step(0.1, torch.tensor(1.0, device=device))[1])
    before = {name: value.clone() for name, value in ema.average.items()}
    fill_gradients(model, 1)
    _, skipped = optimizer.step(0.1, torch.tensor(torch.nan, device=device))
    assert skipped.item() == 1
    ema.update(2, skipped)
    assert_equal(ema.average, before)
    assert all(not value.equal(model.get_parameter(name)) for name, value in before.items())


def test_average_by_hand():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, decay=0.2)
    # decays 1/10, 2/11, then 3/12 is above 0.2
    for step, (weight, average) in enumerate([(1.0, 0.9), (2.0, 1.8), (3.0, 2.76)], start=1):
        nn.init.constant_(model.weight, weight)
        ema.update(step, TAKEN)
        assert ema.average["weight"].item() == pytest.approx(average, rel=1e-6)
        assert model.weight.item() == weight
    ema.update(10**6, TAKEN)
    assert ema.average["weight"].item() == pytest.approx(0.2 * 2.76 + 0.8 * 3, rel=1e-6)


@pytest.mark.parametrize("error", [None, ValueError])
def test_average_is_applied_temporarily(error):
    model = tiny()
    ema = EMA(model, 0.9)
    fill_gradients(model, 0)
    Optimizer(model, OptimConfig()).step(0.1, torch.tensor(1.0))
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    average = {name: value.clone() for name, value in ema.average.items()}
    members = list(model.parameters())
    try:
        with ema.applied():
            assert_equal(dict(model.named_parameters()), average)
            if error:
                raise error
    except ValueError:
        pass
    assert_equal(dict(model.named_parameters()), own)
    assert_equal(ema.average, average)
    assert all(a is b for a, b in zip(model.parameters(), members, strict=True))
    other = EMA(tiny(), 0.9)
    other.load_state(average)
    assert_equal(other.average, average)
    ema.update(5, TAKEN)
    weight = 1 - 5 / 14  # of the model's own weights, which were restored
    moved = {name: torch.lerp(average[name], own[name], weight) for name in own}
    assert_equal(ema.average, moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_loss_by_formula(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(6, 5, generator=generator) * 20).to(dtype)
    targets = torch.rand(6, 5, generator=generator)
    targets /= targets.sum(1, keepdim=True)
    expected = 0.0
    for x, t in zip(logits.double().tolist(), targets.double().tolist(), strict=True):
        if kind == "ce":
            total = math.log(sum(math.exp(value) for value in x))
            expected += sum(target * (total - value) for value, target in zip(x, t, strict=True))
        else:
            terms = [
                target * math.log1p(math.exp(-value)) + (1 - target) * math.log1p(math.exp(value))
                for value, target in zip(x, t, strict=True)
            ]
            expected += sum(terms) / 5
    loss = loss_sum(logits, targets, kind)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["ce", "bce"])
@pytest.mark.parametrize("micro_batch", [2, 4, 6])
def test_micro_batches_add_up_to_one_batch(kind, micro_batch):
    images = torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    targets = torch.rand(12, 3, generator=torch.Generator().manual_seed(2)).softmax(1)
    close = {"rtol": 1e-10, "atol": 1e-12}
    if kind == "bce" and TorchVersion(torch.__version__) < "2.14":
        # The loss is in float32; its rounding depends on the position of an image in the batch.
        close = {"rtol": 1e-5, "atol": 1e-6}
    results = []
    for size in (12, micro_batch):
        model = tiny().double()
        optimizer = Optimizer(model, OptimConfig(clip_norm=0.01))
        for part, truth in zip(images.split(size), targets.split(size), strict=True):
            (loss_sum(model(part), truth, kind) / 12).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        norm, _ = optimizer.step(1e-2, torch.tensor(1.0))
        results.append([norm, *gradients, *model.parameters()])
    for one, sum_of_parts in zip(*results, strict=True):
        torch.testing.assert_close(sum_of_parts, one, **close)
