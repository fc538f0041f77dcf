"""Compares the prediction rate of vitral with a DataLoader loop and timm's loop, on the same files.

    python benchmarks/predict.py FOLDER [--size ti] [--workers 1] [--threads 1] [--rounds 5]

FOLDER contains a folder for each class. "DataLoader" is the usual loop for the same model:
ImageFolder, torchvision's transforms on PIL images, and a DataLoader. "timm's loop" is that of
timm's inference.py with timm's model of the same size, if timm is installed. All have the same
number of workers, batch size and threads, and untrained weights. They are measured in alternation,
and each round starts with a different one. "input only" uses a model of negligible cost: it
measures the work that remains on the CPU if a GPU runs the model. Rates per core are from processor
time, and with --threads 1 hardly depend on other load. Several threads waste processor time waiting
for each other if other processes use the same cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter as clock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

from vitral.bench.rounds import ratios, run_interleaved
from vitral.config import Config, DataConfig, ViTConfig
from vitral.inference.predict import predictions
from vitral.machine import available_cores
from vitral.model import ViT
from vitral.weights import Weights, describe

TIMM = {"ti": "tiny", "s": "small", "b": "base", "l": "large"}
SIDE, BATCH, CLASSES = 224, 64, 1000
DATA = DataConfig()
TINY = ViTConfig(dim=4, depth=1, num_heads=1, num_kv_heads=1, patch_size=112, image_size=SIDE)


def vitral_predict(model: ViT, folder: ImageFolder, workers: int) -> None:
    config = Config(model=model.config, data=DATA)
    description = describe(config, tuple(map(str, range(CLASSES))), "", {})
    paths = [path for path, _ in folder.samples]
    weights = Weights(model, description, Path())
    for _ in predictions(weights, paths, batch_size=BATCH, workers=workers):
        pass


def plain_loop(model: nn.Module, folder: ImageFolder, workers: int) -> None:
    resize, crop = Resize(round(SIDE / DATA.eval_crop)), CenterCrop(SIDE)
    folder.transform = Compose([resize, crop, ToTensor(), Normalize(DATA.mean, DATA.std)])
    rank_all(model, DataLoader(folder, batch_size=BATCH, num_workers=workers))


def timm_loop(model: nn.Module, folder: Any, workers: int) -> None:
    from timm.data import create_loader

    loader = create_loader(
        folder,
        (3, SIDE, SIDE),
        BATCH,
        num_workers=workers,
        persistent_workers=False,
        crop_pct=DATA.eval_crop,
        device=torch.device("cpu"),
    )
    rank_all(model, loader)


def timm_model(size: str) -> nn.Module:
    import timm

    return timm.create_model(f"vit_{TIMM[size]}_patch16_224").eval()


@torch.inference_mode()
def rank_all(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    for images, _ in batches:
        model(images).softmax(1).topk(5)


def compare(
    title: str, contestants: dict[str, Callable[[], None]], images: int, rounds: int
) -> None:
    names = list(contestants)
    runs = {name: partial(seconds, run) for name, run in contestants.items()}
    spent = {name: found[1:] for name, found in run_interleaved(runs, rounds + 1).items()}
    print(f"{title}: {images} images, {rounds} rounds, medians, with the range of the ratios")
    for name in names:
        text = f"  {name:16}"
        for what, column in ("images/s", 0), ("images/s per core", 1):
            own, other = ([times[column] for times in spent[n]] for n in (names[0], name))
            found = sorted(ratios(other, own))
            rate, ratio = images / statistics.median(other), statistics.median(found)
            text += (
                f"{rate:7.1f} {what}, vitral x {ratio:.2f} ({found[0]:.2f} to {found[-1]:.2f})  "
            )
        print(text, flush=True)


def seconds(run: Callable[[], None]) -> tuple[float, float]:
    """Wall-clock and processor time."""
    before = clock(), cpu_seconds()
    run()
    return clock() - before[0], cpu_seconds() - before[1]


def cpu_seconds() -> float:
    """Seconds on all cores, including those of workers that have ended."""
    return sum(os.times()[:4])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--size", choices=TIMM, default="ti")
    parser.add_argument("--workers", type=int, default=max(1, available_cores() - 1))
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder, repeated = ImageFolder(options.folder), ImageFolder(options.folder)
    repeated.samples *= 3
    torch.manual_seed(0)
    full_model, tiny = (ViT(c, CLASSES).eval() for c in (ViTConfig(size=options.size), TINY))
    for title, model, images in (
        (f"ViT-{options.size} at {SIDE}", full_model, folder),
        ("input only", tiny, repeated),
    ):
        contestants = {
            "vitral predict": partial(vitral_predict, model, images, options.workers),
            "DataLoader": partial(plain_loop, model, images, options.workers),
        }
        if find_spec("timm"):
            peer = timm_model(options.size) if model is full_model else tiny
            contestants["timm's loop"] = partial(timm_loop, peer, images, options.workers)
        compare(title, contestants, len(images), options.rounds)


if __name__ == "__main__":
    main()
