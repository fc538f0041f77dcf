"""Locations of caches, with and without a home directory."""

import os
import pwd
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

from vitral import caches
from vitral.config import DataConfig
from vitral.data.formats import open_dataset

NAMES = ("VITRAL_CACHE", "VITRAL_DATA", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR")


@pytest.fixture
def _unset(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def temporary(monkeypatch, tmp_path, _unset):
    """A temporary directory."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    caches._temporary_cache.cache_clear()
    yield tmp_path / "temporary"
    caches._temporary_cache.cache_clear()


@pytest.fixture(params=["unknown", "missing", "not a directory"])
def _homeless(request, monkeypatch, tmp_path):
    """A user without a home directory."""
    if request.param == "unknown":

        def unknown(number):
            raise KeyError(number)

        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", unknown)
    else:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        if request.param != "missing":
            (tmp_path / "home").touch()


@pytest.mark.usefixtures("_unset")
def test_locations_of_the_cache_and_the_downloads(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert caches.cache_dir() == tmp_path / ".cache/vitral"
    assert caches.downloads_dir() == tmp_path / ".cache/vitral/data"
    monkeypatch.setenv("XDG_CACHE_HOME", "~/shared")
    assert caches.cache_dir() == tmp_path / "shared/vitral"
    monkeypatch.setenv("VITRAL_CACHE", "/fast/cache")
    monkeypatch.setenv("VITRAL_DATA", "~/sets")
    assert caches.cache_dir() == Path("/fast/cache")
    assert caches.downloads_dir() == tmp_path / "sets"


@pytest.mark.usefixtures("_homeless")
def test_without_a_home_directory_the_temporary_one_is_used(temporary):
    place = temporary / f"vitral-{os.getuid()}"
    assert caches.cache_dir() == place
    assert caches.downloads_dir() == place / "data"
    assert place.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def open_place(monkeypatch, temporary):
    """A temporary directory that every user can reach, unlike those of pytest."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        place = Path(name)
        place.chmod(0o777)
        monkeypatch.setattr(tempfile, "tempdir", name)
        monkeypatch.setenv("HOME", str(place / "home"))
        yield place
        (place / "home").chmod(0o755)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("filled", [False, True])
def test_a_home_that_cannot_be_written_is_used_if_it_has_a_cache(open_place, filled):
    home = open_place / "home"
    home.mkdir()
    if filled:
        (home / ".cache/vitral").mkdir(parents=True)
    home.chmod(0o555)
    child = os.fork()
    if not child:
        code = 1
        try:
            if os.getuid() == 0:  # root can write everywhere
                os.setresuid(65534, 65534, 65534)
            elsewhere = open_place / f"vitral-{os.getuid()}"
            expected = home / ".cache/vitral" if filled else elsewhere
            code = 0 if caches.cache_dir() == expected else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.usefixtures("_homeless")
@pytest.mark.parametrize("what", ["file", "link to nothing", "link", "directory of others"])
def test_other_users_cannot_replace_the_temporary_cache(temporary, what):
    place = temporary / f"vitral-{os.getuid()}"
    (temporary / "other").mkdir()
    if what == "file":
        place.touch()
    elif what == "directory of others":
        place.mkdir()
        place.chmod(0o777)
    else:
        place.symlink_to("gone" if what == "link to nothing" else "other")
    found = caches.cache_dir()
    assert found.parent == temporary
    assert found.name not in (place.name, "other")
    assert found.stat().st_mode & 0o777 == 0o700
    assert caches.cache_dir() == found


@pytest.mark.usefixtures("_homeless")
def test_tar_shards_are_read_without_a_home_directory(temporary, image_folder, tmp_path):
    root = tmp_path / "shards"
    root.mkdir()
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as archive:
            for label, name in enumerate(("dark", "light")):
                for path in sorted((image_folder / split / name).iterdir()):
                    archive.add(path, f"{name}{path.stem}.jpg")
                    (tmp_path / "label").write_text(f"{name}{label}")
                    archive.add(tmp_path / "label", f"{name}{path.stem}.cls")
    dataset = open_dataset(DataConfig(path=str(root)), 16, 0)
    assert len(dataset.train) == 40
    assert [*temporary.rglob("index/*.npz")]


@pytest.mark.parametrize("home", ["/dev/null/none", None])
def test_matplotlib_does_not_warn_without_a_home_directory(home):
    environment = {name: os.environ[name] for name in os.environ if name not in (*NAMES, "HOME")}
    program = "import pwd; pwd.getpwuid = {}.__getitem__; import vitral.report.curves"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | ({"HOME": home} if home else {}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == done.stdout == ""
