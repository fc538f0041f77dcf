"""What takes the time of a step: kernels on a GPU, operators on a CPU, by what they do."""

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
# The first that is found in a name counts. Inductor names a kernel after all that it has fused:
# norms, copies, and the attention that it stands beside. Attention kernels are built of cutlass, as
# matrix products are; the optimiser's are templates over elementwise functors.
PATTERNS: tuple[tuple[Kind, str], ...] = (
    ("elementwise", r"^triton_(?!tem_)"),
    ("matmul", r"^_gelu_(linear|backward)"),  # vitral's own: kernels/gelu.py
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
    """What a kernel or an operator of this name does."""
    for kind, pattern in PATTERNS:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


@dataclass(frozen=True)
class Entry:
    """A kernel or an operator in one step."""

    name: str
    kind: Kind
    ms: float
    """In itself, without what it calls."""
    calls: float


def breakdown(
    config: Config, mode: Mode, name: str, build: Builder, classes: int
) -> dict[str, Any]:
    """The profile of a model's step: the share of each kind, and the kernels that take most.

    Shares are of the time that kernels run, or operators on a CPU; what Python does between them
    is in neither.
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
    """Milliseconds of a step, the share of each kind, and the entries that take most."""
    entries = list(entries)
    total = sum(entry.ms for entry in entries)
    shares = dict.fromkeys(get_args(Kind), 0.0)
    for entry in entries:
        shares[entry.kind] += entry.ms / total
    top = sorted(entries, key=lambda entry: -entry.ms)[:TOP]
    return {"ms": total, "shares": shares, "top": [{**vars(e), "share": e.ms / total} for e in top]}


def profile_table(found: dict[str, Any]) -> str:
    """A breakdown in plain text."""
    lines = [f"{found['contestant']}, {found['mode']}: {found['ms']:.2f} ms of kernels a step"]
    lines += [f"  {share:6.1%}  {kind}" for kind, share in found["shares"].items()]
    for entry in found["top"]:
        cost = f"{entry['share']:6.1%} {entry['ms']:9.3f} ms {entry['calls']:7.0f} calls"
        lines.append(f"  {cost}  {entry['kind']:12} {entry['name'][:90]}")
    return "\n".join(lines)
