"""Compares block sizes for the two Triton kernels of `kernels/gelu.py` with torch, on one GPU.

    python benchmarks/blocks.py OUT.json

Reports the median time in milliseconds, TFLOP/s, and the largest difference from torch's result,
which is rounding error, for the feed-forward networks of ViT-S, B and L at 224 pixels. The fastest
block size belongs at the top of `kernels/gelu.py`. With Triton's interpreter (TRITON_INTERPRET=1),
only one small shape is tested.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench

from vitral.kernels import gelu

SHAPES = {"s": (512 * 197, 384), "b": (256 * 197, 768), "l": (128 * 197, 1024)}  # tokens, width
BLOCKINGS = (  # rows, columns and depth of a block, warps, stages
    (128, 128, 64, 4, 3),
    (128, 128, 64, 4, 4),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
    (128, 128, 32, 4, 4),
    (64, 256, 64, 4, 3),
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0, 1 if every block size fails, or 2 without a GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="a JSON file")
    out: Path = parser.parse_args(arguments).out
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (torch.cuda.is_available() or interpreted):
        print("blocks: expected a GPU, got none", file=sys.stderr)
        return 2
    if interpreted:
        gelu.wrap_triton = lambda kernel: kernel  # torch 2.11 cannot wrap interpreted kernels
    rows = []
    for name, shape in ({"tiny": (130, 64)} if interpreted else SHAPES).items():
        for found in measured(*shape):
            rows.append({"shape": name, **found})
            print(
                ", ".join(
                    f"{key} {value:.4g}" if isinstance(value, float) else value
                    for key, value in found.items()
                )
            )
            out.write_text(json.dumps(rows, indent=1) + "\n")
    return int(all("failed" in found for found in rows[1:]))


def measured(tokens: int, dim: int) -> Iterator[dict[str, Any]]:
    """Yields a row for torch, and then a row for each block size."""
    gpu = torch.cuda.is_available()
    like: Any = {"device": "cuda", "dtype": torch.bfloat16} if gpu else {"dtype": torch.float16}
    x, gradient = torch.randn(tokens, dim, **like), torch.randn(tokens, dim, **like)
    expand = torch.randn(4 * dim, dim, **like) / dim**0.5
    contract = torch.randn(dim, 4 * dim, **like) / (4 * dim) ** 0.5
    bias = torch.randn(4 * dim, **like)
    before = F.linear(x, expand, bias)
    torch_forward = compiled(lambda: F.gelu(F.linear(x, expand, bias), approximate="tanh"))

    def plain_backward() -> tuple[Tensor, Tensor]:
        result = torch.ops.aten.gelu_backward(gradient @ contract, before, approximate="tanh")
        return result, result.float().sum(0)

    torch_backward = compiled(plain_backward)
    flops = 2 * tokens * dim * 4 * dim
    yield row("torch, compiled", flops, torch_forward, torch_backward, (0.0, 0.0))
    after, result = torch_forward(), torch_backward()[0]

    def forward() -> Tensor:
        return gelu.gelu_linear(x, expand, bias)[1]

    def backward() -> tuple[Tensor, Tensor]:
        return gelu.gelu_backward(gradient, contract, before)

    for blocking in BLOCKINGS:
        gelu.BLOCK_M, gelu.BLOCK_N, gelu.BLOCK_K, gelu.WARPS, gelu.STAGES = blocking
        try:
            off = distance(forward(), after), distance(backward()[0], result)
            yield row(str(blocking), flops, forward, backward, off)
        except Exception as error:  # from the compiler, for example if the block is too large
            reason = str(error).partition("\n")[0]
            yield {"name": str(blocking), "failed": f"{type(error).__name__}: {reason}"}


def compiled(run: Callable[[], Any]) -> Callable[[], Any]:
    """Compiles for a GPU; the small shape of the interpreter is not worth compiling."""
    return torch.compile(run, dynamic=False) if torch.cuda.is_available() else run


def row(
    name: str,
    flops: float,
    forward: Callable[[], Any],
    backward: Callable[[], Any],
    off: tuple[float, float],
) -> dict[str, Any]:
    """Time, rate and error of both passes."""
    times = milliseconds(forward), milliseconds(backward)
    found: dict[str, Any] = {"name": name}
    for which, ms, error in zip(("forward", "backward"), times, off, strict=True):
        found |= {f"{which} ms": ms, f"{which} TFLOP/s": flops / ms / 1e9, f"{which} off": error}
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference."""
    return (a.float() - b.float()).abs().max().item()


def milliseconds(run: Callable[[], Any]) -> float:
    """The median of many runs on a GPU, or one (meaningless) run in the interpreter."""
    if torch.cuda.is_available():
        return cast(float, do_bench(run, return_mode="median"))
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
