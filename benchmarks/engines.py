"""Compares the engines of vitral on a CPU with timm's model in torch, onnxruntime and OpenVINO.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/engines.py [--size ti] [--threads 1] [--rounds 5]

Measures the forward pass of untrained ViTs with patch size 16 on random images of 224 pixels, in
alternation; each round starts with a different engine. timm's model receives the complete batch,
as in a usual loop, or a slice of it at a time; its export receives slices in onnxruntime and
OpenVINO. Rates are shown by processor time and by wall time, with the median and the range of their
ratios to timm's. "compiled" is vitral's model in torch.compile. Runtimes that are not installed are
left out. --timm-onnx names the file with timm's export; it is created if it does not exist.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitral.bench.rounds import ratios, run_interleaved
from vitral.config import ViTConfig
from vitral.engines import bf16, onednn, onnx
from vitral.engines.choice import for_inference
from vitral.machine import processor
from vitral.model import ViT

TIMM = {"ti": "tiny", "s": "small", "b": "base"}
SIDE, CLASSES, SLICE = 224, 1000, 8
Run = Callable[[], object]


def export_timm(model: nn.Module, file: Path) -> bytes:
    if not file.exists():
        shapes = {"x": {0: torch.export.Dim("batch", min=1)}}
        sample = (torch.zeros(2, 3, SIDE, SIDE),)
        with onnx.quiet():
            program = torch.export.export(model, sample, dynamic_shapes=shapes, strict=False)
            made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"])
        assert made is not None
        made.save(file, external_data=False)
    return file.read_bytes()


def openvino_in_bf16(content: bytes) -> Callable[[Tensor], object]:
    import openvino  # pyright: ignore[reportMissingImports]

    settings = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(content), "CPU", settings)
    return lambda images: compiled(images.numpy())


def contestants(options: argparse.Namespace, images: Tensor) -> dict[str, Run]:
    torch.manual_seed(0)
    own = ViT(ViTConfig(size=options.size), CLASSES).eval()
    other = timm.create_model(f"vit_{TIMM[options.size]}_patch16_{SIDE}").eval()

    def sliced(forward: Callable[[Tensor], Any]) -> Run:
        return lambda: [forward(part) for part in images.split(SLICE)]

    runs: dict[str, Run] = {
        "timm": partial(other, images),
        f"timm, {SLICE} images at a time": sliced(other),
        "vitral's model": partial(own, images),
        "vitral, plain": partial(for_inference(own, "plain"), images),
    }
    if onednn.is_supported(own):
        runs["vitral, onednn"] = partial(for_inference(own, "onednn"), images)
    if bf16.is_supported(own):
        runs["vitral, bf16"] = partial(for_inference(own, "bf16"), images)
    if options.compile:
        runs["vitral, compiled"] = sliced(torch.compile(own, dynamic=False))
    if find_spec("onnxruntime"):
        content = export_timm(other, options.timm_onnx)
        runs["timm in onnxruntime"] = sliced(onnx.open_onnx(content))
        if find_spec("openvino"):
            runs["timm in OpenVINO"] = sliced(onnx.open_openvino(content))
            runs["timm in OpenVINO, bf16"] = sliced(openvino_in_bf16(content))
    return runs


def seconds(run: Run) -> tuple[float, float]:
    """Processor time and wall time."""
    before = process_time(), perf_counter()
    run()
    return process_time() - before[0], perf_counter() - before[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=TIMM, default="ti")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--timm-onnx", type=Path)
    options = parser.parse_args()
    options.timm_onnx = options.timm_onnx or Path(tempfile.mkdtemp()) / "timm.onnx"
    torch.set_num_threads(options.threads)
    images = torch.randn(options.batch, 3, SIDE, SIDE)
    runs = {name: partial(seconds, run) for name, run in contestants(options, images).items()}
    with torch.no_grad():
        found = run_interleaved(runs, options.rounds + 1)
    versions = f"{processor()}, torch {torch.__version__}, timm {timm.__version__}"
    print(f"ViT-{options.size}/16, threads: {options.threads}, {versions}")
    spent = {name: times[1:] for name, times in found.items()}
    for name, times in spent.items():
        text = f"  {name:26}"
        for what, column in ("cpu", 0), ("wall", 1):
            own, base = ([t[column] for t in each] for each in (times, spent["timm"]))
            ratio, rate = sorted(ratios(base, own)), options.batch / statistics.median(own)
            text += f"{rate:7.1f} img/s by {what}, x {statistics.median(ratio):.2f} "
            text += f"({ratio[0]:.2f} to {ratio[-1]:.2f})  "
        print(text, flush=True)


if __name__ == "__main__":
    main()
