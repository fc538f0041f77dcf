import io
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from vitral.data import decode as module
from vitral.data.decode import DecodeError, decode

HEIGHT, WIDTH = 24, 36


@pytest.fixture(autouse=True)
def _nothing_printed(capfd):
    yield
    assert capfd.readouterr() == ("", "")


def picture(channels=3):
    """A smooth image that any rotation or flip changes. Shape (H, W, channels)."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    planes = [40 + 5 * x, 220 - 8 * y, 20 + 3 * x + 3 * y, 255 - 6 * x][:channels]
    return np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def reference(data):
    """The image as decoded by Pillow. Shape (3, H, W)."""
    with warnings.catch_warnings(action="ignore"):
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def assert_decodes_to(data, expected, tolerance=0):
    image = decode(data)
    assert image.dtype == torch.uint8
    assert image.shape == expected.shape
    assert (image.int() - expected.int()).abs().max() <= tolerance


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width, height, bits, color, rows):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(Image.fromarray(picture()), kind, exif=exif, **options)
    sides = (HEIGHT, WIDTH) if orientation < 5 else (WIDTH, HEIGHT)
    assert decode(data).shape == (3, *sides)
    assert_decodes_to(data, reference(data), tolerance=3 if kind == "JPEG" else 0)


def drop_adobe_marker(data):
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


@pytest.mark.parametrize("adobe", [True, False])
def test_cmyk_jpeg(adobe):
    data = encoded(Image.fromarray(picture(4), "CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data
    if not adobe:
        data = drop_adobe_marker(data)
        assert b"Adobe" not in data
    assert_decodes_to(data, reference(data), tolerance=3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF"])
def test_grayscale_becomes_three_equal_channels(kind):
    data = encoded(Image.fromarray(picture(1)[..., 0]), kind)
    assert_decodes_to(data, reference(data))
    assert decode(data).unique(dim=0).shape[0] == 1


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP"])
def test_palette(kind):
    data = encoded(Image.fromarray(picture()).quantize(16), kind)
    assert_decodes_to(data, reference(data))


def test_palette_with_transparent_entries_keeps_its_colors():
    image = Image.fromarray(picture()).quantize(16)
    data = encoded(image, "PNG", transparency=bytes(range(0, 256, 16)))
    assert_decodes_to(data, reference(data))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_alpha_is_dropped_and_not_blended(kind):
    pixels = picture(4)
    pixels[..., 3] = np.linspace(1, 255, WIDTH)
    options = {"WEBP": {"lossless": True, "exact": True}, "AVIF": {"quality": 95}}.get(kind, {})
    data = encoded(Image.fromarray(pixels, "RGBA"), kind, **options)
    tolerance = 3 if kind == "AVIF" else 0
    assert_decodes_to(data, reference(data), tolerance)
    expected = torch.from_numpy(pixels[..., :3]).permute(2, 0, 1)
    assert_decodes_to(data, expected, 12 if kind == "AVIF" else 0)


def test_gray_with_alpha():
    data = encoded(Image.fromarray(picture(2), "LA"), "PNG")
    assert_decodes_to(data, reference(data))


@pytest.mark.parametrize(("color", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_scaled_and_not_clipped(color, channels):
    deep = picture(channels).astype(">u2") * 256 + 99
    rows = b"".join(b"\0" + row.tobytes() for row in deep.astype(">u2"))
    data = png(WIDTH, HEIGHT, 16, color, rows)
    gray = channels < 3
    expected = torch.from_numpy(deep[..., :1] if gray else deep[..., :3]).double() / 257
    expected = expected.permute(2, 0, 1).expand(3, -1, -1)
    assert_decodes_to(data, expected.round().int(), tolerance=1)


def test_sixteen_bit_tiff_is_scaled():
    deep = picture(1)[..., 0].astype(np.uint16) * 257
    data = encoded(Image.fromarray(deep), "TIFF")
    assert_decodes_to(data, torch.from_numpy(picture(1)[..., 0]).expand(3, -1, -1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
def test_the_format_is_detected_from_the_bytes(kind):
    lossy = kind in ("JPEG", "WEBP", "AVIF")
    data = encoded(Image.fromarray(picture()), kind)
    assert_decodes_to(data, reference(data), tolerance=3 if lossy else 0)
    expected = torch.from_numpy(picture()).permute(2, 0, 1).double()
    assert (decode(data) - expected).abs().mean() < 12


def test_a_png_named_jpeg_decodes(tmp_path):
    path = tmp_path / "n02105855_2933.JPEG"
    path.write_bytes(encoded(Image.fromarray(picture()), "PNG"))
    assert_decodes_to(path.read_bytes(), torch.from_numpy(picture()).permute(2, 0, 1))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_an_animation_gives_its_first_frame(kind):
    first, *others = (Image.fromarray(np.roll(picture(), k * 5, axis=1)) for k in range(3))
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(first, kind, save_all=True, append_images=others, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert_decodes_to(data, reference(data), tolerance=3 if kind == "AVIF" else 0)


def test_an_invalid_color_profile_prints_nothing():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(picture()).quantize(16)
    profile = b"\0" * 132  # an invalid profile header
    # Pillow also warns about transparent entries.
    options = {"icc_profile": profile, "exif": exif, "transparency": bytes(range(0, 256, 16))}
    data = encoded(image, "PNG", **options)
    assert decode(data).shape == (3, WIDTH, HEIGHT)
    assert_decodes_to(data, reference(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_common_images_take_the_fast_path(monkeypatch, kind):
    monkeypatch.setattr(module, "decode_pillow", None)
    assert decode(encoded(Image.fromarray(picture()), kind)).shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.9])
def test_a_truncated_file_is_broken(kind, fraction):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with pytest.raises(DecodeError) as caught:
        decode(data[: int(len(data) * fraction)])
    assert len(str(caught.value).splitlines()) == 1
    assert ".cpp" not in str(caught.value)


@pytest.mark.parametrize("junk", [b"not an image, but a text file\n" * 9, b"\0" * 500, b"\xff\xd8"])
def test_non_images_are_rejected(junk):
    with pytest.raises(DecodeError, match="not an image in a known format"):
        decode(junk)


def test_an_empty_file_is_reported_as_empty():
    with pytest.raises(DecodeError, match=r"^empty file$"):
        decode(b"")


def test_postscript_is_never_opened():
    with pytest.raises(DecodeError, match="not an image in a known format"):
        decode(encoded(Image.fromarray(picture()), "EPS"))


def claim(data, width, height):
    """A JPEG whose header claims another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (8_001, 8_000)])
