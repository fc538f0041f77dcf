import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.torch_version import TorchVersion

os.environ["VITRAL_PROFILE"] = "off"  # decisions do not depend on the speed of this machine
torch.set_num_threads(1)  # otherwise forked children may wait for threads they did not inherit
# For deterministic runs. torch reads it at the first matrix product on a GPU, in whichever test.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Run the first backward pass before the compiler is imported. Otherwise autograd starts threads,
# with which children cannot be forked safely.
torch.zeros(1, requires_grad=True).sum().backward()
# nohup ignores it, and children inherit that. Tests of signals expect the default.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Two classes of small JPEGs: 40 training and 12 validation images."""
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 6)):
        for label, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                low = draw.integers(0, 120, (5, 6, 3)) + 120 * label
                picture = Image.fromarray(low.astype(np.uint8)).resize((24, 20))
                picture.save(root / split / name / f"{i:02d}.jpg", quality=90)
    return root


@pytest.fixture(scope="session")
def benchmarks():
    """The benchmarks folder, from which its programs can be imported."""
    folder = Path(__file__).parents[1] / "benchmarks"
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="session")
def interpreter():
    """Triton's interpreter, which runs kernels on a CPU with TRITON_INTERPRET=1."""
    triton = pytest.importorskip("triton")
    if TorchVersion(triton.__version__) < "3.7" and TorchVersion(np.__version__) >= "2.4":
        pytest.skip("Triton's interpreter does not support this NumPy")


@pytest.fixture(scope="module")
def in_process(benchmarks):
    """Trains the runs of experiments in this process, as imports in a child take long."""
    import experiments
    import variants

    from vitral.cli import main

    def call(command):
        _, program, *words = command
        return main(words[1:]) if program == "-m" else variants.main(words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "call", call)
        yield
