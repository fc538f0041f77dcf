"""ImageNet's test sets in the layouts that they are published in, of images drawn here.

Images are PNG of the model's size and the crop is whole, so that the reference needs no decoder and
no resampling: logits of the very pixels that were drawn, then numpy.
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
    """Weights whose logits differ enough from image to image to be worth scoring."""
    torch.manual_seed(seed)
    shape = {"dim": 16, "depth": 1, "num_heads": 2, "num_kv_heads": 1}
    model = ViTConfig(**shape, patch_size=4, image_size=SIDE)
    config = Config(model=model, data=DataConfig(**{"eval_crop": 1.0, "workers": 0, **data}))
    vit = ViT(model, len(classes))
    torch.nn.init.normal_(vit.head.weight, std=0.5)
    description = saved.describe(config, classes, "", {})
    saved.save(folder, {"model": vit.state_dict()}, description)
    return saved.load(folder)


def draw(draws):
    low = draws.integers(0, 256, (2, 2, 3)).astype(np.uint8)
    noise = draws.integers(0, 60, (SIDE, SIDE, 3))
    return np.clip(low.repeat(4, 0).repeat(4, 1) + noise, 0, 255).astype(np.uint8)


def png(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def put(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(pixels))


def logits_of(weights, pixels):
    """(N, classes): by hand from pixels (N, H, W, 3)."""
    data = weights.description.config.data
    images = (np.stack(pixels) / 255 - data.mean) / data.std
    with torch.no_grad():
        return weights.model(torch.tensor(images).permute(0, 3, 1, 2).float()).double().numpy()


def masked(weights, pixels, known):
    """Logits of the classes `known` alone; the others' are minus infinity."""
    logits = logits_of(weights, pixels)
    out = [i for i, name in enumerate(weights.description.classes) if name not in known]
    logits[:, out] = -np.inf
    return logits


def reference(weights, images, known):
    """(images, classes, top-1, top-5, calibration error) of (pixels, wnids that are right)."""
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


def agree(row, expected):
    found = dataclasses.astuple(row)[1:]
    assert found[:2] == expected[:2]
    np.testing.assert_allclose(found[2:], expected[2:], atol=1e-5)


@dataclasses.dataclass
class World:
    """Every set, whole, below `root`; `images` has pixels and right wnids by name of the set."""

    root: object
    weights: saved.Weights
    images: dict
    known: dict
    validation: dict  # number: pixels
    real: list


