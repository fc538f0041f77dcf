"""All ways from records to crops give the same crops; the GPU's way runs on the CPU here."""

import io
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vitral.config import AugmentConfig, Config, DataConfig
from vitral.data import fetch as module
from vitral.data.decode import gpu_can_decode
from vitral.data.fetch import GPU_CHUNK, Request, fetch
from vitral.data.formats import open_dataset
from vitral.data.records import Packed

CPU = torch.device("cpu")
SIDE = 16
EMPTY, TRUNCATED, MISSING = "empty.jpg", "truncated.jpg", "with_nothing.jpg"


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def files(size):
    """Encoded images by name, including two broken ones. `size` is width and height."""
    draw = np.random.default_rng(sum(size))
    coarse = draw.integers(0, 256, (6, 5, 4), np.uint8)
    color, ink = (
        Image.fromarray(coarse[..., :n], mode).resize(size) for n, mode in ((3, "RGB"), (4, "CMYK"))
    )
    jpeg = encoded(color, "JPEG", quality=95)
    return {
        "color.jpg": jpeg,
        "gray.jpg": encoded(color.convert("L"), "JPEG"),
        "ink.jpg": encoded(ink, "JPEG"),
        "progressive.jpg": encoded(color, "JPEG", progressive=True),
        "rotated.jpg": encoded(color, "JPEG", exif=exif_orientation(6)),
        "upright.jpg": encoded(color, "JPEG", exif=exif_orientation(1)),
        "picture.png": encoded(color, "PNG"),
        "picture.webp": encoded(color, "WEBP"),
        EMPTY: b"",
        TRUNCATED: jpeg[: len(jpeg) // 2],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of images in several sizes, and a third one of squares with side SIDE."""
    root = tmp_path_factory.mktemp("mixed")
    sizes = {"a": (40, 30), "b": (23, 51), "squares": (SIDE, SIDE)}
    for name, size in sizes.items():
        (root / name).mkdir()
        for file, content in files(size).items():
            (root / name / file).write_bytes(content)
        (root / name / MISSING).symlink_to("nowhere.jpg")
    return root


def open_folder(folder, **settings):
    data = DataConfig(path=str(folder), eval_crop=1.0, **settings)
    # Without splits, all images are validation images.
    return data, open_dataset(data, SIDE, 0, train=False).val


def requests(indices):
    """Three requests, each with its own epoch and image size."""
    parts = np.array_split(indices, 3)
    sides = (SIDE, 2 * SIDE, 8)
    return [
        Request(n, 0, side, np.full(len(part), n), part)
        for n, (side, part) in enumerate(zip(sides, parts, strict=True))
    ]


CROPS = [AugmentConfig(crop=crop) for crop in ("none", "resized", "padded")]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("augment", CROPS, ids=lambda config: config.crop)
@pytest.mark.parametrize("workers", [0, 2])
def test_gpu_crops_equal_cpu_crops(folder, augment, workers, interpolation):
    data, records = open_folder(folder, interpolation=interpolation)
    config = Config(data=data, augment=augment)
    indices = np.random.default_rng(0).permutation(np.tile(np.arange(len(records)), 4))
    wanted = requests(indices)
    assert len(wanted[0].indices) > GPU_CHUNK
    ours = list(fetch(records, config, wanted, workers, CPU, "gpu"))
    expected = list(fetch(records, config, wanted, 0, CPU))
    assert [fetched.request.step for fetched in ours] == [0, 1, 2]
    for a, b in zip(ours, expected, strict=True):
        assert a.images.shape == (
            len(a.request.indices),
            3,
            a.request.image_size,
            a.request.image_size,
        )
        assert a.request.indices.tolist() == b.request.indices.tolist()
        assert a.labels.tolist() == b.labels.tolist()
        assert a.broken == b.broken
        difference = (a.images.int() - b.images.int()).abs()
        # If an image is doubled in size, halves are rounded twice.
        assert difference.max() <= 2
        assert (difference > 1).double().mean() < 0.002
        if augment.crop != "resized" and a.request.image_size == SIDE:
            squares = a.labels == 2  # shifted, but not resized
            assert squares.any()
            assert not difference[squares].any()


@pytest.mark.parametrize("decoder", ["cpu", "gpu"])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_record_replaces_a_broken_one(folder, decoder, workers):
    data, records = open_folder(folder)
    config = Config(data=data, augment=AugmentConfig(crop="none"))
    names = [name.decode().partition("/")[2] for name in records.names.tolist()]
    bad = [i for i, name in enumerate(names) if name in (MISSING, EMPTY, TRUNCATED)]
    assert len(bad) == 9
    assert bad[-1] == len(records) - 1  # the record after the last one is the first
    good = [next(k % len(records) for k in range(i, 99) if k not in bad) for i in bad]
    for indices in (bad, good):
        request = Request(0, 0, SIDE, np.zeros(len(indices), int), np.array(indices))
        (fetched,) = fetch(records, config, [request], workers, CPU, decoder)
        if indices is bad:
            first = fetched
    assert first.labels.tolist() == records.labels[good].tolist() == fetched.labels.tolist()
    assert torch.equal(first.images, fetched.images)
    assert not fetched.broken
    assert {index for index, _ in first.broken} == {*bad}
    for index, reason in first.broken:
        expected = {MISSING: "No such file", EMPTY: "empty file", TRUNCATED: ""}[names[index]]
        assert expected in reason


@pytest.mark.parametrize("workers", [0, 2])
def test_packed_squares_are_cropped_in_their_original_aspect(workers):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (9, 3, 24, 24), np.uint8)
    sides = np.tile([[48, 24], [12, 36], [24, 24]], (3, 1))
    labels = np.arange(9) % 4
    records = Packed(images, sides, np.array([b"name"] * 9), labels, "", np.arange(9))
    data = DataConfig(eval_crop=1.0)
    request = Request(0, 0, SIDE, np.zeros(20, int), draw.integers(0, 9, 20))
    config = Config(data=data, augment=AugmentConfig(crop="none"))
    (fetched,) = fetch(records, config, [request], workers, CPU)
    assert fetched.labels.tolist() == labels[request.indices].tolist()
    # For 48 rows and 24 columns, the central square is the middle half of the rows, and so on.
    parts = [np.s_[:, 6:18], np.s_[:, :, 8:16], np.s_[:]]
    for i, ours in zip(request.indices, fetched.images, strict=True):
        square = torch.from_numpy(images[i][parts[i % 3]])[None]
        expected = F.interpolate(square, (SIDE, SIDE), mode="bilinear", antialias=True)[0]
        assert (ours.int() - expected.int()).abs().max() <= 1


def test_packed_squares_are_padded_in_their_original_aspect():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 24, 24), np.uint8)
    sides = np.array([[48, 24], [12, 36]])
    records = Packed(images, sides, np.array([b"name"] * 2), np.arange(2), "", np.arange(2))
    data = DataConfig(fit="pad")
    request = Request(0, 0, SIDE, np.zeros(2, int), np.arange(2))
    config = Config(data=data, augment=AugmentConfig(crop="none"))
    (fetched,) = fetch(records, config, [request], 0, CPU)
    # In pixels of the squares, half the width is missing on each side, and the height twice.
    for ours, square, gaps in zip(fetched.images, images, [(12, 0), (0, 24)], strict=True):
        color = torch.tensor(data.fill, dtype=torch.uint8).view(3, 1, 1)
        padded = color.repeat(1, 24 + 2 * gaps[1], 24 + 2 * gaps[0])
        padded[:, gaps[1] : gaps[1] + 24, gaps[0] : gaps[0] + 24] = torch.from_numpy(square)
        expected = F.interpolate(padded[None], (SIDE, SIDE), mode="bilinear", antialias=True)[0]
        assert (ours.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("augment", CROPS, ids=lambda config: config.crop)
def test_padded_images_are_the_same_in_both_decoders(folder, augment):
    data, records = open_folder(folder, fit="pad")
    config, wanted = Config(data=data, augment=augment), requests(np.arange(len(records)))
    for a, b in zip(
        *(fetch(records, config, wanted, 0, CPU, d) for d in ("gpu", "cpu")), strict=True
    ):
        difference = (a.images.int() - b.images.int()).abs()
        assert difference.max() <= 2
        assert (difference > 1).double().mean() < 0.002
        if augment.crop == "none" and a.request.step < 2:  # not only squares
            assert (b.images == torch.tensor(data.fill).view(3, 1, 1)).all(1).any((1, 2)).any()


@pytest.mark.parametrize("augment", CROPS, ids=lambda config: config.crop)
def test_workers_crop_packed_squares_as_the_main_process_does(augment):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (50, 3, 24, 24), np.uint8)
    sides = draw.integers(20, 90, (50, 2))
    records = Packed(
        images, sides, np.array([b"name"] * 50), draw.integers(0, 5, 50), "", np.arange(50)
    )
    config = Config(data=DataConfig(eval_crop=1.0), augment=augment)
    wanted = requests(draw.integers(0, 50, 99))
    without, with_workers = (list(fetch(records, config, wanted, n, CPU)) for n in (0, 2))
    for a, b in zip(without, with_workers, strict=True):
        assert a.images.shape == (33, 3, a.request.image_size, a.request.image_size)
        assert torch.equal(a.images, b.images)
        assert a.labels.tolist() == b.labels.tolist()
        assert a.labels.tolist() == records.labels[a.request.indices].tolist()


