"""Runs that fit a head to frozen features, with or without fine-tuning after it."""

import csv
import dataclasses
import hashlib
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from vitral import settings, storage, weights
from vitral.cli import main
from vitral.data.formats import open_dataset
from vitral.errors import UserError
from vitral.rundir import RunDir, read_rows, read_run
from vitral.training import folds, frozen, probe, tokens, train
from vitral.training.balance import Balance
from vitral.training.folds import cross_validate, predict_folds

from .processes import DISTRIBUTED, digests, finish_single, fork, options, run, signal_at

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

HEAD = {
    "model.patch-size": 4,
    "model.image-size": 16,
    "train.batch-size": 16,
    "train.micro-batch": 6,
    "train.threads": 1,
    "data.workers": 0,
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(frozen, "PART", 16)


@pytest.fixture(scope="module")
def pretrained(image_folder, tmp_path_factory):
    """Weights of a run on the same images, with a head for its classes."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    config = settings.load(
        "digits",
        options(
            {
                **DISTRIBUTED,
                "data": image_folder,
                "out": out,
                "train.epochs": 2,
                "train.batch-size": 8,
            },
            {"augment__mixup": 0, "augment__cutmix": 0},
        ),
    )
    assert finish_single(config) == 0
    return out


def head_config(data, out, init, /, recipe="probe", **changes):
    places = {"data": data, "out": out, "init": init}
    return weights.load_settings(recipe, options(HEAD | places, changes))


def tensors(out):
    files = [*out.glob("weights/*/*.safetensors"), *out.glob("checkpoints/*/*.safetensors")]
    assert files
    return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def uninterrupted(image_folder, pretrained, tmp_path_factory):
    """An uninterrupted probe with two views."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen, "PART", 16)
        out = tmp_path_factory.mktemp("uninterrupted") / "run"
        assert finish_single(head_config(image_folder, out, pretrained, train__epochs=2)) == 0
    return out


def test_a_probe_is_an_ordinary_run(uninterrupted, pretrained, capsys):
    found, known = weights.load(uninterrupted), weights.load(pretrained)
    for name, tensor in found.model.state_dict().items():
        same = torch.equal(tensor, known.model.state_dict()[name])
        assert same != name.startswith("head."), name
    (row,) = read_rows(RunDir(uninterrupted).metrics)
    assert read_run(uninterrupted).finished
    assert row["val_top1"] == found.description.metrics["val_top1"] > 0.5
    assert RunDir(uninterrupted).report.is_file()
    assert (
        main(["predict", str(uninterrupted), str(next(RunDir(uninterrupted).path.glob("*.png")))])
        == 0
    )
    before = tensors(uninterrupted)
    assert finish_single(settings.load(str(RunDir(uninterrupted).config))) == 0  # it is finished
    assert tensors(uninterrupted) == before


def test_the_head_is_the_fit_to_the_features(uninterrupted):
    features = frozen.read_features(RunDir(uninterrupted).features)
    assert len(features.labels) == 80
    expected = probe.fit(features, 2, seed=0)
    head = weights.load(uninterrupted).model.head
    torch.testing.assert_close(head.weight, expected.weight, rtol=0, atol=0)
    torch.testing.assert_close(head.bias, expected.bias, rtol=0, atol=0)


def test_sampling_becomes_weights_of_the_fit(image_folder, pretrained, tmp_path):
    shutil.copytree(image_folder, tmp_path / "few")
    for image in sorted((tmp_path / "few" / "train" / "dark").iterdir())[5:]:
        image.unlink()
    config = head_config(tmp_path / "few", tmp_path / "run", pretrained, data__sampling="balanced")
    assert finish_single(config) == 0
    features = frozen.read_features(RunDir(tmp_path / "run").features)
    assert features.labels.bincount().tolist() == [5, 20]
    weights_of_classes = torch.tensor([2.5, 0.625]).double()
    expected = probe.fit(features, 2, seed=0, balance=Balance(weights_of_classes))
    torch.testing.assert_close(weights.load(tmp_path / "run").model.head.weight, expected.weight)
    assert "held-out weighted top-1" in (tmp_path / "run" / "train.log").read_text()
    assert cross_validate(tmp_path / "run", 2).startswith("2 folds of 25 training images")


def kill_at(config, moment):
    """Trains and is killed at a moment, counted in written parts and evaluations of the loss."""

    def die_at_moment(function):
        def counted(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    def action():
        storage.write = die_at_moment(storage.write)
        probe.Problem.loss = die_at_moment(probe.Problem.loss)
        train(config)
        return 0

    left = moment
    return os.waitstatus_to_exitcode(os.waitpid(fork(action), 0)[1])


def test_a_kill_in_the_feature_pass_or_the_fit_changes_nothing(
    image_folder, pretrained, uninterrupted, tmp_path
):
    config = head_config(image_folder, tmp_path / "run", pretrained, train__epochs=2)
    for moment in (1, 3, 5, 20, 100):  # of 6 parts; the later ones are in the fit
        assert kill_at(config, moment) == -signal.SIGKILL
    assert finish_single(config) == 0
    assert tensors(tmp_path / "run") == tensors(uninterrupted)


def test_a_signal_stops_the_feature_pass(image_folder, pretrained, tmp_path):
    config = head_config(image_folder, tmp_path / "run", pretrained)

    def action():
        write = storage.write

        def interrupt(*args):
            write(*args)
            os.kill(os.getpid(), signal.SIGTERM)

        storage.write = interrupt
        return main(["train", str(config_file), "--out", config.train.out])

    config_file = tmp_path / "config.yaml"
    config_file.write_text(settings.dump(config))
    assert os.waitstatus_to_exitcode(os.waitpid(fork(action), 0)[1]) == 143
    assert len([*(tmp_path / "run" / "features").iterdir()]) == 1


def test_features_of_changed_weights_are_rejected(image_folder, pretrained, tmp_path):
    config = head_config(image_folder, tmp_path / "run", pretrained)
    assert kill_at(config, 3) == -signal.SIGKILL
    known = weights.load(pretrained)
    known.model.norm.scale.mul_(2)
    weights.save(tmp_path / "other", {"model": known.model.state_dict()}, known.description)
    other = dataclasses.replace(
        config, train=dataclasses.replace(config.train, init=str(tmp_path / "other"))
    )
    (tmp_path / "run" / "config.yaml").write_text(settings.dump(other))
    with pytest.raises(UserError, match="computed with different weights"):
        train(other)


@pytest.mark.parametrize("recipe", ["probe", "finetune"])
@pytest.mark.parametrize(
    "changes",
    [{"train__reproducible": True}, {"train__parallel": "fsdp"}, {"train__parallel": "ddp"}],
)
def test_two_processes_equal_one(image_folder, pretrained, tmp_path, recipe, changes):
    changes = changes | {"train__epochs": 2, "train__device": "cpu"}
    if recipe == "finetune":
        changes |= {"optim__warmup_epochs": 0, "model__stochastic_depth": 0}
        changes |= {"train__trainable": 1, "optim__lr": 1e-6}
    config = head_config(image_folder, tmp_path / "one", pretrained, recipe, **changes)
    assert finish_single(config) == 0
    file = tmp_path / "recipe.yaml"
    file.write_text(settings.dump(config))
    pair = run(["train", str(file), "--out", str(tmp_path / "two")], 2)
    if "train__reproducible" in changes:
        assert tensors(pair) == tensors(tmp_path / "one")
        return
    one, two = (weights.load(out).model.state_dict() for out in (tmp_path / "one", pair))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=5e-4)


def test_finetuning_starts_from_the_fitted_head(image_folder, pretrained, uninterrupted, tmp_path):
    config = head_config(
        image_folder, tmp_path / "run", pretrained, "finetune", optim__lr=1e-12,
        optim__warmup_epochs=0, optim__weight_decay=0, train__epochs=1,
    )  # fmt: skip
    assert finish_single(config) == 0
    features = frozen.read_features(RunDir(tmp_path / "run").features)
    expected = probe.fit(features, 2, seed=0)
    head = weights.load(tmp_path / "run", which="ema").model.head
    torch.testing.assert_close(head.weight, expected.weight, rtol=1e-4, atol=1e-6)


def test_only_the_last_blocks_are_trained(image_folder, pretrained, tmp_path):
    config = head_config(
        image_folder, tmp_path / "run", pretrained, "finetune", train__trainable=1,
        optim__warmup_epochs=0, train__epochs=1, train__probe_first=True, optim__lr=1e-2,
    )  # fmt: skip
    assert finish_single(config) == 0
    known = weights.load(pretrained).model.state_dict()
    found = weights.load(tmp_path / "run", which="model").model.state_dict()
    changed = {name for name in known if not torch.equal(known[name], found[name])}
    assert changed
    assert {name.partition(".")[0] for name in changed} == {"blocks", "norm", "head"}
    assert {name.split(".")[1] for name in changed if name.startswith("blocks")} == {"1"}


def test_cross_validation(uninterrupted):
    text = cross_validate(uninterrupted, 4)
    features = frozen.read_features(RunDir(uninterrupted).features)
    lines = text.splitlines()
    assert lines[0] == "4 folds of 40 training images"
    assert [line.split()[0] for line in lines[2:]] == ["all", "dark", "light"]
    rows = (uninterrupted / "folds.csv").read_text().splitlines()
    values = [[float(v) for v in row.split(",")[1:]] for row in rows[1:]]
    assert len(values[0]) == 4
    # Folds are equal parts of each class, so the mean over classes is that over images.
    for overall, dark, light in zip(*values, strict=True):
        assert overall == pytest.approx((dark + light) / 2)
    assert len(features.labels) == 80


@pytest.fixture(scope="module")
def mislabeled(image_folder, pretrained, tmp_path_factory):
    """A probe on a table of the training images with groups of two, and two wrong labels."""
    root = tmp_path_factory.mktemp("table")
    table, out = root / "labels.csv", root / "run"
    rows = [["image", "label", "split", "camera"]]
    for name in ("dark", "light"):
        for i in range(20):
            path, split = (
                image_folder / "train" / name / f"{i:02d}.jpg",
                "val" if i > 15 else "train",
            )
            other = {"dark": "light", "light": "dark"}[name]
            rows.append([path, other if i in (3, 17) else name, split, f"{name}{i // 2}"])
    table.write_text("\n".join(",".join(map(str, row)) for row in rows))
    changes = {"data__group_column": "camera"}
    assert finish_single(head_config(table, out, pretrained, **changes)) == 0
    return out


def test_label_errors_are_listed_first_and_the_table_can_be_corrected(mislabeled, capsys):
    assert main(["report", str(mislabeled), "--label-errors"]) == 0
    table = mislabeled / "label_errors.csv"
    assert capsys.readouterr().out.splitlines() == [str(table), str(mislabeled / "report.html")]
    with table.open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == 40
    first = {(Path(row["image"]).name, row["split"]) for row in rows[:4]}
    assert first == {("03.jpg", "train"), ("17.jpg", "val")}
    truth = {row["image"]: Path(row["image"]).parent.name for row in rows}
    assert all(row["label"] != truth[row["image"]] == row["suggested"] for row in rows[:4])
    assert all(float(row["score"]) < 0 for row in rows[:4])
    for row in rows[:4]:
        row["label"] = row["suggested"]
    with table.with_name("corrected.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    before = weights.read_description(mislabeled)[1].config.data
    config = dataclasses.replace(
        before, path=str(table.with_name("corrected.csv")), group_column=None
    )
    dataset = open_dataset(config, 16, 0)
    for split, count in ((dataset.train, 32), (dataset.val, 8)):
        assert len(split) == count
        places = [Path(split.where(i)) for i in range(count)]
        assert [place.parent.name for place in places] == [
            dataset.classes[label] for label in split.labels
        ]
        assert len({*split.groups.tolist()}) == count // 2
    page = (mislabeled / "report.html").read_text()
    assert 'id="label-errors"' in page
    assert "The training images are not checked" not in page


def test_cross_validation_does_not_divide_groups(mislabeled, monkeypatch):
    seen = []

    def record(*args):
        seen.append(predict_folds(*args))
        return seen[-1]

    monkeypatch.setattr(folds, "predict_folds", record)
    assert cross_validate(mislabeled, 4).startswith("4 folds of 32 training images")
    train = open_dataset(weights.read_description(mislabeled)[1].config.data, 16, 0).train
    fold = seen[0][2]
    assert all(len({*fold[train.groups == group].tolist()}) == 1 for group in train.groups)
    assert len({*fold.tolist()}) == 4


def test_folds_need_images_of_each_class(uninterrupted):
    with pytest.raises(UserError, match="folds: expected at least 21 training images of"):
        cross_validate(uninterrupted, 21)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--train.trainable", "3"],
            "train.trainable: expected at most the model's 2 blocks, got 3",
        ),
        (["--train.trainable", "0"], "trainable: expected all, head, or 1 or more blocks, got 0"),
        (["--train.trainable", "hed"], "train.trainable: expected an integer or one of all, head"),
        (["--train.ema-decay", "0.9"], "ema_decay: expected 0 with trainable head"),
        (["--train.patience", "2"], "patience: expected 0 with trainable head, which is validated"),
        (["--augment.mixup", "0.9"], "augment.mixup, augment.cutmix: expected 0 with"),
        (["--folds", "1"], "folds: expected 2 or more, got 1"),
        (["--folds", "5", "--train.trainable", "all"], "folds: expected train.trainable head"),
    ],
)
def test_invalid_settings_are_rejected(pretrained, tmp_path, capsys, words, expected):
    command = ["train", "probe", "--init", str(pretrained), "--out", str(tmp_path / "run")]
    assert main([*command, "--image-size", "16", *words]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_weights_without_a_recipe_are_probed_on_a_cpu(pretrained):
    given = {"train.init": [str(pretrained)]}
    assert settings.default_recipe(given, gpu=False) == "probe"
    assert settings.default_recipe(given, gpu=True) == "finetune"
    assert settings.default_recipe({}, gpu=True) == "digits"


CACHED = {
    "train__trainable": 1,
    "augment__crop": "none",
    "augment__flip": 0.0,
    "augment__brightness": 0.0,
    "augment__contrast": 0.0,
    "augment__saturation": 0.0,
    "optim__warmup_epochs": 0,
}


def test_cached_activations_train_like_images(image_folder, pretrained, tmp_path, monkeypatch):
    """The inputs of the last block are computed once; the weights are equal up to rounding."""
    states = []
    for name, limit in (("cached", tokens.MAX_CACHE_BYTES), ("images", 0)):
        monkeypatch.setattr(tokens, "MAX_CACHE_BYTES", limit)
        changes = CACHED | {"train__epochs": 2, "optim__lr": 1e-3}
        train(head_config(image_folder, tmp_path / name, pretrained, "finetune", **changes))
        assert (tmp_path / name / "train_batch.jpg").exists() == (name == "images")
        states.append(weights.load(tmp_path / name, which="model").model.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-3, atol=1e-5)


def test_cached_activations_resume_exactly(image_folder, pretrained, tmp_path):
    changes = CACHED | {"train__epochs": 8, "train__log_every": 1, "train__checkpoint_steps": 3}
    uninterrupted, killed = (
        head_config(image_folder, tmp_path / name, pretrained, "finetune", **changes)
        for name in ("uninterrupted", "killed")
    )
    assert finish_single(uninterrupted) == 0
    assert signal_at(killed, 7, signal.SIGKILL) == -signal.SIGKILL
    assert finish_single(killed) == 0
    assert digests(tmp_path / "killed") == digests(tmp_path / "uninterrupted")
