"""Run directories: the lock, damaged logs, and the content for a report."""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from vitral import machine, settings
from vitral.errors import UserError
from vitral.rundir import RunDir, duration, read_rows, read_run

FORK = multiprocessing.get_context("fork")
ROW = {"step": 10, "epoch": 0.5, "images": 320, "seconds": 1.25, "loss": 2.5}


def lock_elsewhere(path):
    """Takes the lock in another process, which then exits; returns its error message, or None."""
    receiver, sender = FORK.Pipe()

    def child():
        try:
            with RunDir(path) as run:
                run.lock()
            sender.send(None)
        except UserError as error:
            sender.send(str(error))

    process = FORK.Process(target=child)
    process.start()
    process.join()
    return receiver.recv()


def test_the_lock_excludes_another_process(tmp_path):
    path = tmp_path / "runs/a"
    with RunDir(path) as run:
        run.lock()
        expected = (
            f"out: another process is training in {path}; wait for it, or pass a different --out"
        )
        assert lock_elsewhere(path) == expected
        assert lock_elsewhere(tmp_path / "runs/b") is None
    assert lock_elsewhere(path) is None
    with RunDir(path) as run:
        run.lock()  # the process that held it has exited


def test_a_killed_process_releases_the_lock_even_if_its_workers_survive(tmp_path):
    receiver, sender = FORK.Pipe()

    def holder():
        run = RunDir(tmp_path)
        run.lock()
        worker = os.fork()
        if worker == 0:
            signal.pause()
        sender.send(worker)
        signal.pause()

    process = FORK.Process(target=holder, daemon=True)
    process.start()
    worker = receiver.recv()
    try:
        with RunDir(tmp_path) as run, pytest.raises(UserError, match="another process"):
            run.lock()
        process.kill()
        process.join()
        os.kill(worker, 0)  # still exists
        with RunDir(tmp_path) as run:
            run.lock()
    finally:
        process.kill()
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("target", ["precious", "gone"])
def test_a_link_at_the_path_of_the_lock_is_not_followed(tmp_path, target):
    (tmp_path / "precious").write_text("kept")
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    (run.path / ".lock").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=r"out: cannot write .*run/\.lock: Too many levels of sym"):
        run.lock()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["precious"]
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize("name", ["config.yaml", "env.json", "metrics.jsonl", "train.log"])
def test_a_fifo_in_the_run_directory_is_rejected_without_blocking(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with RunDir(tmp_path) as run, pytest.raises(UserError, match=f"{name}: not a regular file"):
        run.lock()
    with pytest.raises(OSError, match="not a regular file"):
        read_rows(tmp_path / name)


def test_a_directory_that_cannot_be_created_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"out: cannot write .*file/run: Not a directory; pass a different"
    ):
        RunDir(tmp_path / "file/run").lock()


def test_unused_name_has_the_first_free_number(tmp_path):
    run = RunDir(tmp_path / "digits")
    assert run.unused_name() == tmp_path / "digits-2"
    (tmp_path / "digits-2").mkdir()
    (tmp_path / "digits-3").touch()
    (tmp_path / "digits-5").mkdir()
    assert run.unused_name() == tmp_path / "digits-4"


def test_the_run_of_weights_is_two_directories_above_them(tmp_path, monkeypatch):
    run = RunDir(tmp_path / "run")
    for directory in (run.best, run.last):
        directory.mkdir(parents=True)
        found = RunDir.of_weights(directory)
        assert found is not None
        assert found.path == run.path
    assert RunDir.of_weights(run.path) is None
    assert RunDir.of_weights(tmp_path / "elsewhere") is None
    monkeypatch.chdir(run.best)
    found = RunDir.of_weights(Path())
    assert found is not None
    assert found.path == run.path


def write(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else dumped(line) for line in lines))
    return path


