"""Tests of the report: values against the log and a plain loop, markup, and missing data."""

import dataclasses
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from vitral import train, weights
from vitral.cli import main
from vitral.data.records import Pixels
from vitral.evaluation import Scores
from vitral.evaluation.metrics import per_class
from vitral.report.html import write_report
from vitral.report.predictions import Predictions, evaluate_best
from vitral.report.thumbnails import attention_pictures, thumbnail
from vitral.rundir import read_rows, read_run

VOID = {"meta", "link", "img", "br"}
CSS = Path(__file__).parents[2] / "src/vitral/report/pages/report.css"


class Page(HTMLParser):
    """A parsed page; asserts that all elements are closed in the right order."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text()
        self.open, self.elements, self.headings = [], [], []
        self.words, self.cells, self.section = {}, {}, None
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        assert len(given) == len(attributes)
        self.elements.append((tag, given))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = given["id"]
        elif tag == "tr":
            self.cells.setdefault(self.section, []).append([])
        elif tag in ("td", "th"):
            self.cells[self.section][-1].append("")
        elif re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "section":
            self.section = None

    def handle_data(self, data):
        if "style" not in self.open:
            text = " ".join(data.split())
            self.words[self.section] = f"{self.words.get(self.section, '')} {text}".strip()
            if {"td", "th"} & {*self.open}:
                row = self.cells[self.section][-1]
                row[-1] = f"{row[-1]} {text}".strip()

    def all(self, name):
        return [given for tag, given in self.elements if tag == name]


def check_form(page):
    """Checks that a page is self-contained and accessible."""
    ids = [given["id"] for _, given in page.elements if "id" in given]
    assert len(ids) == len({*ids})
    for tag, given in page.elements:
        assert tag not in ("script", "iframe", "object", "base")
        for name, value in given.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "action"):
                assert value.startswith("data:") or value.removeprefix("#") in ids, value
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert all(image["alt"].strip() for image in page.all("img"))
    labeled = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    assert all(svg["aria-label"] for svg in labeled)
    assert page.headings.count(1) == 1
    assert page.headings[0] == 1
    for before, after in zip(page.headings, page.headings[1:], strict=False):
        assert after <= before + 1
    assert page.all("html")[0]["lang"] == "en"
    (policy,) = (
        m["content"] for m in page.all("meta") if "content" in m and "'none'" in m["content"]
    )
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return page


def copy(run, place, *, rows=None):
    """Copies a run directory, optionally with other log rows."""
    shutil.copytree(run, place)
    if rows is not None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (place / "metrics.jsonl").write_text(text)
    return place


@pytest.fixture(scope="module")
def page(run):
    assert main(["report", str(run)]) == 0
    return check_form(Page(run / "report.html"))


def test_outputs_that_are_not_finite(run, tmp_path):
    found, place = weights.load(run), copy(run, tmp_path / "run")
    state = {name: torch.full_like(t, torch.nan) for name, t in found.model.state_dict().items()}
    shutil.rmtree(place / "weights" / "best")
    description = dataclasses.replace(found.description, default="model")
    weights.save(place / "weights" / "best", {"model": state}, description)
    assert main(["report", str(place)]) == 0
    page = check_form(Page(place / "report.html"))
    assert "not finite for 360 of the images, which count as wrong" in page.words["metrics"]
    assert page.words["calibration"] == "Calibration No confidence is finite."


def test_the_summary_matches_the_log(run, page):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = rows[-1]
    best = max(row[k] for row in rows for k in ("val_top1", "ema_top1") if k in row)
    cards = page.words["summary"]
    assert f"Best top-1 {best:.2%} " in cards
    assert f"Last top-1, raw {last['val_top1']:.2%} top-5 {last['val_top5']:.2%}" in cards
    assert f"Last top-1, EMA {last['ema_top1']:.2%} top-5 {last['ema_top5']:.2%}" in cards
    assert f"Images seen {last['images']:,}" in cards
    table = [row for row in page.cells["curves"] if row[0] != "epoch"]
    validated = [row for row in rows if "val_top1" in row]
    assert [row[1] for row in table] == [str(row["step"]) for row in validated]
    assert [row[3] for row in table] == [f"{row['val_top1']:.2%}" for row in validated]
    assert [row[6] for row in table] == [f"{row['val_f1']:.2%}" for row in validated]
    assert [row[11] for row in table] == [f"{row['ema_balanced']:.2%}" for row in validated]
    assert [row[13] for row in table] == [f"{row['ema_ece']:.2%}" for row in validated]
    known = json.loads((run / "env.json").read_text())
    flops = known["training_flops_per_image"] * last["images"]
    cost = dict(page.cells["cost"])
    stated = float(cost["Floating-point operations"].split(",")[0])
    assert stated == pytest.approx(flops, rel=5e-3)
    hours = float(cost["Device hours"].split()[0])
    assert hours == pytest.approx(last["seconds"] / 3600, rel=5e-3)
    assert "finished" in page.words[None]
    assert "not finished" not in page.words[None]


def test_settings_that_differ_from_the_defaults_come_first(page):
    changed = [row for row in page.cells["configuration"] if len(row) == 3]
    assert ["train.epochs", "4", "90"] in changed
    assert ["train.ema_decay", "0.9", "0"] in changed
    assert all(value != default for _, value, default in changed[1:])
    every = [row for row in page.cells["configuration"] if len(row) == 2]
    assert ["train.seed", "0"] in every
    assert ["model.qkv_bias", "on"] in every
    assert ["packages.torch", torch.__version__.split("+")[0]] in [
        [name, value.split("+")[0]] for name, value in page.cells["environment"]
    ]


def test_predictions_match_a_plain_loop(run, page, answers):
    labels, probabilities = answers
    uncalibrated = (weights.load(run).description.temperature * probabilities.log()).softmax(1)
    predicted = probabilities.argmax(1).tolist()
    confidence = probabilities.max(1).values.tolist()
    counts = [[0] * 10 for _ in range(10)]
    for truth, guess in zip(labels, predicted, strict=True):
        counts[truth][guess] += 1
    matrix = [row for row in page.cells["confusion"] if len(row) == 11][1:]
    assert [[int(cell or 0) for cell in row[1:]] for row in matrix] == counts
    for name, images, precision, recall, f1, _, auc in page.cells["classes"][1:]:
        truth = int(name)
        right, total = counts[truth][truth], sum(row[truth] for row in counts)
        assert int(images) == sum(counts[truth])
        assert precision == f"{right / max(total, 1):.2%}"
        assert recall == f"{right / sum(counts[truth]):.2%}"
        assert f1 == f"{2 * right / (total + sum(counts[truth])):.2%}"
        own = np.array(labels) == truth
        expected = roc_auc_score(own, uncalibrated[:, truth])
        assert float(auc) == pytest.approx(expected, abs=1e-4)
    top1 = np.mean(np.array(labels) == predicted)
    assert page.cells["metrics"][1][:2] == ["top-1", f"{top1:.2%}"]
    assert re.fullmatch(r"[\d.]+% to [\d.]+%", page.cells["metrics"][1][2])

    wrong = [i for i in range(360) if labels[i] != predicted[i]]
    wrong.sort(key=lambda i: -confidence[i])
    expected = [f"{predicted[i]} {confidence[i]:.1%} true class: {labels[i]}" for i in wrong[:24]]
    assert " ".join(expected) in page.words["mistakes"]

    edges = np.arange(1, 16) / 15
    rows = [row for row in page.cells["calibration"] if len(row) == 4][1:]
    error = 0.0
    for row in rows:
        edge = edges[np.abs(edges - float(row[0][:-1]) / 100).argmin()]
        inside = [i for i in range(360) if edge - 1 / 15 < confidence[i] <= edge]
        right = sum(labels[i] == predicted[i] for i in inside) / len(inside)
        mean = sum(confidence[i] for i in inside) / len(inside)
        assert row[1:] == [str(len(inside)), f"{mean:.2%}", f"{right:.2%}"]
        error += abs(mean - right) * len(inside) / 360
    assert sum(int(row[1]) for row in rows) == 360
    assert f"Expected calibration error {error:.2%}" in page.words["calibration"]

    order = sorted(range(360), key=lambda i: -confidence[i])
    hits = np.cumsum([labels[i] == predicted[i] for i in order])
    for target, row in zip((0.95, 0.99), page.cells["calibration"][-2:], strict=True):
        reached = [n for n in range(1, 361) if hits[n - 1] >= target * n]
        expected = ["not reached"]
        if reached:
            lowest = confidence[order[reached[-1] - 1]]
            expected = [f"{lowest:.4g}", f"{reached[-1] / 360:.2%}"]
        assert row == [f"{target:.2%}", *expected]


def test_thresholds_for_an_accuracy(run, tmp_path):
    """Of four images, the least confident is wrong."""
    four = predictions_of(run, ("a", "b"), count=4)
    confidence, right = np.array([0.9, 0.6, 0.8, 0.7]), [0, 1, 0, 1]
    ranked = np.array([[0, 1], [0, 1], [0, 1], [1, 0]])
    scores = Scores(("a", "b"), np.array(right), ranked, confidence, np.zeros(4))
    page = write(run, tmp_path / "page.html", dataclasses.replace(four, scores=scores))
    assert page.cells["calibration"][-2:] == [
        ["95.00%", "0.7", "75.00%"],
        ["99.00%", "0.7", "75.00%"],
    ]
    assert "not calibrated" in page.words["calibration"]
    wrong = dataclasses.replace(scores, labels=1 - scores.labels, temperature=2.0)
    wrong = dataclasses.replace(wrong, calibrated=confidence / 2)
    page = write(run, tmp_path / "page.html", dataclasses.replace(four, scores=wrong))
    assert page.cells["calibration"][-1] == ["99.00%", "not reached"]
    assert "divided by temperature 2 ," in page.words["calibration"]


def test_confusions_come_with_their_images(page, answers):
    labels, probabilities = answers
    predicted = probabilities.argmax(1).tolist()
    pairs = {}
    for pair in zip(labels, predicted, strict=True):
        if pair[0] != pair[1]:
            pairs[pair] = pairs.get(pair, 0) + 1
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:12]
    expected = [f"{a} predicted as {b} {n} image{'s' * (n > 1)}" for (a, b), n in ordered]
    assert " ".join(expected) in page.words["confusion"]
    shown = [f"{a}, predicted as {b}" for (a, b), n in ordered for _ in range(min(n, 4))]
    alternatives = [image["alt"] for image in page.all("img")]
    assert alternatives[: len(shown)] == shown


def predictions_of(run, classes, seed=0, count=600):
    """Random predictions for any number of classes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(classes)
    guesses = np.where(rng.random(count) < 0.5, labels, rng.integers(0, len(classes), count))
    rest = (guesses[:, None] + np.arange(min(5, len(classes)))) % len(classes)
    pixels = torch.from_numpy(rng.integers(0, 256, (count, 3, 8, 8), np.uint8))
    scores = Scores(classes, labels, rest, rng.random(count), rng.random(count))
    return Predictions(scores, Pixels(pixels, labels), weights.load(run))


