"""Paths, and files that anyone may have put there: only regular ones, up to a limit."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MAX_IMAGE = 1 << 30  # bytes; 64 million pixels of 16-bit RGBA are half of it


def expand(path: str | Path) -> Path:
    """A path with the home directory in the place of ~, or as it is where there is none."""
    return Path(os.path.expanduser(path))  # noqa: PTH111, which raises without one


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, open for reading.

    A FIFO or a device is refused and never waited for. Links are followed.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        require_regular(os.fstat(descriptor), path)
    except OSError:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")  # noqa: PTH123


def read_regular(path: str | os.PathLike[str], limit: int = MAX_IMAGE) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: it cannot be read, is not a regular file, or has more than `limit` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # Some files of /proc are larger than they say.
        content = b"" if size > limit else file.read(size + 1)
    if max(size, len(content)) > limit or len(content) > size:
        raise OSError(errno.EFBIG, f"more than {min(size, limit):,} bytes", os.fspath(path))
    return content


def require_regular(status: os.stat_result, path: str | os.PathLike[str]) -> os.stat_result:
    """The status of a regular file. Raises OSError for another."""
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return status


def is_exhausted(error: Exception) -> bool:
    """Whether a limit of the process or the machine is reached, which is no fault of a file."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
