"""Builds indexes of archives and stores them in the user's cache directory."""

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

SCHEMA = 3  # increase whenever the stored columns or their computation change
COLUMNS = ("archive", "offsets", "sizes", "names")
KEYS = ("values", "wnids", "skipped")
Row = tuple[bytes, bytes, int, int, int]
"""An image: label value, name, index of its archive, first byte, size in bytes."""


@dataclass(frozen=True, eq=False)
class ArchiveIndex:
    """Images in archives, sorted by (label value, name)."""

    values: Names
    """Label values of the images, each value once, sorted. Shape (L,)."""
    wnids: Names
    """WordNet ID in the names of all images with a value, or empty. Shape (L,)."""
    spans: Spans
    """The images; their labels are indices into `values`."""
    skipped: Mapping[str, int]
    """Number of unused files in the archives, by kind."""

    def relabeled(self, labels: Integers) -> Spans:
        """Returns the images with these labels, shape (N,), sorted by (label, name)."""
        order = np.argsort(labels, kind="stable")
        columns = {name: getattr(self.spans, name)[order] for name in COLUMNS}
        return replace(self.spans, labels=labels[order], **columns)


Reader = Callable[[Sequence[Path]], tuple[list[Row], dict[bytes, bytes], Counter[str]]]
"""Reads archives; returns one row per image, wnids by value, and unused files by kind."""


def index_archives(archives: Sequence[Path], read: Reader) -> ArchiveIndex:
    """Returns the images in `archives` from the cache or, if they are not there, from `read`.

    Several processes may call this at the same time. If the cache is damaged or cannot be written,
    this only takes longer.

    Raises:
        UserError: from `read`.
        OSError: if an archive cannot be read.
    """
    archives = tuple(path.absolute() for path in archives)
    stamps = tuple(stamp(path) for path in archives)
    key = repr((SCHEMA, read.__name__, [*map(os.fsencode, archives)], stamps))
    place = cache_dir() / "index" / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"
    columns = _load(place)
    if columns is None:
        columns = _arrange(*read(archives))
        # Without the cache, the next run only takes longer to start.
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
        # A damaged zip, which checksums detect, raises nearly any exception; it is rewritten.
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
