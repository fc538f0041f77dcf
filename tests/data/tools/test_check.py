import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from vitral.config import DataConfig
from vitral.data.decode import SUFFIXES
from vitral.data.tools.check import check, format_report
from vitral.errors import UserError

pytestmark = pytest.mark.usefixtures("nothing_printed")


@pytest.fixture
def root(tmp_path):
    """Five images of known sizes, a truncated one, a text file, and a broken link."""
    for path, size in {
        "train/cat/1.png": (10, 20),
        "train/cat/2.png": (40, 30),
        "train/dog/1.jpg": (50, 60),
        "val/cat/1.png": (70, 80),
        "val/dog/1.bmp": (90, 5),
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / path)
    (tmp_path / "train/dog/cut.png").write_bytes((tmp_path / "train/cat/2.png").read_bytes()[:900])
    (tmp_path / "val/dog/text.jpg").write_text("no image at all")
    (tmp_path / "val/dog/gone.png").symlink_to(tmp_path / "nowhere.png")
    return tmp_path


def checked(path, workers=0):
    return check(DataConfig(path=str(path)), 16, seed=0, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_file_is_checked(root, workers):
    report = checked(root, workers)
    assert (report.name, report.classes) == (root.name, ("cat", "dog"))
    assert {split: counts.tolist() for split, counts in report.counts.items()} == {
        "train": [2, 2],
        "val": [1, 3],
    }
    assert report.dimensions.tolist() == [[10, 20], [40, 30], [50, 60], [70, 80], [90, 5]]
    listed = [*(root / "train").rglob("*.*"), *(root / "val").rglob("*.*")]
    sizes = sorted(path.stat().st_size for path in listed if path.exists())
    assert sorted(report.sizes.tolist()) == [0, *sizes]
    broken = dict(report.broken)
    assert list(broken) == [
        str(root / name) for name in ("train/dog/cut.png", "val/dog/gone.png", "val/dog/text.jpg")
    ]
    assert "No such file" in broken[str(root / "val/dog/gone.png")]
    assert "not an image" in broken[str(root / "val/dog/text.jpg")]
    assert report.rate is not None
    assert report.rate > 10


def test_workers_change_only_the_rate(root):
    one, other = (format_report(dataclasses.replace(checked(root, n), rate=1)) for n in (0, 3))
    assert one == other


def test_the_text_of_a_report(root):
    report = dataclasses.replace(checked(root), rate=1234.4)
    text = format_report(report)
    total = f"{report.sizes.sum() / 1e6:.1f} MB in total"
    for expected in (
        f"{root.name}: 2 classes",
        "train: 4 images, 2 to 2 per class (median 2), imbalance ratio 1.0",
        "val: 4 images, 1 to 3 per class (median 2), imbalance ratio 3.0",
        "  rarest first: cat 1, dog 3",
        "shorter side: 5 to 70 pixels (median 30)",
        "longer side: 20 to 90 pixels (median 60)",
        f"size: 0 to {report.sizes.max():,} bytes (median",
        total,
        "decoding: 1,234 img/s per core",
        "broken files: 3",
        f"  {root / 'val/dog/text.jpg'}: not an image",
    ):
        assert expected in text
    assert len(text.splitlines()) == 13


@pytest.mark.skipif(".heic" in SUFFIXES, reason="HEIC is read")
def test_unused_files_are_counted_by_extension(root):
    for name in ("train/cat/a.HEIC", "train/cat/deep/b.heic", "val/dog/notes", "labels.csv"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    (root / "test/cat").mkdir(parents=True)
    (root / "train/cat/1.png").rename(root / "test/cat/1.png")  # not used next to val/
    (root / "train/cat/.DS_Store").touch()
    report = checked(root)
    line = f"{root.name}: 5 files are skipped: .heic 2, .DS_Store 1, .csv 1 and 1 more; "
    assert [note for note in report.notes if "skipped" in note] == [
        f"{line}run `pip install 'vitral[heic]'` to read .heic"
    ]
    assert line in format_report(report)


def test_long_lists_of_classes_are_shortened(root):
    counts = np.random.default_rng(0).permutation(np.arange(1, 1001))
    names = tuple(f"class{n}" for n in counts)
    report = dataclasses.replace(checked(root), classes=names, counts={"train": counts})
    (line,) = (line for line in format_report(report).splitlines() if "rarest" in line)
    assert line == (
        "  rarest first: class1 1, class2 2, class3 3, class4 4, class5 5, ..., "
        "class996 996, class997 997, class998 998, class999 999, class1000 1,000"
    )


def test_options_are_suggested_for_rare_classes(root):
    report = checked(root)
    for counts, suggested in (([2, 20], False), ([2, 21], True), ([0, 11], True)):
        changed = dataclasses.replace(report, counts={"train": np.array(counts)})
        text = format_report(changed)
        assert ("imbalance ratio above 10: " in text) == suggested
        assert ("--data.sampling balanced" in text) == suggested
    changed = dataclasses.replace(report, counts={"val": np.array([1, 11])})
    assert "above 10" not in format_report(changed)


def test_a_dataset_of_only_broken_files(root):
    for path in [*root.rglob("*.png"), *root.rglob("*.jpg"), *root.rglob("*.bmp")]:
        path.unlink()
        path.write_bytes(b"")
    report = checked(root)
    assert len(report.broken) == 8
    assert report.dimensions.shape == (0, 2)
    assert "broken files: 8" in format_report(report)


@pytest.mark.parametrize(("name", "side", "count"), [("digits", 8, 1797), ("synthetic", 16, 3072)])
def test_pixel_sets_need_no_decoding(name, side, count):
    report = check(DataConfig(path=name), 16, seed=0, workers=2)
    assert report.rate is None
    assert report.dimensions.tolist() == [[side, side]] * count
    assert report.sizes.sum() == count * 3 * side * side
    assert "decoding" not in format_report(report)


def test_held_out_images_are_reported(root):
    (root / "val").rename(root.parent / f"{root.name}-val")
    assert "held out, drawn with seed 0" in format_report(checked(root))


@pytest.mark.parametrize("name", ["val", "test"])
def test_only_a_validation_split_is_accepted(root, name):
    shutil.rmtree(root / "train")
    (root / "val").rename(root / name)
    report = checked(root)
    assert {split: counts.tolist() for split, counts in report.counts.items()} == {"val": [1, 3]}
    assert "val: 4 images" in format_report(report)


def test_structural_problems_are_user_errors(root):
    (root / "train/eel").mkdir()
    with pytest.raises(UserError, match="none for eel"):
        checked(root)


def test_more_workers_than_cores_cause_no_warning(root):
    assert len(checked(root, workers=9).broken) == 3
    assert torch.get_num_threads() == 1
