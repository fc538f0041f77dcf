"""Tests of benchmarks/resolution.py: three trained models at other image sizes."""

import json
import shutil
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from vitral import weights
from vitral.cli import main as vitral
from vitral.evaluation import sweep

TINY = "--model.dim 24 --model.depth 1 --model.image-size 32 --train.threads 1"
TINY += " --optim.warmup-epochs 0 --train.ema-decay 0.9 --augment.policy none --augment.crop none"
TINY += " --augment.mixup 0 --augment.cutmix 0 --augment.erasing 0 --model.layer-scale 0"
TINY += " --train.batch-size 64 --train.epochs 1 --optim.lr 0.01"
DATA = ["--data", "synthetic", "--seeds", "0"]
WORDS = [*DATA, "--sizes", "24", "32", "48", "--", *TINY.split()]
pytestmark = pytest.mark.slow
NAMES = ("axial", "mixed", "learned")


@pytest.fixture(scope="module")
def resolution(in_process):
    """The program as a module."""
    import resolution

    return resolution


@pytest.fixture(scope="module")
def finished(resolution, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    assert resolution.main([str(out), *WORDS]) == 0
    return out


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "out"))


def table(out):
    lines = (out / "resolution.md").read_text().splitlines()[-2 - len(NAMES) :]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def last(run):
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_scores_at_the_training_size_match_the_log(resolution, finished, name):
    """With the averaged weights of the last step; those of learned positions are a checkpoint's."""
    run = finished / "runs" / f"{name}-seed0"
    logged, rows = last(run), {row.name: row for row in resolution.scores(run)}
    assert list(rows) == ["24", "32", "48"]
    assert rows["32"].top1 == logged["ema_top1"]
    assert logged["ema_loss"] != logged["val_loss"]
    assert rows["32"].images == 512
    ((_, scores),) = sweep(resolution.last_weights(run), [32])
    assert scores.metrics() == {
        k: pytest.approx(logged[f"ema_{k}"], abs=1e-6) for k in scores.metrics()
    }


def test_scores_at_other_sizes_match_vitral_val(resolution, finished, tmp_path):
    """The scores differ between sizes, as the model gets another grid."""
    run = finished / "runs" / "mixed-seed0"
    words = ["--image-sizes", "24", "48", "--which", "ema", "--out", str(tmp_path)]
    assert vitral(["val", str(run / "weights" / "last"), *words]) == 0
    expected = (tmp_path / "image_sizes.csv").read_text().splitlines()[1:]
    lines = (run / "image_sizes.csv").read_text().splitlines()
    assert [lines[1], lines[3]] == expected
    runs = [finished / f"runs/{name}-seed0" for name in NAMES]
    assert len({row.top1 for run in runs for row in resolution.scores(run)}) > 3


def test_learned_positions_are_loaded_from_the_run(resolution, finished):
    found = resolution.last_weights(finished / "runs" / "learned-seed0")
    assert found.model.patch_embedding.positions.shape == (4, 4, 24)
    assert found.description.classes[0] == "pattern 0"
    plain = weights.load(finished / "runs" / "axial-seed0" / "weights" / "last", which="ema")
    assert plain.model.state_dict().keys() < found.model.state_dict().keys()


def test_existing_results_are_not_recomputed(resolution, finished, copied):
    """Only an added size and a lost table are evaluated; runs are not changed."""
    lost, kept = (copied / "runs" / f"{name}-seed0" for name in ("learned", "axial"))
    log = (lost / "train.log").read_bytes()
    (lost / "image_sizes.csv").unlink()
    marked = (kept / "image_sizes.csv").read_text().splitlines()
    marked[1] = "24,512,10,0.125,0.5,0.1"
    (kept / "image_sizes.csv").write_text("\n".join(marked) + "\n")
    more = [*DATA, "--sizes", "24", "32", "40", "48", "--", *TINY.split()]
    assert resolution.main([str(copied), *more]) == 0
    assert (lost / "train.log").read_bytes() == log
    before, now = table(finished), table(copied)
    assert now["axial RoPE"]["24 px"] == "12.50"
    for title, row in before.items():
        same = {key: now[title][key] for key in row if (title, key) != ("axial RoPE", "24 px")}
        assert same.items() <= row.items()
        assert float(now[title]["40 px"]) > 0


def test_the_table_matches_values_by_hand(resolution, copied):
    first = copied / "runs" / "axial-seed0"
    tops = [0.3, 0.4, 0.8]
    for seed, top1 in enumerate(tops):
        run = first.with_name(f"axial-seed{seed}")
        if seed:
            shutil.copytree(first, run)
        line = f"image size,images,classes,top1,top5,ece\n48,512,10,{top1},1,0.1\n"
        (run / "image_sizes.csv").write_text(line)
    assert resolution.main([str(copied), "--summary"]) == 0
    found = table(copied)
    expected = f"50.00 ± {statistics.stdev([30, 40, 80]):.2f}"
    assert found["axial RoPE"] == {
        "positions": "axial RoPE", "seeds": "0, 1, 2", "24 px": "", "32 px": "", "48 px": expected,
    }  # fmt: skip
    line = line.replace("\n48", "\n32")  # a size that only one seed is evaluated at is omitted
    (run / "image_sizes.csv").write_text(line + f"48,512,10,{top1},1,0.1\n")
    assert resolution.main([str(copied), "--summary"]) == 0
    assert table(copied) == found
    text = " ".join(ElementTree.parse(copied / "resolution.svg").getroot().itertext())
    assert all(title in text for title in found)


def test_user_errors_are_reported_before_training(resolution, tmp_path, capsys):
    words = [*DATA, "--sizes", "30", "--", *TINY.split()]
    assert resolution.main([str(tmp_path), *words]) == 2
    assert "multiple of patch_size 8" in capsys.readouterr().err
    assert resolution.main([str(tmp_path), "--summary"]) == 2
    assert not list(tmp_path.iterdir())


def test_other_settings_are_rejected(resolution, finished, capsys):
    assert resolution.main([str(finished), *WORDS, "--optim.lr", "0.5"]) == 2
    assert "another OUT" in capsys.readouterr().err
