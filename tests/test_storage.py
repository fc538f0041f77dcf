"""Atomic writing of directories, and detection of every kind of damage."""

import hashlib
import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import safetensors.torch
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


def test_written_values_are_read_back(written):
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


@pytest.fixture(params=[True, False], ids=["exchanged", "renamed twice"])
def exchange(request, monkeypatch):
    """Whether the system can exchange two directories."""
    if not request.param:
        monkeypatch.setattr(storage, "_exchange", lambda *_: False)
    return request.param


@pytest.mark.parametrize("old", ["complete", "none", "killed write", "killed replacement"])
def test_write_replaces_what_is_there(tmp_path, old, exchange):
    folder = tmp_path / "made"
    storage.write(folder, {"more": {"x": torch.zeros(5)}}, {})
    if old == "none":
        (folder / "more.safetensors").unlink()
        (folder / "manifest.json").unlink()
        folder.rmdir()
    elif old != "complete":
        left = ".made.new" if old == "killed write" else ".made.old"
        (tmp_path / left).mkdir()
        (tmp_path / left / "rest").touch()
    storage.write(folder, TENSORS, DOCUMENTS)
    storage.verify(folder)
    assert sorted(contents(folder)) == FILES
    assert names(tmp_path) == ["made"]


def test_everything_is_flushed_to_disk(tmp_path, monkeypatch):
    flushed, fsync = set(), os.fsync

    def record(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    storage.write(tmp_path / "made", TENSORS, DOCUMENTS)
    assert flushed == {path.stat().st_ino for path in (tmp_path, *tmp_path.rglob("*"))}


class Raises(dict):
    """A group whose last tensor raises MemoryError."""

    def __getitem__(self, name):
        if name == "second":
            raise MemoryError
        return torch.zeros(3)


FAILURES = ["tensors", "document", "second file", "flush", "first rename"]


@pytest.mark.parametrize(
    ("failure", "there_before"),
    [*itertools.product(FAILURES, [True, False]), ("second rename", True)],
)
def test_a_failing_write_keeps_the_old_content(tmp_path, monkeypatch, failure, there_before):
    folder, tensors, documents, error = tmp_path / "made", TENSORS, DOCUMENTS, OSError
    if there_before:
        storage.write(folder, {"old": {"x": torch.ones(2)}}, {})
    before = contents(tmp_path)

    def fail_at(module, name, count):
        calls, original = [], getattr(module, name)

        def stand_in(*arguments):
            calls.append(arguments)
            if len(calls) == count:
                raise OSError(28, "No space left on device")
            return original(*arguments)

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
        monkeypatch.setattr(storage, "_exchange", lambda *_: False)
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
    """Flips a bit in the middle."""
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
def test_damage_is_detected(written, name, damage):
    path = written / name
    if DAMAGE[damage] is None:
        path.unlink()
    else:
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(CorruptError) as error:
        storage.verify(written)
    message = str(error.value)
    assert message.isprintable()
    if name == "manifest.json":  # the change may be in the entry of another file
        assert str(written) in message
    else:
        assert message.startswith(f"{path}: ")


def test_a_flipped_bit_in_the_manifest_is_detected(written):
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
    ids=["no entry", "incomplete entry", "extra file", "missing file"],
)
def test_a_changed_manifest_is_detected(written, changes, name):
    manifest = json.loads((written / "manifest.json").read_text()) | changes
    listed = {key: value for key, value in manifest.items() if value is not ...}
    (written / "manifest.json").write_text(json.dumps(listed))
    with pytest.raises(CorruptError, match=f"{written / name}: "):
        storage.verify(written)


@pytest.mark.parametrize("data", [b"", b"[1]", b"{", b'"text"', b"\xff\xfe"])
def test_invalid_files_are_corrupt(written, data):
    (written / "config.json").write_bytes(data)
    (written / "model.safetensors").write_bytes(data)
    with pytest.raises(CorruptError, match=r"config\.json: "):
        storage.read_json(written, "config.json")
    with pytest.raises(CorruptError, match=r"model\.safetensors: "):
        storage.read_tensors(written, "model")
    with pytest.raises(CorruptError, match=r"none\.safetensors: "):
        storage.read_tensors(written, "none")


