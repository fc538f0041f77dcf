"""Compares the speed of vitral's training step and forward pass with timm's models.

    python benchmarks/throughput.py [--sizes s b l] [--batch 256] [--mode both] [--json FILE]
    python benchmarks/throughput.py --recipe digits [--threads 1]
    python benchmarks/throughput.py --sizes s --profile vitral
    python benchmarks/throughput.py --sizes l/16 h/14 --largest-batch

All models are in one process and are measured in alternation on the same random images; each round
starts with a different model. They share the step of `vitral train`: forward and backward pass,
soft-target cross-entropy, gradients clipped to norm 1, fused AdamW, and clearing the gradients. On
a GPU it uses bf16 autocast and is compiled; on a CPU it uses float32 and is not compiled. The
models are defined in src/vitral/bench/peers.py. `--recipe` uses the architecture, options and batch
size of a recipe, also for timm's models; the optimizer is AdamW for all.

GPUs are timed with CUDA events, CPUs with wall-clock and processor time; ratios on a CPU are of
processor time. If several threads share their cores with other processes, set
OMP_WAIT_POLICY=PASSIVE, so that they do not waste processor time waiting for each other. FLOPs are
those of the matrix products of forward and backward pass, counted by torch in the same way for
every model. The rate of large matrix products is measured in the same run. Memory is the peak of a
model's own training, without the weights of the other models.
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
    """Runs the command; returns 0, or 2 for a user error."""
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
    add(
        "--sizes",
        nargs="+",
        default=["s"],
        help="presets with patch size (default 16): s l/16 h/14",
    )
    add("--recipe", help="use the model of a recipe instead")
    add("--batch", type=int, nargs="+", help="default: 256, on a CPU 8; or that of the recipe")
    add("--image-size", type=int, default=224)
    add("--mode", choices=["train", "infer", "both"], default="train")
    add("--peers", nargs="*", default=list(PEERS), help=f"default: {', '.join(PEERS)}")
    add("--compile", choices=["auto", "always", "never"], default="auto")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--threads", type=int)
    add("--rounds", type=int, default=rounds.ROUNDS)
    add("--seconds", type=float, default=rounds.SECONDS, help="time per model and round")
    add("--profile", metavar="MODEL", help="instead, profile the step of this model")
    add("--largest-batch", action="store_true", help="instead, find the largest batch that fits")
    add("--json", type=Path, help="file for all results")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measures all cases, and writes the results after each.

    Raises:
        UserError: if a case cannot be measured.
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
            config = settings.load(name, ["--optim.name", "adamw"])  # as for --sizes
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
    """The settings of a preset with a patch size, such as "h/14"."""
    size, _, patch = name.partition("/")
    if size not in PRESETS or not (patch or "16").isdecimal():
        raise UserError(
            f"sizes: expected {', '.join(PRESETS)}, optionally with a patch size as in s/16, "
            f"got {name}"
        )
    model = ViTConfig(size=cast(Any, size), patch_size=int(patch or 16), image_size=image_size)
    return Config(model=model, data=DataConfig(path="imagenet"), train=TrainConfig())


def measure(
    config: Config, options: argparse.Namespace, builders: dict[str, Builder]
) -> Iterator[tuple[Document, str]]:
    """Yields the requested results of one case, for the file and as text."""
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
    """Yields the largest batch of each model, without and with activation checkpointing."""
    for name, build in builders.items():
        for recompute in (False, True):
            model = dataclasses.replace(config.model, activation_checkpointing=recompute)
            batch = largest_batch(dataclasses.replace(config, model=model), build, classes)
            how = "with" if recompute else "without"
            shape = f"{model.size}/{model.patch_size} at {model.image_size} pixels"
            text = f"{name:14} {shape}: {batch:,} images {how} activation checkpointing"
            found = {"name": name, "activation_checkpointing": recompute, "largest_batch": batch}
            yield {**found, "shape": shape}, text


def environment() -> Document:
    """Date, command, hardware and software versions."""
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
    """The first line that a command prints, or None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.partition("\n")[0]


def processor() -> str:
    """The name of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def installed(name: str) -> str | None:
    """The version of a package, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