GPU_READABLE = {"color.jpg", "gray.jpg", "progressive.jpg", "upright.jpg"}


@pytest.mark.parametrize("name", files((9, 9)))
def test_which_images_the_gpu_decodes(name):
    assert gpu_can_decode(files((40, 30))[name]) == (name in GPU_READABLE)


def test_only_ycbcr_is_decoded_on_the_gpu():
    image = Image.effect_noise((40, 30), 50).convert("RGB")
    by_adobe = [encoded(image, "JPEG", keep_rgb=keep) for keep in (True, False)]
    assert list(map(gpu_can_decode, by_adobe)) == [False, True]
    at = by_adobe[0].index(b"\xff\xee")  # Adobe's marker; the channels are still named R, G and B
    assert not gpu_can_decode(by_adobe[0][:at] + by_adobe[0][at + 16 :])
    assert gpu_can_decode(by_adobe[1] + b"\0" * 9)  # some cameras append a few bytes


CRASH = """
import sys
from pathlib import Path
import numpy as np
import torch
from vitral.config import Config, DataConfig
from vitral.data.fetch import Request, fetch
from vitral.data.formats import open_dataset

def run():
    config = Config(data=DataConfig(path=sys.argv[1]))
    records = open_dataset(config.data, 16, 0, train=False).val
    request = Request(0, 0, 16, np.zeros(2, int), np.arange(2))
    fetched = fetch(records, config, [request] * 99, 2, torch.device("cpu"))
    next(fetched)
    raise RuntimeError("a bug in this test")

run()
"""


