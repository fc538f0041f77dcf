"""Paths, and files that anyone may have put there: only regular ones, up to a limit.

Also checks that files can be written, before a result could be lost.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from vitral.errors import UserError, how_to_fix, printable, system_error

MAX_PATH = 4095  # bytes, in Linux
MAX_INSIDE = 255  # bytes of a path inside a run directory or a pack
MAX_IMAGE = 1 << 30  # bytes; 64 million pixels of 16-bit RGBA are half of it


def expand(path: str | Path) -> Path:
    """A path with the home directory in the place of ~, or as it is where there is none."""
    return Path(os.path.expanduser(path))  # noqa: PTH111, which raises without one


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, open for reading.

    A FIFO or a device is refused and never waited for. Links are followed.

    Raises:
        OSError, UserError: as `descriptor_of`.
    """
    return open(descriptor_of(path), "rb")


def descriptor_of(path: str | os.PathLike[str]) -> int:
    """The descriptor of a regular file, open for reading.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
        UserError: too many files are open, or memory is exhausted, which is no fault of the file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise UserError(system_error(error)) from None
        raise
    try:
        require_regular(os.fstat(descriptor), path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


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


def check_writable(directory: str | Path) -> None:
    """Creates a directory for output. Raises UserError if it cannot be written."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):  # os.access does not know all that file systems permit
            pass
    except OSError as error:
        fix = how_to_fix(error, "give another directory")
        raise UserError(
            f"out: cannot write {printable(directory)}: {error.strerror}; {fix}"
        ) from None


def check_output(path: Path) -> None:
    """Creates the directory of a file to write. Raises UserError if the file cannot be written."""
    check_writable(path.parent)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"out: expected a file to write, got {path}, which is not a file")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"out: {system_error(error)}") from None


def check_room(directory: Path) -> None:
    """Raises UserError if a directory leaves no room for the names of the files to write in it."""
    length, most = len(os.fsencode(directory.absolute())), MAX_PATH - MAX_INSIDE
    if length > most:
        raise UserError(
            f"out: expected a path of at most {most:,} bytes, got one of {length:,}, "
            f"{printable(directory)[:40]}...; give a shorter one"
        )
