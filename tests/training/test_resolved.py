"""Choices that depend on the machine, and choices that do not."""

import dataclasses
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from vitral import kernels, settings
from vitral.engines import onednn
from vitral.errors import UserError
from vitral.model import ViT
from vitral.rundir import RunDir
from vitral.training import processor
from vitral.training import resolved as chosen
from vitral.training.checkpoint import Checkpoint
from vitral.training.distributed import World
from vitral.training.resolved import (
    Resolved,
    _try_batch,
    build_model,
    compiled,
    resolve,
    resolve_resumed,
)

CPU = torch.device("cpu")


CHOICES = processor.Choices(threads=3, fused=True, compile=True)


@pytest.fixture(autouse=True)
def _measured(monkeypatch):
    monkeypatch.setattr(processor, "choose", lambda *_: CHOICES)
    monkeypatch.setattr(chosen, "can_compile", lambda device: True)


@pytest.fixture
def model():
    return build_model(settings.load("digits"), 10)


@pytest.mark.parametrize(("words", "measured"), [([], True), (["--train.reproducible"], False)])
def test_a_reproducible_run_does_not_depend_on_timing(model, words, measured):
    resolved = resolve(settings.load("digits", words), model, CPU)
    assert (resolved.threads, resolved.fused, resolved.compile) == (
        (3, True, True) if measured else (1, False, False)
    )


def test_a_reproducible_run_uses_one_thread():
    """torchrun gives each process one thread, while a plain run uses all cores."""
    config = settings.load("digits", ["--train.reproducible"])
    assert resolve(config, build_model(config, 10), CPU).threads == 1


def test_every_process_must_be_able_to_compile(model):
    class DifferingWorld(World):
        def gather(self, value):
            return [value, False] if value is True else [value]

    resolved = resolve(settings.load("digits"), model, CPU, DifferingWorld())
    assert (resolved.fused, resolved.compile) == (True, False)


def test_processes_use_the_choices_of_the_first(model):
    class Second(IdenticalWorld):
        def broadcast(self, value):
            assert value is None
            return dataclasses.replace(CHOICES, threads=5)

    config = settings.load("digits", ["--train.batch-size", "16"])
    assert resolve(config, model, CPU, Second(1, 2, 1, 2)).threads == 5


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_an_accelerator_other_than_cuda_runs_plain_float32(model, kind, monkeypatch):
    monkeypatch.setattr(processor, "choose", pytest.fail)
    resolved = resolve(settings.load("digits"), model, torch.device(kind))
    assert resolved.device == kind
    assert resolved.precision == "fp32"
    assert not resolved.compile
    assert not resolved.fused
    assert resolved.micro_batch == 64


