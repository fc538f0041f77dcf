"""Paths, and safe reading of untrusted files: only regular files, up to a size limit.

Also checks that output can be written, before any result could be lost.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from vitral.errors import UserError, how_to_fix, printable, system_error

MAX_PATH = 4095  # bytes, on Linux
MAX_INSIDE = 255  # bytes of a path inside a run directory or a pack
MAX_IMAGE = 1 << 30  # bytes; 64 million pixels of 16-bit RGBA are half of this


def expand(path: str | Path) -> Path:
    """Replaces ~ in a path with the home directory, if there is one."""
    return Path(os.path.expanduser(path))  # noqa: PTH111, which raises without one


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file for reading.

    FIFOs and devices are rejected without blocking. Links are followed.

    Raises:
        OSError, UserError: as for `descriptor_of`.
    """
    return open(descriptor_of(path), "rb")


def descriptor_of(path: str | os.PathLike[str]) -> int:
    """Opens a regular file for reading and returns its descriptor.

    Raises:
        OSError: if it cannot be opened or is not a regular file.
        UserError: if too many files are open or memory is exhausted, which the file does not cause.
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
    """Returns the content of a regular file.

    Raises:
        OSError: if it cannot be read, is not a regular file, or has more than `limit` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # Some files in /proc are larger than their reported size.
        content = b"" if size > limit else file.read(size + 1)
    if max(size, len(content)) > limit or len(content) > size:
        raise OSError(errno.EFBIG, f"more than {min(size, limit):,} bytes", os.fspath(path))
    return content


def require_regular(status: os.stat_result, path: str | os.PathLike[str]) -> os.stat_result:
    """Returns `status` if it describes a regular file; otherwise raises OSError."""
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return status


def check_writable(directory: str | Path) -> None:
    """Creates a directory for output. Raises UserError if it cannot be written."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):  # os.access misses some restrictions of file systems
            pass
    except OSError as error:
        fix = how_to_fix(error, "use a different directory")
        raise UserError(
            f"out: cannot write {printable(directory)}: {error.strerror}; {fix}"
        ) from None


def check_output(path: Path) -> None:
    """Creates the directory for an output file. Raises UserError if it cannot be written."""
    check_writable(path.parent)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"out: expected a file to write, got {path}, which is not a file")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"out: {system_error(error)}") from None


def check_room(directory: Path) -> None:
    """Raises UserError if the path of a directory is too long for the files to write in it."""
    length, most = len(os.fsencode(directory.absolute())), MAX_PATH - MAX_INSIDE
    if length > most:
        raise UserError(
            f"out: expected a path of at most {most:,} bytes, got one of {length:,}, "
            f"{printable(directory)[:40]}...; use a shorter one"
        )
