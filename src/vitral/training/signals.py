"""Signals that stop a training run gracefully."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

from vitral.machine import in_notebook
from vitral.training.distributed import Interrupted, World

T = TypeVar("T")
SIGNAL_NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def handled_signals() -> list[signal.Signals]:
    """Returns the signals that stop a run gracefully, except an ignored SIGHUP, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in SIGNAL_NUMBERS if number != signal.SIGHUP or not ignored]


class Signals:
    """Context manager that records signals. A second signal ends a single process immediately.

    SIGHUP never counts as the second signal: the kernel and the shell each send it when a terminal
    disappears, and systemd sends it after SIGTERM. Each of several processes may receive a signal
    twice, from the terminal and from torchrun. In a notebook, the second signal interrupts the
    cell. Outside the main thread, where Python cannot install handlers, no signals are recorded.
    """

    def __init__(self, world: World) -> None:
        self.world = world

    def __enter__(self) -> Signals:
        self.received: int | None = None
        main = threading.current_thread() is threading.main_thread()
        numbers = handled_signals() if main else ()
        self.before = {number: signal.signal(number, self._record_signal) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Interrupted if a signal has arrived."""
        if self.received is not None:
            raise Interrupted(self.received)

    def until_signal(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items; after a signal to a single process, raises Interrupted instead.

        A single process thus abandons its optimizer step after the current micro-batch. Several
        processes would have to agree on each micro-batch, so they finish the step.
        """
        for item in items:
            if self.world.size == 1:
                self.check()
            yield item

    def _record_signal(self, number: int, _: FrameType | None) -> None:
        first = self.received is None
        # torchrun forwards signals that a scheduler may have sent to its children already.
        single = self.world.size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ
        second = self.received not in (None, signal.SIGHUP) and number != signal.SIGHUP
        if single and second:
            if in_notebook():
                raise KeyboardInterrupt
            os._exit(128 + number)
        if first or number != signal.SIGHUP:
            self.received = number
        # Without stderr, descriptor 2 may belong to another file.
        if not first or not self.world.is_main or sys.__stderr__ is None:
            return
        hint = "; send it again to stop immediately" if single else ""
        text = f"\n{signal.Signals(number).name}: writing a checkpoint{hint}\n"
        with contextlib.suppress(OSError):  # its reader or terminal no longer exists
            os.write(2, text.encode())
