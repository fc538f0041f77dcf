"""What is chosen by measuring, and what is not."""

import pytest
import torch

from vitral import recipes
from vitral.training import resolve as chosen
from vitral.training.resolve import build_model, resolve


@pytest.mark.parametrize(("words", "fused"), [([], True), (["--train.reproducible"], False)])
def test_no_clock_decides_what_a_reproducible_run_sums_up(monkeypatch, words, fused):
    monkeypatch.setattr(chosen, "fused_is_faster", lambda *_: True)
    config = recipes.load("digits", words)
    model = build_model(config, 10, init=False)
    assert resolve(config, model, torch.device("cpu")).fused is fused
