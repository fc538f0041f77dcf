import dataclasses
import fcntl
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from vitral import settings, storage, weights
from vitral.bench import rounds
from vitral.cli import completion, doctor, main
from vitral.config import ViTConfig
from vitral.data.formats import open_dataset
from vitral.data.loader import eval_batches
from vitral.errors import UserError
from vitral.evaluation import evaluate
from vitral.evaluation.metrics import per_class
from vitral.model import ViT
from vitral.rundir import read_rows

TINY = "--model.dim 16 --model.depth 1 --model.patch-size 4 --train.threads 1".split()
SHORT = "--train.epochs 2 --optim.warmup-epochs 0 --train.log-every 5".split()


def folder_settings(folder, out, *more):
    words = ["train", "digits", "--data", str(folder), "--out", str(out), *TINY, *SHORT]
    words += ["--model.image-size", "16", "--train.batch-size", "8", "--data.workers", "0"]
    return [*words, *more]


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory):
    """A finished run on the small image folder, with the default number of workers."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(folder_settings(image_folder, out, "--data.workers", "None")) == 0
    return out


@pytest.fixture
def user_error(capsys, tmp_path):
    """Runs a command that must fail with one line on stderr, exit code 2, and no output files."""

    def expect(words, *fragments, out=tmp_path / "out"):
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        text = capsys.readouterr().err
        assert re.fullmatch(r"vitral: .+\n", text), text
        assert "----" not in text, text
        for fragment in fragments:
            assert fragment in text, text
        assert not out.exists()
        return text

    return expect


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ("train digit", ["'digit'", "did you mean digits"]),
        ("trian", ["trian", "did you mean train"]),
        ("train digits --model.dimm 3", ["--model.dimm", "did you mean --model.dim"]),
        ("train digits --train.epochs many", ["train.epochs", "many"]),
        ("train digits --model.num-heads 6", ["head size"]),
        ("train digits --model.num-kv-heads 3", ["num_heads", "multiple of num_kv_heads 3"]),
        ("train digits --model.dim 40", ["head size", "multiple of four"]),
        ("train digits --model.image-size 9", ["image_size", "nearest is 8"]),
        ("train digits --train.batch-size 7", ["batch_size", "even"]),
        ("train digits --data /no/such/folder", ["/no/such/folder"]),
        ("train digits --data cifra10", ["did you mean cifar10"]),
        ("train digits --init /no/weights", ["/no/weights"]),
        (
            "train digits --resume",
            ["--resume: not needed: repeating the command without it resumes"],
        ),
        ("recipes digits cifar10", ["recipes: unexpected arguments: cifar10"]),
        ("recipes digits -x", ["-x: unknown option"]),
        ("train nothing.yaml", ["nothing.yaml", "No such file"]),
        ("train digits --train.device cuda", ["GPU"]),
        ("train digits --train.device mps", ["expected an mps device that torch can use"]),
        ("predict /no/weights a.jpg --device xpu", ["expected an xpu device that torch can use"]),
        ("val", ["WEIGHTS"]),
        ("val /no/weights", ["/no/weights", "no such directory"]),
        ("val /no/weights --batch-size 0", ["batch_size"]),
        ("val /no/weights --wich ema", ["--wich", "did you mean --which"]),
        ("recipes digit", ["did you mean digits"]),
        ("data chekc .", ["did you mean check"]),
        ("benchmark", ["did you mean bench"]),
        ("bench data", ["bench data: expected PATH"]),
        ("data preview digits --out", ["--out", "expected 1 argument"]),
    ],
)
def test_user_errors_are_one_line(words, fragments, user_error, tmp_path):
    if words == "train digits --train.device cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if torch.backends.mps.is_available() and "mps" in words:
        pytest.skip("there is an mps device")
    words = words.split()
    if words[0] == "train":
        words += ["--out", tmp_path / "out"]
    user_error(words, *fragments)


@pytest.mark.parametrize("word", ["frob", "evaluate", "vitral"])
def test_a_word_that_is_close_to_no_command_gets_no_suggestion(word, user_error):
    assert user_error([word], "expected one of train, val").endswith(f"got {word}\n")


def test_user_errors_in_yaml(user_error, tmp_path):
    for content, fragment in {
        "model:\n  patch: 4\n": "did you mean model.patch_size",
        "modle:\n  dim: 4\n": "modle.dim",
        "train:\n  epochs: ten\n": "ten",
        "model: [": "not valid YAML",
        "- model\n": "expected sections",
        "optim: {lr: 1, lr: 2}\n": "duplicate key 'lr'",
        "data:\n  path: yes\n": "data.path: expected text, got True",
        "optim:\n  lr: .inf\n": "lr: expected a number above 0, got inf",
    }.items():
        (tmp_path / "mine.yaml").write_text(content)
        user_error(["train", tmp_path / "mine.yaml"], "mine.yaml", fragment)


def test_user_errors_in_folders(image_folder, user_error, tmp_path):
    def broken(change):
        folder = tmp_path / "images"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(image_folder, folder)
        change(folder)
        return folder_settings(folder, tmp_path / "out")

    def flatten(folder):
        for path in list((folder / "val").glob("*/*")):
            path.rename(folder / "val" / f"{path.parent.name}_{path.name}")
        for path in (folder / "val").iterdir():
            if path.is_dir():
                path.rmdir()

    def empty(folder):
        (folder / "train" / "gray").mkdir()
        (folder / "val" / "gray").mkdir()

    user_error(broken(lambda f: (f / "val" / "dark").rename(f / "val" / "dusk")), "dark", "dusk")
    user_error(broken(flatten), "val", "class")
    user_error(broken(empty), "gray")
    user_error(broken(lambda f: shutil.rmtree(f / "train" / "light")), "train")
    user_error(broken(lambda f: [p.unlink() for p in f.glob("*/*/*")]), "images")


def test_an_unwritable_output_directory_is_a_user_error(image_folder, user_error, tmp_path):
    (tmp_path / "file").write_text("")
    user_error(folder_settings(image_folder, tmp_path / "file" / "run"), "cannot write")


def test_a_run_directory_as_recipe_suggests_its_config(run, user_error):
    user_error(["train", run], f"did you mean {run / 'config.yaml'}?")


def test_a_second_run_in_the_same_directory_is_rejected(image_folder, run, user_error, tmp_path):
    child = os.fork()
    if not child:
        lock = (run / ".lock").open("w")
        fcntl.lockf(lock, fcntl.LOCK_EX)
        (tmp_path / "locked").write_text("")
        signal.pause()
    while not (tmp_path / "locked").exists():
        time.sleep(0.001)
    try:
        user_error(folder_settings(image_folder, run), "another process is training", str(run))
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_changed_settings_are_rejected_by_name(image_folder, run, user_error):
    words = folder_settings(image_folder, run, "--optim.lr", "0.5")
    user_error(words, "optim.lr", "0.003", "0.5", f"--out {run}-2")


def test_the_error_explains_how_to_train_longer(image_folder, run, user_error):
    words = folder_settings(image_folder, run, "--train.epochs", "5", "--optim.warmup-epochs", "1")
    error = user_error(words, f"train.epochs: the run in {run} has 2, not 5; to train longer")
    assert error.endswith(f"--init {run} --out {run}-2\n")
    words = folder_settings(image_folder, run, "--train.epochs", "1")
    assert "longer" not in user_error(words, "train.epochs", f"--out {run}-2")


@pytest.mark.parametrize(
    "words",
    [
        "val --image-sizes 16 8 RUN --workers 0",
        "val --image-sizes 8 RUN --image-sizes 16 8 --workers 0",
        "val RUN --workers 0 --image-sizes 16 8",
        "val --workers 0 --image-sizes 16 8 -- RUN",
    ],
)
def test_a_path_may_follow_an_option_with_several_values(run, capsys, words):
    assert main([str(run) if word == "RUN" else word for word in words.split()]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert rows[-2:] == ["16", "8"]


def test_an_invalid_value_of_such_an_option_is_not_parsed_as_a_path(run, user_error):
    user_error(["val", "--image-sizes", "8,16", run], "image-sizes", "'8,16'")


def test_settings_that_do_not_affect_results_may_change(image_folder, run, capsys):
    assert main(folder_settings(image_folder, run, "--data.workers", "1")) == 0
    out = capsys.readouterr().out
    assert "data.workers: None becomes 1" in out
    assert "this run is already finished" in out


def test_other_data_is_rejected(image_folder, three_classes, run, user_error, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    (folder / "train" / "dark" / "00.jpg").unlink()
    user_error(folder_settings(folder, run), "not the dataset")
    user_error(folder_settings(three_classes, run), "not the dataset")


def test_contents_of_a_run_directory(run):
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert found >= {
        "config.yaml",
        "env.json",
        "train.log",
        "metrics.jsonl",
        "curves.png",
        "report.html",
        "train_batch.jpg",
        "per_class.csv",
        "confused_pairs.csv",
        "weights/best/model.safetensors",
        "weights/last/config.json",
        "checkpoints/step_0000010/manifest.json",
    }
    assert any(name.startswith("tensorboard/events") for name in found)
    assert not any(name.endswith((".pkl", ".pt", ".pth", ".metadata")) for name in found)
    for name in ("curves.png", "train_batch.jpg"):
        with Image.open(run / name) as picture:
            assert picture.size[0] > 200
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [5, 10]


def test_config_reproduces_the_run(run, tmp_path):
    assert main(["train", str(run / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    name = "weights/last/model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (run / name).read_bytes()


def printed_metrics(text):
    """Returns the values that `vitral val` prints, by title."""
    return dict(re.findall(r"^(\S+(?: \S+)*)  +([\d.]+%?)(?:  |$)", text, re.MULTILINE))


def test_val_agrees_with_training(run, capsys, tmp_path):
    last = read_rows(run / "metrics.jsonl")[-1]
    words = ["val", str(run / "weights" / "last"), "--which", "model", "--batch-size", "5"]
    assert main([*words, "--out", str(tmp_path / "tables")]) == 0
    values = printed_metrics(capsys.readouterr().out)
    assert values["top-1"] == f"{last['val_top1']:.2%}"
    assert values["macro F1"] == f"{last['val_f1']:.2%}"
    assert values["loss"] == f"{last['val_loss']:.4f}"
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {
        "metrics.json",
        "per_class.csv",
        "confused_pairs.csv",
        "confusion.csv",
        "confusion.png",
    }
    header = (tmp_path / "tables" / "per_class.csv").read_text().splitlines()[0]
    assert header.endswith(",f1,average_precision,roc_auc")


def test_val_at_several_sizes(run, capsys, tmp_path):
    assert main(["val", str(run)]) == 0
    plain = printed_metrics(capsys.readouterr().out)
    words = ["val", str(run), "--image-sizes", "8", "16", "24", "--out", str(tmp_path / "tables")]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "the central 100% of the shorter side at every size" in output
    rows = [line.split() for line in output.splitlines()[2:]]
    assert [row[0] for row in rows] == ["8", "16", "24"]
    expected = [plain[title] for title in ("top-1", "top-5", "calibration error")]
    assert rows[1] == ["16", "12", "2", *expected]
    table = (tmp_path / "tables" / "image_sizes.csv").read_text().splitlines()
    assert table[0] == "image size,images,classes,top1,top5,ece"
    assert [line.split(",")[0] for line in table[1:]] == ["8", "16", "24"]


def test_val_uses_only_held_out_images_of_the_training_data(
    image_folder, user_error, tmp_path, capsys
):
    """The dataset is recognized by its content, not by its path."""
    folder, out = tmp_path / "images", tmp_path / "run"
    shutil.copytree(image_folder / "train", folder)
    assert main(folder_settings(folder, out)) == 0
    last = read_rows(out / "metrics.jsonl")[-1]
    shutil.copytree(folder, tmp_path / "copied")
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "dark" / "00.jpg").unlink()
    val = ["val", str(out / "weights" / "last"), "--which", "model"]

    def held_out(words):
        capsys.readouterr()
        assert main([*val, *words]) == 0
        output = capsys.readouterr().out
        assert (
            ("held-out" in output)
            == ("4 images" in output)
            == (f"{last['val_loss']:.4f}" in output)
        )
        return "4 images, 2 classes" in output

    assert held_out([])
    assert held_out(["--data", f"{folder}/"])
    assert held_out(["--data", str(tmp_path / "copied")])
    assert not held_out(["--data", str(tmp_path / "other")])
    folder.rename(tmp_path / "renamed")
    assert held_out(["--data", str(tmp_path / "renamed")])
    user_error(val, f"data: {folder}, which the weights were trained on, does not exist; pass")


def test_val_rejects_other_classes(image_folder, run, user_error, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    for split in ("train", "val"):
        (folder / split / "light").rename(folder / split / "lit")
    user_error(["val", run, "--data", folder], "2 classes of the weights, got lit, which")


def test_val_reports_a_subset_of_the_classes(three_classes, tmp_path, capsys):
    out, some = tmp_path / "three", tmp_path / "some"
    assert main(folder_settings(three_classes, out)) == 0
    shutil.copytree(three_classes / "val", some, ignore=lambda _, names: {"light"} & {*names})
    capsys.readouterr()
    for more, line in (([], "12 images, 2 classes"), (["--image-sizes", "16"], "image size")):
        assert main(["val", str(out), "--data", str(some), *more]) == 0
        _, message, counts = capsys.readouterr().out.splitlines()[:3]
        assert message.startswith("scored on 2 of the 3 classes of the weights")
        assert counts.startswith(line)
    assert main(["val", str(out)]) == 0
    assert "scored on" not in capsys.readouterr().out
    scores, full_scores = (evaluate(out, str(place)) for place in (some, three_classes))
    assert scores.classes == ("dark", "white")
    found = weights.load(out)
    data = dataclasses.replace(found.description.config.data, path=str(some))
    records = open_dataset(data, 16, 0, train=False).val
    (batch,) = eval_batches(records, found.description.config, 12, 0, torch.device("cpu"))
    with torch.no_grad():
        probabilities = found.model(batch.images)[:, [0, 2]].double().softmax(1)
    assert scores.confidence == pytest.approx(probabilities.amax(1).numpy(), abs=1e-5)
    assert scores.loss == pytest.approx(
        -probabilities.log()[range(12), scores.labels].mean().item()
    )
    assert scores.loss < full_scores.loss


def test_val_selects_the_competing_classes(three_classes, user_error, tmp_path, capsys):
    out, some, one = tmp_path / "three", tmp_path / "some", tmp_path / "one"
    assert main(folder_settings(three_classes, out)) == 0
    shutil.copytree(three_classes / "val", some, ignore=lambda _, names: {"dark"} & {*names})
    shutil.copytree(some / "white", one / "white")
    capsys.readouterr()
    expected = [
        (some, ["--classes", "subset"], "2 of the 3", "with the logits of the others removed"),
        (some, ["--classes", "all"], "2 of the 3", "among all of them"),
        (one, [], "1 of the 3", "among all of them"),
        (one, ["--classes", "subset"], "1 of the 3", "with the logits of the others removed"),
    ]
    for place, words, part, others in expected:
        assert main(["val", str(out), "--data", str(place), *words]) == 0
        message = capsys.readouterr().out
        assert f"scored on {part} classes of the weights, {others}\n" in message
    assert "6 images, 1 class\n" in message
    found = weights.load(out)
    data = dataclasses.replace(found.description.config.data, path=str(some))
    records = open_dataset(data, 16, 0, train=False).val
    (batch,) = eval_batches(records, found.description.config, 12, 0, torch.device("cpu"))
    with torch.no_grad():
        probabilities = found.model(batch.images).double().softmax(1)[range(12), records.labels + 1]
    scores = evaluate(out, str(some), classes="all")
    assert scores.classes == ("light", "white", "dark")
    assert scores.loss == pytest.approx(-probabilities.log().mean().item())
    found = [(row.name, row.images) for row in per_class(scores)]
    assert found == [("light", 6), ("white", 6)]
    (some / "dark").mkdir()  # a class without images
    assert evaluate(out, str(some)).loss == pytest.approx(scores.loss)
    shutil.copytree(some / "white", some / "gray")
    message = "got gray, which the weights do not have"
    user_error(["val", out, "--data", some], message, out=one / "x")
    words = ["val", out, "--suite", some, "--classes", "all"]
    user_error(words, "suite, classes: expected one of the two, got both", out=one / "x")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
def test_corrupt_weights_are_rejected(run, user_error, tmp_path, name):
    shutil.copytree(run / "weights" / "last", tmp_path / "weights")
    file = tmp_path / "weights" / name
    data = file.read_bytes()
    file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    user_error(["val", tmp_path / "weights"], "weights")


def test_val_reports_held_out_images(image_folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "held"
    more = ["--data.hold-out", "--data.val-fraction", "0.2"]
    assert main(folder_settings(image_folder, out, *more)) == 0
    assert "on 8 held-out training images" in (out / "report.html").read_text()
    shutil.copytree(image_folder / "val", tmp_path / "test")
    monkeypatch.chdir(image_folder.parent)
    shutil.copytree(image_folder, tmp_path / "copied")
    message = "held-out training images"
    own, others = (None, image_folder.name, tmp_path / "copied"), (tmp_path / "test",)
    for data, held_out in (*((place, True) for place in own), *((p, False) for p in others)):
        capsys.readouterr()
        assert main(["val", str(out), *(["--data", str(data)] if data else [])]) == 0
        about, counts = capsys.readouterr().out.splitlines()[:2]
        assert (message in about, counts) == (
            held_out,
            f"{8 if held_out else 12} images, 2 classes",
        )


@pytest.fixture(scope="module")
def three_classes(image_folder, tmp_path_factory):
    """The small image folder with an additional class."""
    folder = tmp_path_factory.mktemp("three") / "images"
    shutil.copytree(image_folder, folder)
    for split in ("train", "val"):
        shutil.copytree(folder / split / "light", folder / split / "white")
    return folder


@pytest.fixture(scope="module")
def odd_run(image_folder, tmp_path_factory):
    """A run of one step with a model that is in no recipe."""
    out = tmp_path_factory.mktemp("runs") / "odd"
    more = (
        "--model.dim 24 --model.num-heads 2 --model.num-kv-heads 1 --model.qk-norm --model.depth 2"
    )
    more += " --model.num-registers 2 --model.layer-scale 0.1 --model.no-qkv-bias"
    more += " --model.pooling mean --train.ema-decay 0.5 --train.epochs 1 --train.batch-size 40"
    more += " --data.mean 0.1 0.2 0.3 --data.std 0.4 0.5 0.6"
    assert main(folder_settings(image_folder, out, *more.split())) == 0
    return out


FINETUNE = "--train.batch-size 4 --train.threads 1 --train.epochs 1 --optim.warmup-epochs 0".split()


def test_init_accepts_weights_with_other_classes(three_classes, run, tmp_path, capsys):
    out = tmp_path / "tuned"
    more = ["--init", str(run), "--model.image-size", "20", "--optim.layer-decay", "0.7"]
    more += ["--model.rope-grid", "4"]
    assert main(folder_settings(three_classes, out, *more)) == 0
    assert storage.read_tensors(out / "weights" / "last", "model")["head.weight"].shape == (3, 16)
    output = f"initialized from {run}; reinitialized parameters: head.bias, head.weight"
    assert output in (out / "train.log").read_text()


def test_all_parameters_except_the_head_are_copied_exactly(three_classes, odd_run, tmp_path):
    """The learning rate is too small to change any float32 parameter."""
    out = tmp_path / "tuned"
    more = ["--optim.lr", "1e-30", "--model.image-size", "32"]
    words = ["train", "imagenet-finetune", "--data", str(three_classes), "--out", str(out)]
    assert main([*words, "--init", str(odd_run), *FINETUNE, *more]) == 0
    source = weights.load(odd_run).model.state_dict()
    tuned = storage.read_tensors(out / "weights" / "last", "model")
    assert tuned.keys() == source.keys()
    other = {name for name in source if not torch.equal(source[name], tuned[name])}
    assert other == {"head.weight", "head.bias"}
    assert tuned["head.weight"].shape == (3, 24)


def test_a_recipe_without_a_model_uses_that_of_the_weights(odd_run, image_folder, tmp_path):
    out = tmp_path / "tuned"
    words = ["train", "imagenet-finetune", "--data", str(image_folder), "--out", str(out)]
    words += ["--init", str(odd_run), *FINETUNE, "--model.image-size", "32"]
    assert main(words) == 0
    assert "reinitialized parameters: none" in (out / "train.log").read_text()
    source = weights.load(odd_run).description.config.model
    config = settings.load(str(out / "config.yaml"))
    recipe = settings.load("imagenet-finetune").model
    assert config.model == dataclasses.replace(
        source, image_size=32, rope_grid=4, stochastic_depth=recipe.stochastic_depth
    )
    assert (config.data.mean, config.data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    # The run does not depend on the source weights: its settings are a recipe without them.
    shutil.move(odd_run, tmp_path / "away")
    try:
        again = ["train", str(out / "config.yaml"), "--out", str(out), "--train.eval-every", "2"]
        assert main(again) == 0
    finally:
        shutil.move(tmp_path / "away", odd_run)


def test_weights_with_the_shape_of_a_preset_keep_its_size(run, tmp_path):
    """Otherwise `--model.size` would be accepted without effect."""
    (tmp_path / "tune.yaml").write_text("train: {epochs: 20}")
    trained = weights.load(run).description
    config = dataclasses.replace(trained.config, model=ViTConfig(size="ti"))
    description = weights.describe(config, trained.classes, trained.fingerprint, {})
    weights.save(tmp_path / "ti", {"model": ViT(config.model, 2).state_dict()}, description)
    load = partial(weights.load_settings, str(tmp_path / "tune.yaml"))
    assert load(["--init", str(tmp_path / "ti")]).model == ViTConfig(size="ti", rope_grid=14)
    other = load(["--init", str(tmp_path / "ti"), "--model.size", "b"]).model
    assert other == ViTConfig(size="b", rope_grid=14)


def test_a_fine_tuning_recipe_requires_weights(image_folder, user_error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "imagenet-finetune", "--data", image_folder, "--out", tmp_path / "out"]
    user_error(words, "weights: runs/imagenet-b16-300ep: no such directory", "--init specifies")
    user_error([*words, "--init="], "init: expected")
    user_error([*words, "--init"], "--init/--train.init: expected 1 argument")


def test_settings_valid_only_with_the_weights_are_accepted(
    run, image_folder, user_error, tmp_path, capsys
):
    """The image size is a multiple of the weights' patch size, but not of the default one."""
    words = ["train", "imagenet-finetune", "--data", str(image_folder), "--init", str(run)]
    words += ["--dry-run", "--model.image-size"]
    assert main([*words, "20"]) == 0
    output = capsys.readouterr().out
    assert "image_size: 20" in output
    assert "patch_size: 4" in output
    user_error([*words, "21"], "image_size: expected a multiple of patch_size 4, got 21")
    (tmp_path / "tune.yaml").write_text(f"model: {{image_size: 20}}\ntrain: {{init: {run}}}")
    assert weights.load_settings(str(tmp_path / "tune.yaml")).model.patch_size == 4
    (tmp_path / "tune.yaml").write_text(f"model: {{image_size: 22}}\ntrain: {{init: {run}}}")
    load = partial(weights.load_settings, str(tmp_path / "tune.yaml"))
    assert load(["--model.image-size", "24"]).model.image_size == 24
    with pytest.raises(UserError, match="multiple of patch_size 4, got 22"):
        load()


