"""Frozen backbones: which parameters are trained, and the features of a frozen backbone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitral import storage
from vitral.config import Config
from vitral.data import augment
from vitral.data.fetch import Fetched, Request, fetch
from vitral.data.loader import fetch_eval_crops
from vitral.data.records import Records
from vitral.data.sampling import Integers
from vitral.errors import UserError
from vitral.machine import input_device
from vitral.model import ViT
from vitral.training.resolved import Resolved
from vitral.weights import backbone_digest

PART = 1024  # images whose features are stored together
Trainable = int | Literal["all", "head"]


def freeze(model: ViT, trainable: Trainable) -> None:
    """Freezes the parameters that `train.trainable` does not select."""
    if trainable == "all":
        return
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    if trainable != "head":
        model.norm.requires_grad_(True)
        model.blocks[-trainable:].requires_grad_(True)


def train_mode(model: ViT, trainable: Trainable) -> None:
    """Sets a model to training mode, and frozen blocks to evaluation mode to disable dropout."""
    model.train()
    if trainable != "all":
        count = 0 if trainable == "head" else trainable
        for block in model.blocks[: len(model.blocks) - count]:
            block.eval()


class PartKey(NamedTuple):
    """Identifies a part: one view of the images from index `first` on."""

    view: int
    first: int


@dataclass(frozen=True)
class Features:
    """Feature vectors of images, with their labels and indices."""

    vectors: Tensor
    """(n, D), float32: the input of the head."""
    labels: Tensor
    """(n,), int64, or (n, classes), uint8, if an image can have several."""
    images: Tensor
    """(n,), int64: the index of each image in its split."""
    broken: Mapping[int, str]
    """Index and reason of each image that has no vector because it cannot be decoded."""

    @classmethod
    def concatenate(cls, parts: Iterable[Features]) -> Features:
        """Joins the features of all parts, in order."""
        parts = list(parts)
        vectors, labels, images = (
            torch.cat([getattr(part, name) for part in parts])
            for name in ("vectors", "labels", "images")
        )
        return cls(vectors, labels, images, {i: why for p in parts for i, why in p.broken.items()})


class FeaturePass:
    """Computes features part by part, and stores each part in a directory.

    An interrupted pass continues with the first missing part. The images of each part and batch do
    not depend on interruptions or on the number of processes, so the features are bit-identical.

    Args:
        model: the backbone, with its pretrained weights, on its device.
        fingerprint: fingerprint of the dataset.
        directory: where the parts are stored.
    """

    def __init__(
        self,
        model: ViT,
        config: Config,
        resolved: Resolved,
        workers: int,
        fingerprint: str,
        directory: Path,
    ) -> None:
        self.config, self.resolved, self.workers = config, resolved, workers
        self.directory, self.device, self.data_device = (
            directory,
            model.device,
            input_device(model.device),
        )
        self.engine = resolved.for_inference(model)
        self.engine.eval()
        data = dataclasses.replace(config.data, path="digits", workers=None)
        train = config.train
        settings = [dataclasses.asdict(part) for part in (config.model, data, config.augment)]
        # Different weights, images or settings raise an error; on different hardware, features are
        # recomputed.
        self.source = _digest([backbone_digest(model), fingerprint, train.seed, *settings])
        self.hardware = _digest(dataclasses.asdict(dataclasses.replace(resolved, processes=1)))

    def __call__(
        self,
        records: Records,
        split: Literal["train", "val"],
        views: int,
        shard: tuple[int, int],
        check: Callable[[int], None],
    ) -> dict[PartKey, Features]:
        """Computes the features of the parts that belong to this process.

        Args:
            views: number of views of each image: the evaluation crop, then augmented ones as in
                epochs 1, 2, ...
            shard: index of this process and number of processes.
            check: called with the number of images after each batch; may raise to stop.

        Raises:
            UserError: if the directory contains features computed with different weights, images or
                settings.
        """
        first = range(0, len(records), PART)
        keys = [PartKey(view, start) for view in range(views) for start in first]
        return {key: self._read(records, split, key, check) for key in keys[shard[0] :: shard[1]]}

    def _read(
        self, records: Records, split: str, key: PartKey, check: Callable[[int], None]
    ) -> Features:
        """Reads a part from its directory, or computes it and writes it there."""
        part = self.directory / f"{split}-view{key.view}-{key.first:07d}"
        try:
            known = storage.read_json(part, "part.json")
            if known["source"] != self.source:
                raise UserError(
                    f"features: {part} was computed with different weights, images or settings; "
                    f"remove {self.directory} to recompute it, or start another run with --out"
                )
            if known["hardware"] == self.hardware:
                tensors = storage.read_tensors(part, "features")
                return Features(**tensors, broken=dict(known["broken"]))
        except storage.CorruptError:
            pass  # missing or damaged
        features = Features.concatenate(self._compute(records, key, check))
        tensors = {name: getattr(features, name) for name in ("vectors", "labels", "images")}
        document = {
            "source": self.source,
            "hardware": self.hardware,
            "broken": sorted(features.broken.items()),
        }
        storage.make_directory(self.directory)
        storage.write(part, {"features": tensors}, {"part": document})
        return features

    @torch.no_grad()
    def _compute(
        self, records: Records, key: PartKey, check: Callable[[int], None]
    ) -> Iterator[Features]:
        indices = np.arange(key.first, min(key.first + PART, len(records)))
        size = self.resolved.micro_batch
        chosen = [indices[i : i + size] for i in range(0, len(indices), size)]
        for fetched in self._fetch(records, key.view, chosen):
            index = fetched.request.indices
            pixels = self._pixels(fetched, key.view)
            with self.resolved.autocast():
                vectors = self.engine.features(pixels).float().cpu()
            good = torch.from_numpy(~np.isin(index, [i for i, _ in fetched.broken]))
            yield Features(
                vectors[good],
                fetched.labels.cpu()[good],
                torch.from_numpy(index)[good],
                dict(fetched.broken),
            )
            check(len(index))

    def _fetch(self, records: Records, view: int, chosen: list[Integers]) -> Iterator[Fetched]:
        where = self.workers, self.data_device, self.resolved.decoder
        if view == 0:
            return fetch_eval_crops(records, self.config, chosen, *where)
        image_size = self.config.model.image_size
        requests = [Request(0, 0, image_size, np.full_like(part, view), part) for part in chosen]
        return fetch(records, self.config, requests, *where)

    def _pixels(self, fetched: Fetched, view: int) -> Tensor:
        """Returns the images of a batch as inputs of the model, (B, C, S, S)."""
        config, request, plan = self.config, fetched.request, None
        images = fetched.images.to(self.data_device, non_blocking=True)
        if view:
            plan = augment.draw_plan(
                config.augment,
                request.image_size,
                config.train.seed,
                request.epochs,
                request.indices,
            )
            images = augment.augment(images, plan)
        return augment.finish(images, plan, config.data.mean, config.data.std).to(self.device)


def read_features(directory: Path) -> Features:
    """Reads the features of the training images that a finished pass has stored."""
    found = {}
    for part in directory.glob("train-view*"):
        view, first = part.name.removeprefix("train-view").split("-")
        broken = dict(storage.read_json(part, "part.json")["broken"])
        tensors = storage.read_tensors(part, "features")
        found[PartKey(int(view), int(first))] = Features(**tensors, broken=broken)
    return Features.concatenate(found[key] for key in sorted(found))


def _digest(document: object) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