def write(run, out, predictions, missing=""):
    write_report(read_run(run), out, predictions, missing)
    return check_form(Page(out))


def test_many_classes_show_the_extremes_and_no_matrix(run, tmp_path):
    classes = tuple(f"class {i}" for i in range(60))
    predictions = predictions_of(run, classes)
    page = write(run, tmp_path / "page.html", predictions)
    assert "matrix" not in [given.get("class") for given in page.all("table")]
    rows = [row for row in page.cells["classes"] if row[0] != "class"]
    f1 = sorted(row.f1 for row in per_class(predictions.scores))
    assert [row[4] for row in rows] == [f"{v:.2%}" for v in (*f1[:-11:-1], *f1[:10])]
    pictures = [given["src"] for given in page.all("img")]
    assert sum(each.startswith("data:image/png;base64,") for each in pictures) == 1
    assert len(page.all("li")) == 24
    assert (tmp_path / "page.html").stat().st_size < 1_000_000


def test_names_are_escaped(run, tmp_path):
    bad = (
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "a, b & c",
        "'{{ 7 * 7 }}",
    )
    folder = copy(run, tmp_path / "<b>bold" / "x & y")
    known = json.loads((folder / "env.json").read_text())
    known["command"] = ["vitral", "train", "</code><script>alert(2)</script>"]
    known["<i>key"] = "<i>value"
    (folder / "env.json").write_text(json.dumps(known))
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("path: digits", "path: '<u>\"digits'"))
    page = write(folder, tmp_path / "page.html", predictions_of(run, bad))
    assert not {"script", "i", "u"} & {tag for tag, given in page.elements if given == {}}
    for name in bad:
        assert name in page.words["classes"]
        assert name in page.words["mistakes"]
    assert ["<i>key", "<i>value"] in page.cells["environment"]
    assert "</code><script>" in page.words[None]
    page = write(folder, tmp_path / "page.html", None, "<script>no</script>")
    assert "<script>no</script>" in page.words["calibration"]


