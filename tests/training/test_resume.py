"""A run that is killed and repeated ends like one that nothing disturbed."""

import os
import random
import shutil
import signal
import sys

import pytest

from vitral import storage, weights
from vitral.errors import UserError
from vitral.rundir import read_rows
from vitral.training import checkpoint, train

from .processes import (
    damage,
    digests,
    finish_alone,
    make_config,
    newest,
    signal_at,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

STEPS = 27  # of a run


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory):
    """The digests of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert finish_alone(make_config(image_folder, out, data__workers=0)) == 0
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == list(range(1, STEPS + 1))
    return digests(out)


@pytest.mark.parametrize("workers", [(0, 1, 0), (1, 3, 0), (3, 0, 1)])
def test_killed_at_random_steps(image_folder, tmp_path, whole, workers):
    at = sorted(random.sample(range(1, STEPS - 5), 2))
    print("killed at", at)
    for step, count in zip(at, workers, strict=False):
        config = make_config(image_folder, tmp_path / "run", data__workers=count)
        assert signal_at(config, step, signal.SIGKILL) == -signal.SIGKILL
    assert finish_alone(make_config(image_folder, tmp_path / "run", data__workers=workers[-1])) == 0
    assert digests(tmp_path / "run") == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_writes_a_checkpoint_and_exits_with_its_code(image_folder, tmp_path, whole, number):
    config = make_config(image_folder, tmp_path / "run", train__checkpoint_steps=1000)
    assert signal_at(config, 5, number) == 128 + number
    last = int(newest(tmp_path / "run").name.removeprefix("step_"))
    steps = [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert last >= 5
    assert steps[-1] <= last
    assert finish_alone(config) == 0
    assert digests(tmp_path / "run") == whole


def test_muon_goes_on_exactly(image_folder, tmp_path, whole):
    whole_run, cut = (
        make_config(image_folder, tmp_path / name, optim__name="muon") for name in ("whole", "cut")
    )
    assert finish_alone(whole_run) == 0
    assert signal_at(cut, 11, signal.SIGKILL) == -signal.SIGKILL
    assert finish_alone(cut) == 0
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole") != whole


@pytest.fixture(scope="module")
def half_done(image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("half") / "run"
    assert signal_at(make_config(image_folder, out), 10, signal.SIGKILL) == -signal.SIGKILL
    return out


def test_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    image_folder, half_done, tmp_path, whole
):
    shutil.copytree(half_done, tmp_path / "run")
    last = newest(tmp_path / "run")
    damage(last / "model.safetensors", "flipped")
    assert finish_alone(make_config(image_folder, tmp_path / "run")) == 0
    assert digests(tmp_path / "run") == whole
    log = (tmp_path / "run" / "train.log").read_text()
    assert "passed over" in log
    assert str(last) in log


def test_validation_that_a_signal_cut_short_is_logged_once(image_folder, tmp_path):
    """Stopped before its validation was saved, then killed after its row was written."""
    out = tmp_path / "run"
    config = make_config(image_folder, out, train__eval_every=100)
    assert finish_alone(config) == 0
    undisturbed = digests(out)
    last = newest(out)
    state = storage.read_json(last, "state.json")
    names = [path.stem for path in last.glob("*.safetensors")]
    tensors = {name: storage.read_tensors(last, name) for name in names}
    row = read_rows(out / "metrics.jsonl")[-1]
    undone = {**state, "evaluated": 0, "best": {"step": -1, "top1": -1}, "metrics": {}}
    undone["counters"] = [row["loss"], row["grad_norm"], 1, 0, 0, 0]
    storage.write(last, tensors, {"state": undone})
    assert finish_alone(config) == 0
    assert digests(out) == undisturbed


def test_run_without_a_usable_checkpoint_is_left_alone(image_folder, half_done, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(half_done, out)
    for directory in (out / "checkpoints").iterdir():
        (directory / "manifest.json").unlink()
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"no checkpoint in .* can be used"):
        train(make_config(image_folder, out))
    assert (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("kept", ["weights", "metrics.jsonl"])
def test_run_whose_checkpoints_were_removed_is_left_alone(image_folder, finished, tmp_path, kept):
    """Either tells it from one that was killed before its first checkpoint, which has rows, too."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints")
    for name in {"weights", "metrics.jsonl"} - {kept}:
        shutil.rmtree(out / name) if name == "weights" else (out / name).unlink()
    before = {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
    if kept == "metrics.jsonl":  # one validation alone may be killed before its checkpoint
        assert sum("val_top1" in row for row in read_rows(out / kept)) > 1
    with pytest.raises(UserError, match=rf"checkpoints are gone.*--out {out}-2"):
        train(make_config(image_folder, out))
    assert {path: path.read_bytes() for path in before} == before


def killed_before(monkeypatch, module, name, config):
    """Trains until a function is called, and is killed then."""
    with monkeypatch.context() as patch:
        patch.setattr(module, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert finish_alone(config) == -signal.SIGKILL


def test_run_killed_at_its_first_validation_begins_anew(image_folder, tmp_path, whole, monkeypatch):
    config = make_config(image_folder, tmp_path / "run", train__checkpoint_steps=1000)
    killed_before(monkeypatch, checkpoint, "save", config)
    assert "val_top1" in read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    killed_before(monkeypatch, weights, "save", config)
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    assert finish_alone(config) == 0
    assert digests(tmp_path / "run") == whole


def test_init_counts_until_there_is_a_checkpoint(image_folder, finished, tmp_path, whole):
    """A kill in the first write leaves an empty directory of checkpoints."""
    digests_of = []
    for name in ("fresh", "begun"):
        config = make_config(image_folder, tmp_path / name, train__init=finished)
        if name == "begun":
            (tmp_path / name / "checkpoints").mkdir(parents=True)
        assert finish_alone(config) == 0
        digests_of.append(digests(tmp_path / name))
    assert digests_of[0] == digests_of[1] != whole


def test_training_outlives_its_listener(image_folder, tmp_path, whole, capfd):
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
    assert digests(tmp_path / "run") == whole
