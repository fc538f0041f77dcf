"""A run that is killed and started again ends as the run that was not."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest

from vitral import settings, storage, weights
from vitral.errors import UserError
from vitral.training import Interrupted, checkpoint, train
from vitral.training.checkpoint import Checkpoint
from vitral.training.metrics import CLOCK, read_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

SETTINGS = {
    "model.dim": 16,
    "model.depth": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.patch_size": 4,
    "model.image_size": 16,
    "model.dropout": 0.1,
    "model.stochastic_depth": 0.3,
    "augment.policy": "trivialaugment",
    "augment.erasing": 0.5,
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "optim.warmup_epochs": 1,
    "train.epochs": 8,
    "train.batch_size": 12,
    "train.micro_batch": 8,
    "train.ema_decay": 0.95,
    "train.log_every": 1,
    "train.checkpoint_steps": 3,
    "train.threads": 1,
}
STEPS = 27  # 8 * 40 images in batches of 12


def make_config(data, out, **changes):
    options = {**SETTINGS, "data.path": data, "train.out": out}
    options |= {name.replace("__", "."): value for name, value in changes.items()}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return settings.load("digits", words)


def start(config):
    """Trains in a forked process, as torch takes seconds to import; returns its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
        train(config)
        code = 0
    except Interrupted as interrupted:
        code = interrupted.exit_code
    except BaseException:
        (Path(config.train.out) / "failure.txt").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def finish(config):
    _, status = os.waitpid(start(config), 0)
    return os.waitstatus_to_exitcode(status)


