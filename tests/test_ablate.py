"""Tests of benchmarks/ablate.py: training, interruption and resumption, and summaries."""

import contextlib
import dataclasses
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from vitral import settings
from vitral.errors import UserError
from vitral.model import count_flops

TINY = "--model.dim 24 --model.depth 1 --model.num-heads 6 --model.num-kv-heads 2"
TINY += " --train.threads 1 --train.epochs 5 --optim.warmup-epochs 0"
NORM = ["--only", "norm", "--seeds", "0", "--recipe", "digits"]
pytestmark = pytest.mark.slow
STEPS = 102  # 5 times 1,295 images in batches of 64, rounded up


@pytest.fixture(scope="module")
def ablate(in_process):
    """The program as a module."""
    import ablate

    return ablate


@pytest.fixture(scope="module")
def finished(ablate, tmp_path_factory):
    """A study of two runs, trained without interruption."""
    out = tmp_path_factory.mktemp("finished")
    assert ablate.main([str(out), *NORM, "--", *TINY.split()]) == 0
    return out


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "out"))


def copy_as_seed(run, seed):
    """Copies a run of seed 0 as if it had another seed and thus other held-out images."""
    other = Path(shutil.copytree(run, run.with_name(run.name.replace("seed0", f"seed{seed}"))))
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("seed: 0", f"seed: {seed}"))
    for file in (
        *other.glob("weights/last/config.json"),
        *other.glob("checkpoints/*/state.json"),
    ):
        found = json.loads(file.read_text())
        file.write_text(json.dumps({**found, "fingerprint": "another"}))
    return other


def last(run):
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def cells(out, study):
    """The rows of the table of a study."""
    section = (out / "ablation.md").read_text().split(f"## {study}\n")[1].split("##")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_runs_have_the_settings_of_the_recipe_and_held_out_images(finished):
    expected = settings.load("digits", TINY.split())
    for name in ("recipe-seed0", "layer-norm-seed0"):
        config = settings.load(str(finished / "runs" / name / "config.yaml"))
        assert config.data.hold_out
        assert config.train.eval_every == 5
        assert (config.model, config.augment, config.optim) == (
            expected.model, expected.augment, expected.optim,
        )  # fmt: skip
        lines = (finished / "runs" / name / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["step"] for row in rows if "val_top1" in row] == [STEPS]
    environment = json.loads((finished / "runs" / "layer-norm-seed0" / "env.json").read_text())
    assert environment["parts"] == "layer-norm"


def test_the_table_matches_the_log(finished):
    base, other = (last(finished / "runs" / f"{n}-seed0") for n in ("recipe", "layer-norm"))
    config = settings.load("digits", TINY.split()).model
    flops = f"{count_flops(config, 10) / 1e6:.2f}"
    expected = [flops, "0", f"{STEPS * 64:,}"]
    top1 = [[f"**{100 * r['ema_top1']:.2f}**", f"{100 * r['val_top1']:.2f}"] for r in (base, other)]
    first, second = cells(finished, "norm")
    assert first[0] == "the recipe"
    assert first[2:8] == [*expected, *top1[0], ""]
    difference = 100 * (other["ema_top1"] - base["ema_top1"])
    assert second[2:8] == [*expected, *top1[1], f"{difference:+.2f}"]


