"""Fits the head of a run's model to the features of its frozen backbone."""

from __future__ import annotations

import copy
import time

import torch

from vitral.config import Config
from vitral.data.records import groups_of
from vitral.data.splits import Dataset
from vitral.errors import UserError
from vitral.model import ViT
from vitral.rundir import RunDir, duration
from vitral.training.balance import Balance
from vitral.training.broken import BrokenImages
from vitral.training.distributed import Interrupted, World, distribute_like
from vitral.training.frozen import FeaturePass, Features
from vitral.training.metrics import Console
from vitral.training.probe import Probe, fit
from vitral.training.resolved import Resolved
from vitral.training.signals import Signals


@torch.no_grad()
def set_head(model: ViT, probe: Probe) -> None:
    """Copies a fitted head into a model, which may be sharded."""
    for name, value in (("head.weight", probe.weight), ("head.bias", probe.bias)):
        own = model.get_parameter(name)
        own.copy_(distribute_like(value, own))


class ProgressCheck:
    """Shows the progress of a pass over images, and stops it after a signal.

    Args:
        what: what is computed, for the message.
        total: number of images.
        processes: number of processes that share them.
    """

    def __init__(
        self, what: str, total: int, processes: int, signals: Signals, console: Console
    ) -> None:
        self.what, self.total, self.processes = what, total, processes
        self.signals, self.console = signals, console
        self.done, self.started = 0, time.monotonic()

    def __call__(self, count: int) -> None:
        """Counts `count` more images of this process.

        Raises:
            Interrupted: if a signal has arrived.
        """
        self.done = min(self.total, self.done + count * self.processes)
        if self.console.due():
            rate = self.done / (time.monotonic() - self.started)
            self.console.status(
                f"{self.what} of {self.done:,}/{self.total:,} images  {rate:,.0f} img/s  "
                f"ETA {duration((self.total - self.done) / rate)}",
                self.done / self.total,
            )
        self.signals.check()


class HeadFit:
    """Computes features in all processes, and fits a head to them in rank 0.

    Args:
        model: on its device, before its parameters are sharded.

    Raises:
        UserError: if the model is not a ViT.
    """

    def __init__(
        self,
        model: ViT,
        config: Config,
        dataset: Dataset,
        resolved: Resolved,
        workers: int,
        run: RunDir,
        world: World,
    ) -> None:
        if not isinstance(model, ViT):
            raise UserError("train.trainable: expected all for a model that is not a ViT")
        sharded = world.size > 1 and config.train.parallel == "fsdp"
        self.model, self.config, self.dataset, self.world = model, config, dataset, world
        assert dataset.train is not None
        labels = dataset.train.labels
        self.balance = Balance.of(config, dataset.classes, labels, each_once=True)
        self.compute = FeaturePass(
            copy.deepcopy(model) if sharded else model,
            config,
            resolved,
            workers,
            dataset.fingerprint,
            run.features,
        )

    def run(self, signals: Signals, console: Console, broken: BrokenImages) -> float:
        """Fits the head, copies it into the model of every process, and returns its training loss.

        Raises:
            Interrupted: if a signal arrived in one of the processes.
        """
        features = self.features(signals, console)
        broken.add(features.broken.items())
        started = time.monotonic()

        def check() -> None:
            if console.due():
                console.status(f"fitting the head  {duration(time.monotonic() - started)}", 1.0)
            if self.world.size == 1:
                signals.check()

        train = self.dataset.train
        assert train is not None

        def fit_head() -> Probe:
            device = self.model.device if self.model.device.type == "cuda" else "cpu"
            num_classes, seed = len(self.dataset.classes), self.config.train.seed
            groups = groups_of(train)
            return fit(features, num_classes, seed, check, device, self.balance, groups)

        found = fit_head() if self.world.is_main else None
        head = self.world.broadcast(found)
        assert head is not None
        console.message(
            f"head fitted to {len(features.labels):,} vectors in "
            f"{duration(time.monotonic() - started)}: L2 strength {head.strength:.3g}, "
            f"held-out {self._score} {head.held_out:.2%}"
        )
        set_head(self.model, head)
        return head.loss

    @property
    def _score(self) -> str:
        """Name of the score that selected the L2 strength."""
        if self.dataset.multi_label:
            return "mAP"
        return "top-1" if self.balance.importance is None else "weighted top-1"

    def features(self, signals: Signals, console: Console) -> Features:
        """Returns the features of all training images, in every process.

        The first epoch uses the evaluation crop; each later one has its own augmentation.
        """
        records, world, train = self.dataset.train, self.world, self.config.train
        assert records is not None
        views = train.epochs if train.trainable == "head" else 1
        check = ProgressCheck("features", views * len(records), world.size, signals, console)

        def compute() -> tuple[dict, int | None]:
            try:
                shard = world.rank, world.size
                return self.compute(records, "train", views, shard, check), None
            except Interrupted:
                return {}, signals.received

        parts = world.gather(world.run_on_all_ranks(compute))
        if received := max(number or 0 for _, number in parts):
            raise Interrupted(received)
        found = {key: part for some, _ in parts for key, part in some.items()}
        return Features.concatenate(found[key] for key in sorted(found))
