"""Directories of safetensors and JSON: atomic, verified, streamed, and partially readable.

A directory holds NAME.safetensors, NAME.json and, written last, manifest.json with the size and
SHA-256 of every other file. safetensors loads a flipped bit without an error; the manifest detects
it. Each file is read and written once, a tensor at a time, and hashed on the way. No pickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

MANIFEST = "manifest.json"
TENSORS = ".safetensors"
CHUNK = 1 << 22
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

    A kill at any time leaves the old content or the new; at worst `recover` has to rename it.

    Args:
        directory: where to write; its parent must exist.
        tensors: the tensors of each NAME.safetensors.
        documents: the content of each NAME.json.

    Raises:
        OSError: nothing is left behind, and the previous content is still there.
    """
    building = directory.with_name(f".{directory.name}.new")
    retired = directory.with_name(f".{directory.name}.old")
    recover(directory)
    shutil.rmtree(building, ignore_errors=True)
    shutil.rmtree(retired, ignore_errors=True)
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
        _sync(building)
        if directory.exists():
            directory.rename(retired)
        try:
            building.rename(directory)
        except OSError:
            if retired.exists():
                retired.rename(directory)
            raise
        _sync(directory.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path next to `path`, renamed to it unless an exception is raised."""
    building = path.with_name(f".{path.name}.new")
    try:
        yield building
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)


def recover(directory: Path) -> None:
    """Restores what a kill between the two renames of `write` left under another name."""
    retired = directory.with_name(f".{directory.name}.old")
    if retired.exists() and not directory.exists():
        retired.rename(directory)


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
            found = (directory / name).stat().st_size
        except OSError as error:
            raise CorruptError(f"{directory / name}: {error.strerror}") from None
        if found != expected["bytes"]:
            raise CorruptError(f"{directory / name}: its content is not what was written")
    return manifest


def verify(directory: Path) -> None:
    """Compares names, sizes and SHA-256 of all files with the manifest. Raises CorruptError."""
    for name, expected in check_files(directory).items():
        digest = hashlib.sha256()
        with _opened(directory / name) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        _compare(directory / name, digest.hexdigest(), expected)


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of `directory`, verified. Raises CorruptError."""
    content = _read_bytes(directory / name)
    _compare(directory / name, hashlib.sha256(content).hexdigest(), _listed(directory, name))
    return _parse_json(directory / name, content)


def read_tensors(directory: Path, name: str) -> dict[str, Tensor]:
    """The tensors of NAME.safetensors, on the CPU, verified while they are read.

    Raises:
        CorruptError: the file is missing, or is not what was written.
    """
    path = directory / f"{name}{TENSORS}"
    expected, digest = _listed(directory, path.name), hashlib.sha256()
    with _opened_tensors(path) as file:
        tensors = dict(_deserialized(file, digest))
        digest.update(file.read())
    _compare(path, digest.hexdigest(), expected)
    return tensors


def read_shapes(directory: Path, name: str) -> dict[str, Tensor]:
    """The tensors of NAME.safetensors on the meta device, from its header alone, not verified.

    Raises:
        CorruptError: the file is missing, or has no such header.
    """
    with _opened_tensors(directory / f"{name}{TENSORS}") as file:
        return {
            key: torch.empty(facts["shape"], dtype=DTYPES[facts["dtype"]], device="meta")
            for key, facts in _read_header(file)[0].items()
        }


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
    header, content = _read_header(file)
    digest.update(content)
    end = 0
    for name, facts in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = DTYPES[facts["dtype"]], facts["shape"]
        first, last = facts["data_offsets"]
        if first != end or last - first != prod(shape) * dtype.itemsize:
            raise ValueError
        tensor, end = torch.empty(shape, dtype=dtype), last
        view = _bytes_of(tensor)
        if file.readinto(view) != last - first:  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError
        digest.update(view)
        yield name, tensor


def _read_header(file: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """The facts about each tensor of a safetensors file, and the bytes that hold them."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if length > os.fstat(file.fileno()).st_size:
        raise ValueError
    text = file.read(length)
    header = json.loads(text)
    header.pop("__metadata__", None)
    return header, start + text


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def _write_file(path: Path, chunks: Iterator[bytes | memoryview]) -> dict[str, Any]:
    """Writes a file and returns its entry in the manifest."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not name the file
        raise
    return {"bytes": size, "sha256": digest.hexdigest()}


def _manifest(directory: Path) -> dict[str, dict[str, Any]]:
    manifest = _parse_json(directory / MANIFEST, _read_bytes(directory / MANIFEST))
    for entry in manifest.values():
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise CorruptError(f"{directory / MANIFEST}: not a manifest")
    return manifest


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
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise CorruptError(f"{path}: {error.strerror}") from None


@contextmanager
def _opened_tensors(path: Path) -> Iterator[IO[bytes]]:
    """An open safetensors file. Raises CorruptError if it is missing, or is not one."""
    with _opened(path) as file:
        try:
            yield file
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError):
            raise CorruptError(f"{path}: not a safetensors file") from None


def _read_bytes(path: Path) -> bytes:
    with _opened(path) as file:
        return file.read()


def _parse_json(path: Path, content: bytes) -> dict[str, Any]:
    try:
        document = json.loads(content.decode("utf-8"))
    except ValueError:
        raise CorruptError(f"{path}: not valid JSON") from None
    if not isinstance(document, dict):
        raise CorruptError(f"{path}: not a JSON object")
    return document


def _to_json(document: Any) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()


def _sync(directory: Path) -> None:
    """Makes the entries of a directory survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