def test_wnids_are_shown_with_their_names(run, tmp_path):
    page = write(run, tmp_path / "page.html", predictions_of(run, ("n01440764", "n02012849")))
    assert {row[0] for row in page.cells["classes"][1:]} == {"tench n01440764", "crane n02012849"}
    assert "true class: tench n01440764" in page.words["mistakes"]


def test_a_single_image_without_mistakes(run, tmp_path):
    one = predictions_of(run, ("a", "b"), count=1)
    right = Scores(("a", "b"), np.array([0]), np.array([[0, 1]]), np.ones(1), np.zeros(1))
    page = write(run, tmp_path / "page.html", dataclasses.replace(one, scores=right))
    assert "No images are misclassified" in page.words["confusion"]
    assert "There are no mistakes" in page.words["mistakes"]


@pytest.mark.parametrize(
    ("data", "reason"), [("/nowhere", "nothing of that name"), ("synthetic", "is not the dataset")]
)
def test_other_sections_are_shown_without_the_images(run, page, tmp_path, capsys, data, reason):
    out = tmp_path / "new" / "page.html"
    assert main(["report", str(run), "--data", data, "--out", str(out)]) == 0
    partial = check_form(Page(out))
    for section in ("classes", "confusion", "mistakes", "calibration"):
        assert reason in partial.words[section]
    assert reason in capsys.readouterr().err
    for section in ("summary", "curves", "cost", "configuration", "environment"):
        assert partial.words[section] == page.words[section]


