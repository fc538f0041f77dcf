"""`vitral predict`: output and exit codes."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitral import storage, weights
from vitral.cli import main
from vitral.config import Config, ViTConfig
from vitral.inference import load
from vitral.model import ViT
from vitral.weights.description import SCHEMA

CLASSES = ("n01440764", "n02123045", "dark")  # two ImageNet classes and another one
NAMES = {"n01440764": "n01440764 tench", "n02123045": "n02123045 tabby", "dark": "dark"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    shape = ViTConfig(dim=16, depth=1, num_heads=2, num_kv_heads=1, patch_size=4, image_size=16)
    torch.manual_seed(0)
    model = ViT(shape, len(CLASSES))
    torch.nn.init.normal_(model.head.weight)
    description = weights.describe(Config(model=shape), CLASSES, "", {})
    place = tmp_path_factory.mktemp("weights") / "best"
    weights.save(place, {"model": model.state_dict()}, description)
    return place


@pytest.fixture
def photos(image_folder, tmp_path):
    """A folder of three images; the second one is broken."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.jpg", "c.jpg"):
        shutil.copy(
            image_folder / "val" / ("dark" if name == "a.jpg" else "light") / "00.jpg",
            folder / name,
        )
    (folder / "b.jpg").write_text("no image")
    return folder


@pytest.fixture
def expected(directory, photos):
    return load(directory).predict([photos / "a.jpg", photos / "c.jpg"])


def predict(*words):
    return main(["predict", *map(str, words), "--workers", "0"])


def test_text_output(directory, photos, expected, capsys):
    assert predict(directory, photos, "--top", "2") == 0
    out, err = capsys.readouterr()
    lines = [
        f"{p.path}: "
        + ", ".join(
            f"{NAMES[name]} {probability:.2%}"
            for name, probability in zip(p.names[:2], p.probabilities[:2], strict=True)
        )
        for p in expected
    ]
    assert out.splitlines() == lines
    assert err.splitlines() == [
        f"vitral: {photos}/b.jpg: not an image in a known format "
        "(JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF)",
        "vitral: 1 of 3 images cannot be read",
        "vitral: probabilities are not calibrated: the weights have no temperature",
    ]


def test_json_output(directory, photos, expected, tmp_path, capsys):
    out = tmp_path / "new" / "found.jsonl"
    assert predict(directory, photos, "--json", "--out", out) == 0
    assert capsys.readouterr().out == ""
    assert [path.name for path in out.parent.iterdir()] == ["found.jsonl"]
    first, broken, last = map(json.loads, out.read_text().splitlines())
    for prediction, row in zip(expected, (first, last), strict=True):
        assert row["path"] == prediction.path
        assert [found["class"] for found in row["predictions"]] == [*prediction.names]
        probabilities = [found["probability"] for found in row["predictions"]]
        assert probabilities == pytest.approx(prediction.probabilities, abs=1e-6)
        readable = {found["class"]: found["name"] for found in row["predictions"]}
        assert readable["n01440764"] == "tench, Tinca tinca"
        assert readable["dark"] == "dark"
    assert broken.keys() == {"path", "error"}
    assert broken["path"] == str(photos / "b.jpg")


def test_json_has_no_nan(directory, photos, tmp_path, capsys):
    found = weights.load(directory)
    state = {name: torch.full_like(t, torch.nan) for name, t in found.model.state_dict().items()}
    weights.save(tmp_path / "nan", {"model": state}, found.description)
    assert predict(tmp_path / "nan", photos / "a.jpg", "--json") == 0
    row = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert row["unknown"]
    assert {each["probability"] for each in row["predictions"]} == {None}


def test_csv_output(directory, photos, expected, tmp_path):
    out = tmp_path / "found.csv"
    out.write_text("something older and longer " * 100)
    assert predict(directory, photos, "--csv", "--out", out) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [Path(row["path"]).name[0] for row in rows] == [*"aaabccc"]
    for prediction, part in zip(expected, (rows[:3], rows[4:]), strict=True):
        assert [row["rank"] for row in part] == [*"123"]
        assert [row["class"] for row in part] == [*prediction.names]
        probabilities = [float(row["probability"]) for row in part]
        assert probabilities == pytest.approx(prediction.probabilities, abs=1e-6)
        assert {row["name"] for row in part} >= {"tench, Tinca tinca", "dark"}
    assert rows[3]["error"].startswith("not an image")
    assert {rows[3][key] for key in ("rank", "class", "name", "probability")} == {""}


