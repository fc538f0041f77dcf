"""Tests of benchmarks/ledger.py: rows of trained runs, rejected runs, and generated pages."""

import json
import re
import shlex
import shutil
import statistics
import subprocess
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest

from vitral import settings, train
from vitral.errors import UserError

ROOT = Path(__file__).parents[1]
TINY = "--model.dim 16 --model.depth 1 --train.epochs 2 --optim.warmup-epochs 0 --train.threads 1"
TINY += " --train.eval-every 1 --train.ema-decay 0.9 --train.progressive 4 0.5 8 0.5"
TINY += " --train.log-every 10 --model.no-qkv-bias"
SVG = "{http://www.w3.org/2000/svg}"
PAGE = "before\n<!-- ledger -->\n<!-- end -->\nbetween\n<!-- ledger: heads -->\nold\n<!-- end -->\n"


@pytest.fixture(scope="module")
def ledger(benchmarks):
    """The program as a module."""
    import ledger

    return ledger


@pytest.fixture(scope="module")
def ledger_rows(benchmarks):
    """The module that computes, reads and writes rows."""
    import ledger_rows

    return ledger_rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two seeds of a small model whose images grow."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (1, 0):
        words = [*TINY.split(), "--train.seed", str(seed), "--out", str(root / str(seed))]
        train("digits", *words)
    return [root / "1", root / "0"]


