import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import vitral
from vitral import storage, weights
from vitral.cli import main
from vitral.config import Config, DataConfig, ViTConfig
from vitral.data.formats import open_dataset
from vitral.data.imagenet import human_name
from vitral.data.loader import eval_batches
from vitral.errors import UserError
from vitral.inference import export as exporting
from vitral.inference.export import Agreement, export
from vitral.model import ViT

TINY = {"dim": 32, "depth": 1, "num_heads": 4, "num_kv_heads": 2, "patch_size": 4, "image_size": 16}
RICH = {
    **TINY,
    "depth": 2,
    "num_kv_heads": 1,
    "patch_size": 2,
    "rope": "mixed",
    "num_registers": 3,
    "pooling": "mean",
    "qk_norm": True,
    "layer_scale": 0.1,
    "qkv_bias": False,
    "ffn_bias": False,
}
PLAIN = {**TINY, "num_kv_heads": 4, "patch_size": 1, "image_size": 5, "pooling": "mean"}
CLASSES = ("n01440764", "dark", "n02012849")


def save(folder, data, seed=0, fit="crop", **model):
    """Saves weights in which no parameter has a neutral value (0 or 1).

    If an export dropped such a parameter, this would go unnoticed.
    """
    torch.manual_seed(seed)
    data_config = DataConfig(path=str(data), eval_crop=0.9, fit=fit)
    config = Config(model=ViTConfig(**model), data=data_config)
    vit = ViT(config.model, len(CLASSES))
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    metrics = {"val_top1": 0.5, "val_temperature": 1.5}
    description = weights.describe(config, CLASSES, "f" * 64, metrics)
    folder.parent.mkdir(parents=True, exist_ok=True)
    weights.save(folder, {"model": vit.state_dict(), "ema": vit.state_dict()}, description)
    return vit.eval()


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory):
    """A run directory with tiny weights."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    save(folder / "weights" / "best", image_folder, **TINY)
    return folder


def open_exported(path):
    """Returns a function that runs the file, and its JSON metadata."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
        text = session.get_modelmeta().custom_metadata_map["vitral"]
        return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]), text
    extra = {"vitral.json": ""}
    return torch.export.load(path, extra_files=extra).module(), extra["vitral.json"]


