"""Tests of feature vectors, and of files that contain them."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vitral import weights
from vitral.cli import main
from vitral.config import Config, ViTConfig
from vitral.engines import choice
from vitral.errors import UserError
from vitral.inference import load
from vitral.inference.embed import Features, embed, write
from vitral.model import ViT

MODEL = ViTConfig(dim=16, depth=1, num_heads=2, num_kv_heads=1, patch_size=4, image_size=16)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("weights") / "best"
    description = weights.describe(Config(model=MODEL), ("a", "b"), "", {})
    weights.save(place, {"model": ViT(MODEL, 2).state_dict()}, description)
    return place


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Four images; the third is broken."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(4):
        coarse = rng.integers(0, 256, (4, 5, 3), np.uint8)
        Image.fromarray(coarse).resize((30, 20)).save(root / f"{number}.png")
    (root / "2.png").write_text("no image")
    return [str(root / f"{number}.png") for number in range(4)]


@pytest.mark.parametrize("normalize", [False, True])
def test_an_unreadable_image_is_reported_and_left_out(directory, files, normalize, capsys):
    classifier = load(directory)
    found = embed(classifier, files, normalize=normalize, batch_size=3, workers=0)
    good = [files[i] for i in (0, 1, 3)]
    assert (found.paths, found.unreadable) == (good, [files[2]])
    assert capsys.readouterr().err == f"vitral: {files[2]}: cannot be read\n"
    expected = classifier.embed(good)
    lengths = np.linalg.norm(expected, axis=1, keepdims=True)
    assert abs(lengths - 1).min() > 0.1
    np.testing.assert_allclose(found.vectors, expected / lengths if normalize else expected, 1e-5)
    assert (found.model, found.normalized) == (str(directory), normalize)


def test_image_size_reaches_the_model(directory, files):
    classifier = load(directory)
    large = embed(classifier, files[:2], image_size=24, workers=0)
    np.testing.assert_allclose(large.vectors, classifier.embed(files[:2], image_size=24), 1e-5)
    assert abs(large.vectors - classifier.embed(files[:2])).max() > 1e-3
    with pytest.raises(UserError, match="multiple of the patch size 4, got 18"):
        embed(classifier, files, image_size=18)


FEATURES = Features(
    ["a.jpg", "caf\udce9.jpg"],
    np.array([[1, 2, 3], [4, 5, 6.5]], np.float32),
    "runs/a/weights/best",
    True,
    ["b.jpg"],
)
NAMES = ["a.jpg", "caf\\xe9.jpg"]  # text, even if file names are not


def test_numpy_files_contain_no_pickles(tmp_path):
    write(FEATURES, tmp_path / "features.npz")
    with np.load(tmp_path / "features.npz", allow_pickle=False) as stored:
        assert {*stored} == {"paths", "features", "model", "normalized"}
        assert stored["paths"].tolist() == NAMES
        assert stored["features"].dtype == np.float32
        assert stored["features"].tolist() == FEATURES.vectors.tolist()
        assert (stored["model"].item(), stored["normalized"].item()) == (FEATURES.model, True)


def test_parquet_files_have_one_row_per_image(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "features.parquet"
    write(FEATURES, path)
    table = parquet.read_table(path)
    vectors = FEATURES.vectors.tolist()
    rows = [{"path": n, "features": v} for n, v in zip(NAMES, vectors, strict=True)]
    assert table.to_pylist() == rows
    metadata = table.schema.metadata
    assert (metadata[b"model"], metadata[b"normalized"]) == (b"runs/a/weights/best", b"true")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        UserError, match=r"expected the package pyarrow, got none; run `pip install"
    ):
        write(FEATURES, tmp_path / "other.parquet")
    assert not (tmp_path / "other.parquet").exists()


def test_the_command_writes_features_and_reports_unreadable_images(
    directory, files, tmp_path, capsys
):
    out = str(tmp_path / "features.npz")
    words = ["embed", str(directory), *files, "--out", out, "--workers", "0"]
    assert main(words) == 1
    output = capsys.readouterr()
    assert output.out == f"{out}: 3 images, 16 features\n"
    assert output.err == f"vitral: {files[2]}: cannot be read\n"
    with np.load(out) as stored:
        assert stored["paths"].tolist() == [files[0], files[1], files[3]]
    assert main([*words[:3], "--out", out, "--normalize"]) == 0
    with np.load(out) as stored:
        np.testing.assert_allclose(np.linalg.norm(stored["features"], axis=1), 1, 1e-6)
    capsys.readouterr()
    assert main([*words[:3], "--out", "features.csv"]) == 2
    expected = "out: expected a name that ends in .npz or .parquet, got features.csv"
    assert expected in capsys.readouterr().err


def test_commands_use_the_engine(directory, files, tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "features.npz")
    embed_words = ["embed", str(directory), files[0], "--out", out, "--engine"]
    predict_words = ["predict", str(directory), files[0], "--engine"]
    weights = load(directory)
    with torch.no_grad():
        weights.model.norm.scale.zero_()  # so that the result shows which model was used
    monkeypatch.setattr(choice, "by_torch", lambda model: weights.model)
    assert main([*embed_words, "plain"]) == 0
    with np.load(out) as stored:
        assert not stored["features"].any()
    assert main([*predict_words, "plain"]) == 0
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for words in (embed_words, predict_words, ["val", str(directory), "--engine"]):
        capsys.readouterr()
        assert main([*words, "onnxruntime", "--device", "cuda"]) == 2
        assert "onnxruntime requires --device cpu, got --device cuda" in capsys.readouterr().err
        if words[0] != "val":  # its dataset does not exist
            assert main([*words, "onnxruntime"]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert "requires the package onnxruntime" in line
            assert "pip install 'vitral[onnx]'" in line
