"""Saves and restores the state of a run, and checks that nothing has changed that must not."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

from vitral import settings, weights
from vitral.config import CHANGEABLE, BestBy, Config, flatten
from vitral.data.splits import Dataset
from vitral.documents import UnknownFieldError, convert_json
from vitral.errors import UserError, counted, short
from vitral.evaluation.output import TITLES, shown
from vitral.model import ViT
from vitral.rundir import RunDir, headline, read_rows
from vitral.storage import CorruptError
from vitral.training import checkpoint as checkpoints
from vitral.training.checkpoint import Checkpoint
from vitral.training.distributed import World, gather_full
from vitral.training.monitor import Counters
from vitral.training.optim import EMA, Optimizer
from vitral.training.plan import Plan
from vitral.training.resolved import Resolved

LENGTH = ("train.epochs", "train.time_budget")
OPTIMIZER_KEYS = ({"step", "exp_avg", "exp_avg_sq"}, {"momentum"})  # of AdamW and Muon


class Values(TypedDict):
    """The non-tensor values of a checkpoint."""

    schema: int
    step: int
    evaluated: int
    best: Mapping[str, float]
    stale: NotRequired[int]
    metrics: Mapping[str, float]
    thresholds: NotRequired[Mapping[str, tuple[float, ...]]]
    broken: tuple[tuple[int, str], ...]
    counters: tuple[float, ...]
    resolved: Resolved
    classes: tuple[str, ...]
    fingerprint: str
    config: Config
    parts: NotRequired[str]
    class_weights: NotRequired[tuple[float, ...]]


@dataclass
class Progress:
    """Progress of a run, without its tensors."""

    step: int = 0
    """Optimizer steps taken."""
    evaluated: int = 0
    """The step of the last validation."""
    saved: tuple[int, int] = (0, 0)
    """Step and last validation of the newest checkpoint."""
    best: Mapping[str, float] = field(default_factory=lambda: {"step": -1.0})
    """Step and metrics of the best weights by `train.best_by`; step -1 before the first
    validation."""
    stale: int = 0
    """Number of validations since the best one."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Results of the last validation."""
    thresholds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Thresholds of the classes, of "model" and "ema", if an image can have several labels."""

    def summary(self, best_by: BestBy) -> str:
        """Returns the results as text."""
        name = headline(self.metrics)
        text = f"val {TITLES[name]} {self.metrics[f'val_{name}']:.2%}"
        ema = self.metrics.get(f"ema_{name}")
        text += "" if ema is None else f", EMA {ema:.2%}"
        title = "" if best_by == name else f"{TITLES[best_by]} "
        best = title + shown(best_by, self.best[best_by])
        return f"{text}; best {best} at step {self.best['step']:.0f}"


@dataclass(frozen=True)
class State:
    """Everything that a checkpoint stores."""

    config: Config
    dataset: Dataset
    resolved: Resolved
    parts: str
    """The name of the parts that replace vitral's."""
    model: ViT
    optimizer: Optimizer
    ema: EMA | None
    counters: Counters
    progress: Progress
    class_weights: tuple[float, ...] = ()
    """Those of the loss, which may come from a file; empty if there are none."""

    def weights(self, world: World) -> dict[str, dict[str, torch.Tensor]]:
        """Returns full tensors of "model" and, if enabled, "ema". Every process must call this."""
        states = {"model": gather_full(dict(self.model.named_parameters()), world)}
        if self.ema is not None:
            states["ema"] = gather_full(self.ema.average, world)
        return states

    def checkpoint(self, world: World, broken: dict[int, str]) -> Checkpoint:
        """Returns the checkpoint of the current step. Every process must call this."""
        weights = self.weights(world)
        tensors = {
            "model": weights.pop("model"),
            "optimizer": gather_full(self.optimizer.state(), world),
            **weights,
        }
        state = {
            "evaluated": self.progress.evaluated,
            "best": self.progress.best,
            "stale": self.progress.stale,
            "metrics": self.progress.metrics,
            "thresholds": self.progress.thresholds,
            "broken": sorted(broken.items()),
            "counters": self.counters.values.tolist(),
            "resolved": dataclasses.asdict(self.resolved),
            "classes": self.dataset.classes,
            "fingerprint": self.dataset.fingerprint,
            "config": dataclasses.asdict(self.config),
            "parts": self.parts,
            "class_weights": self.class_weights,
        }
        return Checkpoint(self.progress.step, tensors, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restores all but the model's weights, which are loaded before the model is wrapped."""
        state, progress = checkpoint.state, self.progress
        self.optimizer.load_state(checkpoint.tensors["optimizer"])
        if self.ema is not None:
            self.ema.load_state(checkpoint.tensors["ema"])
        progress.step, progress.evaluated = checkpoint.step, state["evaluated"]
        progress.saved = (progress.step, progress.evaluated)
        progress.best, progress.metrics = state["best"], state["metrics"]
        progress.stale = state.get("stale", 0)
        progress.thresholds = state.get("thresholds", {})
        self.counters.values.copy_(
            torch.tensor(state["counters"], dtype=self.counters.values.dtype)
        )


def open_run(
    run: RunDir, world: World, check: Callable[[Checkpoint], None]
) -> tuple[Checkpoint | None, list[str]]:
    """Locks the run directory and reads the newest intact checkpoint, in every process.

    Args:
        check: raises CorruptError if a checkpoint must be skipped, or UserError.

    Returns:
        The checkpoint, None for a new run, and warnings.

    Raises:
        UserError: if the directory is in use, or its checkpoints are lost or damaged.
    """
    warnings: list[str] = []
    checkpoint = world.run_on_all_ranks(
        lambda: _lock_and_read(run, warnings, check) if world.is_main else None
    )
    known = (checkpoint.step, list(checkpoint.tensors), checkpoint.state) if checkpoint else None
    known = world.broadcast(known)
    if known is None:
        return None, warnings
    step, kinds, state = known
    tensors = {
        kind: world.broadcast_tensors(checkpoint.tensors[kind] if checkpoint else None)
        for kind in kinds
    }
    return Checkpoint(step, tensors, state), warnings


def _lock_and_read(
    run: RunDir, warnings: list[str], check: Callable[[Checkpoint], None]
) -> Checkpoint | None:
    def load(folder: Path, step: int) -> Checkpoint:
        found = read(folder, step)
        check(found)
        return found

    run.lock()
    checkpoint = checkpoints.latest(run.checkpoints, warnings.append, load)
    if checkpoint is None and warnings:
        raise UserError(
            f"out: no checkpoint in {run.checkpoints} can be used: {warnings[0]}; restore one, or "
            "start another run with --out"
        )
    if checkpoint is None:
        check_checkpoints_exist(run)
    return checkpoint


def read(folder: Path, step: int) -> Checkpoint:
    """Returns the checkpoint of a step, with `Values` as its state.

    Raises:
        CorruptError, UserError: as `read_values`, or if the tensors are damaged.
    """
    found = checkpoints.read(folder, step)
    values = read_values(folder, step)
    expected = {"model", "optimizer", *(["ema"] if values["config"].train.ema_decay else [])}
    if missing := sorted(expected - found.tensors.keys()):
        file = checkpoints.place(folder, step) / f"{missing[0]}.safetensors"
        raise CorruptError(f"{file}: missing")
    return dataclasses.replace(found, state=dict(values))


def read_values(folder: Path, step: int) -> Values:
    """Reads the non-tensor values of a step's checkpoint, which is untrusted.

    Raises:
        CorruptError: if a value is missing or invalid.
        UserError: if the checkpoint was written by another version of vitral.
    """
    file = checkpoints.place(folder, step) / "state.json"
    try:
        values = convert_json(Values, checkpoints.read_state(folder, step))
    except UnknownFieldError as error:
        raise UserError(
            f"out: {file} was not written by this version of vitral: {error}; resume with the "
            "version that wrote it, or start another run with --out"
        ) from None
    except UserError as error:
        raise CorruptError(f"{file}: {error}") from None
    evaluated, best, metrics = values["evaluated"], values["best"], values["metrics"]
    resolved, broken = values["resolved"], values["broken"]
    consistent = {
        "evaluated": 0 <= evaluated <= step,
        "best": math.isfinite(best.get("step", math.nan))
        and (not evaluated or values["config"].train.best_by in best),
        "stale": values.get("stale", 0) >= 0,
        "metrics": not evaluated or "val_loss" in metrics,
        "broken": all(i >= 0 for i, _ in broken),
        "counters": len(values["counters"]) == Counters.SIZE,
        "resolved": min(resolved.threads, resolved.micro_batch, resolved.processes) > 0,
    }
    for name, fine in consistent.items():
        if not fine:
            raise CorruptError(f"{file}: {name} has an invalid value")
    return values


def check_settings(run: RunDir, config: Config) -> list[str]:
    """Compares the settings with those of an existing run.

    Returns:
        A line for each setting that differs without changing the results.

    Raises:
        UserError: for a setting that changes the results.
    """
    if not run.config.exists():
        return []
    return _compare_settings(run, settings.load(str(run.config)), config)


def _compare_settings(run: RunDir, before: Config, after: Config) -> list[str]:
    old, new = (flatten(weights.absolute_paths(config)) for config in (before, after))
    changed = [name for name in new if new[name] != old[name] and name != "train.out"]
    changed.sort(key=lambda name: name not in LENGTH)  # other changes may follow from it
    for name in changed:
        if name not in CHANGEABLE:
            other = run.unused_name()
            fix = f"resume it with its original settings, or start another run: --out {other}"
            if name in LENGTH and (new[name] or 0) > (old[name] or 0) and run.weights.is_dir():
                fix = f"to train longer, start from its weights: --init {run.path} --out "
                fix += str(other)
            raise UserError(
                f"{name}: the run in {run.path} has {old[name]}, not {new[name]}; {fix}"
            )
    return [f"{name}: {old[name]} becomes {new[name]}" for name in changed]


def check_checkpoints_exist(run: RunDir) -> None:
    """Raises UserError if a run without checkpoints once had one.

    The first validation writes one, before any weights and any later row of the log.
    """
    validated = any("val_loss" in row for row in read_rows(run.metrics)[:-1])
    if validated or run.weights.is_dir():
        raise UserError(
            f"out: the run in {run.path} cannot be resumed, because its checkpoints are missing; "
            "its weights, if any, can still be used; "
            f"start another run: --out {run.unused_name()}"
        )


def check(
    config: Config, run: RunDir, dataset: Dataset, model: ViT, parts: str, checkpoint: Checkpoint
) -> None:
    """Raises UserError unless a checkpoint is one of this run, as `check_checkpoint` and
    `check_parts`, or CorruptError if its tensors are not those of the model.
    """
    check_checkpoint(config, run, dataset, checkpoint.step, checkpoint.state)
    check_parts(run, checkpoint.state.get("parts", ""), parts)
    check_tensors(checkpoint, run, model)


def check_checkpoint(
    config: Config, run: RunDir, dataset: Dataset, step: int, state: Mapping[str, Any]
) -> None:
    """Raises UserError unless a checkpoint has the settings, data and steps of this run.

    config.yaml, which `check_settings` reads, may have been edited or removed.
    """
    _compare_settings(run, state["config"], config)
    check_data(config, run, dataset, state["fingerprint"])
    assert dataset.train is not None
    if step > (total := Plan.of(config, len(dataset.train)).total):
        raise UserError(
            f"out: {run.path} has a checkpoint of step {step}, but the run has "
            f"{counted(total, 'step')}; "
            f"remove it, or start another run: --out {run.unused_name()}"
        )


def check_tensors(checkpoint: Checkpoint, run: RunDir, model: ViT) -> None:
    """Raises CorruptError unless the tensors of a checkpoint are those of the model."""
    own = {name: _form(parameter) for name, parameter in model.named_parameters()}
    for kind, tensors in checkpoint.tensors.items():
        if kind == "optimizer":
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            wrong = _wrong_states(tensors, trained)
        else:
            found = {name: _form(tensor) for name, tensor in tensors.items()}
            wrong = {name for name in found | own if found.get(name) != own.get(name)}
        if wrong:
            file = checkpoints.place(run.checkpoints, checkpoint.step) / f"{kind}.safetensors"
            raise CorruptError(f"{file}: {short(min(wrong))} does not fit the model")


def _wrong_states(
    tensors: Mapping[str, torch.Tensor], trained: Mapping[str, torch.Tensor]
) -> set[str]:
    """Returns the optimizer's tensors that fit no parameter, and parameters without a state."""
    wrong, keys = set(), {}
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        parameter = trained.get(owner)
        wanted = parameter if parameter is None or key != "step" else parameter.new_zeros(())
        if wanted is None or _form(tensor) != _form(wanted):
            wrong.add(name)
        keys.setdefault(owner, set()).add(key)
    # A head fitted to frozen features has no optimizer state.
    return wrong | {name for name in trained if keys and keys.get(name) not in OPTIMIZER_KEYS}


def _form(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def check_data(config: Config, run: RunDir, dataset: Dataset, fingerprint: str) -> None:
    """Raises UserError unless the dataset is the one that the run started with."""
    if dataset.fingerprint != fingerprint:
        raise UserError(
            f"data: {config.data.path} is not the dataset that the run in {run.path} started "
            "with; use that dataset, or start another run with --out"
        )


def check_parts(run: RunDir, old: str, new: str) -> None:
    """Raises UserError unless the model and optimizer are those that the run started with."""
    if old != new:
        own = "vitral's"
        raise UserError(
            f"parts: the run in {run.path} uses {old or own}, not {new or own}; resume it with the "
            "same parts, or start another run with --out"
        )


def check_class_weights(
    config: Config, run: RunDir, old: Sequence[float], new: Sequence[float]
) -> None:
    """Raises UserError unless the weights of the classes are those that the run started with."""
    if [*old] != [*new]:
        raise UserError(
            f"train.class_weights: {config.train.class_weights} has changed since the run in "
            f"{run.path} started; restore it, or start another run with --out"
        )


def check_resumable(config: Config, run: RunDir, dataset: Dataset) -> None:
    """Raises the UserError that resuming a run would raise, without reading tensors."""
    steps = checkpoints.steps(run.checkpoints)
    if not steps:
        check_checkpoints_exist(run)
    with contextlib.suppress(CorruptError):
        for step in steps:
            check_checkpoint(config, run, dataset, step, read_values(run.checkpoints, step))