def fill(weights, draws, known, folder, place):
    """Two images of each class; half lie where the masked model would have them."""
    pixels = [draw(draws) for _ in range(2 * len(known))]
    order = sorted(known)
    best = masked(weights, pixels, known).argmax(1)
    found = []
    for i, image in enumerate(pixels):
        wnid = order[i // 2] if i % 2 else weights.description.classes[best[i]]
        put(folder / place(wnid) / f"{i}.jpg", image)
        found.append((image, {wnid}))
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("suite")
    draws = np.random.default_rng(1)
    every = wnids()
    weights = make_weights(root / "weights", every)
    images, known = {}, {}

    def add(name, classes, folder, place=str):
        known[name] = {*classes}
        images[name] = fill(weights, draws, known[name], root / folder, place)

    for variant in V2:
        # Recht et al.'s folders are positions; all thousand once, as the trap needs.
        some = every if variant == V2[0] else [every[i] for i in (0, 1, 2, 9, 10, 11, 100, 999)]
        name = f"ImageNet-V2 {variant.replace('d0', 'd-0')}"
        add(name, some, f"imagenetv2-{variant}-format-val", lambda w: str(every.index(w)))
    for name, folder in (
        ("ImageNet-A", "imagenet-a"),
        ("ImageNet-R", "imagenet-rendition/imagenet-r"),
    ):
        add(name, draws.choice(every, 200, replace=False).tolist(), folder)
        (root / folder / "README.txt").write_text("about")
    add("ImageNet-Sketch", draws.choice(every, 30, replace=False).tolist(), "sketch")

    truth = validation_labels()
    classes = draws.choice(1000, 12, replace=False)
    numbers = [int(n) + 1 for c in classes for n in np.flatnonzero(truth == c)[[40, 3, 17, 8]]]
    validation = {n: draw(draws) for n in draws.permutation(numbers).tolist()}
    known["ImageNet validation"] = known["ReaL"] = {every[c] for c in classes}
    best = masked(weights, list(validation.values()), known["ReaL"]).argmax(1)
    real = [[int(label)] for label in truth]
    for k, (n, first) in enumerate(zip(validation, best.tolist(), strict=True)):
        own, other = int(truth[n - 1]), int(draws.choice(1000))
        # none; two of which the second is predicted; another one; one of a class not there
        real[n - 1] = [[], [own, first], [int(draws.choice(classes))], [other], [own]][k % 5]
    images["ImageNet validation"] = [(p, {every[truth[n - 1]]}) for n, p in validation.items()]
    images["ReaL"] = [(p, {every[i] for i in real[n - 1]}) for n, p in validation.items()]
    for n, pixels in validation.items():
        put(root / "val" / every[truth[n - 1]] / f"ILSVRC2012_val_{n:08d}.JPEG", pixels)
    (root / "real.json").write_text(json.dumps(real))
    return World(root, weights, images, known, validation, real)


def test_every_set_agrees_with_numpy(world):
    suite = find_suite(world.root)
    assert suite.names() == NAMES
    rows = list(evaluate_suite(world.weights, suite, batch_size=64))
    assert [row.name for row in rows] == NAMES
    for row in rows:
        agree(row, reference(world.weights, world.images[row.name], world.known[row.name]))
        assert 0 < row.top1 < row.top5 <= 1
    images = {row.name: row.images for row in rows}
    assert images["ImageNet validation"] == 48
    assert 28 < images["ReaL"] < 48


def test_classes_outside_the_subset_are_ignored(world):
    row = next(evaluate_suite(world.weights, world.root / "imagenet-a"))
    names, images = world.weights.description.classes, world.images["ImageNet-A"]
    plain = logits_of(world.weights, [pixels for pixels, _ in images]).argmax(1)
    unmasked = np.mean([names[i] in right for i, (_, right) in zip(plain, images, strict=True)])
    assert row.top1 > 0.5 > unmasked + 0.1


def test_positions_are_not_sorted_as_text(world):
    """Read in order of text, folder 10 would be class 2: nearly all would be wrong."""
    place = world.root / "imagenetv2-matched-frequency-format-val"
    (found,) = find_suite(place).sets
    for name in ("2", "10", "100", "999"):
        label = found.classes.index(wnids()[int(name)])
        of_it = found.records.names[found.records.labels == label].tolist()
        assert {path.split(b"/")[0] for path in of_it} == {name.encode()}


def test_weights_with_a_few_classes(world, tmp_path):
    """Ten classes in an order of their own, one of them unknown to ImageNet."""
    validation = sorted(world.known["ReaL"])
    shared = {*validation[:4], *sorted(world.known["ImageNet-A"])[:3]}
    weights = make_weights(tmp_path / "few", ("zebra crossing", *sorted(shared, reverse=True)))
    for row in evaluate_suite(weights, world.root):
        known = world.known[row.name] & shared
        if len(known) < 2:
            assert (row.images, row.classes) == (0, len(known))
            assert np.isnan([row.top1, row.top5, row.calibration_error]).all()
        else:
            agree(row, reference(weights, world.images[row.name], known))


def test_undefined_fractions_stay_empty(tmp_path):
    row = Row("ImageNet-A", 0, 1, *[float("nan")] * 3)
    assert str(row).split() == ["0", "1", "-", "-", "-"]
    write_rows(tmp_path / "suite.csv", "set", [row])
    assert (tmp_path / "suite.csv").read_text().splitlines()[1] == "ImageNet-A,0,1,,,"


def put_flat(world, root):
    for n, pixels in world.validation.items():
        put(root / "ILSVRC" / "Data" / "CLS-LOC" / "val" / f"ILSVRC2012_val_{n:08d}.JPEG", pixels)


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def put_tar(world, root):
    (root / "imagenet").mkdir()
    with tarfile.open(root / "imagenet" / "ILSVRC2012_img_val.tar", "w") as tar:
        for n, pixels in world.validation.items():
            add(tar, f"ILSVRC2012_val_{n:08d}.JPEG", png(pixels))


def put_shards(world, root):
    (root / "imagenet-val").mkdir()
    with tarfile.open(root / "imagenet-val" / "0000.tar", "w") as tar:
        for n, pixels in world.validation.items():
            add(tar, f"ILSVRC2012_val_{n:08d}.png", png(pixels))
            label = wnids()[validation_labels()[n - 1]]
            add(tar, f"ILSVRC2012_val_{n:08d}.cls", label.encode())


def put_parquet(world, root):
    """Names as the Hub has them, wnid and all."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    labels = [wnids()[validation_labels()[n - 1]] for n in world.validation]
    names = [f"ILSVRC2012_val_{n:08d}" for n in world.validation]
    paths = [f"{name}_{wnid}.JPEG" for name, wnid in zip(names, labels, strict=True)]
    contents = map(png, world.validation.values())
    rows = [{"bytes": c, "path": p} for c, p in zip(contents, paths, strict=True)]
    (root / "imagenet" / "val").mkdir(parents=True)
    place = root / "imagenet" / "val" / "validation-00000-of-00001.parquet"
    parquet.write_table(pa.table({"image": rows, "label": labels}), place)


def put_both(world, root):
    """Unpacked, and beside it the archive, which is not opened again."""
    shutil.copytree(world.root / "val", root / "imagenet" / "val")
    (root / "imagenet" / "ILSVRC2012_img_val.tar").write_bytes(b"cut off")


@pytest.mark.parametrize("layout", [put_flat, put_tar, put_shards, put_parquet, put_both])
def test_layouts_of_the_validation_set(world, tmp_path, layout):
    layout(world, tmp_path)
    shutil.copy(world.root / "real.json", tmp_path)
    rows = list(evaluate_suite(world.weights, tmp_path))
    assert [row.name for row in rows] == NAMES[:2]
    for row in rows:
        agree(row, reference(world.weights, world.images[row.name], world.known[row.name]))


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
def test_other_spellings(world, tmp_path, folder, name):
    shutil.copytree(world.root / "sketch", tmp_path / folder)
    put(tmp_path / "imagenet" / "train" / "n01440764" / "0.jpg", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / folder / ".hidden").mkdir()
    for hidden in ("__MACOSX", ".trash"):
        shutil.copytree(world.root / "sketch", tmp_path / hidden / folder)
    (tmp_path / folder / sorted(world.known["ImageNet-R"])[0]).mkdir(exist_ok=True)  # empty
    (tmp_path / "again").symlink_to(tmp_path)
    suite = find_suite(tmp_path)
    assert suite.names() == [name]
    assert suite.sets[0].place.samefile(tmp_path / folder)
    assert suite.describe().count("not found") == 7
    assert {*suite.sets[0].classes} == world.known["ImageNet-Sketch"]


def test_real_needs_images_with_numbers(world, tmp_path):
    shutil.copy(world.root / "real.json", tmp_path)
    shutil.copytree(world.root / "sketch", tmp_path / "val")
    assert find_suite(tmp_path).names() == ["ImageNet validation"]


def test_an_invalid_validation_image_number(world, tmp_path):
    shutil.copytree(world.root / "val", tmp_path / "val")
    shutil.copy(world.root / "real.json", tmp_path)
    place = tmp_path / "val" / sorted(world.known["ReaL"])[0]
    put(place / "ILSVRC2012_val_00050001.JPEG", np.zeros((SIDE, SIDE, 3), np.uint8))
    images = {row.name: row.images for row in evaluate_suite(world.weights, tmp_path)}
    whole = {row.name: row.images for row in evaluate_suite(world.weights, world.root)}
    assert images == {"ImageNet validation": 49, "ReaL": whole["ReaL"]}


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


def test_user_errors(world, tmp_path, user_error):
    ours, out = world.weights.path, ["--out", tmp_path / "out"]
    empty = tmp_path / "empty"
    (empty / "imagenet-a").mkdir(parents=True)
    looked_for = ["imagenet-a", "imagenet-r", "real.json", "sketch", "top-images-format-val"]
    user_error([ours, "--suite", empty, *out], str(empty), *looked_for)
    user_error([ours, "--suite", tmp_path / "none", *out], "nothing of that name")
    user_error([ours, "--suite", world.root, "--data", "digits", *out], "suite, data")
    user_error([ours, "--suite", world.root, "--image-sizes", "8", *out], "suite, image-sizes")
    user_error([ours, "--image-sizes", "8", "10", *out], "image-sizes", "10", "nearest is 8")
    user_error([ours, "--image-sizes", "eight", *out], "image-sizes", "'eight'")

    digits = make_weights(tmp_path / "digits", tuple("0123456789")).path
    user_error([digits, "--suite", world.root, *out], "wnid", "got 0, 1, 2 and 7 more")
    far = make_weights(tmp_path / "far", ("n01440764", "own")).path
    user_error([far, "--suite", world.root / "imagenet-a", *out], "two or more of the 2 classes")

    for folder in ("imagenet-a", "copy/imagenet-a"):
        shutil.copytree(world.root / "sketch", tmp_path / "twice" / folder)
    user_error([ours, "--suite", tmp_path / "twice", *out], "one place of ImageNet-A", "copy")


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
def test_files_that_are_not_real_labels(world, tmp_path, user_error, content, fragment):
    shutil.copytree(world.root / "val", tmp_path / "val")
    (tmp_path / "real.json").write_text(content)
    user_error([world.weights.path, "--suite", tmp_path, "--out", tmp_path / "out"], fragment)


def test_the_command_writes_what_it_prints(world, tmp_path, capsys):
    sets, out = tmp_path / "sets", tmp_path / "out"
    sets.mkdir()
    for name in ("val", "real.json", "sketch"):
        (sets / name).symlink_to(world.root / name)
    assert main(["val", str(world.weights.path), "--suite", str(sets), "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert f"ImageNet-Sketch: {sets / 'sketch'}\n" in output
    assert "ImageNet-A: not found (imagenet-a)\n" in output
    rows = list(evaluate_suite(world.weights, sets))
    with (out / "suite.csv").open(newline="") as file:
        header, *written = csv.reader(file)
    assert header == ["set", "images", "classes", "top1", "top5", "ece"]
    assert written == [[str(value) for value in dataclasses.astuple(row)] for row in rows]
    assert [row.name for row in rows] == [*NAMES[:2], NAMES[-1]]
    for row in rows:
        line = next(line for line in output.splitlines() if re.match(rf"{row.name}  +\d", line))
        assert line.split()[-3:-1] == [f"{row.top1:.2%}", f"{row.top5:.2%}"]
    assert [path.name for path in out.iterdir()] == ["suite.csv"]


def test_a_broken_image_leaves_no_table(world, tmp_path, capsys):
    shutil.copytree(world.root / "sketch", tmp_path / "sketch")
    shutil.copytree(world.root / "val", tmp_path / "val")
    bad = next((tmp_path / "sketch").glob("*/*"))
    bad.write_bytes(b"no image")
    words = [str(world.weights.path), "--suite", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["val", *words]) == 2
    output = capsys.readouterr()
    assert str(bad) in output.err
    assert re.search(r"ImageNet validation +48", output.out)
    assert not list((tmp_path / "out").iterdir())


def test_sweep_crops_the_same_fraction_at_every_size(tmp_path):
    """Half of the short side of 32 pixels is 16, which need no resampling to become 16."""
    draws, classes = np.random.default_rng(0), ("a", "b", "c")
    weights = make_weights(tmp_path / "weights", classes, eval_crop=0.5)
    images = []
    for i in range(30):
        pixels = draw(draws).repeat(4, 0).repeat(6, 1)
        put(tmp_path / "set" / "val" / classes[i % 3] / f"{i:02}.png", pixels)
        images.append((pixels[8:24, 16:32], {classes[i % 3]}))
    data = str(tmp_path / "set")
    scores = dict(sweep(weights, [16, 8], data))
    agree(scores[16].row("16"), reference(weights, images, {*classes}))
    assert scores[8].metrics() == evaluate(weights, data).metrics()
    assert scores[8].metrics() != scores[16].metrics()
    with pytest.raises(UserError, match="which"):
        sweep(weights, [8], data, which="model")