def test_a_decompression_bomb_is_rejected_from_its_header(monkeypatch, kind, width, height):
    def opened(*_):
        pytest.fail("it was decoded")

    monkeypatch.setattr(module, "decode_image", opened)
    monkeypatch.setattr(module, "decode_pillow", opened)
    small = encoded(Image.fromarray(picture()), "JPEG")
    bomb = claim(small, width, height) if kind == "JPEG" else png(width, height, 8, 2, b"\0" * 99)
    with pytest.raises(DecodeError, match="exceeds the limit of 64,000,000 pixels"):
        decode(bomb)


def tiled(width, height, side):
    """A TIFF with one tile."""
    content = zlib.compress(bytes(1 << 20))
    tags = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side}
    entries = {**tags, 324: 200, 325: len(content)}
    packed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    header = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed
    return header.ljust(200, b"\0") + content


def test_tiles_count_against_the_limit(monkeypatch):
    monkeypatch.setattr(module, "decode_pillow", None)
    with pytest.raises(DecodeError, match="tiles of 2,116,000,000 pixels exceed the limit"):
        decode(tiled(8, 8, 46_000))
    monkeypatch.undo()
    assert decode(tiled(8, 8, 1024)).shape == (3, 8, 8)


def repeated(data, times):
    """A JPEG with repeated copies of its last scan."""
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[start:end] * times + data[end:]


def separate(data):
    """A sequential JPEG whose single scan, of three channels, claims to contain only the first."""
    at = data.index(b"\xff\xda")
    return data[: at + 2] + b"\0\x08\1\1\0\0\x3f\0" + data[at + 14 :]


@pytest.mark.parametrize("progressive", [False, True])
def test_scans_count_against_the_limit(monkeypatch, progressive):
    monkeypatch.setattr(module, "decode_image", None)
    monkeypatch.setattr(module, "MAX_PIXELS", HEIGHT * WIDTH)
    data = encoded(Image.fromarray(picture()), "JPEG", progressive=progressive)
    data = repeated(data if progressive else separate(data), module.MAX_SCANS)
    assert not module.gpu_can_decode(data)
    with pytest.raises(DecodeError, match=r"4\d|3\d scans of 36x24 pixels exceed the limit"):
        decode(data)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_usual_number_of_scans_is_accepted(monkeypatch, mode):
    monkeypatch.setattr(module, "MAX_PIXELS", HEIGHT * WIDTH)
    data = encoded(Image.fromarray(picture()).convert(mode), "JPEG", progressive=True)
    assert decode(data).shape == (3, HEIGHT, WIDTH)


def test_scans_are_counted_only_if_there_are_several(monkeypatch):
    """Counting reads the entire file."""
    monkeypatch.setattr(module, "MAX_SCANS", 0)
    assert decode(encoded(Image.fromarray(picture()), "JPEG")).shape == (3, HEIGHT, WIDTH)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)


def test_heic_without_its_library_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    message = r"^HEIC images need pillow-heif; run `pip install 'vitral\[heic\]'`$"
    with pytest.raises(DecodeError, match=message):
        decode(HEIC)


def test_heic():
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    data = encoded(Image.fromarray(picture()), "HEIF", quality=95)
    assert_decodes_to(data, reference(data))
    assert_decodes_to(data, torch.from_numpy(picture()).permute(2, 0, 1), tolerance=12)
    with pytest.raises(DecodeError):
        decode(HEIC)
    assert ".heic" in module.SUFFIXES


def test_an_image_at_the_cap_is_accepted(monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", HEIGHT * WIDTH)
    data = encoded(Image.fromarray(picture()), "PNG")
    assert_decodes_to(data, reference(data))
    monkeypatch.setattr(module, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(DecodeError, match="exceeds the limit"):
        decode(data)


def test_a_png_with_a_color_profile_is_rotated():
    """Pillow decodes it, and leaves the rotation to its caller."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", exif=exif, icc_profile=profile)
    rotated = np.rot90(pixels, -1).transpose(2, 0, 1)
    assert np.array_equal(decode(content.getvalue()).numpy(), rotated)