@pytest.fixture
def runs(trained, tmp_path):
    """Copies of the runs, for tests that change them."""
    return [Path(shutil.copytree(run, tmp_path / "runs" / run.name)) for run in trained]


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose pages have no rows."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.md").write_text(PAGE)
    (tmp_path / "README.md").write_text("<!-- ledger -->\n<!-- end -->\n")
    return tmp_path


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rewrite(run, rows):
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def replace_in(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def forward(N):
    """FLOPs of N tokens: patches; qkv of 4 + 2 * 2 heads of 4, attention, FFN; head."""
    block = N * 16 * 32 + 2 * N * N * 16 + N * 16 * 16 + 2 * N * 16 * 64
    return 2 * ((N - 1) * 3 * 2 * 2 * 16 + block + 16 * 10)


def test_a_row_has_the_results_of_the_last_step(ledger_rows, runs):
    """An epoch is 22.45 steps of 64 images, so there are 45 steps; 22 / 45 is below a half."""
    first = rows_of(runs[1])
    assert [line["step"] for line in first] == [10, 20, 23, 30, 40, 45]
    first[2] |= {"val_top1": 0.99, "ema_top1": 0.995, "val_loss": 0.01, "memory_gb": 77.0}
    rewrite(runs[1], first)
    row = ledger_rows.summarize(
        runs, title="tiny", data="digits", study="heads", note="n", commit="c"
    )
    assert [row[key] for key in ("title", "study", "note", "commit")] == ["tiny", "heads", "n", "c"]
    zero, one = row["runs"]
    assert (zero["seed"], one["seed"]) == (0, 1)
    for found, log in ((zero, first), (one, rows_of(runs[0]))):
        last = log[-1]
        assert found["steps"] == 45
        assert found["images"] == 45 * 64
        assert found["epochs"] == pytest.approx(45 * 64 / 1437, abs=1e-3)
        assert found["flops"] == 3 * 64 * (23 * forward(5) + 22 * forward(17))
        assert found["top1"] == {"raw": last["val_top1"], "ema": last["ema_top1"]}
        assert found["top5"] == {"raw": last["val_top5"], "ema": last["ema_top5"]}
        assert found["val_loss"] == {"raw": last["val_loss"], "ema": last["ema_loss"]}
        assert found["minutes"] == pytest.approx(last["seconds"] / 60, abs=0.006)
        rates = [line["images_per_second"] for line in log]
        assert found["images_per_second"] == statistics.median(rates)
    assert zero["memory_gb"] == 77
    (early, loss, raw, ema), (late, *_) = zero["curve"]
    assert (early, late) == (23 * 64, 45 * 64)
    assert loss == pytest.approx(first[2]["loss"], abs=1e-5)
    assert (raw, ema) == (0.99, 0.995)
    cores = json.loads((runs[0] / "env.json").read_text())["cpu_cores"]
    assert row["hardware"] == f"{cores} CPU cores, 1 thread, fp32"
    assert row["config"]["model.dim"] == 16
    assert row["config"]["train.progressive"] == ((4, 0.5), (8, 0.5))
    assert not row["config"].keys() & {"train.seed", "train.out", "train.eval_every"}
    assert ledger_rows.headline_top1(row) == [100 * zero["top1"]["ema"], 100 * one["top1"]["ema"]]


def test_without_ema_the_headline_score_is_that_of_the_raw_weights(ledger_rows, runs):
    for run in runs:
        rewrite(run, [{k: v for k, v in r.items() if "ema" not in k} for r in rows_of(run)])
    row = ledger_rows.summarize(runs, commit="c")
    assert row["runs"][0]["top1"] == {"raw": rows_of(runs[1])[-1]["val_top1"]}
    assert row["runs"][0]["curve"][0][3] is None
    assert ledger_rows.headline_top1(row) == [100 * run["top1"]["raw"] for run in row["runs"]]


def test_the_command_reproduces_the_settings(ledger_rows, runs):
    row = ledger_rows.summarize(runs, commit="c")
    vitral, verb, recipe, *words = shlex.split(row["command"])
    assert (vitral, verb, recipe) == ("vitral", "train", "digits")
    assert row["title"] == "`digits`"
    words[words.index("N")] = "1"
    more = ["--train.log-every", "10", "--train.eval-every", "1"]
    expected = settings.load(str(runs[0] / "config.yaml"))
    assert settings.load(recipe, [*words, *more, "--out", expected.train.out]) == expected


@pytest.mark.parametrize("name", settings.recipes())
def test_the_command_names_the_recipe_that_was_trained(ledger_rows, name):
    words = ["--data", "/home/someone/pictures", "--optim.lr", "0.7", "--train.init", "/x/run"]
    found, changes = ledger_rows.nearest_recipe(settings.load(name, words))
    assert found == name
    command = ledger_rows.train_command(found, changes)
    assert "--data.path path/to/pictures" in command
    assert "--train.init path/to/run" in command
    assert "--optim.lr 0.7" in command


def test_runs_that_do_not_form_a_row_are_rejected(ledger_rows, runs):
    def check_rejected(message):
        with pytest.raises(UserError, match=message) as caught:
            ledger_rows.summarize(runs, commit="c")
        assert "\n" not in str(caught.value)

    ledger_rows.summarize(runs, commit="c")
    with pytest.raises(UserError, match="expected a different seed for each run, got 1 twice"):
        ledger_rows.summarize([runs[0], *runs], commit="c")
    environment = runs[1] / "env.json"
    replace_in(environment, '"parts": ""', '"parts": "muon"')
    check_rejected("0: parts: expected .* as in .*1, got muon; add it as another row")
    replace_in(environment, '"parts": "muon"', '"parts": ""')
    config = runs[1] / "config.yaml"
    replace_in(config, "lr: 0.003\n", "lr: 0.004\n")
    check_rejected("0: optim.lr: expected 0.003 as in .*1, got 0.004; add it as another row")
    replace_in(config, "lr: 0.004\n", "lr: 0.003\n")
    replace_in(config, "eval_every: 1\n", "eval_every: 2\n")
    replace_in(config, "path: digits\n", "path: elsewhere/digits\n")
    ledger_rows.summarize(runs, commit="c")
    known = runs[1] / "weights" / "last" / "config.json"
    mark = json.loads(known.read_text())["fingerprint"]
    replace_in(known, mark, "0" * 64)
    check_rejected("0: expected the data of .*1, got other data")
    shutil.rmtree(runs[1] / "weights")
    ledger_rows.summarize(runs, commit="c")
    (checkpoint, *_) = runs[1].glob("checkpoints/*/state.json")
    for state in runs[1].glob("checkpoints/*/state.json"):
        replace_in(state, mark, "0" * 64)
    check_rejected("0: expected the data of .*1, got other data")
    assert checkpoint.exists()
    # For a folder without val/, the held-out images depend on the seed.
    replace_in(environment, '"held_out": false', '"held_out": true')
    ledger_rows.summarize(runs, commit="c")
    shutil.rmtree(runs[1] / "checkpoints")
    ledger_rows.summarize(runs, commit="c")
    for name in ("weights", "checkpoints"):
        shutil.rmtree(runs[0] / name)
    check_rejected("expected weights or a checkpoint .* train without train.progressive")
    rows = rows_of(runs[1])
    rewrite(runs[1], rows[:3])
    check_rejected("0: expected a finished run of 2 epochs, got 1.02")
    rewrite(runs[1], [])
    check_rejected("0: expected a finished run of 2 epochs, got 0;")
    rewrite(runs[1], rows)
    (runs[1] / "env.json").unlink()
    check_rejected(r"0: expected a readable env.json")


def test_rows_of_models_from_variants(ledger_rows, runs):
    for run in runs:
        replace_in(run / "config.yaml", "progressive:\n  - - 4\n    - 0.5\n  - - 8\n    - 0.5\n",
              "progressive: []\n")  # fmt: skip
        environment = json.loads((run / "env.json").read_text())
        environment |= {"parts": "timm", "training_flops_per_image": 3e9}
        (run / "env.json").write_text(json.dumps(environment))
        for name in ("weights", "checkpoints"):
            shutil.rmtree(run / name)
    row = ledger_rows.summarize(runs, commit="c")
    assert row["runs"][1]["flops"] == 3 * 45 * 64 * 1e9
    assert row["command"].startswith("python benchmarks/variants.py timm digits --model.dim 16 ")


def test_deviation_is_the_sample_standard_deviation(ledger_rows):
    """That of 1, 2 and 4 is the root of (16/9 + 1/9 + 25/9) / 2 = 1.5275."""
    assert ledger_rows.mean_and_deviation([1, 2, 4]) == "2.33 ± 1.53"
    assert ledger_rows.mean_and_deviation([94.123]) == "94.12"


def test_a_long_curve_is_downsampled_evenly_and_keeps_both_ends(ledger_rows, runs):
    template = rows_of(runs[0])[-1]
    log = [{**template, "images": i, "epoch": 2 * i / 995} for i in range(996)]
    rewrite(runs[0], log)
    (run,) = ledger_rows.summarize(runs[:1], commit="c")["runs"]
    found = [point[0] for point in run["curve"]]
    assert len(found) == 100
    assert (found[0], found[-1]) == (0, 995)
    assert {b - a for a, b in pairwise(found)} == {10, 11}


def test_commit_of_a_checkout(ledger_rows, tmp_path):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    with pytest.raises(UserError, match=r"expected a git checkout .* give --commit"):
        ledger_rows.head(tmp_path)
    for name in ("src", "docs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = ledger_rows.head(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{12}", clean)
    (tmp_path / "docs" / "file").write_text("2")
    (tmp_path / "src" / "new").write_text("1")
    assert ledger_rows.head(tmp_path) == clean
    (tmp_path / "src" / "file").write_text("2")
    assert ledger_rows.head(tmp_path) == f"{clean}-dirty"


def test_from_runs_to_pages(ledger, ledger_rows, runs, checkout, capsys):
    """Adding a row twice gives the same bytes. Pages are up to date until a file changes."""
    given = [*map(str, runs), "--data", "digits | small", "--commit", "abc"]
    for _ in range(2):
        assert ledger.main(["add", "heads-4", *given, "--title", "`four` <heads>"], checkout) == 0
        file = checkout / "docs" / "results" / "heads-4.json"
        written = file.read_bytes()
        shutil.copy(file, checkout / "kept.json")
    assert (checkout / "kept.json").read_bytes() == written
    assert len(written) < 20_000
    row = json.loads(written)
    assert list(row) == sorted(row)
    assert re.search(r"\n +\[1472, [\d., ]+\],\n", written.decode())
    assert ledger.main(["add", "heads-16", *given, "--study", "heads"], checkout) == 0
    assert list(ledger_rows.read(checkout / "docs" / "results")) == ["heads-4", "heads-16"]

    assert ledger.main(["draw", "--check"], checkout) == 1
    names = "README.md, docs/images/results-heads.svg, docs/images/results.svg, docs/results.md"
    assert f"{names}: stale" in capsys.readouterr().out
    assert ledger.main(["draw"], checkout) == 0
    assert ledger.main(["draw", "--check"], checkout) == 0
    page, readme = (checkout / name for name in ("docs/results.md", "README.md"))
    text = page.read_text()
    ema, raw = (
        ledger_rows.mean_and_deviation([100 * run["top1"][kind] for run in row["runs"]])
        for kind in ("ema", "raw")
    )
    flops = 3 * 64 * (23 * forward(5) + 22 * forward(17)) / 1e15
    mean = statistics.fmean(run["minutes"] for run in row["runs"])
    cells = ["[`four` <heads>](results/heads-4.json)", r"digits \| small", "0, 1", "2,880"]
    cells += [f"{flops:.3g} PFLOPs", row["hardware"], f"{mean:.1f}", f"**{ema}**", raw, "`abc`"]
    assert f"| {' | '.join(cells)} |" in text
    assert text.count("vitral train digits") == 2
    assert text.startswith("before\n<!-- ledger -->\n\n| run |")
    headline, study = text.split("between")
    assert "](results/heads-16.json)" in study
    assert "](results/heads-16.json)" not in headline
    assert "](images/results-heads.svg)" in study
    assert "](docs/results/heads-4.json)" in readme.read_text()
    assert "](docs/images/results.svg)" in readme.read_text()
    assert "heads-16" not in readme.read_text()

    figure = checkout / "docs" / "images" / "results.svg"
    for path in (page, readme, figure):
        kept = path.read_text()
        path.write_text(kept.replace("2,880", "2,881").replace("<circle", "<!--> --><circle"))
        assert ledger.main(["draw", "--check"], checkout) == 1
        assert capsys.readouterr().out.endswith(
            f"{path.relative_to(checkout)}: stale; run `python benchmarks/ledger.py draw`\n"
        )
        path.write_text(kept)

    (checkout / "docs" / "results" / "heads-16.json").unlink()
    assert ledger.main(["draw"], checkout) == 0
    assert not (checkout / "docs" / "images" / "results-heads.svg").exists()
    assert "Nothing measured yet." in page.read_text()


def test_user_errors_of_the_command(ledger, runs, checkout, capsys):
    def check_rejected(message, *words):
        assert ledger.main(words, checkout) == 2
        assert re.search(message, capsys.readouterr().err)

    run = str(runs[0])
    check_rejected(
        "ledger: name: expected letters, digits and hyphens, got 'a/b'", "add", "a/b", run
    )
    check_rejected("ledger: study: expected letters", "add", "a", run, "--study", "two words")
    check_rejected("expected a run directory", "add", "a", str(checkout / "nowhere"))
    assert not (checkout / "docs" / "results").exists()
    assert ledger.main(["add", "a", run, "--study", "patches", "--commit", "c"], checkout) == 0
    check_rejected(r"docs/results.md: expected a line <!-- ledger: patches -->", "draw")
    (checkout / "docs" / "results" / "a.json").write_text("{")
    check_rejected(r"a.json: expected JSON, got .*; add the row again", "draw")


def test_figures_show_each_seed_and_the_band_between(ledger_rows, runs, checkout):
    """Two seeds end at 90 and 94, on an axis from 90 to 94."""
    from ledger_figures import figure

    row = ledger_rows.summarize(runs, title="`a` & b", data="x < y", commit="c")
    for run, top1 in zip(row["runs"], (0.90, 0.94), strict=True):
        run["top1"] = {"raw": 0.1, "ema": top1}
        run["curve"] = [[1000, 2.0, 0.1, 0.5], [2000, 1.0, 0.1, top1]]
    other = {**row, "title": "one seed", "data": "z", "runs": row["runs"][:1]}
    root = ElementTree.fromstring(figure([other, row]))
    assert root.find(f"{SVG}rect").get("fill") == "#ffffff"
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert [w for w in words if w in ("x < y", "z")] == ["x < y", "z"]
    assert "a & b" in words
    assert "92.00 ± 2.83 EMA" in words
    assert "90.00 EMA" in words
    first = [float(dot.get("cx")) for dot in root.iter(f"{SVG}circle")][:2]
    assert first == [24, 386]
    (band,) = root.iter(f"{SVG}polygon")
    corners = [tuple(map(float, pair.split(","))) for pair in band.get("points").split()]
    lines = [line.get("points").split() for line in root.iter(f"{SVG}polyline")]
    assert len(lines) == 2
    middle = [tuple(map(float, pair.split(","))) for pair in lines[0]]
    assert [x for x, _ in middle] == [220, 386]
    assert corners[0] == corners[3] == middle[0]  # both seeds are at 50
    # Larger values are higher, and the mean is halfway.
    (_, low), (_, high) = sorted(corners[1:3], key=lambda corner: -corner[1])
    assert middle[1][1] == pytest.approx((low + high) / 2, abs=0.06)
    assert middle[0][1] > low > high
    assert (middle[0][1] - low) / (low - high) == pytest.approx(10, rel=0.02)


def test_pages_and_figures_match_the_rows(ledger):
    assert ledger.main(["draw", "--check"]) == 0, "run `python benchmarks/ledger.py draw`"
    original = {"cifar10", "cifar100"}  # from torchvision; folders and packs contain JPEGs
    for path in (ROOT / "docs" / "results").glob("*.json"):
        assert path.stat().st_size < 60_000
        row = json.loads(path.read_text())
        assert "-dirty" not in row["commit"]
        cifar = "cifar" in row["data"].lower()
        reencoded = cifar and row["config"]["data.path"] not in original
        assert not reencoded or "JPEG" in row["data"]
