"""Tests of the model card: metadata for the Hub, and text for readers."""

import re
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import ModelCardData

from vitral import weights
from vitral.config import Config, DataConfig, OptimConfig, TrainConfig, ViTConfig
from vitral.data.imagenet import wnids
from vitral.inference.card import card
from vitral.model import ViT

SHAPE = ViTConfig(dim=16, depth=3, num_heads=4, num_kv_heads=2, patch_size=4, image_size=24)
MEASURED = {"step": 9, "val_top1": 0.5, "val_top5": 0.91234, "val_loss": 1.25, "val_ece": 0.125}
AVERAGED = {"ema_top1": 0.75, "ema_top5": 0.95, "ema_loss": 0.5, "ema_ece": 0.25}


@pytest.fixture
def make(tmp_path):
    """Makes weights of a run without files, because the card does not read any."""

    def make(
        path="digits", classes=("a", "b"), metrics=MEASURED, train=None, place=tmp_path, **data
    ):
        train = train or TrainConfig(epochs=7)
        config = Config(model=SHAPE, data=DataConfig(path=path, **data), train=train)
        description = weights.describe(config, classes, "f" * 64, metrics)
        return weights.Weights(ViT(SHAPE, len(classes)), description, place)

    return make


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def section(text, title):
    return re.search(rf"^## {title}\n\n(.+?)(?=\n## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def test_front_matter_describes_the_weights(make):
    text = card(make("cifar10", metrics={**MEASURED, **AVERAGED}), "anna/x", "Apache-2.0")
    assert front_matter(text) == {
        "library_name": "vitral",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "vision-transformer", "vitral"],
        "license": "apache-2.0",
        "datasets": ["uoft-cs/cifar10"],
        "metrics": ["accuracy"],
        "model-index": [
            {
                "name": "x",
                "results": [
                    {
                        "task": {"type": "image-classification", "name": "Image classification"},
                        "dataset": {
                            "type": "uoft-cs/cifar10",
                            "name": "CIFAR-10",
                            "split": "validation",
                        },
                        "metrics": [
                            {"type": "accuracy", "name": "top-1 accuracy", "value": 0.75},
                            {"type": "top_5_accuracy", "name": "top-5 accuracy", "value": 0.95},
                        ],
                    }
                ],
            }
        ],
    }


@pytest.mark.parametrize("path", ["digits", "cifar100", "/home/anna/it's: a #1 'set'\n"])
def test_huggingface_hub_can_parse_the_card(make, path):
    data = ModelCard(card(make(path), "anna/x", "MIT")).data
    assert isinstance(data, ModelCardData)
    top1, top5 = data.eval_results
    assert (data.model_name, data.license) == ("x", "mit")
    assert (top1.task_type, top1.metric_type, top1.metric_value) == (
        "image-classification",
        "accuracy",
        0.5,
    )
    assert (top5.metric_value, top5.dataset_split) == (0.9123, "validation")


def test_held_out_images_are_not_called_a_validation_split(make):
    text, usual = (card(make("cifar10", hold_out=held), "anna/x", "MIT") for held in (True, False))
    (result,) = front_matter(text)["model-index"][0]["results"]
    assert result["dataset"]["split"] == "train, held out"
    assert "on held-out training images of the dataset, not on" in section(text, "Results")
    assert "on the validation images of" in section(usual, "Results")


def test_model_table_states_size_and_compute(make):
    text = card(make(), "anna/x")
    hidden, heads = 4 * 16, (4 + 2 * 2) * 4
    block = 16 * heads + heads + 16 * 16 + 16 + 2 * 16 * hidden + hidden + 16 + 2 * 16
    count = (3 * 4 * 4 * 16 + 16) + 16 + 3 * block + 16 + (16 * 2 + 2)
    assert f"| parameters | {count / 1e6:.3g} M |" in text
    tokens = 1 + 6 * 6
    products = tokens * (16 * heads + 16 * 16 + 2 * 16 * hidden) + 2 * tokens**2 * 16
    flops = 2 * (36 * 3 * 4 * 4 * 16 + 3 * products + 16 * 2)
    assert f"| compute | {flops / 1e9:.3g} GFLOPs per image" in text
    assert "| encoder | 3 blocks of width 16 |" in text
    assert "| attention | 4 query heads, 2 key/value heads, RoPE in x and y |" in text


@pytest.mark.parametrize(
    ("fit", "region"),
    [
        ("crop", "central square whose side is 87.5% of the shorter side"),
        ("squash", "central rectangle whose sides are 87.5% of the image's sides"),
        ("pad", "entire image, padded to a square with the color (124, 116, 104)"),
    ],
)
def test_model_table_states_the_preprocessing(make, fit, region):
    text = card(make(fit=fit), "anna/x")
    assert f"RGB; {region}, resized to 24 by 24 pixels (bilinear, antialiased)" in text


def test_installation_is_from_source(make):
    """No package index hosts vitral."""
    usage = section(card(make("digits"), "anna/x", None), "Usage")
    assert re.findall(r"pip install '([^']*)'", usage) == [".[hub]", ".[hub,timm]"]
    assert usage.count("checkout of vitral's source") == 1


def test_results_state_the_temperatures(make):
    temperatures = {"val_temperature": 1.25, "ema_temperature": 0.5}
    both = section(card(make(metrics={**MEASURED, **AVERAGED, **temperatures}), "a/x"), "Results")
    assert "divides the logits by 1.25 for `model.safetensors` and 0.5 for `ema.saf" in both
    assert "divides" not in section(card(make(metrics={**MEASURED, **AVERAGED}), "a/x"), "Results")


