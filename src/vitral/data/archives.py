"""Walks tar archives without extracting them."""

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
MAX_NAME = 4096  # of a member, as of a path in Linux


def members(
    file: BinaryIO,
    place: str,
    suffixes: tuple[str, ...],
    start: int = 0,
    end: int | None = None,
    skipped: Counter[str] | None = None,
) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Name and header of each file with one of `suffixes` in a tar archive, but for system files.

    `offset_data` of a header counts from the beginning of `file`, which may be read in between.

    Args:
        place: what to call the archive in messages.
        start: first byte of the archive in `file`; `end` is the byte behind it.
        skipped: counts the other files, by kind.

    Raises:
        UserError: it is no tar archive, is cut off, or holds what is no plain file inside it.
    """
    end = file.seek(0, 2) if end is None else end
    file.seek(start)
    last = ""
    try:
        tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
        while (member := tar.next()) is not None:
            if member.offset < end:
                last = _check_name(member.name, place)
            # Damaged sizes can be negative, and would lead back to where the walk has been.
            if not 0 <= member.size <= end - member.offset_data:
                raise tarfile.ReadError
            # Else it keeps all of them, at a kilobyte each.
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
            kind = system_part(last)
            if kind is None and last.lower().endswith(suffixes):
                if not member.isreg() or member.issparse():
                    got = "a folder, link, device or sparse file"
                    raise data_error(
                        f"{place}: {last}", "a plain file", got, "pack the file itself"
                    )
                yield last, member
            elif skipped is not None and member.isreg():
                skipped[kind or file_kind(last)] += 1
        file.seek(tar.offset)
        # Where archives end too early between two members, only this block is missing.
        if tar.offset + tarfile.BLOCKSIZE > end or any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        if not last:
            got = "something else, or a damaged one"
            raise data_error(place, "a tar archive, uncompressed", got, REDOWNLOAD) from error
        got = f"one that is cut off or damaged at {last} or behind it"
        raise data_error(place, "a whole tar archive", got, REDOWNLOAD) from error


def _check_name(name: str, place: str) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        fix = "do not trust this archive, or pack it again"
        raise data_error(place, "names that stay inside the archive", name, fix)
    if len(name) > MAX_NAME:
        got = f"{len(name):,}, {name[:40]}..."
        raise data_error(place, f"names of at most {MAX_NAME:,} characters", got, REDOWNLOAD)
    return name.removeprefix("./")


def check_unique(place: Path | str, names: Iterable[str]) -> None:
    """Raises UserError if a name comes twice."""
    doubles = [name for name, count in Counter(names).items() if count > 1]
    if doubles:
        raise data_error(
            place, "each name once", f"{first_few(doubles)} more than once", REDOWNLOAD
        )


def progress(
    items: Iterable[T], what: str = "indexing", unit: str = "tar", total: int | None = None
) -> Iterator[T]:
    """Goes over parts, with a bar if that takes over two seconds.

    The bar is on stderr, of a terminal or a notebook.
    """
    hidden = False if in_notebook() else None
    bar = Messages(sys.stderr)
    yield from tqdm(items, what, total, False, bar, unit=unit, delay=2, disable=hidden)
