"""benchmarks/blocks.py: the blockings of the Triton kernels, here in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "blocks.py"


def run(out, interpret):
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, str(SCRIPT), str(out)]
    return subprocess.run(words, capture_output=True, text=True, env=environment)


def test_every_blocking_computes_the_same(interpreter, tmp_path):
    done = run(tmp_path / "blocks.json", "1")
    assert done.returncode == 0, done.stderr
    first, *rows = json.loads((tmp_path / "blocks.json").read_text())
    assert first["name"] == "torch, compiled"
    assert len({row["name"] for row in rows}) == len(rows) > 5
    for row in rows:
        assert row["shape"] == "tiny"
        assert "failed" not in row
        for direction in ("forward", "backward"):
            assert 0 < row[f"{direction} off"] < 0.005  # float16 is rounded by both
            rate = 2 * 130 * 64 * 256 / row[f"{direction} ms"] / 1e9
            assert row[f"{direction} TFLOP/s"] == pytest.approx(rate)


def test_without_a_gpu_there_is_nothing_to_time(tmp_path):
    done = run(tmp_path / "blocks.json", "0")
    assert (done.returncode, done.stderr) == (2, "blocks: expected a GPU, got none\n")
    assert not (tmp_path / "blocks.json").exists()
