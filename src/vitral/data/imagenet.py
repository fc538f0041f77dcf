"""Class names and validation labels of ImageNet-1K (ILSVRC2012), which its image archives lack."""

from __future__ import annotations

import hashlib
import lzma
from functools import lru_cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray


@lru_cache
def _lemmas() -> dict[str, str]:
    """Returns class names by wnid, sorted by wnid."""
    text = (files("vitral.data") / "imagenet_classes.txt").read_bytes()
    assert hashlib.sha256(text).hexdigest().startswith("acf75ef0abe89694")
    return dict(line.split(" ", 1) for line in text.decode().splitlines())


@lru_cache
def wnids() -> tuple[str, ...]:
    """Returns the WordNet IDs of the 1,000 classes, sorted: `n01440764` is the first."""
    return tuple(_lemmas())


def human_name(wnid: str) -> str | None:
    """Returns all names of a class, such as `tench, Tinca tinca`; None if `wnid` is unknown.

    `crane` occurs twice: n02012849 is the bird, n03126707 the machine.
    """
    return _lemmas().get(wnid)


def display(name: str) -> str:
    """Returns a class name for display: `n01440764 tench` for a wnid, other names unchanged."""
    short = short_name(name)
    return name if short == name else f"{name} {short}"


def short_name(name: str) -> str:
    """Returns the first human-readable name of a wnid, such as `tench`; other names unchanged."""
    known = human_name(name)
    return known.split(", ")[0] if known else name


@lru_cache
def validation_labels() -> NDArray[np.int64]:
    """Returns the validation labels as indices into `wnids()`, in file name order. Shape (50000,).

    The first label is that of ILSVRC2012_val_00000001.JPEG. The labels are the ground truth of the
    development kit, which numbers the classes in a different order.
    """
    packed = (files("vitral.data") / "imagenet_val.xz").read_bytes()
    raw = lzma.decompress(packed)
    assert hashlib.sha256(raw).hexdigest().startswith("f5350687a5a78da7")
    labels = np.frombuffer(raw, "<u2").astype(np.int64)
    labels.flags.writeable = False
    return labels