def test_a_crash_terminates_the_workers(folder):
    """The traceback keeps workers alive, and they ignore Python's termination signal."""
    command = [sys.executable, "-c", CRASH, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "RuntimeError: a bug in this test"


# There is room for no batch of 400 KB, or for one, which the model uses in the meantime.
@pytest.mark.parametrize("size", ["64k", "600k"])
def test_full_shared_memory_is_an_error(image_folder, tmp_path, size):
    """In a container with little shared memory, the run could wait for a batch forever."""
    words = [sys.executable, "-m", "vitral", "train", "digits", "--data", str(image_folder)]
    words += "--model.image-size 64 --model.patch-size 8 --model.depth 1 --data.workers 2".split()
    words += [
        "--train.batch-size",
        "32",
        "--train.epochs",
        "4",
        "--optim.warmup-epochs",
        "0",
        "--out",
        str(tmp_path / "run"),
    ]
    small = f"mount -t tmpfs -o size={size} tmpfs /dev/shm || exit 77; exec {shlex.join(words)}"
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    done = subprocess.run(["unshare", "-m", "sh", "-c", small], capture_output=True, timeout=90)
    if done.returncode == 77 or b"unshare" in done.stderr:
        pytest.skip("not permitted to mount a file system")
    expected = "vitral: /dev/shm: No space left on device; free some space and repeat the command\n"
    assert done.stderr.decode() == expected
    assert done.returncode == 1


def test_locations_are_the_images_of_a_request(folder):
    data, records = open_folder(folder)
    request = Request(0, 0, SIDE, np.zeros(2, int), np.array([0, 3]))
    named = module._DecodingDataset(records, Config(data=data)).locations(request)
    assert named == [records.where(0), records.where(3)]


@pytest.mark.parametrize("workers", [0, 1])
def test_special_files_and_read_errors_are_broken_images(tmp_path, workers):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(encoded(Image.new("RGB", (8, 8)), "PNG"))
    os.mkfifo(tmp_path / "a/0.jpg")
    (tmp_path / "b/0.jpg").mkdir()
    (tmp_path / "b/0.jpg/2.png").symlink_to("/proc/self/mem")  # EIO when read
    data, records = open_folder(tmp_path)
    request = Request(0, 0, 8, np.zeros(4, int), np.arange(4))
    config = Config(data=data, augment=AugmentConfig(crop="none"))
    for decoder in ("cpu", "gpu"):
        (fetched,) = fetch(records, config, [request], workers, CPU, decoder)
        assert {i for i, _ in fetched.broken} == {0, 2}
        assert fetched.labels.tolist() == [0, 0, 1, 1]
