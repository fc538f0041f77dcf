"""Output files of a run (weights, tables, plots and the report) and its first messages."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

from torch import Tensor

from vitral import storage, weights
from vitral.config import Config
from vitral.data.splits import Dataset
from vitral.data.tools import preview
from vitral.errors import UserError, counted, first_few
from vitral.evaluation.tasks import AnyScores, write_tables
from vitral.rundir import RunDir, read_rows, read_run
from vitral.storage import CorruptError
from vitral.training.estimate import compare_with_frozen
from vitral.training.metrics import Console, MetricsLog
from vitral.training.parts import Parts
from vitral.training.resolved import Resolved
from vitral.training.resume import Progress, read

REDRAW_SECONDS = 60.0  # minimum seconds between drawings of the curves
States = Mapping[str, Mapping[str, Tensor]]


class Outputs:
    """Output files of a run, written by rank 0.

    Weight directories describe vitral's ViT, so a run with another model writes none.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        run: RunDir,
        console: Console,
        log: MetricsLog,
        parts: Parts,
    ) -> None:
        self.config, self.dataset, self.run = config, dataset, run
        self.console, self.log = console, log
        self.parts = parts
        self.last_drawn = time.monotonic()
        # Step and scores for the report: the best validation of this process, or its last one.
        self.reported: tuple[int, AnyScores] | None = None

    def announce(
        self,
        resolved: Resolved,
        facts: Mapping[str, float],
        total: int,
        rates: Mapping[str, float],
    ) -> None:
        """Writes env.json and prints the first messages of a run.

        Args:
            facts: step, workers, parameters and FLOPs per image, as stored in env.json.
            total: number of steps of the run.
            rates: images per second of each decoder, if they were measured.
        """
        self.run.write_environment(
            resolved=dataclasses.asdict(resolved),
            parts=self.parts.name,
            held_out=self.dataset.held_out,
            decode_rates=rates,
            **facts,
        )
        train, val, classes = self.dataset.train, self.dataset.val, self.dataset.classes
        assert train is not None
        assert val is not None
        start = f"resumes from step {facts['step']}" if facts["step"] else "starts"
        self.console.message(
            f"{self.run.path} {start}: {self.dataset.name}, "
            f"{counted(len(train), 'training image')}, {counted(len(val), 'validation image')}, "
            f"{counted(len(classes), 'class')}: {first_few(classes)}"
        )
        if rates:
            measured = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
            self.console.message(f"decoder: {resolved.decoder}; measured img/s: {measured}")
        fused = {"cuda": ", fused kernels", "cpu": ", oneDNN linear layers"}
        self.console.message(
            f"{facts['parameters'] / 1e6:.2f} M parameters, {facts['flops_per_image'] / 1e9:.3f} "
            f"GFLOPs per image; {counted(total, 'step')} of {self.config.train.batch_size} images "
            f"in micro-batches of {resolved.micro_batch}, on {resolved.device} "
            f"in {resolved.precision}"
            + (", compiled" if resolved.compile else "")
            + (fused[resolved.device] if resolved.fused else "")
            + f", threads: {resolved.threads}, workers: {facts['workers']}"
            + (f", in each of {resolved.processes} processes" if resolved.processes > 1 else "")
        )
        single_cpu = resolved.device == "cpu" and resolved.processes == 1
        if single_cpu and not facts["step"] and self.parts.describable:
            cost = compare_with_frozen(self.config, self.dataset, total)
            if cost:
                self.console.message(cost)

    def save_batch(self, images: Tensor) -> None:
        """Writes an image of the model's first input batch, (B, C, H, W), float32."""
        grid = preview.grid(preview.to_pixels(images, self.config.data))
        preview.save(grid, self.run.train_batch)
        self.log.picture(grid)

    def save_weights(
        self,
        states: States,
        names: list[str],
        metrics: Mapping[str, float],
        thresholds: Mapping[str, tuple[float, ...]],
    ) -> None:
        """Writes weights/NAME for each of `names`."""
        if self.parts.describable:
            storage.make_directory(self.run.weights)
            for name in names:
                weights.save(self.run.weights / name, states, self._describe(metrics, thresholds))

    def record_scores(self, scores: AnyScores, progress: Progress) -> None:
        """Writes the tables of a validation and remembers its scores for the report."""
        write_tables(scores, self.run.path)
        if self.reported is None or self.reported[0] != progress.best["step"]:
            self.reported = (progress.step, scores)

    def restore_weights(self, progress: Progress) -> None:
        """Restores weights that are damaged, older than their checkpoint, or have an old path."""
        if not self.parts.describable:
            return
        for directory in (self.run.best, self.run.last):
            storage.recover(directory)
        steps = {"best": int(progress.best["step"])} if progress.evaluated else {}
        if progress.evaluated == progress.step > 0:  # otherwise the next validation writes them
            steps["last"] = progress.step
        place = self._describe({}, {}).config.data.path
        for name, step in steps.items():
            try:
                directory, known = weights.read_description(self.run.weights / name)
                storage.verify(directory)
            except (UserError, CorruptError):
                known = None
            found = known.metrics.get("step", -1) if known else -1
            # Weights of a later step are overwritten when the run reaches that step.
            if found < step or (known and found == step and known.config.data.path != place):
                self._restore(name, step)

    def draw_curves(self, *, force: bool = False) -> None:
        """Draws the curves, at most once a minute unless `force` is set."""
        if not force and time.monotonic() - self.last_drawn <= REDRAW_SECONDS:
            return
        from vitral.report import curves  # imports matplotlib

        curves.draw(self.run.curves, read_rows(self.run.metrics))
        self.last_drawn = time.monotonic()

    def write_report(self, progress: Progress) -> None:
        """Writes the report of a finished run."""
        from vitral.report.html import write_report  # imports matplotlib
        from vitral.report.predictions import Predictions

        predictions, missing = None, "the run was resumed after its last validation"
        if not self.parts.describable:
            missing = f"the model is not vitral's: {self.parts.name}"
        elif self.reported is not None:
            step, scores = self.reported
            path = self.run.best if step == progress.best["step"] else self.run.last
            assert self.dataset.val is not None
            predictions = Predictions(scores, self.dataset.val, weights.load(path))
        write_report(read_run(self.run.path), self.run.report, predictions, missing)

    def _restore(self, name: str, step: int) -> None:
        try:
            found = read(self.run.checkpoints, step)
        except CorruptError as error:
            self.console.message(f"weights/{name} cannot be restored: {error}")
            return
        states = {kind: found.tensors[kind] for kind in found.tensors if kind != "optimizer"}
        state = found.state
        self.save_weights(states, [name], state["metrics"], state.get("thresholds", {}))
        self.console.message(f"weights/{name} restored from the checkpoint of step {step}")

    def _describe(
        self, metrics: Mapping[str, float], thresholds: Mapping[str, tuple[float, ...]]
    ) -> weights.Description:
        identity = self.dataset.classes, self.dataset.fingerprint
        return weights.describe(self.config, *identity, metrics, thresholds)
