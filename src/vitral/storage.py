"""Directories of safetensors and JSON: atomic, verified, streamed, and partially readable.

A directory holds NAME.safetensors, NAME.json and, written last, manifest.json with the size and
SHA-256 of every other file. safetensors loads a flipped bit without an error; the manifest detects
it. Each file is read and written once, a tensor at a time, and hashed on the way. No pickles.

What is read may be hostile: names in a manifest are plain, files are regular, and nothing is read
or allocated beyond the sizes that were checked.
Reading and writing are in one file because they share the layout and what is verified.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from vitral.documents import parse_json
from vitral.files import open_regular, require_regular

T = TypeVar("T")
MANIFEST = "manifest.json"
MAX_NAME = 255  # bytes, in most file systems
TENSORS = ".safetensors"
NAME = re.compile(r"\w[\w.-]*\.(json|safetensors)", re.ASCII)
CHUNK = 1 << 22
MAX_JSON = 1 << 25  # bytes
MAX_HEADER = 100_000_000  # bytes, of a safetensors file, as in its own library
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>
# In the order in which safetensors lays tensors out, the last first.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ORDER = {dtype: i for i, dtype in enumerate(NAMES)}


class CorruptError(Exception):
    """A directory does not hold what was written; the message names the file and the reason."""


def write(
    directory: Path, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]
) -> None:
    """Writes or replaces `directory`: built next to it, flushed to disk, renamed.

    A kill at any time leaves the old content or the new. Readers find either, too, if the system
    can exchange two directories; otherwise the old one is at the second of `places` for a moment,
    and after a kill there until `recover` renames it.

    Args:
        directory: where to write; its parent must exist.
        tensors: the tensors of each NAME.safetensors.
        documents: the content of each NAME.json.

    Raises:
        OSError: nothing is left behind, and the previous content is still there.
    """
    building, retired = _prepare_ahead(directory, "new"), _prepare_ahead(directory, "old")
    recover(directory)
    building.mkdir()
    try:
        manifest = {}
        for name, group in tensors.items():
            chunks = _serialized(group)
            manifest[name + TENSORS] = _write_file(building / (name + TENSORS), chunks)
        for name, document in documents.items():
            file = f"{name}.json"
            manifest[file] = _write_file(building / file, iter([_to_json(document)]))
        _write_file(building / MANIFEST, iter([_to_json(manifest)]))
        sync(building)
        there = os.path.lexists(directory)
        if not (there and _exchange(building, directory)):
            if there:
                directory.rename(retired)
            try:
                building.rename(directory)
            except OSError:
                if there:
                    retired.rename(directory)
                raise
        sync(directory.parent)
    finally:
        remove(building)
    remove(retired)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file next to `path`, flushed and renamed to it unless an exception is raised.

    Raises:
        OSError: with the name of the file, also on a full disk.
    """
    building = _prepare_ahead(path, "new")
    with naming(path):
        remove(building)
        os.close(os.open(building, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # follows no link
        try:
            yield building
            sync(building)
            building.replace(path)
            sync(path.parent)
        finally:
            building.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the name of a file to errors that lack one, as those of a full disk do."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def make_directory(path: Path) -> None:
    """Creates a directory and its parents, so that their entries survive a power failure."""
    if path.is_dir():
        return
    if not path.parent.exists():
        make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def remove(path: Path) -> None:
    """Removes a directory, or a file or link in its place, but nothing that a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a directory, to disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a directory may be written but not read
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def places(directory: Path) -> tuple[Path, ...]:
    """Where to look for a directory, in this order, while `write` may be replacing it."""
    return directory, _prepare_ahead(directory, "old"), directory


def recover(directory: Path) -> None:
    """Completes or undoes a `write` that was killed."""
    retired = _prepare_ahead(directory, "old")
    if retired.exists() and not os.path.lexists(directory):
        retired.rename(directory)
    remove(_prepare_ahead(directory, "new"))
    remove(retired)


def _prepare_ahead(path: Path, ending: str) -> Path:
    """Where something is built, or kept for a moment, while `path` is replaced."""
    name = f".{path.name}.{ending}"
    if len(os.fsencode(name)) > MAX_NAME:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()}.{ending}"
    return path.with_name(name)


def consistent(directory: Path, read: Callable[[], T]) -> T:
    """What `read` reads of a directory: all of one version, even if it is replaced meanwhile."""
    while True:
        version = _version(directory)
        try:
            found = read()
        except Exception:
            if version == _version(directory):
                raise
        else:
            if version == _version(directory):
                return found


def check_files(directory: Path) -> dict[str, Any]:
    """Compares names and sizes of the files with the manifest, and returns the manifest.

    Raises:
        CorruptError: for a missing file, one of another size, or one that is not listed.
    """
    manifest = _manifest(directory)
    for path in [*directory.glob(f"*{TENSORS}"), *directory.glob("*.json")]:
        if path.name not in manifest and path.name != MANIFEST:
            raise CorruptError(f"{path}: not in the manifest")
    for name, expected in manifest.items():
        try:
            path = directory / name
            _check_size(path, require_regular(path.stat(), path), expected)
        except OSError as error:
            raise CorruptError(f"{directory / name}: {error.strerror}") from None
    return manifest


def verify(directory: Path) -> None:
    """Compares names, sizes and SHA-256 of all files with the manifest. Raises CorruptError."""
    for name, expected in check_files(directory).items():
        digest, left = hashlib.sha256(), expected["bytes"]
        with _opened(directory / name, expected) as file:
            while chunk := file.read(min(CHUNK, left)):
                digest.update(chunk)
                left -= len(chunk)
        _compare(directory / name, digest.hexdigest(), expected)


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of `directory`, verified. Raises CorruptError."""
    expected = _listed(directory, name)
    content = _read_bytes(directory / name, expected)
    _compare(directory / name, hashlib.sha256(content).hexdigest(), expected)
    return _parse_json(directory / name, content)


def read_tensors(directory: Path, name: str) -> dict[str, Tensor]:
    """The tensors of NAME.safetensors, on the CPU, verified while they are read.

    Raises:
        CorruptError: the file is missing, or is not what was written.
    """
    path = directory / f"{name}{TENSORS}"
    expected, digest = _listed(directory, path.name), hashlib.sha256()
    with _opened_tensors(path, expected) as file:
        tensors = dict(_deserialized(file, digest))
    _compare(path, digest.hexdigest(), expected)
    return tensors


def read_shapes(directory: Path, name: str) -> dict[str, Tensor]:
    """The tensors of NAME.safetensors on the meta device, from its header alone, not verified.

    Raises:
        CorruptError: the file is missing, or has no such header.
    """
    with _opened_tensors(directory / f"{name}{TENSORS}") as file:
        return _read_header(file)[0]


def _serialized(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, as `safetensors.torch.save` lays them out."""
    names = sorted(tensors, key=lambda name: (-ORDER[tensors[name].dtype], name))
    header, end = {}, 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": [*tensor.shape],
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield _bytes_of(tensors[name].detach().cpu().contiguous())


def _deserialized(file: IO[bytes], digest: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file, which is hashed while it is read."""
    shapes, content = _read_header(file)
    digest.update(content)
    for name, shape in shapes.items():
        tensor = torch.empty_like(shape, device="cpu")
        view = _bytes_of(tensor)
        if file.readinto(view) != len(view):  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError
        digest.update(view)
        yield name, tensor


def _read_header(file: IO[bytes]) -> tuple[dict[str, Tensor], bytes]:
    """The tensors of a safetensors file, in order and on the meta device, and its first bytes."""
    size, start = os.fstat(file.fileno()).st_size, file.read(8)
    length = int.from_bytes(start, "little")
    if length > min(MAX_HEADER, size):
        raise ValueError
    text = file.read(length)
    header = parse_json(text)
    header.pop("__metadata__", None)
    shapes, end = {}, 0
    for name, facts in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = DTYPES[facts["dtype"]], facts["shape"]
        first, last = facts["data_offsets"]
        if first != end or last - first != prod(shape) * dtype.itemsize:
            raise ValueError
        shapes[name], end = torch.empty(shape, dtype=dtype, device="meta"), last
    if len(start + text) + end != size:
        raise ValueError
    return shapes, start + text


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def _write_file(path: Path, chunks: Iterator[bytes | memoryview]) -> dict[str, Any]:
    """Writes a file and returns its entry in the manifest."""
    digest, size = hashlib.sha256(), 0
    with naming(path), path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _manifest(directory: Path) -> dict[str, dict[str, Any]]:
    manifest = _parse_json(directory / MANIFEST, _read_bytes(directory / MANIFEST))
    for name, entry in manifest.items():
        facts = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else ()
        if not NAME.fullmatch(name) or [*map(type, facts)] != [int, str]:
            raise CorruptError(f"{directory / MANIFEST}: not a manifest")
    return manifest


def _version(directory: Path) -> bytes | None:
    """The manifest, which differs between any two contents; None without one."""
    try:
        return _read_bytes(directory / MANIFEST)
    except CorruptError:
        return None


def _listed(directory: Path, name: str) -> dict[str, Any]:
    """The manifest's entry of a file."""
    manifest = _manifest(directory)
    if name not in manifest:
        raise CorruptError(f"{directory / name}: not in the manifest")
    return manifest[name]


def _compare(path: Path, sha256: str, expected: Mapping[str, Any]) -> None:
    if sha256 != expected["sha256"]:
        raise CorruptError(f"{path}: its content is not what was written")


@contextmanager
def _opened(path: Path, expected: Mapping[str, Any] | None = None) -> Iterator[IO[bytes]]:
    """Opens a regular file of the size in its manifest entry, or raises CorruptError at once.

    Devices and pipes could block or have no end. A link is followed, since the cache of the Hugging
    Face Hub consists of links; what it leads to must be such a file.
    """
    try:
        with open_regular(path) as file:
            _check_size(path, os.fstat(file.fileno()), expected)
            yield file
    except OSError as error:
        raise CorruptError(f"{path}: {error.strerror}") from None


@contextmanager
def _opened_tensors(path: Path, expected: Mapping[str, Any] | None = None) -> Iterator[IO[bytes]]:
    """An open safetensors file. Raises CorruptError if it is missing, or is not one."""
    with _opened(path, expected) as file:
        try:
            yield file
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError):
            raise CorruptError(f"{path}: not a safetensors file") from None


def _check_size(path: Path, facts: os.stat_result, expected: Mapping[str, Any] | None) -> None:
    if expected is not None and facts.st_size != expected["bytes"]:
        raise CorruptError(f"{path}: its content is not what was written")


def _read_bytes(path: Path, expected: Mapping[str, Any] | None = None) -> bytes:
    with _opened(path, expected) as file:
        content = file.read(MAX_JSON + 1)
    if len(content) > MAX_JSON:
        raise CorruptError(f"{path}: larger than {MAX_JSON:,} bytes")
    return content


def _parse_json(path: Path, content: bytes) -> dict[str, Any]:
    try:
        document = parse_json(content.decode("utf-8"))
    except ValueError:
        raise CorruptError(f"{path}: not valid JSON, or a key is given twice") from None
    if not isinstance(document, dict):
        raise CorruptError(f"{path}: not a JSON object")
    return document


def _to_json(document: Any) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two paths at once; False if the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    return rename(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0
