"""Compares the features of an imported model with those of timm's: kNN and a linear probe.

    python benchmarks/public_features.py OUT NAME WEIGHTS --file F --data PATH --image-size N ...
        [--images N]

NAME is a timm model, F its weights, and WEIGHTS the same model imported with `vitral import`. Both
get the same pixels: vitral's evaluation crop of every image, or of --images in total, in proportion
to the splits. The features are stored in OUT, so an interrupted run can be resumed. For each image
size and model, a JSON line reports top-1 of 20 nearest neighbors (cosine similarity) and of
logistic regression on standardized features, whose regularization is selected on a tenth of the
training images. It also reports the largest difference between the two models' features, divided by
their rms.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import vitral
from vitral.config import Config
from vitral.data.formats import open_dataset
from vitral.data.loader import eval_batches
from vitral.data.records import Records
from vitral.engines.choice import for_inference
from vitral.storage import replacing

BATCH = 50
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
Features = NDArray[np.float32]
Labels = NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("out", metavar="OUT", type=Path)
    add("name", metavar="NAME")
    add("weights", metavar="WEIGHTS")
    add("--file", required=True)
    add("--data", required=True)
    add("--image-size", type=int, nargs="+", required=True)
    add("--images", type=int)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for image_size in options.image_size:
        measure(options, image_size)


def measure(options: argparse.Namespace, image_size: int) -> None:
    """Prints a JSON line for each of the two models."""
    classifier = vitral.load(options.weights)
    config = classifier.description.config
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=options.data),
        model=dataclasses.replace(config.model, image_size=image_size),
    )
    dataset = open_dataset(config.data, image_size, 0)
    assert dataset.train is not None
    assert dataset.val is not None
    total = len(dataset.train) + len(dataset.val)
    fraction = min(1.0, (options.images or total) / total)
    splits = [evenly_spaced(records, fraction) for records in (dataset.train, dataset.val)]
    public = timm.create_model(
        options.name,
        pretrained=True,
        num_classes=0,
        dynamic_img_size=True,
        pretrained_cfg_overlay={"file": options.file},
    ).eval()
    own = for_inference(classifier.model)
    models = {"vitral": lambda x: own.pool(own.forward_features(x)), "timm": public}
    found = {}
    for model, forward in models.items():
        place = options.out / f"{model}-{image_size}-{sum(map(len, splits))}.npz"
        found[model] = features(place, forward, splits, config)
    error = max(
        np.abs(own - expected).max() / np.sqrt(np.square(expected).mean())
        for own, expected in zip(found["vitral"][::2], found["timm"][::2], strict=True)
    )
    for model, (train, labels, val, expected) in found.items():
        row = {
            "model": model,
            "image_size": image_size,
            "images": [len(labels), len(expected)],
            "knn": float(knn(train, labels).score(val, expected)),
            "probe": float(probe(train, labels).score(val, expected)),
            "difference": float(error),
        }
        print(json.dumps(row), flush=True)


def evenly_spaced(records: Records, fraction: float) -> Records:
    """Evenly spaced records of a split. The records of a split are sorted by class."""
    count = round(fraction * len(records))
    chosen = np.zeros(len(records), bool)
    chosen[np.linspace(0, len(records) - 1, count).round().astype(int)] = True
    return records.take(chosen)


@torch.no_grad()
def features(
    place: Path, forward: Callable[[Tensor], Tensor], splits: list[Records], config: Config
) -> tuple[Features, Labels, Features, Labels]:
    """Features and labels of both splits, from the file `place` if it exists."""
    if not place.exists():
        started, parts = time.monotonic(), []
        for records in splits:
            batches = eval_batches(records, config, BATCH, 0, torch.device("cpu"))
            rows = [forward(batch.images)[: len(batch.targets)] for batch in batches]
            parts += [torch.cat(rows).numpy(), np.asarray(records.labels)]
        print(f"{place}: {time.monotonic() - started:.0f} s", flush=True)
        with replacing(place) as building, building.open("wb") as file:
            np.savez(file, *parts)
    with np.load(place) as kept:
        train, labels, val, expected = (kept[f"arr_{i}"] for i in range(4))
    return train, labels, val, expected


def knn(train: Features, labels: Labels) -> KNeighborsClassifier:
    """Twenty nearest neighbors by cosine similarity."""
    return KNeighborsClassifier(20, metric="cosine").fit(train, labels)


def probe(train: Features, labels: Labels) -> LogisticRegression:
    """Logistic regression with regularization selected on every tenth training image."""
    held = np.arange(len(labels)) % 10 == 0

    def fit(strength: float, features: Features, labels: Labels) -> LogisticRegression:
        model = LogisticRegression(C=strength, max_iter=1000)
        return make_pipeline(StandardScaler(), model).fit(features, labels)

    fitted = [fit(C, train[~held], labels[~held]) for C in STRENGTHS]
    scores = [model.score(train[held], labels[held]) for model in fitted]
    return fit(STRENGTHS[int(np.argmax(scores))], train, labels)


if __name__ == "__main__":
    main()
