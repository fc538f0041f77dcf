"""The training loop against a plain loop, and its logs, weights and messages."""

import math
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitral import settings, storage, weights
from vitral.config import Config
from vitral.data.formats import open_dataset
from vitral.data.sampling import permutation
from vitral.errors import UserError
from vitral.evaluation import Scores
from vitral.rundir import RunDir, read_rows, read_run
from vitral.training import Interrupted, checkpoint, loop, train
from vitral.training.resolved import build_model

TINY = """
--model.dim 16 --model.depth 1 --model.kernels plain --train.threads 1 --train.epochs 2
--train.batch-size 96 --train.micro-batch 32 --optim.warmup-epochs 0.5 --optim.eps 1e-3
--optim.clip-norm 0.5 --train.ema-decay 0.9 --train.log-every 1 --train.eval-every 2
--augment.rotation 0 --augment.zoom 0 --augment.shear 0 --augment.shift 0 --augment.mixup 0
""".split()
STEPS = 30  # 2 * 1,437 images in batches of 96


def trained(out, *words):
    return RunDir(train("digits", *TINY, "--out", str(out), *words))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("loop") / "run")


def test_a_run_equals_a_plain_loop(run):
    """Full batches without augmentation, torch's AdamW and clipping, and a moving average."""
    config = settings.load(str(run.config))
    train_set = open_dataset(config.data, 8, config.train.seed).train
    model = build_model(config, 10)
    decayed = {n for n, p in model.named_parameters() if p.ndim == 2 and n.endswith("weight")}
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in decayed) is wanted]}
        for wanted in (True, False)
    ]
    groups[0]["weight_decay"], groups[1]["weight_decay"] = 0.1, 0.0
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-3)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    order = np.concatenate([permutation(0, epoch, 1437) for epoch in range(3)])
    rows = read_rows(run.metrics)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for step, row in enumerate(rows):
        batch = order[96 * step : 96 * (step + 1)]
        images = (train_set.images[batch] / 255 - 0.5) / 0.5
        labels = torch.from_numpy(np.asarray(train_set.labels)[batch])
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        warmup = 7  # of 14.97 steps an epoch
        passed = (step + 1 - warmup) / (STEPS + 1 - warmup)
        factor = (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * passed)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * factor
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.9, (step + 1) / (step + 10))
        for name, parameter in model.named_parameters():
            average[name].mul_(decay).add_(parameter.detach(), alpha=1 - decay)
        expected = {"loss": loss.item(), "grad_norm": norm.item(), "lr": 3e-3 * factor}
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    val_set = open_dataset(config.data, 8, config.train.seed).val
    images = (val_set.images / 255 - 0.5) / 0.5
    labels = torch.from_numpy(np.asarray(val_set.labels))
    for kind, tensors in (("model", dict(model.named_parameters())), ("ema", average)):
        logits = torch.func.functional_call(model.eval(), tensors, images)
        name = "val" if kind == "model" else kind
        assert rows[-1][f"{name}_loss"] == pytest.approx(
            F.cross_entropy(logits, labels).item(), rel=1e-4
        )
        found = storage.read_tensors(run.last, kind)
        assert found.keys() == tensors.keys()
        for name, value in tensors.items():
            torch.testing.assert_close(found[name], value.detach(), rtol=1e-3, atol=1e-5)


def test_rows_are_means_of_the_steps_since_the_last_row(run, tmp_path):
    each = read_rows(run.metrics)
    rows = read_rows(trained(tmp_path / "run", "--train.log-every", "8").metrics)
    assert [row["step"] for row in rows] == [8, 16, 24, STEPS]
    for first, row in zip((0, 8, 16, 24), rows, strict=True):
        step = int(row["step"])
        for name in ("loss", "grad_norm"):
            values = [other[name] for other in each[first:step]]
            assert row[name] == pytest.approx(np.mean(values), rel=1e-6)
        assert row["lr"] == each[step - 1]["lr"]
        assert row["images"] == 96 * step
        assert row["epoch"] == pytest.approx(96 * step / 1437)
    assert rows[-1]["val_loss"] == each[-1]["val_loss"]


def test_a_run_without_a_directory_is_rejected():
    with pytest.raises(UserError, match=r"train\.out: expected a directory for the run, got none"):
        train(Config())


def test_repeating_a_finished_run_changes_nothing(run, capsys):
    before = {path: path.read_bytes() for path in run.path.rglob("*.*") if path.is_file()}
    trained(run.path)
    assert "this run is already finished: val top-1 " in capsys.readouterr().out
    changed = {path.name for path in before if path.read_bytes() != before[path]}
    assert changed <= {"train.log", ".lock"}


def scored(*accuracies):
    """Replaces validation: returns scores of 100 images with these top-1 accuracies, in turn."""
    left = iter(accuracies)

    def measure(self, signals):
        labels = np.zeros(100, np.int64)
        ranked = np.tile(np.arange(1, 6), (100, 1))
        ranked[: round(100 * next(left)), 0] = 0
        return Scores(self.classes, labels, ranked, np.ones(100), np.ones(100))

    return measure


