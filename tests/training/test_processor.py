"""Choices for training on a CPU, from measurements of the encoder block."""

import dataclasses

import pytest
import torch

from vitral import kernels, settings
from vitral.engines import profile
from vitral.training import processor
from vitral.training.processor import Block, choose, num_graphs

TINY = "--model.dim 16 --model.depth 3 --train.batch-size 4"
LONG = 10**13  # images
HEAD = "--train.trainable head --train.ema-decay 0 --augment.mixup 0 --augment.cutmix 0"


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Seconds of the candidates by decision; a missing one counts as 1."""
    found = {}

    def recall(decision, shape, names, measure):
        return {name: found.get(decision, {}).get(name, 1.0) for name in names}

    monkeypatch.delenv("VITRAL_PROFILE")
    monkeypatch.setattr(profile, "recall", recall)
    monkeypatch.setattr(processor, "can_compile", lambda device: True)
    monkeypatch.setattr(kernels, "has_onednn", lambda: True)
    return found


def chosen(words="", images=LONG, precision="fp32", threads=4):
    return choose(settings.load("digits", f"{TINY} {words}".split()), precision, threads, 4, images)


def test_without_a_profile_the_defaults_are_used():
    assert dataclasses.astuple(chosen()) == (4, False, False)
    assert dataclasses.astuple(chosen("--train.compile always")) == (4, False, True)


@pytest.mark.parametrize(
    ("seconds", "threads"),
    [
        ({"4": 1.0, "2": 0.97, "1": 2.0}, 4),
        ({"4": 1.0, "2": 0.9, "1": 0.95}, 2),
        ({"4": 3.0, "2": 2.0, "1": 1.0}, 1),
    ],
)
def test_more_threads_are_not_used_if_fewer_are_faster(measured, seconds, threads):
    measured["number of threads"] = seconds
    before = torch.get_num_threads()
    assert chosen().threads == threads
    assert chosen("--train.threads 3").threads == 3
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("words", "precision", "fused"),
    [
        ("", "fp32", True),
        ("--train.compile always", "fp32", True),
        ("--model.kernels plain", "fp32", False),
        ("", "bf16", False),
    ],
)
def test_the_faster_linear_layers_are_used_if_supported(measured, words, precision, fused):
    measured["linear layers"] = {"torch": 1.0, "oneDNN": 0.8}
    assert chosen(words, precision=precision).fused is fused
    measured["linear layers"] = {"torch": 1.0, "oneDNN": 0.97}
    assert not chosen(words, precision=precision).fused


@pytest.mark.parametrize(
    ("words", "graphs"),
    [
        ("", 2),
        ("--train.progressive 8 0.5 16 0.5", 3),
        ("--model.stochastic-depth 0.05", 3),  # rates 0, 0.025, 0.05
        ("--model.stochastic-depth 0.4", 4),  # rates 0, 0.2, 0.4
    ],
)
def test_the_number_of_compilations(words, graphs):
    assert num_graphs(settings.load("digits", f"{TINY} {words}".split())) == graphs


def test_compiling_must_save_more_time_than_it_takes(measured, monkeypatch):
    """Three blocks save 0.2 s for each four images; two graphs take 30 s each: 400 images."""
    measured["compilation"] = {"eager": 1.0, "compiled": 0.8, "compilation": 30.0}
    monkeypatch.setattr(processor, "MIN_FLOPS", 0)
    assert not chosen(images=396).compile
    assert chosen(images=404).compile
    assert not chosen("--train.compile never").compile
    assert not chosen(f"{HEAD} --train.init weights").compile
    monkeypatch.setattr(processor, "MIN_FLOPS", 1e12)
    assert not chosen(images=404).compile
    monkeypatch.setattr(processor, "can_compile", lambda device: False)
    assert not chosen().compile


def test_compiling_must_be_clearly_faster(measured):
    measured["compilation"] = {"eager": 1.0, "compiled": 0.96, "compilation": 1.0}
    assert not chosen().compile


def test_both_implementations_of_the_block_compute_the_same():
    """The passes of a measurement are those of the model at the settings of the run."""
    config = settings.load("cifar10", "--model.dim 48 --model.num-heads 6".split()).model
    block = Block.of(config, "fp32", 4)
    assert block.images == 4
    assert block.shape["input"] == "4 x 69"
    assert Block.of(config, "fp32", 1000).images == 2**19 // (69 * 48)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        product = kernels.onednn_linear
        patch.setattr(kernels, "onednn_linear", lambda *args: calls.append(1) or product(*args))
        block.passes(fused=False)()
        assert calls == []
        block.passes(fused=True)()
    assert len(calls) == (4 if kernels.has_onednn() else 0)


@pytest.mark.slow
def test_compilation_is_measured():
    seconds = Block.of(settings.load("digits", TINY.split()).model, "fp32", 2)._time_compilation(
        fused=False
    )
    assert seconds.keys() == {"eager", "compiled", "compilation"}
    assert seconds["compilation"] > 100 * seconds["compiled"]
