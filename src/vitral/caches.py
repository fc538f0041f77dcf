"""Locations of caches and downloads, including for users without a home directory."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """Returns the user's cache directory: VITRAL_CACHE, or `vitral` in XDG_CACHE_HOME or ~/.cache.

    Without a home directory, it is in the temporary directory.
    """
    own, shared = os.environ.get("VITRAL_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return _expanded(own or (shared and f"{shared}/vitral")) or _at_home("vitral")


def downloads_dir() -> Path:
    """Returns the directory for downloads of known datasets: VITRAL_DATA, or one in ~/.cache."""
    return _expanded(os.environ.get("VITRAL_DATA")) or _at_home("vitral") / "data"


def quiet_matplotlib() -> None:
    """Sets a cache directory for Matplotlib, which warns if the home directory is not writable."""
    named = {"MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"} & os.environ.keys()
    if not named and not _is_writable(Path(os.path.expanduser("~"))):  # noqa: PTH111
        os.environ["MPLCONFIGDIR"] = str(_temporary_cache() / "matplotlib")


def _expanded(path: str | None) -> Path | None:
    return Path(os.path.expanduser(path)) if path else None  # noqa: PTH111, which may raise


def _at_home(name: str) -> Path:
    """Returns a directory in ~/.cache if it exists or can be created, otherwise a temporary one."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111
    cache = home / ".cache"
    there = (cache / name).is_dir() or _is_writable(cache if cache.exists() else home)
    return cache / name if there and home.is_absolute() else _temporary_cache()


def _is_writable(directory: Path) -> bool:
    return directory.is_absolute() and directory.is_dir() and os.access(directory, os.W_OK)


@functools.cache
def _temporary_cache() -> Path:
    """Returns this user's directory in the temporary directory; no other user can write to it."""
    place = Path(tempfile.gettempdir(), f"vitral-{os.getuid()}")
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        status = place.lstat()
    except OSError:  # it is a file or a dangling link
        return Path(tempfile.mkdtemp(prefix="vitral-"))
    own = place.is_dir() and not place.is_symlink() and status.st_uid == os.getuid()
    return place if own and not status.st_mode & 0o022 else Path(tempfile.mkdtemp(prefix="vitral-"))
