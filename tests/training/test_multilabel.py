"""Training on images with several labels: exact resuming, and predictions of an exported file."""

import dataclasses
import json
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from vitral import settings, weights
from vitral.cli import main
from vitral.config import DataConfig
from vitral.data.formats import open_dataset
from vitral.data.loader import smoothed, train_batches
from vitral.data.sampling import Order
from vitral.errors import UserError
from vitral.inference.predict import load, to_pixels
from vitral.rundir import read_rows
from vitral.training.optim import loss_sum
from vitral.training.task import adapt_to_labels

from .processes import REPRODUCIBLE, digests, finish_single, make_config, run, signal_at, words

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def table(image_folder, tmp_path_factory):
    """The images of `image_folder` with the labels light and even; some have neither."""
    path, rows = tmp_path_factory.mktemp("table") / "labels.csv", ["image,split,light,even"]
    for split in ("train", "val"):
        for file in sorted((image_folder / split).rglob("*.jpg")):
            labels = int(file.parent.name == "light"), int(int(file.stem) % 2 == 0)
            rows.append(f"{file},{split},{labels[0]},{labels[1]}")
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def dataset(table):
    return open_dataset(DataConfig(path=str(table)), 16, 0)


def test_a_killed_run_resumes_exactly(table, tmp_path):
    changes = {"data__workers": 0, "train__epochs": 4}
    assert finish_single(make_config(table, tmp_path / "uninterrupted", **changes)) == 0
    config = make_config(table, tmp_path / "run", **changes)
    assert signal_at(config, 6, signal.SIGKILL) == -signal.SIGKILL
    assert finish_single(config) == 0
    assert digests(tmp_path / "run") == digests(tmp_path / "uninterrupted")
    known = settings.load(str(tmp_path / "run" / "config.yaml")).train
    assert (known.loss, known.best_by) == ("bce", "map")
    description = weights.read_description(tmp_path / "run")[1]
    assert description.multi_label
    assert {kind: len(each) for kind, each in description.all_thresholds.items()} == {
        "model": 2,
        "ema": 2,
    }
    last_weights = tmp_path / "run" / "weights" / "last"
    known = weights.read_description(last_weights)[1].all_thresholds
    shutil.rmtree(last_weights)
    assert finish_single(config) == 0  # restores the weights from the checkpoint
    assert weights.read_description(last_weights)[1].all_thresholds == known
    last = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    assert {"val_map", "val_micro_ap", "val_f1", "val_micro_f1", "ema_map"} < last.keys()


def test_batches_mix_the_labels_of_both_images(dataset):
    options = ["--augment.mixup", "1", "--train.batch-size", "8", "--train.label-smoothing", "0.1"]
    config = settings.load("digits", [*options, "--model.image-size", "8"])

    def targets(config):
        where = {"micro_batch": 8, "workers": 0, "device": torch.device("cpu")}
        (batch,) = train_batches(dataset.train, config, 2, steps=range(1), total_steps=9, **where)
        return batch.targets

    plain = dataclasses.replace(config, augment=dataclasses.replace(config.augment, mixup=0.0))
    indices = Order.of(config, dataset.train.labels).samples(0, 0, 8)[1]
    alone = targets(plain)
    expected = dataset.train.labels[indices] * 0.9 + 0.05
    np.testing.assert_allclose(alone, expected, rtol=1e-6)
    mixed = targets(config)
    partners = alone[[1, 0, 3, 2, 5, 4, 7, 6]]
    different = alone != partners
    fractions = ((mixed - partners) / (alone - partners))[different]
    assert 0 < fractions.max() < 1
    torch.testing.assert_close(fractions, fractions[:1].expand_as(fractions))
    torch.testing.assert_close(mixed[~different], alone[~different])


