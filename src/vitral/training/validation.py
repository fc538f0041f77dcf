"""Validation during training, distributed over the processes."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vitral.config import Config
from vitral.data.loader import EVAL_BATCH, Batch, eval_batches
from vitral.data.records import Packed, Pixels
from vitral.data.splits import Dataset
from vitral.evaluation import measure, merge, multilabel
from vitral.evaluation.calibration import Logits, fit_temperature
from vitral.evaluation.tasks import AnyScores
from vitral.model import ViT
from vitral.training.distributed import World
from vitral.training.parallel import unsharded
from vitral.training.resolved import Resolved
from vitral.training.signals import Signals


class Validation:
    """Scores a model on the validation images of a run."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        model: ViT,
        forward: Callable[[Tensor], Tensor],
        resolved: Resolved,
        world: World,
        workers: int,
        device: torch.device,
    ) -> None:
        assert dataset.val is not None
        self.config, self.records, self.classes = config, dataset.val, dataset.classes
        self.model, self.call = model, forward
        self.resolved, self.world = resolved, world
        self.workers, self.device = workers, device

    def measure(self, signals: Signals) -> AnyScores:
        """Scores the model with its current weights; for one label per image, fits a temperature.

        Every process must call this.

        Raises:
            Interrupted: if a signal arrived in a run with one process.
        """
        self.model.eval()
        engine = self.resolved.for_inference(self.model)
        call = self.call if engine is self.model else engine

        def forward(images: Tensor) -> Tensor:
            with self.resolved.autocast():
                return call(images)

        if self.records.labels.ndim == 2:
            return self._measure_labels(forward, signals)
        logits = Logits(len(self.records), len(self.classes))
        with unsharded(self.model):
            part = self.world.run_on_all_ranks(
                lambda: measure(forward, self._batches(signals), self.classes, observe=logits.add)
            )
        temperature = fit_temperature(logits, self.world.gather)
        if temperature is not None:
            calibrated = logits.confidence(temperature)
            part = dataclasses.replace(part, temperature=temperature, calibrated=calibrated)
        return merge(self.world.gather(part))

    def _measure_labels(
        self, forward: Callable[[Tensor], Tensor], signals: Signals
    ) -> multilabel.MultiLabelScores:
        with unsharded(self.model):
            part = self.world.run_on_all_ranks(
                lambda: multilabel.measure(forward, self._batches(signals), self.classes)
            )
        return multilabel.merge(self.world.gather(part))

    @property
    def needs_decoding(self) -> bool:
        """Whether the images have to be decoded."""
        return not isinstance(self.records, Packed | Pixels)

    def check_images(self, signals: Signals) -> None:
        """Decodes every image, so that a broken one stops the run before its first step.

        Raises:
            UserError: if an image cannot be decoded.
        """
        self.world.run_on_all_ranks(lambda: collections.deque(self._batches(signals), maxlen=0))

    def _batches(self, signals: Signals) -> Iterator[Batch]:
        """Yields this process's part of the validation images, until a signal arrives."""
        batches = eval_batches(
            self.records,
            self.config,
            min(EVAL_BATCH, len(self.records)),
            self.workers,
            self.device,
            (self.world.rank, self.world.size),
            self.resolved.decoder,
        )
        return signals.until_signal(batches)
