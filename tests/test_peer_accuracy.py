"""Tests of benchmarks/peer_accuracy.py: timm's models in vitral's loop, on equal terms."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vitral import settings, train, weights
from vitral.config import ViTConfig
from vitral.errors import UserError
from vitral.model import ViT, count_flops
from vitral.training import Interrupted, Parts, checkpoint
from vitral.weights import public

timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def models(benchmarks):
    """timm_models as a module."""
    import timm_models

    return timm_models


@pytest.fixture(scope="module")
def program(in_process):
    """peer_accuracy as a module."""
    import peer_accuracy

    return peer_accuracy


def by_name(models):
    return {parts.name: parts for parts in models.PARTS}


# With options that timm's models do not have, or have with other defaults.
TINY = ViTConfig(
    depth=2,
    mlp_ratio=3,
    stochastic_depth=0.1,
    dropout=0.1,
    num_registers=4,
    qk_norm=True,
    layer_scale=0.5,
    qkv_bias=False,
    ffn_bias=False,
)
# timm has no tiny rotary model.
NAMES = {"timm": ("ti", "vit_tiny_patch16_224"), "timm-rope": ("s", "vit_small_patch16_rope_224")}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("name", NAMES)
def test_the_model_equals_timm(models, name, pooling):
    """With the same seed, parameters and logits are bit-identical to those of timm's model.

    Options that only vitral has change nothing, so the others have timm's defaults.
    """
    size, timm_name = NAMES[name]
    config = dataclasses.replace(TINY, size=size, pooling=pooling)
    torch.manual_seed(0)
    model = by_name(models)[name].model(config, 7)
    torch.manual_seed(0)
    options = {"depth": 2, "mlp_ratio": 3, "drop_path_rate": 0.1, "proj_drop_rate": 0.1}
    options |= {"global_pool": "avg"} if pooling == "mean" else {}
    reference = timm.create_model(timm_name, num_classes=7, **options)
    state, expected = model.state_dict(), reference.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    images = torch.randn(2, 3, 224, 224)
    for mode in (False, True):  # in training mode, stochastic depth and dropout are random
        logits = []
        for compared in (model, reference):
            torch.manual_seed(1)
            logits.append(compared.train(mode)(images))
        assert torch.equal(*logits)


def groups(models, name, config):
    """Names of the parameters without block numbers, by weight decay."""
    model = by_name(models)[name].model(config.model, 10)
    names = {id(p): n.replace("blocks.0.", "").replace("blocks.1.", "") for n, p in named(model)}
    found = {}
    for group in models.TimmGroups(model, config.optim).adamw.param_groups:
        members = [names[id(parameter)] for parameter in group["params"]]
        assert group["lr_factor"] == 1
        found.setdefault(group["weight_decay"], []).extend(members)
    assert sum(len(members) for members in found.values()) == len(list(named(model)))
    return {decay: set(members) for decay, members in found.items()}


def named(model):
    return model.named_parameters()


DECAYED = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "head", "patch_embed.proj"}
NORMS = {"norm1", "norm2", "norm"}


@pytest.mark.parametrize(
    ("name", "others"),
    [("timm", {"cls_token", "pos_embed"}), ("timm-rope", {"cls_token", "gamma_1", "gamma_2"})],
)
def test_which_parameters_decay(models, name, others):
    config = settings.load("digits", ["--model.depth", "2", "--optim.weight-decay", "0.3"])
    found = groups(models, name, config)
    assert found[0.3] == {f"{layer}.weight" for layer in DECAYED}
    biases = {f"{layer}.bias" for layer in DECAYED | NORMS}
    assert found[0.0] == biases | {f"{layer}.weight" for layer in NORMS} | others


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_decays_the_listed_parameters(models, optimizer):
    """A step with zero gradients multiplies matrices by 1 - lr * decay, and keeps the rest."""
    config = settings.load("digits", ["--model.depth", "1", "--optim.name", optimizer])
    model = by_name(models)["timm"].model(config.model, 10)
    before = {name: p.detach().clone() for name, p in named(model)}
    optimizer = models.TimmGroups(model, dataclasses.replace(config.optim, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1, torch.zeros(()))
    shrunk = {name for name, p in named(model) if torch.allclose(p, 0.95 * before[name], atol=0)}
    kept = {name for name, p in named(model) if torch.equal(p, before[name])}
    assert {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight"} <= shrunk
    assert {"pos_embed", "cls_token", "norm.weight"} <= kept - shrunk


def test_layer_decay_depends_on_the_block(models):
    config = settings.load("digits", ["--model.depth", "2", "--optim.layer-decay", "0.5"])
    model = by_name(models)["timm"].model(config.model, 10)
    names = {id(p): name for name, p in named(model)}
    groups = models.TimmGroups(model, config.optim).adamw.param_groups
    found = {names[id(p)]: group["lr_factor"] for group in groups for p in group["params"]}
    for name, _ in named(model):
        expected = 0.125  # positions, class token and patches
        for start, factor in (("blocks.0.", 0.25), ("blocks.1.", 0.5), ("norm.", 1), ("head.", 1)):
            expected = factor if name.startswith(start) else expected
        assert found.pop(name) == expected, name
    assert not found


def test_layer_decay_requires_a_final_norm(models):
    words = ["--optim.layer-decay", "0.7", "--model.pooling", "mean"]
    config = settings.load("digits", words)
    with pytest.raises(UserError, match="layer_decay: expected 1"):
        models.TimmGroups(by_name(models)["timm"].model(config.model, 10), config.optim)


@pytest.mark.parametrize(("batch", "rate"), [(1024, 1e-3), (256, 5e-4), (64, 2.5e-4), (4096, 2e-3)])
def test_own_settings(models, batch, rate):
    recipe = settings.load("digits", ["--optim.name", "muon"]).optim
    own = models.own_settings(recipe, batch)
    assert own.name == "adamw"
    assert own.lr == pytest.approx(rate)
    assert (own.betas, own.weight_decay, own.clip_norm) == ((0.9, 0.999), 0.05, 0)
    assert (own.warmup_epochs, own.final_lr) == (recipe.warmup_epochs, recipe.final_lr)


TRAINED = "--model.dim 16 --model.depth 1 --model.stochastic-depth 0.2 --model.dropout 0.1"
TRAINED += " --train.epochs 1 --train.batch-size 256 --optim.warmup-epochs 0 --train.threads 1"
STEPS = 6  # 1,437 images in batches of 256; the last is filled from the next epoch


def watching(parts, name, seen):
    """Parts whose model records a hash of its inputs, with the mode (training or not)."""

    def model(config, num_classes):
        built = parts.model(config, num_classes)

        def record(module, inputs):
            if inputs[0].device.type != "meta":  # where FLOPs are counted
                digest = hashlib.sha256(inputs[0].numpy().tobytes()).hexdigest()
                seen.append((module.training, digest))

        built.register_forward_pre_hook(record)
        return built

    return Parts(name=name, model=model, optimizer=parts.optimizer)


@pytest.fixture(scope="module")
def watched(models, tmp_path_factory):
    """The run of each model, and the inputs it received."""
    out, found = tmp_path_factory.mktemp("watched"), {}
    for name, parts in {"vitral": Parts(), **by_name(models)}.items():
        seen = []
        words = [*TRAINED.split(), "--out", str(out / name)]
        found[name] = (train("digits", *words, parts=watching(parts, name, seen)), seen)
    return found


def test_all_contestants_see_the_same_batches(watched):
    found = {name: seen for name, (_, seen) in watched.items()}
    assert found["vitral"] == found["timm"] == found["timm-rope"]
    seen = found["vitral"]
    # Micro-batches of 64, and validation of 256 and 104 images with raw and averaged weights.
    assert len({digest for training, digest in seen if training}) == 4 * STEPS
    assert sum(not training for training, _ in seen) == 4


@pytest.mark.parametrize("name", ["timm", "timm-rope"])
def test_an_interrupted_run_resumes_exactly(models, watched, name, tmp_path):
    parts = by_name(models)[name]
    count = 0

    class Interrupting(models.TimmGroups):
        def step(self, lr, loss):
            nonlocal count
            count += 1
            if count == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(lr, loss)

    def run(parts):
        train("digits", *TRAINED.split(), "--out", str(tmp_path / "resumed"), parts=parts)

    with pytest.raises(Interrupted):
        run(dataclasses.replace(parts, optimizer=Interrupting))
    assert newest(tmp_path / "resumed").step == 3
    run(parts)
    expected, resumed = newest(watched[name][0]), newest(tmp_path / "resumed")
    assert expected.step == resumed.step == STEPS
    assert expected.tensors.keys() == {"model", "ema", "optimizer"}
    for kind, tensors in expected.tensors.items():
        for key, value in tensors.items():
            assert torch.equal(value, resumed.tensors[kind][key]), (kind, key)


def newest(path):
    return checkpoint.latest(path / "checkpoints", pytest.fail)


COMMAND = [*TRAINED.split(), "--train.eval-every", "1"]


@pytest.fixture(scope="module")
def contest(program, tmp_path_factory):
    """Runs of two contestants, trained by the command."""
    out = tmp_path_factory.mktemp("contest")
    assert program.main(contest_of(out)) == 0
    return out


def contest_of(out, *options, words=()):
    return ["digits", str(out), "--peers", "timm", "--seeds", "0", *options, "--", *COMMAND, *words]


def logged(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_summary_matches_the_logs_and_the_models(contest, models):
    lines = (contest / "peer_accuracy.md").read_text(encoding="utf-8").splitlines()
    found = {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in lines if "|" in line}
    config = settings.load("digits", COMMAND).model
    builders = {
        "vitral": ("`digits`", ViT),
        "timm": ("`digits`, timm", by_name(models)["timm"].model),
    }
    tops = {}
    for name, (title, build) in builders.items():
        last = logged(contest / "runs" / f"{name}-seed0")[-1]
        tops[name] = 100 * last["ema_top1"]
        parameters = sum(p.numel() for p in build(config, 10).parameters())
        flops = count_flops(config, 10, training=True, build=build)
        expected = [title, f"{parameters:,}", f"{flops / 1e6:.2f}", "0", f"{STEPS * 256:,}"]
        expected += [f"**{tops[name]:.2f}**", f"{100 * last['val_top1']:.2f}"]
        assert found[f"| {title}"][:7] == expected
    assert found["| `digits`, timm"][7] == f"{tops['timm'] - tops['vitral']:+.2f}"
    assert found["| `digits`"][7] == ""
    assert "timm differs in the model, the decayed parameters." in lines
    assert "timm" in (contest / "peer_accuracy.svg").read_text(encoding="utf-8")


def test_finished_runs_are_not_repeated(contest, program):
    runs = [contest / "runs" / f"{name}-seed0" / "train.log" for name in ("vitral", "timm")]
    before = [run.read_text() for run in runs]
    assert program.main(contest_of(contest)) == 0
    assert [run.read_text() for run in runs] == before


def test_other_settings_are_rejected(contest, program, capsys):
    assert program.main(contest_of(contest, words=["--optim.lr", "0.5"])) == 2
    error = capsys.readouterr().err
    assert error.startswith("peer_accuracy: optim.lr:")
    assert error.count("\n") == 1


def test_runs_on_other_data_are_rejected(contest, program, tmp_path, capsys):
    out = Path(shutil.copytree(contest, tmp_path / "out"))
    for state in out.glob("runs/timm-seed0/checkpoints/*/state.json"):
        state.write_text(json.dumps({**json.loads(state.read_text()), "fingerprint": "another"}))
    assert program.main(contest_of(out, "--summary")) == 2
    assert "timm-seed0: expected the data of the other runs of its seed" in capsys.readouterr().err


def test_rows_of_the_ledger(contest, program, models, tmp_path):
    assert program.main(contest_of(contest, "--ledger"), root=tmp_path) == 0
    folder = tmp_path / "docs" / "results"
    rows = {path.stem: json.loads(path.read_text()) for path in folder.iterdir()}
    assert rows.keys() == {"digits-vitral", "digits-timm"}
    row, config = rows["digits-timm"], settings.load("digits", COMMAND).model
    forward = count_flops(config, 10, training=True, build=by_name(models)["timm"].model)
    assert row["runs"][0]["flops"] == pytest.approx(3 * forward * STEPS * 256)
    assert row["study"] == "control"
    assert row["command"].startswith("python benchmarks/variants.py timm digits ")
    assert rows["digits-vitral"]["command"].startswith("vitral train digits ")


def test_dry_run_lists_sizes_and_differences_and_writes_nothing(program, tmp_path, capsys):
    words = ["digits", str(tmp_path / "out"), "--seeds", "3", "--dry-run"]
    words += ["--peers", "timm-own", "timm-rope", "--", "--train.batch-size", "256"]
    assert program.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == [
        "vitral-seed3",
        "timm-own-seed3",
        "timm-rope-seed3",
    ]
    assert lines[1].split()[1:3] == ["0.203", "M"]
    assert lines[3:] == [
        "timm-own differs in the model, the decayed parameters, optim.lr 0.0005, "
        "optim.betas 0.9 0.999, optim.weight-decay 0.05, optim.clip-norm 0.0",
        "timm-rope differs in the model, the decayed parameters",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--train.progressive 4 0.5 8 0.5", "train.progressive: expected none"),
        ("--train.init runs/none", "runs/none: no such directory"),
    ],
)
def test_settings_that_timm_does_not_support_are_rejected(
    program, tmp_path, capsys, words, message
):
    assert program.main(["digits", str(tmp_path / "out"), "--dry-run", "--", *words.split()]) == 2
    assert message in capsys.readouterr().err


SOURCE = "timm:test_vit"
DEPTH = 2


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The import of a small random timm model with LayerScale, and timm's file next to it."""
    from timm.models import _registry as registry

    original = registry._model_entrypoints["test_vit"]

    def small(**options):
        return original(depth=DEPTH, init_values=1.0, **options)

    place = tmp_path_factory.mktemp("imported") / "weights"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._model_entrypoints, "test_vit", small)
        torch.manual_seed(0)
        model = timm.create_model("test_vit", num_classes=0)
        for parameter in model.parameters():
            parameter.data += (0.05 if parameter.ndim > 1 else 0.3) * torch.randn_like(parameter)
        file = place.with_name("weights.safetensors")
        save_file(model.state_dict(), file)
        public.write("test_vit", public.create("test_vit", str(file)), place)
        yield place


