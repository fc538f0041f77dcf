import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.torch_version import TorchVersion

torch.set_num_threads(1)  # forked children could otherwise wait for threads they did not inherit
# For deterministic runs. torch reads it at a GPU's first matrix product, whichever test that is in.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# The first backward pass decides whether autograd has threads, beside which no child may be forked:
# after the compiler is imported it has.
torch.zeros(1, requires_grad=True).sum().backward()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Two classes of small JPEGs: 40 to train on, 12 to validate."""
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
    """The folder of the programs, which are imported from there."""
    folder = Path(__file__).parents[1] / "benchmarks"
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="session")
def interpreter():
    """Triton's, whose kernels run on a CPU with TRITON_INTERPRET=1."""
    triton = pytest.importorskip("triton")
    if TorchVersion(triton.__version__) < "3.7" and TorchVersion(np.__version__) >= "2.4":
        pytest.skip("Triton's interpreter does not know this NumPy")


@pytest.fixture(scope="module")
def in_process(benchmarks):
    """Runs of experiments are trained in this process, where a child would import all anew."""
    import experiments
    import variants

    from vitral.cli import main

    def call(command):
        _, program, *words = command
        return main(words[1:]) if program == "-m" else variants.main(words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "call", call)
        yield
