"""Directories written whole or not at all, and every kind of damage found."""

import itertools
import json
import os

import pytest
import torch

from vitral import storage
from vitral.storage import CorruptError

TENSORS = {
    "model": {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(3, dtype=torch.bfloat16)},
    "ema": {"empty": torch.empty(0, 4), "one": torch.tensor(7)},
}
DOCUMENTS = {"config": {"name": "é", "list": [1, None, 2.5], "deep": {"x": True}}, "other": {}}
FILES = ["config.json", "ema.safetensors", "manifest.json", "model.safetensors", "other.json"]


@pytest.fixture
def written(tmp_path):
    storage.write(tmp_path / "made", TENSORS, DOCUMENTS)
    return tmp_path / "made"


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_what_is_written_is_read_again(written):
    storage.verify(written)
    assert sorted(contents(written)) == FILES
    assert names(written.parent) == ["made"]
    for name, group in TENSORS.items():
        read = storage.read_tensors(written, name)
        assert read.keys() == group.keys()
        for key, value in group.items():
            assert read[key].dtype == value.dtype
            assert read[key].equal(value)
    for name, document in DOCUMENTS.items():
        assert storage.read_json(written, f"{name}.json") == document


def test_no_file_is_a_pickle(written):
    for name, data in contents(written).items():
        if name.endswith(".json"):
            json.loads(data)
        else:
            size = int.from_bytes(data[:8], "little")
            json.loads(data[8 : 8 + size])  # a safetensors header
        assert data[:2] not in (b"\x80\x02", b"PK")


@pytest.mark.parametrize("old", ["replaced", "none", "half of a write", "half of a replacement"])
def test_write_replaces_what_is_there(tmp_path, old):
    folder = tmp_path / "made"
    storage.write(folder, {"more": {"x": torch.zeros(5)}}, {})
    if old == "none":
        (folder / "more.safetensors").unlink()
        (folder / "manifest.json").unlink()
        folder.rmdir()
    elif old != "replaced":
        left = ".made.new" if old == "half of a write" else ".made.old"
        (tmp_path / left).mkdir()
        (tmp_path / left / "rest").touch()
    storage.write(folder, TENSORS, DOCUMENTS)
    storage.verify(folder)
    assert sorted(contents(folder)) == FILES
    assert names(tmp_path) == ["made"]


def test_everything_is_flushed_to_disk(tmp_path, monkeypatch):
    flushed, fsync = set(), os.fsync

    def note(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    storage.write(tmp_path / "made", TENSORS, DOCUMENTS)
    assert flushed == {path.stat().st_ino for path in (tmp_path, *tmp_path.rglob("*"))}


class Raises(dict):
    """A group whose last tensor cannot be had, as when memory ends."""

    def __getitem__(self, name):
        if name == "second":
            raise MemoryError
        return torch.zeros(3)


FAILURES = ["tensors", "document", "second file", "flush", "first rename"]


@pytest.mark.parametrize(
    ("failure", "there_before"),
    [*itertools.product(FAILURES, [True, False]), ("second rename", True)],
)
def test_failing_write_leaves_what_was_there(tmp_path, monkeypatch, failure, there_before):
    folder, tensors, documents, error = tmp_path / "made", TENSORS, DOCUMENTS, OSError
    if there_before:
        storage.write(folder, {"old": {"x": torch.ones(2)}}, {})
    before = contents(tmp_path)

    def fail_at(module, name, count):
        calls, true = [], getattr(module, name)

        def stand_in(*arguments):
            calls.append(arguments)
            if len(calls) == count:
                raise OSError(28, "No space left on device")
            return true(*arguments)

        monkeypatch.setattr(module, name, stand_in)

    if failure == "tensors":
        tensors, error = {**TENSORS, "more": Raises(first=None, second=None)}, MemoryError
    elif failure == "document":
        documents, error = {"config": {"no JSON": object()}}, TypeError
    elif failure == "second file":
        fail_at(storage, "_write_file", 2)
    elif failure == "flush":
        fail_at(os, "fsync", 3)
    else:
        fail_at(type(folder), "rename", 1 + (failure == "second rename"))
    with pytest.raises(error):
        storage.write(folder, tensors, documents)
    assert contents(tmp_path) == before
    assert names(tmp_path) == ["made"] * there_before


def test_missing_parent_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        storage.write(tmp_path / "no" / "made", TENSORS, DOCUMENTS)
    assert names(tmp_path) == []


def flip(data):
    """One bit in the middle."""
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    return bytes(changed)


DAMAGE = {
    "truncated": lambda data: data[: len(data) - 2],
    "emptied": lambda data: b"",
    "lengthened": lambda data: data + b"\0",
    "bit flipped": flip,
    "deleted": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found(written, name, damage):
    path = written / name
    if DAMAGE[damage] is None:
        path.unlink()
    else:
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(CorruptError) as error:
        storage.verify(written)
    message = str(error.value)
    assert message.isprintable()
    if name == "manifest.json":  # what it says of others may be what was changed
        assert str(written) in message
    else:
        assert message.startswith(f"{path}: ")


def test_no_flipped_bit_of_the_manifest_is_harmful(written):
    path = written / "manifest.json"
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        with pytest.raises(CorruptError, match=str(written)):
            storage.verify(written)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"model.safetensors": None}, "manifest.json"),
        ({"config.json": {"bytes": 3}}, "manifest.json"),
        ({"gone.json": {"bytes": 1, "sha256": ""}}, "gone.json"),
        ({"model.safetensors": ...}, "model.safetensors"),
    ],
    ids=["nothing", "incomplete", "too much", "too little"],
)
def test_tampered_manifest_is_found(written, changes, name):
    manifest = json.loads((written / "manifest.json").read_text()) | changes
    listed = {key: value for key, value in manifest.items() if value is not ...}
    (written / "manifest.json").write_text(json.dumps(listed))
    with pytest.raises(CorruptError, match=f"{written / name}: "):
        storage.verify(written)


@pytest.mark.parametrize("data", [b"", b"[1]", b"{", b'"text"', b"\xff\xfe"])
def test_files_that_cannot_be_read(written, data):
    (written / "config.json").write_bytes(data)
    (written / "model.safetensors").write_bytes(data)
    with pytest.raises(CorruptError, match=r"config\.json: "):
        storage.read_json(written, "config.json")
    with pytest.raises(CorruptError, match=r"model\.safetensors: "):
        storage.read_tensors(written, "model")
    with pytest.raises(CorruptError, match=r"none\.safetensors: "):
        storage.read_tensors(written, "none")
