"""Tests of predictions against `evaluate` and against single images preprocessed by hand."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import five_crop

import vitral
from vitral import storage, weights
from vitral.cli import main
from vitral.config import Config, DataConfig, ViTConfig
from vitral.data.crops import eval_crop
from vitral.data.decode import decode
from vitral.errors import UserError
from vitral.evaluation.scores import calibration_error
from vitral.inference import Classifier, find_images, load
from vitral.model import ViT

CLASSES = tuple(f"class {letter}" for letter in "abcdefg")
MODEL = ViTConfig(dim=16, depth=2, num_heads=2, num_kv_heads=1, patch_size=4, image_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A validation split of seven classes: images in several sizes and formats."""
    root = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (root / "val" / name).mkdir(parents=True)
        for size, suffix in (((30, 21), "jpg"), ((17, 40), "png"), ((16, 16), "webp")):
            coarse = rng.integers(0, 256, (4, 5, 3), np.uint8)
            image = Image.fromarray(coarse).resize(size)
            exif = Image.Exif()
            exif[0x0112] = 6  # rotated by 90 degrees
            image.save(root / "val" / name / f"image.{suffix}", exif=exif)
    return root


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Weights whose raw and averaged predictions differ from each other and between images."""
    states = {}
    for seed, which in enumerate(("model", "ema")):
        torch.manual_seed(seed)
        model = ViT(MODEL, len(CLASSES))
        torch.nn.init.normal_(model.head.weight, std=0.5)
        states[which] = model.state_dict()
    config = Config(model=MODEL, data=DataConfig(eval_crop=0.8))
    place = tmp_path_factory.mktemp("weights") / "best"
    weights.save(place, states, weights.describe(config, CLASSES, "", {"ema_top1": 0.5}))
    return place


@pytest.fixture(scope="module")
def files(folder):
    return find_images([str(folder / "val")])


def by_hand(classifier, image, side):
    """Probabilities (classes,) of one image, cropped by slicing and resized by Pillow."""
    H, W = image.shape[1:]
    crop_size = round(0.8 * min(H, W))
    top, left = round((H - crop_size) / 2), round((W - crop_size) / 2)
    square = image[:, top : top + crop_size, left : left + crop_size].permute(1, 2, 0).numpy()
    small = Image.fromarray(square).resize((side, side), Image.Resampling.BILINEAR)
    data = classifier.description.config.data
    pixels = (np.asarray(small) / 255 - data.mean) / data.std
    logits = classifier.model(torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None])
    return logits[0].softmax(0)


def test_predictions_are_calibrated(directory, folder, files, tmp_path, capsys):
    """The raw and the averaged weights have their own temperatures."""
    metrics = {"ema_top1": 0.5, "val_temperature": 0.5, "ema_temperature": 2.0}
    document = json.loads((directory / "config.json").read_text())
    states = {which: storage.read_tensors(directory, which) for which in ("model", "ema")}
    storage.write(tmp_path / "best", states, {"config": document | {"metrics": metrics}})
    for which, temperature in (("ema", 2.0), ("model", 0.5)):
        classifier = vitral.load(tmp_path / "best", which=which)
        found = classifier.predict(files[:3], top=7, min_confidence=0.3)
        uncalibrated = vitral.load(directory, which=which).predict(files[:3], top=7)
        for after, before in zip(found, uncalibrated, strict=True):
            powers = np.array(before.probabilities) ** (1 / temperature)
            np.testing.assert_allclose(after.probabilities, powers / powers.sum(), rtol=1e-4)
            assert after.calibrated
            assert not before.calibrated
            assert after.unknown == (after.probabilities[0] < 0.3)
            assert not before.unknown
        scores = vitral.evaluate(classifier, str(folder), batch_size=5, workers=0)
        best = [p.probabilities[0] for p in classifier.predict(files)]
        np.testing.assert_allclose(scores.calibrated, best, atol=1e-6)
        assert scores.temperature == temperature
    assert main(["val", str(tmp_path / "best"), "--data", str(folder), "--workers", "0"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    averaged = vitral.evaluate(tmp_path / "best", str(folder), workers=0)
    after = calibration_error(averaged.calibrated, averaged.hits(1))
    assert last == (
        f"calibrated with temperature 2: calibration error {averaged.calibration_error:.2%} "
        f"before, {after:.2%} after"
    )
    with pytest.raises(UserError, match="min_confidence: expected a probability"):
        classifier.predict(files[:1], min_confidence=1.5)
    metrics["val_temperature"] = -1.0
    storage.write(tmp_path / "best", states, {"config": document | {"metrics": metrics}})
    with pytest.raises(UserError, match="val_temperature: expected a number above 0, got -1"):
        vitral.load(tmp_path / "best")


@pytest.mark.parametrize("tta", ["flip", "five-crop"])
def test_test_time_augmentation_averages_the_views(directory, folder, files, tta):
    loaded = vitral.load(directory)
    metrics = {**loaded.description.metrics, "ema_temperature": 1.5}
    description = dataclasses.replace(loaded.description, metrics=metrics)
    classifier = Classifier(loaded.model, description, loaded.path)
    data, expected = description.config.data, []
    for file in files:
        pixels = decode(Path(file).read_bytes())
        views = [eval_crop(pixels, data, 16)]
        views.append(views[0].flip(2))
        if tta == "five-crop":
            squares = five_crop(pixels, [round(0.8 * min(pixels.shape[1:]))])
            views = [
                eval_crop(square, dataclasses.replace(data, eval_crop=1.0), 16)
                for square in squares
            ]
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
        logits = classifier.model((torch.stack(views) / 255 - mean) / std)
        expected.append((logits / 1.5).softmax(1).mean(0))
    probabilities = torch.stack(expected)
    plain = torch.tensor([p.probabilities for p in classifier.predict(files, 7)])
    found = classifier.predict(files, 7, tta=tta, batch_size=4)
    for prediction, row in zip(found, probabilities, strict=True):
        by_class = row[list(prediction.classes)]
        np.testing.assert_allclose(prediction.probabilities, by_class, atol=2e-3)
    assert abs(plain.amax(1) - probabilities.amax(1)).max() > 0.01
    for workers in (0, 1):
        scores = vitral.evaluate(classifier, str(folder), tta=tta, batch_size=5, workers=workers)
        assert scores.ranked[:, 0].tolist() == [p.classes[0] for p in found]
        best = [p.probabilities[0] for p in found]
        np.testing.assert_allclose(scores.confidence, best, atol=1e-6)
    truth = probabilities[torch.arange(len(files)), torch.from_numpy(scores.labels)]
    assert scores.loss == pytest.approx(-truth.log().mean().item(), abs=5e-3)


def test_val_prints_the_gain_of_test_time_augmentation(directory, folder, capsys):
    words = ["val", str(directory), "--data", str(folder), "--workers", "0"]
    assert main([*words, "--tta", "flip"]) == 0
    plain, averaged = (
        vitral.evaluate(directory, str(folder), tta=t).top1 for t in ("none", "flip")
    )
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"with test-time augmentation flip: top-1 {averaged:.2%} instead of {plain:.2%} "
        f"({100 * (averaged - plain):+.2f} points), 2 forward passes per image instead of 1"
    )
    assert main([*words, "--tta", "flip", "--image-sizes", "16"]) == 2
    assert "tta, image-sizes: expected one of the two" in capsys.readouterr().err


@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_five_crops_of_entire_images_are_rejected(directory, folder, files, fit):
    loaded = vitral.load(directory)
    config = loaded.description.config
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, fit=fit))
    description = dataclasses.replace(loaded.description, config=config)
    classifier = Classifier(loaded.model, description, loaded.path)
    with pytest.raises(UserError, match="tta: expected none or flip"):
        classifier.predict(files, tta="five-crop")
    with pytest.raises(UserError, match="tta: expected none or flip"):
        vitral.evaluate(classifier, str(folder), tta="five-crop")
    scores = vitral.evaluate(classifier, str(folder), tta="flip", workers=0)
    best = [p.probabilities[0] for p in classifier.predict(files, tta="flip")]
    np.testing.assert_allclose(scores.confidence, best, atol=1e-6)


def test_predictions_equal_those_of_evaluation(directory, folder, files):
    classifier = vitral.load(directory)
    scores = vitral.evaluate(classifier, str(folder), batch_size=5, workers=0)
    found = classifier.predict(files)
    assert [p.path for p in found] == files
    assert [p.classes for p in found] == [tuple(row) for row in scores.ranked.tolist()]
    np.testing.assert_allclose([p.probabilities[0] for p in found], scores.confidence, atol=1e-6)
    assert [p.names for p in found] == [tuple(CLASSES[i] for i in p.classes) for p in found]
    assert len({p.classes for p in found}) > 5


@pytest.mark.parametrize(("side", "tokens"), [(None, 17), (32, 65), (8, 5)])
def test_predictions_equal_those_of_single_images_at_any_size(directory, files, side, tokens):
    classifier, counts = load(directory), []
    hook = classifier.model.norm.register_forward_hook(lambda *io: counts.append(io[2].shape[1]))
    found = classifier.predict(files, top=7, image_size=side)
    hook.remove()
    assert set(counts) == {tokens}
    for prediction in found:
        expected = by_hand(classifier, decode(Path(prediction.path).read_bytes()), side or 16)
        probabilities = torch.tensor(prediction.probabilities)
        assert (probabilities - expected[list(prediction.classes)]).abs().max() < 0.03
        assert sum(prediction.probabilities) == pytest.approx(1)
        assert sorted(prediction.probabilities, reverse=True) == [*prediction.probabilities]


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 2), (100, 1)])
def test_predictions_do_not_depend_on_batch_size_or_workers(directory, files, batch_size, workers):
    classifier = load(directory)
    expected = classifier.predict(files)
    for a, b in zip(
        expected, classifier.predict(files, batch_size=batch_size, workers=workers), strict=True
    ):
        assert (a.path, a.classes, a.names) == (b.path, b.classes, b.names)
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(("side", "workers"), [(None, 0), (32, 2)])
def test_embeddings_are_the_input_of_the_head(directory, files, pooling, side, workers):
    loaded = load(directory)
    torch.manual_seed(0)
    model = ViT(dataclasses.replace(MODEL, pooling=pooling), len(CLASSES)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    classifier = Classifier(model, loaded.description, loaded.path)
    vectors = classifier.embed(files, image_size=side, workers=workers, batch_size=5)
    assert (vectors.shape, vectors.dtype) == ((len(files), 16), np.float32)
    data = loaded.description.config.data
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    with torch.no_grad():
        for path, vector in zip(files[:4], vectors, strict=False):
            pixels = decode(Path(path).read_bytes())
            crop = eval_crop(pixels, data, side or 16)
            image = (crop / 255 - mean) / std
            tokens = model.forward_features(image[None])[0]
            expected = tokens[0] if pooling == "cls" else tokens[1:].mean(0)
            np.testing.assert_allclose(vector, expected, atol=1e-4)
    probabilities = model.head(torch.from_numpy(vectors)).softmax(1).amax(1)
    found = classifier.predict(files, top=1, image_size=side)
    np.testing.assert_allclose(
        [p.probabilities[0] for p in found], probabilities.detach(), atol=1e-5
    )


def test_embed_accepts_one_image_none_and_broken_ones(directory, files, tmp_path):
    classifier = load(directory)
    expected = classifier.embed(files)
    assert not np.isnan(expected).any()
    np.testing.assert_allclose(classifier.embed(Path(files[0])), expected[:1], atol=1e-5)
    assert classifier.embed([]).shape == (0, 16)
    broken = str(tmp_path / "missing.jpg")
    mixed = classifier.embed([broken, files[0], broken, files[1]], batch_size=2)
    np.testing.assert_allclose(mixed[[1, 3]], expected[:2], atol=1e-5)
    assert np.isnan(mixed[[0, 2]]).all()
    assert np.isnan(classifier.embed(broken)).all()


def test_every_input_type_gives_the_same_prediction(directory, files):
    classifier = load(directory)
    for path in files[:3]:
        chw = decode(Path(path).read_bytes())
        hwc = chw.permute(1, 2, 0)
        frozen = hwc.numpy().copy()
        frozen.flags.writeable = False
        backwards = hwc.numpy()[..., ::-1].copy()[..., ::-1]
        forms = [Path(path), chw, hwc, chw.numpy(), frozen, backwards]
        with Image.open(path) as image:
            mixed = classifier.predict([path, image, *forms])
            alone = [classifier.predict(form)[0] for form in (path, image, *forms)]
        assert mixed[0].path == mixed[2].path == path
        assert {p.path for p in (mixed[1], *mixed[3:])} == {None}
        if not path.endswith("jpg"):  # Pillow decodes JPEG to slightly different pixels
            assert len({dataclasses.replace(p, path="", probabilities=()) for p in mixed}) == 1
        for a, b in zip(mixed, alone, strict=True):
            assert (a.path, a.classes) == (b.path, b.classes)
            assert a.probabilities == pytest.approx(b.probabilities, abs=1e-6)


def test_which_selects_weights_and_top_limits_classes(directory, files):
    raw, averaged = (load(directory, which=which).predict(files) for which in ("model", "ema"))
    assert [p.classes for p in load(directory).predict(files)] == [p.classes for p in averaged]
    assert [p.classes for p in raw] != [p.classes for p in averaged]
    assert {len(p.classes) for p in load(directory).predict(files, top=100)} == {7}
    assert load(directory).predict([]) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_get_an_error_and_no_prediction(directory, files, tmp_path, workers):
    good = Path(files[0]).read_bytes()
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "half.jpg").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    reasons = {
        "text.jpg": "not an image",
        "half.jpg": "",
        "empty.jpg": "empty file",
        "loop.jpg": "symbolic links",
        "missing.jpg": "No such file",
        "text.jpg/inside.jpg": "Not a directory",
        "long" * 99: "name too long",
        "zero\0byte": "null",
    }
    broken = [str(tmp_path / name) for name in reasons]
    mixed = [path for pair in zip(broken, files, strict=False) for path in pair]
    classifier = load(directory)
    found = classifier.predict(mixed, batch_size=3, workers=workers)
    assert [p.path for p in found] == mixed
    for prediction, reason in zip(found[::2], reasons.values(), strict=True):
        assert reason in prediction.error
        assert "\n" not in prediction.error
        assert (prediction.classes, prediction.names, prediction.probabilities) == ((), (), ())
    expected = classifier.predict(files[: len(broken)])
    assert [(p.classes, p.error) for p in found[1::2]] == [(p.classes, None) for p in expected]
    assert all(p.error for p in classifier.predict(broken, workers=workers))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 18}, "multiple of the patch size 4, got 18; the nearest is 16"),
        ({"image_size": 0}, "got 0; the nearest is 4"),
        ({"top": 0}, "top: expected 1 or more, got 0"),
        ({"batch_size": 0}, "batch_size: expected 1 or more"),
        ({"workers": -1}, "workers: expected 0 or more, got -1"),
        ({"images": torch.zeros(3, 8, 8)}, "uint8 .* got float32 of shape \\(3, 8, 8\\)"),
        ({"images": np.zeros((1, 8, 8, 3), np.uint8)}, "got uint8 of shape \\(1, 8, 8, 3\\)"),
        ({"images": np.zeros((8, 8), np.uint8)}, "got uint8 of shape \\(8, 8\\)"),
        ({"images": None}, "expected paths, PIL images, arrays or tensors, got NoneType"),
        ({"images": b"content"}, "got bytes"),
        ({"images": ["a.jpg", 7]}, "got int"),
        ({"images": np.zeros((0, 8, 3), np.uint8)}, "got uint8 of shape \\(0, 8, 3\\)"),
    ],
)
def test_user_errors(directory, files, settings, message):
    with pytest.raises(UserError, match=message):
        load(directory).predict(**{"images": files, **settings})


def test_find_images_expands_folders_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = "b/2.jpg b/10.PNG b/c/x.webp b/notes.txt b/.hidden.jpg b/.cache/y.jpg a[1].jpg e.jpg"
    for name in names.split():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    in_b = ["b/10.PNG", "b/2.jpg", "b/c/x.webp"]
    for places, expected in {
        "b": in_b,
        "b/": in_b,
        "e.jpg b e.jpg": ["e.jpg", *in_b, "e.jpg"],
        "a[1].jpg": ["a[1].jpg"],
        "?.jpg": ["e.jpg"],
        "b/**/*.[jwp]*": ["b/2.jpg", "b/c/x.webp"],
        "b/notes.txt none.jpg": ["b/notes.txt", "none.jpg"],
    }.items():
        assert find_images(places.split()) == expected, places
    assert find_images(["**"]) == ["a[1].jpg", *in_b, "b/notes.txt", "e.jpg"]
    assert find_images([str(tmp_path / "b*")]) == [str(tmp_path / name) for name in in_b]
    Path("b/c/up").symlink_to("..")  # a cycle
    assert find_images(["b"]) == in_b
    Path("empty").mkdir()
    for place in ("empty", "*.gif"):
        with pytest.raises(UserError, match=r"expected images .* got none") as caught:
            find_images(["e.jpg", place])
        assert place in str(caught.value)


def test_a_file_name_that_is_not_utf8_is_supported(tmp_path, directory, files):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")
    Path(odd).write_bytes(Path(files[0]).read_bytes())
    (found,) = load(directory).predict(find_images([str(tmp_path)]))
    assert found.path == odd
    assert found.error is None


def test_a_model_in_half_precision_predicts_nearly_the_same(tmp_path):
    model = ViT(ViTConfig(dim=16, depth=1, num_heads=2, num_kv_heads=1, image_size=32), 3)
    torch.nn.init.normal_(model.head.weight)
    description = weights.describe(Config(model=model.config), ("a", "b", "c"), "", {})
    weights.save(tmp_path / "w", {"model": model.state_dict()}, description)
    classifier, half = load(tmp_path / "w"), load(tmp_path / "w")
    half.model.bfloat16()
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    (exact,), (near,) = classifier.predict(image), half.predict(image)
    assert near.probabilities == pytest.approx(exact.probabilities, abs=0.02)
    assert half.embed(image).dtype == np.float32
