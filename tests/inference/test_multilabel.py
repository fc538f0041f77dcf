"""Predictions, explanations, evaluation and the card of weights for several labels per image."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import f1_score

from vitral import weights
from vitral.cli import main
from vitral.config import Config, DataConfig, ViTConfig
from vitral.data.augment import finish
from vitral.data.crops import eval_crop
from vitral.data.formats import open_dataset
from vitral.errors import UserError
from vitral.evaluation import evaluate
from vitral.inference.card import card
from vitral.inference.explain import explain
from vitral.inference.predict import load, to_pixels
from vitral.model import ViT
from vitral.weights import Description

CLASSES = ("cat", "dog", "n01440764", "sea")
MODEL = ViTConfig(dim=16, depth=2, num_heads=2, num_kv_heads=1, patch_size=4, image_size=16)
METRICS = {"step": 3, "val_map": 0.5, "val_micro_ap": 0.25, "val_f1": 0.75, "val_micro_f1": 0.125}
METRICS |= {"val_loss": 0.0625}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images with a table of labels, and weights whose thresholds each a third of them reach."""
    root = tmp_path_factory.mktemp("images")
    draw, rows = np.random.default_rng(0), ["image,labels"]
    for i in range(12):
        picture = Image.fromarray(draw.integers(0, 256, (3, 4, 3), np.uint8)).resize((20, 16))
        picture.save(root / f"{i:02d}.png")
        rows.append(f"{i:02d}.png,{';'.join(np.array(CLASSES)[draw.random(4) < 0.5])}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    torch.manual_seed(0)
    model = ViT(MODEL, 4)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    data = DataConfig(path=str(root / "labels.csv"), label_separator=";")
    config = Config(model=MODEL, data=data)
    thresholds = {"model": tuple(np.quantile(outputs(model, root), 0.7, 0).tolist())}
    description = weights.describe(config, CLASSES, "", METRICS, thresholds)
    weights.save(root / "best", {"model": model.state_dict()}, description)
    return root


def outputs(model, root):
    """Returns the probabilities of all images, (12, 4), computed without vitral's batches."""
    data, batch = DataConfig(), []
    for i in range(12):
        pixels = to_pixels(root / f"{i:02d}.png")
        batch.append(eval_crop(pixels, data, 16))
    images = finish(torch.stack(batch), None, data.mean, data.std)
    with torch.no_grad():
        return model.eval()(images).sigmoid().double().numpy()


def expected_classes(folder):
    found = weights.load(folder / "best")
    p = outputs(found.model, folder)
    return p, p >= np.array(found.description.thresholds)


def test_all_classes_at_their_threshold_are_predicted(folder, capsys):
    p, above = expected_classes(folder)
    files = [str(folder / f"{i:02d}.png") for i in range(12)]
    counts = above.sum(1)
    assert 0 in counts
    assert counts.max() > 1
    found = load(folder / "best").predict(files, top=1)
    for i, prediction in enumerate(found):
        order = [c for c in np.argsort(-p[i]) if above[i, c]]
        assert prediction.classes == tuple(order)
        assert prediction.names == tuple(CLASSES[c] for c in order)
        assert prediction.probabilities == pytest.approx(p[i, order], abs=1e-5)
    for form in ("--json", "--csv", ""):
        assert main(["predict", str(folder / "best"), *files, *form.split()]) == 0
        text = capsys.readouterr().out
        if form == "--json":
            rows = [json.loads(line) for line in text.splitlines()]
            assert [len(row["predictions"]) for row in rows] == counts.tolist()
        elif form == "--csv":
            rows = [*csv.DictReader(text.splitlines())]
            assert len(rows) == np.maximum(counts, 1).sum()
            assert sum(row["class"] == "" for row in rows) == (counts == 0).sum()
        else:
            lines = text.splitlines()
            assert sum(line.endswith(": no class") for line in lines) == (counts == 0).sum()


def test_evaluation_uses_the_stored_thresholds(folder, capsys):
    scores = evaluate(folder / "best", workers=0)
    _, above = expected_classes(folder)
    rows = (folder / "labels.csv").read_text().splitlines()[1:]
    cells = [row.partition(",")[2].split(";") for row in rows]
    truth = np.array([[name in cell for name in CLASSES] for cell in cells])
    held = [np.flatnonzero((truth == row).all(1)) for row in scores.labels == 1]
    assert all(len(each) for each in held)
    (folder / "all.csv").write_text((folder / "labels.csv").read_text().replace("labels", "label"))
    scores = evaluate(folder / "best", str(folder / "all.csv"), workers=0)
    assert np.array_equal(scores.labels, truth)
    assert np.array_equal(scores.predicted, above)
    assert scores.metrics()["f1"] == pytest.approx(f1_score(truth, above, average="macro"))
    command = ["val", str(folder / "best"), "--data", str(folder / "all.csv"), "--workers", "0"]
    assert main([*command, "--out", str(folder / "tables")]) == 0
    assert "at the thresholds stored with the weights" in capsys.readouterr().out
    assert (folder / "tables" / "per_class.csv").exists()
    document = json.loads((folder / "tables" / "metrics.json").read_text())
    assert document == {"images": 12, "classes": 4, "metrics": scores.metrics()}
    assert main([*command, "--image-sizes", "16"]) == 2
    assert "image-sizes: expected weights with one label" in capsys.readouterr().err


def test_other_kinds_of_labels_are_rejected(folder, capsys):
    single = folder / "single.csv"
    single.write_text("image,label\n00.png,cat\n01.png,dog\n")
    dataset = open_dataset(DataConfig(path=str(single)), 16, 0, train=False)
    with pytest.raises(UserError, match="expected any number of labels per image, as the weights"):
        evaluate(folder / "best", dataset, workers=0)
    model = ViT(MODEL, 4)
    description = weights.describe(Config(model=MODEL), CLASSES, "", {})
    weights.save(folder / "one", {"model": model.state_dict()}, description)
    command = ["val", str(folder / "one"), "--data", str(folder / "labels.csv"), "--workers", "0"]
    assert main([*command, "--label-separator", ";"]) == 2
    assert "expected one label per image, as the weights predict" in capsys.readouterr().err


def test_explanations_use_independent_probabilities(folder):
    found, p = weights.load(folder / "best"), expected_classes(folder)[0]
    shown = explain(found, to_pixels(folder / "05.png"))
    assert shown.probabilities == pytest.approx(np.sort(p[5])[::-1], abs=1e-5)
    assert shown.deletion.probabilities[0] == pytest.approx(p[5].max(), abs=1e-5)


def test_the_card_describes_metrics_and_thresholds(folder):
    text = card(weights.load(folder / "best"), "anna/x")
    matter = yaml.safe_load(text.split("---\n")[1])
    results = matter["model-index"][0]["results"]
    found = {m["type"]: m["value"] for r in results for m in r["metrics"]}
    assert found == {"mean_average_precision": 0.5, "f1": 0.75}
    assert "`model.safetensors`, the default of `--which` | 50.00% | 25.00% | 75.00% | 12.5" in text
    assert "any number of its 4 classes" in text
    assert "print(prediction.names, prediction.probabilities)" in text


def test_thresholds_are_checked(folder):
    known = weights.load(folder / "best").description
    document = json.loads(json.dumps(known.to_document()))
    assert Description.from_document(dict(document), folder).thresholds == known.thresholds
    for wrong in ([0.5], [0.5, 0.5, 0.5, 1.5]):
        with pytest.raises(UserError, match="expected a threshold from 0 to 1 for each of the 4"):
            Description.from_document({**document, "all_thresholds": {"model": wrong}}, folder)
    found = weights.load(folder / "best")
    averaged = dataclasses.replace(known, all_thresholds={"ema": known.thresholds})
    weights.save(folder / "averaged", {"model": found.model.state_dict()}, averaged)
    with pytest.raises(UserError, match="expected thresholds for the model weights, got none"):
        weights.load(folder / "averaged")


def test_options_for_one_label_are_rejected(folder, capsys):
    command = ["predict", str(folder / "best"), str(folder / "00.png")]
    assert main([*command, "--tta", "flip"]) == 2
    assert "tta: expected none for weights with several labels" in capsys.readouterr().err
    assert main([*command, "--min-confidence", "0.5"]) == 2
    assert "min_confidence: expected 0 for weights with several" in capsys.readouterr().err