def test_the_loss_is_the_mean_binary_cross_entropy():
    logits, labels = torch.randn(5, 3), torch.randint(2, (5, 3)).byte()
    targets = smoothed(labels, 3, 0.2)
    p, expected = torch.sigmoid(logits), 0.0
    for i in range(5):
        for c in range(3):
            own = p[i, c] if labels[i, c] else 1 - p[i, c]
            expected -= (0.9 * own.log() + 0.1 * (1 - own).log()) / 3
    torch.testing.assert_close(loss_sum(logits, targets, "bce"), expected)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--train.class-weights", "balanced"], "train.class_weights: expected none for images"),
        (["--train.logit-adjustment", "1"], "train.logit_adjustment: expected 0.0 for images"),
        (["--train.best-by", "balanced"], "train.best_by: expected map for images"),
        (
            ["--data.sampling", "sqrt", "--train.probe-first", "--init", "x"],
            "data.sampling: expected uniform for images with several labels if a head is fitted",
        ),
    ],
)
def test_settings_that_need_one_label(dataset, options, fragment):
    with pytest.raises(UserError, match=fragment):
        adapt_to_labels(settings.load("digits", options), dataset)


def test_sampling_repeats_an_image_as_its_rarest_label_requires(dataset):
    config = settings.load("digits", ["--data.sampling", "balanced", "--train.batch-size", "40"])
    labels = np.zeros((40, 2), np.uint8)
    labels[:, 0], labels[:4, 1] = 1, 1
    order = Order.of(config, labels)
    drawn = np.concatenate([order.samples(step, 0, 40)[1] for step in range(10)])
    assert labels[drawn, 1].mean() == pytest.approx(0.5)
    assert labels[drawn, 0].mean() == 1


@pytest.mark.slow
def test_weights_do_not_depend_on_the_number_of_processes(table, tmp_path):
    one, two = (
        digests(run(words(table, tmp_path / str(size), **REPRODUCIBLE), size)) for size in (1, 2)
    )
    for name, value in one.items():
        if name != "log":
            assert two[name] == value, name


def join_digits(root, count):
    """Writes pairs of digits side by side, and a table with the labels of both."""
    raw, labels = load_digits(return_X_y=True)
    raw = (raw.reshape(-1, 8, 8) * 15.9).astype(np.uint8)
    rows = ["image,labels"]
    for i, pair in enumerate(np.random.default_rng(0).integers(0, len(raw), (count, 2))):
        Image.fromarray(np.hstack(raw[pair])).convert("RGB").save(root / f"{i:04d}.png")
        rows.append(f"{i:04d}.png,{';'.join(map(str, labels[pair]))}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.slow
def test_joined_digits_are_learned_and_exported(tmp_path, capsys, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    join_digits(tmp_path, 2000)
    size = "--data.fit squash --model.image-size 16 --model.patch-size 4 --model.depth 2"
    run = "--epochs 30 --train.threads 1 --data.workers 0 --out run"
    command = f"train digits --data labels.csv --label-separator ; {size} {run}"
    assert main(command.split()) == 0
    assert main(["val", "run", "--out", "tables"]) == 0
    last = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    assert max(last["val_map"], last["ema_map"]) > 0.9  # chance is 0.19
    assert main(["export", "run", "--out", "run.onnx"]) == 0
    files = [f"{i:04d}.png" for i in range(40)]
    capsys.readouterr()
    assert main(["predict", "run", "--json", *files]) == 0
    lines = map(json.loads, capsys.readouterr().out.splitlines())
    expected = [[each["class"] for each in line["predictions"]] for line in lines]
    session = onnxruntime.InferenceSession("run.onnx", providers=["CPUExecutionProvider"])
    known = json.loads(session.get_modelmeta().custom_metadata_map["vitral"])
    assert known["task"] == "multi"
    thresholds = np.array(known["thresholds"])
    found = []
    for file in files:
        pixels = torch.nn.functional.interpolate(
            to_pixels(file)[None].float(), (16, 16), mode="bilinear", antialias=True
        ).round()
        inputs = (pixels.numpy() / 255 - 0.5) / 0.5
        logits = session.run(None, {"images": inputs.astype(np.float32)})[0][0]
        p = 1 / (1 + np.exp(-logits.astype(np.float64)))
        above = [c for c in np.argsort(-p) if p[c] >= thresholds[c]]
        found.append([known["classes"][c] for c in above])
    assert found == expected
    assert sum(map(len, found)) > 40
    names = [prediction.names for prediction in load("run").predict(files)]
    assert [list(each) for each in names] == expected
    assert (tmp_path / "run" / "report.html").exists()
