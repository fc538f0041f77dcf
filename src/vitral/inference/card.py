"""Pushes weights to the Hugging Face Hub, with a model card and other files.

README.md           model card: front matter for the Hub, and text for readers
config.yaml         settings, as a recipe that reproduces the training run
curves.png          curves of the run, if the weights belong to one
and the files of the weight directory, without local paths.

The parts of the card are in one file because they are read together, like the card.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from vitral import hub, settings, storage
from vitral.config import Config, DataConfig
from vitral.data.imagenet import human_name, wnids
from vitral.errors import counted, printable
from vitral.files import expand
from vitral.model import count_flops
from vitral.rundir import CONFIG, CURVES, RunDir
from vitral.storage import MANIFEST
from vitral.weights import Description, Weights, save
from vitral.weights.public import PREFIX

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData


class DatasetSource(NamedTuple):
    """Title and Hub name of a dataset."""

    title: str
    hub: str | None = None
    """Name on the Hub."""


KNOWN_DATASETS = {
    "digits": DatasetSource("handwritten digits from scikit-learn"),
    "synthetic": DatasetSource("synthetic images"),
    "cifar10": DatasetSource("CIFAR-10", "uoft-cs/cifar10"),
    "cifar100": DatasetSource("CIFAR-100", "uoft-cs/cifar100"),
    "imagenette": DatasetSource("Imagenette", "frgfm/imagenette"),
}
HEADLINES = {"top1": "top-1", "map": "mAP"}
IMAGENET = DatasetSource("ImageNet-1K (ILSVRC2012)", "ILSVRC/imagenet-1k")


def push(weights: Weights, name: str, *, private: bool = False, license: str | None = None) -> str:
    """Pushes all files of a weight directory and a model card to the Hub, in one commit.

    Args:
        name: owner/name of the repository, which is created if it does not exist.
        private: whether to create a private repository; an existing public one is rejected.
        license: SPDX identifier of the license of the weights.

    Returns:
        The URL on the Hub.

    Raises:
        UserError: if the repository is not writable, or the Hub does not support the license.
    """
    description = _strip_paths(weights.description)
    files = weights.path.glob("*.safetensors")
    states = {file.stem: storage.read_tensors(weights.path, file.stem) for file in files}
    with TemporaryDirectory() as place:
        folder = Path(place) / "weights"
        save(folder, states, description)
        (folder / CONFIG).write_text(settings.dump(description.config), encoding="utf-8")
        (folder / "README.md").write_text(card(weights, name, license), encoding="utf-8")
        if curves := _curves(weights.path):
            shutil.copy(curves, folder)
        return hub.upload(name, folder, private=private, message=_message(description))


def card(weights: Weights, name: str, license: str | None = None) -> str:
    """Returns the README.md for weights named owner/name: YAML front matter and Markdown."""
    hub.client()  # raises an error if the package is missing
    license = license or weights.description.license or None
    description = _strip_paths(weights.description)
    source = _source(description)
    parts = [
        f"---\n{_card_data(description, source, name, license).to_yaml()}\n---",
        f"# {name.split('/')[1]}",
        _overview(weights),
        _usage(name, description.multi_label),
        _data(description, source),
        _training(description.config, name),
        _results(description, _curves(weights.path) is not None),
        _limitations(description),
        _license_terms(description, license),
    ]
    return "\n\n".join(parts) + "\n"


def _strip_paths(description: Description) -> Description:
    """Shortens absolute paths to their last component, so that no local paths are published."""

    def strip(path: str) -> str:
        if not expand(path).is_absolute():
            return path
        return f"./{Path(path).name}"  # ./ because a folder named cifar10 is not the known dataset

    config = description.config
    init = config.train.init and strip(config.train.init)
    data = dataclasses.replace(config.data, path=strip(config.data.path))
    table = strip(config.train.class_weights)
    train = dataclasses.replace(config.train, out=None, init=init, class_weights=table)
    return dataclasses.replace(
        description, config=dataclasses.replace(config, data=data, train=train)
    )


def _source(description: Description) -> DatasetSource:
    path = description.config.data.path
    if description.classes == wnids():
        return IMAGENET
    return KNOWN_DATASETS.get(path) or DatasetSource(printable(Path(path).name))


def _curves(directory: Path) -> Path | None:
    """Returns the curves of the run that weights belong to, if any."""
    run = RunDir.of_weights(directory)
    return run.curves if run is not None and run.curves.exists() else None


def _scores(description: Description, kind: str) -> dict[str, float]:
    """Returns the validation metrics of a file, such as loss and top1."""
    prefix = "val_" if kind == "model" else "ema_"
    found = description.metrics.items()
    return {key.removeprefix(prefix): value for key, value in found if key.startswith(prefix)}


def _message(description: Description) -> str:
    scores = _scores(description, description.default)
    found = (
        f", validation {HEADLINES[key]} {scores[key]:.2%}" for key in HEADLINES & scores.keys()
    )
    score = next(found, "")
    return f"Weights from vitral {description.vitral}{score}"


def _card_data(
    description: Description, source: DatasetSource, name: str, license: str | None
) -> ModelCardData:
    """Returns the metadata that the Hub reads from the card."""
    from huggingface_hub import EvalResult, ModelCardData

    init, scores = description.config.train.init or "", _scores(description, description.default)
    base = _hub_repository(description.source or init)
    names = {"top1": ("accuracy", "top-1 accuracy"), "top5": ("top_5_accuracy", "top-5 accuracy")}
    if description.multi_label:
        names = {"map": ("mean_average_precision", "mAP"), "f1": ("f1", "macro F1")}
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=source.hub or "imagefolder",
            dataset_name=source.title,
            dataset_split="train, held out" if description.config.data.hold_out else "validation",
            metric_type=kind,
            metric_name=title,
            metric_value=round(scores[key], 4),
        )
        for key, (kind, title) in names.items()
        if key in scores
    ]
    return ModelCardData(
        library_name="vitral",
        pipeline_tag="image-classification",
        tags=["image-classification", "vision-transformer", "vitral"],
        license=license and license.lower(),  # the Hub uses SPDX names in lower case
        datasets=[source.hub] if source.hub else None,
        base_model=base,
        metrics=[next(iter(names.values()))[0]] if results else None,
        model_name=name.split("/")[1],
        eval_results=results or None,
    )


def _hub_repository(name: str) -> str | None:
    """Returns the repository of hf-hub:owner/name or timm:NAME; None for a local path."""
    if name.startswith(hub.PREFIX):
        return name.removeprefix(hub.PREFIX).partition("@")[0]
    if name.startswith(PREFIX):
        return f"timm/{name.removeprefix(PREFIX).partition('@')[0]}"
    return None


def _overview(weights: Weights) -> str:
    config, classes = weights.description.config, len(weights.description.classes)
    model = config.model
    size, (dim, depth, num_heads, num_kv_heads) = model.image_size, model.shape
    flops = count_flops(model, classes)
    positions = ["learned positions"] if model.positions == "learned" else []
    positions += ["RoPE in x and y"] if model.rope != "none" else []
    heads = [f"{num_heads} query heads", f"{num_kv_heads} key/value heads"]
    rows = {
        "classes": classes,
        "parameters": f"{weights.model.num_parameters / 1e6:.3g} M",
        "compute": f"{flops / 1e9:.3g} GFLOPs per image; a multiply-add counts as two",
        "encoder": f"{depth} blocks of width {dim}",
        "attention": ", ".join([*heads, *positions]),
        "patches": f"{model.patch_size} by {model.patch_size} pixels",
        "head": f"reads the {'CLS token' if model.pooling == 'cls' else 'mean of the patches'}",
        "input": _preprocessing(config.data, size),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"A Vision Transformer for image classification.\n\n| | |\n|---|---|\n{table}"


def _preprocessing(data: DataConfig, size: int) -> str:
    mean, std = (", ".join(f"{x:g}" for x in values) for values in (data.mean, data.std))
    fraction = f"{100 * data.eval_crop:g}%"
    region = f"square whose side is {fraction} of the shorter side"
    if data.fit == "squash":
        region = f"rectangle whose sides are {fraction} of the image's sides"
    region = f"central {region}"
    if data.fit == "pad":
        region = f"entire image, padded to a square with the color {data.fill}"
    return (
        f"RGB; {region}, resized to {size} by {size} pixels ({data.interpolation}, "
        f"antialiased), scaled to [0, 1], and normalized with mean ({mean}) and standard deviation "
        f"({std})"
    )


def _usage(name: str, several: bool) -> str:
    first = "prediction.names[0], prediction.probabilities[0]"
    return f"""## Usage

