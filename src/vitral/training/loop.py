"""The training loop: step, validate, log, checkpoint, and go on where a run was left."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from vitral import recipes, weights
from vitral.config import Config, UserError
from vitral.data.fetch import describe, resolve_workers
from vitral.data.loader import Batch, eval_batches, train_batches
from vitral.data.records import Dataset
from vitral.data.sampling import Order, derive_seed
from vitral.data.sources import open_dataset
from vitral.evaluation import Scores, measure
from vitral.evaluation.evaluate import pick_device
from vitral.model import ViT, count_flops
from vitral.report import curves, pictures
from vitral.training import checkpoint as checkpoints
from vitral.training.checkpoint import Checkpoint
from vitral.training.metrics import Console, MetricsLog, read_rows
from vitral.training.monitor import Clock, Counters, profiling
from vitral.training.optim import EMA, Optimizer, Schedule, loss_sum
from vitral.training.resolve import Resolved, build_model, compiled, prepare_device, resolve
from vitral.training.run import Interrupted, RunFolder, Signals

PATIENCE = 10  # non-finite updates in a row that stop a run
BROKEN_SHARE = 0.001  # of the training images
EVAL_BATCH = 256


def train(recipe: str | Config = "digits", *arguments: str) -> Path:
    """Trains a model, or goes on with a run that is there, and returns the run folder.

    Args:
        recipe: the name of a recipe, a YAML file, or settings with `train.out` given.
        arguments: changes to a recipe, as on the command line.

    Raises:
        UserError: for a mistake in the settings or the data.
        Interrupted: after a signal, when a checkpoint has been written.
    """
    config = recipe if isinstance(recipe, Config) else recipes.load(recipe, arguments)
    if config.train.out is None:
        raise UserError("train.out: expected a folder for the run, got none")
    run = RunFolder(Path(config.train.out))
    changes = run.refuse_other_settings(config)
    device = pick_device(config.train.device)
    dataset = open_dataset(config.data, config.model.image_size, config.train.seed)
    folder, warnings = run.path / "checkpoints", []
    model = build_model(config, len(dataset.classes), init=not checkpoints.steps(folder))
    with run:
        run.open()
        checkpoint = checkpoints.latest(folder, warnings.append)
        if checkpoint is None and warnings:
            raise UserError(
                f"out: no checkpoint in {folder} can be used: {warnings[0]}; restore one, or "
                "start another run with --out"
            )
        trainer = Trainer(config, dataset, model, device, run, checkpoint)
        run.write_config(config)
        try:
            for text in (*dataset.notes, *changes, *warnings):
                trainer.console.message(text)
            trainer.fit()
        finally:
            trainer.close()
    return run.path


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
    ) -> None:
        assert dataset.train is not None
        assert dataset.val is not None
        self.config, self.dataset, self.device, self.run = config, dataset, device, run
        self.records, self.val_records = dataset.train, dataset.val
        prepare_device(config, device)
        self.model = model.to(device)
        self.optimizer = Optimizer(model, config.optim)
        self.ema = EMA(model, config.train.ema_decay) if config.train.ema_decay else None
        self._plan_steps()

        self.step = 0
        self.evaluated = 0  # the step of the last validation
        self.saved = (0, 0)  # step and last validation of the newest checkpoint
        self.best = {"step": -1.0, "top1": -1.0}
        self.metrics: dict[str, float] = {}
        self.broken: dict[int, str] = {}
        self.counters = Counters(device)
        if checkpoint is None:
            self.resolved = resolve(config, self.model, device)
        else:
            self._restore(checkpoint)
        torch.set_num_threads(self.resolved.threads)
        self.forward = compiled(self.model, self.resolved)
        self.workers = resolve_workers(config.data, self.records)
        self.flops = count_flops(config.model, len(dataset.classes))
        # The row of a validation that is still to be done is none to keep.
        undone = self.step in self.evaluations and self.evaluated != self.step
        self.log = MetricsLog(run.path, self.step - undone)
        self.console = Console(run.path / "train.log", self.total, self.step)
        self.clock = Clock(self.log.seconds, self.resolved)
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

    def fit(self) -> None:
        """Trains to the last step; at a signal writes a checkpoint and raises Interrupted."""
        if self.step == self.total == self.evaluated:
            self.console.message(f"this run is finished: {self._results()}")
            return
        self._announce()
        batches = train_batches(
            self.records,
            self.config,
            len(self.dataset.classes),
            steps=range(self.step, self.total),
            total_steps=self.total,
            micro_batch=self.resolved.micro_batch,
            workers=self.workers,
            device=self.device,
        )
        with Signals() as signals, profiling(self.config.train.profile, self.run.path) as profiler:
            try:
                self._validate_if_due(signals)  # a signal may have come in the middle of it
                while self.step < self.total:
                    self._update(batches)
                    if profiler is not None:
                        profiler.step()
                    self._report_if_due()
                    self._validate_if_due(signals)
                    self._checkpoint_if_due()
                    if signals.received and self.step < self.total:
                        raise Interrupted(signals.received)
            except Interrupted:
                self._save_checkpoint()
                self.console.message(f"stopped at step {self.step}; the same command goes on")
                raise
        self._save_checkpoint()
        self._draw()
        self.console.message(f"finished: {self._results()}; all of it is in {self.run.path}")

    def close(self) -> None:
        """Flushes the logs."""
        self.log.close()
        self.console.close()

    def _update(self, batches: Iterator[Batch]) -> None:
        """One optimiser step over the micro-batches of a global batch."""
        train = self.config.train
        self.model.train()
        total = torch.zeros((), device=self.device)
        done = 0
        while done < train.batch_size:
            with self.clock.waiting():
                batch = next(batches)
            assert batch.step == self.step
            self._note_broken(batch)
            if self.step == done == 0:
                self._save_picture(batch.images[:32])
            torch.manual_seed(derive_seed("dropout", train.seed, self.step, done))
            with self.resolved.autocast():
                logits = self.forward(batch.images)
                loss = loss_sum(logits, batch.targets, train.loss) / train.batch_size
            loss.backward()
            total += loss.detach()
            done += len(batch.images)
        norm, skipped = self.optimizer.step(self.schedule.lr(self.step), total)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, self.step)
        self.counters.add(total, norm, skipped)
        self.clock.images += done

    def _report_if_due(self) -> None:
        """Shows progress, and writes the log row of a step that is not validated."""
        if self.console.due():
            seen, pace = self.counters.read(), self.clock.read(self.flops)
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
            self._write_row(self.clock.read(self.flops), {})

    def _write_row(self, pace: dict[str, float], measured: dict[str, float]) -> None:
        seen = self.counters.read()
        self._stop_if_diverged(seen.pop("worst"))
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
        self.log.write(row)
        self.counters.start_row()
        self.clock.start_row()

    def _stop_if_diverged(self, worst: float) -> None:
        if worst >= PATIENCE:
            raise UserError(
                f"training: {PATIENCE} updates in a row were not finite before step {self.step}; "
                f"the last checkpoint is intact; lower optim.lr {self.config.optim.lr:g}, or clip"
            )

    def _validate_if_due(self, signals: Signals) -> None:
        if self.step not in self.evaluations or self.evaluated == self.step:
            return
        pace = self.clock.read(self.flops)
        scores = {"val": self._measure(signals)}
        if self.ema is not None:
            with self.ema.applied_to(self.model):
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
        curves.draw(self.run.path, read_rows(self.log.jsonl))
        self.last_drawing = time.monotonic()

    def _measure(self, signals: Signals) -> Scores:
        self.model.eval()

        def until_signal(batches: Iterable[Batch]) -> Iterator[Batch]:
            for batch in batches:
                if signals.received:
                    raise Interrupted(signals.received)
                yield batch

        def forward(images: Tensor) -> Tensor:
            with self.resolved.autocast():
                return self.forward(images)

        size = min(EVAL_BATCH, len(self.val_records))
        batches = eval_batches(self.val_records, self.config, size, self.workers, self.device)
        return measure(forward, until_signal(batches), self.dataset.classes)

    def _keep_weights(self, scores: dict[str, Scores]) -> None:
        """Writes weights/last, weights/best if these are, and the tables of the better kind."""
        kind = max(scores, key=lambda k: scores[k].top1)
        top1 = scores[kind].top1
        scores[kind].write_tables(self.run.path)
        states: dict[str, dict[str, Tensor]] = {"model": self.model.state_dict()}
        if self.ema is not None:
            states["ema"] = self.ema.average
        description = weights.describe(
            self.config, self.dataset.classes, self.dataset.fingerprint, self.metrics
        )
        folder = self.run.path / "weights"
        folder.mkdir(exist_ok=True)
        weights.save(folder / "last", states, description)
        if top1 > self.best["top1"]:
            self.best = {"step": self.step, "top1": top1}
            weights.save(folder / "best", states, description)
            self._save_checkpoint()

    def _checkpoint_if_due(self) -> None:
        train = self.config.train
        every = train.checkpoint_steps
        late = time.monotonic() - self.last_checkpoint > 60 * train.checkpoint_minutes
        if late or (every is not None and self.step % every == 0):
            self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        if self.saved == (self.step, self.evaluated):
            return
        self._stop_if_diverged(self.counters.read()["worst"])
        tensors = {"model": self.model.state_dict(), "optimizer": self.optimizer.state()}
        if self.ema is not None:
            tensors["ema"] = self.ema.average
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
        }
        folder = self.run.path / "checkpoints"
        self.log.board.flush()
        checkpoints.save(folder, Checkpoint(self.step, tensors, state), int(self.best["step"]))
        self.saved = (self.step, self.evaluated)
        self.last_checkpoint = time.monotonic()

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        if state["fingerprint"] != self.dataset.fingerprint:
            raise UserError(
                f"data: {self.config.data.path} is not the set that the run in {self.run.path} "
                "began with; give that one, or start another run with --out"
            )
        self.model.load_state_dict(checkpoint.tensors["model"])
        self.optimizer.load_state(checkpoint.tensors["optimizer"])
        if self.ema is not None:
            self.ema.load_state(checkpoint.tensors["ema"])
        self.step = checkpoint.step
        self.evaluated, self.best = state["evaluated"], state["best"]
        self.saved = (self.step, self.evaluated)
        self.metrics, self.broken = state["metrics"], dict(state["broken"])
        self.counters.values.copy_(torch.tensor(state["counters"], dtype=torch.float64))
        self.resolved = Resolved(**state["resolved"])
        if self.resolved.device != self.device.type:
            raise UserError(
                f"train.device: the run in {self.run.path} began on {self.resolved.device}, not "
                f"{self.device.type}; resume it there, or start another run with --out"
            )

    def _note_broken(self, batch: Batch) -> None:
        """Logs records that could not be decoded, and stops where they are too many."""
        for index, reason in batch.broken:
            if index not in self.broken:
                self.broken[index] = reason
                where = describe(self.records, index)
                self.console.message(f"broken image replaced by another: {where}: {reason}")
        if len(self.broken) > BROKEN_SHARE * len(self.records):
            names = ", ".join(describe(self.records, index) for index in sorted(self.broken)[:10])
            raise UserError(
                f"data: {len(self.broken)} of {len(self.records)} training images are broken, more "
                f"than {BROKEN_SHARE:.1%}: {names}; mend or remove them and start anew; "
                "`vitral data check` finds all"
            )

    def _save_picture(self, images: Tensor) -> None:
        grid = pictures.grid(pictures.to_pixels(images, self.config.data))
        pictures.save(grid, self.run.path / "train_batch.jpg")
        self.log.picture(grid)

    def _announce(self) -> None:
        resolved, size = self.resolved, self.config.train.batch_size
        self.run.write_environment(
            resolved=dataclasses.asdict(resolved),
            workers=self.workers,
            parameters=self.model.num_parameters,
            flops_per_image=self.flops,
            step=self.step,
        )
        start = f"goes on from step {self.step}" if self.step else "starts"
        self.console.message(
            f"{self.run.path} {start}: {self.dataset.name}, {len(self.records):,} images to train "
            f"on, {len(self.val_records):,} to validate, {len(self.dataset.classes)} classes"
        )
        self.console.message(
            f"{self.model.num_parameters / 1e6:.2f} M parameters, {self.flops / 1e9:.3f} GFLOPs an "
            f"image; {self.total:,} steps of {size} images in micro-batches of "
            f"{resolved.micro_batch}, on {resolved.device} in {resolved.precision}, "
            f"{resolved.threads} threads, {self.workers} workers"
        )

    def _results(self) -> str:
        measured = self.metrics
        text = f"val top-1 {measured['val_top1']:.2%}"
        text += f", EMA {measured['ema_top1']:.2%}" if "ema_top1" in measured else ""
        return f"{text}; best {self.best['top1']:.2%} at step {self.best['step']:.0f}"
