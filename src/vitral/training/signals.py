"""Signals that end a training run in good order."""

from __future__ import annotations

import os
import signal
from types import FrameType

from vitral.training.distributed import Interrupted, World


class Signals:
    """Records SIGTERM, SIGINT and SIGUSR1 while in use; a second one ends a lone process at once.

    Of several processes each may receive a signal twice, from the terminal and from torchrun.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, world: World) -> None:
        self.world = world

    def __enter__(self) -> Signals:
        self.received: int | None = None
        self.before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
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
            os._exit(128 + number)
        self.received = number
        if again or not self.world.main:
            return
        hint = "; send it again to stop at once" if lone else ""
        os.write(2, f"\n{signal.Signals(number).name}: writing a checkpoint{hint}\n".encode())
