"""Measures the time until the work starts: the imports of commands, and opening a large folder.

    python benchmarks/startup.py commands [--rounds 5]
    python benchmarks/startup.py create FOLDER [--classes 1000] [--images 1331]
    python benchmarks/startup.py folder FOLDER [--rounds 5]

"commands" compares `vitral predict`, `vitral doctor` and `vitral train` up to its first step with
`import torch`. "create" fills a folder with train/ and val/, named as in ImageNet, with hard links
to 64 files that are not images, and writes a table of the same labels, labels.csv. "folder" opens
both with vitral, and the folder with torchvision's ImageFolder.
Each run is a new process. The runs alternate, and each round starts with a different one. Processor
time (of all threads, user and system) and memory hardly depend on other load.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
from PIL import Image

from vitral import weights
from vitral.bench.rounds import ratios, run_interleaved
from vitral.config import Config, ViTConfig
from vitral.model import ViT

VAL_IMAGES = 50  # in each class of ImageNet
SOURCES = 64  # ext4 allows 65,000 links to a file
CALL = "import os, sys; from vitral.cli import main; {}sys.exit(main({}))"
STOP = "from vitral.training.optim import Optimizer; Optimizer.step = lambda *_: os._exit(0); "
COMMANDS = {
    "import torch": "import torch",
    "vitral predict": CALL.format("", ["predict", "weights", "photo.png", "--workers", "0"]),
    "vitral doctor": CALL.format("", ["doctor"]),
    "vitral train": CALL.format(STOP, ["train", "--model.dim", "16", "--model.depth", "1"]),
}
IMPORTS = "from vitral.config import DataConfig; from vitral.data.formats import open_dataset"
OPEN = {
    "ImageFolder": (
        "from torchvision.datasets import ImageFolder",
        "opened = ImageFolder({0!r} + '/train'), ImageFolder({0!r} + '/val')",
    ),
    "vitral": (IMPORTS, "opened = open_dataset(DataConfig(path={0!r}), 224, 0)"),
    "vitral, table": (
        IMPORTS,
        "opened = open_dataset(DataConfig(path={0!r} + '/labels.csv'), 224, 0)",
    ),
}
MEASURED = """
import json, resource, time
{}
def read():
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return time.process_time(), time.perf_counter(), memory
before = read()
{}
print(json.dumps([b - a for a, b in zip(before, read())]))
"""


class Cost(NamedTuple):
    """The cost of a run, or of a part of it."""

    cpu: float
    """Processor time in seconds."""
    wall: float
    """Elapsed time in seconds."""
    megabytes: float
    """Peak memory, or its increase."""


def process_cost(program: str, folder: str) -> Cost:
    """Runs a program in a folder; returns the cost of the process."""
    started = perf_counter()
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, program
    cpu = usage.ru_utime + usage.ru_stime
    return Cost(cpu, perf_counter() - started, usage.ru_maxrss / 1024)


def opening_cost(imports: str, statement: str, folder: str) -> Cost:
    """Returns the cost of a statement that opens a folder, without the imports."""
    program = MEASURED.format(imports, statement.format(folder))
    printed = subprocess.check_output([sys.executable, "-c", program], text=True)
    return Cost(*json.loads(printed))


def create(folder: Path, classes: int, images: int) -> None:
    """Creates the class folders and the links."""
    folder.mkdir(parents=True)
    sources = [folder / f"source{i}" for i in range(SOURCES)]
    for i, source in enumerate(sources):
        source.write_bytes(bytes(100 + i))
    number, rows = 0, ["image,label,split\n"]
    for label in range(classes):
        wnid = f"n{label:08d}"
        for split in ("train", "val"):
            (folder / split / wnid).mkdir(parents=True)
        for i in range(images):
            held = i < VAL_IMAGES
            name = f"val/{wnid}/ILSVRC2012_val_{number:08d}" if held else f"train/{wnid}/{wnid}_{i}"
            os.link(sources[number % SOURCES], f"{folder}/{name}.JPEG")
            rows.append(f"{name}.JPEG,{wnid},{'val' if held else 'train'}\n")
            number += 1
    with (folder / "labels.csv").open("w") as table:
        table.writelines(rows)


def write_inputs(folder: Path) -> None:
    """Writes weights and an image for `vitral predict`."""
    config = Config(model=ViTConfig(dim=16, depth=1, num_heads=1, num_kv_heads=1, image_size=32))
    states = {"model": ViT(config.model, 2).state_dict()}
    weights.save(folder / "weights", states, weights.describe(config, ("a", "b"), "", {}))
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "photo.png")


def measure_commands(rounds: int) -> dict[str, list[Cost]]:
    """Measures the commands, in a folder for each run."""

    def run(program: str) -> Cost:
        with tempfile.TemporaryDirectory() as folder:
            write_inputs(Path(folder))
            return process_cost(program, folder)

    for program in COMMANDS.values():  # compiles the modules and reads them into memory
        run(program)
    return run_interleaved({name: partial(run, each) for name, each in COMMANDS.items()}, rounds)


def table(costs: dict[str, list[Cost]]) -> list[str]:
    """Returns the medians of each run, and the medians of its ratios to the first run."""
    lines, first = [], next(iter(costs.values()))
    for name, rounds in costs.items():
        cpu, wall, megabytes = map(statistics.median, zip(*rounds, strict=True))
        by_cpu, by_wall = (
            statistics.median(ratios([each[k] for each in rounds], [each[k] for each in first]))
            for k in range(2)
        )
        lines.append(
            f"{name:<16}{cpu:6.2f} s of processor time ({by_cpu:.2f} times), "
            f"{wall:6.2f} s ({by_wall:.2f} times), {megabytes:5,.0f} MB"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["commands", "create", "folder"])
    parser.add_argument("path", type=Path, nargs="?", help="the folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--images", type=int, default=1331, help="images of each class")
    args = parser.parse_args()
    if args.what == "commands":
        print("\n".join(table(measure_commands(args.rounds))))
    elif args.path is None:
        parser.error("path: expected a folder, got none")
    elif args.what == "create":
        create(args.path, args.classes, args.images)
    else:
        folder = str(args.path.absolute())
        runs = {name: partial(opening_cost, *each, folder) for name, each in OPEN.items()}
        if not (args.path / "labels.csv").exists():
            del runs["vitral, table"]
        print("\n".join(table(run_interleaved(runs, args.rounds))))


if __name__ == "__main__":
    main()
