"""Decodes images according to their content, never according to their file names.

torchcodec decodes the common formats; Pillow reads every header and decodes the other formats.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import (
    ExifTags,
    Image,
    ImageOps,
    JpegImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)
from torch import Tensor
from torchcodec.decoders import decode_image, decode_jpeg

MAX_PIXELS = 64_000_000
MAX_SCANS = 32  # for the largest JPEG; up to 18 are common, and smaller JPEGs may have more

# No other format is opened. Pillow supports many more, and EPS starts a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

HEIC = (".heic", ".heif", ".hif")

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif",
    *(HEIC if find_spec("pillow_heif") else ()),
)  # fmt: skip
"""File name suffixes of images."""


class DecodeError(ValueError):
    """An image that is broken or rejected, with the reason in one line."""


def decode(data: bytes) -> torch.Tensor:
    """Decodes the first frame of an image, rotated according to its EXIF orientation.

    CMYK, grayscale, palette and 16-bit images become 8-bit RGB; alpha is dropped.

    HEIC requires pillow-heif.

    Returns:
        Shape (3, H, W), uint8 RGB, values 0 to 255, with channels innermost in memory.

    Raises:
        DecodeError: if the data is not an image, is broken, or would take more work to decode than
            an image of MAX_PIXELS pixels.
    """
    if not data:
        raise DecodeError("empty file")
    try:
        with warnings.catch_warnings(action="ignore"):
            return _decode(data)
    except (DecodeError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise DecodeError(f"not an image in a known format ({', '.join(_FORMATS)})") from None
    except Image.DecompressionBombError as error:
        claim = str(error).partition(" exceeds")[0]
        raise DecodeError(f"{claim} exceeds the limit of {MAX_PIXELS:,} pixels") from None
    except Exception as error:
        # Broken files make both libraries raise nearly any exception, even SyntaxError.
        raise DecodeError(_reason(error)) from error


def gpu_can_decode(data: bytes) -> bool:
    """Returns whether the GPU decodes as `decode` does: complete upright gray or YCbCr JPEGs."""
    try:
        with warnings.catch_warnings(action="ignore"):
            header = Image.open(io.BytesIO(data), formats=["JPEG"])
            _check_decoding_cost(header, data)
            upright = header.getexif().get(ExifTags.Base.Orientation, 1) == 1
    except Exception:
        return False
    # Adobe's marker or the names of the channels can indicate RGB without conversion.
    names = [name for name, *_ in getattr(header, "layer", ())]
    rgb = header.info.get("adobe_transform") == 0 or names == [*b"RGB"]
    supported = header.mode == "L" or (header.mode == "RGB" and not rgb)
    complete = b"\xff\xd9" in data[-64:]  # `decode` rejects truncated files
    return supported and complete and upright


def decode_on_gpu(
    contents: Sequence[Tensor], gpu_readable: NDArray[np.bool_], device: torch.device
) -> list[Tensor | None]:
    """Decodes JPEGs on a GPU, and all images that its decoder cannot read on the CPU.

    Args:
        contents: encoded bytes, each uint8 of shape (length,), on the CPU.
        gpu_readable: results of `gpu_can_decode`, shape (B,).

    Returns:
        Images as from `decode`, on `device`; None for images that cannot be decoded.
    """
    chosen = np.flatnonzero(gpu_readable).tolist()
    images: list[Tensor | None] = [None] * len(contents)
    try:
        found = decode_jpeg([contents[i] for i in chosen], mode="RGB", device=device)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:  # one broken image fails the entire call; decode each on the CPU
        found = []
    for i, image in zip(chosen, found, strict=False):
        images[i] = image
    for i, image in enumerate(images):
        if image is None:
            try:
                images[i] = decode(contents[i].numpy().tobytes()).to(device)
            except DecodeError:
                continue
    return images


def _decode(data: bytes) -> torch.Tensor:
    # Reading the header takes 22 us of the 1.2 ms for an ImageNet JPEG.
    header = Image.open(io.BytesIO(data), formats=_heif() if _is_heic(data) else _FORMATS)
    _check_decoding_cost(header, data)
    if _torchcodec_can_decode(header):
        return decode_image(data)
    return decode_pillow(header)


def _check_decoding_cost(header: Image.Image, data: bytes) -> None:
    """Raises DecodeError if decoding would take too much memory or time.

    Tiles are decoded completely, even if the image needs only a part of them, and each scan of a
    JPEG passes over all pixels.
    """
    W, H = header.size
    if W * H > MAX_PIXELS:
        raise DecodeError(f"Image size ({W}x{H} pixels) exceeds the limit of {MAX_PIXELS:,} pixels")
    if isinstance(header, TiffImagePlugin.TiffImageFile):
        w, h = (int(header.tag_v2.get(tag, side)) for tag, side in ((322, W), (323, H)))
        area = math.ceil(W / w) * w * math.ceil(H / h) * h
        if area > MAX_PIXELS:
            raise DecodeError(f"tiles of {area:,} pixels exceed the limit of {MAX_PIXELS:,} pixels")
    elif isinstance(header, JpegImagePlugin.JpegImageFile):
        limit = MAX_SCANS * MAX_PIXELS
        # Counting scans reads the entire file, so it is skipped if the file is too small to contain
        # too many of them; each scan takes at least 10 bytes.
        many = len(data) // 10 * W * H > limit and not _has_one_scan(header, data)
        scans = data.count(b"\xff\xda") if many else 1
        if many and scans * W * H > limit:
            raise DecodeError(f"{scans:,} scans of {W}x{H} pixels exceed the limit of {limit:,}")


def _has_one_scan(header: JpegImagePlugin.JpegImageFile, data: bytes) -> bool:
    """Returns whether the first scan contains all channels completely, as in baseline JPEGs."""
    assert header.fp is not None
    start = header.fp.tell() - 8 - 2 * header.layers
    return "progressive" not in header.info and data[start : start + 2] == b"\xff\xda"


def _is_heic(data: bytes) -> bool:
    """Returns whether the file's brands identify it as HEIC, not AVIF."""
    end = min(int.from_bytes(data[:4], "big"), 256)
    brands = [data[i : i + 4] for i in (8, *range(16, end, 4))] if data[4:8] == b"ftyp" else []
    return b"avif" not in brands and any(brand[:3] in (b"hei", b"hev") for brand in brands)