def dumped(row):
    return json.dumps(row).encode() + b"\n"


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 20, "epo',
        b"\n",
        b"7\n",
        b"[1, 2]\n",
        b"null\n",
        b"{}\n",
        b"\x00\xff\n",
        dumped({k: v for k, v in ROW.items() if k != "seconds"}),
        dumped({**ROW, "epoch": "1"}),
        dumped({**ROW, "loss": None}),
        dumped({**ROW, "loss": [1.0]}),
    ],
)
def test_rows_are_read_up_to_the_first_invalid_line(tmp_path, line):
    later = {**ROW, "step": 30}
    path = write(tmp_path / "metrics.jsonl", ROW, later, line, later)
    assert read_rows(path) == [ROW, later]


def test_rows_of_a_complete_and_a_missing_log(tmp_path):
    path = write(tmp_path / "metrics.jsonl", *({**ROW, "step": k} for k in range(5)))
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3, 4]
    assert read_rows(tmp_path / "none.jsonl") == []
    # The loss of a diverged run is NaN.
    (row,) = read_rows(write(path, {**ROW, "loss": float("nan")}))
    assert row["loss"] != row["loss"]


@pytest.fixture
def directory(tmp_path):
    """A run directory of one epoch, with two rows and a damaged third one."""
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    words = "--train.epochs 1 --optim.warmup-epochs 0 --optim.lr 0.125".split()
    run.write_config(settings.load("digits", words))
    run.write_environment(device="cpu")
    first = {**ROW, "val_loss": 2.5, "val_top1": 0.5, "ema_loss": 2.25, "ema_top1": 0.75}
    second = {**ROW, "epoch": 1.0, "val_loss": 2.0, "val_top1": 0.75}
    write(run.metrics, first, second, b"7\n", ROW)
    return run


def test_a_run_is_read_from_its_directory(directory):
    found = read_run(directory.path)
    assert (found.config.train.epochs, found.config.optim.lr) == (1, 0.125)
    assert len(found.rows) == len(found.validations) == 2
    assert found.notes == ["metrics.jsonl: line 3 of 4 is not a row; the rest is ignored"]
    assert found.best == ("ema", found.rows[0])  # the first of equal ones
    assert found.finished


def test_the_environment_is_that_of_this_process(directory):
    found = read_run(directory.path).environment
    assert found["command"] == sys.argv
    assert torch.__version__.startswith(found["packages"]["torch"])
    assert found["cpu_cores"] == machine.num_cores()
    assert found["device"] == "cpu"
    directory.environment.write_text("[1")
    again = read_run(directory.path)
    assert again.environment == {}
    assert again.notes[1:] == ["env.json cannot be read: the machine is unknown"]


@pytest.mark.parametrize(
    ("last", "finished"),
    [({"epoch": 1.0}, False), ({"epoch": 0.5, "val_loss": 0.9}, False), ({"val_loss": 0.9}, True)],
)
def test_a_run_is_finished_when_its_last_step_is_validated(directory, last, finished):
    write(directory.metrics, {**ROW, "val_loss": 0.5}, {**ROW, "epoch": 1.0, **last})
    assert read_run(directory.path).finished is finished
    write(directory.metrics)
    assert not read_run(directory.path).finished
    assert read_run(directory.path).best is None


def test_a_run_that_stopped_early_is_finished(tmp_path):
    run = RunDir(tmp_path)
    run.write_config(settings.load("digits", ["--train.patience", "2", "--train.best-by", "loss"]))
    losses = [0.5, 0.3, 0.4, 0.3]
    rows = [{**ROW, "step": k, "val_top1": 0.1 * k, "val_loss": v} for k, v in enumerate(losses)]
    for count, finished in ((3, False), (4, True)):
        write(run.metrics, *rows[:count])
        found = read_run(tmp_path)
        assert found.best == ("val", rows[1])
        assert found.stopped_early is found.finished is finished


def test_other_directories_are_rejected(tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml, got one without; specify one such as"):
        read_run(tmp_path)
    with pytest.raises(UserError, match=r"config\.yaml, got no directory"):
        read_run(tmp_path / "none")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (60, "1:00"),
        (185, "3:05"),
        (3599.6, "1:00:00"),
        (43385, "12:03:05"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
