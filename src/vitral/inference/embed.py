"""Computes feature vectors of images and writes them to files."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitral.errors import UserError, printable
from vitral.inference.predict import Classifier
from vitral.storage import replacing


@dataclass(frozen=True)
class Features:
    """Feature vectors of the images that could be read, in the order of the paths."""

    paths: list[str]
    vectors: NDArray[np.float32]
    """(n, D)."""
    model: str
    """The weights that computed them."""
    normalized: bool
    """Whether each vector has length 1."""
    unreadable: list[str]
    """Paths of images without a vector."""


def embed(
    weights: Classifier,
    paths: Sequence[str],
    *,
    normalize: bool = False,
    image_size: int | None = None,
    batch_size: int = 64,
    workers: int | None = None,
) -> Features:
    """Computes the head's input for each image.

    This is the CLS token or the mean of the patch tokens, after the last norm.

    Args:
        paths: image files. Files that cannot be read are reported and skipped.
        normalize: whether to scale each vector to length 1.
        image_size: side length of the model's input, in pixels; None uses the training size.
        batch_size: images per forward pass.
        workers: number of decoding processes; None uses all cores but one.

    Raises:
        UserError: if an argument is invalid.
    """
    options = {"image_size": image_size, "batch_size": batch_size, "workers": workers}
    vectors = weights.embed(list(paths), **options)
    found = [bool(np.isfinite(vector).all()) for vector in vectors]
    unreadable = [path for path, good in zip(paths, found, strict=True) if not good]
    for path in unreadable:
        print(f"vitral: {printable(path)}: cannot be read", file=sys.stderr)
    vectors = vectors[np.array(found, bool)]
    if normalize:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    kept = [path for path, good in zip(paths, found, strict=True) if good]
    source = weights.description.source or str(weights.path)
    return Features(kept, vectors, source, normalize, unreadable)


def write(features: Features, path: Path) -> None:
    """Writes a .npz with `paths`, `features`, `model` and `normalized`, or rows to a .parquet.

    Raises:
        UserError: if pyarrow is not installed.
    """
    names = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in features.paths]
    model = printable(features.model)
    if path.suffix == ".npz":
        with replacing(path) as building, building.open("wb") as file:
            np.savez(
                file,
                paths=np.array(names),
                features=features.vectors,
                model=np.array(model),
                normalized=np.array(features.normalized),
            )
        return
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            f"out: {path}: expected the package pyarrow, got none; "
            "run `pip install 'vitral[parquet]'`"
        ) from None
    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(features.vectors.ravel()), features.vectors.shape[1]
    )
    metadata = {"model": model, "normalized": str(features.normalized).lower()}
    table = pa.table({"path": names, "features": vectors}).replace_schema_metadata(metadata)
    with replacing(path) as building, building.open("wb") as file:
        pq.write_table(table, file)
