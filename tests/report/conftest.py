"""Fixtures of the report tests: a finished run on digits, and its expected predictions."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from vitral import train, weights

TINY = "--model.dim 16 --model.depth 2 --train.epochs 4 --optim.warmup-epochs 0 --train.threads 1"
TINY += " --train.log-every 5 --train.eval-every 2 --train.ema-decay 0.9"


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished run on digits, with EMA."""
    out = tmp_path_factory.mktemp("runs") / "a run & more"
    return train("digits", *TINY.split(), "--out", str(out))


@pytest.fixture(scope="session")
def answers(run):
    """Labels and calibrated probabilities of the held-out digits.

    They are computed without vitral's input pipeline.
    """
    found = weights.load(run)
    data = found.description.config.data
    raw, labels = load_digits(return_X_y=True)
    gray = torch.from_numpy(np.rint(raw[-360:] * 255 / 16) / 255).float().view(-1, 1, 8, 8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    with torch.no_grad():
        logits = found.model((gray - mean) / std) / found.description.temperature
        return labels[-360:].tolist(), logits.softmax(1).double()