def test_init_with_another_architecture_is_a_user_error(image_folder, run, user_error, tmp_path):
    words = folder_settings(image_folder, tmp_path / "out", "--init", str(run))
    message = f"use the settings of that run, `vitral train {run}/config.yaml --init {run}`"
    user_error([*words, "--model.dim", "32"], "a different shape", message, "imagenet-finetune")
    user_error([*words, "--model.patch-size", "8"], "a different shape")
    user_error(
        [*words, "--model.image-size", "20"], "4 patches per side, got 5; add --model.rope-grid 4"
    )


def many_images(root, count):
    for split, many in (("train", count), ("val", 4)):
        for label in range(2):
            (root / split / f"class{label}").mkdir(parents=True)
            picture = Image.fromarray(np.full((4, 4, 3), 200 * label, np.uint8))
            for i in range(many // 2):
                picture.save(root / split / f"class{label}" / f"{i:04d}.png")
    return root


def test_broken_image_is_replaced_and_counted(tmp_path, capsys):
    folder = many_images(tmp_path / "images", 1100)
    bad = folder / "train" / "class0" / "0007.png"
    bad.write_bytes(bad.read_bytes()[:40])
    words = folder_settings(folder, tmp_path / "out", "--train.epochs", "1", "--data.workers", "1")
    assert main([*words, "--model.image-size", "4", "--train.batch-size", "110"]) == 0
    log = (tmp_path / "out" / "train.log").read_text()
    assert log.count("broken image") == 1
    assert str(bad) in log
    assert read_rows(tmp_path / "out" / "metrics.jsonl")[-1]["broken"] == 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_too_many_broken_images_stop_the_run(image_folder, tmp_path, capsys, split):
    """One broken training image of 40 exceeds the limit, and so does any validation image."""
    folder, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(image_folder, folder)
    bad = folder / split / "dark" / "03.jpg"
    bad.write_bytes(b"no image")
    words = folder_settings(folder, out, "--train.log-every", "1")
    assert main(words) == 2
    assert str(bad) in capsys.readouterr().err
    if split == "val":  # before the first step, so that the dataset may change before the rerun
        assert not read_rows(out / "metrics.jsonl")
        bad.unlink()
        assert main(words) == 0


def test_divergence_stops_with_the_last_good_checkpoint(image_folder, tmp_path, capsys):
    more = "--optim.lr 1e30 --optim.clip-norm 0 --train.epochs 8 --train.checkpoint-steps 1"
    more += " --train.eval-every 5"  # later than the run stops
    assert main(folder_settings(image_folder, tmp_path / "out", *more.split())) == 2
    error = capsys.readouterr().err
    assert re.search(r"10 consecutive updates before step \d+ were not finite", error), error
    newest = max((tmp_path / "out" / "checkpoints").iterdir())
    storage.verify(newest)
    model = storage.read_tensors(newest, "model")
    assert all(tensor.isfinite().all() for tensor in model.values())


def test_a_run_reports_settings_adjusted_to_its_epochs(run, image_folder, tmp_path, capsys):
    output = "adjusted to 2 epochs: train.eval_every 5 -> 1, train.ema_decay 0.99 -> 0.65"
    assert (run / "train.log").read_text().splitlines()[0].endswith(output)
    assert main([*folder_settings(image_folder, tmp_path / "out"), "--dry-run"]) == 0
    assert f"note        {output}\n" in capsys.readouterr().out


def test_dry_run_only_plans(image_folder, tmp_path, capsys):
    assert main([*folder_settings(image_folder, tmp_path / "out"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for word in ("parameters", "FLOPs", "steps       10 of 8", "time", "patch_size: 4"):
        assert word in out
    assert not (tmp_path / "out").exists()


def test_dry_run_rejects_what_the_run_would(
    image_folder, three_classes, run, user_error, tmp_path, capsys
):
    words = [*folder_settings(image_folder, tmp_path / "out", "--init", str(run)), "--dry-run"]
    assert main(words) == 0
    assert f"initialized from {run}; reinitialized parameters: none" in capsys.readouterr().out
    user_error([*words, "--model.dim", "32"], "a different shape")
    user_error([*folder_settings(image_folder, run, "--optim.lr", "0.5"), "--dry-run"], "optim.lr")
    user_error([*folder_settings(three_classes, run), "--dry-run"], "not the dataset")
    shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("checkpoints"))
    words = [*folder_settings(image_folder, tmp_path / "bare"), "--dry-run"]
    user_error(words, "checkpoints are missing")


def test_init_with_the_settings_of_its_run(three_classes, run, tmp_path):
    """As the error for another architecture suggests."""
    out = tmp_path / "out"
    words = ["train", str(run / "config.yaml"), "--init", str(run)]
    assert main([*words, "--data", str(three_classes), "--out", str(out)]) == 0
    assert "reinitialized parameters: head.bias, head.weight" in (out / "train.log").read_text()


@pytest.mark.parametrize("data", ["--data {}", "--data={}", "--data.path {}"])
def test_the_default_recipe_depends_on_the_options(image_folder, tmp_path, capsys, data):
    """Also if the options are invalid for the other recipe: digits has images of eight pixels."""
    words = ["train", *data.format(image_folder).split(), "--out", str(tmp_path / "out")]
    narrow = "--model.dim 16 --model.depth 1 --model.num-heads 1 --model.num-kv-heads 1"
    narrow += " --model.patch-size 16 --train.threads 1 --dry-run"
    assert main([*words, *narrow.split()]) == 0
    assert "image_size: 128" in capsys.readouterr().out
    words = ["train", "--data", "digits", "--out", str(tmp_path / "out"), "--train.threads", "1"]
    assert main([*words, "--dry-run"]) == 0
    assert "image_size: 8" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["train --data {}", "data preview {}", "bench data {}"])
def test_help_shows_the_values_of_the_default_recipe(words, capsys):
    shown = []
    for name in ("digits", "pictures"):
        assert main([*words.format(name).split(), "--help"]) == 0
        shown.append(
            re.search(r"image-size.*?default: (\d+)", capsys.readouterr().out, re.DOTALL)[1]
        )
    assert shown == ["8", "128"]


def test_help_of_data_preview_describes_its_output(capsys):
    assert main(["data", "preview", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--out TEXT, --train.out TEXT Image file to write. (default: preview.jpg)" in text
    assert "Run directory" not in text


def test_profile_writes_a_trace(image_folder, tmp_path):
    more = ["--train.profile", "--train.epochs", "4"]
    assert main(folder_settings(image_folder, tmp_path / "out", *more)) == 0
    trace = json.loads((tmp_path / "out" / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::scaled_dot_product_attention" in names


def test_preview_and_check(image_folder, tmp_path, capsys):
    for number, out in enumerate((["--out", "{}"], ["--out={}"])):
        picture = tmp_path / f"{number}.png"
        out = [word.format(picture) for word in out]
        assert main(["data", "preview", str(image_folder), "digits", *out]) == 0
        with Image.open(picture) as drawn:
            assert drawn.size[0] > 500
    assert main(["data", "check", str(image_folder), "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "dark" in out
    assert "40" in out


def test_a_table_of_labels_in_every_command(
    image_folder, tmp_path, capsys, user_error, monkeypatch
):
    lines = ["picture,kind,camera"]
    (tmp_path / "data").mkdir()
    for i, path in enumerate(sorted((image_folder / "train").glob("*/*.jpg"))):
        shutil.copy(path, tmp_path / "data" / f"{i:02d}.jpg")
        lines.append(f"{i:02d}.jpg,{path.parent.name},{i % 10}")
    table, out = tmp_path / "data/labels.csv", tmp_path / "run"
    table.write_text("\n".join(lines))
    columns = "--image-column picture --label-column kind --group-column camera".split()
    monkeypatch.chdir(tmp_path)
    words = folder_settings("data/labels.csv", out, "--data.val-fraction", "0.2")
    user_error(words, "labels.csv", "a column for the image", out=out)
    capsys.readouterr()

    assert main([*words, *columns]) == 0
    assert (
        "32 training images, 8 validation images, 2 classes: dark, light" in capsys.readouterr().out
    )
    config = settings.load(str(out / "config.yaml"))
    assert (config.data.path, config.data.group_column) == (str(table), "camera")
    monkeypatch.chdir("/")
    assert main(["val", str(out)]) == 0
    result = capsys.readouterr().out
    assert "held-out training images" in result

    # The table may be moved, and its columns may have other names.
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = tmp_path / "moved/labels.csv"
    moved.write_text(moved.read_text().replace("kind", "group").replace("camera", "label"))
    other = "--image-column picture --label-column group --group-column label".split()
    user_error(["val", out, "--data", moved], "expected a column kind", "give --label-column")
    assert main(["val", str(out), "--data", str(moved), *other]) == 0
    assert capsys.readouterr().out.partition("\n")[2] == result.partition("\n")[2]
    assert main(["report", str(out), "--data", str(moved), *other]) == 0
    assert "no predictions" not in capsys.readouterr().err

    assert main(["data", "check", str(moved), *other, "--workers", "0"]) == 0
    checked = capsys.readouterr().out
    assert "train: 36 images, 18 to 18 per class" in checked
    assert "without dividing groups" in checked
    pack = tmp_path / "pack"
    assert (
        main(["data", "pack", str(moved), str(pack), *other, "--size", "16", "--workers", "0"]) == 0
    )
    packed = open_dataset(dataclasses.replace(config.data, path=str(pack)), 16, 0)
    assert (len(packed.train), len(packed.val), packed.classes) == (36, 4, ("dark", "light"))
    picture = str(tmp_path / "preview.jpg")
    preview = ["data", "preview", str(moved), *other, "--model.image-size", "16", "--out", picture]
    assert main([*preview, "--model.patch-size", "4", "--data.workers", "0"]) == 0


def test_characters_the_terminal_cannot_show_are_escaped(image_folder, tmp_path, monkeypatch):
    for name in ("dark", "light"):
        (tmp_path / f"{name[0]}ö").symlink_to(image_folder / "train" / name)
    shown = {}
    for name in ("stdout", "stderr"):
        shown[name] = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
        monkeypatch.setattr(sys, name, shown[name])
    assert main(["data", "check", str(tmp_path), "--workers", "0"]) == 0
    assert main(["data", "check", "ärger"]) == 2
    assert rb"rarest first: d\xf6 18, l\xf6 18" in shown["stdout"].buffer.getvalue()
    assert rb"\xe4rger: expected an image folder" in shown["stderr"].buffer.getvalue()


def test_doctor_and_recipes(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "attention" in shown
    assert "profile     off, because of VITRAL_PROFILE" in shown
    assert main(["recipes"]) == 0
    assert "imagenet-l16-400ep" in capsys.readouterr().out
    assert main(["recipes", "digits"]) == 0
    assert capsys.readouterr().out.startswith("# ")


def test_bench_model_prints_a_rate(monkeypatch, capsys):
    monkeypatch.setattr(rounds, "SECONDS", 0.01)
    assert main(["bench", "model", "digits", *TINY, "--train.batch-size", "4"]) == 0
    assert " images/s" in capsys.readouterr().out


HALF_IMPORTED = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except BaseException:
    raise ImportError("half of it")
"""


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_ctrl_c_during_an_import_exits_at_once(tmp_path, monkeypatch):
    """Even if the imported module raises another exception instead."""
    (tmp_path / "half_imported.py").write_text(HALF_IMPORTED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "run", lambda *_: importlib.import_module("half_imported"))
    child = os.fork()
    if not child:
        try:
            # Background processes start with SIGINT ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            main(["doctor"])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


def test_ctrl_c_elsewhere_is_an_exception(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(doctor, "run", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        assert main(["doctor"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


HELP = """
import atexit, os, sys
from vitral.cli import main
atexit.register(lambda: os._exit(40 + len({"torch", "numpy", "matplotlib"} & set(sys.modules))))
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "words",
    [
        *(f"{verb} --help" for verb in ("train", "val", "recipes", "data", "doctor")),
        "bench -h",
        "-h",
    ],
)
def test_help_does_not_import_torch(words):
    command = [sys.executable, "-u", "-c", HELP, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 40, done.stderr
    assert "vitral" in done.stdout


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_is_a_script_for_the_shell(shell, capsys):
    assert main(["completion", shell]) == 0
    assert "vitral" in capsys.readouterr().out
    assert main(["completion", "csh"]) == 2
    assert "expected one of bash, zsh, fish, got csh" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vitral rec", {"recipes"}),
        ("vitral data p", {"pack", "preview"}),
        ("vitral train --optim.l", {"--optim.lr", "--optim.layer-decay"}),
        ("vitral val some/run --which ", {"model", "ema"}),
    ],
)
def test_completions_of_a_line(tmp_path, line, expected):
    """Requested as by a shell, but written to a file instead of descriptor 8."""
    environment = {
        **os.environ,
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "found"),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    subprocess.run([sys.executable, "-m", "vitral"], env=environment, check=True)
    assert {*(tmp_path / "found").read_text().split()} == expected


@pytest.mark.parametrize("words", [["--image-sizes"], ["--data", ""], ["--suite", ""]])
def test_an_empty_option_of_val_is_an_error(words, capsys):
    """As with an empty shell variable."""
    assert main(["val", "runs/none", *words]) == 2
    error = capsys.readouterr().err
    name = words[0].lstrip("-")
    assert error == f"vitral: {name}: expected a value after --{name}, got nothing\n"
