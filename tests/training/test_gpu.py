"""Tests that need a GPU: pytest -m gpu"""

import dataclasses

import pytest
import torch

from vitral import settings, train
from vitral.rundir import read_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # torch 2.11's compiler warns about its own code
]

SETTINGS = """
--data synthetic --model.dim 64 --model.depth 2 --model.num-heads 2 --model.num-kv-heads 1
--model.patch-size 8 --model.image-size 64 --augment.policy trivialaugment --augment.mixup 0.8
--optim.warmup-epochs 0.5 --train.epochs 2 --train.eval-every 1 --train.batch-size 256
--train.log-every 1 --train.ema-decay 0.9 --train.device cuda
"""


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_deterministic_run_resumes_exactly(tmp_path, optimizer):
    """A run that resumes from a checkpoint in its middle equals an uninterrupted run."""
    words = [*SETTINGS.split(), "--train.deterministic", "--train.checkpoint-steps", "7"]
    words += ["--optim.name", optimizer]
    uninterrupted = train("digits", *words, "--out", str(tmp_path / "uninterrupted"))
    resumed = train("digits", *words, "--out", str(tmp_path / "resumed"))
    for checkpoint in sorted((resumed / "checkpoints").iterdir())[1:]:
        checkpoint.rename(tmp_path / checkpoint.name)
    train("digits", *words, "--out", str(tmp_path / "resumed"))
    for name in ("model", "ema"):
        file = f"weights/last/{name}.safetensors"
        assert (uninterrupted / file).read_bytes() == (resumed / file).read_bytes()


def test_bf16_and_compile_follow_float32(tmp_path):
    """The loss curves of bf16 with compilation and of plain float32 are close."""
    curves = []
    for kind, compiled in (("bf16", "always"), ("fp32", "never")):
        words = [*SETTINGS.split(), "--train.precision", kind, "--train.compile", compiled]
        run = train("digits", *words, "--out", str(tmp_path / kind))
        curves.append([row["loss"] for row in read_rows(run / "metrics.jsonl")])
    assert curves[0] == pytest.approx(curves[1], abs=0.05)


def test_micro_batch_is_halved_until_it_fits():
    from vitral.training.resolved import build_model, resolve

    config = settings.load("imagenet-b16-300ep", ["--train.compile", "never"])
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, batch_size=1 << 16)
    )
    model = build_model(config, 1000).cuda()
    resolved = resolve(config, model, torch.device("cuda"))
    assert 2 <= resolved.micro_batch < 1 << 16
    assert resolved.micro_batch % 2 == 0