def test_statistics_over_seeds_match_values_by_hand(ablate, copied):
    """Top-1 of 50, 60, 70 and 52, 61, 73: deviations 10 and 10.54, differences 2, 1, 3."""
    tops = {"recipe": (0.5, 0.6, 0.7), "layer-norm": (0.52, 0.61, 0.73)}
    for name, values in tops.items():
        first = copied / "runs" / f"{name}-seed0"
        for seed, top1 in enumerate(values):
            run = first.with_name(f"{name}-seed{seed}")
            if seed:
                copy_as_seed(first, seed)
            row = {**last(run), "ema_top1": top1}
            (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    # Differences ignore a seed that only one of the two has. Unfinished runs are ignored.
    copy_as_seed(first, 7)
    unfinished = copy_as_seed(first, 8)
    (unfinished / "metrics.jsonl").write_text(json.dumps({**last(first), "epoch": 1.0}) + "\n")
    assert ablate.main([str(copied), "--summary"]) == 0
    base, other = cells(copied, "norm")
    assert base[3] == "0, 1, 2"
    assert (base[5], base[7]) == ("**60.00 ± 10.00**", "")
    scores = [52, 61, 73, 52]
    assert other[3] == "0, 1, 2, 7"
    assert other[5] == f"**59.50 ± {statistics.stdev(scores):.2f}**"
    assert other[7] == "+2.00 ± 0.58"  # 1 / sqrt(3)
    drawing = ElementTree.parse(copied / "ablation.svg").getroot()
    text = " ".join(drawing.itertext())
    assert "LayerNorm" in text
    assert "norm" in text


def test_an_interrupted_study_resumes(ablate, benchmarks, finished, tmp_path, capfd):
    """Ctrl-C ends the program cleanly with exit code 130; repeating the command resumes."""
    out = tmp_path / "out"
    words = [sys.executable, str(benchmarks / "ablate.py"), str(out), *NORM, "--", *TINY.split()]
    program = subprocess.Popen(
        [*words, "--train.checkpoint-steps", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while not list(out.glob("runs/recipe-seed0/checkpoints/step_*")):
        with contextlib.suppress(subprocess.TimeoutExpired):
            pytest.fail(f"exit code {program.wait(0.05)}: {program.stdout.read()}")
    program.send_signal(signal.SIGINT)
    output, _ = program.communicate(timeout=60)
    assert program.returncode == 130, output
    assert "Traceback" not in output
    (step,) = re.findall(r"stopped at step (\d+); repeat the command to resume", output)
    assert 0 < int(step) < STEPS
    assert not (out / "runs" / "layer-norm-seed0").exists()
    assert ablate.main(words[2:]) == 0
    assert f"resumes from step {step}" in capfd.readouterr().out
    minutes = r" [0-9.]+ \|\n"  # the last cell
    resumed, expected = (
        re.sub(minutes, "\n", (o / "ablation.md").read_text()) for o in (out, finished)
    )
    assert resumed == expected
    assert (out / "ablation.svg").read_bytes() == (finished / "ablation.svg").read_bytes()


def test_finished_runs_are_not_repeated(ablate, copied):
    log = copied / "runs" / "recipe-seed0" / "train.log"
    before = log.read_bytes()
    (copied / "ablation.md").unlink()
    assert ablate.main([str(copied), *NORM, "--", *TINY.split()]) == 0
    assert log.read_bytes() == before
    assert len(cells(copied, "norm")) == 2


@pytest.mark.parametrize("seed", [0, 3])
def test_other_settings_are_rejected(ablate, copied, seed, capsys):
    """Also if only a run of another seed has other settings, as it is part of the same row."""
    run = (copied / "runs" / "recipe-seed0").rename(copied / "runs" / f"recipe-seed{seed}")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("seed: 0", f"seed: {seed}"))
    shutil.rmtree(copied / "runs" / "layer-norm-seed0")
    assert ablate.main([str(copied), *NORM, "--", *TINY.split(), "--optim.lr", "0.5"]) == 2
    output = capsys.readouterr().err
    assert "optim.lr" in output
    assert (
        f"recipe-seed{seed} has 0.003, not 0.5; use the original settings, or another OUT" in output
    )
    assert output.count("\n") == 1
    assert not (copied / "runs" / "layer-norm-seed0").exists()


def test_a_failing_run_does_not_stop_the_others(ablate, copied, capfd):
    (copied / "runs" / "mean-pooling-seed0").write_text("no folder")
    words = [str(copied), "--only", "parts", *NORM[1:], "--", *TINY.split()]
    assert ablate.main(words) == 1
    out, err = capfd.readouterr()
    assert re.search(r"\[3/4\] .*mean-pooling-seed0\n\[4/4\] .*layer-norm-seed0\n", out)
    assert "failed: mean-pooling-seed0; repeat the command to retry" in err
    assert "Traceback" not in err


def test_variants_of_kv_heads_have_equal_flops(ablate, tmp_path, capsys):
    """By hand: K instead of Q heads save 2 (Q - K) S outputs of D inputs, which the FFN gets."""
    words = [str(tmp_path), "--only", "kv-heads", "--seeds", "3", "1", "--recipe", "digits"]
    assert ablate.main([*words, "--dry-run", "--", *TINY.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [f"kv{count}-seed{seed}" for seed in (3, 1) for count in (6, 3, 2, 1)]
    assert [line.split()[0] for line in lines] == names
    config = settings.load("digits", [*TINY.split(), "--model.num-kv-heads", "6"]).model
    expected = count_flops(config, 10)
    assert {line.split("parameters")[1].split()[0] for line in lines} == {f"{expected / 1e6:.2f}"}
    assert all(f"{STEPS} steps" in line and line.endswith("not started") for line in lines)
    assert not list(tmp_path.iterdir())
    experiment = ablate.Experiment(tmp_path, "digits", tuple(TINY.split()))
    for run in ablate.plan(experiment, ["kv-heads"], [0]):
        model = run.config.model
        assert count_flops(model, 10) == expected
        spared = 24 * 2 * (6 - model.shape.num_kv_heads) * 4
        assert round(24 * model.mlp_ratio) == 24 * 4 + spared // (2 * 24)


def test_unequal_flops_are_rejected(ablate, tmp_path, capsys):
    """With few channels, rounding changes the width of the feed-forward network too much."""
    words = [str(tmp_path), "--only", "kv-heads", "--recipe", "digits", "--"]
    with pytest.raises(UserError, match="equal FLOPs"):
        ablate.check_equal_cost("kv-heads", unequal_runs(ablate, tmp_path))
    assert ablate.main([*words, "--model.dim", "64"]) == 2  # six heads of 64 channels
    assert "dim: expected num_heads 6 times" in capsys.readouterr().err


def unequal_runs(ablate, out):
    experiment = ablate.Experiment(out, "digits", tuple(TINY.split()))
    wide = ablate.Variant("wide", "wide", "--model.mlp-ratio 5")
    return [experiment.plan(variant, 0) for variant in (ablate.RECIPE, wide)]


def test_variants_without_an_effect_are_skipped(ablate, tmp_path, capsys):
    words = [str(tmp_path), "--dry-run", "--seeds", "0", "--recipe", "digits"]
    assert ablate.main([*words, "--only", "augmentation", "--", *TINY.split()]) == 0
    out = capsys.readouterr().out
    assert "without erasing: no change to digits; skipped" in out
    assert re.findall(r"^\S+-seed0", out, re.MULTILINE) == ["recipe-seed0", "no-mixing-seed0"]
    plain = [*TINY.split(), "--augment.mixup", "0"]
    assert ablate.main([*words, "--only", "augmentation", "--", *plain]) == 2
    assert "changes digits" in capsys.readouterr().err


def test_every_variant_of_the_recipe_can_be_planned(ablate, tmp_path):
    """Each has a different name and different settings."""
    experiment = ablate.Experiment(tmp_path, "cifar10", ("--data.path", "synthetic"))
    runs = ablate.plan(experiment, list(ablate.STUDIES), [0])
    assert len({run.path for run in runs}) == len(runs) == 21
    flat = {
        (repr(dataclasses.replace(run.config, train=without_out(run))), run.variant.parts)
        for run in runs
    }
    assert len(flat) == 21


def without_out(run):
    return dataclasses.replace(run.config.train, out=None)


def test_flops_of_growing_images_are_the_mean_over_the_steps(
    ablate, finished, tmp_path, monkeypatch
):
    """By hand: a fifth of the steps at 4 px, the rest at 8, in the table and the ledger."""
    sizes = "--train.progressive 4 0.2 8 0.8"
    growing = ablate.Variant("growing", "from 4 to 8 px", sizes)
    monkeypatch.setitem(ablate.STUDIES, "growing", (ablate.RECIPE, growing))
    monkeypatch.setattr(ablate, "VARIANTS", (ablate.RECIPE, growing))
    out = shutil.copytree(finished, tmp_path / "out")
    words = [str(out), "--only", "growing", "--recipe", "digits", "--seeds", "0"]
    assert ablate.main([*words, "--", *TINY.split()]) == 0
    config = settings.load("digits", TINY.split()).model
    small = -(-STEPS // 5)
    costs = small * count_flops(config, 10, 4) + (STEPS - small) * count_flops(config, 10)
    assert cells(out, "growing")[1][2] == f"{costs / STEPS / 1e6:.2f}"
    assert ablate.main([str(out), "--only", "growing", "--ledger", "--commit", "c"], tmp_path) == 0
    row = json.loads((tmp_path / "docs" / "results" / "growing-growing.json").read_text())
    assert row["runs"][0]["flops"] == pytest.approx(3 * 64 * costs)


def test_rows_for_the_ledger(ablate, copied, tmp_path):
    for name in ("recipe", "layer-norm"):
        copy_as_seed(copied / "runs" / f"{name}-seed0", 1)
    root = tmp_path / "checkout"
    words = [str(copied), "--only", "norm", "--ledger", "--data-name", "pens", "--commit", "abc"]
    assert ablate.main(words, root) == 0
    rows = {path.stem: json.loads(path.read_text()) for path in root.glob("docs/results/*.json")}
    assert set(rows) == {"norm-recipe", "norm-layer-norm"}
    flops = 3 * count_flops(settings.load("digits", TINY.split()).model, 10) * STEPS * 64
    for name, row in rows.items():
        variant = name.removeprefix("norm-")
        assert (row["study"], row["commit"]) == ("norm", "abc")
        assert row["data"] == "pens, 10% of the training images held out"
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        assert row["runs"][0]["top1"]["ema"] == last(copied / f"runs/{variant}-seed0")["ema_top1"]
        assert row["runs"][0]["flops"] == pytest.approx(flops)
    assert rows["norm-recipe"]["command"].startswith("vitral train digits --model.dim 24 ")
    own = rows["norm-layer-norm"]["command"]
    assert own.startswith("python benchmarks/variants.py layer-norm digits --model.dim 24 ")
    assert own.endswith("--train.seed N")


def test_a_summary_without_runs_is_an_error(ablate, tmp_path, capsys):
    assert ablate.main([str(tmp_path), "--summary"]) == 2
    assert "expected finished runs" in capsys.readouterr().err