def test_the_summary_of_a_run_without_ema_omits_it(run, tmp_path):
    rows = [
        {k: v for k, v in r.items() if "ema" not in k} for r in read_rows(run / "metrics.jsonl")
    ]
    page = write(copy(run, tmp_path / "run", rows=rows), tmp_path / "page.html", None)
    assert "EMA" not in page.words["summary"]
    assert "raw weights, epoch" in page.words["summary"]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_unfinished_run_has_a_report(run, tmp_path, count):
    rows = read_rows(run / "metrics.jsonl")[:count]
    folder = copy(run, tmp_path / "run", rows=rows)
    shutil.rmtree(folder / "weights")
    (folder / "train_batch.jpg").unlink()
    (folder / "env.json").unlink()
    if count == 1:  # a FIFO does not block
        os.mkfifo(folder / "train_batch.jpg")
        os.mkfifo(folder / "env.json")
    assert main(["report", str(folder)]) == 0
    page = check_form(Page(folder / "report.html"))
    assert "not finished" in page.words[None]
    assert "No validation yet" in page.words["summary"]
    assert "no weights found" in page.words["mistakes"]
    assert "env.json cannot be read" in page.words[None]
    assert "no train_batch.jpg" in page.words["batch"]
    assert len(page.all("polyline")) == (
        10 if count > 1 else 5 * count
    )  # including one in each legend
    assert len(page.all("circle")) == (5 if count == 1 else 0)


@pytest.mark.parametrize("line", ["{'step': 3", "7", "{}", "\x00\xff", '{"step": 1, "epoch": "x"}'])
def test_a_corrupt_line_ends_the_log_and_is_named(run, tmp_path, line):
    folder = copy(run, tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text(
        "\n".join([*lines[:4], line, *lines[5:]]) + "\n", "latin-1"
    )
    page = write(folder, tmp_path / "page.html", None)
    assert f"metrics.jsonl: line 5 of {len(lines)} is not a row" in page.words[None]
    images = json.loads(lines[3])["images"]
    assert f"Images seen {images:,}" in page.words["summary"]


def test_several_runs_are_compared(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = read_rows(run / "metrics.jsonl")
    other = copy(run, tmp_path / run.name, rows=rows[:-1])
    text = (other / "config.yaml").read_text()
    text = re.sub("  out: .*?  seed:", "  out: elsewhere\\n  seed:", text, flags=re.DOTALL)
    text = text.replace("lr: 0.003", "lr: 0.5")
    (other / "config.yaml").write_text(text)
    assert main(["report", str(run), str(other)]) == 0
    page = check_form(Page(Path("report.html")))
    assert page.cells["configuration"] == [
        ["setting", str(run), str(other)],  # paths, because the names are the same
        ["optim.lr", "0.003", "0.5"],
    ]
    first, second = page.cells["results"][1:]
    assert first[4:6] == [f"{rows[-1][name]:.2%}" for name in ("val_top1", "ema_top1")]
    validated = [row for row in rows[:-1] if "val_top1" in row][-1]
    assert second[4:6] == [f"{validated[name]:.2%}" for name in ("val_top1", "ema_top1")]
    (chart,) = re.findall(r"<h3>Learning rate.*?</figure>", page.source, re.DOTALL)
    lines = re.findall(r'<polyline class="(s\d)" points="([^"]*)"', chart)
    drawn = [(css, len(path.split())) for css, path in lines if path != "0,4 24,4"]
    assert drawn == [("s0", len(rows)), ("s1", len(rows) - 1)]


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["/nowhere"], ["/nowhere", "no directory"]),
        (["{here}"], ["one without", "config.yaml"]),
        (["{run}", "--out", "{here}"], ["which is not a file"]),
        (["{run}", "{run}", "--data", "digits"], ["several runs"]),
        (["{run}", "--dat", "digits"], ["--dat", "--data"]),
        ([], ["expected RUN"]),
    ],
)
def test_user_errors_are_one_line(run, tmp_path, capsys, words, fragments):
    given = [word.format(run=run, here=tmp_path) for word in words]
    assert main(["report", *given]) == 2
    text = capsys.readouterr().err
    assert re.fullmatch(r"vitral: .+\n", text)
    assert all(fragment in text for fragment in fragments), text
    assert list(tmp_path.iterdir()) == []


