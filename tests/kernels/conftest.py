"""Runs the Triton kernels in the interpreter once for all of their tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Tokens, dim, hidden, biases. The kernels' blocks have M = N = 128 and K = 64.
CASES = [(130, 64, 128, True), (60, 8, 24, True), (160, 72, 160, False)]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


@pytest.fixture(scope="session")
def interpreted(interpreter):
    """Errors of feed-forward networks and matrix products by case, and the error of a layer."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    program = Path(__file__).with_name("interpreted.py")
    command = [sys.executable, str(program), json.dumps(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    pairs = iter(found["errors"])
    return {
        "errors": {(each, kind): next(pairs) for each in CASES for kind in ("float32", "float16")},
        "products": dict(zip(CASES, found["products"], strict=True)),
        "layer": found["layer"],
    }