@pytest.mark.parametrize(
    ("model", "format", "opset"),
    [
        (TINY, "onnx", 20),
        (RICH, "onnx", 20),
        (RICH, "onnx", 23),
        (PLAIN, "onnx", 20),
        (RICH, "pt2", 20),
        (PLAIN, "pt2", 20),
    ],
)
def test_exported_file_matches_the_model(model, format, opset, image_folder, tmp_path, monkeypatch):
    """Checks sizes and batch sizes that the export itself does not check."""
    monkeypatch.setattr(sys, "stderr", None)  # as in a service
    vit = save(tmp_path / "weights", image_folder, **model)
    out = tmp_path / f"model.{format}"
    exported = export(tmp_path / "weights", format=format, out=out, opset=opset, images=5)
    random, validation = exported.agreements
    assert (random.images, random.same) == (12, 12)
    message = f"5 images of {image_folder.name}"
    assert (validation.what, validation.images, validation.same) == (message, 5, 5)
    forward, text = open_exported(out)
    P = model["patch_size"]
    generator = torch.Generator().manual_seed(7)
    for batch, rows, columns in ((1, 2, 2), (2, 2, 7), (5, 9, 3), (4, 8, 8)):
        images = torch.randn(batch, 3, rows * P, columns * P, generator=generator)
        with torch.no_grad():
            expected = vit(images)
        assert expected.std() > 0.1
        torch.testing.assert_close(forward(images), expected, rtol=0, atol=2e-5)
    metadata = json.loads(text)
    assert metadata["classes"] == list(CLASSES)
    assert metadata["names"] == ["tench, Tinca tinca", "dark", "crane"]
    assert (metadata["patch_size"], metadata["image_size"]) == (P, model["image_size"])
    assert (metadata["eval_crop"], metadata["interpolation"]) == (0.9, "bilinear")
    assert (metadata["mean"], metadata["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (metadata["weights"], metadata["fingerprint"]) == ("model", "f" * 64)
    assert metadata["temperature"] == 1.5
    assert metadata["vitral"]
    assert b"/site-packages/" not in unpacked(out)
    assert str(Path(exporting.__file__).parents[1]).encode() not in unpacked(out)


def unpacked(path):
    """Returns the bytes of a file or of an archive's members, which must not contain a pickle."""
    if path.suffix == ".onnx":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = [archive.read(name) for name in archive.namelist()]
    assert not any(member.startswith((b"\x80", b"PK")) for member in members)
    assert not any(b'"use_pickle": true' in member for member in members)
    return b"".join(members)


def test_large_weights_are_stored_in_a_second_file(run, monkeypatch, tmp_path):
    monkeypatch.setattr(exporting, "MAX_FILE_BYTES", 1000)
    written = export(run, out=tmp_path / "big.onnx", images=0).files
    assert written == (tmp_path / "big.onnx", tmp_path / "big.onnx.data")
    assert set(written) == set(tmp_path.iterdir())
    shutil.move(tmp_path / "big.onnx", tmp_path / "elsewhere")
    forward, _ = open_exported(shutil.move(tmp_path / "elsewhere", tmp_path / "big.onnx"))
    assert forward(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    state = storage.read_tensors(run / "weights" / "best", "model")
    size = sum(tensor.nbytes for tensor in state.values())
    assert (tmp_path / "big.onnx.data").stat().st_size > 0.8 * size


def test_a_second_file_requires_a_path_in_utf8(run, monkeypatch, tmp_path):
    monkeypatch.setattr(exporting, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(exporting.onnx, "trace", None)  # is refused before the work
    with pytest.raises(UserError, match="out: expected a path in UTF-8"):
        export(run, out=tmp_path / os.fsdecode(b"\xff.onnx"), images=0)
    assert not [*tmp_path.iterdir()]


def test_the_command_exports_and_reports_the_comparisons(
    run, image_folder, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    Path("tiny.pt2").write_text("an older file")
    assert main(["export", str(run), "--format", "pt2", "--which", "ema"]) == 0
    message = capsys.readouterr()
    assert re.fullmatch(
        r"tiny.pt2: 0.\d MB\n"
        r"12 random images, 16 by 16, 24 by 24, 24 by 16: .+ 100.00%\n"
        rf"12 images of {image_folder.name}: largest error \d.\de-\d\d, top-1 agreement 100.00%\n",
        message.out.replace("0.0e+00", "0.0e-00"),
    )
    assert message.err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.pt2"]
    metadata = json.loads(open_exported(Path("tiny.pt2"))[1])
    assert metadata["weights"] == "ema"
    assert metadata["temperature"] is None


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_the_documented_program_matches_the_command(capsys, monkeypatch, tmp_path, fit):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "weights"
    save(run, "digits", fit=fit, **TINY)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    photo = Image.fromarray(pixels).resize((61, 42))
    exif = photo.getexif()
    exif[0x112] = 6  # rotated by 90 degrees
    photo.save("photo.jpg", quality=95, exif=exif)
    assert main(["export", str(run), "--out", "digits.onnx", "--images", "0"]) == 0
    capsys.readouterr()
    text = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(program, {})
    printed = [line.rsplit(" ", 1) for line in capsys.readouterr().out.splitlines()]
    (expected,) = vitral.load(run).predict("photo.jpg")
    assert [name for name, _ in printed] == [human_name(n) or n for n in expected.names]
    probabilities = [float(percentage.rstrip("%")) / 100 for _, percentage in printed]
    assert probabilities == pytest.approx(expected.probabilities, abs=0.005)


def test_hub_weights_are_named_after_their_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "models--anna--small-vit" / "snapshots" / "0123abc"
    save(place, tmp_path / "gone", **TINY)
    assert main(["export", str(place), "--format", "pt2"]) == 0
    assert Path("small-vit.pt2").exists()


def test_export_works_without_the_training_data(tmp_path, capsys):
    save(tmp_path / "weights", tmp_path / "gone", **TINY)
    out = tmp_path / "model.pt2"
    assert main(["export", str(tmp_path / "weights"), "--format", "pt2", "--out", str(out)]) == 0
    assert "--data PATH" in capsys.readouterr().out
    assert out.exists()


def another_model(program, file, *_):
    """Writes a valid file with other weights."""
    torch.export.save(exporting.onnx.trace(ViT(ViTConfig(**TINY), 3).eval()), file)


def nonsense(program, file, *_):
    file.write_bytes(b"nonsense")


@pytest.mark.parametrize(
    ("format", "write", "message"),
    [
        ("pt2", another_model, "does not match the model: 12 random images"),
        ("onnx", nonsense, "cannot be run"),
        ("pt2", nonsense, "cannot be run"),
    ],
)
def test_a_file_that_fails_is_not_kept(format, write, message, run, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(exporting, f"_write_{format}", write)
    out = tmp_path / f"model.{format}"
    out.write_text("an older file")
    assert main(["export", str(run), "--format", format, "--out", str(out)]) == 1
    text = capsys.readouterr().err
    assert re.fullmatch(r"vitral: .+\n", text)
    assert message in text
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert out.read_text() == "an older file"


def test_validation_images_match_evaluation_and_include_both_ends(image_folder):
    data = DataConfig(path=str(image_folder), eval_crop=0.9)
    config = Config(model=ViTConfig(**TINY), data=data)
    records = open_dataset(data, 16, 0).val
    (every,) = eval_batches(records, config, len(records), 0, torch.device("cpu"))
    _, batches = exporting._validation_images(config, str(image_folder), 2)
    torch.testing.assert_close(torch.cat(list(batches)), every.images[[0, -1]], rtol=0, atol=0)


def test_agreement_requires_every_class_and_the_tolerance():
    assert Agreement("", 4, 4, 1e-4).good
    assert not Agreement("", 4, 3, 0.0).good
    assert not Agreement("", 4, 4, 1.1e-4).good
    assert not Agreement("", 4, 4, float("nan")).good


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ("--format tflite", ["tflite", "onnx"]),
        ("--opset 19", ["19", "20"]),
        ("--images -1", ["images", "0 or more"]),
        ("--out model.pt2", ["expected a file name that ends in .onnx", "model.pt2"]),
        ("--out folder.onnx", ["expected a file name", "folder.onnx"]),
        ("--data /no/such/folder", ["/no/such/folder"]),
        ("--which emma", ["emma"]),
    ],
)
def test_user_errors_are_one_line(words, fragments, run, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("folder.onnx").mkdir()
    assert main(["export", str(run), *words.split()]) == 2
    text = capsys.readouterr().err
    assert re.fullmatch(r"vitral: .+\n", text)
    for fragment in fragments:
        assert fragment in text
    assert [path.name for path in tmp_path.iterdir()] == ["folder.onnx"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(package, run, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["export", str(run), "--out", str(tmp_path / "model.onnx")]) == 2
    text = capsys.readouterr().err
    assert re.fullmatch(r"vitral: .+\n", text)
    assert f"package {package}, which" in text
    assert "pip install 'vitral[onnx]'" in text
    assert not list(tmp_path.iterdir())


def test_telemetry_of_onnxruntime_is_disabled(run, tmp_path):
    """Telemetry writes a device identifier and a database to the home directory."""
    names = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    home = tmp_path / "home"
    home.mkdir()
    words = ["export", str(run), "--out", str(tmp_path / "x.onnx"), "--images", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "vitral", *words],
        env={**environment, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "random images" in done.stdout
    assert not [path for path in home.rglob("*") if "onnxruntime" in path.name]
