"""vitral's training step and forward pass beside those of timm's models, on the same noise.

    python benchmarks/throughput.py [--sizes s b l] [--batch 256] [--mode both] [--json FILE]
    python benchmarks/throughput.py --recipe digits [--threads 1]
    python benchmarks/throughput.py --sizes s --profile vitral
    python benchmarks/throughput.py --sizes l/16 h/14 --largest-batch

All models stand in one process and take turns, each round beginning with another. The step is the
same for all and the one that `vitral train` takes: both passes, soft-target cross-entropy,
gradients clipped to norm 1, fused AdamW, gradients cleared; bf16 autocast and compiled on a GPU,
float32 and not compiled on a CPU. Who the models are: src/vitral/bench/peers.py.
`--recipe` takes architecture, options and batch of a recipe, for timm's models as well; the
optimiser is AdamW for all.

A GPU is timed by CUDA events, a CPU by the clock and by processor time; ratios on a CPU are of
processor time. Where several threads share their cores with other work, OMP_WAIT_POLICY=PASSIVE
keeps them from spending theirs on waiting for each other. FLOPs are those of the matrix products of
the model's own passes, counted by torch on each model alike; the rate of large matrix products is
measured in the same run. Memory is the most that a model's own training needs, without the others'
weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch

from vitral import settings
from vitral.bench import rounds
from vitral.bench.contest import Mode, compare, num_classes
from vitral.bench.memory import largest_batch
from vitral.bench.model import NO_TIMM, table
from vitral.bench.peers import PEERS, Builder, has_timm, select_models
from vitral.bench.profile import breakdown, profile_table
from vitral.config import PRESETS, Config, DataConfig, TrainConfig, ViTConfig
from vitral.errors import UserError
from vitral.machine import available_cores
from vitral.storage import replacing

Document = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 for a user's mistake."""
    options = parse(arguments)
    try:
        run(options)
    except UserError as error:
        print(f"throughput: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--sizes", nargs="+", default=["s"], help="presets, with a patch or 16: s l/16 h/14")
    add("--recipe", help="a recipe's model instead")
    add("--batch", type=int, nargs="+", help="256, on a CPU 8; of a recipe, its own")
    add("--image-size", type=int, default=224)
    add("--mode", choices=["train", "infer", "both"], default="train")
    add("--peers", nargs="*", default=list(PEERS), help=f"of {', '.join(PEERS)}")
    add("--compile", choices=["auto", "always", "never"], default="auto")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--threads", type=int)
    add("--rounds", type=int, default=rounds.ROUNDS)
    add("--seconds", type=float, default=rounds.SECONDS, help="of each model in each round")
    add("--profile", metavar="MODEL", help="instead: what takes the time of this one's step")
    add("--largest-batch", action="store_true", help="instead: the largest batch that a GPU holds")
    add("--json", type=Path, help="file to write all to")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measures case after case, and keeps what is measured so far.

    Raises:
        UserError: for what cannot be measured.
    """
    if options.rounds < 1 or options.seconds <= 0:
        raise UserError("rounds, seconds: expected numbers above 0")
    rounds.SECONDS = options.seconds
    if options.peers and not has_timm():
        print(NO_TIMM, flush=True)
    builders = select_models(options.peers)
    if options.profile not in (None, *builders):
        raise UserError(f"profile: expected {' or '.join(builders)}, got {options.profile}")
    document: Document = {"environment": environment(), "cases": []}
    for config in configs(options):
        for case, text in measure(config, options, builders):
            print(text, flush=True)
            document["cases"].append(case)
            if options.json:
                with replacing(options.json) as file:
                    file.write_text(json.dumps(document, indent=1) + "\n")


def configs(options: argparse.Namespace) -> Iterator[Config]:
    """The settings of each case."""
    gpu = options.device != "cpu" and torch.cuda.is_available()
    for name in [options.recipe] if options.recipe else options.sizes:
        if options.recipe:
            config = settings.load(name, ["--optim.name", "adamw"])  # as the sizes have
        else:
            config = of_size(name, options.image_size)
        own = config.train.batch_size if options.recipe else 256 if gpu else 8
        for batch in options.batch or [own]:
            train = dataclasses.replace(
                config.train,
                batch_size=batch,
                micro_batch=batch,
                device=options.device,
                compile=options.compile,
                threads=options.threads,
            )
            yield dataclasses.replace(config, train=train)


def of_size(name: str, image_size: int) -> Config:
    """A preset with its patch, as "h/14"."""
    size, _, patch = name.partition("/")
    if size not in PRESETS or not (patch or "16").isdecimal():
        raise UserError(f"sizes: expected {', '.join(PRESETS)}, alone or as s/16, got {name}")
    model = ViTConfig(size=cast(Any, size), patch_size=int(patch or 16), image_size=image_size)
    return Config(model=model, data=DataConfig(path="imagenet"), train=TrainConfig())


def measure(
    config: Config, options: argparse.Namespace, builders: dict[str, Builder]
) -> Iterator[tuple[Document, str]]:
    """What is asked for about one model: for the file, and as text."""
    modes: list[Mode] = ["train", "infer"] if options.mode == "both" else [options.mode]
    classes = num_classes(config)
    if options.largest_batch:
        yield from memory(config, builders, classes)
        return
    for mode in modes:
        if options.profile:
            build = builders[options.profile]
            case = breakdown(config, mode, options.profile, build, classes)
            yield case, profile_table(case)
        else:
            case = compare(config, mode, builders, options.rounds)
            yield case, table(case)


def memory(
    config: Config, builders: dict[str, Builder], classes: int
) -> Iterator[tuple[Document, str]]:
    """The largest batch of each model, with and without activation checkpointing."""
    for name, build in builders.items():
        for again in (False, True):
            model = dataclasses.replace(config.model, activation_checkpointing=again)
            batch = largest_batch(dataclasses.replace(config, model=model), build, classes)
            how = "with" if again else "without"
            shape = f"{model.size}/{model.patch_size} at {model.image_size} pixels"
            text = f"{name:14} {shape}: {batch:,} images {how} activation checkpointing"
            found = {"name": name, "activation_checkpointing": again, "largest_batch": batch}
            yield {**found, "shape": shape}, text


def environment() -> Document:
    """When, by what command, and on what."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    here = Path(__file__).parent
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": output("git", "-C", str(here), "rev-parse", "HEAD"),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": available_cores(),
        "gpu": gpu,
        "driver": gpu
        and output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": gpu and torch.version.cuda,
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in ("vitral", "torch", "triton", "timm")},
    }


def output(*command: str) -> str | None:
    """The first line that a command prints, if it can be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.partition("\n")[0]


def processor() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def installed(name: str) -> str | None:
    """The version of a package, if it is there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
