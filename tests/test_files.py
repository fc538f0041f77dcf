"""Only regular files of bounded size are opened, and output paths are checked."""

import os
import resource
import socket
from pathlib import Path

import pytest

from vitral.errors import UserError
from vitral.files import check_output, open_regular, read_regular


@pytest.fixture
def special(tmp_path):
    """Paths of every kind that is not a regular file."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", ["fifo", "link", "device", "socket", "folder", "gone"])
@pytest.mark.parametrize("opening", [open_regular, read_regular])
def test_only_regular_files_are_opened(special, name, opening):
    free = os.dup(0)
    os.close(free)
    with pytest.raises(OSError):  # noqa: PT011
        opening(special / name)
    again = os.dup(0)  # the same number if nothing was left open
    os.close(again)
    assert again == free


def test_a_file_at_the_size_limit_is_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345678")
    assert read_regular(path, 8) == read_regular(str(path)) == b"12345678"
    (tmp_path / "link").symlink_to(path)
    assert read_regular(tmp_path / "link") == b"12345678"
    with pytest.raises(OSError, match="more than 7 bytes"):
        read_regular(path, 7)


def test_a_sparse_file_above_the_limit_is_not_read(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="more than 1,073,741,824 bytes"):
        read_regular(tmp_path / "file")


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")
def test_a_file_larger_than_its_reported_size_is_rejected():
    with pytest.raises(OSError, match="more than 0 bytes"):
        read_regular("/proc/self/status")


def test_too_many_open_files_is_a_user_error(tmp_path):
    (tmp_path / "a").write_text("a")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(UserError, match=r"a: Too many open files; .* `ulimit -n"):
            open_regular(tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert read_regular(tmp_path / "a") == b"a"


def test_output_paths_are_checked(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    for name in ("file", "new", "deep/er/new", "n" * 255):
        check_output(tmp_path / name)
    assert (tmp_path / "file").read_text() == "old"
    assert not (tmp_path / "new").exists()
    assert [*(tmp_path / "deep" / "er").iterdir()] == []
    for name, reason in (("folder", "not a file"), ("n" * 256, "too long"), ("file/a", "cannot")):
        with pytest.raises(UserError, match=f"out: .*{reason}"):
            check_output(tmp_path / name)
