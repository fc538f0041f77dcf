"""User errors, formatting of messages, safe printing of names, and output that may be lost."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

FIXES = {
    errno.ENOSPC: "free some space and repeat the command",
    errno.EDQUOT: "free some space and repeat the command",
    errno.EIO: "check the disk and repeat the command",
    errno.EFBIG: "raise the limit on the size of files, for example with `ulimit -f unlimited`",
    errno.EMFILE: "raise the limit on open files, for example with `ulimit -n 4096`",
    errno.ENFILE: "close other programs, which have too many open files",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.EROFS: "use a different directory",
}
"""How to fix system errors."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Disk errors, which are not user errors."""


class UserError(Exception):
    """An error that the user can fix.

    The message is one line: the location, the expected and the actual value, and how to fix it.
    """

    shared = False
    """Whether every process of a training run raises the error; then only rank 0 prints it."""


class Messages:
    """A stream for messages that discards them without an error if it cannot be written.

    The underlying stream may be None or closed, or its reader or terminal may no longer
    exist. After a failure, its descriptor refers to the null device, because the interpreter
    flushes it again at exit.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        """Writes text, or discards it."""
        self._attempt("write", text)

    def flush(self) -> None:
        """Flushes the buffer, or discards it."""
        self._attempt("flush")

    def _attempt(self, name: str, *arguments: str) -> None:
        if self.stream is None:
            return
        try:
            getattr(self.stream, name)(*arguments)
        except UnicodeEncodeError:
            ascii_only = (text.encode("ascii", "backslashreplace") for text in arguments)
            self._attempt(name, *(text.decode() for text in ascii_only))
        except (OSError, ValueError):  # ValueError: a closed stream
            with contextlib.suppress(AttributeError, OSError, ValueError):  # no descriptor
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())
                os.close(null)


# Control characters, line separators, marks that change the direction of text, and lone surrogates,
# which represent bytes that are not UTF-8.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
BYTES = 0xDC00  # Python decodes a byte that is not UTF-8 to this code point plus the byte


def printable(name: str | bytes | os.PathLike[str]) -> str:
    """Returns a name or message as one line, with characters that affect a terminal escaped."""

    def escape(found: re.Match[str]) -> str:
        code = ord(found[0])
        return f"\\x{code - BYTES:02x}" if 0x80 <= code - BYTES <= 0xFF else repr(found[0])[1:-1]

    return UNPRINTABLE.sub(escape, os.fsdecode(name))


def short(value: Any) -> str:
    """Returns the repr of a value, truncated to fit in a message."""
    return SHORT.repr(value)


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80
SHORT.maxlevel = 2


def reason_of(error: Exception) -> str:
    """Returns the message of an error, without the error number and the file name."""
    return getattr(error, "strerror", None) or str(error)


def system_error(error: OSError) -> str | None:
    """Describes a system error in one line: the file, the reason, and the fix if known.

    Returns None for an error that has no file name and no known fix.
    """
    fix = FIXES.get(error.errno or 0)
    if not error.filename and error.errno == errno.ENOENT:  # raised by tempfile on a full disk
        fix = "free some space, or set TMPDIR to a directory with free space"
    if not error.filename and not fix:
        return None
    place = f"{printable(error.filename)}: " if error.filename else ""
    return f"{place}{reason_of(error)}" + (f"; {fix}" if fix else "")


def data_error(place: os.PathLike[str] | str, expected: str, found: str, fix: str) -> UserError:
    """Returns the error for a dataset that cannot be used."""
    return UserError(printable(f"data: {place}: expected {expected}, got {found}; {fix}"))


def unreadable(place: os.PathLike[str] | str, error: OSError) -> UserError:
    """Returns the error for a dataset with a file or directory that cannot be read."""
    fix = how_to_fix(error, "fix or remove it")
    return data_error(error.filename or place, "to read it", str(error.strerror), fix)


def how_to_fix(error: OSError, otherwise: str) -> str:
    """Returns the fix for a system error, or `otherwise` if none is known."""
    return FIXES.get(error.errno or 0, otherwise)


def first_few(names: Sequence[str]) -> str:
    """Returns the first three names and the number of further ones."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "") or "none"


def counted(n: int, noun: str) -> str:
    """Formats a number with a noun, such as `1 image` or `1,234 classes`."""
    plural = f"{noun}es" if noun.endswith(("s", "x", "tch", "sh")) else f"{noun}s"
    return f"{n:,} {noun if n == 1 else plural}"


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Returns a suffix for an error message that suggests the closest of `words`, if any is close.

    The last part of a dotted name, such as `lr` in `optim.lr`, and a prefix of a name count as
    close to it.
    """
    words = list(words)
    bare = word.lstrip("-").rpartition(".")[2]
    inside = [other for other in words if other.rpartition(".")[2] == bare]
    inside += [other for other in words if len(bare) > 2 and other.startswith(word)]
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.7)
    best = [*inside, *close]
    return f"; did you mean {best[0]}?" if best else ""
