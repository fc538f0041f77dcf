"""Signals are recorded, the second one ends a single process, and handlers are restored."""

import os
import signal
import sys

import pytest

from vitral.training import signals
from vitral.training.distributed import World
from vitral.training.signals import SIGNAL_NUMBERS, Signals

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def _without_torchrun(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


@pytest.mark.parametrize("number", SIGNAL_NUMBERS)
def test_a_signal_is_recorded_and_announced_once(number, capfd):
    with Signals(World()) as recorded:
        assert recorded.received is None
        signal.raise_signal(number)
        assert recorded.received == number
    expected = f"\n{number.name}: writing a checkpoint; send it again to stop immediately\n"
    assert capfd.readouterr() == ("", expected)


def test_handlers_are_restored():
    before = {number: signal.getsignal(number) for number in SIGNAL_NUMBERS}

    def interrupted():
        with Signals(World()) as recorded:
            assert all(signal.getsignal(n) == recorded._record_signal for n in SIGNAL_NUMBERS)
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        interrupted()
    assert {number: signal.getsignal(number) for number in SIGNAL_NUMBERS} == before


def exit_code_after(numbers, world):
    """Returns the exit code of a forked process that receives signals, or 0 if it survives them."""
    child = os.fork()
    if not child:
        with Signals(world):
            for number in numbers:
                signal.raise_signal(number)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_second_signal_ends_a_single_process_at_once(monkeypatch):
    both = [signal.SIGTERM, signal.SIGINT]
    assert exit_code_after(both[:1], World()) == 0
    assert exit_code_after(both, World()) == 128 + signal.SIGINT
    assert exit_code_after(both[::-1], World()) == 128 + signal.SIGTERM
    hangup = signal.SIGHUP  # the kernel, the shell and systemd repeat it
    assert exit_code_after([hangup] * 3, World()) == 0
    assert exit_code_after([hangup, signal.SIGTERM, hangup], World()) == 0
    assert exit_code_after([hangup, *both], World()) == 128 + signal.SIGINT
    assert exit_code_after(both, World(0, 2)) == 0  # torchrun forwards what the terminal sent
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert exit_code_after(both, World()) == 0


def test_in_a_notebook_a_second_signal_interrupts_the_cell(monkeypatch):
    monkeypatch.setattr(signals, "in_notebook", lambda: True)
    with Signals(World()):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("rank", "lines"), [(0, 1), (1, 0)])
def test_only_the_main_process_prints(rank, lines, capfd):
    with Signals(World(rank, 2)) as recorded:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert recorded.received == signal.SIGUSR1
    assert capfd.readouterr().err == "\nSIGTERM: writing a checkpoint\n" * lines


def test_hangup_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals(World()) as recorded:
            signal.raise_signal(signal.SIGHUP)
            assert recorded.received is None
            signal.raise_signal(signal.SIGTERM)
            assert recorded.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_hangup_does_not_replace_the_signal_before_it():
    with Signals(World()) as recorded:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        assert recorded.received == signal.SIGTERM


@pytest.mark.parametrize("what", ["closed", "without a reader", "another file's"])
def test_a_signal_is_recorded_without_stderr(what, tmp_path):
    child = os.fork()
    if not child:
        os.close(2)
        if what == "without a reader":
            reader, writer = os.pipe()
            os.dup2(writer, 2)
            os.close(reader)
            os.close(writer)
        elif what == "another file's":
            sys.__stderr__ = None  # as in a process that was started without stderr
            os.dup2(os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT), 2)
        with Signals(World()) as recorded:
            signal.raise_signal(signal.SIGTERM)
        os._exit(recorded.received)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == signal.SIGTERM
    assert not any(path.stat().st_size for path in tmp_path.iterdir())
