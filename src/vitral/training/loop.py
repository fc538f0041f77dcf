"""The training loop: step, validate, log, checkpoint, and go on where a run was left."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vitral import weights
from vitral.config import Config, UserError
from vitral.data.fetch import describe, resolve_workers
from vitral.data.loader import Batch, eval_batches, train_batches
from vitral.data.rates import choose_decoder, verdict
from vitral.data.records import Dataset, Packed, Pixels
from vitral.data.sampling import Order, derive_seed
from vitral.data.sources import open_dataset
from vitral.evaluation import Scores, measure, merge
from vitral.evaluation.evaluate import EVAL_BATCH, pick_device
from vitral.model import ViT, count_flops
from vitral.report import curves, pictures
from vitral.report.gather import Predictions, read_rows, read_run
from vitral.report.html import write_report
from vitral.storage import CorruptError
from vitral.training import checkpoint as checkpoints
from vitral.training.checkpoint import Checkpoint
from vitral.training.distributed import (
    SHARDS,
    Agreement,
    Interrupted,
    World,
    check_processes,
    full,
    joined,
)
from vitral.training.metrics import Console, MetricsLog
from vitral.training.monitor import Clock, Counters, profiling
from vitral.training.optim import EMA, Schedule
from vitral.training.parallel import Averaged, InFixedOrder, gathered
from vitral.training.parts import Parts
from vitral.training.resolve import Resolved, build_model, prepare_device, resolve
from vitral.training.run import RunFolder, Signals
from vitral.training.trial import can_compile

PATIENCE = 10  # non-finite updates in a row that stop a run
TOLD = 10  # broken images that are named at once
BROKEN_SHARE = 0.001  # of the training images
OWN = Parts()


def train(recipe: str | Config = "digits", *arguments: str, parts: Parts = OWN) -> Path:
    """Trains a model, or goes on with a run that is there, and returns the run folder.

    Args:
        recipe: the name of a recipe, a YAML file, or settings with `train.out` given.
        arguments: changes to a recipe, as on the command line.
        parts: another model or optimiser than vitral's, for an experiment.

    Raises:
        UserError: for a mistake in the settings or the data.
        Interrupted: after a signal, when a checkpoint has been written.
    """
    config = recipe if isinstance(recipe, Config) else weights.load_settings(recipe, arguments)
    if config.train.out is None:
        raise UserError("train.out: expected a folder for the run, got none")
    run = RunFolder(Path(config.train.out))
    device = pick_device(config.train.device)
    with joined(device.type == "cuda") as world, run:
        device = world.together(lambda: world.device(device))
        notes, dataset, model = world.together(lambda: _prepare(config, run, world, parts))
        if len({*world.gather(dataset.fingerprint)}) > 1:
            raise UserError(f"data: {config.data.path} is not the same for all processes")
        warnings: list[str] = []
        checkpoint = world.together(lambda: _open(run, world, warnings))
        checkpoint = _from_main(checkpoint, world)
        trainer = world.together(
            lambda: Trainer(config, dataset, model, device, run, checkpoint, world, parts)
        )
        try:
            if world.main:
                run.write_config(config)
            for text in (*notes, *warnings):
                trainer.console.message(text)
            trainer.fit()
        finally:
            trainer.close()
    return run.path


def rehearse(config: Config) -> tuple[list[str], Dataset, ViT]:
    """Notes, data and model that `train` would begin with; nothing is written.

    Raises:
        UserError: where `train` does before its first step, but for what it finds in the tensors of
            checkpoints, in images, or of the machine.
    """
    run = RunFolder(Path(config.train.out or ""))
    folder = run.path / "checkpoints"
    begun = checkpoints.steps(folder)
    if not begun:
        run.refuse_lost_checkpoints()
    notes, dataset, model = _prepare(config, run, World(), OWN)
    with contextlib.suppress(CorruptError):
        for step in begun:
            state = checkpoints.read_state(folder, step)
            _refuse_other_data(config, run, dataset, state["fingerprint"])
    return notes, dataset, model


def _prepare(
    config: Config, run: RunFolder, world: World, parts: Parts
) -> tuple[list[str], Dataset, ViT]:
    """What is found to be wrong before anything is written."""
    check_processes(config, world.size)
    changes = run.refuse_other_settings(config) if world.main else []
    dataset = open_dataset(config.data, config.model.image_size, config.train.seed)
    begun = checkpoints.steps(run.path / "checkpoints")
    model = build_model(config, len(dataset.classes), parts.model)
    path, notes = config.train.init, [*dataset.notes, *changes]
    if path is not None and not begun:
        drawn = ", ".join(weights.start_from(model, path)) or "none"
        notes.append(f"begins from the weights in {path}; drawn anew: {drawn}")
    return notes, dataset, model


def _open(run: RunFolder, world: World, warnings: list[str]) -> Checkpoint | None:
    """Takes the run folder, and reads the checkpoint that the run goes on from."""
    if not world.main:
        return None
    run.open()
    folder = run.path / "checkpoints"
    checkpoint = checkpoints.latest(folder, warnings.append)
    if checkpoint is None and warnings:
        raise UserError(
            f"out: no checkpoint in {folder} can be used: {warnings[0]}; restore one, or "
            "start another run with --out"
        )
    if checkpoint is None:
        run.refuse_lost_checkpoints()
    return checkpoint


def _refuse_other_data(config: Config, run: RunFolder, dataset: Dataset, began: str) -> None:
    if dataset.fingerprint != began:
        raise UserError(
            f"data: {config.data.path} is not the set that the run in {run.path} began with; "
            "give that one, or start another run with --out"
        )


def _from_main(checkpoint: Checkpoint | None, world: World) -> Checkpoint | None:
    """The checkpoint that the main process has read, in every process."""
    known = (checkpoint.step, list(checkpoint.tensors), checkpoint.state) if checkpoint else None
    known = world.from_main(known)
    if known is None:
        return None
    step, kinds, state = known
    tensors = {
        kind: world.tensors_from_main(checkpoint.tensors[kind] if checkpoint else None)
        for kind in kinds
    }
    return Checkpoint(step, tensors, state)


class Trainer:
    """A run in progress: what changes from step to step, and how."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        model: ViT,
        device: torch.device,
        run: RunFolder,
        checkpoint: Checkpoint | None,
        world: World,
        parts: Parts = OWN,
    ) -> None:
        assert dataset.train is not None
        assert dataset.val is not None
        self.config, self.dataset, self.device, self.run = config, dataset, device, run
        self.world, self.agreement, self.parts = world, Agreement(world), parts
        self.records, self.val_records = dataset.train, dataset.val
        self.workers = resolve_workers(config.data, self.records, world.local_size)
        self._plan_steps()
        if checkpoint is not None:
            self._refuse_others(checkpoint)
        prepare_device(config, device)
        self.model = model.to(device)
        self.resolved = self._resolve(checkpoint)
        torch.set_num_threads(self.resolved.threads)
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint.tensors["model"])
        passes = InFixedOrder if config.train.reproducible else Averaged
        self.passes = passes(self.model, config.train, self.resolved, world)
        self.optimizer = parts.optimizer(self.model, config.optim)
        self.ema = EMA(self.model, config.train.ema_decay) if config.train.ema_decay else None

        self.step = 0
        self.evaluated = 0  # the step of the last validation
        self.saved = (0, 0)  # step and last validation of the newest checkpoint
        self.best = {"step": -1.0, "top1": -1.0}
        self.metrics: dict[str, float] = {}
        # The step and scores that the report is about: the best, or else the last since a resume.
        self.shown: tuple[int, Scores] | None = None
        self.broken: dict[int, str] = {}
        self.noted: dict[int, str] = {}  # by this process, since the last agreement
        self.counters = Counters(device)
        self.rows = 0  # written since the start or resumption
        if checkpoint is not None:
            self._restore(checkpoint)
        sides = {side for side, _ in config.train.progressive} | {config.model.image_size}
        self.flops = {side: self._count_flops(side, training=True) for side in sides}
        # The row of a validation that is still to be done is none to keep.
        undone = self.step in self.evaluations and self.evaluated != self.step
        self.log = MetricsLog(run.path, self.step - undone) if world.main else None
        self.console = Console(run.path / "train.log", self.total, self.step, not world.main)
        before = (self.log.seconds, self.log.energy) if self.log else (0.0, 0.0)
        self.clock = Clock(*before, self.resolved)
        self.last_checkpoint = self.last_drawing = time.monotonic()

    def _plan_steps(self) -> None:
        train = self.config.train
        order = Order(train.seed, len(self.records), train.batch_size)
        self.epoch_steps = len(self.records) / train.batch_size
        self.total = order.end_of_epoch(train.epochs)
        ends = range(train.eval_every, train.epochs, train.eval_every)
        self.evaluations = {order.end_of_epoch(epoch) for epoch in ends} | {self.total}
        warmup = round(self.config.optim.warmup_epochs * self.epoch_steps)
        self.schedule = Schedule(self.config.optim, warmup, self.total)

    def _resolve(self, checkpoint: Checkpoint | None) -> Resolved:
        """The choices of a new run, or those that it began with, the number of processes aside."""
        config, device, world = self.config, self.device, self.world
        if checkpoint is None:
            found = world.together(
                lambda: choose_decoder(self.records, config, self.workers, device)
            )
            decoder, self.rates = world.from_main(found)
            return resolve(config, self.model, device, world, decoder)
        began = Resolved(**checkpoint.state["resolved"])
        self.rates = {}
        if began.device != device.type:
            raise UserError(
                f"train.device: the run in {self.run.path} began on {began.device}, not "
                f"{device.type}; resume it there, or start another run with --out"
            )
        if began.compile and not all(world.gather(can_compile(device))):
            raise UserError(
                f"train.compile: the run in {self.run.path} is compiled, which fails on this "
                "machine; resume it where it does not, or start another run with --out"
            )
        if config.train.reproducible:  # else the micro-batch would hang on free memory
            return dataclasses.replace(began, processes=world.size)
        if began.processes == world.size:
            return began
        now = resolve(config, self.model, device, world, began.decoder)
        kept = {name: getattr(began, name) for name in ("precision", "compile", "fused")}
        return dataclasses.replace(now, **kept)

    def fit(self) -> None:
        """Trains to the last step; at a signal writes a checkpoint and raises Interrupted."""
        self._mend_weights()
        if self.step == self.total == self.evaluated:
            self.console.message(f"this run is finished: {self._results()}")
            return
        self._announce()
        with (
            Signals(self.world) as signals,
            profiling(self.config.train.profile and self.world.main, self.run.path) as profiler,
        ):
            try:
                self._look_at_validation(signals)
                batches = self._train_batches()  # whose workers start at once
                self._validate_if_due(signals)  # a signal may have come in the middle of it
                while self.step < self.total:
                    self._update(batches)
                    if profiler is not None:
                        profiler.step()
                    self._report_if_due()
                    self._validate_if_due(signals)
                    late = self.world.main and self._checkpoint_is_late()
                    if late:  # agreed on a step later, and not to be asked for once more then
                        self.last_checkpoint = time.monotonic()
                    signal, late = self.agreement.exchange(signals.received or 0, late)
                    self._checkpoint_if_due(bool(late))
                    if signal and self.step < self.total:
                        raise Interrupted(signal)
                self.agreement.finish()
            except Interrupted:
                self.agreement.finish()
                self._save_checkpoint()
                self.world.gather(None)  # torchrun ends the others once one of them has gone
                self.console.message(f"stopped at step {self.step}; the same command goes on")
                raise
        self._save_checkpoint()
        self._draw()
        self._write_report()
        self.console.message(f"finished: {self._results()}; all of it is in {self.run.path}")

    def _train_batches(self) -> Iterator[Batch]:
        return train_batches(
            self.records,
            self.config,
            len(self.dataset.classes),
            steps=range(self.step, self.total),
            total_steps=self.total,
            micro_batch=self.resolved.micro_batch,
            workers=self.workers,
            device=self.device,
            share=(self.world.rank, self.world.size),
            parts=SHARDS // self.world.size if self.config.train.reproducible else 1,
            decoder=self.resolved.decoder,
        )

    def close(self) -> None:
        """Flushes the logs."""
        if self.log is not None:
            self.log.close()
        self.console.close()

    def _update(self, batches: Iterator[Batch]) -> None:
        """One optimiser step over the micro-batches of a global batch."""
        train = self.config.train
        self.model.train()
        total = torch.zeros((), device=self.device)
        done, share, side = 0, train.batch_size // self.world.size, 0
        while done < share:
            batch = next(batches)
            self.clock.waited += batch.waited
            assert batch.step == self.step
            self._note_broken(batch)
            if self.step == batch.first == 0:
                self._save_picture(batch.images[:32])
            torch.manual_seed(derive_seed("dropout", train.seed, self.step, batch.first))
            done, side = done + len(batch.images), batch.images.shape[-1]
            total += self.passes.accumulate(batch, last=done == share)
        total = self.passes.reduce(total)
        norm, skipped = self.optimizer.step(self.schedule.lr(self.step), total)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.step)
        self.counters.add(total, norm, skipped)
        self.clock.count(train.batch_size, self.flops[side])

    def _report_if_due(self) -> None:
        """Shows progress, and writes the log row of a step that is not validated."""
        if self.world.main and self.console.due():
            seen, pace = self.counters.read(), self.clock.read()
            if self.world.size == 1:
                self._stop_if_diverged(seen["worst"])
            text = (
                f"epoch {self.step / self.epoch_steps:.1f}  loss {seen['loss']:.3f}  "
                f"lr {self.schedule.lr(self.step - 1):.1e}  norm {seen['grad_norm']:.2f}  "
                f"{pace['images_per_second']:,.0f} img/s  wait {pace['data_wait']:.0%}  "
                f"{pace['memory_gb']:.1f} GB"
            )
            text += f"  MFU {pace['mfu']:.0%}" if "mfu" in pace else ""
            left = (self.total - self.step) * self.config.train.batch_size
            self.console.progress(self.step, text, left / max(pace["images_per_second"], 1e-9))
        if self.step % self.config.train.log_every == 0 and self.step not in self.evaluations:
            self._write_row(self.clock.read(), {})

    def _write_row(self, pace: dict[str, float], measured: dict[str, float]) -> None:
        seen = self.counters.read()
        self._stop_if_diverged(seen.pop("worst"))
        self._agree_on_broken()
        row = {
            "step": self.step,
            "epoch": self.step / self.epoch_steps,
            "images": self.step * self.config.train.batch_size,
            "lr": self.schedule.lr(self.step - 1),
            **seen,
            "broken": len(self.broken),
            **measured,
            **pace,
        }
        if self.log is not None:
            self.log.write(row)
        self.counters.start_row()
        self.clock.start_row()
        self.rows += 1
        # The first row has the workers' start and compilation in it.
        if self.rows == 2 and not isinstance(self.records, Pixels):
            packed = isinstance(self.records, Packed)
            self.console.message(verdict(pace["data_wait"], packed=packed))

    def _stop_if_diverged(self, worst: float) -> None:
        if worst >= PATIENCE:
            raise UserError(
                f"training: {PATIENCE} updates in a row were not finite before step {self.step}; "
                f"the last checkpoint is intact; lower optim.lr {self.config.optim.lr:g}, or clip"
            )

    def _validate_if_due(self, signals: Signals) -> None:
        if self.step not in self.evaluations or self.evaluated == self.step:
            return
        pace = self.clock.read()
        scores = {"val": self._measure(signals)}
        if self.ema is not None:
            with self.ema.applied():
                scores["ema"] = self._measure(signals)
        measured = {f"{k}_{m}": v for k, s in scores.items() for m, v in s.metrics().items()}
        self._write_row(pace, measured)
        self.metrics = {"step": self.step, **measured}
        self.evaluated = self.step
        self._keep_weights(scores)
        shown = "  ".join(f"{kind} top-1 {s.top1:.2%}" for kind, s in scores.items())
        self.console.message(
            f"epoch {self.step / self.epoch_steps:.0f}: {shown}  val loss {scores['val'].loss:.3f}"
        )
        if time.monotonic() - self.last_drawing > 60:
            self._draw()
        self.clock.start_row()  # the next row is about training alone

    def _draw(self) -> None:
        if self.log is not None:
            curves.draw(self.run.path, read_rows(self.log.jsonl))
        self.last_drawing = time.monotonic()

    def _write_report(self) -> None:
        if not self.world.main:
            return
        predictions, missing = None, "the run was resumed after its last validation"
        if not self.parts.describable:
            missing = f"the model is another than vitral's: {self.parts.name}"
        elif self.shown is not None:
            step, scores = self.shown
            name = "best" if step == self.best["step"] else "last"
            found = weights.load(self.run.path / "weights" / name)
            predictions = Predictions(scores, self.val_records, found)
        run = read_run(self.run.path)
        write_report(run, self.run.path / "report.html", predictions, missing)

    def _measure(self, signals: Signals) -> Scores:
        self.model.eval()

        def forward(images: Tensor) -> Tensor:
            with self.resolved.autocast():
                return self.passes.forward(images)

        with gathered(self.model):
            part = self.world.together(
                lambda: measure(forward, self._val_batches(signals), self.dataset.classes)
            )
        return merge(self.world.gather(part))

    def _val_batches(self, signals: Signals) -> Iterator[Batch]:
        """This process's part of the validation images, until a signal comes."""
        batches = eval_batches(
            self.val_records,
            self.config,
            min(EVAL_BATCH, len(self.val_records)),
            self.workers,
            self.device,
            (self.world.rank, self.world.size),
            self.resolved.decoder,
        )
        for batch in batches:
            # Alone it may end at once; of many, all go on to the next step.
            if signals.received and self.world.size == 1:
                raise Interrupted(signals.received)
            yield batch

    def _look_at_validation(self, signals: Signals) -> None:
        """Decodes the validation images before the first step.

        One that is broken would else end the run at its first validation, hours later.
        """
        if self.step > 0 or isinstance(self.val_records, Packed | Pixels):
            return
        self.console.message(f"decodes the {len(self.val_records):,} validation images once")
        self.world.together(lambda: collections.deque(self._val_batches(signals), maxlen=0))
        self.clock.start_row()

    def _keep_weights(self, scores: dict[str, Scores]) -> None:
        """Writes weights/last, weights/best if these are, and the tables of the better kind."""
        kind = max(scores, key=lambda k: scores[k].top1)
        top1 = scores[kind].top1
        states = {"model": full(self.optimizer.named, self.world)}
        if self.ema is not None:
            states["ema"] = full(self.ema.average, self.world)
        best = top1 > self.best["top1"]
        if self.world.main:
            scores[kind].write_tables(self.run.path)
        if best:
            self.best = {"step": self.step, "top1": top1}
            # Before the weights: where there are any, there was a checkpoint.
            self._save_checkpoint()
        if self.world.main and self.parts.describable:
            names = ["last", "best"] if best else ["last"]
            self._write_weights(states, names, self.metrics)
        if self.shown is None or self.shown[0] != self.best["step"]:
            self.shown = (self.step, scores[kind])

    def _write_weights(
        self, states: dict[str, dict[str, Tensor]], names: list[str], metrics: dict[str, float]
    ) -> None:
        folder, description = self.run.path / "weights", self._describe(metrics)
        folder.mkdir(exist_ok=True)
        for name in names:
            weights.save(folder / name, states, description)

    def _describe(self, metrics: dict[str, float]) -> weights.Description:
        dataset = self.dataset
        return weights.describe(self.config, dataset.classes, dataset.fingerprint, metrics)

    def _mend_weights(self) -> None:
        """Writes weights again that are damaged, older than their checkpoint, or of moved data."""
        if not self.world.main or not self.parts.describable:
            return
        steps = {"best": int(self.best["step"])} if self.evaluated else {}
        if self.evaluated == self.step > 0:  # else the next validation writes them
            steps["last"] = self.step
        place = self._describe({}).config.data.path
        for name, step in steps.items():
            try:
                known = weights.load(self.run.path / "weights" / name).description
            except UserError:
                known = None
            found = known.metrics["step"] if known else -1
            # Those of a later step come again, as that step does.
            if found < step or (known and found == step and known.config.data.path != place):
                self._write_weights_again(name, step)

    def _write_weights_again(self, name: str, step: int) -> None:
        try:
            found = checkpoints.read(self.run.path / "checkpoints", step)
        except CorruptError as error:
            self.console.message(f"weights/{name} cannot be written again: {error}")
            return
        states = {kind: found.tensors[kind] for kind in found.tensors if kind != "optimizer"}
        self._write_weights(states, [name], found.state["metrics"])
        self.console.message(f"weights/{name} written again from the checkpoint of step {step}")

    def _checkpoint_is_late(self) -> bool:
        return time.monotonic() - self.last_checkpoint > 60 * self.config.train.checkpoint_minutes

    def _checkpoint_if_due(self, late: bool) -> None:
        every = self.config.train.checkpoint_steps
        if late or (every is not None and self.step % every == 0):
            self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        if self.saved == (self.step, self.evaluated):
            return
        self._stop_if_diverged(self.counters.read()["worst"])
        self._agree_on_broken()
        tensors = {
            "model": full(self.optimizer.named, self.world),
            "optimizer": full(self.optimizer.state(), self.world),
        }
        if self.ema is not None:
            tensors["ema"] = full(self.ema.average, self.world)
        state = {
            "evaluated": self.evaluated,
            "best": self.best,
            "metrics": self.metrics,
            "broken": sorted(self.broken.items()),
            "counters": self.counters.values.tolist(),
            "resolved": dataclasses.asdict(self.resolved),
            "classes": self.dataset.classes,
            "fingerprint": self.dataset.fingerprint,
            "config": dataclasses.asdict(self.config),
            "parts": self.parts.name,
        }
        folder = self.run.path / "checkpoints"
        if self.log is not None:
            self.log.board.flush()
            checkpoints.save(folder, Checkpoint(self.step, tensors, state), int(self.best["step"]))
        self.saved = (self.step, self.evaluated)
        self.last_checkpoint = time.monotonic()

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        self.optimizer.load_state(checkpoint.tensors["optimizer"])
        if self.ema is not None:
            self.ema.load_state(checkpoint.tensors["ema"])
        self.step = checkpoint.step
        self.evaluated, self.best = state["evaluated"], state["best"]
        self.saved = (self.step, self.evaluated)
        self.metrics, self.broken = state["metrics"], dict(state["broken"])
        self.counters.values.copy_(torch.tensor(state["counters"], dtype=torch.float64))

    def _refuse_others(self, checkpoint: Checkpoint) -> None:
        """Raises UserError for other data than the run began with, or other parts."""
        began = checkpoint.state["fingerprint"]
        _refuse_other_data(self.config, self.run, self.dataset, began)
        began, now = checkpoint.state.get("parts", ""), self.parts.name
        if began != now:
            raise UserError(
                f"parts: the run in {self.run.path} has {began or 'those of vitral'}, not "
                f"{now or 'those of vitral'}; resume it with its own, or start another with --out"
            )

    def _count_flops(self, side: int, *, training: bool) -> float:
        model, classes = self.config.model, len(self.dataset.classes)
        return count_flops(model, classes, side, training=training, build=self.parts.model)

    def _note_broken(self, batch: Batch) -> None:
        """Remembers records that could not be decoded."""
        self.noted.update(batch.broken)
        if self.noted and self.world.size == 1:
            self._agree_on_broken()

    def _agree_on_broken(self) -> None:
        """Logs records that a process could not decode, and stops where they are too many."""
        noted = {k: reason for part in self.world.gather(self.noted) for k, reason in part.items()}
        self.noted = {}
        fresh = {index: noted[index] for index in sorted(noted) if index not in self.broken}
        self.broken |= fresh
        for index, reason in list(fresh.items())[:TOLD]:
            where = describe(self.records, index)
            self.console.message(f"broken image replaced by another: {where}: {reason}")
        if len(fresh) > TOLD:
            self.console.message(f"and {len(fresh) - TOLD} others")
        if len(self.broken) > BROKEN_SHARE * len(self.records):
            first = sorted(self.broken)[:TOLD]
            names = ", ".join(describe(self.records, index) for index in first)
            raise UserError(
                f"data: {len(self.broken)} of {len(self.records)} training images are broken, more "
                f"than {BROKEN_SHARE:.1%}: {names} (the first: {self.broken[first[0]]}); "
                "mend or remove them and start anew; "
                "`vitral data check` finds all"
            )

    def _save_picture(self, images: Tensor) -> None:
        if self.log is not None:
            grid = pictures.grid(pictures.to_pixels(images, self.config.data))
            pictures.save(grid, self.run.path / "train_batch.jpg")
            self.log.picture(grid)

    def _announce(self) -> None:
        resolved, size = self.resolved, self.config.train.batch_size
        how = {"cuda": " with fused kernels", "cpu": ", linear layers by oneDNN"}
        parameters = sum(p.numel() for p in self.optimizer.named.values())
        flops = self._count_flops(self.config.model.image_size, training=False)
        if self.world.main:
            self.run.write_environment(
                resolved=dataclasses.asdict(resolved),
                workers=self.workers,
                parts=self.parts.name,
                held_out=self.dataset.held_out,
                parameters=parameters,
                flops_per_image=flops,
                training_flops_per_image=3 * self.flops[self.config.model.image_size],
                step=self.step,
                decode_rates=self.rates,
            )
        start = f"goes on from step {self.step}" if self.step else "starts"
        self.console.message(
            f"{self.run.path} {start}: {self.dataset.name}, {len(self.records):,} images to train "
            f"on, {len(self.val_records):,} to validate, {len(self.dataset.classes)} classes"
        )
        if self.rates:
            rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in self.rates.items())
            self.console.message(f"the {resolved.decoder} decodes; images/s measured: {rates}")
        self.console.message(
            f"{parameters / 1e6:.2f} M parameters, {flops / 1e9:.3f} GFLOPs an "
            f"image; {self.total:,} steps of {size} images in micro-batches of "
            f"{resolved.micro_batch}, on {resolved.device} in {resolved.precision}"
            + (", compiled" if resolved.compile else "")
            + (how[resolved.device] if resolved.fused else "")
            + f", threads: {resolved.threads}, workers: {self.workers}"
            + (f", in each of {resolved.processes} processes" if resolved.processes > 1 else "")
        )

    def _results(self) -> str:
        measured = self.metrics
        text = f"val top-1 {measured['val_top1']:.2%}"
        text += f", EMA {measured['ema_top1']:.2%}" if "ema_top1" in measured else ""
        return f"{text}; best {self.best['top1']:.2%} at step {self.best['step']:.0f}"
