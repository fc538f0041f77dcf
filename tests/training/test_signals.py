"""Signals are recorded, the second one ends a lone process, and handlers are put back."""

import os
import signal

import pytest

from vitral.training import signals
from vitral.training.distributed import World
from vitral.training.signals import Signals

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def _without_torchrun(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_recorded_and_announced_once(number, capfd):
    with Signals(World()) as recorded:
        assert recorded.received is None
        signal.raise_signal(number)
        assert recorded.received == number
    expected = f"\n{number.name}: writing a checkpoint; send it again to stop at once\n"
    assert capfd.readouterr() == ("", expected)


def test_handlers_are_put_back():
    before = {number: signal.getsignal(number) for number in Signals.NUMBERS}

    def interrupted():
        with Signals(World()) as recorded:
            assert all(signal.getsignal(n) == recorded._note for n in Signals.NUMBERS)
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        interrupted()
    assert {number: signal.getsignal(number) for number in Signals.NUMBERS} == before


def exit_code_after(numbers, world):
    """Of a forked process that gets signals, or 0 if it survives them."""
    child = os.fork()
    if not child:
        with Signals(world):
            for number in numbers:
                signal.raise_signal(number)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_second_signal_ends_a_lone_process_at_once(monkeypatch):
    both = [signal.SIGTERM, signal.SIGINT]
    assert exit_code_after(both[:1], World()) == 0
    assert exit_code_after(both, World()) == 128 + signal.SIGINT
    assert exit_code_after(both[::-1], World()) == 128 + signal.SIGTERM
    assert exit_code_after(both, World(0, 2)) == 0  # torchrun forwards what the terminal sent
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert exit_code_after(both, World()) == 0


def test_in_a_notebook_the_second_signal_ends_the_cell(monkeypatch):
    monkeypatch.setattr(signals, "in_notebook", lambda: True)
    with Signals(World()):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("rank", "lines"), [(0, 1), (1, 0)])
def test_the_main_process_of_several_speaks(rank, lines, capfd):
    with Signals(World(rank, 2)) as recorded:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert recorded.received == signal.SIGUSR1
    assert capfd.readouterr().err == "\nSIGTERM: writing a checkpoint\n" * lines


def test_a_signal_is_recorded_without_stderr():
    child = os.fork()
    if not child:
        os.close(2)
        with Signals(World()) as recorded:
            signal.raise_signal(signal.SIGTERM)
        os._exit(recorded.received)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == signal.SIGTERM
