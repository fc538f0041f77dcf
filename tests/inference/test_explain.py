"""Tests of explanations with a model that was trained to locate a white square."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from PIL import Image

from vitral import weights
from vitral.cli import main
from vitral.config import Config, DataConfig, ViTConfig
from vitral.data.augment import finish
from vitral.errors import UserError
from vitral.inference.explain import explain
from vitral.inference.predict import Classifier
from vitral.model import ViT

CLASSES = ("n01440764", r"right $\no$")  # not a formula
MODEL = ViTConfig(dim=16, depth=2, num_heads=2, num_kv_heads=1, patch_size=4, image_size=16)
KINDS = ("attention", "explained", "layers", "patch", "rollout")


def scene(column, side=16):
    """Gray noise (3, side, side) with a white patch in row 2 and `column` of a 4 by 4 grid."""
    image = torch.randint(90, 110, (3, side, side), dtype=torch.uint8)
    image[:, side // 2 : side // 4 * 3, side // 4 * column : side // 4 * (column + 1)] = 255
    return image


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Weights that distinguish a square in column 0 from one in column 3."""
    torch.manual_seed(3)
    model, config = ViT(MODEL, 2), Config(model=MODEL, data=DataConfig(eval_crop=1.0))
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):  # torch's initial values depend on its version
            torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        labels = torch.randint(2, (16,))
        batch = torch.stack([scene(3 * int(label)) for label in labels])
        images = finish(batch, None, config.data.mean, config.data.std)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    place = tmp_path_factory.mktemp("weights") / "best"
    description = weights.describe(config, CLASSES, "", {})
    weights.save(place, {"model": model.state_dict()}, description)
    return place


@pytest.fixture(scope="module")
def loaded(directory):
    return weights.load(directory)


@pytest.fixture
def photo(tmp_path):
    """An image of the second class, twice as large as the model's input."""
    path = tmp_path / r"a $\photo$ [1].png"
    Image.fromarray(scene(3, side=32).permute(1, 2, 0).numpy()).save(path)
    return path


@pytest.mark.parametrize("column", [0, 3])
def test_the_map_highlights_the_relevant_patch(loaded, column):
    found = explain(loaded, scene(column))
    assert found.classes[0] == ("n01440764 tench", CLASSES[1])[column // 3]
    assert found.probabilities[0] > 0.9
    assert np.unravel_index(found.rollout.argmax(), (4, 4)) == (2, column)
    assert found.rollout.mean() == pytest.approx(1)
    mean, deviation = found.chance
    assert found.deletion.area < mean - deviation
    assert found.insertion.area > mean + deviation
    assert f"deletion {found.deletion.area:.3f}" in found.summary


def test_probabilities_are_those_of_predict(loaded):
    image = scene(3).permute(1, 2, 0).numpy()
    calibrated = dataclasses.replace(loaded.description, metrics={"val_temperature": 4.0})
    calibrated = weights.Weights(loaded.model, calibrated, loaded.path)
    explained = explain(calibrated, torch.from_numpy(image).permute(2, 0, 1))
    predicted = Classifier(calibrated.model, calibrated.description, loaded.path).predict(image)[0]
    assert predicted.calibrated
    assert explained.probabilities == pytest.approx(predicted.probabilities)
    assert explained.deletion.probabilities[0] == pytest.approx(predicted.probabilities[0])


def test_the_selected_layer_and_patch_are_shown(loaded):
    image = scene(0)
    found, last = explain(loaded, image, layer=0, patch=(1, 3)), explain(loaded, image)
    assert (found.layer, last.layer) == (0, 1)
    assert found.patch == (1, 3)
    assert last.patch == np.unravel_index(last.heads[1].mean(0).argmax(), (4, 4))
    assert found.similarity[1, 3] == pytest.approx(1)
    np.testing.assert_array_equal(found.heads, last.heads)
    assert found.heads.shape == (2, 2, 4, 4)
    # In multiples of uniform attention, the sum over patches and CLS token is 17.
    assert (found.heads.sum((2, 3)) < 17).all()
    larger = explain(loaded, image, image_size=24)
    assert larger.rollout.shape == (6, 6)
    assert larger.pixels.shape == (24, 24, 3)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"layer": 2}, "layer: expected 0 to 1, got 2"),
        ({"layer": -1}, "layer: expected 0 to 1, got -1"),
        ({"patch": (0, 4)}, "patch: expected a row and a column, each 0 to 3, got 0 4"),
        ({"patch": (-1, 0)}, "got -1 0"),
        ({"image_size": 18}, "multiple of the patch size 4, got 18"),
    ],
)
def test_nonexistent_layers_and_patches_are_refused(loaded, options, fragment):
    with pytest.raises(UserError, match=fragment):
        explain(loaded, scene(0), **options)


def test_the_command_writes_pictures_and_reports_unreadable_files(
    directory, photo, tmp_path, capsys
):
    (tmp_path / "broken.jpg").write_text("no image")
    places = [str(photo), str(tmp_path / "broken.jpg"), str(tmp_path / "none.png"), str(photo)]
    out = tmp_path / "deep" / "pictures"
    assert main(["explain", str(directory), *places, "--patch", "3", "0", "--out", str(out)]) == 0
    output = capsys.readouterr()
    assert re.findall(r"vitral: \S+/(\S+): (no.*|No.*)", output.err) == [
        ("broken.jpg", "not an image in a known format (JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF)"),
        ("none.png", "No such file or directory"),
    ]
    lines = output.out.splitlines()
    assert len(lines) == 2
    assert CLASSES[1] in lines[0]
    assert re.search(r" \d\d\.\d%; rollout: deletion .*, insertion .*, random", lines[0])
    names = [f"{name}_{kind}.png" for name in (photo.stem, f"{photo.stem}-2") for kind in KINDS]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    with Image.open(out / f"{photo.stem}_explained.png") as figure:
        assert figure.width == 1200
    with Image.open(out / f"{photo.stem}_rollout.png") as overlay:
        pixels = np.asarray(overlay.convert("RGB")).astype(int)
    assert pixels.shape == (512, 512, 3)
    # The square is at the yellow end of the color scale; the top left corner is not.
    yellow = pixels[..., 1] - pixels[..., 2]
    assert yellow[320, 448] > 60 > yellow[10, 10]


@pytest.mark.parametrize(
    ("words", "code", "fragment"),
    [
        ("WEIGHTS broken.jpg", 1, "broken.jpg: not an image"),
        ("WEIGHTS", 2, "expected PATH"),
        ("nowhere broken.jpg", 2, "nowhere: no such directory"),
        ("WEIGHTS PHOTO --patch 4 0", 2, "patch: expected"),
        ("WEIGHTS PHOTO --out broken.jpg/x", 2, "out: cannot write"),
        ("WEIGHTS PHOTO --wich ema", 2, "did you mean --which"),
        ("WEIGHTS PHOTO --which ema", 2, "contains no ema weights"),
    ],
)
def test_user_errors_are_one_line_and_leave_nothing(
    directory, photo, tmp_path, monkeypatch, capsys, words, code, fragment
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jpg").write_text("no image")
    before = sorted(tmp_path.iterdir())
    named = {"WEIGHTS": str(directory), "PHOTO": str(photo)}
    assert main(["explain", *[named.get(word, word) for word in words.split()]]) == code
    output = capsys.readouterr().err
    assert re.fullmatch(r"vitral: .+\n", output)
    assert fragment in output
    assert sorted(tmp_path.iterdir()) == before
