"""A run that loses its terminal or its output's reader stops only at a signal, and gracefully."""

import fcntl
import os
import pty
import signal
import sys
import termios
from pathlib import Path

import pytest

from vitral.cli import main
from vitral.rundir import RunDir, read_rows
from vitral.training import checkpoint

from ..training.processes import SINGLE, newest, options, wait_for

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def use(descriptor):
    """Makes a descriptor standard output and standard error."""
    for number, name, buffering in ((1, "stdout", -1), (2, "stderr", 1)):
        os.dup2(descriptor, number)
        setattr(sys, name, open(number, "w", buffering, closefd=False))  # noqa: SIM115


def start(command, kind):
    """Runs a command in a forked process that leads a new session.

    Returns:
        The process ID, and the descriptor of the other end of its output, or None.
    """
    other, own = {"pipe": os.pipe, "terminal": pty.openpty, "closed": lambda: (None, None)}[kind]()
    child = os.fork()
    if child:
        if own is not None:
            os.close(own)
        return child, other
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if own is None:
            os.closerange(1, 3)
            sys.stdout = sys.stderr = sys.__stderr__ = None  # as Python starts without them
        else:
            os.close(other)
            if kind == "terminal":
                fcntl.ioctl(own, termios.TIOCSCTTY, 0)
            use(own)
            os.close(own)
        code = main(command)
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()  # as the interpreter does at exit
    finally:
        os._exit(code)


def command_for(data, out, **changes):
    places = {"data.path": data, "train.out": out}
    changes = {"train__checkpoint_steps": 1000, **changes}
    return ["train", "digits", *options(SINGLE | places, changes)]


def stopped(data, out, kind, number):
    """Closes the other end of a run's output, sends a signal and returns the exit code.

    For a terminal, the signal is SIGHUP, which the kernel sends.
    """
    child, other = start(command_for(data, out), kind)
    wait_for([child], out, 3)
    if other is not None:
        os.close(other)
    if kind != "terminal":
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


CASES = [("terminal", signal.SIGHUP)]
CASES += [
    (kind, number)
    for kind in ("pipe", "closed")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
]


def check_stopped(data, out, kind, number):
    assert stopped(data, out, kind, number) == 128 + number
    step = int(newest(out).name.removeprefix("step_"))
    checkpoint.read(RunDir(out).checkpoints, step)
    expected = f"{number.name}: stopped at step {step}; repeat the command to resume"
    assert RunDir(out).log.read_text().splitlines()[-1].endswith(expected)


@pytest.mark.parametrize(("kind", "number"), CASES)
def test_a_signal_writes_a_checkpoint(image_folder, tmp_path, kind, number):
    check_stopped(image_folder, tmp_path / "run", kind, number)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(20))
@pytest.mark.parametrize(("kind", "number"), CASES)
def test_a_signal_always_writes_a_checkpoint(image_folder, tmp_path, kind, number, attempt):
    check_stopped(image_folder, tmp_path / "run", kind, number)


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_run_continues_without_a_listener(image_folder, tmp_path, kind):
    """SIGHUP is ignored, as under nohup, so only the output fails."""
    out = tmp_path / "run"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        child, other = start(command_for(image_folder, out), kind)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for([child], out, 3)
    os.close(other)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read_rows(RunDir(out).metrics)[-1]["step"] == 27
    assert "finished: " in RunDir(out).log.read_text()


@pytest.mark.parametrize("words", [["recipes"], ["train", "--no-such-option"]])
def test_descriptors_of_closed_streams_are_not_reused(words, tmp_path):
    """Otherwise output would be written to other files."""
    child = os.fork()
    if not child:
        code = 99
        try:
            os.closerange(0, 3)
            sys.stdout = sys.stderr = None
            code = main(words)
            assert os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT) > 2
            assert all(Path(f"/proc/self/fd/{n}").readlink() == Path(os.devnull) for n in range(3))
            print("lost", flush=True)
        finally:
            os._exit(code)
    expected = 0 if words == ["recipes"] else 2
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == expected
    assert (tmp_path / "file").read_bytes() == b""


def test_workers_ignore_a_hangup_of_the_process_group(image_folder, tmp_path):
    """A shell sends SIGHUP to all processes of a job; only the main process handles it."""
    command = command_for(image_folder, tmp_path / "run", data__workers=2)
    child, other = start(command, "pipe")
    wait_for([child], tmp_path / "run", 3)
    os.killpg(child, signal.SIGHUP)
    with open(other, "rb") as output:  # noqa: PTH123
        assert output.read().count(b"SIGHUP: writing a checkpoint") == 1
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
    assert newest(tmp_path / "run").is_dir()
