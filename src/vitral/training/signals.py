"""Signals that end a training run in good order."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType

from vitral.machine import in_notebook
from vitral.training.distributed import Interrupted, World


class Signals:
    """Records SIGTERM, SIGINT and SIGUSR1 while in use; a second one ends a lone process at once.

    Of several processes each may receive a signal twice, from the terminal and from torchrun.
    In a notebook the second one ends the cell. Outside the main thread, where Python installs no
    handlers, nothing is recorded.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, world: World) -> None:
        self.world = world

    def __enter__(self) -> Signals:
        self.received: int | None = None
        main = threading.current_thread() is threading.main_thread()
        numbers = self.NUMBERS if main else ()
        self.before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Interrupted if a signal has arrived."""
        if self.received is not None:
            raise Interrupted(self.received)

    def _note(self, number: int, _: FrameType | None) -> None:
        again = self.received is not None
        # torchrun forwards signals that a scheduler may have sent to its children already.
        lone = self.world.size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ
        if again and lone:
            if in_notebook():
                raise KeyboardInterrupt
            os._exit(128 + number)
        self.received = number
        if again or not self.world.main:
            return
        hint = "; send it again to stop at once" if lone else ""
        text = f"\n{signal.Signals(number).name}: writing a checkpoint{hint}\n"
        with contextlib.suppress(OSError):  # a process without stderr
            os.write(2, text.encode())
