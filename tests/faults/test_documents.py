"""Weights and checkpoints from anyone: their manifests are right, and their content is hostile."""

import hashlib
import json
import shutil
import struct

import pytest
import torch
from PIL import Image

from vitral import storage, weights
from vitral.cli import main
from vitral.config import Config, DataConfig, ViTConfig
from vitral.data.formats import open_dataset
from vitral.errors import UserError
from vitral.evaluation import evaluate
from vitral.model import ViT
from vitral.rundir import RunDir
from vitral.training import checkpoint, resume
from vitral.training.resolved import build_model

from ..training.processes import digests, finish_single, make_config

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

SHAPE = ViTConfig(dim=16, depth=1, num_heads=2, num_kv_heads=1, patch_size=4, image_size=16)
MISSING = object()
DEEP = "[" * 200_000
NEWEST = 7  # step
NAMES = ["plain", "red \x1b[31m\x9b1m", "two\nlines\u2028\u202e"]


def make(place, classes=("a", "b", "c")):
    torch.manual_seed(0)
    model = ViT(SHAPE, len(classes))
    description = weights.describe(Config(model=SHAPE), tuple(classes), "", {"val_top1": 0.5})
    weights.save(place, {"model": model.state_dict()}, description)
    return place


@pytest.fixture
def made(tmp_path):
    return make(tmp_path / "made")


def sign(directory):
    """Writes a manifest of whatever is in a directory."""
    files = [path for path in directory.iterdir() if path.name != "manifest.json"]
    contents = {path.name: path.read_bytes() for path in files}
    manifest = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))


def replace(directory, name, path, value):
    """Puts a value at a dotted path of a JSON document, or removes what is there; and signs."""
    document = json.loads((directory / name).read_text())
    *parents, last = path.split(".")
    inside = document
    for key in parents:
        inside = inside[key]
    if value is MISSING:
        del inside[last]
    else:
        inside[last] = value
    (directory / name).write_text(json.dumps(document))
    sign(directory)


def overwrite(directory, name, content):
    (directory / name).write_bytes(content)
    sign(directory)


def documents(content):
    """What is no valid document, whatever it should hold."""
    text = content.decode().rstrip()
    return {
        "lists in lists": DEEP.encode(),
        "a deep value": f'{text[:-1]}, "x": {DEEP}{"]" * len(DEEP)}}}'.encode(),
        "a key twice": f'{text[:-1]}, "schema": 2}}'.encode(),
        "a key inside twice": text.replace('"depth": ', '"depth": 1, "depth": ').encode(),
        "a list": b"[]",
        "nothing": b"",
        "not UTF-8": b"\xff" + content,
        "cut short": content[:-3],
    }


VALUES = [
    ("config", None),
    ("config", []),
    ("config.model", "ti"),
    ("config.model.depth", 3_000_000),
    ("config.model.depth", 10**30),
    ("config.model.depth", "1"),
    ("config.model.depth", True),
    ("config.model.dim", 1 << 60),
    ("config.model.dim", [16]),
    ("config.model.num_heads", 0),
    ("config.model.num_registers", 1 << 40),
    ("config.model.patch_size", 10**9),
    ("config.model.image_size", float("nan")),
    ("config.model.image_size", 1 << 13),
    ("config.model.image_size", 1 << 20),
    ("config.model.mlp_ratio", 1e300),
    ("config.model.mlp_ratio", float("inf")),
    ("config.model.rope_theta", 10**400),
    ("config.model.size", "huge"),
    ("config.model.positions", {}),
    ("config.model.cls_token", 1),
    ("config.data.path", "a\0b"),
    ("config.data.path", "\ud800"),
    ("config.data.path", 5),
    ("config.data.mean", [0.5, 0.5]),
    ("config.data.std", [1, 1, None]),
    ("config.data.interpolation", None),
    ("config.augment.crop_scale", 1),
    ("config.train.progressive", [[16]]),
    ("config.train.epochs", "90"),
    ("config.train.time_budget", -1),
    ("config.optim.betas", "ab"),
    ("classes", None),
    ("classes", "abc"),
    ("classes", [1, 2, 3]),
    ("classes", {"a": 0}),
]
OF_WEIGHTS = [
    *VALUES,
    ("schema", "2"),
    ("schema", MISSING),
    ("config", MISSING),
    ("classes", ["a"] * 1000),
    ("default", ["model"]),
    ("default", "../model"),
    ("metrics", [1]),
    ("metrics", {"val_top1": "good"}),
    ("vitral", 1),
    ("fingerprint", None),
    ("unknown", 1),
]


