"""Iterates over the members of tar archives without extracting them."""

from __future__ import annotations

import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from tqdm import tqdm

from vitral.data.skipped import file_kind, system_part
from vitral.errors import Messages, data_error, first_few
from vitral.machine import in_notebook

T = TypeVar("T")
REDOWNLOAD = "download or pack it again"
MAX_NAME = 4096  # characters of a member's name, as for a path in Linux


def members(
    file: BinaryIO,
    place: str,
    suffixes: tuple[str, ...],
    start: int = 0,
    end: int | None = None,
    skipped: Counter[str] | None = None,
) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Yields the files with one of `suffixes` in a tar archive, as name and header.

    System files are skipped. `offset_data` of a header counts from the beginning of `file`. The
    caller may read from `file` between two members.

    Args:
        place: name of the archive in messages.
        start: first byte of the archive in `file`; `end` is the byte after its last one.
        skipped: counts the other files, by kind.

    Raises:
        UserError: if `file` is not a tar archive or is cut off, or if a member is not a regular
            file or has an unsafe name.
    """
    end = file.seek(0, 2) if end is None else end
    file.seek(start)
    last = ""
    try:
        tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
        while (member := tar.next()) is not None:
            if member.offset < end:
                last = _check_name(member.name, place)
            # Damaged sizes can be negative, and would lead back to an earlier member.
            if not 0 <= member.size <= end - member.offset_data:
                raise tarfile.ReadError
            # Otherwise the archive would keep all headers in memory, a kilobyte each.
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
            kind = system_part(last)
            if kind is None and last.lower().endswith(suffixes):
                if not member.isreg() or member.issparse():
                    got = "a folder, link, device or sparse file"
                    raise data_error(
                        f"{place}: {last}", "a regular file", got, "pack the file itself"
                    )
                yield last, member
            elif skipped is not None and member.isreg():
                skipped[kind or file_kind(last)] += 1
        file.seek(tar.offset)
        # If an archive ends too early between two members, only this block is missing.
        if tar.offset + tarfile.BLOCKSIZE > end or any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        if not last:
            got = "something else, or a damaged one"
            raise data_error(place, "an uncompressed tar archive", got, REDOWNLOAD) from error
        got = f"one that is cut off or damaged at {last} or after it"
        raise data_error(place, "a complete tar archive", got, REDOWNLOAD) from error


def _check_name(name: str, place: str) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        fix = "the archive may be malicious; pack it again if you trust it"
        raise data_error(place, "names that stay inside the archive", name, fix)
    if len(name) > MAX_NAME:
        got = f"{len(name):,}, {name[:40]}..."
        raise data_error(place, f"names of at most {MAX_NAME:,} characters", got, REDOWNLOAD)
    return name.removeprefix("./")


def check_unique(place: Path | str, names: Iterable[str]) -> None:
    """Raises UserError if a name occurs more than once."""
    duplicates = [name for name, count in Counter(names).items() if count > 1]
    if duplicates:
        raise data_error(
            place, "each name once", f"{first_few(duplicates)} more than once", REDOWNLOAD
        )


def progress(
    items: Iterable[T], what: str = "indexing", unit: str = "tar", total: int | None = None
) -> Iterator[T]:
    """Iterates over items and shows a progress bar after two seconds.

    The bar appears on stderr, in a terminal or a notebook.
    """
    hidden = False if in_notebook() else None
    bar = Messages(sys.stderr)
    yield from tqdm(items, what, total, False, bar, unit=unit, delay=2, disable=hidden)
