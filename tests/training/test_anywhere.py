"""Training in threads and event loops, and with unusual output streams.

Each run must equal `finished`, which was trained in a separate process.
"""

import asyncio
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest

from vitral.errors import UserError
from vitral.rundir import RunDir
from vitral.training import train
from vitral.training.distributed import exclusive_training
from vitral.training.signals import SIGNAL_NUMBERS

from .processes import digests, make_config

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


class Stream:
    """Only has `write` and `flush`, like a replacement for stdout in another program."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.fixture
def config(image_folder, tmp_path):
    return make_config(image_folder, tmp_path / "run", data__workers=2)


def displayed(result):
    """The picture that a notebook displays for a result; None if there is none."""
    if find_spec("IPython"):
        from IPython.core.interactiveshell import InteractiveShell

        return InteractiveShell().display_formatter.format(result)[0].get("image/png")
    return result._repr_png_()


def check(run, finished):
    assert digests(run) == digests(finished)
    assert RunDir(run).report.is_file()


def test_training_in_a_thread(config, finished):
    with ThreadPoolExecutor() as pool:
        run = pool.submit(train, config).result()
    check(run, finished)
    assert os.fspath(run) == config.train.out
    picture = (run / "curves.png").read_bytes()
    assert displayed(run) == picture
    assert displayed(run / "weights") is None


def test_training_in_an_event_loop(config, finished):
    before = [signal.getsignal(number) for number in SIGNAL_NUMBERS]

    async def main():
        return train(config)

    check(asyncio.run(main()), finished)
    assert [signal.getsignal(number) for number in SIGNAL_NUMBERS] == before


@pytest.mark.parametrize("kind", [Stream, lambda: None])
def test_training_with_other_streams(config, finished, monkeypatch, kind):
    stream = kind()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", kind())
    check(train(config), finished)
    if stream is not None:
        assert "\nfinished: val top-1 " in stream.text


def test_a_second_training_is_rejected_while_one_runs(config):
    seen, end = threading.Event(), threading.Event()

    def first():
        with exclusive_training():
            seen.set()
            end.wait()

    thread = threading.Thread(target=first)
    thread.start()
    seen.wait()
    with pytest.raises(UserError, match="expected one training run at a time in a process"):
        train(config)
    end.set()
    thread.join()
    assert not RunDir(config.train.out).path.exists()
    with exclusive_training():  # the lock is free again
        pass
