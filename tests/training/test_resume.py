"""A run that is killed and resumed equals an uninterrupted run."""

import dataclasses
import functools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vitral import settings, storage, weights
from vitral.data.formats import open_dataset
from vitral.data.sampling import Order
from vitral.errors import UserError
from vitral.model import ViT
from vitral.rundir import RunDir, read_rows, read_run
from vitral.training import checkpoint, resume, train
from vitral.training.balance import Balance
from vitral.training.checkpoint import Checkpoint
from vitral.training.distributed import World
from vitral.training.monitor import Counters
from vitral.training.optim import EMA, Optimizer
from vitral.training.parallel import AveragedGradients
from vitral.training.resolved import Resolved
from vitral.training.resume import Progress, State
from vitral.training.signals import SIGNAL_NUMBERS
from vitral.weights import read_description

from .processes import (
    TIMEOUT,
    damage,
    digests,
    finish_single,
    make_config,
    newest,
    signal_at,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

STEPS = 27  # of a run


@pytest.fixture(scope="module")
def uninterrupted(image_folder, tmp_path_factory):
    """Returns the digests of an uninterrupted run."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert finish_single(make_config(image_folder, out, data__workers=0)) == 0
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == list(range(1, STEPS + 1))
    return digests(out)


@pytest.mark.parametrize("workers", [(0, 1, 0), (1, 3, 0), (3, 0, 1)])
def test_a_run_killed_at_random_steps_resumes_exactly(
    image_folder, tmp_path, uninterrupted, workers
):
    at = sorted(random.sample(range(1, STEPS - 5), 2))
    print("killed at", at)
    for step, count in zip(at, workers, strict=False):
        config = make_config(image_folder, tmp_path / "run", data__workers=count)
        assert signal_at(config, step, signal.SIGKILL) == -signal.SIGKILL
    assert (
        finish_single(make_config(image_folder, tmp_path / "run", data__workers=workers[-1])) == 0
    )
    assert digests(tmp_path / "run") == uninterrupted


@pytest.mark.parametrize("number", SIGNAL_NUMBERS)
def test_signal_writes_a_checkpoint_and_exits_with_its_code(
    image_folder, tmp_path, uninterrupted, number
):
    config = make_config(image_folder, tmp_path / "run", train__checkpoint_steps=1000)
    assert signal_at(config, 5, number) == 128 + number
    last = int(newest(tmp_path / "run").name.removeprefix("step_"))
    steps = [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert last >= 5
    assert steps[-1] <= last
    assert finish_single(config) == 0
    assert digests(tmp_path / "run") == uninterrupted


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_a_signal_drops_the_unfinished_step(
    image_folder, tmp_path, uninterrupted, micro_batch, monkeypatch
):
    """A step has two micro-batches of 8 and 4 images."""
    accumulate, calls = AveragedGradients.accumulate, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == micro_batch:
            signal.raise_signal(signal.SIGTERM)
        return accumulate(*arguments, **options)

    config = make_config(image_folder, tmp_path / "run", train__checkpoint_steps=1000)
    with monkeypatch.context() as patch:
        patch.setattr(AveragedGradients, "accumulate", interrupted)
        assert finish_single(config) == 128 + signal.SIGTERM
    complete = micro_batch // 2
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == ([complete] if complete else [])
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"SIGTERM: stopped at step {complete}; " in log
    assert finish_single(config) == 0
    assert digests(tmp_path / "run") == uninterrupted


def test_muon_resumes_exactly(image_folder, tmp_path, uninterrupted):
    complete, killed = (
        make_config(image_folder, tmp_path / name, optim__name="muon")
        for name in ("complete", "killed")
    )
    assert finish_single(complete) == 0
    assert signal_at(killed, 11, signal.SIGKILL) == -signal.SIGKILL
    assert finish_single(killed) == 0
    assert digests(tmp_path / "killed") == digests(tmp_path / "complete") != uninterrupted


FLAT = {"train__eval_every": 1, "optim__lr": 1e-12}  # the first validation remains the best


def test_a_run_stops_early_at_the_same_step_after_a_resume(image_folder, tmp_path):
    """The validations without improvement before and after the resume add up."""
    complete, stopped = (
        make_config(image_folder, tmp_path / name, **FLAT, train__patience=4)
        for name in ("complete", "stopped")
    )
    assert finish_single(complete) == 0
    assert signal_at(stopped, 8, signal.SIGTERM) == 128 + signal.SIGTERM
    state = json.loads((newest(tmp_path / "stopped") / "state.json").read_text())
    assert 0 < state["stale"] < 4
    assert finish_single(stopped) == 0
    assert digests(tmp_path / "stopped") == digests(tmp_path / "complete")
    run = read_run(tmp_path / "stopped")
    assert run.rows[-1]["step"] == 17  # after epoch 5, of 40 images in batches of 12
    assert run.stopped_early
    assert run.finished
    log = (run.path / "train.log").read_text()
    assert "stopped at epoch 5: top-1 has not improved in 4 validations (train.patience); " in log
    assert "the learning rate schedule was planned for 8 epochs" in log
    before = (run.path / "metrics.jsonl").read_bytes()
    assert finish_single(stopped) == 0
    assert "this run is already finished" in (run.path / "train.log").read_text()
    assert (run.path / "metrics.jsonl").read_bytes() == before


CHOOSE = """
import sys
from vitral.cli import main
from vitral.training import processor
threads, fused, compiled, *words = sys.argv[1:]
choices = processor.Choices(int(threads), fused == "True", compiled == "True")
processor.choose = lambda *_: choices
sys.exit(main(["train", *words]))
"""


def start_with_choices(config, *choices):
    """Trains in a new process: a forked one hangs if torch has used several threads before."""
    file = Path(f"{config.train.out}.yaml")
    file.write_text(settings.dump(config))
    words = [sys.executable, "-c", CHOOSE, *map(str, choices), str(file), "--out", config.train.out]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_choice_for_a_cpu_resumes_exactly(image_folder, tmp_path, threads, fused, compiled):
    changes = {"model__depth": 3, "model__stochastic_depth": 0.2, "model__dropout": 0.1}
    complete, killed = (
        make_config(image_folder, tmp_path / name, data__workers=0, **changes)
        for name in ("complete", "killed")
    )
    choices = (threads, fused, compiled)
    assert start_with_choices(complete, *choices).wait(TIMEOUT) == 0
    child = start_with_choices(killed, *choices)
    while not any(row["step"] >= 11 for row in read_rows(tmp_path / "killed" / "metrics.jsonl")):
        time.sleep(0.001)
        assert child.poll() is None
    child.kill()
    assert child.wait() == -signal.SIGKILL
    # A resumed run does not choose again.
    other = (3 - threads, not fused, not compiled)
    assert start_with_choices(killed, *other).wait(TIMEOUT) == 0
    log = (tmp_path / "killed" / "train.log").read_text()
    how = ", compiled" * compiled + ", oneDNN linear layers" * fused
    assert log.count(f"in fp32{how}, threads: {threads}, ") == 2
    assert digests(tmp_path / "killed") == digests(tmp_path / "complete")


def test_corrections_for_rare_classes_resume_exactly(pictures, tmp_path):
    table = tmp_path / "weights.csv"
    table.write_text("".join(f"class{i},{i + 1}\n" for i in range(6)))
    few = tmp_path / "few"
    shutil.copytree(pictures, few)
    for image in sorted((few / "train" / "class0").iterdir())[1:]:
        image.unlink()
    uninterrupted, killed = (
        make_config(few, tmp_path / name, data__sampling="balanced", train__class_weights=table)
        for name in ("uninterrupted", "killed")
    )
    assert finish_single(uninterrupted) == 0
    # The new head predicts equal probabilities, and mixing does not change the mean weight.
    dataset = open_dataset(killed.data, 16, 0)
    labels, smoothing = dataset.train.labels, killed.train.label_smoothing
    weights = Balance.of(killed, dataset.classes, labels).weights.numpy()
    _, indices = Order.of(killed, labels).samples(0, 0, 12)
    mean = (1 - smoothing) * weights[labels[indices]].mean() + smoothing * weights.mean()
    row = read_rows(tmp_path / "uninterrupted" / "metrics.jsonl")[0]
    assert row["loss"] == pytest.approx(mean * math.log(6), rel=1e-5)
    assert signal_at(killed, 11, signal.SIGKILL) == -signal.SIGKILL
    content = table.read_text()
    table.write_text(content.replace("class0,1", "class0,2"))
    with pytest.raises(UserError, match=r"class_weights: .*weights.csv has changed since"):
        train(killed)
    table.write_text(content)
    assert finish_single(killed) == 0
    found = digests(tmp_path / "killed")
    assert found == digests(tmp_path / "uninterrupted")
    # The temperatures are among the metrics.
    known = read_description(tmp_path / "killed" / "weights" / "last")[1]
    assert known.metrics == found["state"]["metrics"]
    assert 0.05 < known.temperature < 20


@pytest.fixture(scope="module")
def half_done(image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("half") / "run"
    assert signal_at(make_config(image_folder, out), 10, signal.SIGKILL) == -signal.SIGKILL
    return out


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(
    image_folder, half_done, tmp_path, uninterrupted
):
    shutil.copytree(half_done, tmp_path / "run")
    last = newest(tmp_path / "run")
    damage(last / "model.safetensors", "flipped")
    assert finish_single(make_config(image_folder, tmp_path / "run")) == 0
    assert digests(tmp_path / "run") == uninterrupted
    log = (tmp_path / "run" / "train.log").read_text()
    assert "skipped" in log
    assert str(last) in log


def test_an_interrupted_validation_is_logged_once(image_folder, tmp_path):
    """The run is stopped before its validation is saved, then killed after its row is written."""
    out = tmp_path / "run"
    config = make_config(image_folder, out, train__eval_every=100)
    assert finish_single(config) == 0
    expected = digests(out)
    last = newest(out)
    state = storage.read_json(last, "state.json")
    names = [path.stem for path in last.glob("*.safetensors")]
    tensors = {name: storage.read_tensors(last, name) for name in names}
    row = read_rows(out / "metrics.jsonl")[-1]
    undone = {**state, "evaluated": 0, "best": {"step": -1, "top1": -1}, "metrics": {}}
    undone["counters"] = [row["loss"], row["grad_norm"], 1, 0, 0, 0]
    storage.write(last, tensors, {"state": undone})
    assert finish_single(config) == 0
    assert digests(out) == expected


def test_a_run_without_a_usable_checkpoint_is_left_untouched(image_folder, half_done, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(half_done, out)
    for directory in (out / "checkpoints").iterdir():
        (directory / "manifest.json").unlink()
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"no checkpoint in .* can be used"):
        train(make_config(image_folder, out))
    assert (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("kept", ["weights", "metrics.jsonl"])
def test_a_run_whose_checkpoints_were_removed_is_left_untouched(
    image_folder, finished, tmp_path, kept
):
    """Either file shows that the run had checkpoints.

    The log of a run that was killed before its first checkpoint also has rows.
    """
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints")
    for name in {"weights", "metrics.jsonl"} - {kept}:
        shutil.rmtree(out / name) if name == "weights" else (out / name).unlink()
    before = {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
    if kept == "metrics.jsonl":  # one validation alone may be killed before its checkpoint
        assert sum("val_top1" in row for row in read_rows(out / kept)) > 1
    with pytest.raises(UserError, match=rf"checkpoints are missing.*--out {out}-2"):
        train(make_config(image_folder, out))
    assert {path: path.read_bytes() for path in before} == before


def killed_before(monkeypatch, module, name, config):
    """Trains until a function is called, which kills the process."""
    with monkeypatch.context() as patch:
        patch.setattr(module, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert finish_single(config) == -signal.SIGKILL


def test_a_run_killed_at_its_first_validation_starts_over(
    image_folder, tmp_path, uninterrupted, monkeypatch
):
    config = make_config(image_folder, tmp_path / "run", train__checkpoint_steps=1000)
    killed_before(monkeypatch, checkpoint, "save", config)
    assert "val_top1" in read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    killed_before(monkeypatch, weights, "save", config)
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    assert finish_single(config) == 0
    assert digests(tmp_path / "run") == uninterrupted


def test_init_applies_until_there_is_a_checkpoint(image_folder, finished, tmp_path, uninterrupted):
    """If the process is killed during the first write, the directory of checkpoints is empty."""
    digests_of = []
    for name in ("fresh", "begun"):
        config = make_config(image_folder, tmp_path / name, train__init=finished)
        if name == "begun":
            (tmp_path / name / "checkpoints").mkdir(parents=True)
        assert finish_single(config) == 0
        digests_of.append(digests(tmp_path / name))
    assert digests_of[0] == digests_of[1] != uninterrupted


def test_training_continues_after_the_reader_of_its_output_exits(
    image_folder, tmp_path, uninterrupted, capfd
):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        sys.stdout = os.fdopen(writer, "w")
        train(make_config(image_folder, tmp_path / "run"))
        os._exit(0)
    os.close(writer)
    os.close(reader)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert digests(tmp_path / "run") == uninterrupted


def test_summary_of_results():
    progress = Progress(best={"step": 12, "top1": 0.5}, metrics={"val_top1": 0.25})
    assert progress.summary("top1") == "val top-1 25.00%; best 50.00% at step 12"
    progress.metrics["ema_top1"] = 1 / 3
    assert progress.summary("top1") == "val top-1 25.00%, EMA 33.33%; best 50.00% at step 12"
    progress.best |= {"loss": 0.25, "f1": 0.75}
    assert progress.summary("f1").endswith("; best macro F1 75.00% at step 12")
    assert progress.summary("loss").endswith("; best loss 0.2500 at step 12")


def state_of(seed, **train):
    """Returns the state of a run after five steps, and its model; both depend on `seed`."""
    config = settings.load("digits", ["--model.dim", "16", "--model.depth", "1"])
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
    dataset = open_dataset(config.data, 8, 0)
    torch.manual_seed(seed)
    model = ViT(config.model, 10)
    optimizer, ema = Optimizer(model, config.optim), EMA(model, 0.9)
    counters, progress = Counters(torch.device("cpu")), Progress()
    resolved = Resolved("cpu", "fp32", False, 1, 2, 1, "cpu", False)
    for step in range(1, 6):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        norm, skipped = optimizer.step(1e-2, torch.tensor(1.0))
        counters.add(torch.rand(()), norm, skipped)
        ema.update(step, skipped)
        progress.step = step
    progress.evaluated, progress.best = 4, {"step": 4, "top1": seed / 10}
    progress.stale = seed
    progress.metrics = {"val_top1": seed / 10}
    parts = config, dataset, resolved, "", model, optimizer, ema, counters, progress
    return State(*parts), model


def test_a_checkpoint_is_restored_bit_for_bit(tmp_path):
    """The checkpoint is written to a file and restored into a state that differs in every value."""
    (was, _), (now, model) = state_of(1), state_of(2)
    checkpoint.save(tmp_path, was.checkpoint(World(), {3: "empty"}), None)
    found = checkpoint.latest(tmp_path, pytest.fail)
    assert found.state["broken"] == [[3, "empty"]]
    assert found.state["resolved"] == dataclasses.asdict(was.resolved)
    assert found.state["fingerprint"] == was.dataset.fingerprint
    model.load_state_dict(found.tensors["model"])
    now.restore(found)
    for name in ("step", "evaluated", "best", "stale", "metrics"):
        assert getattr(now.progress, name) == getattr(was.progress, name)
    assert now.progress.saved == (5, 4)
    assert now.counters.values.equal(was.counters.values)
    first, second = (state.checkpoint(World(), {}).tensors for state in (was, now))
    assert first.keys() == second.keys() == {"model", "ema", "optimizer"}
    for kind, tensors in first.items():
        assert tensors.keys() == second[kind].keys()
        assert [n for n, value in tensors.items() if not second[kind][n].equal(value)] == []


def test_the_checkpoint_of_a_run_without_an_average_has_none():
    state, _ = state_of(1)
    bare = dataclasses.replace(state, ema=None)
    assert bare.checkpoint(World(), {}).tensors.keys() == {"model", "optimizer"}


OTHER = {
    "model.dim": "32",
    "data.mean": "0.1 0.2 0.3",
    "augment.mixup": "0.3",
    "optim.lr": "0.1",
    "train.seed": "1",
    "train.batch-size": "32",
    "train.ema-decay": "0.5",
    "train.precision": "bf16",
}


@pytest.mark.parametrize("name", OTHER)
def test_settings_that_change_the_results_are_rejected(tmp_path, name):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.write_config(settings.load("digits", ["--out", str(run.path)]))
    changed = settings.load("digits", [f"--{name}", *OTHER[name].split()])
    field = name.replace("-", "_")
    with pytest.raises(UserError, match=rf"{field}: .* {run.path} has .*--out {run.path}-2"):
        resume.check_settings(run, changed)


@pytest.mark.parametrize("config_file", ["edited", "removed"])
@pytest.mark.parametrize("name", ["train.seed", "optim.weight-decay", "optim.lr"])
def test_the_settings_in_a_checkpoint_are_checked(
    image_folder, half_done, tmp_path, name, config_file
):
    """The settings in config.yaml are checked too, but the file can be edited or removed."""
    run = RunDir(tmp_path / "run")
    shutil.copytree(half_done, run.path)
    changed = make_config(image_folder, run.path, **{name.replace(".", "__"): 7})
    run.config.unlink()
    if config_file == "edited":
        run.write_config(changed)
    field = name.replace("-", "_")
    with pytest.raises(UserError, match=rf"{field}: the run in {run.path} has .*, not 7"):
        train(changed)


def rewritten(half_done, out, **changes):
    """Copies a run and changes the state in its newest checkpoint, with a valid manifest."""
    shutil.copytree(half_done, out)
    folder = RunDir(out).checkpoints
    found = checkpoint.latest(folder, pytest.fail)
    step = changes.pop("step", found.step)
    state = {**found.state, **changes, "step": step}
    checkpoint.save(folder, Checkpoint(step, found.tensors, state), None)


def test_a_checkpoint_beyond_the_end_is_rejected(image_folder, half_done, tmp_path):
    out = tmp_path / "run"
    rewritten(half_done, out, step=STEPS + 1)
    with pytest.raises(UserError, match=rf"checkpoint of step 28, but the run has 27 .*{out}-2"):
        train(make_config(image_folder, out))


@pytest.mark.parametrize(
    "config", [{}, {"train": {"no_such_setting": 1}}, {"model": {}, "no_such_section": {}}]
)
def test_settings_of_another_version_are_rejected(image_folder, half_done, tmp_path, config):
    out = tmp_path / "run"
    rewritten(half_done, out, config=config)
    with pytest.raises(UserError, match=r"not written by this version of vitral|has .*, not"):
        train(make_config(image_folder, out))


def test_a_run_can_be_repeated_from_another_directory(image_folder, tmp_path, monkeypatch):
    """Its config.yaml has absolute paths, and a relative path is still the same."""
    monkeypatch.chdir(image_folder.parent)
    config = make_config(image_folder.name, tmp_path / "run", train__epochs=2)
    assert finish_single(config) == 0
    kept = settings.load(str(tmp_path / "run" / "config.yaml"))
    assert kept.data.path == str(image_folder)
    assert resume.check_settings(RunDir(tmp_path / "run"), config) == []
    monkeypatch.chdir(tmp_path)
    assert resume.check_settings(RunDir(tmp_path / "run"), kept) == []
    assert finish_single(kept) == 0
    assert "this run is already finished" in (tmp_path / "run" / "train.log").read_text()


def test_paths_that_exist_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("images", "weights", "digits"):
        (tmp_path / name).mkdir()
    for path, init, expected in (
        ("images", "weights", (str(tmp_path / "images"), str(tmp_path / "weights"))),
        ("digits", "timm:vit_tiny", ("digits", "timm:vit_tiny")),  # a known dataset
        ("gone", None, ("gone", None)),
        ("x" * 5000, None, ("x" * 5000, None)),
    ):
        config = settings.load("digits", {"data.path": [path], "train.init": [str(init)]})
        absolute = weights.absolute_paths(config)
        assert (absolute.data.path, absolute.train.init) == expected


def test_settings_that_do_not_change_the_results_are_reported(tmp_path):
    run = RunDir(tmp_path)
    assert resume.check_settings(run, settings.load("digits")) == []
    run.write_config(settings.load("digits", ["--out", "elsewhere"]))
    assert resume.check_settings(run, settings.load("digits")) == []
    words = "--train.log-every 7 --data.workers 3".split()
    assert sorted(resume.check_settings(run, settings.load("digits", words))) == [
        "data.workers: None becomes 3",
        "train.log_every: 50 becomes 7",
    ]


def test_other_data_and_parts_are_rejected(tmp_path):
    run, config = RunDir(tmp_path), settings.load("digits")
    dataset = open_dataset(config.data, 8, 0)
    resume.check_data(config, run, dataset, dataset.fingerprint)
    with pytest.raises(UserError, match="data: digits is not the dataset that the run"):
        resume.check_data(config, run, dataset, "f" * 64)
    resume.check_parts(run, "other", "other")
    for was, now, message in (("other", "", "uses other, not vitral's"), ("", "x", "not x;")):
        with pytest.raises(UserError, match=message):
            resume.check_parts(run, was, now)


def test_a_dry_run_rejects_what_a_run_would(tmp_path):
    run, config = RunDir(tmp_path), settings.load("digits")
    dataset = open_dataset(config.data, 8, 0)
    resume.check_resumable(config, run, dataset)
    saved = functools.partial(checkpoint.save, run.checkpoints, best_step=None)
    state = {
        "evaluated": 0,
        "best": {"step": -1.0, "top1": -1.0},
        "metrics": {},
        "broken": [],
        "counters": [0.0] * 6,
        "resolved": dataclasses.asdict(Resolved("cpu", "fp32", False, 1, 64, 1, "cpu", False)),
        "classes": dataset.classes,
        "fingerprint": dataset.fingerprint,
        "config": dataclasses.asdict(config),
    }
    saved(Checkpoint(3, {"model": {}}, state))
    damage(newest(run.path) / "model.safetensors", "flipped")  # which is not read
    resume.check_resumable(config, run, dataset)
    saved(Checkpoint(3, {"model": {}}, {**state, "fingerprint": "f" * 64}))
    with pytest.raises(UserError, match="not the dataset"):
        resume.check_resumable(config, run, dataset)
    shutil.rmtree(run.checkpoints)
    run.weights.mkdir()
    with pytest.raises(UserError, match="checkpoints are missing"):
        resume.check_resumable(config, run, dataset)
