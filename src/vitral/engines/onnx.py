"""Exports models to ONNX and runs the files."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from vitral.model import CHANNELS, ViT

Forward = Callable[[Tensor], Tensor]


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the exporters' warnings, which the user cannot act on."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def import_onnx() -> None:
    """Imports the packages for ONNX, without the telemetry that onnxruntime starts on import.

    Raises:
        ImportError: if a package is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401


def trace(model: ViT) -> ExportedProgram:
    """Traces a model for any number of images and any multiples of the patch size from two on."""
    P = model.config.patch_size
    # torch would specialize the graph for a single row or column.
    rows, columns = Dim("rows", min=2), Dim("columns", min=2)
    shapes = {"images": {0: Dim("batch", min=1), 2: P * rows, 3: P * columns}}
    sample = torch.zeros(2, CHANNELS, 3 * P, 4 * P)
    program = torch.export.export(model, (sample,), dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it would leak local paths into the file
    return program


def to_onnx(program: ExportedProgram, output: str, opset: int = 20) -> Any:
    """Returns torch's ONNX program, with the input "images" and an output of the given name."""
    made = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        opset_version=opset,
        input_names=["images"],
        output_names=[output],
        dynamic_shapes={"images": {0: "batch", 2: "height", 3: "width"}},
    )
    assert made is not None
    return made


def open_onnx(source: Path | bytes) -> Forward:
    """Opens a file, or its content, in onnxruntime on a CPU, with as many threads as torch."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()  # in case it was imported before
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised as well
    options.intra_op_num_threads = torch.get_num_threads()
    # Otherwise a thread that waits for another one keeps its core busy.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def open_openvino(source: bytes) -> Forward:
    """Opens the content of a file in OpenVINO on a CPU, in float32, with the threads of torch."""
    import openvino  # pyright: ignore[reportMissingImports]

    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(source), "CPU", settings)
    return lambda images: torch.from_numpy(compiled(images.numpy())[0].copy())