@pytest.mark.parametrize("fused", [True, False])
def test_the_model_uses_the_chosen_kernels(model, fused, monkeypatch):
    monkeypatch.setattr(kernels, "has_feed_forward", lambda device: True)
    resolved = resolve(settings.load("digits"), model, CPU)
    compiled(model, dataclasses.replace(resolved, fused=fused))
    assert all(block.ffn.fused is fused for block in model.blocks)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch 2.11 warns about itself
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch warns about itself
def test_every_size_is_compiled(monkeypatch):
    """Eleven image sizes, more than torch's default limit of 8 recompilations."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    config = settings.load("digits", ["--model.depth", "1"])
    resolved = Resolved("cpu", "fp32", True, 1, 2, 1, "cpu", False)
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        run = compiled(build_model(config, 10), resolved)
        for image_size in range(4, 26, 2):
            run(torch.zeros(2, 3, image_size, image_size))
    torch.compiler.reset()
    assert counters["stats"]["unique_graphs"] == 11


def again(was, words, processes=1, run="runs/x"):
    """Returns the choices of a resumed run that started with `was`."""
    config = settings.load("digits", words)
    found = Checkpoint(5, {}, {"resolved": was})
    world = IdenticalWorld(0, processes, 0, processes)
    return resolve_resumed(found, config, build_model(config, 10), RunDir(run), CPU, world)


class IdenticalWorld(World):
    """One of several processes that all have the same values."""

    def gather(self, value):
        return [value] * self.size

    def broadcast(self, value):
        return value


WAS = Resolved("cpu", "bf16", True, 3, 10, 2, "gpu", True)


def test_a_resumed_run_keeps_its_choices():
    """Regardless of what the settings and this machine would choose now."""
    words = "--train.precision fp32 --train.compile never --train.threads 1".split()
    assert again(WAS, words, processes=2) == WAS


@pytest.mark.parametrize("fused", [True, False])
def test_another_number_of_processes_changes_the_micro_batch(fused):
    was = dataclasses.replace(WAS, fused=fused)
    now = again(was, ["--train.batch-size", "16", "--train.threads", "1"], processes=4)
    assert now == dataclasses.replace(was, processes=4, micro_batch=4, threads=3)


def test_a_reproducible_run_keeps_its_choices_on_other_processes():
    now = again(WAS, ["--train.reproducible", "--train.batch-size", "16"], processes=4)
    assert now == dataclasses.replace(WAS, processes=4)


def test_a_gpu_run_does_not_resume_on_a_cpu():
    with pytest.raises(
        UserError, match=r"train\.device: the run in runs/x started on cuda, not cpu"
    ):
        again(dataclasses.replace(WAS, device="cuda"), [], processes=2)


def test_a_compiled_run_does_not_resume_without_a_compiler(monkeypatch):
    monkeypatch.setattr(chosen, "can_compile", lambda device: False)
    with pytest.raises(UserError, match=r"train\.compile: the run in runs/x is compiled"):
        again(WAS, [], processes=2)
    was = dataclasses.replace(WAS, compile=False)
    assert again(was, [], processes=2) == was


@pytest.mark.parametrize(
    ("words", "micro_batch"),
    [("", 64), ("--train.batch-size 24", 24), ("--train.micro-batch 10", 10)],
)
def test_a_micro_batch_is_at_most_the_batch(model, words, micro_batch):
    assert resolve(settings.load("digits", words.split()), model, CPU).micro_batch == micro_batch


def test_weights_depend_on_the_seed():
    first, same, other = (
        build_model(settings.load("digits", ["--seed", seed]), 10).state_dict() for seed in "112"
    )
    assert all(first[name].equal(same[name]) for name in first)
    random_names = [name for name in first if name.endswith("weight") and "norm" not in name]
    assert [n for n in random_names if first[n].equal(other[n]) and n != "head.weight"] == []


class Allocations(TorchDispatchMode):
    """Records the shapes and the bytes of new tensors."""

    def __init__(self):
        super().__init__()
        self.shapes, self.ballast = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.zeros.default:
            self.shapes.append(tuple(result.shape))
        if function is torch.ops.aten.empty.memory_format and result.dtype == torch.uint8:
            self.ballast = result.nbytes
        return result


@pytest.mark.parametrize(("words", "copies"), [([], 4), (["--train.reproducible"], 7)])
def test_a_micro_batch_is_tried_at_the_largest_size_with_all_copies(model, words, copies):
    """A reproducible run stores gradients of 4, 2 and 1 shards while it computes the 8th."""
    sizes = "16 0.3 32 0.4 24 0.3"  # of the model: 8
    config = settings.load("digits", [*words, "--train.progressive", *sizes.split()])
    resolved = Resolved("cuda", "fp32", False, 1, 2, 1, "cpu", False)
    with Allocations() as made:
        _try_batch(2, resolved, config, model, CPU)
    assert made.shapes[0] == (2, 3, 32, 32)
    assert made.ballast == copies * 4 * model.num_parameters + 24 * 2 * 3 * 32 * 32


@pytest.mark.skipif(not kernels.has_onednn(), reason="torch does not support oneDNN here")
def test_inference_in_a_run_uses_onednn_if_its_training_does(model):
    resolved = Resolved("cpu", "fp32", False, 1, 2, 1, "cpu", True)
    assert isinstance(resolved.for_inference(model), onednn.CLASSES[ViT])
    for other in ({"fused": False}, {"compile": True}, {"precision": "bf16"}):
        assert dataclasses.replace(resolved, **other).for_inference(model) is model
