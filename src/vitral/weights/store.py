"""Writing, finding and loading weight directories."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from vitral import hub, storage
from vitral.errors import UserError
from vitral.model import ViT
from vitral.rundir import CONFIG, RunDir
from vitral.storage import MANIFEST, TENSORS
from vitral.weights import public
from vitral.weights.description import Description, Weights, Which
from vitral.weights.equivalents import explain

DESCRIPTION = "config.json"


def save(
    directory: Path, states: Mapping[str, Mapping[str, Tensor]], description: Description
) -> None:
    """Writes or replaces a weight directory. Raises OSError."""
    storage.write(directory, states, {"config": description.to_document()})


def backbone_digest(model: ViT) -> str:
    """Returns a digest of all weights except those of the head."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not name.startswith("head."):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_description(path: str | Path) -> tuple[Path, Description]:
    """Returns the weight directory for `path` and its description, without reading tensors.

    Raises:
        UserError: if `load` would raise it.
    """
    directory = find(path)
    return directory, storage.consistent(directory, lambda: _describe(directory, path))


def _describe(directory: Path, path: str | Path) -> Description:
    try:
        storage.check_files(directory)
        document = storage.read_json(directory, DESCRIPTION)
    except storage.CorruptError as error:
        raise UserError(f"weights: {error}; {_fix(path)}") from None
    description = Description.from_document(document, directory)
    which = _file_of(Path(path))
    return dataclasses.replace(description, default=which) if which else description


def load(path: str | Path, *, which: Which | None = None, device: str = "cpu") -> Weights:
    """Loads weights for use.

    Args:
        path: a weight directory; a run directory, whose best weights are used; a file in one of
            them; weights on the Hugging Face Hub, `hf-hub:owner/name[@revision]`; or a pretrained
            model, `timm:NAME[.tag][@revision]`.
        which: "model" or "ema". Default: as stored with the weights.
        device: device of the model; "meta" reads only the shapes and does not verify the tensors.

    Raises:
        UserError: if there are no weights at the path, they are corrupt, or they were written by a
            newer version of vitral.
    """
    directory = find(path)
    return storage.consistent(directory, lambda: _load(directory, path, which, device))


def _load(directory: Path, path: str | Path, which: Which | None, device: str) -> Weights:
    description = _describe(directory, path)
    default, which = description.default, which or description.default
    description = dataclasses.replace(description, default=which)
    file = directory / f"{which}{TENSORS}"
    if not file.exists():
        raise UserError(f"weights: {directory} contains no {which} weights, only {default}")
    if description.multi_label and not description.thresholds:
        raise UserError(
            f"weights: {directory}: config.json: expected thresholds for the {which} weights, got "
            "none; copy the weights again"
        )
    read = storage.read_shapes if device == "meta" else storage.read_tensors
    try:
        state = read(directory, which)
    except storage.CorruptError as error:
        raise UserError(f"weights: {error}; {_fix(path)}") from None
    with torch.device("meta"):
        model = ViT(description.config.model, len(description.classes))
    _check_tensors(model.state_dict(), state, file)
    model.load_state_dict(state, assign=True)
    return Weights(model.to(device).eval().requires_grad_(False), description, directory)


def find(path: str | Path) -> Path:
    """Returns the weight directory for `path`: itself, or a run's best or last weights.

    A file such as config.yaml or model.safetensors stands for the directory that contains it.

    Only `timm:NAME` and `hf-hub:owner/name` use the network, at the first use; the result is the
    directory in the cache.

    Raises:
        UserError: if there is none.
    """
    if name := public_name(str(path)):
        return public.fetch(name)
    if str(path).startswith(hub.PREFIX):
        try:
            return hub.download(str(path))
        except hub.NoWeightsError as error:
            raise explain(error) from None
    given = path = Path(path)
    if path.name in (CONFIG, DESCRIPTION, MANIFEST) or _file_of(path):
        path = path.parent if path.is_file() else path
    run = RunDir(path)
    for candidate in (path, run.best, run.last):
        for place in storage.places(candidate):
            if (place / DESCRIPTION).is_file():
                return place
    what = "no such directory" if not given.exists() else "no weights found"
    named = hub.NAME.fullmatch(str(path).partition("@")[0]) and not path.exists()
    hint = f"; if it is on the Hugging Face Hub, use {hub.PREFIX}{path}" if named else ""
    raise UserError(
        f"weights: {given}: {what}; expected a directory with {DESCRIPTION} and model.safetensors, "
        f"such as runs/NAME or runs/NAME/{run.best.relative_to(path)}{hint}"
    )


def _file_of(path: Path) -> Which | None:
    """Returns which weights a file contains, by its name."""
    return next((which for which in get_args(Which) if path.name == f"{which}{TENSORS}"), None)


def public_name(path: str) -> str | None:
    """Returns `timm:NAME` for a pretrained model, including hf-hub:timm/NAME, otherwise None."""
    timms = f"{hub.PREFIX}timm/"
    if path.startswith(timms):
        return public.PREFIX + path.removeprefix(timms)
    return path if path.startswith(public.PREFIX) else None


def _fix(path: str | Path) -> str:
    """Returns advice on how to repair corrupt weights."""
    if public_name(str(path)):
        return f"remove {find(path)} and try again"
    if str(path).startswith(hub.PREFIX):
        return "remove it from the cache with `hf cache` and try again, or inform its owner"
    return (
        "copy it again, or repeat `vitral train` with the run's "
        f"{CONFIG}, which restores it from a checkpoint"
    )


def _check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], file: Path) -> None:
    """Raises UserError unless the tensors are those of the model that config.json describes."""
    for name in sorted(expected.keys() | found.keys()):
        wanted, got = (_form(tensors.get(name)) for tensors in (expected, found))
        if wanted != got:
            raise UserError(
                f"weights: {file}: {name}: expected {wanted} according to {DESCRIPTION}, got "
                f"{got}; the two belong to different models: copy the directory again"
            )


def _form(tensor: Tensor | None) -> str:
    if tensor is None:
        return "none"
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
