"""The training loop: steps, validation, logging, checkpoints and resuming."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

import torch

from vitral.config import Config
from vitral.data.fetch import resolve_workers
from vitral.data.loader import Batch, train_batches
from vitral.data.objects import Objects
from vitral.data.records import Packed, Pixels
from vitral.data.sampling import derive_seed
from vitral.data.splits import Dataset
from vitral.data.tools.rates import choose_decoder, input_speed_message
from vitral.errors import UserError, counted
from vitral.evaluation.scores import Scores
from vitral.evaluation.tasks import AnyScores, thresholds
from vitral.model import ViT, count_flops
from vitral.rundir import RunDir
from vitral.training import checkpoint as checkpoints
from vitral.training import resume
from vitral.training.balance import Balance
from vitral.training.broken import BrokenImages
from vitral.training.checkpoint import Checkpoint
from vitral.training.distributed import (
    NUM_SHARDS,
    DelayedMax,
    Interrupted,
    World,
)
from vitral.training.frozen import train_mode
from vitral.training.head import HeadFit, ProgressCheck
from vitral.training.metrics import Console, MetricsLog
from vitral.training.monitor import Clock, Counters, profiling
from vitral.training.optim import EMA
from vitral.training.outputs import Outputs
from vitral.training.parallel import AveragedGradients, FixedOrderReduction
from vitral.training.parts import Parts
from vitral.training.plan import Plan
from vitral.training.resolved import (
    Resolved,
    compiled,
    prepare_device,
    resolve,
    resolve_resumed,
)
from vitral.training.resume import Progress, State
from vitral.training.selection import (
    early_stop_message,
    finished,
    is_imbalanced,
    select,
    validation_message,
)
from vitral.training.signals import Signals
from vitral.training.tokens import TokenCache, TrainedBlocks, can_cache
from vitral.training.validation import Validation

MAX_SKIPS = 10  # consecutive non-finite updates that stop a run


class Trainer:
    """Runs the training loop of a new or resumed run."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        model: ViT,
        device: torch.device,
        run: RunDir,
        checkpoint: Checkpoint | None,
        world: World,
        parts: Parts,
    ) -> None:
        assert dataset.train is not None
        prepare_device(config, device)
        self.config, self.dataset, self.model, self.device = config, dataset, model, device
        self.run, self.world, self.parts, self.records = run, world, parts, dataset.train
        balance = Balance.of(config, dataset.classes, self.records.labels)
        balance = balance.to(device, torch.float32)
        class_weights = () if balance.weights is None else (*balance.weights.tolist(),)
        if checkpoint is not None:
            old = checkpoint.state.get("class_weights", ())
            resume.check_class_weights(config, run, old, class_weights)
        self.plan = Plan.of(config, len(self.records))
        self.workers = resolve_workers(config.data, self.records, world.local_size)
        model.to(device)
        self.resolved, self.rates = self._resolve(checkpoint)
        torch.set_num_threads(self.resolved.threads)
        if checkpoint is not None:
            model.load_state_dict(checkpoint.tensors["model"])
        self.head_fit = None
        if checkpoint is None and (config.train.trainable == "head" or config.train.probe_first):
            self.head_fit = HeadFit(model, config, dataset, self.resolved, self.workers, run, world)
        accumulator = FixedOrderReduction if config.train.reproducible else AveragedGradients
        self.cached = can_cache(config, len(self.records), world.size)
        trained = TrainedBlocks(model, config) if self.cached else model
        self.accumulator = accumulator(trained, config.train, self.resolved, world, balance)
        self.optimizer = parts.optimizer(model, config.optim)
        self.ema = EMA(model, config.train.ema_decay) if config.train.ema_decay else None
        self.counters, self.progress = Counters(device), Progress()
        self.state = State(
            config, dataset, self.resolved, parts.name,
            model, self.optimizer, self.ema, self.counters, self.progress,
            class_weights,
        )  # fmt: skip
        if checkpoint is not None:
            self.state.restore(checkpoint)
        forward = compiled(model, self.resolved) if self.cached else self.accumulator.forward
        self.imbalanced = is_imbalanced(dataset)
        self.validation = Validation(
            config, dataset, model, forward, self.resolved, world, self.workers, device
        )
        image_sizes = {image_size for image_size, _ in config.train.progressive} | {
            config.model.image_size
        }
        flops = functools.partial(count_flops, config.model, len(dataset.classes), training=True)
        self.flops = {
            image_size: flops(image_size, build=parts.model) for image_size in image_sizes
        }
        # The row of a validation that has to be repeated is dropped from the log.
        step, evaluated = self.progress.step, self.progress.evaluated
        undone = step in self.plan.evaluations and evaluated != step
        self.log = MetricsLog(run, step - undone) if world.is_main else None
        self.console = Console(run.log, self.plan.total, step, not world.is_main)
        self.outputs = None
        if self.log is not None:
            self.outputs = Outputs(config, dataset, run, self.console, self.log, parts)
        known = checkpoint.state["broken"] if checkpoint else ()
        self.broken = BrokenImages(self.records, world, known, self.console.message)
        self.clock = Clock(*(self.log.totals if self.log else (0.0, 0.0)), self.resolved)
        self.agreement = DelayedMax(world)
        self.num_rows = 0  # rows written by this process
        self.last_checkpoint = time.monotonic()

    def fit(self) -> None:
        """Trains to the last step. After a signal, writes a checkpoint and raises Interrupted."""
        progress, total, train = self.progress, self.plan.total, self.config.train
        if self.outputs is not None:
            self.outputs.restore_weights(progress)
        if finished(progress, train, total):
            self.console.message(f"this run is already finished: {progress.summary(train.best_by)}")
            return
        self._announce()
        profile = train.profile and self.world.is_main
        with Signals(self.world) as signals, profiling(profile, self.run.trace) as profiler:
            try:
                self._check_images(signals)
                if self.head_fit is not None:
                    self._fit_head(self.head_fit, signals)
                batches = signals.until_signal(self._batches(signals))  # starts the workers
                self._validate_if_due(signals)  # a signal may have interrupted it
                while not finished(progress, train, total):
                    self._step(batches)
                    if profiler is not None:
                        profiler.step()
                    self._log_if_due()
                    self._validate_if_due(signals)
                    now, limit = time.monotonic(), 60 * train.checkpoint_minutes
                    late = self.world.is_main and now - self.last_checkpoint > limit
                    if late:  # all processes act on it one step later, so request it only once
                        self.last_checkpoint = now
                    signal, late = self.agreement.exchange(signals.received or 0, late)
                    every = train.checkpoint_steps
                    if late or (every is not None and progress.step % every == 0):
                        self._save_checkpoint()
                    if signal and not finished(progress, train, total):
                        raise Interrupted(signal)
                self.agreement.finish()
            except Interrupted as interrupted:
                self.agreement.finish()
                self._save_checkpoint()
                self.world.gather(None)  # torchrun stops all processes once one has exited
                text = f"stopped at step {progress.step}; repeat the command to resume"
                self.console.message(f"{interrupted}: {text}")
                raise
        self._save_checkpoint()
        if progress.step < total:
            epoch = progress.step / self.plan.steps_per_epoch
            self.console.message(early_stop_message(train, epoch))
        if self.outputs is not None:
            self.outputs.draw_curves(force=True)
            self.outputs.write_report(progress)
        self.console.message(
            f"finished: {progress.summary(train.best_by)}; results are in {self.run.path}"
        )

    def close(self) -> None:
        """Flushes the logs."""
        if self.log is not None:
            self.log.close()
        self.console.close()

    def _fit_head(self, head_fit: HeadFit, signals: Signals) -> None:
        """Fits the head to frozen features; with `train.trainable` head, this is the entire run."""
        loss, train = head_fit.run(signals, self.console, self.broken), self.config.train
        if self.ema is not None:
            self.ema.reset()
        if train.trainable == "head":
            # A backward pass would take two thirds of a step's FLOPs, but none runs.
            self.clock.count(train.epochs * len(self.records), min(self.flops.values()) / 3)
            self.counters.add(*torch.tensor([loss, 0.0, 0.0]).to(self.device))
            self.progress.step = self.plan.total

    def _step(self, batches: Iterator[Batch]) -> None:
        """Takes one optimizer step over the micro-batches of a global batch."""
        train, progress = self.config.train, self.progress
        train_mode(self.model, train.trainable)
        loss = torch.zeros((), device=self.device)
        done, images_per_process = 0, train.batch_size // self.world.size
        image_size = self.config.image_size_at(progress.step / self.plan.total)
        while done < images_per_process:
            batch = next(batches)
            assert batch.step == progress.step
            self.clock.waited += batch.waited
            self.broken.add(batch.broken)
            if self.outputs is not None and progress.step == batch.first == self.cached == 0:
                self.outputs.save_batch(batch.images[:32])
            torch.manual_seed(derive_seed("dropout", train.seed, progress.step, batch.first))
            done += len(batch.images)
            loss += self.accumulator.accumulate(batch, last=done == images_per_process)
        loss = self.accumulator.reduce(loss)
        norm, skipped = self.optimizer.step(self.plan.schedule.lr(progress.step), loss)
        progress.step += 1
        if self.ema is not None:
            self.ema.update(progress.step, skipped)
        self.counters.add(loss, norm, skipped)
        self.clock.count(train.batch_size, self.flops[image_size])

    def _log_if_due(self) -> None:
        """Shows progress if it is due, and writes the log row of a step without validation."""
        step, plan = self.progress.step, self.plan
        if self.world.is_main and self.console.due():
            means, pace = self.counters.read(), self.clock.read()
            if self.world.size == 1:
                self._stop_if_diverged(means["worst"])
            left = (plan.total - step) * self.config.train.batch_size
            self.console.progress(
                step,
                {"epoch": step / plan.steps_per_epoch, "lr": plan.schedule.lr(step - 1), **means},
                pace,
                left / max(pace["images_per_second"], 1e-9),
            )
        if step % self.config.train.log_every == 0 and step not in plan.evaluations:
            self._write_row(self.clock.read(), {})

    def _write_row(self, pace: dict[str, float], measured: dict[str, float]) -> None:
        means = self.counters.read()
        self._stop_if_diverged(means.pop("worst"))
        self.broken.synchronize()
        step = self.progress.step
        row = {
            "step": step,
            "epoch": step / self.plan.steps_per_epoch,
            "images": step * self.config.train.batch_size,
            "lr": self.plan.schedule.lr(step - 1),
            **means,
            "broken": len(self.broken.known),
            **measured,
            **pace,
        }
        if self.log is not None:
            self.log.write(row)
        self.counters.start_row()
        self.clock.start_row()
        self.num_rows += 1
        # The first row includes compilation and starting the workers.
        if self.num_rows == 2 and not isinstance(self.records, Pixels):
            packed = isinstance(self.records, Packed | Objects)
            self.console.message(input_speed_message(pace["data_wait"], packed=packed))

    def _stop_if_diverged(self, worst: float) -> None:
        if worst >= MAX_SKIPS:
            raise UserError(
                f"training: {MAX_SKIPS} consecutive updates before step {self.progress.step} were "
                "not finite; the last checkpoint is intact; lower optim.lr "
                f"({self.config.optim.lr:g}) or optim.clip_norm"
            )

    def _check_images(self, signals: Signals) -> None:
        """Decodes the validation images of a new run, so that broken ones are reported early."""
        if self.progress.step == 0 and self.validation.needs_decoding:
            images = counted(len(self.validation.records), "validation image")
            self.console.message(f"checking that {images} can be decoded")
            self.validation.check_images(signals)
            self.clock.start_row()

    def _validate_if_due(self, signals: Signals) -> None:
        progress = self.progress
        if progress.step not in self.plan.evaluations or progress.evaluated == progress.step:
            return
        pace = self.clock.read()
        scores = {"val": self.validation.measure(signals)}
        if self.ema is not None:
            with self.ema.applied():
                scores["ema"] = self.validation.measure(signals)
        metrics = {kind: each.metrics() for kind, each in scores.items()}
        measured = {f"{k}_{name}": v for k, each in metrics.items() for name, v in each.items()}
        self._write_row(pace, measured)
        temperatures = {
            f"{kind}_temperature": s.temperature
            for kind, s in scores.items()
            if isinstance(s, Scores) and s.temperature
        }
        progress.metrics = {"step": progress.step, **measured, **temperatures}
        progress.thresholds = thresholds(scores)
        progress.evaluated = progress.step
        self._save_weights(scores, metrics)
        epoch = progress.step / self.plan.steps_per_epoch
        shown = validation_message(
            self.config.train,
            metrics,
            imbalanced=self.imbalanced,
            multi_label=self.dataset.multi_label,
        )
        self.console.message(f"epoch {epoch:.0f}: {shown}")
        if self.outputs is not None:
            self.outputs.draw_curves()
        self.clock.start_row()  # the next row covers training only

    def _save_weights(
        self, scores: dict[str, AnyScores], metrics: dict[str, dict[str, float]]
    ) -> None:
        """Writes the tables, weights/last, and weights/best if `train.best_by` improved."""
        progress, states = self.progress, self.state.weights(self.world)
        kind, improved = select(progress, self.config.train, metrics)
        # The tables are written before the checkpoint, and the checkpoint before the weights.
        if self.outputs is not None:
            self.outputs.record_scores(scores[kind], progress)
        if improved:
            self._save_checkpoint()
        if self.outputs is not None:
            names = ["last", "best"] if improved else ["last"]
            self.outputs.save_weights(states, names, progress.metrics, progress.thresholds)

    def _save_checkpoint(self) -> None:
        progress = self.progress
        if progress.saved == (progress.step, progress.evaluated):
            return
        self._stop_if_diverged(self.counters.read()["worst"])
        self.broken.synchronize()
        checkpoint = self.state.checkpoint(self.world, self.broken.known)
        if self.log is not None:
            self.log.sync()
            checkpoints.save(self.run.checkpoints, checkpoint, int(progress.best["step"]))
        progress.saved = (progress.step, progress.evaluated)
        self.last_checkpoint = time.monotonic()

    def _resolve(self, checkpoint: Checkpoint | None) -> tuple[Resolved, dict[str, float]]:
        """Returns the resolved settings of the run and, for a new run, the decoder rates."""
        config, device, world = self.config, self.device, self.world
        if checkpoint is not None:
            return resolve_resumed(checkpoint, config, self.model, self.run, device, world), {}
        found = world.run_on_all_ranks(
            lambda: choose_decoder(self.records, config, self.workers, device)
        )
        decoder, rates = world.broadcast(found)
        num_steps = self.plan.total
        return resolve(config, self.model, device, world, decoder, num_steps), {**rates}

    def _batches(self, signals: Signals) -> Iterator[Batch]:
        if self.cached:
            steps = range(self.progress.step, self.plan.total)
            check = ProgressCheck("activations", len(self.records), 1, signals, self.console)
            what = self.model, self.config, self.records, self.resolved, self.workers
            cache = TokenCache(*what, check)
            self.broken.add(cache.broken.items())
            return cache.batches(len(self.dataset.classes), steps)
        return train_batches(
            self.records,
            self.config,
            len(self.dataset.classes),
            steps=range(self.progress.step, self.plan.total),
            total_steps=self.plan.total,
            micro_batch=self.resolved.micro_batch,
            workers=self.workers,
            device=self.device,
            shard=(self.world.rank, self.world.size),
            num_slices=NUM_SHARDS // self.world.size if self.config.train.reproducible else 1,
            decoder=self.resolved.decoder,
        )

    def _announce(self) -> None:
        image_size, classes = self.config.model.image_size, len(self.dataset.classes)
        flops = count_flops(self.config.model, classes, image_size, build=self.parts.model)
        facts = {
            "workers": self.workers,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "flops_per_image": flops,
            "training_flops_per_image": 3 * self.flops[image_size],
            "step": self.progress.step,
        }
        if self.outputs is not None:
            self.outputs.announce(self.resolved, facts, self.plan.total, self.rates)