def started(imported, name, image_size=64):
    """A contestant at the start of training, at another image size than that of its weights."""
    import variants

    words = ["--train.init", str(imported), "--model.image-size", str(image_size)]
    config, parts = weights.load_settings("imagenet-finetune", words).model, variants.find(name)
    assert config.layer_scale > 0
    model = parts.model(dataclasses.replace(config, stochastic_depth=0.0), 5)
    new = parts.initialize(model, str(imported), tuple("abcde"))
    assert sorted(new) == ["head.bias", "head.weight"]
    assert not any(p.any() for p in model.head.parameters())
    torch.manual_seed(3)
    torch.nn.init.normal_(model.head.weight)
    return model


def test_imported_contestants_compute_the_same(program, imported):
    """vitral's import, the one with LayerScale folded, and timm's model with timm's weights."""
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    own, reference, folded = (started(imported, name) for name in ("", SOURCE, "folded"))
    expected = reference(images)
    for model in (own, folded):
        error = (model(images) - expected).abs().max() / expected.square().mean().sqrt()
        assert error < 1e-5
    assert type(reference).__module__ == "timm.models.vision_transformer"
    scales = [name for name in own.state_dict() if name.endswith("residual.scale")]
    assert len(scales) == 2 * DEPTH
    assert own.state_dict().keys() - folded.state_dict().keys() == {*scales}


