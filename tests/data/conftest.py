"""Fixtures shared by several data tests."""

import pytest

from vitral.data.tools import packing

from .pack_files import draw


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    """Folder of the archive indexes, in a temporary cache."""
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VITRAL_CACHE", str(place))
    return place / "index"


@pytest.fixture
def nothing_printed(capfd):
    """Fails a test that prints."""
    yield
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def small_chunks(monkeypatch):
    """Writes packs in chunks of four images."""
    monkeypatch.setattr(packing, "CHUNK", 4)


@pytest.fixture
def source(tmp_path):
    """Two classes of JPEGs of different sizes: 18 for training, 6 for validation."""
    root = tmp_path / "source"
    for split, count in (("train", 9), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                draw(root / split / name / f"{i}.jpg", seed=100 * label + 10 * count + i)
    return root
