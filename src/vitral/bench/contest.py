"""Interleaved training steps or forward passes of vitral and its peers, with the same work."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vitral import compat
from vitral.bench import rounds
from vitral.bench.describe import describe_device
from vitral.bench.peers import Builder
from vitral.bench.rounds import ratios, run_interleaved
from vitral.config import Config
from vitral.errors import UserError
from vitral.machine import has_gpu, pick_device, synchronize
from vitral.model import forward_flops
from vitral.training.work import Inference, Training, Work

Mode = Literal["train", "infer"]
WORK: dict[Mode, type[Work]] = {"train": Training, "infer": Inference}
CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "imagenette": 10}
REFERENCE = "timm"  # the denominator of ratios
WARMUP = 3  # steps; the first one compiles
MIN_STEPS, MAX_STEPS = 3, 200  # steps per round
MATMULS = {"cpu": (512, 1024), "cuda": (4096, 8192, 16384)}
CLOCKS = {"cpu": "processor time", "cuda": "CUDA events"}


def compare(
    config: Config, mode: Mode, builders: Mapping[str, Builder], count: int
) -> dict[str, Any]:
    """Measures models on the same work, in interleaved rounds.

    Args:
        config: the architecture and, from the training settings, batch, precision, compilation and
            threads. If the micro-batch is not set, it is the one chosen for vitral's model.
        mode: "train" or "infer".
        builders: the models by name.
        count: number of rounds.

    Returns:
        The conditions, and a row for each model, for JSON.

    Raises:
        UserError: if the batch does not fit in GPU memory.
    """
    classes, image_size = num_classes(config), config.model.image_size
    torch.compiler.reset()  # all models of a class share the limit on recompilations
    gc.collect()  # otherwise earlier measurements would count as memory use
    try:
        resolved = Training(config, classes, image_size).resolved
        train = dataclasses.replace(config.train, micro_batch=resolved.micro_batch)
        config = dataclasses.replace(config, train=train)
        matmul = matmul_rate(resolved.device, resolved.precision)
        # With an empty cache, the compilation is timed, not reading from disk.
        with compat.fresh_compile_cache():
            models = {n: BenchmarkedModel(config, classes, mode, b) for n, b in builders.items()}
            times = run_interleaved({name: model.round for name, model in models.items()}, count)
    except torch.OutOfMemoryError:
        raise UserError(
            f"batch: {mode} with {config.train.micro_batch or config.train.batch_size} images of "
            f"{image_size} pixels does not fit in GPU memory; use a smaller batch"
        ) from None
    rows = [_row(models[name], name, times, matmul) for name in builders]
    return {
        "mode": mode,
        "batch": resolved.micro_batch,
        "image_size": image_size,
        "num_classes": classes,
        "shape": {**config.model.shape._asdict(), "patch_size": config.model.patch_size},
        "device": describe_device(resolved),
        "clock": CLOCKS.get(resolved.device, "wall clock"),
        "rounds": count,
        "matmul_tflops": matmul / 1e12,
        "contestants": rows,
    }


def num_classes(config: Config) -> int:
    """Returns the number of classes of a known dataset, otherwise 1,000; no data is read."""
    return CLASSES.get(config.data.path, 1000)


@dataclass(frozen=True)
class Times:
    """Milliseconds per step: medians of one round."""

    elapsed: float
    cpu_time: float | None
    """Processor time of all threads; None on a GPU."""

    @property
    def comparable(self) -> float:
        """The time for ratios: other load hardly affects the processor time of a CPU."""
        return self.elapsed if self.cpu_time is None else self.cpu_time


class BenchmarkedModel:
    """A model after building, compilation and warmup, and their cost."""

    def __init__(self, config: Config, num_classes: int, mode: Mode, build: Builder) -> None:
        with torch.device("meta"):
            meta_model = build(config.model, num_classes).train(mode == "train")
        passes = 3 if mode == "train" else 1
        self.flops = passes * forward_flops(meta_model, config.model.image_size)
        memory_before = torch.cuda.memory_allocated() if has_gpu() else 0
        torch.manual_seed(config.train.seed)
        with pick_device(config.train.device):
            model = build(config.model, num_classes)
        self.work = WORK[mode](config, num_classes, config.model.image_size, model)
        self.compilations = 0
        first, *_, warm = (self._time(1) for _ in range(WARMUP))
        self.compile_s = None
        if self.work.resolved.compile:
            self.compile_s = (first.elapsed - warm.elapsed) / 1e3
        self.steps = min(max(round(1e3 * rounds.SECONDS / warm.elapsed), MIN_STEPS), MAX_STEPS)
        self.memory_bytes = None
        if self.work.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # exclude the memory that compilation used
            self._time(1)
            self.memory_bytes = torch.cuda.max_memory_allocated() - memory_before

    def round(self) -> Times:
        """Measures one round."""
        return self._time(self.steps)

    def _time(self, steps: int) -> Times:
        graphs = compat.num_compiled_graphs()
        times = time_steps(self.work, steps)
        self.compilations += compat.num_compiled_graphs() - graphs
        return times


def time_steps(work: Work, steps: int) -> Times:
    """Measures the median time of a step, from its start to the start of the next one."""
    if work.device.type != "cuda":
        marks = [(time.perf_counter(), time.process_time())]
        for _ in range(steps):
            work.step(work.batch)
            synchronize(work.device)
            marks.append((time.perf_counter(), time.process_time()))
        elapsed, busy = (
            statistics.median(1e3 * (b - a) for a, b in itertools.pairwise(clock))
            for clock in zip(*marks, strict=True)
        )
        return Times(elapsed, busy if work.device.type == "cpu" else None)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        work.step(work.batch)
        event.record()
    events[-1].synchronize()
    return Times(statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)), None)


@functools.cache
def matmul_rate(device: str, precision: str) -> float:
    """Measures the highest FLOP/s of large square matrix multiplications, over all sizes."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    best = 0.0
    for size in MATMULS.get(device, MATMULS["cpu"]):
        a = torch.randn(size, size, device=device, dtype=dtype)
        for _ in range(5):
            synchronize(a.device)
            started = time.perf_counter()
            torch.mm(a, a)
            synchronize(a.device)
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def _row(
    model: BenchmarkedModel, name: str, times: Mapping[str, Sequence[Times]], matmul: float
) -> dict[str, Any]:
    """Returns the results of a model, including ratios to the reference."""
    own, reference = times[name], times.get(REFERENCE)
    images = model.work.resolved.micro_batch
    elapsed = [time.elapsed for time in own]
    rate = model.flops * images / (statistics.median(elapsed) / 1e3)
    compared = (
        ratios([t.comparable for t in reference], [t.comparable for t in own])
        if reference
        else None
    )
    cpu_time = [time.cpu_time for time in own if time.cpu_time is not None]
    return {
        "name": name,
        "parameters": sum(p.numel() for p in model.work.model.parameters()),
        "gflops_per_image": model.flops / 1e9,
        "ms": elapsed,
        "processor_ms": cpu_time or None,
        "images_per_second": _statistics([1e3 * images / ms for ms in elapsed]),
        "ratio": compared and _statistics(compared),
        "tflops": rate / 1e12,
        "share_of_matmul": rate / matmul,
        "memory_bytes": model.memory_bytes,
        "compile_s": model.compile_s,
        "compilations": model.compilations,
    }


def _statistics(values: list[float]) -> dict[str, Any]:
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {**found, "rounds": values}
