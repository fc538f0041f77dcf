"""Tests of benchmarks/blocks.py: block sizes of the Triton kernels, in the interpreter."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")


def test_every_block_size_computes_the_same(interpreter, benchmarks, tmp_path):
    out = tmp_path / "blocks.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, str(benchmarks / "blocks.py"), str(out)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    first, *rows = json.loads(out.read_text())
    assert first["name"] == "torch, compiled"
    assert len({row["name"] for row in rows}) == len(rows) > 5
    for row in rows:
        assert row["shape"] == "tiny"
        assert "failed" not in row
        for direction in ("forward", "backward"):
            assert 0 < row[f"{direction} off"] < 0.005  # both round to float16
            rate = 2 * 130 * 64 * 256 / row[f"{direction} ms"] / 1e9
            assert row[f"{direction} TFLOP/s"] == pytest.approx(rate)


def test_a_missing_gpu_is_an_error(benchmarks, tmp_path, monkeypatch, capsys):
    import blocks

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert blocks.main([str(tmp_path / "blocks.json")]) == 2
    assert capsys.readouterr().err == "blocks: expected a GPU, got none\n"
    assert not (tmp_path / "blocks.json").exists()
