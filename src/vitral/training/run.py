"""The run folder: who may write it, what it holds, and the signals that end a run in good order."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

import torch

from vitral import recipes
from vitral.config import CHANGEABLE, Config, UserError, flatten
from vitral.report.gather import read_rows
from vitral.storage import replacing
from vitral.training.distributed import World


class Signals:
    """Notes SIGTERM, SIGINT and SIGUSR1 while in use; a second one ends a lone process at once.

    Of several processes each may get a signal twice, from the terminal and from torchrun.
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

    def _note(self, number: int, _: FrameType | None) -> None:
        again = self.received is not None
        # torchrun hands on what a scheduler may have sent already.
        lone = self.world.size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ
        if again and lone:
            os._exit(128 + number)
        self.received = number
        if again or not self.world.main:
            return
        hint = "; once more to end at once" if lone else ""
        os.write(2, f"\n{signal.Signals(number).name}: writing a checkpoint{hint}\n".encode())


class RunFolder:
    """A run's folder, held by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock: IO[str] | None = None

    def refuse_other_settings(self, config: Config) -> list[str]:
        """Compares with the settings of the run that is there, if one is.

        Returns:
            A line for each setting that differs without altering the mathematics.

        Raises:
            UserError: for a setting that does alter it.
        """
        existing = self.path / "config.yaml"
        if not existing.exists():
            return []
        was, now = flatten(recipes.load(str(existing))), flatten(config)
        changed = [name for name in now if now[name] != was[name] and name != "train.out"]
        for name in changed:
            if name not in CHANGEABLE:
                raise UserError(
                    f"{name}: the run in {self.path} has {was[name]}, not {now[name]}; "
                    f"resume it with its own settings, or start another: --out {self._free_name()}"
                )
        return [f"{name}: {was[name]} becomes {now[name]}" for name in changed]

    def refuse_lost_checkpoints(self) -> None:
        """Raises UserError if the run that is there, without a checkpoint now, has had one.

        The first validation writes one, before any weights and any further row of the log.
        """
        rows = read_rows(self.path / "metrics.jsonl")
        validated = any("val_top1" in row for row in rows[:-1])
        if validated or (self.path / "weights").is_dir():
            raise UserError(
                f"out: the run in {self.path} cannot go on, as its checkpoints are gone; any "
                f"weights there stay of use; start another run: --out {self._free_name()}"
            )

    def open(self) -> None:
        """Makes the folder and takes its lock.

        Raises:
            UserError: if it cannot be written, or another process is training in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # flock would outlive a SIGKILL in forked workers; this lock dies with its process.
            self.lock = (self.path / ".lock").open("w")
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"out: another run is live in {self.path}; wait for it, or give another --out"
            ) from None
        except OSError as error:
            raise UserError(
                f"out: cannot write {self.path}: {error.strerror}; give another --out"
            ) from None

    def write_config(self, config: Config) -> None:
        """Writes config.yaml, a recipe that repeats the run."""
        with replacing(self.path / "config.yaml") as file:
            file.write_text(recipes.dump(config), encoding="utf-8")

    def write_environment(self, **facts: object) -> None:
        """Writes env.json: versions, hardware, command, and what was resolved."""
        packages = ("vitral", "torch", "torchvision", "torchcodec", "numpy", "safetensors")
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        environment = {
            "command": sys.argv,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": {name: version(name) for name in packages},
            "cpu_cores": os.cpu_count(),
            "gpu": gpu,
            "cuda": torch.version.cuda if gpu else None,
            **facts,
        }
        (self.path / "env.json").write_text(json.dumps(environment, indent=2) + "\n")

    def close(self) -> None:
        """Lets the lock go."""
        if self.lock is not None:
            self.lock.close()

    def _free_name(self) -> Path:
        number = 2
        while (other := self.path.with_name(f"{self.path.name}-{number}")).exists():
            number += 1
        return other

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()