def random_tensor(dtype, *shape):
    """A tensor of random bits, or of random booleans."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return bits.view(dtype).squeeze(-1)


@pytest.mark.parametrize(
    "group",
    [
        {},
        {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "none": torch.empty(0)},
        {f"{dtype}": random_tensor(dtype, 3, 5) for dtype in storage.NAMES},
        {f"{i}{dtype}": random_tensor(dtype, i) for i in range(4) for dtype in storage.NAMES},
        {name: torch.ones(1) for name in ("b", "a.b", "A", "é", 'q"\\', "tab\t", "\u2028", "😀")},
    ],
    ids=["nothing", "odd shapes", "every dtype", "order", "odd names"],
)
def test_files_are_identical_to_those_of_safetensors(tmp_path, group):
    """So that a hash of weights does not depend on the program that wrote them."""
    expected = safetensors.torch.save(group)
    storage.write(tmp_path / "made", {"model": group}, {})
    assert (tmp_path / "made" / "model.safetensors").read_bytes() == expected
    read = storage.read_tensors(tmp_path / "made", "model")
    assert {name: (t.dtype, t.shape) for name, t in read.items()} == {
        name: (t.dtype, t.shape) for name, t in group.items()
    }
    assert safetensors.torch.save(read) == expected


def put_listed(directory, name, data):
    """Writes a file and its entry in the manifest."""
    (directory / name).write_bytes(data)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_files_of_other_programs_are_read(written):
    """With metadata in the header."""
    group = {"x": torch.arange(6), "y": torch.ones(2, 2).half()}
    data = safetensors.torch.save(group, metadata={"format": "pt", "by": "someone else"})
    put_listed(written, "model.safetensors", data)
    read = storage.read_tensors(written, "model")
    assert read.keys() == group.keys()
    assert all(read[name].equal(value) for name, value in group.items())


def header(**entries):
    """The bytes of a safetensors file with this header and 16 bytes of data."""
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


GOOD = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "data",
    [
        b"\x01",
        (1 << 60).to_bytes(8, "little") + b"{}",
        header(x={**GOOD, "dtype": "F99"}),
        header(x={**GOOD, "shape": [5]}),
        header(x={**GOOD, "shape": [-4]}),
        header(x={**GOOD, "shape": [-2, -2]}),
        header(x={**GOOD, "shape": "four"}),
        header(x={**GOOD, "data_offsets": [4, 20]}),
        header(x={**GOOD, "shape": [8], "data_offsets": [0, 32]}),
        header(x={**GOOD, "shape": [1 << 40], "data_offsets": [0, 1 << 42]}),
        header(x=GOOD, y=GOOD),
        header(x={"dtype": "F32"}),
        header(x=[1]),
    ],
    ids=[
        "cut short",
        "endless header",
        "unknown dtype",
        "larger shape",
        "negative shape",
        "negative sides",
        "no shape",
        "gap",
        "too long",
        "huge",
        "overlap",
        "incomplete",
        "no object",
    ],
)
def test_invalid_safetensors_are_corrupt_despite_a_valid_manifest(written, data):
    put_listed(written, "model.safetensors", data)
    with pytest.raises(CorruptError, match=r"model\.safetensors: "):
        storage.read_tensors(written, "model")


def test_a_flipped_bit_in_any_byte_of_tensors_is_detected_on_reading(written):
    path = written / "model.safetensors"
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        with pytest.raises(CorruptError, match=r"model\.safetensors: "):
            storage.read_tensors(written, "model")
    path.write_bytes(data)
    storage.read_tensors(written, "model")


@pytest.mark.parametrize("place", [0, 20, 41, 60])
def test_a_flipped_bit_in_a_document_is_detected_on_reading(written, place):
    path = written / "config.json"
    data = path.read_bytes()
    for bit in range(8):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        with pytest.raises(CorruptError, match=r"config\.json: "):
            storage.read_json(written, "config.json")


def test_other_files_are_not_needed_to_read_one(written):
    """Their damage is not detected, which is the task of `verify`."""
    for name in ("ema.safetensors", "other.json"):
        (written / name).write_bytes(b"")
    assert storage.read_tensors(written, "model").keys() == {"a", "b"}
    assert storage.read_json(written, "config.json") == DOCUMENTS["config"]
    for name in ("ema", "none"):
        with pytest.raises(CorruptError, match=rf"{name}\.safetensors: "):
            storage.read_tensors(written, name)


def test_sizes_are_checked_without_reading_a_file(written, monkeypatch):
    opened, reads = storage._opened, []
    monkeypatch.setattr(
        storage, "_opened", lambda path, *more: reads.append(path.name) or opened(path, *more)
    )
    manifest = storage.check_files(written)
    assert sorted([*manifest, "manifest.json"]) == FILES
    (written / "model.safetensors").write_bytes(bytes(manifest["model.safetensors"]["bytes"]))
    assert storage.check_files(written) == manifest
    assert set(reads) == {"manifest.json"}
    (written / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CorruptError, match=r"model\.safetensors: its content"):
        storage.check_files(written)


def peak_growth(action):
    """Returns the peak increase of memory during `action`, in MB, and the result."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        pytest.skip("the system cannot reset the peak memory")

    def read(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

    before = read("VmRSS")
    result = action()
    return read("VmHWM") - before, result


def test_files_are_written_and_read_one_tensor_at_a_time(tmp_path):
    """64 MB of 2 MB tensors that are not contiguous."""
    folder, group = tmp_path / "made", {f"{i}": torch.ones(512, 1024).T for i in range(32)}
    write, verify, read = (
        lambda: storage.write(folder, {"model": group}, {}),
        lambda: storage.verify(folder),
        lambda: storage.read_tensors(folder, "model"),
    )
    storage.write(tmp_path / "first", {"model": {"x": torch.ones(512, 1024).T}}, {})
    assert peak_growth(write)[0] < 24
    assert peak_growth(verify)[0] < 24
    growth, tensors = peak_growth(read)
    assert growth < 64 + 24
    assert all(value.equal(group[name]) for name, value in tensors.items())


def test_one_large_tensor_is_not_copied(tmp_path):
    group = {"x": torch.ones(1 << 24)}  # 64 MB
    growth, _ = peak_growth(lambda: storage.write(tmp_path / "made", {"model": group}, {}))
    assert growth < 24
    growth, read = peak_growth(lambda: storage.read_tensors(tmp_path / "made", "model"))
    assert growth < 64 + 24
    assert read["x"].equal(group["x"])


HOSTILE = ["../made/config.json", "/dev/zero", "..", ".", "", "a/b.json", "config.json\0", "x.bin"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_in_a_manifest_are_rejected(written, name):
    manifest = json.loads((written / "manifest.json").read_text())
    entry = manifest.pop("config.json")
    (written / "manifest.json").write_text(json.dumps({**manifest, name: entry}))
    for read in (storage.check_files, storage.verify):
        with pytest.raises(CorruptError, match=r"manifest\.json: not a manifest"):
            read(written)
    with pytest.raises(CorruptError, match=r"manifest\.json: not a manifest"):
        storage.read_json(written, name)


@pytest.mark.parametrize(
    "entry", [{"bytes": True}, {"bytes": 1.0}, {"bytes": "1"}, {"sha256": 5}, {"sha256": None}]
)
def test_manifest_entries_of_a_wrong_type_are_rejected(written, entry):
    manifest = json.loads((written / "manifest.json").read_text())
    manifest["config.json"] |= entry
    (written / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptError, match=r"manifest\.json: not a manifest"):
        storage.verify(written)


SPECIAL = {
    "pipe": os.mkfifo,
    "link to an endless device": lambda path: path.symlink_to("/dev/zero"),
    "link to a pipe": lambda path: (os.mkfifo(f"{path}.pipe"), path.symlink_to(f"{path}.pipe")),
    "link to itself": lambda path: path.symlink_to(path),
    "link to nothing": lambda path: path.symlink_to("gone"),
    "link to a file of the system": lambda path: path.symlink_to("/proc/self/pagemap"),
    "directory": os.mkdir,
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", FILES)
def test_special_files_are_rejected_immediately(written, name, kind):
    """Reading them could block or never end."""
    path = written / name
    path.unlink()
    SPECIAL[kind](path)
    for read in (
        lambda: storage.verify(written),
        lambda: storage.read_json(written, name),
        lambda: storage.read_tensors(written, path.stem),
    ):
        with pytest.raises(CorruptError, match=str(written)):
            read()


def test_links_to_regular_files_are_followed(written):
    """The cache of the Hugging Face Hub consists of links."""
    for name in FILES:
        (written / name).rename(written.parent / name)
        (written / name).symlink_to(f"../{name}")
    storage.verify(written)
    assert storage.read_json(written, "config.json") == DOCUMENTS["config"]
    assert storage.read_tensors(written, "model").keys() == TENSORS["model"].keys()


@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
def test_documents_above_a_size_limit_are_corrupt(written, name):
    with (written / name).open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    if name == "config.json":
        manifest = json.loads((written / "manifest.json").read_text())
        manifest[name]["bytes"] = 1 << 40
        (written / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptError, match=r"\.json: larger than"):
        storage.read_json(written, "config.json")


def test_nothing_is_allocated_for_tensors_beyond_the_file(written):
    data = header(x={**GOOD, "shape": [1 << 30], "data_offsets": [0, 1 << 32]})
    put_listed(written, "model.safetensors", data)

    def read():
        with pytest.raises(CorruptError, match="not a safetensors file"):
            storage.read_tensors(written, "model")

    assert peak_growth(read)[0] < 24


def test_deep_json_is_corrupt(written):
    put_listed(written, "config.json", b"[" * 100_000)
    with pytest.raises(CorruptError, match=r"config\.json: not valid JSON"):
        storage.read_json(written, "config.json")


@pytest.mark.parametrize("what", ["file", "link to nothing", "link to a directory"])
@pytest.mark.parametrize("name", ["made", ".made.new", ".made.old"])
def test_write_replaces_files_and_links(tmp_path, name, what, exchange):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "kept").touch()
    if what == "file":
        (tmp_path / name).touch()
    else:
        (tmp_path / name).symlink_to("target" if what == "link to a directory" else "gone")
    for _ in range(2):
        storage.write(tmp_path / "made", TENSORS, DOCUMENTS)
        storage.verify(tmp_path / "made")
    assert sorted(names(tmp_path)) == ["made", "target"]
    assert names(tmp_path / "target") == ["kept"]


def read_versions(folder, find):
    """Reads a directory until it is removed, and exits; both files must be of one version."""
    count = 0
    try:
        while folder.parent.exists():
            try:
                number, tensors = storage.consistent(
                    folder,
                    lambda: (
                        storage.read_json(find(folder), "config.json")["number"],
                        storage.read_tensors(find(folder), "model"),
                    ),
                )
            except CorruptError:
                if folder.parent.exists():
                    raise
                break
            assert tensors["x"].eq(number).all()
            count += 1
        os._exit(0 if count > 10 else 3)
    finally:
        os._exit(4)


def in_place(folder):
    return folder


def in_places(folder):
    return next((place for place in storage.places(folder) if place.exists()), folder)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_readers_find_the_old_or_the_new_version(tmp_path, exchange):
    folder = tmp_path / "parent" / "made"
    folder.parent.mkdir()
    if exchange and sys.platform != "linux":
        pytest.skip("this system does not exchange directories")

    def write(number):
        tensors = {"model": {"x": torch.full((1000,), float(number))}}
        storage.write(folder, tensors, {"config": {"number": number}})

    write(0)
    child = os.fork()
    if not child:
        read_versions(folder, in_place if exchange else in_places)
    for number in range(1, 201):
        write(number)
    folder.parent.rename(tmp_path / "gone")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("what", ["file", "link"])
def test_a_link_at_the_temporary_path_is_not_followed(tmp_path, what):
    (tmp_path / "precious").write_text("kept")
    if what == "link":
        (tmp_path / ".made.txt.new").symlink_to("precious")
    else:
        (tmp_path / ".made.txt.new").write_text("left by a kill")
    with storage.replacing(tmp_path / "made.txt") as building:
        assert not building.is_symlink()
        building.write_text("new")
    assert (tmp_path / "precious").read_text() == "kept"
    assert (tmp_path / "made.txt").read_text() == "new"
    assert sorted(names(tmp_path)) == ["made.txt", "precious"]


@pytest.mark.parametrize("error", [None, ValueError])
def test_a_file_is_replaced_only_on_success(tmp_path, error):
    path = tmp_path / "made.txt"
    path.write_text("old")
    try:
        with storage.replacing(path) as building:
            building.write_text("incomplete")
            assert path.read_text() == "old"
            if error:
                raise error
            building.write_text("new")
    except ValueError:
        pass
    assert path.read_text() == ("old" if error else "new")
    assert names(tmp_path) == ["made.txt"]


def test_recovery_after_a_kill_between_two_renames(written):
    before = contents(written)
    written.rename(written.with_name(".made.old"))
    storage.recover(written)
    assert contents(written) == before
    for left in (".made.new", ".made.old"):
        written.with_name(left).mkdir()
    storage.recover(written)
    assert names(written.parent) == ["made"]
    assert contents(written) == before


@pytest.mark.parametrize("name", ["x" * 255, "\u00e9" * 127, os.fsdecode(b"\xff\xfe")])
def test_any_valid_name_can_be_written(tmp_path, name, exchange):
    for content in ("old", "new"):
        with storage.replacing(tmp_path / name) as building:
            building.write_text(content)
    assert (tmp_path / name).read_text() == "new"
    (tmp_path / name).unlink()
    for content in ("old", "new"):
        storage.write(tmp_path / name, {}, {"facts": {"is": content}})
    assert storage.read_json(tmp_path / name, "facts.json") == {"is": "new"}
    assert names(tmp_path) == [name]
    place, retired, _ = storage.places(tmp_path / name)
    place.rename(retired)
    storage.recover(place)
    assert names(tmp_path) == [name]
