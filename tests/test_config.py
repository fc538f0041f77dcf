"""Every constraint on the settings, and the error messages."""

import dataclasses
import json
import math
import re

import pytest

from vitral.config import (
    CHANGEABLE,
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

SECTIONS = [ViTConfig, DataConfig, AugmentConfig, OptimConfig, TrainConfig]
NAN = float("nan")

# Section, field, rejected values.
REJECTED = [
    *[(ViTConfig, name, (0, -1)) for name in ("dim", "depth", "num_heads", "num_kv_heads")],
    *[(ViTConfig, name, (0, -16)) for name in ("patch_size", "image_size")],
    *[(ViTConfig, name, (0.0, -1.0, NAN)) for name in ("mlp_ratio", "rope_theta")],
    (ViTConfig, "num_registers", (-1,)),
    (ViTConfig, "layer_scale", (-0.1, NAN)),
    *[(ViTConfig, name, (-0.1, 1.0, NAN)) for name in ("dropout", "stochastic_depth")],
    (DataConfig, "path", ("",)),
    (DataConfig, "val_fraction", (0.0, 1.0, -0.1, NAN)),
    (DataConfig, "workers", (-1,)),
    (DataConfig, "eval_crop", (0.0, 1.1, NAN)),
    (DataConfig, "std", ((0.2, 0.0, 0.2), (0.2, 0.2, -0.2))),
    (AugmentConfig, "crop_scale", ((0.0, 1.0), (0.5, 0.2), (0.5, 1.1), (NAN, 1.0))),
    (AugmentConfig, "crop_ratio", ((0.0, 1.0), (2.0, 1.0))),
    *[(AugmentConfig, name, (-0.1, 1.1, NAN)) for name in ("flip", "erasing", "mix_until")],
    *[(AugmentConfig, name, (-1,)) for name in ("crop_padding", "randaugment_ops")],
    *[(AugmentConfig, name, (-0.1, NAN)) for name in ("rotation", "shift", "mixup", "cutmix")],
    *[(AugmentConfig, name, (-0.1, NAN)) for name in ("brightness", "contrast", "saturation")],
    (AugmentConfig, "zoom", (-0.1, 1.0)),
    (AugmentConfig, "shear", (-0.1, 90.0)),
    (AugmentConfig, "hue", (-0.1, 0.51)),
    (AugmentConfig, "randaugment_magnitude", (-1, 31)),
    (AugmentConfig, "repeats", (0, -1)),
    *[(OptimConfig, name, (0.0, -1.0, NAN)) for name in ("lr", "eps")],
    *[(OptimConfig, n, (-1.0, NAN)) for n in ("weight_decay", "warmup_epochs", "clip_norm")],
    (OptimConfig, "betas", ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, NAN))),
    (OptimConfig, "final_lr", (-0.1, 1.1)),
    (OptimConfig, "layer_decay", (0.0, 1.1)),
    (TrainConfig, "seed", (-1,)),
    *[(TrainConfig, name, (0, -1)) for name in ("epochs", "batch_size", "eval_every")],
    *[(TrainConfig, name, (0, -1)) for name in ("log_every", "checkpoint_minutes")],
    *[(TrainConfig, name, (0, -1)) for name in ("micro_batch", "threads", "checkpoint_steps")],
    *[(TrainConfig, name, (-0.1, 1.0, NAN)) for name in ("label_smoothing", "ema_decay")],
    (TrainConfig, "logit_adjustment", (-0.1, NAN, math.inf)),
    (TrainConfig, "class_weights", ("", "balance", "weights.txt")),
    *[(TrainConfig, name, (3, 7)) for name in ("batch_size", "micro_batch")],
]

# Values at the limits of the accepted ranges.
ACCEPTED = [
    (
        ViTConfig,
        {"num_registers": 0, "layer_scale": 1e-6, "dropout": 0.0, "stochastic_depth": 0.99},
    ),
    (ViTConfig, {"dim": 4, "num_heads": 1, "num_kv_heads": 1, "depth": 1}),
    (ViTConfig, {"num_heads": 12, "num_kv_heads": 12}),
    (ViTConfig, {"patch_size": 1, "image_size": 1}),
    (DataConfig, {"val_fraction": 0.5, "workers": 0, "eval_crop": 1.0, "mean": (0.0, 0.0, 0.0)}),
    (AugmentConfig, {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 1.0}),
    (AugmentConfig, {"erasing": 1.0, "mix_until": 0.0, "hue": 0.5, "shear": 89.0, "zoom": 0.99}),
    (AugmentConfig, {"randaugment_magnitude": 30, "randaugment_ops": 0, "crop_padding": 0}),
    (OptimConfig, {"betas": (0.0, 0.0), "final_lr": 1.0, "layer_decay": 1.0, "clip_norm": 0.0}),
    (OptimConfig, {"weight_decay": 0.0, "warmup_epochs": 0.0}),
    (TrainConfig, {"batch_size": 2, "micro_batch": 2, "epochs": 1, "threads": 1}),
]


def check_error(make, *parts):
    """Checks that `make` fails with a one-line message that contains `parts`, and returns it."""
    with pytest.raises(UserError) as error:
        make()
    message = str(error.value)
    assert re.fullmatch(r"[\w.]+: expected .+, got .+", message), message
    for part in parts:
        assert part in message, message
    return message


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [(section, name, value) for section, name, values in REJECTED for value in values],
)
def test_invalid_values_are_rejected(section, name, value):
    # the message has either the pair or its invalid bound
    got = next((part for part in value if part > 1), "") if isinstance(value, tuple) else value
    message = check_error(lambda: section(**{name: value}), str(got) if got else "")
    assert message.startswith(f"{name}: ")


