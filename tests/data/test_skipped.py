"""Unused files, and how they are reported."""

from pathlib import Path

import pytest

from vitral.data.skipped import SYSTEM_FILES, is_system, kinds, note, system_part

DOCS = Path(__file__).parents[2] / "docs/own-folder.md"


def test_every_system_file_is_documented():
    text = DOCS.read_text(encoding="utf-8").lower()
    assert [name for name in SYSTEM_FILES if f"`{name}`" not in text] == []


@pytest.mark.parametrize("name", ["cat", "recycle", "found", "desktop", "a.git", "tmp", "#1"])
def test_names_of_classes_are_not_skipped(name):
    assert not is_system(name)


def test_the_first_skipped_part_of_a_path_is_returned():
    assert system_part("a/@eaDir/b.jpg/#recycle") == "@eaDir"
    assert system_part("a/b.jpg") is None


def test_notes_about_skipped_files():
    assert note("set", {}) == note("set", {".txt": 0}) == ()
    assert note("set", {".txt": 1}) == ("set: 1 file is skipped: .txt 1",)
    assert kinds({".b": 1, ".a": 1, ".c": 2000, ".\x1b[2J": 1}) == (
        ".c 2,000, .\\x1b[2J 1, .a 1 and 1 more"
    )
