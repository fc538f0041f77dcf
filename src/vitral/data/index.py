"""What lies where in archives: found once, then kept in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vitral.caches import cache_dir
from vitral.data.records import Names, Spans, stamp
from vitral.data.sampling import Integers

SCHEMA = 2  # to be raised with any change of what is stored, or of how it is found
COLUMNS = ("archive", "offsets", "sizes", "names")
KEYS = ("values", "wnids", "skipped")
Row = tuple[bytes, bytes, int, int, int]
"""An image: what labels it, its name, position of its archive, first byte, bytes."""


@dataclass(frozen=True, eq=False)
class ArchiveIndex:
    """Images in archives, in order of (what labels them, name)."""

    values: Names
    """What labels the images, each value once, sorted. Shape (L,)."""
    wnids: Names
    """The WordNet id that all images of a value are named after; else empty. Shape (L,)."""
    spans: Spans
    """The images; their labels are positions in `values`."""
    skipped: Mapping[str, int]
    """Number of files in the archives that are not used, by kind."""

    def relabeled(self, labels: Integers) -> Spans:
        """The images under these labels, shape (N,), in order of (label, name)."""
        order = np.argsort(labels, kind="stable")
        columns = {name: getattr(self.spans, name)[order] for name in COLUMNS}
        return replace(self.spans, labels=labels[order], **columns)


Reader = Callable[[Sequence[Path]], tuple[list[Row], dict[bytes, bytes], Counter[str]]]
"""Reads archives: an image a row, wnids by value, and the kinds of files that are not used."""


def index_archives(archives: Sequence[Path], read: Reader) -> ArchiveIndex:
    """The images in `archives` as `read` finds them, or found them before.

    Any number of processes may do so at once. A cache that is damaged or cannot be written costs
    time alone.

    Raises:
        UserError: by `read`.
        OSError: an archive cannot be read.
    """
    archives = tuple(path.absolute() for path in archives)
    stamps = tuple(stamp(path) for path in archives)
    key = repr((SCHEMA, read.__name__, [*map(os.fsencode, archives)], stamps))
    place = cache_dir() / "index" / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"
    columns = _load(place)
    if columns is None:
        columns = _arrange(*read(archives))
        # Without the cache the next run only starts later.
        with contextlib.suppress(OSError):
            _save(place, columns)
    values, wnids, skipped = (columns.pop(name) for name in KEYS)
    return ArchiveIndex(
        values, wnids, Spans(archives, stamps, **columns), json.loads(skipped.item())
    )


def _arrange(
    rows: list[Row], wnids: dict[bytes, bytes], skipped: Counter[str]
) -> dict[str, np.ndarray]:
    rows.sort()
    value, names, *numbers = zip(*rows, strict=True)
    values, labels = np.unique(np.array(value), return_inverse=True)
    columns = dict(zip(COLUMNS, [*map(np.array, numbers), np.array(names)], strict=True))
    named = np.array([wnids.get(each, b"") for each in values.tolist()])
    facts = (values, named, np.array(json.dumps(skipped).encode()))
    return {**dict(zip(KEYS, facts, strict=True)), "labels": labels, **columns}


def _load(place: Path) -> dict[str, np.ndarray] | None:
    try:
        with place.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in (*KEYS, "labels", *COLUMNS)}
    except Exception:
        # Nearly anything is raised for a damaged zip, whose checksums tell; it is written again.
        return None


def _save(place: Path, columns: dict[str, np.ndarray]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
        temporary = Path(file.name)
        try:
            np.savez(file, allow_pickle=False, **columns)
        except BaseException:
            temporary.unlink()
            raise
    temporary.replace(place)
