"""Tests of ImageNet's test sets in their published layouts, with random images.

Images are PNGs of the model's input size and are not cropped, so the reference needs neither a
decoder nor resampling: it computes logits from the generated pixels, and metrics with numpy.
"""

import csv
import dataclasses
import io
import json
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from vitral import weights as saved
from vitral.cli import main
from vitral.config import Config, DataConfig, ViTConfig
from vitral.data.imagenet import validation_labels, wnids
from vitral.errors import UserError
from vitral.evaluation import evaluate, evaluate_suite, find_suite, sweep
from vitral.evaluation.table import Row, write_rows
from vitral.model import ViT

SIDE = 8
V2 = ("matched-frequency", "threshold0.7", "top-images")
NAMES = [
    "ImageNet validation",
    "ReaL",
    "ImageNet-V2 matched-frequency",
    "ImageNet-V2 threshold-0.7",
    "ImageNet-V2 top-images",
    "ImageNet-A",
    "ImageNet-R",
    "ImageNet-Sketch",
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VITRAL_CACHE", str(tmp_path_factory.mktemp("cache")))


def make_weights(folder, classes, seed=0, **data):
    """Weights whose logits vary enough between images for meaningful scores."""
    torch.manual_seed(seed)
    shape = {"dim": 16, "depth": 1, "num_heads": 2, "num_kv_heads": 1}
    model = ViTConfig(**shape, patch_size=4, image_size=SIDE)
    config = Config(model=model, data=DataConfig(**{"eval_crop": 1.0, "workers": 0, **data}))
    vit = ViT(model, len(classes))
    torch.nn.init.normal_(vit.head.weight, std=0.5)
    description = saved.describe(config, classes, "", {})
    saved.save(folder, {"model": vit.state_dict()}, description)
    return saved.load(folder)


def random_image(rng):
    low = rng.integers(0, 256, (2, 2, 3)).astype(np.uint8)
    noise = rng.integers(0, 60, (SIDE, SIDE, 3))
    return np.clip(low.repeat(4, 0).repeat(4, 1) + noise, 0, 255).astype(np.uint8)


def png(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def put(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(pixels))


def logits_of(weights, pixels):
    """Logits (N, classes) of pixels (N, H, W, 3), without vitral's input pipeline."""
    data = weights.description.config.data
    images = (np.stack(pixels) / 255 - data.mean) / data.std
    with torch.no_grad():
        return weights.model(torch.tensor(images).permute(0, 3, 1, 2).float()).double().numpy()


def masked(weights, pixels, known):
    """Logits of the classes in `known`; the others are minus infinity."""
    logits = logits_of(weights, pixels)
    out = [i for i, name in enumerate(weights.description.classes) if name not in known]
    logits[:, out] = -np.inf
    return logits


def reference(weights, images, known):
    """(images, classes, top-1, top-5, calibration error) of pairs of pixels and correct wnids."""
    names = np.array(weights.description.classes)
    images = [(pixels, right & known) for pixels, right in images if right & known]
    logits = masked(weights, [pixels for pixels, _ in images], known)
    first, five, bins = [], [], np.zeros(15)
    for row, (_, right) in zip(logits, images, strict=True):
        order = [names[i] for i in np.argsort(-row, kind="stable")[: min(5, len(known))]]
        first.append(order[0] in right)
        five.append(bool(right & {*order}))
        probability = 1 / np.exp(row - row.max()).sum()
        bins[int(np.ceil(probability * 15)) - 1] += probability - first[-1]
    return len(images), len(known), np.mean(first), np.mean(five), np.abs(bins).sum() / len(images)


def assert_row_equal(row, expected):
    found = dataclasses.astuple(row)[1:]
    assert found[:2] == expected[:2]
    np.testing.assert_allclose(found[2:], expected[2:], atol=1e-5)


@dataclasses.dataclass
class SuiteData:
    """All sets below `root`; `images` maps names of sets to pairs of pixels and correct wnids."""

    root: object
    weights: saved.Weights
    images: dict
    known: dict
    validation: dict  # number: pixels
    real: list


def fill(weights, rng, known, folder, place):
    """Writes two images per class; half of them with the class that the masked model predicts."""
    pixels = [random_image(rng) for _ in range(2 * len(known))]
    order = sorted(known)
    best = masked(weights, pixels, known).argmax(1)
    found = []
    for i, image in enumerate(pixels):
        wnid = order[i // 2] if i % 2 else weights.description.classes[best[i]]
        put(folder / place(wnid) / f"{i}.jpg", image)
        found.append((image, {wnid}))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("suite")
    rng = np.random.default_rng(1)
    every = wnids()
    weights = make_weights(root / "weights", every)
    images, known = {}, {}

    def add(name, classes, folder, place=str):
        known[name] = {*classes}
        images[name] = fill(weights, rng, known[name], root / folder, place)

    for variant in V2:
        # Recht et al. name folders by position. One set has all, to detect an order as text.
        some = every if variant == V2[0] else [every[i] for i in (0, 1, 2, 9, 10, 11, 100, 999)]
        name = f"ImageNet-V2 {variant.replace('d0', 'd-0')}"
        add(name, some, f"imagenetv2-{variant}-format-val", lambda w: str(every.index(w)))
    for name, folder in (
        ("ImageNet-A", "imagenet-a"),
        ("ImageNet-R", "imagenet-rendition/imagenet-r"),
    ):
        add(name, rng.choice(every, 200, replace=False).tolist(), folder)
        (root / folder / "README.txt").write_text("about")
    add("ImageNet-Sketch", rng.choice(every, 30, replace=False).tolist(), "sketch")

    truth = validation_labels()
    classes = rng.choice(1000, 12, replace=False)
    numbers = [int(n) + 1 for c in classes for n in np.flatnonzero(truth == c)[[40, 3, 17, 8]]]
    validation = {n: random_image(rng) for n in rng.permutation(numbers).tolist()}
    known["ImageNet validation"] = known["ReaL"] = {every[c] for c in classes}
    best = masked(weights, list(validation.values()), known["ReaL"]).argmax(1)
    real = [[int(label)] for label in truth]
    for k, (n, first) in enumerate(zip(validation, best.tolist(), strict=True)):
        own, other = int(truth[n - 1]), int(rng.choice(1000))
        # none; two, with the second predicted; one in the set; any class; its own
        real[n - 1] = [[], [own, first], [int(rng.choice(classes))], [other], [own]][k % 5]
    images["ImageNet validation"] = [(p, {every[truth[n - 1]]}) for n, p in validation.items()]
    images["ReaL"] = [(p, {every[i] for i in real[n - 1]}) for n, p in validation.items()]
    for n, pixels in validation.items():
        put(root / "val" / every[truth[n - 1]] / f"ILSVRC2012_val_{n:08d}.JPEG", pixels)
    (root / "real.json").write_text(json.dumps(real))
    return SuiteData(root, weights, images, known, validation, real)


def test_every_set_agrees_with_numpy(data):
    suite = find_suite(data.root)
    assert suite.names() == NAMES
    rows = list(evaluate_suite(data.weights, suite, batch_size=64))
    assert [row.name for row in rows] == NAMES
    for row in rows:
        assert_row_equal(row, reference(data.weights, data.images[row.name], data.known[row.name]))
        assert 0 < row.top1 < row.top5 <= 1
    images = {row.name: row.images for row in rows}
    assert images["ImageNet validation"] == 48
    assert 28 < images["ReaL"] < 48


def test_classes_outside_the_subset_are_ignored(data):
    row = next(evaluate_suite(data.weights, data.root / "imagenet-a"))
    names, images = data.weights.description.classes, data.images["ImageNet-A"]
    plain = logits_of(data.weights, [pixels for pixels, _ in images]).argmax(1)
    unmasked = np.mean([names[i] in right for i, (_, right) in zip(plain, images, strict=True)])
    assert row.top1 > 0.5 > unmasked + 0.1


def test_positions_are_not_sorted_as_text(data):
    """In text order, folder 10 would be class 2, and nearly all labels would be wrong."""
    place = data.root / "imagenetv2-matched-frequency-format-val"
    (found,) = find_suite(place).sets
    for name in ("2", "10", "100", "999"):
        label = found.classes.index(wnids()[int(name)])
        paths = found.records.names[found.records.labels == label].tolist()
        assert {path.split(b"/")[0] for path in paths} == {name.encode()}


def test_weights_with_few_classes_are_scored_on_shared_classes(data, tmp_path):
    """The classes are in reverse order, and one of them is not in ImageNet."""
    validation = sorted(data.known["ReaL"])
    shared = {*validation[:4], *sorted(data.known["ImageNet-A"])[:3]}
    weights = make_weights(tmp_path / "few", ("zebra crossing", *sorted(shared, reverse=True)))
    for row in evaluate_suite(weights, data.root):
        known = data.known[row.name] & shared
        if len(known) < 2:
            assert (row.images, row.classes) == (0, len(known))
            assert np.isnan([row.top1, row.top5, row.calibration_error]).all()
        else:
            assert_row_equal(row, reference(weights, data.images[row.name], known))


def test_undefined_fractions_stay_empty(tmp_path):
    row = Row("ImageNet-A", 0, 1, *[float("nan")] * 3)
    assert str(row).split() == ["0", "1", "-", "-", "-"]
    write_rows(tmp_path / "suite.csv", "set", [row])
    assert (tmp_path / "suite.csv").read_text().splitlines()[1] == "ImageNet-A,0,1,,,"


def put_flat(data, root):
    for n, pixels in data.validation.items():
        put(root / "ILSVRC" / "Data" / "CLS-LOC" / "val" / f"ILSVRC2012_val_{n:08d}.JPEG", pixels)


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def put_tar(data, root):
    (root / "imagenet").mkdir()
    with tarfile.open(root / "imagenet" / "ILSVRC2012_img_val.tar", "w") as tar:
        for n, pixels in data.validation.items():
            add(tar, f"ILSVRC2012_val_{n:08d}.JPEG", png(pixels))


def put_shards(data, root):
    (root / "imagenet-val").mkdir()
    with tarfile.open(root / "imagenet-val" / "0000.tar", "w") as tar:
        for n, pixels in data.validation.items():
            add(tar, f"ILSVRC2012_val_{n:08d}.png", png(pixels))
            label = wnids()[validation_labels()[n - 1]]
            add(tar, f"ILSVRC2012_val_{n:08d}.cls", label.encode())


def put_parquet(data, root):
    """The file names are those of the Hub, which contain the wnid."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    labels = [wnids()[validation_labels()[n - 1]] for n in data.validation]
    names = [f"ILSVRC2012_val_{n:08d}" for n in data.validation]
    paths = [f"{name}_{wnid}.JPEG" for name, wnid in zip(names, labels, strict=True)]
    contents = map(png, data.validation.values())
    rows = [{"bytes": c, "path": p} for c, p in zip(contents, paths, strict=True)]
    (root / "imagenet" / "val").mkdir(parents=True)
    place = root / "imagenet" / "val" / "validation-00000-of-00001.parquet"
    parquet.write_table(pa.table({"image": rows, "label": labels}), place)


def put_both(data, root):
    """The unpacked set next to its archive, which must not be opened."""
    shutil.copytree(data.root / "val", root / "imagenet" / "val")
    (root / "imagenet" / "ILSVRC2012_img_val.tar").write_bytes(b"cut off")


@pytest.mark.parametrize("layout", [put_flat, put_tar, put_shards, put_parquet, put_both])
def test_layouts_of_the_validation_set_are_recognized(data, tmp_path, layout):
    layout(data, tmp_path)
    shutil.copy(data.root / "real.json", tmp_path)
    rows = list(evaluate_suite(data.weights, tmp_path))
    assert [row.name for row in rows] == NAMES[:2]
    for row in rows:
        assert_row_equal(row, reference(data.weights, data.images[row.name], data.known[row.name]))


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("imagenet_val", "ImageNet validation"),
        ("imagenet/images/val", "ImageNet validation"),
        ("imagenet/2012/val", "ImageNet validation"),
        ("ImageNetV2-matched-frequency", "ImageNet-V2 matched-frequency"),
        ("imagenetv2/imagenetv2-threshold-0.7", "ImageNet-V2 threshold-0.7"),
        ("imagenet-adversarial/imagenet-a", "ImageNet-A"),
        ("ImageNet_A", "ImageNet-A"),
        ("imagenet-r/test", "ImageNet-R"),
        ("imagenet-sketch/images", "ImageNet-Sketch"),
        ("in-sketch/val", "ImageNet-Sketch"),
    ],
)
def test_alternative_folder_names_are_recognized(data, tmp_path, folder, name):
    shutil.copytree(data.root / "sketch", tmp_path / folder)
    put(tmp_path / "imagenet" / "train" / "n01440764" / "0.jpg", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / folder / ".hidden").mkdir()
    for hidden in ("__MACOSX", ".trash"):
        shutil.copytree(data.root / "sketch", tmp_path / hidden / folder)
    (tmp_path / folder / sorted(data.known["ImageNet-R"])[0]).mkdir(exist_ok=True)  # empty
    (tmp_path / "again").symlink_to(tmp_path)
    suite = find_suite(tmp_path)
    assert suite.names() == [name]
    assert suite.sets[0].place.samefile(tmp_path / folder)
    assert suite.describe().count("not found") == 7
    assert {*suite.sets[0].classes} == data.known["ImageNet-Sketch"]


def test_real_labels_require_numbered_images(data, tmp_path):
    shutil.copy(data.root / "real.json", tmp_path)
    shutil.copytree(data.root / "sketch", tmp_path / "val")
    assert find_suite(tmp_path).names() == ["ImageNet validation"]


def test_an_invalid_image_number_has_no_real_label(data, tmp_path):
    shutil.copytree(data.root / "val", tmp_path / "val")
    shutil.copy(data.root / "real.json", tmp_path)
    place = tmp_path / "val" / sorted(data.known["ReaL"])[0]
    put(place / "ILSVRC2012_val_00050001.JPEG", np.zeros((SIDE, SIDE, 3), np.uint8))
    images = {row.name: row.images for row in evaluate_suite(data.weights, tmp_path)}
    complete = {row.name: row.images for row in evaluate_suite(data.weights, data.root)}
    assert images == {"ImageNet validation": 49, "ReaL": complete["ReaL"]}


@pytest.fixture
def user_error(capsys, tmp_path):
    def expect(words, *fragments):
        assert main(["val", *map(str, words)]) == 2
        text = capsys.readouterr().err
        assert re.fullmatch(r"vitral: .+\n", text), text
        for fragment in fragments:
            assert fragment in text, text
        assert not (tmp_path / "out").exists()

    return expect


def test_user_errors(data, tmp_path, user_error):
    good, out = data.weights.path, ["--out", tmp_path / "out"]
    empty = tmp_path / "empty"
    (empty / "imagenet-a").mkdir(parents=True)
    expected = ["imagenet-a", "imagenet-r", "real.json", "sketch", "top-images-format-val"]
    user_error([good, "--suite", empty, *out], str(empty), *expected)
    user_error([good, "--suite", tmp_path / "none", *out], "a path that does not exist")
    user_error([good, "--suite", data.root, "--data", "digits", *out], "suite, data")
    user_error([good, "--suite", data.root, "--image-sizes", "8", *out], "suite, image-sizes")
    user_error([good, "--image-sizes", "8", "10", *out], "image-sizes", "10", "nearest is 8")
    user_error([good, "--image-sizes", "eight", *out], "image-sizes", "'eight'")

    digits = make_weights(tmp_path / "digits", tuple("0123456789")).path
    user_error([digits, "--suite", data.root, *out], "wnid", "got 0, 1, 2 and 7 more")
    far = make_weights(tmp_path / "far", ("n01440764", "own")).path
    user_error([far, "--suite", data.root / "imagenet-a", *out], "two or more of the 2 classes")

    for folder in ("imagenet-a", "copy/imagenet-a"):
        shutil.copytree(data.root / "sketch", tmp_path / "twice" / folder)
    user_error([good, "--suite", tmp_path / "twice", *out], "one location of ImageNet-A", "copy")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("{", "50,000 lists"),
        ("[[1], [2]]", "50,000 lists"),
        (json.dumps([[1]] * 49_999 + [[1000]]), "[1000] for image 50000"),
        (json.dumps([[1]] * 4 + [3] + [[1]] * 49_995), "3 for image 5"),
        (json.dumps([[1.0]] + [[1]] * 49_999), "[1.0] for image 1"),
        (json.dumps([[True]] + [[1]] * 49_999), "[True] for image 1"),
    ],
)
def test_invalid_files_of_real_labels_are_refused(data, tmp_path, user_error, content, fragment):
    shutil.copytree(data.root / "val", tmp_path / "val")
    (tmp_path / "real.json").write_text(content)
    user_error([data.weights.path, "--suite", tmp_path, "--out", tmp_path / "out"], fragment)


def test_the_table_contains_the_printed_scores(data, tmp_path, capsys):
    sets, out = tmp_path / "sets", tmp_path / "out"
    sets.mkdir()
    for name in ("val", "real.json", "sketch"):
        (sets / name).symlink_to(data.root / name)
    assert main(["val", str(data.weights.path), "--suite", str(sets), "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert f"ImageNet-Sketch: {sets / 'sketch'}\n" in output
    assert "ImageNet-A: not found (imagenet-a)\n" in output
    rows = list(evaluate_suite(data.weights, sets))
    with (out / "suite.csv").open(newline="") as file:
        header, *written = csv.reader(file)
    assert header == ["test set", "images", "classes", "top1", "top5", "ece"]
    assert written == [[str(value) for value in dataclasses.astuple(row)] for row in rows]
    assert [row.name for row in rows] == [*NAMES[:2], NAMES[-1]]
    for row in rows:
        line = next(line for line in output.splitlines() if re.match(rf"{row.name}  +\d", line))
        assert line.split()[-3:-1] == [f"{row.top1:.2%}", f"{row.top5:.2%}"]
    assert [path.name for path in out.iterdir()] == ["suite.csv"]


def test_a_broken_image_leaves_no_table(data, tmp_path, capsys):
    shutil.copytree(data.root / "sketch", tmp_path / "sketch")
    shutil.copytree(data.root / "val", tmp_path / "val")
    bad = next((tmp_path / "sketch").glob("*/*"))
    bad.write_bytes(b"no image")
    words = [str(data.weights.path), "--suite", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["val", *words]) == 2
    output = capsys.readouterr()
    assert str(bad) in output.err
    assert re.search(r"ImageNet validation +48", output.out)
    assert not list((tmp_path / "out").iterdir())


def test_sweep_crops_the_same_fraction_at_every_size(tmp_path):
    """Half of the 32-pixel short side is 16 pixels, which need no resampling at size 16."""
    rng, classes = np.random.default_rng(0), ("a", "b", "c")
    weights = make_weights(tmp_path / "weights", classes, eval_crop=0.5)
    images = []
    for i in range(30):
        pixels = random_image(rng).repeat(4, 0).repeat(6, 1)
        put(tmp_path / "set" / "val" / classes[i % 3] / f"{i:02}.png", pixels)
        images.append((pixels[8:24, 16:32], {classes[i % 3]}))
    data = str(tmp_path / "set")
    scores = dict(sweep(weights, [16, 8], data))
    assert_row_equal(scores[16].row("16"), reference(weights, images, {*classes}))
    assert scores[8].metrics() == evaluate(weights, data).metrics()
    assert scores[8].metrics() != scores[16].metrics()
    with pytest.raises(UserError, match="which"):
        sweep(weights, [8], data, which="model")