def test_a_missing_image_is_omitted(run, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "set")
    given = "--model.dim 16 --model.depth 2 --model.image-size 16 --model.patch-size 4".split()
    given += "--train.epochs 1 --optim.warmup-epochs 0 --train.threads 1".split()
    given += ["--train.batch-size", "8", "--data", str(tmp_path / "set")]
    folder = train("digits", *given, "--out", str(tmp_path / "run"))
    predictions = evaluate_best(read_run(folder))
    (tmp_path / "set/val/dark/00.jpg").unlink()
    assert thumbnail(predictions.records, 0) is None
    assert attention_pictures(predictions.weights, predictions.records, 0) is None
    wrong = dataclasses.replace(
        predictions.scores, labels=np.zeros(12, int), ranked=np.ones((12, 1), int)
    )
    page = write(folder, tmp_path / "page.html", dataclasses.replace(predictions, scores=wrong))
    assert "image cannot be read" in page.words["confusion"] + page.words["mistakes"]


def palettes():
    text = CSS.read_text()
    light, dark = (
        dict(re.findall(r"(--\w+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", text, re.DOTALL)[:2]
    )
    return {"light": light, "dark": dark}


def rgb(color):
    return np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def contrast(a, b):
    """Contrast ratio of WCAG 2.2."""

    def luminance(color):
        linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_have_enough_contrast(scheme):
    colors = {name: rgb(value) for name, value in palettes()[scheme].items()}
    assert len(colors) == 14
    for background in ("--page", "--panel"):
        for text in ("--text", "--muted", "--good", "--bad", "--done"):
            assert contrast(colors[text], colors[background]) >= 4.5, (text, background)
        for number in range(6):
            assert contrast(colors[f"--s{number}"], colors[background]) >= 4.5
    for tint, opacity, background in (
        ("--good", 0.45, "--panel"),
        ("--bad", 0.45, "--panel"),
        ("--good", 0.3, "--page"),
    ):
        mixed = opacity * colors[tint] + (1 - opacity) * colors[background]
        assert contrast(colors["--text"], mixed) >= 4.5, tint


def test_black_on_white_has_a_contrast_of_21():
    assert contrast(np.zeros(3), np.ones(3)) == pytest.approx(21)


def test_likely_label_errors(run, tmp_path, capsys):
    """A digit with another label is listed first; unchecked training images are mentioned."""
    plain = Page(run / "report.html")
    assert "label-errors" not in plain.words
    assert "vitral report --label-errors adds" in plain.words["mistakes"]
    out = tmp_path / "page.html"
    assert main(["report", str(run), "--label-errors", "--out", str(out)]) == 0
    page = check_form(Page(out))
    text = page.words["label-errors"]
    assert "The training images are not checked" in text
    assert "of 360 validation images are mislabeled" in text
    scores = evaluate_best(read_run(run)).scores
    wrong = np.flatnonzero(~scores.hits(1))
    of_label = scores.probabilities[wrong, scores.labels[wrong]]
    order = wrong[np.argsort(of_label - scores.confidence[wrong], kind="stable")][:48]
    captions = " ".join(
        f"label: {scores.labels[i]} suggested: {scores.ranked[i, 0]} {scores.confidence[i]:.1%} "
        "validation image"
        for i in order
    )
    assert text.endswith(captions)
    rows = (tmp_path / "label_errors.csv").read_text().splitlines()
    assert len(rows) == 1 + 1797
    assert rows[1].startswith(f"image {order[0]},{scores.labels[order[0]]},val,")
    assert rows[-1].endswith(",train,,,")
    capsys.readouterr()
    assert main(["report", str(run), str(run), "--label-errors"]) == 2
    assert "label-errors: not supported for several runs" in capsys.readouterr().err
    command = ["report", str(run), "--label-errors", "--data", "synthetic", "--out", str(out)]
    assert main(command) == 2
    assert "synthetic is not the dataset" in capsys.readouterr().err
