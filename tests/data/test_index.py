"""The cached index of archives: when it is used, and what happens when it is damaged."""

import multiprocessing
import os
import resource
import shutil
import tarfile

import pytest

from vitral.errors import UserError

from .archive_files import (
    base,
    contents,
    error_message,
    opened,
    put_ilsvrc,
    put_shards,
    tarred,
    two,
    val_images,
)


def overwrite(path, content):
    """Replaces the content of a file, but keeps its size and times."""
    times = path.stat()
    assert len(content) == times.st_size
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def spoil_headers(root):
    for path in root.glob("*.tar"):
        content = path.read_bytes()
        overwrite(path, b"?" * 512 + content[512:])


@pytest.mark.parametrize("put", [put_ilsvrc, put_shards])
def test_the_index_is_read_instead_of_the_archives(tmp_path, cache, put):
    root = put(tmp_path, val_images(numbered_on=False))
    first = opened(root)
    assert sorted(path.suffix for path in cache.iterdir()) == [".npz", ".npz"]
    if put is put_shards:
        spoil_headers(root)
    else:
        overwrite(root / "ILSVRC2012_img_train.tar", b"?" * first.train.stamps[0][0])
    second = opened(root)
    assert second.fingerprint == first.fingerprint
    assert second.train.offsets.tolist() == first.train.offsets.tolist()
    shutil.rmtree(cache)
    with pytest.raises(UserError):
        opened(root)


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [flipped, lambda c: c[: len(c) // 2], lambda c: b"", lambda c: b"\x93NUMPY?"]
)
def test_a_damaged_index_is_rebuilt(tmp_path, cache, damage):
    root = put_shards(tmp_path, val_images(numbered_on=False))
    first = opened(root).fingerprint
    for path in cache.iterdir():
        path.write_bytes(damage(path.read_bytes()))
    assert opened(root).fingerprint == first
    spoil_headers(root)
    assert opened(root).fingerprint == first


def test_a_changed_archive_is_reindexed(tmp_path):
    root = put_ilsvrc(tmp_path, val_images(numbered_on=False))
    before = opened(root)
    images = [(base(name), data[::-1]) for name, data in val_images(numbered_on=False).items()]
    (root / "ILSVRC2012_img_val.tar").write_bytes(tarred(images, format=tarfile.PAX_FORMAT))
    os.utime(root / "ILSVRC2012_img_val.tar", ns=(1, 1))
    wanted = {data[::-1] for data in val_images(numbered_on=False).values()}
    assert {*contents(opened(root).val)} == wanted
    with pytest.raises(FileNotFoundError, match="changed"):
        before.val.read(0)


def test_an_unwritable_cache_is_ignored(tmp_path, monkeypatch):
    root = put_shards(tmp_path / "shards", val_images(numbered_on=False))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VITRAL_CACHE", str(tmp_path / "file"))
    assert len(opened(root).train) == 24
    monkeypatch.delenv("VITRAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    opened(root)
    assert len([*(tmp_path / "xdg/vitral/index").iterdir()]) == 2


def test_a_full_disk_leaves_no_partial_index(tmp_path, cache):
    root = put_shards(tmp_path, val_images(numbered_on=False))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        assert len(opened(root).train) == 24
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [*cache.iterdir()]


def test_an_index_belongs_to_one_location_and_reader(tmp_path):
    for folder, number in (("a", b"1"), ("b", b"3")):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "all.tar"
        path.write_bytes(two(("c.jpg", b"?"), ("c.cls", number)))
        os.utime(path, ns=(1, 1))
    assert opened(tmp_path / "a").classes == ("1", "2")
    assert opened(tmp_path / "b", train=False).classes == ("1", "2", "3")
    assert "a tar inside it for each of two or more classes" in error_message(
        tmp_path / "b/all.tar"
    )


def open_and_remove(root, cache, wanted, barrier):
    barrier.wait()
    for _ in range(15):
        assert opened(root).fingerprint == wanted
        for path in cache.glob("*.npz"):
            path.unlink(missing_ok=True)


def test_processes_may_build_the_index_at_once(tmp_path, cache):
    root = put_shards(tmp_path, val_images(numbered_on=False))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    arguments = (root, cache, opened(root).fingerprint, barrier)
    others = [context.Process(target=open_and_remove, args=arguments) for _ in range(3)]
    for process in others:
        process.start()
    for process in others:
        process.join()
    assert [process.exitcode for process in others] == [0, 0, 0]
    assert not [path for path in cache.iterdir() if path.suffix != ".npz"]
