"""Tests of the programs in examples/, on small generated images."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitral import weights
from vitral.config import Config, ViTConfig
from vitral.model import ViT

ROOT = Path(__file__).parent.parent
TIMEOUT = 90.0  # seconds until a process counts as hanging


def run_as_user(name, *words):
    """Runs a program of examples/ in its own process; returns its output."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / name), *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a program of examples/ in this process, in tmp_path; returns its output."""
    monkeypatch.chdir(tmp_path)

    def call(name, *words):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """Weights of a small untrained model, whose feature vectors depend on color."""
    torch.manual_seed(0)
    config = Config(model=ViTConfig(dim=32, depth=1, num_heads=2, num_kv_heads=1, image_size=32))
    place = tmp_path_factory.mktemp("weights") / "best"
    states = {"model": ViT(config.model, 2).state_dict()}
    weights.save(place, states, weights.describe(config, ("a", "b"), "", {}))
    return place


@pytest.mark.parametrize(("split", "as_user"), [("", True), ("train", False)])
def test_own_folder_is_trained_evaluated_and_predicted(image_folder, tmp_path, run, split, as_user):
    """Also without a validation split, so that some of the images are held out."""
    folder = image_folder / split
    small = "--model.dim 32 --model.depth 1 --model.num-heads 2 --model.num-kv-heads 1"
    words = f"{small} --augment.policy none --augment.mixup 0 --augment.cutmix 0"
    words += " --model.image-size 32 --train.micro-batch 8 --train.threads 1"
    words += " --train.epochs 4 --optim.warmup-epochs 1 --train.batch-size 8 --train.ema-decay 0"
    printed = (run_as_user if as_user else run)("own_folder.py", folder, *words.split())
    pattern = r"^top-1 ([\d.]+)% of (\d+) images\n(.*): light [\d.]+%$"
    ((top1, count, photo),) = re.findall(pattern, printed, re.MULTILINE)
    assert float(top1) > 90
    assert count == ("4" if split else "12")
    assert photo == max(map(str, folder.rglob("*.jpg")))
    assert (tmp_path / "runs" / "own" / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("own_folder.py --help", "python examples/own_folder.py FOLDER"),
        ("own_folder.py SET --train.epoch 3", "--train.epoch: unknown option"),
        ("linear_probe.py WEIGHTS SET/train", "train/train: expected images in two or more"),
        ("search.py WEIGHTS none SET/val/dark/00.jpg", "none: expected a folder with photos"),
    ],
)
def test_user_errors_have_no_traceback(image_folder, untrained, run, words, message):
    words = words.replace("SET", str(image_folder)).replace("WEIGHTS", str(untrained))
    with pytest.raises(SystemExit) as end:
        run(*words.split())
    assert isinstance(end.value.code, str)  # Python prints it and exits with 1
    assert message in end.value.code


def test_linear_probe_tells_classes_apart(image_folder, untrained, tmp_path, run):
    shutil.copytree(image_folder, tmp_path / "set")
    (tmp_path / "set" / "train" / "dark" / "broken.jpg").write_text("no image")
    printed = run("linear_probe.py", untrained, "set")
    assert "set/train: 41 files, 40 of them images" in printed
    (accuracy,) = re.findall(r"^accuracy ([\d.]+)% on set/val$", printed, re.MULTILINE)
    assert float(accuracy) > 90


def test_search_finds_the_near_duplicate_and_embeds_photos_once(untrained, tmp_path, run):
    photos, draw = tmp_path / "photos", np.random.default_rng(0)
    (photos / "deep").mkdir(parents=True)
    for i in range(20):
        low = draw.integers(0, 256, (3, 4, 3), np.uint8)
        Image.fromarray(low).resize((60, 50)).save(photos / f"{i:02d}.png")
    query = min(photos.glob("*.png"), key=lambda photo: photo.stat().st_size)
    with Image.open(query) as image:
        image.resize((90, 75)).save(photos / "deep" / "again.jpg")
    (photos / "broken.png").write_text("no image")

    def search():
        words = (untrained, "photos", query.relative_to(tmp_path))
        first, *nearest = run("search.py", *words).splitlines()
        return first, [(float(cosine), path) for cosine, path in map(str.split, nearest)]

    message, nearest = search()
    assert message == "21 photos, 21 of them new"  # all except the query itself
    assert nearest[0][1] == "photos/deep/again.jpg"
    assert nearest[0][0] > 0.99
    assert nearest == sorted(nearest, reverse=True)
    assert len(nearest) == 11
    with Image.open(tmp_path / "nearest.jpg") as sheet:
        assert sheet.size == (800, 660)
        corner = np.asarray(sheet.convert("RGB").crop((10, 60, 190, 140)), int)
        second = np.asarray(sheet.convert("RGB").crop((210, 60, 390, 140)), int)
    assert np.abs(corner - second).mean() < 10  # the query next to its near-duplicate

    # Replace a photo by the query with the same size and time: the stored vector is used.
    shown = {tmp_path / path for _, path in nearest}
    other = next(p for p in photos.glob("?[0-9].png") if p not in shown and p != query)
    stat = other.stat()
    other.write_bytes(query.read_bytes().ljust(stat.st_size, b"\0"))
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert search() == ("21 photos, 0 of them new", nearest)
    os.utime(other)
    (photos / "deep" / "again.jpg").unlink()
    message, changed = search()
    assert message == "20 photos, 1 of them new"
    assert changed == [(1.0, str(other.relative_to(tmp_path))), *nearest[1:]]