@pytest.mark.parametrize(("section", "fields"), ACCEPTED)
def test_values_at_the_limits_are_accepted(section, fields):
    section(**fields)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"num_heads": 6, "num_kv_heads": 4}, ("num_heads: ", "multiple of num_kv_heads 4", "6")),
        ({"num_heads": 2, "num_kv_heads": 4, "dim": 32}, ("num_heads: ", "num_kv_heads 4", "2")),
        ({"dim": 100}, ("dim: ", "num_heads 6", "got 100")),
        ({"dim": 60}, ("dim: ", "multiple of four", "got 60", "head size 10")),
        ({"dim": 12, "num_heads": 6, "num_kv_heads": 6}, ("dim: ", "head size 2")),
        ({"image_size": 230}, ("image_size: ", "patch_size 16", "got 230", "nearest is 224")),
        ({"image_size": 239}, ("image_size: ", "nearest is 240")),
        ({"image_size": 5, "patch_size": 14}, ("image_size: ", "nearest is 14")),
    ],
)
def test_inconsistent_shapes_are_rejected(fields, parts):
    message = check_error(lambda: ViTConfig(**fields), *parts)
    assert message.startswith(parts[0])


@pytest.mark.parametrize("section", [*SECTIONS, Config])
def test_frozen_and_keyword_only(section):
    first = dataclasses.fields(section)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(section(), first, None)
    with pytest.raises(TypeError):
        section(getattr(section(), first))
    assert section() == section()
    assert hash(section()) == hash(section())


def test_explicit_shape_overrides_the_preset():
    assert ViTConfig(size="b").shape == (768, 12, 12, 4)
    assert ViTConfig(size="b", depth=3, num_kv_heads=6).shape == (768, 3, 12, 6)
    assert ViTConfig(size="ti", dim=96, num_heads=2, num_kv_heads=2).shape == (96, 12, 2, 2)


@pytest.mark.parametrize(("mixup", "cutmix", "mixes"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)])
def test_mixes_if_mixup_or_cutmix_is_enabled(mixup, cutmix, mixes):
    assert AugmentConfig(mixup=mixup, cutmix=cutmix).mixes == bool(mixes)


def test_corrections_for_rare_classes_are_not_combined():
    balanced, sqrt = DataConfig(sampling="balanced"), DataConfig(sampling="sqrt")
    adjusted, weighted = TrainConfig(logit_adjustment=0.5), TrainConfig(class_weights="effective")
    for data, train in ((sqrt, adjusted), (balanced, weighted)):
        check_error(
            lambda d=data, t=train: Config(data=d, train=t), f"data.sampling {data.sampling}"
        )
    both = dataclasses.replace(adjusted, class_weights="balanced")
    check_error(lambda: Config(train=both), "balanced and train.logit_adjustment 0.5")
    check_error(lambda: dataclasses.replace(adjusted, loss="bce"), "with loss bce, got 0.5")
    Config(data=balanced, train=TrainConfig(class_weights="costs.yaml"))


def test_batch_size_is_a_multiple_of_twice_the_repeats():
    repeats = AugmentConfig(repeats=2)
    Config(augment=repeats, train=TrainConfig(batch_size=8))
    train = TrainConfig(batch_size=6)
    message = check_error(lambda: Config(augment=repeats, train=train), "repeats 2", "got 6")
    assert message.startswith("train.batch_size: ")


def test_warmup_is_shorter_than_training():
    optim = OptimConfig(warmup_epochs=3)
    Config(optim=optim, train=TrainConfig(epochs=4))
    for epochs in (3, 2):
        train = TrainConfig(epochs=epochs)
        message = check_error(
            lambda train=train: Config(optim=optim, train=train), f"epochs {epochs}", "got 3"
        )
        assert message.startswith("optim.warmup_epochs: ")
        Config(optim=OptimConfig(warmup_epochs=0), train=train)


def test_flat_settings():
    config = Config(
        model=ViTConfig(size="l", qk_norm=True),
        optim=OptimConfig(betas=(0.8, 0.95)),
        train=TrainConfig(out=None, batch_size=64),
    )
    flat = flatten(config)
    assert flat["model.size"] == "l"
    assert flat["model.dim"] is None  # not the preset's
    assert flat["model.qk_norm"] is True
    assert flat["optim.betas"] == (0.8, 0.95)
    assert flat["train.batch_size"] == 64
    assert [key.split(".")[0] for key in flat] == [
        name
        for name, section in zip(
            ("model", "data", "augment", "optim", "train"), SECTIONS, strict=True
        )
        for _ in dataclasses.fields(section)
    ]
    assert flat.keys() >= CHANGEABLE
    different = flatten(Config())
    assert {key for key in flat if flat[key] != different[key]} == {
        "model.size",
        "model.qk_norm",
        "optim.betas",
        "train.batch_size",
    }


def test_image_sizes_at_fractions_of_the_steps():
    sizes = ((96, 0.5), (160, 0.25), (224, 0.25))
    config = Config(train=TrainConfig(progressive=sizes))
    found = [config.image_size_at(step / 8) for step in range(8)]
    assert found == [96, 96, 96, 96, 160, 160, 224, 224]
    assert config.image_size_at(1.0) == 224
    assert Config().image_size_at(0.3) == 224
    assert convert_json(Config, json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (((96, 0.5),), "add up to 1, got 0.5"),
        (((96, 1.5), (224, -0.5)), "above 0, got 224 and -0.5"),
        (((100, 1.0),), "multiples of model.patch_size 16, got 100"),
    ],
)
def test_progressive_errors(sizes, message):
    with pytest.raises(UserError, match=message):
        Config(train=TrainConfig(progressive=sizes))
