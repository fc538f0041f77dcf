"""Measures the rate of the model, alone or next to its peers, for `vitral bench model`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from vitral.bench import rounds
from vitral.bench.contest import REFERENCE, compare
from vitral.bench.peers import PEERS, has_timm, select_models
from vitral.config import Config
from vitral.errors import counted

NO_TIMM = "timm is not installed (pip install timm): measuring vitral only"


def bench_model(config: Config, peers: bool = False) -> str:
    """Measures the training step for one micro-batch, of vitral alone or also of timm's models."""
    case = compare(config, "train", select_models(list(PEERS) if peers else []), rounds.ROUNDS)
    return "\n".join([NO_TIMM] * (peers and not has_timm()) + [table(case)])


def table(case: dict[str, Any]) -> str:
    """Formats the result of `compare`, one line per model: medians, and (minimum to maximum)."""
    work = {"train": "training steps", "infer": "forward passes"}[case["mode"]]
    head = (
        f"{work} of {counted(case['batch'], 'image')} of {case['image_size']} pixels, "
        f"{counted(case['num_classes'], 'class')}, on {case['device']}; "
        f"{counted(case['rounds'], 'interleaved round')}"
    )
    matmul = f"matrix multiplications alone reach {case['matmul_tflops']:.4g} TFLOP/s"
    rows = [["", "M param.", "GFLOP", "ms", "images/s", "", "TFLOP/s", "of matmul"]]
    rows[0] += [f"rate, {REFERENCE} = 1", "", "memory", "compiled in"]
    rows += [list(_cells(row)) for row in case["contestants"]]
    kept = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in kept]
    lines = []
    for cells in zip(*kept, strict=True):
        first, *others = (c.rjust(w) for c, w in zip(cells, widths, strict=True))
        lines.append("  ".join([cells[0].ljust(len(first)), *others]))
    note = f"rates relative to {REFERENCE} use {case['clock']}; {matmul}"
    return "\n".join([head, *lines, note])


def _cells(row: dict[str, Any]) -> Iterator[str]:
    rate, ratio = row["images_per_second"], row["ratio"]
    yield row["name"]
    yield f"{row['parameters'] / 1e6:.2f}"
    yield f"{row['gflops_per_image']:.4g}"
    yield f"{statistics.median(row['ms']):.2f}"
    yield f"{rate['median']:,.0f}"
    yield f"({rate['min']:,.0f} to {rate['max']:,.0f})"
    yield f"{row['tflops']:.4g}"
    yield f"{row['share_of_matmul']:.1%}"
    yield f"{ratio['median']:.2f}" if ratio else ""
    yield f"({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else ""
    memory, seconds = row["memory_bytes"], row["compile_s"]
    yield f"{memory / 1e9:.2f} GB" if memory is not None else ""
    yield f"{seconds:.0f} s, {row['compilations']} graphs" if seconds is not None else ""