def test_unsure_predictions_are_unknown(directory, photos, expected, tmp_path, capsys):
    first, last = (prediction.probabilities[0] for prediction in expected)
    assert abs(first - last) > 1e-3
    known = "ac"[last > first]
    words = photos / "a.jpg", photos / "c.jpg", "--min-confidence", (first + last) / 2
    assert predict(directory, *words, "--top", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith(": unknown") for line in lines] == [known == "c", known == "a"]
    assert predict(directory, *words, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, prediction in zip(rows, expected, strict=True):
        assert row["unknown"] == (Path(row["path"]).stem != known)
        assert not row["calibrated"]
        assert [found["class"] for found in row["predictions"]] == [*prediction.names]
    assert predict(directory, *words, "--csv") == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["calibrated"] for row in rows] == ["false"] * 4
    (row,) = [row for row in rows if row["class"] == row["name"] == "unknown"]
    assert Path(row["path"]).stem != known
    assert float(row["probability"]) == pytest.approx(min(first, last), abs=1e-6)


def test_exit_code_if_all_images_are_broken(directory, photos, tmp_path, capsys):
    assert predict(directory, photos / "b.jpg", tmp_path / "none.jpg") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert f"vitral: {tmp_path}/none.jpg: No such file or directory\n" in err
    assert "2 of 2 images cannot be read" in err


def test_arguments_and_options_in_any_order(directory, photos, capsys):
    first, second = photos / "a.jpg", photos / "c.jpg"
    for words in (
        (directory, first, second, "--json", "--top", "1"),
        (directory, "--json", first, "--top", "1", second),
        ("--top=1", directory, first, "--json", second),
    ):
        assert predict(*words) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["path"] for row in rows] == [str(first), str(second)]
        assert [len(row["predictions"]) for row in rows] == [1, 1]


