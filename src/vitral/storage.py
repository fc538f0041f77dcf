"""Directories of safetensors and JSON, and single files, written whole or not at all.

A directory holds NAME.safetensors, NAME.json and, last, manifest.json with the size and SHA-256 of
every other file: a flipped bit, which safetensors loads silently, is found before it is used. There
are no pickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

MANIFEST = "manifest.json"


class CorruptError(Exception):
    """A directory that is not what was written; the message names the file and what is wrong."""


def write(
    directory: Path, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]
) -> None:
    """Writes or replaces `directory`: built beside its place, flushed to disk, renamed.

    A kill at any moment leaves the old content or the new, at worst for `recover` to put back.

    Args:
        directory: the place; its parent must exist.
        tensors: the tensors of each NAME.safetensors.
        documents: the content of each NAME.json.

    Raises:
        OSError: nothing is left behind and what was there before still is.
    """
    building = directory.with_name(f".{directory.name}.new")
    retired = directory.with_name(f".{directory.name}.old")
    recover(directory)
    shutil.rmtree(building, ignore_errors=True)
    shutil.rmtree(retired, ignore_errors=True)
    building.mkdir()
    try:
        files = {}
        for name, group in tensors.items():
            plain = {key: value.detach().cpu().contiguous() for key, value in group.items()}
            files[f"{name}.safetensors"] = safetensors.torch.save(plain)
        for name, document in documents.items():
            files[f"{name}.json"] = _to_json(document)
        manifest = {name: _describe(data) for name, data in files.items()}
        for name, data in {**files, MANIFEST: _to_json(manifest)}.items():
            _write_file(building / name, data)
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
    """A place beside `path` to write a file at, which takes its place unless an error comes."""
    building = path.with_name(f".{path.name}.new")
    try:
        yield building
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)


def recover(directory: Path) -> None:
    """Puts back what a kill between the two renames of `write` left aside."""
    retired = directory.with_name(f".{directory.name}.old")
    if retired.exists() and not directory.exists():
        retired.rename(directory)


def verify(directory: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        CorruptError: for a missing file, one with another content, or one that is not listed.
    """
    manifest = read_json(directory, MANIFEST)
    for path in [*directory.glob("*.safetensors"), *directory.glob("*.json")]:
        if path.name not in manifest and path.name != MANIFEST:
            raise CorruptError(f"{path}: not in the manifest")
    for name, expected in manifest.items():
        try:
            data = (directory / name).read_bytes()
        except OSError as error:
            raise CorruptError(f"{directory / name}: {error.strerror}") from None
        if _describe(data) != expected:
            raise CorruptError(f"{directory / name}: its content is not what was written")


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of `directory`; raises CorruptError if it holds none."""
    try:
        document = json.loads((directory / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise CorruptError(f"{directory / name}: {error.strerror}") from None
    except ValueError:
        raise CorruptError(f"{directory / name}: not valid JSON") from None
    if not isinstance(document, dict):
        raise CorruptError(f"{directory / name}: not a JSON object")
    return document


def read_tensors(directory: Path, name: str) -> dict[str, Tensor]:
    """The tensors of NAME.safetensors, on the CPU; raises CorruptError if they cannot be read."""
    path = directory / f"{name}.safetensors"
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise CorruptError(f"{path}: {error}") from None


def _to_json(document: Any) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()


def _describe(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """Makes the entries of a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
