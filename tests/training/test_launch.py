"""The launcher of the processes of a training run, and its exit code."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from vitral import settings
from vitral.cli import main
from vitral.errors import UserError
from vitral.rundir import read_rows
from vitral.training import launch as launcher
from vitral.training.distributed import LAUNCHER, World, end_with_launcher
from vitral.training.signals import Signals

from .processes import REPRODUCIBLE, TIMEOUT, digests, newest, words

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Replaces torchrun: records its arguments, and raises `error` if it is set."""
    monkeypatch.chdir(tmp_path)  # where there is no earlier run in runs/digits
    recorded = {"error": None}

    def elastic_launch(plan, program):
        def entry(*words):
            recorded.update(plan=plan, program=program, words=words, environment=dict(os.environ))
            if recorded["error"] is not None:
                raise recorded["error"]

        return entry

    monkeypatch.setattr(launcher, "elastic_launch", elastic_launch)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    yield recorded
    logging.disable(logging.NOTSET)


CPU = ["--train.device", "cpu"]


def test_processes_run_the_same_command(launched, monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "3")
    config = settings.load("digits", CPU)
    assert launcher.launch(config, 2, ["digits", *CPU]) == 0
    assert launched["program"] == sys.executable
    assert launched["words"] == ("-m", "vitral", "train", "digits", *CPU)
    plan = launched["plan"]
    assert (plan.min_nodes, plan.max_nodes, plan.nproc_per_node, plan.max_restarts) == (1, 1, 2, 0)
    handled = {"SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGQUIT"}
    assert set(plan.signals_to_handle.split(",")) == handled
    assert launched["environment"][LAUNCHER] == str(os.getpid())
    assert launched["environment"]["OMP_NUM_THREADS"] == "3"  # the user's value takes priority
    assert int(launched["environment"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) > 30


def test_an_ignored_hangup_stays_ignored(launched):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert launcher.launch(settings.load("digits", CPU), 2, []) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "SIGHUP" not in launched["plan"].signals_to_handle.split(",")


@pytest.mark.parametrize("killed", ["before", "after"])
def test_processes_end_with_the_launcher(tmp_path, killed):
    """The launcher is killed before or after a process asks for the signal."""
    reader, writer = os.pipe()

    def rank():
        signal.alarm(int(TIMEOUT))
        os.environ[LAUNCHER] = str(os.getppid())
        if killed == "before":
            os.kill(os.getppid(), signal.SIGKILL)
            while os.getppid() == int(os.environ[LAUNCHER]):
                time.sleep(0.001)
        with Signals(World()) as signals:
            end_with_launcher()
            os.write(writer, b"asked ")
            while not signals.received:
                signal.sigtimedwait([], 0.01)
            os.write(writer, signal.Signals(signals.received).name.encode())
        os._exit(0)

    parent = os.fork()
    if not parent:
        if not os.fork():
            rank()
        signal.pause()
    assert os.read(reader, 6) == b"asked "
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    os.close(writer)
    assert os.read(reader, 99) == b"SIGTERM"
    os.close(reader)


def failure(code):
    """Returns what torchrun raises after a process exits with a code or is killed by a signal."""
    return ChildFailedError("vitral", {0: ProcessFailure(0, 1, code, "/no/file")})


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (failure(2), 2),
        (failure(-signal.SIGKILL), 1),
        (SignalException("stopped", signal.SIGTERM), 143),
        (SignalException("stopped", signal.SIGINT), 130),
    ],
)
def test_exit_code(launched, error, code):
    launched["error"] = error
    assert launcher.launch(settings.load("digits", CPU), 2, []) == code


def test_more_processes_than_gpus_are_rejected(launched, monkeypatch):
    monkeypatch.setattr(launcher, "num_gpus", lambda: 2)
    with pytest.raises(UserError, match=r"gpus: expected at most 2, .*, got 4; .*device cpu"):
        launcher.launch(settings.load("digits"), 4, [])
    assert launcher.launch(settings.load("digits"), 2, []) == 0
    assert launcher.launch(settings.load("digits", CPU), 4, []) == 0


@pytest.mark.parametrize(
    ("gpus", "more", "fragments"),
    [
        ("4", {"train__batch_size": 44}, ["twice the number of processes (4)"]),
        ("3", REPRODUCIBLE, ["train.reproducible"]),
        ("2", {"data": "/no/such/folder"}, ["/no/such/folder"]),
        ("0", {}, ["gpus: expected 1 or more, got 0"]),
        ("two", {}, ["gpus: expected an integer", "two"]),
    ],
)
def test_the_launcher_rejects_invalid_settings(pictures, tmp_path, capsys, gpus, more, fragments):
    assert main([*words(pictures, tmp_path / "run", **more), "--gpus", gpus]) == 2
    text = capsys.readouterr().err
    assert re.fullmatch(r"vitral: .+\n", text), text
    for fragment in fragments:
        assert fragment in text
    assert not (tmp_path / "run").exists()


def processes_of(out):
    """Returns the rank of each process whose command contains a run directory, by process ID."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(out).encode() in (process / "cmdline").read_bytes():
                environment = (process / "environ").read_bytes().split(b"\0")
                rank = [word for word in environment if word.startswith(b"RANK=")]
                found[int(process.name)] = int(rank[0].removeprefix(b"RANK=")) if rank else None
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


@pytest.mark.slow
def test_a_launched_run_stops_at_a_signal_and_resumes(pictures, tmp_path, pair):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "vitral", *words(pictures, out), "--gpus", "2"]
    with (tmp_path / "stderr").open("w") as log:
        parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
    while not any(row["step"] >= 4 for row in read_rows(out / "metrics.jsonl")):
        time.sleep(0.001)
        assert parent.poll() is None
    parent.send_signal(signal.SIGINT)
    assert parent.wait(TIMEOUT) == 130
    assert not processes_of(out)
    assert (tmp_path / "stderr").read_text() == "\nSIGINT: writing a checkpoint\n"
    last = read_rows(out / "metrics.jsonl")[-1]["step"]
    assert newest(out).name == f"step_{last:07d}"
    assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0
    assert digests(out) == pair


@pytest.mark.slow
def test_processes_write_a_checkpoint_when_their_parent_is_killed(pictures, tmp_path, pair):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "vitral", *words(pictures, out), "--gpus", "2"]
    command += ["--train.checkpoint-steps", "1000"]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any(row["step"] >= 4 for row in read_rows(out / "metrics.jsonl")):
        time.sleep(0.001)
        assert parent.poll() is None
    parent.kill()
    parent.wait(TIMEOUT)
    end = time.monotonic() + TIMEOUT
    while processes_of(out):
        time.sleep(0.01)
        assert time.monotonic() < end
    assert "SIGTERM: stopped at step " in (out / "train.log").read_text()
    assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0
    assert digests(out) == pair


@pytest.mark.slow
def test_torchrun_recovers_from_a_killed_process(pictures, tmp_path, pair):
    out = tmp_path / "run"
    torchrun = "torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1 -m vitral"
    command = [sys.executable, "-m", *torchrun.split(), *words(pictures, out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not any(row["step"] >= 4 for row in read_rows(out / "metrics.jsonl")):
        time.sleep(0.001)
        assert parent.poll() is None
    (second,) = (number for number, rank in processes_of(out).items() if rank == 1)
    os.kill(second, signal.SIGKILL)
    assert parent.wait(TIMEOUT) == 0
    assert "resumes from step" in (out / "train.log").read_text()
    assert digests(out) == pair
