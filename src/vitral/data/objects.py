"""Items of a Python dataset as records, such as one of torchvision, torch or Hugging Face."""

from __future__ import annotations

import io
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitral.data.decode import DecodeError, decode_pillow
from vitral.data.sampling import Integers

PATH = "python:dataset"
"""`data.path` of a run on a Python dataset."""
IMAGES, LABELS = ("image", "img"), ("label", "labels", "fine_label")  # keys of an item


class Source(Protocol):
    """A map-style dataset: each item is (image, label), or a mapping with both.

    The image is a PIL image, a uint8 tensor (C, H, W) or a uint8 array (H, W, C) or (H, W); the
    label is an integer.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class Objects:
    """Items of a Python dataset; implements `Encoded`."""

    source: Source
    rows: Integers
    """Indices of the items in `source`. Shape (N,)."""
    labels: Integers
    """Label of each item. Shape (N,)."""
    digest: str
    """Identifies the images of `source`."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def names(self) -> NDArray[np.bytes_]:
        """Indices of the items in decimal. Shape (N,)."""
        return self.rows.astype(np.bytes_)

    def image(self, i: int) -> Tensor:
        """Returns image `i` as `decode` does: uint8, (3, H, W), channels innermost in memory.

        Raises:
            DecodeError: if the item cannot be read, or its label has changed since the first read.
        """
        image, label = read_item(self.source, int(self.rows[i]))
        if label != self.labels[i]:
            raise DecodeError(f"label changed from {self.labels[i]} to {label}")
        return image

    def read(self, i: int) -> bytes:
        """Returns image `i` as a PNG."""
        content = io.BytesIO()
        Image.fromarray(self.image(i).permute(1, 2, 0).numpy()).save(content, "PNG")
        return content.getvalue()

    def where(self, i: int) -> str:
        """Returns the location of image `i`, for messages."""
        return f"item {self.rows[i]}"

    def take(self, chosen: NDArray[np.bool_]) -> Objects:
        """Returns the images where `chosen`, shape (N,), is true."""
        return replace(self, rows=self.rows[chosen], labels=self.labels[chosen])

    def identity(self) -> Iterator[bytes]:
        """Yields the digest and the indices of the items."""
        yield self.digest.encode()
        yield np.ascontiguousarray(self.rows, "<i8").tobytes()


def read_item(source: Source, index: int) -> tuple[Tensor, int]:
    """Returns the image of an item, as `decode` does, and its label.

    Raises:
        DecodeError: if the item is not an image with a label.
    """
    try:
        item = source[index]
        if isinstance(item, Mapping):
            image, label = _value(item, IMAGES), _value(item, LABELS)
        else:
            image, label = item
        return _to_pixels(image), operator.index(label)
    except (OSError, SyntaxError) as error:  # a missing or broken file; Pillow raises both
        raise DecodeError(str(error)) from error
    except (TypeError, ValueError) as error:
        if isinstance(error, DecodeError):
            raise
        raise DecodeError(f"expected (image, integer label): {error}") from error


def _value(item: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    for key in keys:
        if key in item:
            return item[key]
    raise DecodeError(f"expected a key {' or '.join(keys)}, got {', '.join(map(str, item))}")


def _to_pixels(image: Any) -> Tensor:
    if isinstance(image, Image.Image):
        return decode_pillow(image)
    if not isinstance(image, Tensor | np.ndarray):
        kinds = "a PIL image, a uint8 tensor (C, H, W) or a uint8 array (H, W, C)"
        raise DecodeError(f"expected {kinds}, got {type(image).__name__}")
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.ndim == 3 and isinstance(image, Tensor):
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        layout = "(C, H, W)" if isinstance(image, Tensor) else "(H, W, C)"
        got = f"{array.dtype} of shape {tuple(image.shape)}"
        raise DecodeError(f"expected uint8 of shape {layout} with 1, 3 or 4 channels, got {got}")
    rgb = array.repeat(3, axis=2) if array.shape[2] == 1 else array[:, :, :3]
    return torch.from_numpy(np.array(rgb, order="C")).permute(2, 0, 1)
