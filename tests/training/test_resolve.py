"""What is chosen by measuring, and what is not."""

import dataclasses

import pytest
import torch

from vitral import recipes
from vitral.training import resolve as chosen
from vitral.training.distributed import World
from vitral.training.resolve import build_model, compiled, resolve

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(chosen, "fused_is_faster", lambda *_: True)


@pytest.fixture
def model():
    return build_model(recipes.load("digits"), 10)


@pytest.mark.parametrize(("words", "fused"), [([], True), (["--train.reproducible"], False)])
def test_no_clock_decides_what_a_reproducible_run_sums_up(model, words, fused):
    assert resolve(recipes.load("digits", words), model, CPU).fused is fused


def test_own_kernels_must_be_faster_for_every_process(model):
    class Unlike(World):
        def gather(self, value):
            return [value, False] if value is True else [value]

    assert not resolve(recipes.load("digits"), model, CPU, Unlike()).fused


@pytest.mark.parametrize("fused", [True, False])
def test_the_model_runs_what_was_chosen(model, fused):
    resolved = resolve(recipes.load("digits"), model, CPU)
    compiled(model, dataclasses.replace(resolved, fused=fused))
    assert all(block.ffn.fused is fused for block in model.blocks)
