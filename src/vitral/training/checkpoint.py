"""Checkpoints: checkpoints/step_NNNNNNN, each a verified directory without pickles."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vitral import storage
from vitral.errors import short

SCHEMA = 2
NUM_KEPT = 3


@dataclass(frozen=True)
class Checkpoint:
    """State to resume a run from: tensors of "model", "optimizer" and "ema", and other values."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, best_step: int | None) -> None:
    """Writes and verifies a checkpoint, then removes all but the last three and `best_step`.

    Raises:
        OSError, CorruptError: if writing fails; older checkpoints are unchanged.
    """
    storage.make_directory(folder)
    directory = place(folder, checkpoint.step)
    state = {"schema": SCHEMA, "step": checkpoint.step, **checkpoint.state}
    storage.write(directory, checkpoint.tensors, {"state": state})
    storage.verify(directory)
    present = sorted(steps(folder), reverse=True)
    for step in present[NUM_KEPT:]:
        if step != best_step:
            storage.remove(place(folder, step))
    for leftover in folder.glob(".step_*"):  # from a write that was killed
        storage.remove(leftover)


def read(folder: Path, step: int) -> Checkpoint:
    """Returns the verified checkpoint of a step. Raises CorruptError if damaged or missing."""
    directory = place(folder, step)
    storage.check_files(directory)
    state = read_state(folder, step)
    names = [path.stem for path in sorted(directory.glob("*.safetensors"))]
    tensors = {name: storage.read_tensors(directory, name) for name in names}
    return Checkpoint(step, tensors, state)


def read_state(folder: Path, step: int) -> dict[str, Any]:
    """Returns the non-tensor values of a step's checkpoint. Raises CorruptError."""
    directory = place(folder, step)
    state = storage.read_json(directory, "state.json")
    for name, expected in (("schema", SCHEMA), ("step", step)):
        if state.get(name) != expected:
            got = short(state.get(name))
            raise storage.CorruptError(f"{directory}: {name} {got}, not {expected}")
    return state


def latest(
    folder: Path,
    warn: Callable[[str], None],
    load: Callable[[Path, int], Checkpoint] = read,
) -> Checkpoint | None:
    """Returns the checkpoint of the highest step that `load` can read, or None.

    Args:
        warn: called with a message for each checkpoint that is skipped.
        load: reads the checkpoint of a step, or raises CorruptError.
    """
    for aside in folder.glob(".step_*.old"):
        storage.recover(folder / aside.name[1:-4])
    for step in sorted(steps(folder), reverse=True):
        try:
            return load(folder, step)
        except storage.CorruptError as error:
            warn(f"checkpoint of step {step} skipped: {error}")
    return None


def place(folder: Path, step: int) -> Path:
    """Returns the directory of the checkpoint of a step."""
    return folder / f"step_{step:07d}"


def steps(folder: Path) -> list[int]:
    """Returns the steps of all checkpoints, intact or not: directories, or links to them."""
    if not folder.is_dir():
        return []
    directories = (path for path in folder.iterdir() if path.is_dir())
    matches = (re.fullmatch(r"step_(\d{7,})", path.name) for path in directories)
    return [int(match[1]) for match in matches if match]
