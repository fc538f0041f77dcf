"""Damaged and hostile data: any bytes lead to a result or to an error of one line."""

import io
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vitral import settings
from vitral.config import Config, DataConfig
from vitral.data.decode import DecodeError, decode
from vitral.data.formats import open_dataset
from vitral.errors import UserError

pytestmark = pytest.mark.slow
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


def encoded(kind, seed=0, **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, kind, **options)
    return target.getvalue()


def mutations(content, count):
    """Yields copies with some bytes changed, removed, repeated or moved."""
    draw = np.random.default_rng(0)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(draw.integers(1, 8)):
            at = int(draw.integers(0, len(changed)))
            changed[at] = int(draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.integers(0, 256)]))
        a, b = sorted(draw.integers(0, len(changed), 2).tolist())
        yield bytes(
            [
                changed,
                changed[:b],
                changed[:a] + changed[b:],
                changed[:b] + changed[a:],
            ][draw.integers(0, 4)]
        )


@pytest.mark.parametrize(
    ("kind", "progressive"), [*((kind, False) for kind in KINDS), ("JPEG", True)]
)
def test_mutated_images_decode_or_are_rejected(kind, progressive):
    """In limited memory, which a decompression bomb would exceed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), hard))
    try:
        original = encoded(kind, progressive=progressive)
        messages = [error_message(decode, DecodeError, copy) for copy in mutations(original, 500)]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert any(messages)
    assert not all(messages)


def error_message(call, kinds, *arguments):
    """Returns the message of an error of these types, which is one line; None without an error."""
    try:
        call(*arguments)
    except kinds as error:
        message = str(error)
    else:
        return None
    assert len(message.splitlines()) == 1
    return message


def read_all(root):
    dataset = open_dataset(DataConfig(path=str(root)), 16, 0, train=False)
    assert all(isinstance(name, str) for name in dataset.classes)
    for i in range(len(dataset.val)):
        error_message(dataset.val.read, (DecodeError, OSError), i)


def tar():
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        for i in range(6):
            label = json.dumps({"label": f"class {i % 2}"}).encode()
            for name, content in ((f"{i}.png", encoded("PNG", i)), (f"{i}.json", label)):
                header = tarfile.TarInfo(name)
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
    return target.getvalue()


def parquet():
    images = [{"bytes": encoded("PNG", i), "path": f"{i}.png"} for i in range(6)]
    described = {"info": {"features": {"label": {"names": ["cat", "dog"]}}}}
    table = pa.table({"image": images, "label": [i % 2 for i in range(6)]})
    target = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(described)}), target)
    return target.getvalue()


@pytest.mark.parametrize(("name", "make"), [("val.tar", tar), ("val.parquet", parquet)])
def test_mutated_tables_open_or_are_rejected(tmp_path, monkeypatch, name, make):
    monkeypatch.setenv("VITRAL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    messages = []
    for content in mutations(make(), 400):
        (tmp_path / "set" / name).write_bytes(content)
        messages.append(error_message(read_all, UserError, tmp_path / "set"))
    assert any(messages)
    assert not all(messages)


def test_mutated_settings_load_or_are_rejected(tmp_path):
    path, messages = tmp_path / "own.yaml", []
    original = settings.dump(Config()).encode()
    for content in (original, *mutations(original, 400)):
        path.write_bytes(content)
        messages.append(error_message(settings.load, UserError, str(path)))
    assert messages[0] is None
    assert any(messages)


WORK = """
import torch
from vitral.data.workers import in_workers

class Tensors(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return torch.full((3,), index)

print([int(tensor[0]) for tensor in in_workers(Tensors(), range(5), 2)])
"""


@pytest.mark.parametrize("size", ["4k", "16k"])
def test_loading_works_without_shared_memory(size):
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm || exit 77"
    small = f"{mount}; exec {sys.executable} -c '{WORK}'"
    done = subprocess.run(["unshare", "-m", "sh", "-c", small], capture_output=True, timeout=120)
    if done.returncode == 77 or b"unshare" in done.stderr:
        pytest.skip("cannot mount a file system")
    assert done.stdout == b"[0, 1, 2, 3, 4]\n"
    assert done.stderr == b"vitral: 0 of 2 data workers can be started: No space left on device\n"
    assert done.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="sockets are files on other systems")
def test_a_killed_run_leaves_no_temporary_files(tmp_path):
    program = (
        WORK.replace("range(5)", "iter(int, 1)")
        .replace("print([int(tensor[0]) for tensor in ", "for tensor in ")
        .replace("2)])", "2): print(1, flush=True)")
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"1\n"
        process.kill()
    assert [*tmp_path.iterdir()] == []
    assert not multiprocessing.active_children()
