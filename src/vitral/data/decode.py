"""Encoded bytes to pixels, by what the bytes are and never by a file's name.

torchcodec decodes what people mostly have; Pillow reads every header, and decodes the rest.
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
MAX_SCANS = 32  # of the largest JPEG, usual are up to 18; a smaller one may have more

# All that is ever opened: Pillow knows many more, of which EPS starts a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

HEIC = (".heic", ".heif", ".hif")

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif",
    *(HEIC if find_spec("pillow_heif") else ()),
)  # fmt: skip
"""Of image files."""


class DecodeError(ValueError):
    """A broken or refused image: one line that says what is wrong with it."""


def decode(data: bytes) -> torch.Tensor:
    """Decode the first frame of an image, turned as its EXIF orientation says.

    CMYK, greyscale, palette and 16-bit images become 8-bit RGB; alpha is dropped.

    HEIC needs pillow-heif.

    Returns:
        Shape (3, H, W), uint8 RGB, values 0 to 255; channels lie innermost in memory.

    Raises:
        DecodeError: the data is no image, is broken, or takes more work to decode than MAX_PIXELS
            pixels do, as the header claims it.
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
        raise DecodeError(f"{claim} exceeds the cap of {MAX_PIXELS:,} pixels") from None
    except Exception as error:
        # Broken files make both libraries raise nearly anything, SyntaxError and struct.error too.
        raise DecodeError(_reason(error)) from error


def gpu_can_decode(data: bytes) -> bool:
    """Whether the GPU's decoder gives what `decode` does: a whole, upright JPEG, grey or YCbCr."""
    try:
        with warnings.catch_warnings(action="ignore"):
            header = Image.open(io.BytesIO(data), formats=["JPEG"])
            _check_decoding_cost(header, data)
            upright = header.getexif().get(ExifTags.Base.Orientation, 1) == 1
    except Exception:
        return False
    # Colours that are RGB in the file, too, by Adobe's mark or by the names of the channels.
    names = [name for name, *_ in getattr(header, "layer", ())]
    rgb = header.info.get("adobe_transform") == 0 or names == [*b"RGB"]
    usual = header.mode == "L" or (header.mode == "RGB" and not rgb)
    ends = b"\xff\xd9" in data[-64:]  # `decode` refuses what is cut short
    return usual and ends and upright


def decode_on_gpu(
    contents: Sequence[Tensor], gpu_readable: NDArray[np.bool_], device: torch.device
) -> list[Tensor | None]:
    """Decode JPEGs on a GPU, and everything that its decoder does not read on the CPU.

    Args:
        contents: encoded bytes, each uint8 of shape (length,), on the CPU.
        plain: what `gpu_can_decode` said of each, shape (B,).

    Returns:
        An image for each, as `decode` gives it, on `device`; None where it cannot be decoded.
    """
    chosen = np.flatnonzero(gpu_readable).tolist()
    images: list[Tensor | None] = [None] * len(contents)
    try:
        found = decode_jpeg([contents[i] for i in chosen], mode="RGB", device=device)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:  # one broken image spoils the call: each alone, then, on the CPU
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
    # Reading the header takes 22 us of the 1.2 ms that an ImageNet JPEG takes.
    header = Image.open(io.BytesIO(data), formats=_heif() if _is_heic(data) else _FORMATS)
    _check_decoding_cost(header, data)
    if _torchcodec_can_decode(header):
        return decode_image(data)
    return decode_pillow(header)


def _check_decoding_cost(header: Image.Image, data: bytes) -> None:
    """Raises DecodeError where decoding would take too much memory or time.

    Tiles are decoded completely, however little of them the image needs, and each scan of a JPEG
    passes over all pixels.
    """
    W, H = header.size
    if W * H > MAX_PIXELS:
        raise DecodeError(f"Image size ({W}x{H} pixels) exceeds the cap of {MAX_PIXELS:,} pixels")
    if isinstance(header, TiffImagePlugin.TiffImageFile):
        w, h = (int(header.tag_v2.get(tag, side)) for tag, side in ((322, W), (323, H)))
        area = math.ceil(W / w) * w * math.ceil(H / h) * h
        if area > MAX_PIXELS:
            raise DecodeError(f"tiles of {area:,} pixels exceed the cap of {MAX_PIXELS:,} pixels")
    elif isinstance(header, JpegImagePlugin.JpegImageFile):
        cap = MAX_SCANS * MAX_PIXELS
        # Counting reads all of the file, so only where there is room for too many: 10 bytes each.
        many = len(data) // 10 * W * H > cap and not _has_one_scan(header, data)
        scans = data.count(b"\xff\xda") if many else 1
        if many and scans * W * H > cap:
            raise DecodeError(f"{scans:,} scans of {W}x{H} pixels exceed the cap of {cap:,}")


def _has_one_scan(header: JpegImagePlugin.JpegImageFile, data: bytes) -> bool:
    """Whether the header of a JPEG ends with that of a scan that holds all channels completely."""
    assert header.fp is not None
    start = header.fp.tell() - 8 - 2 * header.layers
    return "progressive" not in header.info and data[start : start + 2] == b"\xff\xda"


def _is_heic(data: bytes) -> bool:
    """Whether the brands at the beginning of a file are those of HEIC, and not of AVIF."""
    end = min(int.from_bytes(data[:4], "big"), 256)
    brands = [data[i : i + 4] for i in (8, *range(16, end, 4))] if data[4:8] == b"ftyp" else []
    return b"avif" not in brands and any(brand[:3] in (b"hei", b"hev") for brand in brands)


def _heif() -> tuple[str]:
    """The name of Pillow's format for HEIC, registered. Raises DecodeError without pillow-heif."""
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DecodeError("HEIC; pip install 'vitral[heic]' to read it") from None
    pillow_heif.register_heif_opener()
    return ("HEIF",)


def _torchcodec_can_decode(header: Image.Image) -> bool:
    """Whether torchcodec decodes this image as wanted, and but one frame of it."""
    match header.format:
        case "JPEG" | "MPO":
            return True
        case "PNG":
            # Many colour profiles make libpng write warnings to stderr, past Python.
            return "icc_profile" not in header.info
        case "WEBP":
            return not getattr(header, "is_animated", False)
        case "AVIF":
            # torchcodec multiplies the colours of an AVIF by its alpha.
            return header.mode == "RGB" and not getattr(header, "is_animated", False)
        case _:
            return False  # of a GIF it decodes every frame: a small file can fill the memory


def decode_pillow(image: Image.Image) -> torch.Tensor:
    """What `decode` gives, of an image that Pillow has opened. Raises DecodeError, and Pillow's."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise DecodeError(f"32-bit pixels (mode {image.mode}): expected 8 or 16 bits a channel")
    if image.mode.startswith("I;16"):  # convert() would clip at 255
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _reason(error: Exception) -> str:
    """The first line of the error, without the C++ source position that torchcodec puts first."""
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line.rpartition(".cpp:")[2].partition(", ")[2] if ".cpp:" in line else line
