"""Files that are opened: regular ones, of bounded size."""

import os
import socket
from pathlib import Path

import pytest

from vitral.files import open_regular, read_regular


@pytest.fixture
def special(tmp_path):
    """A path of each kind that is no regular file."""
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
    again = os.dup(0)  # the same number, as nothing was left open
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