TUNED = "--model.image-size 64 --model.stochastic-depth 0 --train.epochs 1 --train.batch-size 8 "
TUNED += "--train.threads 1 --train.ema-decay 0 --train.log-every 1 "
TUNED += "--optim.lr 0.01 --optim.weight-decay 0"


@pytest.fixture(scope="module")
def tuning(program, imported, image_folder, tmp_path_factory):
    """Fine-tuning runs of all contestants for imported weights, trained by the command."""
    out = tmp_path_factory.mktemp("tuning")
    words = ["imagenet-finetune", str(out), "--seeds", "0", "--data", str(image_folder)]
    assert program.main([*words, "--", "--train.init", str(imported), *TUNED.split()]) == 0
    return out


def test_fine_tuning_starts_with_equal_losses(tuning):
    """In the first step only the head of zeros has a gradient, so the first two losses agree."""
    losses = {
        name: [row["loss"] for row in logged(tuning / "runs" / f"{name}-seed0")]
        for name in ("vitral", "timm", "folded")
    }
    assert losses["vitral"][0] == pytest.approx(math.log(2), rel=1e-6)
    assert abs(losses["vitral"][1] - losses["vitral"][0]) > 1e-3
    for name in ("timm", "folded"):
        assert losses[name][:2] == pytest.approx(losses["vitral"][:2], rel=1e-5)
        assert losses[name][-1] != losses["vitral"][-1]