def test_results_name_the_default(make):
    both = section(card(make(metrics={**MEASURED, **AVERAGED}), "anna/x"), "Results")
    raw, averaged = re.findall(r"^\| `.+", both, re.MULTILINE)
    assert raw == "| `model.safetensors` | raw weights | 50.00% | 91.23% | 1.2500 | 0.1250 |"
    assert averaged.startswith(
        "| `ema.safetensors` | moving average of the weights, the default of `--which` | 75.00% "
    )
    alone = section(card(make(), "anna/x"), "Results")
    assert "`model.safetensors` | raw weights, the default of `--which`" in alone
    assert "ema" not in alone
    none = card(make(metrics={}), "anna/x")
    assert section(none, "Results").strip() == "The weights have not been evaluated."
    assert "model-index" not in front_matter(none)
    assert "metrics" not in front_matter(none)


def test_curves_are_shown_for_weights_in_a_run(make, tmp_path):
    place = tmp_path / "weights" / "best"
    place.mkdir(parents=True)
    assert "curves.png" not in card(make(place=place), "anna/x")
    (tmp_path / "curves.png").touch()
    assert "](curves.png)" in card(make(place=place), "anna/x")
    assert "curves.png" not in card(make(place=tmp_path / "copies" / "best"), "anna/x")


def test_imagenet_classes_have_names_and_terms_of_access(make):
    text = card(make("/data/ilsvrc", wnids()), "anna/x", "MIT")
    assert front_matter(text)["datasets"] == ["ILSVRC/imagenet-1k"]
    assert "ImageNet-1K" in section(text, "Data")
    assert "\n   0  n01440764  tench, Tinca tinca\n" in text
    assert "\n 999  n15075141  toilet tissue, toilet paper, bathroom tissue\n" in text
    assert "terms of access" in section(text, "License")
    some = card(make("imagenette", wnids()[:10]), "anna/x")
    assert "terms of access" in section(some, "License")
    assert front_matter(some)["datasets"] == ["frgfm/imagenette"]
    assert "terms of access" not in card(make(classes=(*wnids(), "dark")), "anna/x")


def test_a_folder_named_like_a_known_set_is_not_that_set(make, tmp_path):
    (tmp_path / "cifar10").mkdir()
    text = card(make(str(tmp_path / "cifar10")), "anna/x")
    assert "datasets" not in front_matter(text)
    assert front_matter(text)["model-index"][0]["results"][0]["dataset"]["type"] == "imagefolder"
    assert str(tmp_path) not in text
    assert "Trained on cifar10;" in section(text, "Data")
    assert "vitral train config.yaml --data PATH --out" in section(text, "Training")
    known = section(card(make("cifar10"), "anna/x"), "Training")
    assert "vitral train config.yaml --out" in known


def test_class_names_do_not_break_lines(make):
    text = card(make(classes=("```", "a\nb", "</details>")), "anna/x")
    assert "   0  ```\n   1  a\\nb\n   2  </details>\n```\n" in text


def test_base_model_is_stated(make):
    base = TrainConfig(init="hf-hub:bo/base@v1")
    text = card(make(train=base), "anna/x")
    assert front_matter(text)["base_model"] == "bo/base"
    assert "Initialized from `hf-hub:bo/base@v1` and trained for" in section(text, "Training")
    local = card(make(train=TrainConfig(init="/home/anna/older")), "anna/x")
    assert "base_model" not in front_matter(local)
    assert "Initialized from `./older`" in section(local, "Training")
    assert "Initialized from random weights" in card(make(), "anna/x")


@pytest.mark.parametrize(("name", "called"), [("adamw", "AdamW"), ("muon", "Muon")])
def test_training_section_states_the_optimizer(make, name, called):
    known = make()
    config = replace(known.description.config, optim=OptimConfig(name=name, lr=3e-3))
    text = card(replace(known, description=replace(known.description, config=config)), "anna/x")
    expected = f"7 epochs with batch size 1024, using {called} with a peak learning rate of 0.003"
    assert expected in text


def test_training_section_of_a_probe_states_no_optimizer(make):
    text = card(make(train=TrainConfig(init="timm:x", trainable="head", seed=5)), "anna/x")
    expected = "A linear classifier fitted to the features of `timm:x`, with seed 5."
    assert expected in section(text, "Training")
    assert "AdamW" not in text


def test_model_table_states_the_positions(make):
    known = make()
    shape = replace(SHAPE, rope="none", positions="learned")
    config = replace(known.description.config, model=shape)
    text = card(replace(known, description=replace(known.description, config=config)), "anna/x")
    assert "| attention | 4 query heads, 2 key/value heads, learned positions |" in text


def test_limitations_list_every_training_size(make):
    train = TrainConfig(progressive=((16, 0.5), (20, 0.5)))
    limits = section(card(make(train=train), "anna/x"), "Limitations")
    assert (
        "trained at 16, 20, 24 pixels and evaluated at 24. It accepts any multiple of 4" in limits
    )
    assert "assigns one of its 2 classes" in limits


def test_no_license_is_claimed_by_default(make):
    text = card(make(), "anna/x")
    assert "license" not in front_matter(text)
    assert section(text, "License").startswith("Not stated")


def test_a_converted_model_names_its_source_and_license(make):
    found = make("digits")
    description = replace(found.description, source="timm:vit_x.y", license="cc-by-nc-4.0")
    text = card(weights.Weights(found.model, description, found.path), "anna/x")
    assert front_matter(text)["base_model"] == "timm/vit_x.y"
    assert front_matter(text)["license"] == "cc-by-nc-4.0"
    assert "converted by vitral" in section(text, "License")
    assert front_matter(card(found, "anna/x", "MIT"))["license"] == "mit"
    tuned = card(make(train=TrainConfig(init="timm:vit_x.y")), "anna/x")
    assert front_matter(tuned)["base_model"] == "timm/vit_x.y"