Run `pip install '.[hub]'` in a checkout of vitral's source. Then:

```sh
vitral predict {hub.PREFIX}{name} photo.jpg
```

```python
import vitral

weights = vitral.load("{hub.PREFIX}{name}")
prediction = weights.predict("photo.jpg")[0]
print({"prediction.names, prediction.probabilities" if several else first})
```

To use the weights with timm, run `pip install '.[hub,timm]'` instead. Then:

```python
import timm
import vitral.timm

model = timm.create_model("vitral", weights="{hub.PREFIX}{name}").eval()
```

The files contain no pickles. Each file is verified against its SHA-256 checksum in `{MANIFEST}` \
before use."""


def _data(description: Description, source: DatasetSource) -> str:
    link = f" ([{source.hub}](https://huggingface.co/datasets/{source.hub}))" if source.hub else ""
    rows = []
    for position, name in enumerate(description.classes):
        human = human_name(name)
        rows.append(f"{position:>4}  {printable(name)}{f'  {human}' if human else ''}")
    listed = "\n".join(rows)
    return f"""## Data

Trained on {source.title}{link}; fingerprint `{description.fingerprint}`.

<details>
<summary>The {len(rows):,} classes, in the order of the logits</summary>

```text
{listed}
```

</details>"""


def _training(config: Config, name: str) -> str:
    train, known = config.train, config.data.path in KNOWN_DATASETS
    start = f"`{printable(train.init)}`" if train.init else "random weights"
    optimizer = {"adamw": "AdamW", "muon": "Muon"}[config.optim.name]
    if train.trainable == "head":
        how = f"A linear classifier fitted to the features of {start}, with seed {train.seed}"
    else:
        how = (
            f"Initialized from {start} and trained for {counted(train.epochs, 'epoch')} with "
            f"batch size {train.batch_size}, using {optimizer} with a peak "
            f"learning rate of {config.optim.lr:g}, a cosine schedule and seed {train.seed}"
        )
    return f"""## Training

