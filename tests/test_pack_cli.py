"""`vitral data pack`: output and exit codes."""

import errno
import re
import shutil
import subprocess

import pytest

from vitral.cli import main
from vitral.data.formats.packed import verify
from vitral.data.tools import packing

KINDS = pytest.mark.parametrize("form", [(), ("--jpeg",)], ids=["pixels", "jpegs"])


def pack(*words):
    return main(["data", "pack", *map(str, words), "--workers", "0"])


@KINDS
def test_output_of_packing(image_folder, tmp_path, capsys, form):
    dst = tmp_path / "pack"
    assert pack(image_folder, dst, "--size", "20", *form) == 0
    before, after = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{dst}: 52 images take about 0\.000 GB; the disk has .* GB free", before)
    assert after == f"{dst}: 52 images, packed and read back"
    assert pack(image_folder, dst, "--size", "20", *form) == 0
    assert capsys.readouterr().out == f"{dst}: 52 images, already packed\n"
    assert main(["data", "check", str(dst)]) == 0


def test_held_out_images_are_reported(image_folder, tmp_path, capsys):
    assert pack(image_folder / "train", tmp_path / "pack") == 0
    assert "4 of 40 training images (10% of each class) are held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "expected SRC, DST"),
        ("SRC", "expected DST"),
        ("SRC DST --size 0", "size: expected 1 or more, got 0"),
        ("SRC DST --sise 3", "--sise: unknown option; did you mean --size"),
        ("SRC SRC", "an empty folder, or none, got something else"),
        ("SRC FILE/pack", "expected a writable folder, got Not a directory"),
        ("/no/such DST", "/no/such"),
    ],
)
def test_user_errors_are_one_line(image_folder, tmp_path, capsys, words, message):
    places = {"SRC": str(image_folder), "DST": str(tmp_path / "pack")}
    (tmp_path / "file").touch()
    words = words.replace("FILE", str(tmp_path / "file")).split()
    assert pack(*(places.get(word, word) for word in words)) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"vitral: .+\n", error)
    assert message in error
    assert not (tmp_path / "pack").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 48 kB, and a function that enlarges it."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)]
        return subprocess.run(command, capture_output=True).returncode == 0

    if shutil.which("mount") is None or not mount("size=48k"):
        pytest.skip("may not mount a disk")
    yield place, lambda: mount("remount", "size=4m")
    subprocess.run(["umount", str(place)], check=True)


@KINDS
def test_a_full_disk_while_packing(image_folder, small_disk, capsys, monkeypatch, form):
    place, enlarge = small_disk
    monkeypatch.setattr(packing, "CHUNK", 4)
    usage = shutil.disk_usage("/")  # as it was before something else filled the disk
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    words = (image_folder, place / "pack", "--size", "40", *form)
    if form:
        (place / "other").write_bytes(bytes(30_000))
    assert pack(*words) == 1
    error = "No space left on device; free some space and repeat the command"
    assert re.fullmatch(rf"vitral: {place}/pack/\S+: {error}\n", capsys.readouterr().err)
    assert not (place / "pack/index").exists()
    assert enlarge()
    assert pack(*words) == 0
    assert verify(place / "pack") == []


def test_other_disk_errors_are_one_line(image_folder, tmp_path, monkeypatch, capsys):
    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(packing.os, "fsync", fail)
    assert pack(image_folder, tmp_path / "pack") == 1
    assert capsys.readouterr().err == (
        f"vitral: {tmp_path}/pack/progress.jsonl: Input/output error; "
        "check the disk and repeat the command\n"
    )