def _heif() -> tuple[str]:
    """Registers HEIC with Pillow; returns the format's name, or raises DecodeError."""
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports]
    except ImportError:
        fix = "run `pip install 'vitral[heic]'`"
        raise DecodeError(f"HEIC images need pillow-heif; {fix}") from None
    pillow_heif.register_heif_opener()
    return ("HEIF",)


def _torchcodec_can_decode(header: Image.Image) -> bool:
    """Returns whether torchcodec decodes this image correctly, and only one frame of it."""
    match header.format:
        case "JPEG" | "MPO":
            return True
        case "PNG":
            # Many color profiles make libpng write warnings to stderr, bypassing Python.
            return "icc_profile" not in header.info
        case "WEBP":
            return not getattr(header, "is_animated", False)
        case "AVIF":
            # torchcodec multiplies the colors of an AVIF by its alpha.
            return header.mode == "RGB" and not getattr(header, "is_animated", False)
        case _:
            return False  # torchcodec decodes every frame of a GIF, which can exhaust memory


def decode_pillow(image: Image.Image) -> torch.Tensor:
    """Decodes an opened Pillow image, as `decode` does. Raises DecodeError or Pillow's errors."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise DecodeError(f"32-bit pixels (mode {image.mode}): expected 8 or 16 bits per channel")
    if image.mode.startswith("I;16"):  # convert() would clip at 255
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _reason(error: Exception) -> str:
    """Returns the first line of an error, without torchcodec's leading C++ source position."""
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line.rpartition(".cpp:")[2].partition(", ")[2] if ".cpp:" in line else line
