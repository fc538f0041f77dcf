"""Identical and similar images: the hash, the search against all pairs, and every kind of data."""

import csv
import io
import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy.fft import dctn

from vitral.cli import main
from vitral.config import DataConfig
from vitral.data.tools import duplicates
from vitral.data.tools.check import check, format_report
from vitral.data.tools.duplicates import KINDS, perceptual_hash, similar

from ..archive_files import tarred
from ..pack_files import packed

pytestmark = pytest.mark.usefixtures("cache")


def picture(seed, size=(96, 72)):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def jpeg(image, quality=92):
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    return content.getvalue()


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def distance(one, other):
    return (perceptual_hash(pixels(one)) ^ perceptual_hash(pixels(other))).bit_count()


def test_the_hash_equals_a_plain_discrete_cosine_transform():
    image = picture(0, (32, 32))
    gray = np.array(image, np.float64) @ [0.299, 0.587, 0.114]
    spectrum = dctn(gray, norm=None)[:8, :8]
    bits = "".join("01"[int(value > np.median(spectrum))] for value in spectrum.ravel())
    assert f"{perceptual_hash(pixels(image)):064b}" == bits


def test_copies_have_close_hashes_and_other_images_do_not():
    for seed in range(8):
        image = picture(seed)
        again = Image.open(io.BytesIO(jpeg(image, 40)))
        copies = [again, image.resize((300, 200)), image.resize((48, 36)), image.convert("L")]
        assert all(distance(image, copy.convert("RGB")) <= 4 for copy in copies)
        mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        others = [mirrored, image.rotate(90), picture(seed + 100)]
        assert all(distance(image, other) > 8 for other in others)


def test_blank_images_have_one_hash_regardless_of_rounding():
    hashes = {
        perceptual_hash(torch.full((3, 17, 23), value, dtype=torch.uint8)) for value in (1, 90, 255)
    }
    assert hashes == {1 << 63}
    assert perceptual_hash(torch.zeros(3, 1, 1, dtype=torch.uint8)) == 0


def chains(hashes):
    """The smallest member of each hash's chain, from all pairs."""
    root = list(range(len(hashes)))
    for i, j in itertools.combinations(range(len(hashes)), 2):
        if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= 4:
            low, high = sorted((root[i], root[j]))
            root = [low if each == high else each for each in root]
    return root


@pytest.mark.parametrize("seed", range(3))
def test_the_search_equals_all_pairs(seed):
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, 120, dtype=np.uint64)
    hashes[40:] &= np.uint64(0x0003_0003_0003_0007)  # many close ones
    for i in range(20):  # and copies with up to six different bits
        flipped = sum(1 << int(bit) for bit in rng.permutation(64)[: rng.integers(0, 7)])
        hashes[i + 20] = hashes[i] ^ np.uint64(flipped)
    assert similar(hashes).tolist() == chains(hashes)


def test_a_pair_is_found_wherever_its_four_bits_are():
    ends = np.cumsum(duplicates.BANDS)
    bits = [range(end - width, end) for end, width in zip(ends, duplicates.BANDS, strict=True)]
    assert sorted(itertools.chain(*bits)) == [*range(64)]
    rng = np.random.default_rng(0)
    for bands in itertools.combinations_with_replacement(range(6), 4):
        flipped = {int(rng.choice(bits[band])) for band in bands}
        one = rng.integers(0, 2**64, dtype=np.uint64)
        pair = np.array([one, one ^ np.uint64(sum(1 << bit for bit in flipped))])
        assert similar(pair).tolist() == [0, 0]


