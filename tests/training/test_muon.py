"""Muon against its formula, torch's Muon and singular vectors; with AdamW, and sharded."""

import os

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vitral.config import OptimConfig, ViTConfig
from vitral.model import ViT
from vitral.training.distributed import distribute_like, gather_full, process_world
from vitral.training.muon import orthogonal
from vitral.training.optim import Optimizer, parameter_groups

from .processes import finish, start

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

CONFIG = ViTConfig(
    dim=24, depth=3, num_heads=6, num_kv_heads=2, patch_size=4, image_size=16, layer_scale=0.1
)
OPTIM = {"weight_decay": 0.1, "layer_decay": 0.5}


def make_model(**optim):
    """Returns a model and its optimizer."""
    torch.manual_seed(0)
    model = ViT(CONFIG, 3)
    return model, Optimizer(model, OptimConfig(**{**OPTIM, **optim}))


def fill_gradients(model, seed, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=draw)


def matrices(model):
    """Returns the names of the matrices of the blocks: two of attention and two of the FFN each."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if name.startswith("blocks.") and isinstance(module, nn.Linear)
    }


def newton_schulz(matrix):
    """The iteration of Jordan et al. 2024 in float32, for one matrix."""
    x = matrix / matrix.norm()
    for _ in range(5):
        xxt = x @ x.T
        x = 3.4445 * x - 4.7750 * xxt @ x + 2.0315 * xxt @ xxt @ x
    return x


def test_steps_equal_muon_by_formula():
    """Each matrix separately, in float32: momentum 0.95 as a mean, Nesterov, decoupled decay."""
    model, optimizer = make_model(name="muon", clip_norm=0.0)
    parameters = dict(model.named_parameters())
    expected = {name: parameters[name].detach().clone() for name in matrices(model)}
    momentum = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step, lr in enumerate((0.01, 0.03, 0.02)):
        fill_gradients(model, step)
        for name, value in expected.items():
            g, below = parameters[name].grad, 3 - int(name.split(".")[1])
            momentum[name] = 0.95 * momentum[name] + 0.05 * g
            update = newton_schulz(0.95 * momentum[name] + 0.05 * g)
            rate = lr * 0.5**below
            value *= 1 - rate * 0.1
            value -= rate * 0.2 * max(value.shape) ** 0.5 * update
        optimizer.step(lr, torch.tensor(1.0))
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name], value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            optimizer.state()[f"{name}.momentum"], momentum[name], rtol=1e-5, atol=1e-7
        )


def test_steps_equal_torch_muon():
    """Up to bf16 rounding: torch always orthogonalizes in bf16, vitral only on a GPU."""
    model, optimizer = make_model(name="muon", clip_norm=0.0)
    torch.manual_seed(0)
    known = ViT(CONFIG, 3)
    names = {id(p): name for name, p in known.named_parameters()}
    groups = parameter_groups(known, OptimConfig(**OPTIM))
    for group in groups:
        group["params"] = [p for p in group["params"] if names[id(p)] in matrices(known)]
    groups = [group for group in groups if group["params"]]
    reference = torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw")
    for step, lr in enumerate((0.01, 0.03, 0.02)):
        fill_gradients(model, step)
        fill_gradients(known, step)
        for group in reference.param_groups:
            group["lr"] = lr * group["lr_factor"]
        optimizer.step(lr, torch.tensor(1.0))
        reference.step()
    parameters, expected = (dict(m.named_parameters()) for m in (model, known))
    for name in matrices(model):
        torch.testing.assert_close(parameters[name], expected[name], rtol=0, atol=5e-4)
        momentum = optimizer.state()[f"{name}.momentum"]
        kept = reference.state[expected[name]]["momentum_buffer"]
        torch.testing.assert_close(momentum, kept, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24), (1, 5)])
def test_orthogonal_against_singular_vectors(shape):
    torch.manual_seed(0)
    found = torch.randn(3, *shape) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    for matrix, update in zip(found.double(), orthogonal(found).double(), strict=True):
        U, values, Vh = torch.linalg.svd(matrix, full_matrices=False)
        expected = values / values.norm()
        for _ in range(5):
            expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
        torch.testing.assert_close(update, U * expected @ Vh, rtol=0, atol=1e-4)
        assert (expected[values > values.max() / 20] > 0.65).all()
        assert expected.max() < 1.25
    assert orthogonal(torch.zeros(1, *shape)).count_nonzero() == 0


def test_other_parameters_use_adamw():
    """All gradients are clipped by one norm."""
    (model, optimizer), (own, other) = make_model(name="muon"), make_model()
    for m in (model, own):
        fill_gradients(m, 0)
    norm, skipped = optimizer.step(0.01, torch.tensor(1.0))
    expected, _ = other.step(0.01, torch.tensor(1.0))
    assert norm == expected > 1
    assert skipped == 0
    known, state, parts = dict(own.named_parameters()), other.state(), optimizer.state()
    assert len(matrices(model)) == 3 * 4
    for name, parameter in model.named_parameters():
        by_muon = name in matrices(model)
        assert torch.equal(parameter, known[name]) != by_muon, name
        assert parameter.grad is None
        if by_muon:
            # After one step, they are 5% and 10% of the clipped gradient.
            half = state.pop(f"{name}.exp_avg") / 2
            torch.testing.assert_close(parts.pop(f"{name}.momentum"), half)
    assert all(torch.equal(value, state[key]) for key, value in parts.items())


def test_a_step_does_not_synchronize():
    """A step runs on the meta device, where no value can be read."""
    with torch.device("meta"):
        model = ViT(CONFIG, 3)
        optimizer = Optimizer(model, OptimConfig(name="muon"))
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.muon.step(0.1, torch.zeros(()))


@pytest.mark.parametrize("size", [2, 3])  # with three, shards differ in their number of rows
def test_steps_of_a_sharded_model(tmp_path, size):
    """Bit-identical to Muon on the full model: each process computes every full update."""
    config = OptimConfig(name="muon", weight_decay=0.1)
    model_config = ViTConfig(dim=16, depth=2, num_heads=2, num_kv_heads=1, patch_size=8)

    def trained(world):
        torch.manual_seed(0)
        model = ViT(model_config, 3)
        if world is not None:
            for block in model.blocks:
                fully_shard(block, mesh=init_device_mesh("cpu", (world.size,)))
        optimizer = Optimizer(model, config)
        draw = torch.Generator().manual_seed(1)
        for skipped in (0.0, 1.0, 0.0):
            for parameter in optimizer.named.values():
                gradient = torch.randn(parameter.shape, generator=draw)
                parameter.grad = distribute_like(gradient, parameter)
            optimizer.muon.step(0.1, torch.tensor(skipped))
        return model, optimizer

    full = {name: p.detach() for name, p in trained(None)[0].named_parameters()}

    def step(rank):
        with process_world(gpu=False, timeout_minutes=5) as world:
            model, optimizer = trained(world)
            state = gather_full(optimizer.state(), world)
            parts = gather_full(dict(model.named_parameters()), world)
        right = rank or all(torch.equal(parts[name], full[name]) for name in full)
        momentum = state["blocks.0.ffn.expand.weight.momentum"]
        os._exit(not right or momentum.numel() != (0 if rank else 64 * 16))

    assert finish(start([["--out", str(tmp_path / "run")]] * size, step)) == [0] * size
