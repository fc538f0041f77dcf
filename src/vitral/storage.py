"""Directories of safetensors and JSON files: atomic, verified, streamed, and partially readable.

A directory contains NAME.safetensors and NAME.json files and, written last, manifest.json with the
size and SHA-256 of every other file. safetensors loads a flipped bit without an error; the manifest
detects it. Each file is read and written once, one tensor at a time, and hashed on the fly. There
are no pickles.

The input is untrusted: names in a manifest must be plain, files must be regular, and nothing is
read or allocated beyond the sizes that were checked.

Reading and writing are in one file because they share the layout and the checks.
"""

from __future__ import annotations

import csv
import ctypes
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
MAX_NAME = 255  # bytes, on most file systems
TENSORS = ".safetensors"
NAME = re.compile(r"\w[\w.-]*\.(json|safetensors)", re.ASCII)
CHUNK = 1 << 22
MAX_JSON = 1 << 25  # bytes
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>
# In reverse of the order in which safetensors stores tensors.
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
    """A directory differs from what was written; the message names the file and the reason."""


def write(
    directory: Path, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]
) -> None:
    """Writes or replaces `directory`: builds it under another name, flushes it, and renames it.

    If the process is killed, either the old or the new content remains. Readers also see one of
    the two versions if the system supports atomic exchange of directories. Otherwise, the old
    directory is briefly at the second path of `places`; if the process is killed then, it stays
    there until `recover` restores it.

    Args:
        directory: where to write; its parent must exist.
        tensors: the tensors of each NAME.safetensors.
        documents: the content of each NAME.json.

    Raises:
        OSError: if writing fails; the previous content is kept and no other files remain.
    """
    building, retired = _temporary_path(directory, "new"), _temporary_path(directory, "old")
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
    """Yields an empty file next to `path`; flushes and renames it unless an exception is raised.

    Raises:
        OSError: if writing fails; its `filename` is set even if the disk is full.
    """
    building = _temporary_path(path, "new")
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


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a CSV file atomically; names of files that are not UTF-8 are written as they are."""
    with (
        replacing(path) as building,
        building.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        csv.writer(file).writerows([header, *rows])


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds a file name to errors that lack one, such as those of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def make_directory(path: Path) -> None:
    """Creates a directory and its parents, so that they survive a power failure."""
    if path.is_dir():
        return
    if not path.parent.exists():
        make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def remove(path: Path) -> None:
    """Removes a directory, a file, or a link, but not the target of a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a directory, to disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # the directory is writable but not readable
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def places(directory: Path) -> tuple[Path, ...]:
    """Returns the paths to search, in order, for a directory that `write` may be replacing."""
    return directory, _temporary_path(directory, "old"), directory


def recover(directory: Path) -> None:
    """Completes or undoes a `write` that was killed."""
    retired = _temporary_path(directory, "old")
    if retired.exists() and not os.path.lexists(directory):
        retired.rename(directory)
    remove(_temporary_path(directory, "new"))
    remove(retired)


def _temporary_path(path: Path, ending: str) -> Path:
    """Returns the temporary path for the new or old content while `path` is replaced."""
    name = f".{path.name}.{ending}"
    if len(os.fsencode(name)) > MAX_NAME:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()}.{ending}"
    return path.with_name(name)