{how}. `{CONFIG}` contains all settings and reproduces the training run:

```sh
hf download {name} {CONFIG} --local-dir .
vitral train {CONFIG}{"" if known else " --data PATH"} --out runs/again
```"""


def _results(description: Description, curves: bool) -> str:
    if description.multi_label:
        return _multi_label_results(description, curves)
    rows = []
    temperatures = []
    for kind in ("model", "ema"):
        scores = _scores(description, kind)
        if "temperature" in scores:
            temperatures.append(f"{scores['temperature']:.4g} for `{kind}.safetensors`")
        if "top1" in scores:
            what = "raw weights" if kind == "model" else "moving average of the weights"
            used = ", the default of `--which`" if kind == description.default else ""
            rows.append(
                f"| `{kind}.safetensors` | {what}{used} | {scores['top1']:.2%} | "
                f"{scores['top5']:.2%} | {scores['loss']:.4f} | {scores['ece']:.4f} |"
            )
    if not rows:
        return "## Results\n\nThe weights have not been evaluated."
    table = "\n".join(rows)
    picture = f"\n\n![Loss and accuracy during training]({CURVES})" if curves else ""
    calibration = ""
    if temperatures:
        calibration = (
            "\n\nThe calibration error is that of the logits. `vitral predict` calibrates the "
            f"probabilities: it divides the logits by {' and '.join(temperatures)}, fitted on the "
            "same images."
        )
    images = "the validation images of the dataset"
    if description.config.data.hold_out:
        images = "held-out training images of the dataset, not on validation or test images,"
    return f"""## Results

Evaluated on {images} at {description.config.model.image_size} pixels:

| file | | top-1 | top-5 | loss | calibration error |
|---|---|---|---|---|---|
{table}

The best weights of a run are selected on the same images, so their results are slightly \
optimistic.{calibration}\
{picture}"""


def _multi_label_results(description: Description, curves: bool) -> str:
    rows = []
    for kind in ("model", "ema"):
        if scores := _scores(description, kind):
            columns = ("map", "micro_ap", "f1", "micro_f1")
            values = " | ".join(f"{scores[key]:.2%}" for key in columns)
            used = ", the default of `--which`" if kind == description.default else ""
            rows.append(f"| `{kind}.safetensors`{used} | {values} | {scores['loss']:.4f} |")
    table = "\n".join(rows)
    picture = f"\n\n![Loss and average precision during training]({CURVES})" if curves else ""
    return f"""## Results

Evaluated on the validation images of the dataset at {description.config.model.image_size} pixels:

| file | mAP | micro average precision | macro F1 | micro F1 | loss |
|---|---|---|---|---|---|
{table}

The best weights of a run and the thresholds, which maximize the F1 of each class, are selected on \
the same images, so the results are slightly optimistic.{picture}"""


def _limitations(description: Description) -> str:
    image_sizes = {size for size, _ in description.config.train.progressive}
    trained_sizes = sorted(image_sizes | {description.config.model.image_size})
    patch = description.config.model.patch_size
    classes = f"{len(description.classes):,} classes"
    assigns = f"one of its {classes} to every image, even if none applies"
    if description.multi_label:
        assigns = f"any number of its {classes}: those whose probability reaches their threshold"
    return f"""## Limitations

* The model assigns {assigns}.
* It was trained at {", ".join(map(str, trained_sizes))} pixels and evaluated at \
{description.config.model.image_size}. It accepts any multiple of {patch}, but was not evaluated \
at other sizes.
* It was evaluated on images similar to its training images. It was not evaluated on images from \
other cameras, places or styles, or on corrupted or adversarial images, and it was not evaluated \
for fairness."""


def _license_terms(description: Description, license: str | None) -> str:
    stated = f"`{license.lower()}`." if license else "Not stated. Ask the owner before use."
    if set(description.classes) <= set(wnids()):
        stated += (
            "\n\nThe classes are from ImageNet, whose terms of access permit use of the images for "
            "non-commercial research and education only. Users must decide how these terms apply "
            "to the weights."
        )
    if description.source:
        stated += f"\n\nThe weights are from `{description.source}`, converted by vitral."
    return f"""## License

{stated}

## Version

Written by vitral {description.vitral}. This version and later versions with the same schema can \
read the weights."""