def test_rows_of_fine_tuning(tuning, program, tmp_path):
    words = ["imagenet-finetune", str(tuning), "--seeds", "0", "--ledger"]
    assert program.main(words, root=tmp_path) == 0
    folder = tmp_path / "docs" / "results"
    rows = {path.stem: json.loads(path.read_text()) for path in folder.iterdir()}
    assert rows.keys() == {"finetune-vitral", "finetune-timm", "finetune-folded"}
    assert {row["study"] for row in rows.values()} == {"finetune"}
    assert f"variants.py {SOURCE} imagenet-finetune" in rows["finetune-timm"]["command"]
    page = (tuning / "peer_accuracy.md").read_text(encoding="utf-8")
    assert "timm differs in the model, the decayed parameters.\n" in page
    assert "folded differs in LayerScale.\n" in page


def test_peers_must_match_the_initial_weights(program, contest, imported, tmp_path, capsys):
    def message(*words):
        assert program.main(["imagenet-finetune", str(tmp_path / "out"), *words]) == 2
        return capsys.readouterr().err

    init = ["--dry-run", "--", "--train.init"]
    own = str(contest / "runs" / "vitral-seed0")
    assert "train.init: expected weights imported from timm" in message(*init, own)
    assert "timm, folded with train.init" in message("--peers", "timm-own", *init, str(imported))
    words = ["digits", str(tmp_path / "out"), "--peers", "folded", "--dry-run"]
    assert program.main(words) == 2
    assert "timm-rope-own without train.init, got folded" in capsys.readouterr().err


def test_missing_timm_is_a_user_error(program, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    assert program.main(["digits", str(tmp_path / "out"), "--dry-run"]) == 2
    assert capsys.readouterr().err == (
        "peer_accuracy: timm: expected it installed, got none; pip install timm\n"
    )
    assert not (tmp_path / "out").exists()
