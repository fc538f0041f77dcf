"""Profiles of a step: the time in GPU kernels or CPU operators, by kind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vitral.bench.contest import WORK, Mode
from vitral.bench.peers import Builder
from vitral.config import Config

Kind = Literal["attention", "matmul", "optimizer", "copy", "elementwise", "other"]
# The first pattern found in a name counts. Inductor names a kernel after everything that it fused:
# norms, copies, and adjacent attention. Attention kernels use cutlass, like matrix multiplications;
# the optimizer's kernels are templates over elementwise functors.
PATTERNS: tuple[tuple[Kind, str], ...] = (
    ("elementwise", r"^triton_(?!tem_)"),
    ("matmul", r"^_gelu_(linear|backward)"),  # the custom kernels in kernels/gelu.py
    ("attention", r"attention|flash|fmha|sdpa"),
    ("optimizer", r"adam|multi_tensor_apply|_foreach_|vector_norm|LpNorm"),
    ("matmul", r"gemm|gemv|cutlass|cublas|nvjet|wgmma|splitk|triton_tem_|^aten::(add|b|bad)?mm$"),
    ("matmul", r"^aten::_?(linear|matmul|einsum|convolution|mkldnn|thnn_conv)|conv\dd"),
    ("copy", r"memcpy|memset|copy|CatArray|^aten::(cat|clone|contiguous|stack|zero_|fill_)"),
    ("elementwise", r"elementwise|reduce|norm|softmax|gelu|dropout"),
    ("elementwise", r"^aten::(add|sub|mul|div|neg|pow|sum|mean|sqrt|rsqrt|sin|cos|where)"),
)
STEPS = 5
TOP = 15


def kind_of(name: str) -> Kind:
    """Returns the kind of a kernel or operator, by its name."""
    for kind, pattern in PATTERNS:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


@dataclass(frozen=True)
class Entry:
    """A kernel or operator in one step."""

    name: str
    kind: Kind
    ms: float
    """Time without that of the operators that it calls."""
    calls: float


def breakdown(
    config: Config, mode: Mode, name: str, build: Builder, classes: int
) -> dict[str, Any]:
    """Profiles a model's step: the fraction of each kind, and the kernels that take the most time.

    Fractions refer to the total time in GPU kernels, or in operators on a CPU; the time in Python
    between them is not included.
    """
    model = build(config.model, classes)
    work = WORK[mode](config, classes, config.model.image_size, model)
    gpu = work.device.type == "cuda"
    for _ in range(3):
        work.step(work.batch)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(STEPS):
            work.step(work.batch)
        if gpu:
            torch.cuda.synchronize()
    entries = sorted(_entries(profiler, gpu), key=lambda entry: -entry.ms)
    return {"contestant": name, "mode": mode, **summarize(entries)}


def _entries(profiler: profile, gpu: bool) -> Iterator[Entry]:
    for event in profiler.key_averages():
        on_gpu = event.device_type == DeviceType.CUDA
        if on_gpu != gpu or event.is_user_annotation:
            continue
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        yield Entry(event.key, kind_of(event.key), spent / 1e3 / STEPS, event.count / STEPS)


def summarize(entries: Iterable[Entry]) -> dict[str, Any]:
    """Returns milliseconds per step, the fraction of each kind, and the most expensive entries."""
    entries = list(entries)
    total = sum(entry.ms for entry in entries)
    shares = dict.fromkeys(get_args(Kind), 0.0)
    for entry in entries:
        shares[entry.kind] += entry.ms / total
    top = sorted(entries, key=lambda entry: -entry.ms)[:TOP]
    return {"ms": total, "shares": shares, "top": [{**vars(e), "share": e.ms / total} for e in top]}


def profile_table(found: dict[str, Any]) -> str:
    """Formats a breakdown as plain text."""
    lines = [
        f"{found['contestant']}, {found['mode']}: {found['ms']:.2f} ms of kernel time per step"
    ]
    lines += [f"  {share:6.1%}  {kind}" for kind, share in found["shares"].items()]
    for entry in found["top"]:
        cost = f"{entry['share']:6.1%} {entry['ms']:9.3f} ms {entry['calls']:7.0f} calls"
        lines.append(f"  {cost}  {entry['kind']:12} {entry['name'][:90]}")
    return "\n".join(lines)
