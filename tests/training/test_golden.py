"""The loss curve of a tiny run, which shows any change of the mathematics.

After an intended change, replace GOLDEN with the printed values and give the reason in the commit.
"""

import pytest
import torch
from torch.torch_version import TorchVersion

from vitral import train
from vitral.rundir import read_rows

SETTINGS = """
--model.dim 32 --model.depth 2 --model.num-heads 4 --model.num-kv-heads 2 --model.num-registers 1
--model.qk-norm --model.layer-scale 0.1 --model.dropout 0.1 --model.stochastic-depth 0.1
--augment.crop padded --augment.crop-padding 1 --augment.policy autoaugment-cifar10
--augment.erasing 0.1 --augment.mixup 0.8 --augment.cutmix 1 --augment.mix-until 0.2
--optim.warmup-epochs 0.5 --train.epochs 4 --train.batch-size 96 --train.micro-batch 32
--train.ema-decay 0.9
--train.log-every 5 --train.label-smoothing 0 --train.threads 1
"""
GOLDEN = [
    *(2.3036, 2.30495, 2.2857, 2.28349, 2.27719, 2.28238, 2.25066, 2.24932, 2.24555, 2.22396),
    *(2.22337, 2.21868),  # the training loss; then the gradient norm and the validation losses
    *(0.88647, 2.20101, 2.20216),
]


@pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.14",
    reason="older versions draw truncated normals differently",
)
def test_loss_curve_of_a_tiny_run(tmp_path):
    run = train("digits", *SETTINGS.split(), "--out", str(tmp_path / "run"))
    rows = read_rows(run / "metrics.jsonl")
    curve = [round(row["loss"], 5) for row in rows]
    final = [round(rows[-1][name], 5) for name in ("grad_norm", "val_loss", "ema_loss")]
    print(curve + final)
    # Other processors add in another order.
    assert curve + final == pytest.approx(GOLDEN, rel=3e-4)
