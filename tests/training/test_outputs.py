"""Output files of a run: weights, tables, plots and the report; and its first messages."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from vitral import settings, weights
from vitral.data.formats import open_dataset
from vitral.evaluation import Scores
from vitral.report import curves, html
from vitral.rundir import RunDir
from vitral.training import Parts, outputs, train
from vitral.training.outputs import Outputs
from vitral.training.resolved import Resolved, build_model
from vitral.training.resume import Progress

from .processes import damage, digests, make_config, newest

RESOLVED = Resolved("cpu", "fp32", False, 3, 16, 1, "cpu", False)


class Recorder:
    """A console and a log that record their input."""

    def __init__(self):
        self.lines, self.pictures = [], []

    def message(self, text):
        self.lines.append(text)

    def picture(self, grid):
        self.pictures.append(grid)


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def make_outputs(tmp_path, recorder):
    """Returns a function that makes the outputs of a new run with the given parts."""
    config = settings.load("digits", ["--model.dim", "16", "--model.depth", "1"])
    dataset = open_dataset(config.data, 8, 0)

    def make(parts=None):
        run = RunDir(tmp_path)
        return Outputs(config, dataset, run, recorder, recorder, parts or Parts())

    return make


FACTS = {"step": 0, "workers": 2, "parameters": 1.5e6, "flops_per_image": 2.5e9}


def test_start_is_announced_and_recorded(make_outputs, recorder):
    make_outputs().announce(RESOLVED, FACTS, 1000, {"cpu": 1234.0, "gpu": 900.0})
    first, second, third = recorder.lines
    assert first.endswith(
        "starts: digits, 1,437 training images, 360 validation images, "
        "10 classes: 0, 1, 2 and 7 more"
    )
    assert second == "decoder: cpu; measured img/s: cpu 1,234, gpu 900"
    assert third == (
        "1.50 M parameters, 2.500 GFLOPs per image; 1,000 steps of 64 images in micro-batches of "
        "16, on cpu in fp32, threads: 3, workers: 2"
    )
    environment = json.loads(make_outputs().run.environment.read_text())
    assert environment["resolved"] == dataclasses.asdict(RESOLVED)
    assert environment["decode_rates"] == {"cpu": 1234.0, "gpu": 900.0}
    assert {name: environment[name] for name in FACTS} == FACTS
    assert "numpy" in environment["packages"]


def test_resumed_compiled_and_fused_runs_are_announced(make_outputs, recorder):
    resolved = dataclasses.replace(RESOLVED, compile=True, fused=True, processes=4)
    make_outputs().announce(resolved, {**FACTS, "step": 7}, 1000, {})
    assert "resumes from step 7: digits" in recorder.lines[0]
    assert recorder.lines[1].endswith(
        "in fp32, compiled, oneDNN linear layers, threads: 3, workers: 2, in each of 4 processes"
    )


def test_the_image_of_the_first_batch_shows_model_inputs(make_outputs, recorder):
    levels = torch.tensor([0, 0.25, 0.5, 1.0]).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    make_outputs().save_batch((levels - 0.5) / 0.5)
    picture = np.asarray(Image.open(make_outputs().run.train_batch)).astype(int)
    assert np.array_equal(recorder.pictures[0].shape, (3, *picture.shape[:2]))
    middle = picture[picture.shape[0] // 2]
    columns = np.linspace(0, len(middle), 9).astype(int)[1::2]  # the centers of four tiles
    assert np.abs(middle[columns] - [[0], [64], [128], [255]]).max() <= 3


def scores(seed):
    draw = np.random.default_rng(seed)
    ranked = np.argsort(draw.random((20, 10)))[:, :5]
    return Scores(tuple("0123456789"), draw.integers(0, 10, 20), ranked, draw.random(20), ranked)


def test_tables_are_of_the_last_validation_and_the_report_of_the_best(make_outputs):
    work, progress = make_outputs(), Progress()
    assert work.reported is None
    for step, best, reported in ((5, 5, 5), (10, 5, 5), (15, 15, 15), (20, 15, 15)):
        progress.step, progress.best = step, {"step": best, "top1": 0.5}
        work.record_scores(scores(step), progress)
        assert work.reported[0] == reported
        rows = (work.run.path / "per_class.csv").read_text().splitlines()[1:]
        counts = {row.split(",")[0]: int(row.split(",")[1]) for row in rows}
        labels, expected = np.unique(scores(step).labels, return_counts=True)
        assert counts == dict(zip(map(str, labels), expected, strict=True))


def test_after_a_resume_the_report_is_of_the_last_validation_until_there_is_a_better(make_outputs):
    work, progress = make_outputs(), Progress(best={"step": 5, "top1": 0.9})
    for step, best, reported in ((10, 5, 10), (15, 5, 15), (20, 20, 20), (25, 20, 20)):
        progress.step, progress.best["step"] = step, best
        work.record_scores(scores(step), progress)
        assert work.reported[0] == reported


def test_curves_are_drawn_once_a_minute(make_outputs, monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(outputs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(curves, "draw", lambda path, rows: calls.append((now[0], path)))
    work = make_outputs()
    for second in (10, 59, 61, 100, 121, 122):
        now[0] = second
        work.draw_curves()
    work.draw_curves(force=True)
    assert calls == [(second, work.run.curves) for second in (61, 122, 122)]


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (None, "resumed after its last validation"),
        (Parts(name="other", model=torch.nn.Module), "the model is not vitral's: other"),
    ],
)
def test_the_report_gives_the_reason_for_missing_predictions(
    make_outputs, monkeypatch, parts, reason
):
    written = []
    monkeypatch.setattr(html, "write_report", lambda *args: written.append(args))
    monkeypatch.setattr(outputs, "read_run", lambda path: path)
    work = make_outputs(parts)
    work.write_report(Progress())
    ((_, path, predictions, missing),) = written
    assert (path, predictions) == (work.run.report, None)
    assert reason in missing


def test_only_the_weights_of_a_vit_are_written(make_outputs):
    work = make_outputs()
    states = {"model": build_model(work.config, 10).state_dict()}
    make_outputs(Parts(name="other", model=torch.nn.Module)).save_weights(states, ["last"], {}, {})
    assert not work.run.weights.exists()
    work.save_weights(states, ["last", "best"], {"step": 3, "val_top1": 0.25}, {})
    assert {path.name for path in work.run.weights.iterdir()} == {"best", "last"}
    found = weights.load(work.run.last)
    assert found.description.metrics == {"step": 3, "val_top1": 0.25}
    assert all(states["model"][name].equal(v) for name, v in found.model.state_dict().items())


def test_damaged_weights_are_restored_from_their_checkpoints(image_folder, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    config = make_config(image_folder, out)
    before = digests(out)
    known = [weights.load(out / "weights" / name).description for name in ("best", "last")]
    shutil.rmtree(out / "weights" / "last")
    damage(out / "weights" / "best" / "ema.safetensors", "flipped")
    train(config)
    assert digests(out) == before
    for name, was in zip(("best", "last"), known, strict=True):
        now = weights.load(out / "weights" / name).description
        assert now == dataclasses.replace(was, config=now.config)
    log = (out / "train.log").read_text()
    assert "weights/best restored" in log
    assert "weights/last restored" in log
    train(config)
    assert (out / "train.log").read_text().count(" restored from ") == 2


def test_weights_that_cannot_be_restored_are_reported(image_folder, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    best = min((out / "checkpoints").iterdir())
    assert best != newest(out)
    shutil.rmtree(best)
    shutil.rmtree(out / "weights" / "best")
    train(make_config(image_folder, out))
    assert f"weights/best cannot be restored: {best}" in (out / "train.log").read_text()


def test_weights_are_updated_with_the_path_of_moved_data(image_folder, finished, tmp_path):
    out, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(finished, out)
    shutil.copytree(image_folder, moved)
    for name in ("best", "last"):
        assert weights.load(out / "weights" / name).description.config.data.path != str(moved)
    train(make_config(moved, out))
    for name in ("best", "last"):
        assert weights.load(out / "weights" / name).description.config.data.path == str(moved)


def test_weights_newer_than_their_checkpoint_are_kept(make_outputs, monkeypatch):
    """The resumed run reaches their step again."""
    work = make_outputs()
    states = {"model": build_model(work.config, 10).state_dict()}
    work.save_weights(states, ["last", "best"], {"step": 9}, {})
    restored = []
    monkeypatch.setattr(work, "_restore", lambda name, step: restored.append((name, step)))
    work.restore_weights(Progress(step=6, evaluated=6, best={"step": 3, "top1": 0.1}))
    assert restored == []
    work.restore_weights(Progress(step=12, evaluated=12, best={"step": 9, "top1": 0.1}))
    assert restored == [("last", 12)]
    work.restore_weights(Progress(step=14, evaluated=12, best={"step": 12, "top1": 0.1}))
    assert restored == [("last", 12), ("best", 12)]  # the next validation writes weights/last
    work.restore_weights(Progress(step=2))
    assert len(restored) == 2