def refusal(call):
    with pytest.raises(UserError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize(("path", "value"), OF_WEIGHTS)
def test_weights_with_another_value_are_refused(made, path, value):
    """Before anything of that size is built, also where only shapes are read."""
    replace(made, "config.json", path, value)
    for device in ("cpu", "meta"):
        message = refusal(lambda device=device: weights.load(made, device=device))
        assert message.startswith(f"weights: {made}")
        assert len(message) < 1000 + len(str(made))


@pytest.mark.parametrize("kind", documents(b"{}"))
def test_weights_with_a_damaged_document_are_refused(made, capsys, kind):
    overwrite(made, "config.json", documents((made / "config.json").read_bytes())[kind])
    assert main(["predict", str(made), "x.jpg"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vitral: weights: {made / 'config.json'}: not ")
    assert error.index("\n") == len(error) - 1


def test_a_run_that_begins_from_weights_has_their_size(made, tmp_path):
    """config.json alone could ask for all memory."""
    (tmp_path / "own.yaml").write_text("train: {epochs: 1}\noptim: {warmup_epochs: 0}")
    replace(made, "config.json", "config.model.dim", 1 << 16)
    message = refusal(lambda: weights.request(str(tmp_path / "own.yaml"), ["--init", str(made)]))
    assert "according to config.json, got float32" in message


def tensors(**entries):
    """A safetensors file without data."""
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize("shape", [[0, 2**63 - 1, 4], [0, 2**70], [0, -1], [0.0], [[0]], "", None])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_impossible_shapes_are_refused(made, device, shape):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    overwrite(made, "model.safetensors", tensors(cls=entry))
    assert "model.safetensors: " in refusal(lambda: weights.load(made, device=device))


def test_shapes_are_those_of_the_file(made):
    """A header could describe any number of gigabytes."""
    entry = {"dtype": "F32", "shape": [1 << 20], "data_offsets": [0, 1 << 22]}
    overwrite(made, "model.safetensors", tensors(cls=entry))
    message = refusal(lambda: weights.load(made, device="meta"))
    assert "not a safetensors file" in message


def test_a_file_that_is_not_there_is_named(made):
    (made / "model.safetensors").rename(made / "moved")
    assert "model.safetensors" in refusal(lambda: weights.load(made))
    sign(made)
    manifest = json.loads((made / "manifest.json").read_text())
    manifest.pop("moved")
    (made / "manifest.json").write_text(json.dumps(manifest))
    assert "contains no model weights" in refusal(lambda: weights.load(made))


def is_safe(text):
    return all(character.isprintable() or character == "\n" for character in text)


def test_names_in_weights_do_not_reach_the_terminal(tmp_path, capsys):
    made = make(tmp_path / "made", NAMES)
    replace(made, "config.json", "source", "\x1b]0;title\x07")
    replace(made, "config.json", "config.data.path", "\x1b[2J")
    Image.new("RGB", (20, 20)).save(tmp_path / "x.png")
    for words in ("", "--csv", "--json"):
        assert main(["predict", str(made), str(tmp_path / "x.png"), *words.split()]) == 0
        out, err = capsys.readouterr()
        assert is_safe(out + err)
        assert "red \\x1b[31m\\x9b1m" in out.replace("\\\\", "\\")
    assert main(["val", str(made)]) == 2  # the data are not there
    assert main(["val", str(made), "--data", "digits"]) == 2  # other classes
    err = capsys.readouterr().err
    assert is_safe(err)
    assert len(err.splitlines()) == 2
    assert "\\x1b[2J" in err


def test_names_of_folders_are_escaped_in_data_and_weights_alike(tmp_path):
    root = tmp_path / "images"
    for name in NAMES:
        (root / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (20, 20), (i, 0, 0)).save(root / name / f"{i}.png")
    dataset = open_dataset(DataConfig(path=str(root)), 16, 0, train=False)
    assert sorted(dataset.classes) == sorted(
        ["plain", "red \\x1b[31m\\x9b1m", "two\\nlines\\u2028\\u202e"]
    )
    found = weights.load(make(tmp_path / "made", sorted(NAMES)))
    assert evaluate(found, str(root), workers=0, device="cpu").classes == dataset.classes


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory):
    """A run with checkpoints of steps 4, 6 and 7."""
    out = tmp_path_factory.mktemp("hostile") / "run"
    config = make_config(image_folder, out, train__epochs=2, data__workers=0)
    assert finish_single(config) == 0
    assert sorted(checkpoint.steps(RunDir(out).checkpoints)) == [4, 6, NEWEST]
    return config


@pytest.fixture
def folder(run, tmp_path):
    """A copy of the checkpoints."""
    return shutil.copytree(RunDir(run.train.out).checkpoints, tmp_path / "checkpoints")


def skip_warning(folder):
    """Returns the warning about the newest checkpoint, after which the previous one is used."""
    warnings = []
    found = checkpoint.latest(folder, warnings.append, resume.read)
    assert found is not None
    assert found.step == 6
    (warning,) = warnings
    return warning


OF_CHECKPOINTS = [
    *VALUES,
    ("schema", [2]),
    ("step", "7"),
    ("step", 6),
    ("evaluated", None),
    ("evaluated", 1000),
    ("best", {}),
    ("best", {"step": float("nan"), "top1": 0}),
    ("best.step", float("inf")),
    ("best.top1", "1"),
    ("metrics", 1),
    ("metrics", {}),
    ("metrics.val_top1", [1]),
    ("broken", {"0": "cut"}),
    ("broken", [[0]]),
    ("broken", [["0", "cut"]]),
    ("broken", [[-1, "cut"]]),
    ("counters", [0.0]),
    ("counters", ["a"] * 6),
    ("resolved", {}),
    ("resolved.threads", 0),
    ("resolved.threads", "1"),
    ("resolved.micro_batch", 2.5),
    ("resolved.precision", "fp8"),
    ("fingerprint", 5),
    ("parts", None),
]


@pytest.mark.parametrize(("path", "value"), OF_CHECKPOINTS)
def test_a_checkpoint_with_another_value_is_skipped(folder, path, value):
    replace(folder / f"step_{NEWEST:07d}", "state.json", path, value)
    warning = skip_warning(folder)
    assert "step" in warning
    assert len(warning) < 1000 + len(str(folder))


@pytest.mark.parametrize("kind", documents(b"{}"))
def test_a_checkpoint_with_a_damaged_document_is_skipped(folder, kind):
    directory = folder / f"step_{NEWEST:07d}"
    overwrite(directory, "state.json", documents((directory / "state.json").read_bytes())[kind])
    assert "state.json" in skip_warning(folder)


@pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
def test_a_checkpoint_without_a_file_is_skipped(folder, name):
    (folder / f"step_{NEWEST:07d}" / f"{name}.safetensors").unlink()
    sign(folder / f"step_{NEWEST:07d}")
    assert f"{name}.safetensors: missing" in skip_warning(folder)


def deep_json(directory):
    overwrite(directory, "state.json", DEEP.encode())


def other_tensor(directory):
    groups = {name: storage.read_tensors(directory, name) for name in ("model", "ema", "optimizer")}
    groups["ema"].pop("cls")
    storage.write(directory, groups, {"state": storage.read_json(directory, "state.json")})


@pytest.mark.parametrize("damage", [deep_json, other_tensor])
def test_a_run_continues_from_the_checkpoint_before(run, tmp_path, damage):
    out = tmp_path / "run"
    shutil.copytree(run.train.out, out)
    config = make_config(run.data.path, out, train__epochs=2, data__workers=0)
    damage(RunDir(out).checkpoints / f"step_{NEWEST:07d}")
    assert finish_single(config) == 0
    assert "checkpoint of step 7 skipped" in RunDir(out).log.read_text()
    assert digests(out) == digests(run.train.out)


CHANGES = [
    ("model", lambda group: group.pop("cls")),
    ("model", lambda group: group.update(more=torch.zeros(1))),
    ("ema", lambda group: group.update(cls=torch.zeros(3))),
    ("ema", lambda group: group.pop("norm.scale")),
    ("optimizer", lambda group: group.pop("cls.exp_avg")),
    ("optimizer", lambda group: [group.pop(key) for key in [*group] if key.startswith("cls.")]),
    ("optimizer", lambda group: group.update({"other.step": torch.tensor(1.0)})),
    ("optimizer", lambda group: group.update({"cls.exp_avg": torch.zeros(16).half()})),
    ("optimizer", lambda group: group.update({"cls.step": torch.zeros(16)})),
]


@pytest.mark.parametrize(("kind", "change"), CHANGES)
def test_a_checkpoint_with_tensors_of_another_model_is_skipped(run, folder, kind, change):
    directory = folder / f"step_{NEWEST:07d}"
    names = ("model", "ema", "optimizer")
    groups = {name: storage.read_tensors(directory, name) for name in names}
    change(groups[kind])
    storage.write(directory, groups, {"state": storage.read_json(directory, "state.json")})
    model = build_model(run, 2)
    place, warnings = RunDir(folder.parent), []

    def load(folder, step):
        found = resume.read(folder, step)
        resume.check_tensors(found, place, model)
        return found

    found = checkpoint.latest(folder, warnings.append, load)
    assert found is not None
    assert found.step == 6
    (warning,) = warnings
    assert f"{kind}.safetensors: " in warning
    assert "does not fit the model" in warning


def test_a_checkpoint_without_what_later_versions_added_is_read(folder):
    """All settings that are missing have their defaults."""
    directory = folder / f"step_{NEWEST:07d}"
    replace(directory, "state.json", "parts", MISSING)
    replace(directory, "state.json", "config.model.qk_norm", MISSING)
    found = checkpoint.latest(folder, pytest.fail, resume.read)
    assert found is not None
    assert found.step == NEWEST
    assert found.state["config"].model.qk_norm is False
