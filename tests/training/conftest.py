"""Datasets and runs shared by the training tests."""

import numpy as np
import pytest
from PIL import Image

from .processes import digests, end_all, finish_single, make_config, run, words


@pytest.fixture(autouse=True)
def _end_processes():
    """Ends processes that a failed test leaves behind."""
    yield
    end_all()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Six classes of small JPEGs: 42 to train on, 23 to validate."""
    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for split, counts in (("train", [7] * 6), ("val", [1, 2, 3, 4, 6, 7])):
        for label, count in enumerate(counts):
            (root / split / f"class{label}").mkdir(parents=True)
            for i in range(count):
                low = draw.integers(0, 130, (5, 6, 3)) + 25 * label
                picture = Image.fromarray(low.astype(np.uint8)).resize((24, 20))
                picture.save(root / split / f"class{label}" / f"{i:02d}.jpg", quality=90)
    return root


@pytest.fixture(scope="session")
def pair(pictures, tmp_path_factory):
    """The digests of an uninterrupted run in two processes."""
    out = tmp_path_factory.mktemp("pair") / "run"
    return digests(run(words(pictures, out), 2))


@pytest.fixture(scope="session")
def finished(image_folder, tmp_path_factory):
    """A finished run in one process; tests change copies of it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert finish_single(make_config(image_folder, out)) == 0
    return out