FILES = {
    "train/cat/a.jpg": jpeg(picture(1)),
    "train/cat/b.jpg": jpeg(picture(2)),
    "train/cat/c.jpg": jpeg(picture(2)),  # the same file, and the same image as dog/c
    "train/cat/d.jpg": jpeg(picture(4)),
    "train/dog/a.jpg": jpeg(picture(5)),
    "train/dog/b.jpg": jpeg(picture(5).resize((200, 150))),
    "train/dog/c.jpg": jpeg(picture(2), 50),
    "train/dog/d.jpg": jpeg(picture(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "val/cat/a.jpg": jpeg(picture(4), 70),
    "val/dog/a.jpg": jpeg(picture(9)),
}
EXPECTED = [
    ("in both splits", ["train/cat/d.jpg", "val/cat/a.jpg"], 0),
    ("with different labels", ["train/cat/b.jpg", "train/cat/c.jpg", "train/dog/c.jpg"], 2),
    ("with the same label", ["train/dog/a.jpg", "train/dog/b.jpg"], 0),
]


def put_files(root):
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def put_table(root):
    put_files(root)
    rows = [f"{name},{name.split('/')[1]}" for name in FILES]
    (root / "labels.csv").write_text("\n".join(["image,label", *rows]))
    return root / "labels.csv"


def put_tars(root):
    root.mkdir()
    for split in ("train", "val"):
        inside = {name: data for name, data in FILES.items() if name.startswith(split)}
        labeled = [(name.partition("/")[2], data) for name, data in inside.items()]
        for name, _ in [*labeled]:
            number = str(int("dog" in name)).encode()
            labeled.append((name.replace("jpg", "cls"), number))
        (root / f"{split}-000.tar").write_bytes(tarred(sorted(labeled)))
    return root


def put_parquet(root):
    root.mkdir()
    for split in ("train", "val"):
        inside = {name: data for name, data in FILES.items() if name.startswith(split)}
        images = [{"bytes": data, "path": name} for name, data in inside.items()]
        labels = [name.split("/")[1] for name in inside]
        pq.write_table(pa.table({"image": images, "label": labels}), root / f"{split}-000.parquet")
    return root


def put_pack(root, jpegs=False):
    put_files(root / "folder")
    packed(root / "folder", root / "pack", jpegs, 64)
    return root / "pack"


def put_jpeg_pack(root):
    return put_pack(root, True)


@pytest.mark.parametrize(
    "put", [put_files, put_table, put_tars, put_parquet, put_pack, put_jpeg_pack]
)
def test_groups_of_every_kind_of_data(tmp_path, put, capsys):
    place = put(tmp_path / "data")
    capsys.readouterr()
    found = check(DataConfig(path=str(place)), 16, 0, workers=0, duplicates=True).duplicates
    assert [kind for kind, _ in found.groups] == [*KINDS]
    for (_, images), (_, names, identical) in zip(found.groups, EXPECTED, strict=True):
        assert sum(image.identical for image in images) == identical
        assert [image.split for image in images] == [name.split("/")[0] for name in names]
        if put is not put_tars:
            assert [image.label for image in images] == [name.split("/")[1] for name in names]
        if put is not put_parquet:
            tails = [name.partition("/")[2] for name in names]
            assert all(i.path.endswith(t) for i, t in zip(images, tails, strict=True))


def test_the_output_and_the_table(tmp_path, capsys):
    root = put_files(tmp_path / "data")
    (root / "train/cat/broken.jpg").write_bytes(FILES["train/cat/a.jpg"][:300])
    (root / "train/dog/broken.jpg").write_bytes(FILES["train/cat/a.jpg"][:300])
    out = tmp_path / "new" / "groups.csv"
    command = ["data", "check", str(root), "--workers", "2"]
    assert main([*command, "--duplicates", "--out", str(out)]) == 2  # of the broken files
    text = capsys.readouterr().out
    shown = [
        "duplicates: 3 groups of identical or similar images, 7 images, 2 with an identical copy",
        "  in both splits: 1 group",
        f"    {root / 'train/cat/d.jpg'} (cat), {root / 'val/cat/a.jpg'} (cat)",
        "  with different labels: 1 group",
    ]
    assert "\n".join(shown) in text
    with out.open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [row["group"] for row in rows] == [*"1122233"]
    assert [row["image"] for row in rows] == [
        str(root / name) for _, names, _ in EXPECTED for name in names
    ]
    assert [row["identical"] for row in rows] == "no no yes yes no no no".split()
    assert main(command) == 2
    assert "duplicates" not in capsys.readouterr().out
    assert main([*command, "--out", str(out)]) == 2
    assert "out: expected --duplicates" in capsys.readouterr().err


def test_images_in_memory(monkeypatch):
    """No two digits have the same hash."""
    monkeypatch.setattr(duplicates, "MAX_DISTANCE", 0)
    report = check(DataConfig(path="digits"), 8, 0, workers=0, duplicates=True)
    assert format_report(report).endswith("duplicates: none")
