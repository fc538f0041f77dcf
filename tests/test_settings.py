"""Recipes and the parser behind them: accepted values, rejected values, and error messages."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from vitral import settings
from vitral.cli import main
from vitral.config import (
    AugmentConfig,
    Config,
    DataConfig,
    OptimConfig,
    TrainConfig,
    ViTConfig,
    flatten,
)
from vitral.documents import convert_json
from vitral.errors import UserError

UNUSUAL = Config(
    model=ViTConfig(size="b", num_kv_heads=6, rope="mixed", qk_norm=True, qkv_bias=False),
    data=DataConfig(path="a b/c: d #'e\" [é]", workers=0, std=(1e-5, 0.2, 1.0)),
    augment=AugmentConfig(policy="3-augment", crop_ratio=(1 / 3, 1.0), repeats=2),
    optim=OptimConfig(lr=1.234567890123456e-7, betas=(0.0, 0.95), eps=1e-16),
    train=TrainConfig(
        out="1e3",
        init="no",
        threads=3,
        deterministic=True,
        seed=2**40,
        progressive=((64, 0.25), (80, 0.75)),
    ),
)


@pytest.fixture
def load(tmp_path):
    """Reads YAML together with command-line arguments."""

    def read(content="", *arguments):
        (tmp_path / "own.yaml").write_text(content, encoding="utf-8")
        return settings.load(str(tmp_path / "own.yaml"), arguments)

    return read


@pytest.fixture
def user_error(load):
    """Checks that reading fails with one line, without a frame, that contains all `parts`."""

    def check(content, arguments, parts, read=load):
        with pytest.raises(UserError) as error:
            read(content, *arguments)
        message = str(error.value)
        assert message.isprintable(), message
        assert not set(message) & set("│╭╰─"), message
        for part in parts:
            assert part in message, message

    return check


@pytest.mark.parametrize("config", [Config(), UNUSUAL], ids=["default", "unusual"])
def test_written_values_are_read_back(load, config):
    train = dataclasses.replace(config.train, out=config.train.out or "runs/own")
    assert load(settings.dump(config)) == dataclasses.replace(config, train=train)
    assert convert_json(Config, json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize("name", settings.recipes())
def test_recipes_load_and_have_a_header(load, name):
    config = settings.load(name)
    assert config.train.out == f"runs/{name}"
    assert load(settings.dump(config)) == config
    heading = [
        line[1:].split() for line in settings.recipe_text(name).splitlines() if line[:1] == "#"
    ]
    words = [line[0] for line in heading if line]
    assert [w for w in words if w in ("command", "data", "hardware", "hours", "result")] == [
        "command",
        "data",
        "hardware",
        "hours",
        "result",
    ]


def test_names_of_recipes():
    assert set(settings.recipes()) >= {
        "digits",
        "cifar10",
        "cifar100",
        "imagenette128",
        "imagenet-s16-90ep",
        "imagenet-s16-300ep",
        "imagenet-s16-800ep",
        "imagenet-b16-300ep",
        "imagenet-l16-400ep",
        "imagenet-finetune",
    }


IMAGENET = [name for name in settings.recipes() if name.startswith("imagenet-")]


@pytest.mark.parametrize("name", IMAGENET)
def test_each_imagenet_value_cites_its_source(name):
    lines = settings.recipe_text(name).split("\n\nmodel:\n")[1].splitlines()
    bare = [line for line in lines if line.startswith(" ") and "  # " not in line]
    assert bare == []


@pytest.mark.parametrize("name", IMAGENET)
def test_only_fine_tuning_recipes_omit_the_model(name):
    tunes = settings.load(name).train.init is not None
    assert bool({"model.size", "model.dim"} & settings.read(name).keys()) is not tunes


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [
        ("", (), {"train.out": "runs/own"}),
        ("# nothing but a comment", (), {"train.out": "runs/own"}),
        ("train: {out: there}", (), {"train.out": "there"}),
        ("train: {out: null, threads: null}", (), {"train.out": "runs/own"}),
        ("train: {out: there}", ("--out", "here"), {"train.out": "here"}),
        ("", ("--out=here",), {"train.out": "here"}),
        ("", ("--out=a=b",), {"train.out": "a=b"}),
        ("", ("--data", "a b", "--init", "w"), {"data.path": "a b", "train.init": "w"}),
        ("", ("--data=a", "--init=w"), {"data.path": "a", "train.init": "w"}),
        ("model: {qk_norm: true}", (), {"model.qk_norm": True}),
        ("model: {qkv_bias: false}", (), {"model.qkv_bias": False}),
        ("", ("--model.qk-norm", "--model.no-qkv-bias"), ["model.qk_norm", "model.qkv_bias"]),
        ("", ("--model.qk_norm", "--model.no_qkv_bias"), ["model.qk_norm", "model.qkv_bias"]),
        ("model: {qk_norm: true}", ("--model.no-qk-norm",), {}),
        ("model: {num_kv_heads: 3}", (), {"model.num_kv_heads": 3}),
        ("model: {num-kv-heads: 3}", (), {"model.num_kv_heads": 3}),
        ("", ("--model.num_kv_heads", "3"), {"model.num_kv_heads": 3}),
        ("model: {num_kv_heads: 3}", ("--model.num-kv-heads", "1"), {"model.num_kv_heads": 1}),
        ("model: {depth: 3}", ("--model.depth", "None"), {}),
        ("model: {size: b, depth: 3}", (), {"model.size": "b", "model.depth": 3}),
        ("model: {depth: 3}", ("--model.size=b",), {"model.size": "b", "model.depth": 3}),
        ("optim: {lr: 1e-3, betas: [0, 0.5]}", (), {"optim.betas": (0.0, 0.5)}),
        ("", ("--optim.lr", "2e-5", "--optim.lr", "3e-5"), {"optim.lr": 3e-5}),
        ("", ("--optim.betas", "0.1", "0.2"), {"optim.betas": (0.1, 0.2)}),
        ("data: {mean: [-1, 0, 1.5]}", (), {"data.mean": (-1.0, 0.0, 1.5)}),
    ],
)
def test_values_of_recipes_and_options(load, content, arguments, expected):
    config, plain = flatten(load(content, *arguments)), flatten(Config())
    if isinstance(expected, list):
        expected = {key: not plain[key] for key in expected}
    plain["train.out"] = "runs/own"
    assert config == plain | expected


@pytest.mark.parametrize(
    ("content", "arguments", "parts"),
    [
        ("modle: {dim: 64}", (), ["modle", "model.dim?", "own.yaml"]),
        ("model: {dimm: 64}", (), ["dimm", "model.dim?", "own.yaml"]),
        ("model: {num_kvheads: 2}", (), ["num_kvheads", "model.num_kv_heads?"]),
        ("lr: {lr: 1}", (), ["lr.lr", "optim.lr?"]),
        ("1: {2: 3}", (), ["1.2"]),
        ("", ("--model.dimm", "64"), ["--model.dimm", "--model.dim?"]),
        ("", ("--model.dimm=64",), ["--model.dimm:", "--model.dim?"]),
        ("", ("--moodel.qk-norm",), ["--moodel.qk-norm", "--model.qk-norm?"]),
        ("", ("--optim.learning-rate", "1"), ["--optim.learning-rate"]),
        ("", ("--epoch", "3"), ["--epoch:", "--epochs?"]),
        ("", ("--eval-every", "3"), ["--eval-every", "--train.eval-every?"]),
        ("", ("--dta", "x"), ["--dta", "--data"]),
        ("", ("stray",), ["stray"]),
        ("", ("-x", "3"), ["-x"]),
    ],
)
def test_unknown_settings_are_rejected_with_a_suggestion(user_error, content, arguments, parts):
    user_error(content, arguments, parts)


@pytest.mark.parametrize(
    ("content", "arguments", "parts"),
    [
        ("train: {epochs: many}", (), ["own.yaml", "train.epochs", "'many'"]),
        ("train: {epochs: 1.5}", (), ["train.epochs", "'1.5'"]),
        ("train: {epochs: null}", (), ["train.epochs", "None"]),
        ("train: {epochs: true}", (), ["train.epochs", "'true'"]),
        ("model: {dim: wide}", (), ["model.dim", "an integer or None", "'wide'"]),
        ("model: {dim: '1\n\n2'}", (), ["model.dim"]),
        ("model: {size: xl}", (), ["model.size", "'xl'", "ti, s, b, l, h"]),
        ("augment: {policy: auto}", (), ["augment.policy", "'auto'", "3-augment"]),
        ("optim: {lr: {a: 1}}", (), ["optim.lr"]),
        ("optim: {lr: []}", (), ["optim.lr"]),
        ("optim: {betas: [0.9]}", (), ["optim.betas", "2"]),
        ("data: {std: [1, 2, x]}", (), ["data.std", "'x'"]),
        ("", ("--train.epochs", "many"), ["train.epochs", "'many'"]),
        ("", ("--model.dim", "very " * 40), ["model.dim", "an integer or None", "very " * 39]),
        ("", ("--model.size=xl",), ["model.size", "'xl'"]),
        ("", ("--data",), ["--data.path"]),
        ("", ("--optim.lr", "--out", "x"), ["--optim.lr"]),
        ("", ("--model.qk-norm=maybe",), ["maybe"]),
        ("model: {dim: 100}", (), ["own.yaml", "dim: ", "100"]),
        ("", ("--optim.lr", "-1"), ["lr: ", "-1"]),
        ("", ("--train.batch-size", "7"), ["batch_size: ", "7"]),
        ("", ("--epochs", "2", "--optim.warmup-epochs", "2"), ["warmup_epochs", "2", "got 2"]),
    ],
)
def test_wrong_values_are_rejected(user_error, monkeypatch, content, arguments, parts):
    monkeypatch.setenv("COLUMNS", "40")  # these can cause frames and line breaks
    monkeypatch.setenv("FORCE_COLOR", "1")
    user_error(content, arguments, parts)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("a: b: c", ["not valid YAML", "line 1"]),
        ("model: {dim: 64", ["not valid YAML"]),
        ("\tmodel: 1", ["not valid YAML"]),
        ("model: {? [1, 2] : 3}", ["not valid YAML"]),
        ("a: !!python/object/apply:os.getcwd []", ["not valid YAML"]),
        ("--- {}\n--- {}", ["not valid YAML"]),
        ("a: &a [x, x]\nmodel: {dim: *a}", ["not valid YAML", "aliases are not supported"]),
        ("train: {epochs: 2020-13-45}", ["not valid YAML", "month"]),
        ("train: {epochs: !!bool x}", ["not valid YAML", "x"]),
        ("train: {epochs: !!int x}", ["not valid YAML", "x"]),
        ("train: {epochs: " + "9" * 5000 + "}", ["a number of more than 100 characters"]),
        ("train: {out: 0x" + "f" * 5000 + "}", ["a number of more than 100 characters"]),
        ('train: {out: "a\\0b"}', ["a NUL character"]),
        ("model: " + "[" * 20_000, ["deeper nesting"]),
        ("[" + "x, " * 20_000 + "]", ["expected sections", "'x', ..."]),
        ("model:\n" + "".join(f"  k{i}: 1\n" for i in range(30_000)), ["65,536 bytes"]),
        ("- model\n- data", ["expected sections", "['model', 'data']"]),
        ("just words", ["expected sections", "'just words'"]),
        ("model: [dim, 64]", ["model:", "'key: value'", "['dim', 64]"]),
        ("model: 64", ["model:", "64"]),
        ("model:\ndata: {path: x}", ["model:", "None"]),
    ],
)
def test_files_that_are_not_recipes_are_rejected(user_error, content, parts):
    user_error(content, (), ["own.yaml", *parts])


def test_errors_in_options_do_not_name_the_recipe(tmp_path):
    """Even if the options replace an invalid value of the recipe."""
    (tmp_path / "own.yaml").write_text("model: {image_size: 30}")
    own = str(tmp_path / "own.yaml")
    with pytest.raises(UserError, match=r"own.yaml: model.image_size: .+ got 30"):
        settings.load(own, ["--train.epochs", "3"])
    with pytest.raises(UserError, match=r"^optim.lr: expected"):
        settings.load(own, ["--model.image-size", "32", "--optim.lr", "-1"])


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("digit", ["'digit'", "did you mean digits?"]),
        ("imagenet-s16-90", ["did you mean imagenet-s16-90ep?"]),
        ("", ["''"]),
        ("../digits", ["'../digits'"]),
        ("no/such.yaml", ["no/such.yaml", "No such file"]),
        ("folder.yaml", ["folder.yaml", "directory"]),
        ("fifo.yaml", ["fifo.yaml", "not a regular file"]),
        ("latin.yml", ["latin.yml", "UTF-8"]),
    ],
)
def test_unknown_sources_are_rejected(user_error, tmp_path, monkeypatch, source, parts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "latin.yml").write_bytes("# \xe9".encode("latin-1"))
    user_error(source, (), parts, read=settings.load)


def test_help_shows_the_recipes_own_values(tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("optim: {lr: 0.0123}\nmodel: {size: ti, qk_norm: true}")
    assert main(["train", str(tmp_path / "own.yaml"), "--help"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    words = " ".join(captured.out.split())
    for option, default in (
        ("--optim.lr X", "0.0123"),
        ("--model.size {ti,s,b,l,h}", "ti"),
        ("--model.qk-norm", "on"),
    ):
        assert f"(default: {default})" in words.split(option)[1].split(" --")[0]


def test_settings_import_nothing_heavy():
    code = (
        "import sys; from vitral import settings; settings.load('digits')\n"
        "print([name for name in ('torch', 'numpy', 'torchvision') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_fewer_epochs_of_digits():
    """14 of 70 epochs: a fifth of the 5 epochs of warmup, and of the 100 steps of the average."""
    config = settings.load("digits", ["--epochs", "14"])
    assert config.optim.warmup_epochs == 1
    assert config.train.eval_every == 3
    assert config.train.ema_decay == 0.95
    assert settings.request("digits", ["--epochs", "14"]).notes == (
        "adjusted to 14 epochs: optim.warmup_epochs 5 -> 1, train.eval_every 5 -> 3, "
        "train.ema_decay 0.99 -> 0.95",
    )
    assert settings.load("digits", ["--epochs", "60"]).train.eval_every == 5  # never raised


@pytest.mark.parametrize("name", settings.recipes())
@pytest.mark.parametrize("epochs", [1, 2, 7])
def test_fewer_epochs_of_each_recipe(name, epochs):
    recipe, config = settings.load(name), settings.load(name, ["--epochs", str(epochs)])
    fraction = epochs / recipe.train.epochs
    assert config.optim.warmup_epochs == pytest.approx(
        fraction * recipe.optim.warmup_epochs, rel=1e-5
    )
    assert epochs / config.train.eval_every >= min(epochs, 4)
    if recipe.train.ema_decay:
        spans = [1 / (1 - each.train.ema_decay) for each in (recipe, config)]
        assert spans[1] == pytest.approx(max(1, fraction * spans[0]), rel=0.02)
    else:
        assert config.train.ema_decay == 0


@pytest.mark.parametrize("epochs", ["70", "71", "700"])
def test_only_fewer_epochs_adjust_settings(epochs):
    request = settings.request("digits", ["--epochs", epochs])
    train = dataclasses.replace(settings.load("digits").train, epochs=int(epochs))
    assert request.config == dataclasses.replace(settings.load("digits"), train=train)
    assert request.notes == ()


def test_explicit_settings_are_not_adjusted():
    own = ["--optim.warmup-epochs", "1.5", "--train.eval-every", "2", "--train.ema-decay", "0.5"]
    for i in range(0, len(own), 2):
        (path,) = settings.parse_options(own[i : i + 2])
        request = settings.request("digits", ["--epochs", "2", *own[i : i + 2]])
        assert flatten(request.config)[path] == float(own[i + 1])
        assert len(request.notes) == 1
        assert path not in request.notes[0]
    assert settings.request("digits", ["--epochs", "2", *own]).notes == ()


def test_adjusted_settings_are_adjusted_once(load):
    """The config.yaml of a run is not adjusted again, with or without an option for the epochs."""
    config = settings.load("cifar10", ["--epochs", "3", "--out", "x"])
    for words in ((), ("--epochs", "3"), ("--epochs", "4")):
        again = load(settings.dump(config), *words)
        assert (again.optim, again.train.ema_decay) == (config.optim, config.train.ema_decay)
        assert again.train.eval_every == config.train.eval_every


def test_values_that_look_like_options_round_trip(tmp_path):
    config = settings.load("digits", ["--out=--odd", "--model.qk-norm"])
    (tmp_path / "odd.yaml").write_text(settings.dump(config))
    assert settings.load(str(tmp_path / "odd.yaml")) == config
    (tmp_path / "dashes.yaml").write_text("model: {qk-norm: true, num-kv-heads: 3}\n")
    model = settings.load(str(tmp_path / "dashes.yaml")).model
    assert model.qk_norm
    assert model.num_kv_heads == 3