def test_image_size_changes_the_prediction(directory, photos, expected, tmp_path):
    probabilities = []
    for side in ("16", "20"):
        words = (photos / "a.jpg", "--json", "--image-size", side, "--out", tmp_path / side)
        assert predict(directory, *words) == 0
        row = json.loads((tmp_path / side).read_text())
        probabilities.append([found["probability"] for found in row["predictions"]])
    assert probabilities[0] == pytest.approx(expected[0].probabilities, abs=1e-6)
    assert probabilities[1] != pytest.approx(expected[0].probabilities, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "expected WEIGHTS, PATH"),
        ("DIR", "expected PATH"),
        ("DIR IMAGES --tpo 3", "--tpo: unknown option; did you mean --top"),
        ("DIR IMAGES --top 0", "top: expected 1 or more, got 0"),
        ("DIR IMAGES --image-size 15", "got 15; the nearest is 16"),
        ("DIR IMAGES --which ema", "contains no ema weights"),
        ("DIR IMAGES --json --csv", "expected one of the two, got both"),
        ("DIR EMPTY", "expected images (.jpg, "),
        ("DIR *.nothing", "*.nothing: expected images"),
        ("/no/such IMAGES", "/no/such: no such directory"),
        ("PICKLE IMAGES", "no weights found; expected a directory with config.json"),
        ("TAMPERED IMAGES", "model.safetensors: its content differs from what was written"),
        ("NEWER IMAGES", f"expected schema {SCHEMA}, got {SCHEMA + 1}"),
        ("DIR IMAGES --out EMPTY", "expected a file to write, got"),
        ("DIR IMAGES --out /dev/null", "expected a file to write, got /dev/null"),
        ("DIR IMAGES --out PICKLE/x.csv", "cannot write"),
        ("DIR IMAGES --out OUT/x --top -1", "top: expected 1 or more"),
    ],
)
def test_user_errors_are_one_line(directory, photos, tmp_path, capsys, words, message):
    places = {name: tmp_path / name for name in ("EMPTY", "PICKLE", "TAMPERED", "NEWER", "OUT")}
    places["EMPTY"].mkdir()
    torch.save({"head": torch.zeros(2)}, places["PICKLE"])
    shutil.copytree(directory, places["TAMPERED"])
    data = bytearray((directory / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (places["TAMPERED"] / "model.safetensors").write_bytes(data)
    document = storage.read_json(directory, "config.json")
    tensors = {"model": storage.read_tensors(directory, "model")}
    storage.write(places["NEWER"], tensors, {"config": {**document, "schema": SCHEMA + 1}})
    places |= {"DIR": directory, "IMAGES": photos}
    before = sorted(tmp_path.rglob("*"))
    for name, place in places.items():
        words = re.sub(rf"\b{name}\b", str(place), words)
    assert predict(*words.split()) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"vitral: .+\n", err), err
    assert message in err
    assert out == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t: d["classes"].pop(), "head.bias: expected float32 ("),
        (lambda d, t: d["config"]["model"].update(depth=9), "according to config.json, got none"),
        (
            lambda d, t: t.update(more=torch.zeros(2)),
            "more: expected none according to config.json, got float32",
        ),
        (
            lambda d, t: t.update(cls=t["cls"].half()),
            "cls: expected float32 (16,) according to config.json, got",
        ),
        (lambda d, t: d.update(config=[1]), "config.json does not match this version"),
        (
            lambda d, t: d.update(default="other"),
            "default: expected one of model, ema, got 'other'",
        ),
    ],
)
def test_inconsistent_weights_are_rejected(directory, photos, tmp_path, capsys, change, message):
    """The manifest is correct, as anyone can make it who uploads such weights to the Hub."""
    document = storage.read_json(directory, "config.json")
    tensors = storage.read_tensors(directory, "model")
    change(document, tensors)
    storage.write(tmp_path / "made", {"model": tensors}, {"config": document})
    assert predict(tmp_path / "made", photos) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"vitral: weights: .+\n", err), err
    assert message in err


def test_paths_are_read_from_standard_input(directory, photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "list").write_text("".join(f"{photos / name}.jpg\n" for name in "cba"))
    with (tmp_path / "list").open() as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        assert predict(directory, photos / "a.jpg", "-", "--csv", "--top", "1") == 0
    out, err = capsys.readouterr()
    assert re.findall(r"(\w)\.jpg,", out) == [*"acba"]
    assert len(err.splitlines()) == 2  # no progress bar without a terminal


@pytest.fixture
def endless(directory, photos):
    """Starts a prediction of 60,000 images, one in three of them broken."""
    command = [sys.executable, "-m", "vitral", "predict", str(directory), "-"]
    pipe = subprocess.PIPE

    def start(*words):
        process = subprocess.Popen(
            [*command, *map(str, words)],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            # Shells start background processes, possibly these tests, with SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        process.stdin.write(f"{photos}\n" * 20_000)
        process.stdin.close()
        return process

    return start


def test_a_closed_pipe_ends_the_command(endless, photos):
    with endless("--top", "1", "--workers", "2") as process:
        assert process.stdout.readline().startswith(str(photos))
        process.stdout.close()
        lines = process.stderr.read().splitlines()
    assert process.returncode == 141
    assert all(line.startswith(f"vitral: {photos}/b.jpg: ") for line in lines)


def test_ctrl_c_leaves_no_output_file(endless, photos, tmp_path):
    with endless("--workers", "0", "--csv", "--out", tmp_path / "found.csv") as process:
        line = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        lines = process.stderr.read().splitlines()
    assert process.returncode == 130, lines[-9:]
    assert all(line.startswith(f"vitral: {photos}/b.jpg: ") for line in [line, *lines]), lines
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_unwritable_output_is_a_one_line_error(directory, image_folder, capsys):
    """The permissions of /proc allow root to write, but the file system does not."""
    assert main(["predict", str(directory), str(image_folder), "--out", "/proc/found.csv"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"vitral: out: cannot write /proc: .+; use a different directory\n", error)