def signal_at(config, step, number):
    """Trains until the log has reached `step`, sends a signal, and returns the exit code."""
    child = start(config)
    log = Path(config.train.out) / "metrics.jsonl"
    while not any(row["step"] >= step for row in read_rows(log)):
        time.sleep(0.001)
        done, status = os.waitpid(child, os.WNOHANG)
        assert not done, f"ended before step {step}: {status}"
    os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digests(out):
    """What has to be equal: every tensor and table, and the log without its clock columns."""
    out = Path(out)
    newest = max((out / "checkpoints").iterdir())
    files = [*newest.glob("*.safetensors"), *(out / "weights").glob("*/*.safetensors")]
    files += [out / "per_class.csv", out / "confused_pairs.csv"]
    found = {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }
    assert len(found) == 9, sorted(found)
    rows = read_rows(out / "metrics.jsonl")
    found["log"] = json.dumps([{k: v for k, v in r.items() if k not in CLOCK} for r in rows])
    state = json.loads((newest / "state.json").read_text())
    found["state"] = {k: state[k] for k in ("step", "best", "evaluated", "counters", "metrics")}
    return found


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory):
    """The digests of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert finish(make_config(image_folder, out, data__workers=0)) == 0
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == list(range(1, STEPS + 1))
    return digests(out)


@pytest.mark.parametrize("workers", [(0, 1, 0), (1, 3, 0), (3, 0, 1)])
def test_killed_at_random_steps(image_folder, tmp_path, whole, workers):
    at = sorted(random.sample(range(1, STEPS - 5), 2))
    print("killed at", at)
    for step, count in zip(at, workers, strict=False):
        config = make_config(image_folder, tmp_path / "run", data__workers=count)
        assert signal_at(config, step, signal.SIGKILL) == -signal.SIGKILL
    assert finish(make_config(image_folder, tmp_path / "run", data__workers=workers[-1])) == 0
    assert digests(tmp_path / "run") == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_writes_a_checkpoint_and_exits_with_its_code(image_folder, tmp_path, whole, number):
    config = make_config(image_folder, tmp_path / "run", train__checkpoint_steps=1000)
    assert signal_at(config, 5, number) == 128 + number
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    steps = [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert int(newest.name.removeprefix("step_")) >= 5
    assert steps[-1] <= int(newest.name.removeprefix("step_"))
    assert finish(config) == 0
    assert digests(tmp_path / "run") == whole


def test_muon_goes_on_exactly(image_folder, tmp_path, whole):
    whole_run, cut = (
        make_config(image_folder, tmp_path / name, optim__name="muon") for name in ("whole", "cut")
    )
    assert finish(whole_run) == 0
    assert signal_at(cut, 11, signal.SIGKILL) == -signal.SIGKILL
    assert finish(cut) == 0
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole") != whole


def damages(file):
    data = file.read_bytes()

    def flip():
        middle = len(data) // 2
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])

    return {
        "truncated": lambda: file.write_bytes(data[: len(data) // 2]),
        "flipped": flip,
        "deleted": file.unlink,
    }


@pytest.mark.parametrize("damage", ["truncated", "flipped", "deleted"])
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "ema.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    ],
)
def test_damaged_checkpoint_is_passed_over(half_done, tmp_path, name, damage):
    folder = tmp_path / "checkpoints"
    shutil.copytree(half_done / "checkpoints", folder)
    newest, before = sorted(folder.iterdir(), reverse=True)[:2]
    damages(newest / name)[damage]()
    warnings = []
    found = checkpoint.latest(folder, warnings.append)
    assert found is not None
    assert found.step == int(before.name.removeprefix("step_"))
    (warning,) = warnings
    assert newest.name in warning
    if damage != "flipped" or name != "manifest.json":
        assert name in warning


@pytest.fixture(scope="module")
def half_done(image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("half") / "run"
    assert signal_at(make_config(image_folder, out), 10, signal.SIGKILL) == -signal.SIGKILL
    return out


def test_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    image_folder, half_done, tmp_path, whole
):
    shutil.copytree(half_done, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    damages(newest / "model.safetensors")["flipped"]()
    assert finish(make_config(image_folder, tmp_path / "run")) == 0
    assert digests(tmp_path / "run") == whole
    log = (tmp_path / "run" / "train.log").read_text()
    assert "passed over" in log
    assert str(newest) in log


def test_validation_that_a_signal_cut_short_is_logged_once(image_folder, tmp_path):
    """Stopped before its validation was saved, then killed after its row was written."""
    out = tmp_path / "run"
    config = make_config(image_folder, out, train__eval_every=100)
    assert finish(config) == 0
    undisturbed = digests(out)
    newest = max((out / "checkpoints").iterdir())
    state = storage.read_json(newest, "state.json")
    names = [path.stem for path in newest.glob("*.safetensors")]
    tensors = {name: storage.read_tensors(newest, name) for name in names}
    row = read_rows(out / "metrics.jsonl")[-1]
    undone = {**state, "evaluated": 0, "best": {"step": -1, "top1": -1}, "metrics": {}}
    undone["counters"] = [row["loss"], row["grad_norm"], 1, 0, 0, 0]
    storage.write(newest, tensors, {"state": undone})
    assert finish(config) == 0
    assert digests(out) == undisturbed


def test_checkpoint_between_two_renames_is_found(half_done, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(half_done / "checkpoints", folder)
    newest = max(folder.iterdir())
    newest.rename(folder / f".{newest.name}.old")
    shutil.copytree(half_done / "checkpoints" / newest.name, folder / f".{newest.name}.new")
    found = checkpoint.latest(folder, print)
    assert found is not None
    assert newest.name == f"step_{found.step:07d}"
    checkpoint.save(folder, Checkpoint(found.step + 1, {}, {}), None)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_run_without_a_usable_checkpoint_is_left_alone(image_folder, half_done, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(half_done, out)
    for directory in (out / "checkpoints").iterdir():
        (directory / "manifest.json").unlink()
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"no checkpoint in .* can be used"):
        train(make_config(image_folder, out))
    assert (out / "metrics.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def finished(image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert finish(make_config(image_folder, out)) == 0
    return out


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
        assert finish(config) == -signal.SIGKILL


def test_run_killed_at_its_first_validation_begins_anew(image_folder, tmp_path, whole, monkeypatch):
    config = make_config(image_folder, tmp_path / "run", train__checkpoint_steps=1000)
    killed_before(monkeypatch, checkpoint, "save", config)
    assert "val_top1" in read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    killed_before(monkeypatch, weights, "save", config)
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    assert finish(config) == 0
    assert digests(tmp_path / "run") == whole


def test_weights_are_written_again_from_their_checkpoints(image_folder, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    config = make_config(image_folder, out)
    before = digests(out)
    known = [weights.load(out / "weights" / name).description for name in ("best", "last")]
    shutil.rmtree(out / "weights" / "last")
    damages(out / "weights" / "best" / "ema.safetensors")["flipped"]()
    assert finish(config) == 0
    assert digests(out) == before
    for name, was in zip(("best", "last"), known, strict=True):
        now = weights.load(out / "weights" / name).description
        assert now == dataclasses.replace(was, config=now.config)
    log = (out / "train.log").read_text()
    assert "weights/best restored" in log
    assert "weights/last restored" in log
    assert finish(config) == 0
    assert (out / "train.log").read_text().count(" restored from ") == 2


def test_weights_of_a_step_without_a_checkpoint_are_told_of(image_folder, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    best = min((out / "checkpoints").iterdir())
    assert int(best.name.removeprefix("step_")) < STEPS
    shutil.rmtree(best)
    shutil.rmtree(out / "weights" / "best")
    assert finish(make_config(image_folder, out)) == 0
    assert f"weights/best cannot be restored: {best}" in (out / "train.log").read_text()


def test_weights_name_the_data_where_they_are_now(image_folder, finished, tmp_path):
    out, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(finished, out)
    shutil.copytree(image_folder, moved)
    for name in ("best", "last"):
        assert weights.load(out / "weights" / name).description.config.data.path != str(moved)
    assert finish(make_config(moved, out)) == 0
    for name in ("best", "last"):
        assert weights.load(out / "weights" / name).description.config.data.path == str(moved)


def test_init_counts_until_there_is_a_checkpoint(image_folder, tmp_path, whole):
    """A kill in the first write leaves an empty folder of checkpoints."""
    assert finish(make_config(image_folder, tmp_path / "source")) == 0
    digests_of = []
    for name in ("fresh", "begun"):
        config = make_config(image_folder, tmp_path / name, train__init=tmp_path / "source")
        if name == "begun":
            (tmp_path / name / "checkpoints").mkdir(parents=True)
        assert finish(config) == 0
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
