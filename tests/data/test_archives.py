"""Iterating over tar archives, and rejecting damaged ones."""

import gzip
import io
import tarfile

import pytest

from vitral.data.archives import check_unique, members
from vitral.errors import UserError

from .archive_files import (
    TRAIN,
    endless,
    error_message,
    header,
    shard,
    tarred,
    two,
)

pytestmark = pytest.mark.usefixtures("cache")

SHARD = shard(TRAIN.items())
FIRST_END = 512 * (2 + 1 + 1 + 1) + -(-len(TRAIN["n01440764/n01440764_6.JPEG"]) // 512) * 512


def sparse():
    found = header("a.jpg", tarfile.GNUTYPE_SPARSE)
    return tarred([(found, b""), ("a.cls", b"1")])


def looping():
    """An archive with a size that leads back to its own header."""
    found = tarfile.TarInfo("a.jpg")
    found.size = -512
    return endless(tarred([("b.jpg", b"?")])) + found.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an uncompressed tar archive"),
        (looping(), "cut off or damaged at a.jpg"),
        (b"not a tar archive at all, " * 99, "an uncompressed tar archive"),
        (gzip.compress(SHARD), "an uncompressed tar archive"),
        (SHARD[: len(SHARD) // 3], "cut off or damaged at n"),
        (SHARD[:FIRST_END], "cut off or damaged at n01440764_6.cls"),
        (SHARD[: FIRST_END + 100], "cut off or damaged at n01440764_6.cls"),
        (endless(SHARD), "cut off or damaged at n07753592_11.cls"),
        (SHARD[:FIRST_END] + b"?" * 512 + SHARD[FIRST_END + 512 :], "cut off or damaged"),
        (two(("../c.jpg", b"?")), "inside the archive, got ../c.jpg"),
        (two(("c/../../c.txt", b"?")), "inside the archive, got c/../../c.txt"),
        (two(("/etc/c.jpg", b"?")), "inside the archive, got /etc/c.jpg"),
        (two((header("c.jpg", tarfile.SYMTYPE), b"")), "c.jpg: expected a regular file"),
        (two((header("c.jpg", tarfile.LNKTYPE), b"")), "c.jpg: expected a regular file"),
        (two((header("c.cls", tarfile.CHRTYPE), b"")), "c.cls: expected a regular file"),
        (sparse(), "a.jpg: expected a regular file"),
        (two(("d/" * 3000 + "c.jpg", b"?")), "names of at most 4,096 characters, got 6,005"),
    ],
)
def test_a_damaged_or_unsafe_archive_is_rejected(tmp_path, content, words, cache):
    (tmp_path / "train-0.tar").write_bytes(content)
    assert words in error_message(tmp_path)
    assert not cache.exists()


def listed(content, suffixes=(".jpg", ".cls"), **part):
    """Names and contents of the members of an archive, read during the iteration."""
    found, file = [], io.BytesIO(content)
    for name, member in members(file, "place", suffixes, **part):
        file.seek(member.offset_data)
        found.append((name, file.read(member.size)))
    return found


def test_members_are_those_with_a_suffix_that_are_not_hidden():
    files = [("./a.JPG", b"one"), ("b/c.jpg", b"two"), ("b/c.txt", b"?"), ("d.cls", b"")]
    hidden = [
        (".e.jpg", b"?"),
        ("._f.jpg", b"?"),
        (".g/h.jpg", b"?"),
        ("b/.i.jpg", b"?"),
        ("__MACOSX/j.jpg", b"?"),
    ]
    content = tarred([*hidden, *files, (header("k.txt", tarfile.SYMTYPE), b"")])
    assert listed(content) == [("a.JPG", b"one"), ("b/c.jpg", b"two"), ("d.cls", b"")]


def test_an_archive_may_be_part_of_a_file():
    inner = tarred([("a.jpg", b"one"), ("b.jpg", b"two")])
    outer = tarred([("0.tar", b"?" * 700), ("1.tar", inner), ("2.tar", b"?" * 700)])
    with tarfile.open(fileobj=io.BytesIO(outer)) as tar:
        place = tar.getmember("1.tar")
    part = {"start": place.offset_data, "end": place.offset_data + place.size}
    assert listed(outer, **part) == [("a.jpg", b"one"), ("b.jpg", b"two")]
    with pytest.raises(UserError, match=r"cut off or damaged at b.jpg"):
        listed(outer, start=part["start"], end=part["start"] + 512 * 4)


def test_duplicate_names_are_rejected():
    check_unique("place", ["a", "b", "c"])
    with pytest.raises(UserError, match="place: expected each name once, got b, a more than once"):
        check_unique("place", ["b", "a", "a", "b", "c"])
