"""Wording of errors, which take one line for any name."""

import errno
import io
import os
import pty
import sys
from pathlib import Path

import pytest

from vitral.errors import (
    Messages,
    UserError,
    counted,
    data_error,
    did_you_mean,
    first_few,
    printable,
    system_error,
)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a photo.jpg", "a photo.jpg"),
        ("café", "café"),
        (b"caf\xe9", "caf\\xe9"),
        (os.fsdecode(b"caf\xe9"), "caf\\xe9"),
        ("two\nlines\r\t", "two\\nlines\\r\\t"),
        ("\x1b[31mred\x7f", "\\x1b[31mred\\x7f"),
        (Path("a/b\n"), "a/b\\n"),
        ("\x9b1m\x85\u2028\u202e\ud800", "\\x9b1m\\x85\\u2028\\u202e\\ud800"),
        ("\N{WOMAN}\u200d\N{ROCKET} \u00a0", "\N{WOMAN}\u200d\N{ROCKET} \u00a0"),
    ],
)
def test_names_are_printed_on_one_line(name, shown):
    assert printable(name) == shown
    shown.encode("utf-8")


def test_a_data_error_names_the_place_the_problem_and_the_fix():
    error = data_error(Path("set"), "two\nclasses", "one", "add another")
    assert isinstance(error, UserError)
    assert str(error) == "data: set: expected two\\nclasses, got one; add another"
    assert not error.shared


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], "none"),
        (["a"], "a"),
        (["a", "b", "c"], "a, b, c"),
        (["a", "b", "c", "d", "e"], "a, b, c and 2 more"),
    ],
)
def test_first_few_names_and_the_number_of_others(names, text):
    assert first_few(names) == text


OPTIONS = ["--optim.lr", "--train.epochs", "--data.workers", "--which", "--image-size"]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--lr", "--optim.lr"),
        ("epochs", "--train.epochs"),
        ("--train.epoch", "--train.epochs"),
        ("--data.worker", "--data.workers"),
        ("--wich", "--which"),
        ("--image", "--image-size"),
        ("--i", None),  # a prefix that is too short
        ("--size", None),
        ("--momentum", None),
    ],
)
def test_only_a_close_name_is_suggested(word, meant):
    assert did_you_mean(word, OPTIONS) == (f"; did you mean {meant}?" if meant else "")


def test_the_last_part_of_a_name_comes_before_a_similar_name():
    assert did_you_mean("path", ["paths", "data.path"]) == "; did you mean data.path?"


def closed_terminal():
    """A stream to a closed terminal."""
    own, other = pty.openpty()
    os.close(own)
    return os.fdopen(other, "w")


def unread():
    """A stream to a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def full():
    """A stream to a full disk."""
    return os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")


@pytest.mark.parametrize("stream", [unread, closed_terminal, full, Path(os.devnull).open])
def test_messages_are_discarded_without_an_error(stream):
    with stream() as real:
        print("first\nsecond", file=Messages(real), flush=True)
        print("third", file=Messages(real), flush=True)
    print("fourth", file=Messages(real), flush=True)  # closed
    print("fifth", file=Messages(None), flush=True)


def test_unencodable_characters_are_escaped_and_the_stream_stays_usable():
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, "ascii")
    for text in ("a\u00e9\n", "b\udcff\n", "c\n"):
        Messages(stream).write(text)
    stream.flush()
    assert written.getvalue() == b"a\\xe9\nb\\udcff\nc\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EFBIG, "File too large", "a\nb"), "a\\nb: File too large; raise the limit"),
        (OSError(errno.EMFILE, "Too many open files", "a"), "a: Too many open files; raise the"),
        (OSError(errno.ENOSPC, "No space left"), "No space left; free some space"),
        (OSError(errno.EACCES, "Permission denied", "a"), "a: Permission denied"),
        (OSError(errno.ENOENT, "No usable temporary directory"), "No usable temporary directory; "),
    ],
)
def test_system_errors_state_file_reason_and_fix(error, line):
    assert system_error(error).startswith(line)


def test_other_system_errors_keep_their_traceback():
    assert system_error(OSError(errno.EINVAL, "Invalid argument")) is None
    assert system_error(OSError("of a library")) is None


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (1, "class", "1 class"),
        (2, "class", "2 classes"),
        (0, "image", "0 images"),
        (1200, "batch", "1,200 batches"),
        (2, "epoch", "2 epochs"),
    ],
)
def test_nouns_agree_with_the_number(count, noun, text):
    assert counted(count, noun) == text


def test_messages_are_written_to_a_working_stream(capsys):
    print("one", file=Messages(sys.stderr))
    assert capsys.readouterr() == ("", "one\n")