def consistent(directory: Path, read: Callable[[], T]) -> T:
    """Calls `read` until everything it read comes from one version of the directory."""
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
    """Compares the names and sizes of the files with the manifest, and returns the manifest.

    Raises:
        CorruptError: if a file is missing, has a different size, or is not listed.
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
    """Compares the names, sizes and SHA-256 checksums of all files with the manifest.

    Raises:
        CorruptError: if a file is missing, differs, or is not listed.
    """
    for name, expected in check_files(directory).items():
        digest, left = hashlib.sha256(), expected["bytes"]
        with _opened(directory / name, expected) as file:
            while chunk := file.read(min(CHUNK, left)):
                digest.update(chunk)
                left -= len(chunk)
        _compare(directory / name, digest.hexdigest(), expected)


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """Returns the JSON object in a file of `directory`, verified. Raises CorruptError."""
    expected = _listed(directory, name)
    content = _read_bytes(directory / name, expected)
    _compare(directory / name, hashlib.sha256(content).hexdigest(), expected)
    return _parse_json(directory / name, content)


def read_tensors(directory: Path, name: str) -> dict[str, Tensor]:
    """Returns the tensors of NAME.safetensors on the CPU, verified while they are read.

    Raises:
        CorruptError: if the file is missing or differs from what was written.
    """
    path = directory / f"{name}{TENSORS}"
    expected, digest = _listed(directory, path.name), hashlib.sha256()
    with _opened_tensors(path, expected) as file:
        tensors = dict(_deserialized(file, digest))
    _compare(path, digest.hexdigest(), expected)
    return tensors


def read_shapes(directory: Path, name: str) -> dict[str, Tensor]:
    """Reads only the header of NAME.safetensors, unverified, into tensors on the meta device.

    Raises:
        CorruptError: if the file is missing or has no valid header.
    """
    with _opened_tensors(directory / f"{name}{TENSORS}") as file:
        return _read_header(file)[0]


def _serialized(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a safetensors file, in the layout of `safetensors.torch.save`."""
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
    """Yields the tensors of a safetensors file and hashes the file."""
    shapes, content = _read_header(file)
    digest.update(content)
    for name, shape in shapes.items():
        tensor = torch.empty(shape.shape, dtype=shape.dtype)
        view = _bytes_of(tensor)
        if file.readinto(view) != len(view):  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError
        digest.update(view)
        yield name, tensor


def _read_header(file: IO[bytes]) -> tuple[dict[str, Tensor], bytes]:
    """Returns the tensors of a safetensors file, in order, on the meta device, and its header."""
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
    """Returns the memory of a contiguous CPU tensor."""
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
    """Returns the manifest, which differs for different contents, or None if there is none."""
    try:
        return _read_bytes(directory / MANIFEST)
    except CorruptError:
        return None


def _listed(directory: Path, name: str) -> dict[str, Any]:
    """Returns a file's entry in the manifest."""
    manifest = _manifest(directory)
    if name not in manifest:
        raise CorruptError(f"{directory / name}: not in the manifest")
    return manifest[name]


def _compare(path: Path, sha256: str, expected: Mapping[str, Any]) -> None:
    if sha256 != expected["sha256"]:
        raise CorruptError(f"{path}: its content differs from what was written")


@contextmanager
def _opened(path: Path, expected: Mapping[str, Any] | None = None) -> Iterator[IO[bytes]]:
    """Opens a regular file with the size in its manifest entry, or raises CorruptError immediately.

    Devices and pipes could block or be endless. Links are followed, since the cache of the Hugging
    Face Hub consists of links; their targets must be regular files.
    """
    try:
        with open_regular(path) as file:
            _check_size(path, os.fstat(file.fileno()), expected)
            yield file
    except OSError as error:
        raise CorruptError(f"{path}: {error.strerror}") from None


@contextmanager
def _opened_tensors(path: Path, expected: Mapping[str, Any] | None = None) -> Iterator[IO[bytes]]:
    """Opens a safetensors file. Raises CorruptError if it is missing or invalid."""
    with _opened(path, expected) as file:
        try:
            yield file
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError):
            raise CorruptError(f"{path}: not a safetensors file") from None


def _check_size(path: Path, facts: os.stat_result, expected: Mapping[str, Any] | None) -> None:
    if expected is not None and facts.st_size != expected["bytes"]:
        raise CorruptError(f"{path}: its content differs from what was written")


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
        raise CorruptError(f"{path}: not valid JSON, or a duplicate key") from None
    if not isinstance(document, dict):
        raise CorruptError(f"{path}: not a JSON object")
    return document


def _to_json(document: Any) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two paths atomically; returns False if the system or file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    return rename(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0
