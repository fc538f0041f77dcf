"""The report about images with several labels."""

import numpy as np
import pytest
from PIL import Image

from vitral import train
from vitral.cli import main
from vitral.evaluation.multilabel import MultiLabelScores
from vitral.report.predictions import evaluate_best
from vitral.rundir import read_run

from .test_html import Page, check_form

TINY = "--model.dim 16 --model.depth 2 --train.epochs 2 --optim.warmup-epochs 0 --train.threads 1"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on images whose left half, right half, both or none are bright."""
    root = tmp_path_factory.mktemp("halves")
    draw, rows = np.random.default_rng(0), ["image,left,right & <low>"]
    for i in range(60):
        labels = draw.random(2) < 0.5
        pixels = draw.integers(0, 80, (8, 8), np.uint8)
        pixels[:, :4] += 150 * labels[0].astype(np.uint8)
        pixels[:, 4:] += 150 * labels[1].astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(root / f"{i}.png")
        rows.append(f"{i}.png,{int(labels[0])},{int(labels[1])}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    options = [*TINY.split(), "--data.workers", "0", "--data.val-fraction", "0.4"]
    where = ["--data", str(root / "labels.csv"), "--out", str(root / "run")]
    return train("digits", *options, *where)


def test_the_report_shows_metrics_classes_and_mistakes(run):
    page = Page(run / "report.html")
    check_form(page)
    ids = {given["id"] for given in page.all("section")}
    assert {"classes", "mistakes", "attention"} < ids
    assert not {"confusion", "calibration"} & ids
    scores = evaluate_best(read_run(run)).scores
    assert isinstance(scores, MultiLabelScores)
    assert f"(mAP) {scores.mean_ap:.2%}" in page.words["classes"]
    rows = [row for row in page.cells["classes"] if row[0] == "left"]
    (found,) = (row for row in scores.per_class() if row.name == "left")
    expected = [f"{x:.2%}" for x in (found.precision, found.recall, found.f1)]
    assert rows[0][1:3] == [str(found.images), f"{found.average_precision:.2%}"]
    assert rows[0][4:7] == expected
    missed = int(((scores.labels == 1) & ~scores.predicted).sum())
    false = int(((scores.labels == 0) & scores.predicted).sum())
    panels = page.source.split('id="mistakes"')[1].split("<section")[0].count('<li class="panel">')
    assert panels == min(missed, 12) + min(false, 12) > 0
    assert "right & <low>" in page.words["classes"]
    classes = page.source.split('id="classes"')[1].split("<section")[0]
    assert '<div class="stack">' in classes  # eight columns do not fit into half the page
    assert '<div class="columns">' not in classes


def test_report_and_comparison_commands(run, tmp_path, capsys):
    assert main(["report", str(run), "--out", str(tmp_path / "one.html")]) == 0
    check_form(Page(tmp_path / "one.html"))
    assert main(["report", str(run), str(run), "--out", str(tmp_path / "two.html")]) == 0
    page = Page(tmp_path / "two.html")
    assert "mAP of the best weights" in page.words["results"]