@pytest.mark.parametrize(
    ("accuracies", "best", "default"),
    [
        ([(0.2, 0.1), (0.6, 0.3), (0.4, 0.5)], 2, "model"),
        ([(0.2, 0.9), (0.6, 0.3), (0.4, 0.5)], 1, "ema"),
        ([(0.2, 0.1), (0.1, 0.2), (0.1, 0.3)], 3, "ema"),
        ([(0.4, 0.1), (0.4, 0.1), (0.1, 0.4)], 1, "model"),  # the first of equals
    ],
)
def test_the_best_weights_are_those_of_the_best_validation(
    tmp_path, monkeypatch, accuracies, best, default
):
    flat = [factor for pair in accuracies for factor in pair]
    monkeypatch.setattr(loop.Validation, "measure", scored(*flat))
    monkeypatch.setattr(loop.Outputs, "write_report", lambda *_: None)
    words = "--train.epochs 3 --train.eval-every 1 --train.batch-size 480 --optim.warmup-epochs 0"
    run = trained(tmp_path / "run", *words.split())
    ends = [3, 6, 9]  # 1,437 images are three batches of 480, minus three
    rows = [row for row in read_rows(run.metrics) if "val_top1" in row]
    assert [(row["step"], row["val_top1"], row["ema_top1"]) for row in rows] == [
        (step, *pair) for step, pair in zip(ends, accuracies, strict=True)
    ]
    found, last = (weights.load(place) for place in (run.best, run.last))
    assert found.description.metrics["step"] == ends[best - 1]
    assert found.description.default == default
    assert last.description.metrics["step"] == 9
    tensors = checkpoint.read(run.checkpoints, ends[best - 1]).tensors[default]
    for name, value in found.model.state_dict().items():
        assert value.equal(tensors[name])
    lines = run.log.read_text()
    assert f"best {max(flat):.2%} at step {ends[best - 1]};" in lines


def measured(*losses):
    """Replaces validation: three images of class 0 and one of class 1, with these mean losses."""
    left = iter(losses)

    def measure(self, signals):
        # Top-1 rises while balanced accuracy and F1 fall.
        loss = next(left)
        ranked = np.zeros((4, 5), np.int64) if loss < 2 else np.array([[0], [1], [1], [1]])
        return Scores(self.classes, np.array([0, 0, 0, 1]), ranked, np.ones(4), np.full(4, loss))

    return measure


@pytest.mark.parametrize(("best_by", "best"), [("balanced", 1), ("f1", 1), ("loss", 3)])
def test_the_metric_that_selects_the_best_weights(tmp_path, monkeypatch, best_by, best):
    """Recalls of 1/3 and 1, F1 of 1/2 and 1/2; then recalls of 1 and 0, F1 of 6/7 and 0."""
    monkeypatch.setattr(loop.Validation, "measure", measured(3.0, 1.5, 1.0, math.nan))
    monkeypatch.setattr(loop.Outputs, "write_report", lambda *_: None)
    words = "--train.epochs 4 --train.eval-every 1 --train.batch-size 480 --train.ema-decay 0"
    run = trained(tmp_path / "run", *words.split(), "--train.best-by", best_by)
    rows = [row for row in read_rows(run.metrics) if "val_top1" in row]
    assert [row["val_top1"] for row in rows] == [0.5, 0.75, 0.75, 0.5]
    assert [row["val_balanced"] for row in rows] == pytest.approx([2 / 3, 0.5, 0.5, 2 / 3])
    assert [row["val_f1"] for row in rows] == pytest.approx([0.5, 3 / 7, 3 / 7, 0.5])
    assert weights.read_description(run.best)[1].metrics["step"] == 3 * best
    assert read_run(run.path).best == ("val", rows[best - 1])
    line = "epoch 1: val top-1 50.00%"
    line += {"balanced": ", balanced 66.67%", "f1": ", F1 50.00%"}.get(best_by, "")
    assert f"{line}  val loss 3.000" in run.log.read_text()


def test_training_stops_without_improvement(tmp_path, monkeypatch):
    """The better of raw and EMA weights counts. The last of five epochs is not trained."""
    flat = [0.5, 0.1, 0.4, 0.6, 0.6, 0.1, 0.5, 0.6]  # raw and EMA in turn
    monkeypatch.setattr(loop.Validation, "measure", scored(*flat))
    monkeypatch.setattr(loop.Outputs, "write_report", lambda *_: None)
    words = "--train.epochs 5 --train.eval-every 1 --train.batch-size 480 --train.patience 2"
    run = trained(tmp_path / "run", *words.split())
    assert read_rows(run.metrics)[-1]["step"] == 12
    assert checkpoint.read(run.checkpoints, 12).state["stale"] == 2
    assert weights.read_description(run.best)[1].metrics["step"] == 6


def test_a_checkpoint_is_written_after_the_set_time(tmp_path, monkeypatch):
    update = loop.Trainer._step

    def an_hour_passes(self, batches):
        update(self, batches)
        if self.progress.step == 4:
            self.last_checkpoint -= 3600

    monkeypatch.setattr(loop.Trainer, "_step", an_hour_passes)
    run = trained(tmp_path / "run", "--train.checkpoint-minutes", "30")
    assert sorted(checkpoint.steps(run.checkpoints)) == [4, STEPS]


def test_a_signal_stops_the_run(tmp_path, monkeypatch):
    update = loop.Trainer._step

    def interrupted(self, batches):
        if self.progress.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        update(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", interrupted)
        with pytest.raises(Interrupted) as error:
            trained(tmp_path / "run")
    assert error.value.exit_code == 143
    run = RunDir(tmp_path / "run")
    assert checkpoint.steps(run.checkpoints) == [6]
    assert "SIGTERM: stopped at step 6; repeat the command to resume" in run.log.read_text()
    assert read_rows(run.metrics)[-1]["step"] == 6
    run.lock()  # the interrupted run has released it
    run.unlock()
