"""Identifies and reports the files of a dataset that are skipped."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping

from vitral.data.decode import HEIC
from vitral.errors import counted, first_few, printable

SYSTEM_FILES = frozenset(
    name.lower()
    for name in (
        *("__MACOSX", "Network Trash Folder", "Temporary Items"),  # macOS
        *("$RECYCLE.BIN", "System Volume Information", "found.000"),  # Windows
        *("Thumbs.db", "ehthumbs.db", "desktop.ini"),
        *("lost+found", "~snapshot"),  # ext4, NetApp
        *("@eaDir", "#recycle", "#snapshot", "@tmp", "@sharebin"),  # Synology
        *("@Recycle", "@Recently-Snapshot", "@Transcode"),  # QNAP
    )
)
"""Files and folders, in lower case, that operating systems and file servers add to folders.

They are skipped in folders and archives, regardless of case. So is every name that begins with a
dot, such as .git and .DS_Store.
"""

OUTSIDE_CLASSES = "images outside class folders"
INSTALL_HINT = "run `pip install 'vitral[heic]'` to read {}"


def is_system(name: str) -> bool:
    """Returns whether a file or folder of this name is skipped, with everything in it."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def system_part(path: str) -> str | None:
    """Returns the first component of an archive path that is skipped, or None."""
    return next(filter(is_system, path.split("/")), None)


def file_kind(name: str) -> str:
    """Returns the kind of a file that is not an image: its suffix."""
    return os.path.splitext(name)[1].lower() or "no suffix"  # noqa: PTH122


def count_files(entry: os.DirEntry[str]) -> int:
    """Returns 1 for a file, or the number of files in a folder; links are not followed."""
    if not entry.is_dir(follow_symlinks=False):
        return 1
    return sum(len(files) for *_, files in os.walk(entry.path))


def kinds(skipped: Mapping[str, int]) -> str:
    """Lists skipped files by kind, most frequent first, with an installation hint for HEIC."""
    counts = sorted(Counter(skipped).items(), key=lambda item: (-item[1], item[0]))
    text = first_few([f"{printable(kind)} {n:,}" for kind, n in counts if n])
    heic = [kind for kind in HEIC if skipped.get(kind)]  # images if the library is installed
    return f"{text}; {INSTALL_HINT.format(', '.join(heic))}" if heic else text


def note(name: str, skipped: Mapping[str, int]) -> tuple[str, ...]:
    """Returns a line about the unused files of a dataset, if there are any."""
    total = sum(skipped.values())
    if not total:
        return ()
    verb = "is" if total == 1 else "are"
    return (f"{name}: {counted(total, 'file')} {verb} skipped: {kinds(skipped)}",)
