"""Weights on the Hugging Face Hub: their card, and what is pushed with it.

README.md           the card: front matter for the Hub, and text for people
config.yaml         the settings, a recipe that repeats the training
curves.png          of the run, where the weights lie in one
and the weight directory, in which no path says where it was trained.
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
    """A dataset as people and the Hub know it."""

    title: str
    hub: str | None = None
    """Its name on the Hub."""


KNOWN_DATASETS = {
    "digits": DatasetSource("handwritten digits, as scikit-learn has them"),
    "synthetic": DatasetSource("synthetic images"),
    "cifar10": DatasetSource("CIFAR-10", "uoft-cs/cifar10"),
    "cifar100": DatasetSource("CIFAR-100", "uoft-cs/cifar100"),
    "imagenette": DatasetSource("Imagenette", "frgfm/imagenette"),
}
IMAGENET = DatasetSource("ImageNet-1K (ILSVRC2012)", "ILSVRC/imagenet-1k")


def push(weights: Weights, name: str, *, private: bool = False, license: str | None = None) -> str:
    """Pushes all files of a weight directory to the Hub, with their card, in one commit.

    Args:
        name: owner/name; made if there is none.
        private: make it private; one that is public already is refused.
        license: of the weights, as SPDX names it.

    Returns:
        The address on the Hub.

    Raises:
        UserError: if it may not be written, or the Hub does not know the license.
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
    """The README.md of weights that are called owner/name: Markdown behind YAML front matter."""
    hub.client()  # raises an error if the package is missing
    license = license or weights.description.license or None
    description = _strip_paths(weights.description)
    source = _source(description)
    parts = [
        f"---\n{_card_data(description, source, name, license).to_yaml()}\n---",
        f"# {name.split('/')[1]}",
        _overview(weights),
        _usage(name),
        _data(description, source),
        _training(description.config, name),
        _results(description, _curves(weights.path) is not None),
        _limitations(description),
        _license_terms(description, license),
    ]
    return "\n\n".join(parts) + "\n"


def _strip_paths(description: Description) -> Description:
    """Absolute paths cut to their last name: what is pushed tells nobody how a disk is laid out."""

    def strip(path: str) -> str:
        if not expand(path).is_absolute():
            return path
        return f"./{Path(path).name}"  # with ./, as a folder called cifar10 is not the set

    config = description.config
    init = config.train.init and strip(config.train.init)
    data = dataclasses.replace(config.data, path=strip(config.data.path))
    train = dataclasses.replace(config.train, out=None, init=init)
    return dataclasses.replace(
        description, config=dataclasses.replace(config, data=data, train=train)
    )


def _source(description: Description) -> DatasetSource:
    path = description.config.data.path
    if description.classes == wnids():
        return IMAGENET
    return KNOWN_DATASETS.get(path) or DatasetSource(printable(Path(path).name))


def _curves(directory: Path) -> Path | None:
    """The picture of the run that weights lie in."""
    run = RunDir.of_weights(directory)
    return run.curves if run is not None and run.curves.exists() else None


def _scores(description: Description, kind: str) -> dict[str, float]:
    """What validation measured of a file: loss, top1, top5 and ece."""
    prefix = "val_" if kind == "model" else "ema_"
    found = description.metrics.items()
    return {key.removeprefix(prefix): value for key, value in found if key.startswith(prefix)}


def _message(description: Description) -> str:
    top1 = _scores(description, description.default).get("top1")
    score = "" if top1 is None else f", top-1 {top1:.2%} in validation"
    return f"Weights of vitral {description.vitral}{score}"


def _card_data(
    description: Description, source: DatasetSource, name: str, license: str | None
) -> ModelCardData:
    """What the Hub reads of the card."""
    from huggingface_hub import EvalResult, ModelCardData

    init, scores = description.config.train.init or "", _scores(description, description.default)
    base = _hub_repository(description.source or init)
    names = {"top1": ("accuracy", "top-1 accuracy"), "top5": ("top_5_accuracy", "top-5 accuracy")}
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
        if "top1" in scores
    ]
    return ModelCardData(
        library_name="vitral",
        pipeline_tag="image-classification",
        tags=["image-classification", "vision-transformer", "vitral"],
        license=license and license.lower(),  # the Hub uses SPDX names in lower case
        datasets=[source.hub] if source.hub else None,
        base_model=base,
        metrics=["accuracy"] if results else None,
        model_name=name.split("/")[1],
        eval_results=results or None,
    )


def _hub_repository(name: str) -> str | None:
    """The repository of hf-hub:owner/name or timm:NAME; None for a local path."""
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
    rows = {
        "classes": classes,
        "parameters": f"{weights.model.num_parameters / 1e6:.3g} M",
        "compute": f"{flops / 1e9:.3g} GFLOPs an image; a multiply-add counts as two",
        "encoder": f"{depth} blocks of width {dim}",
        "attention": f"{num_heads} query heads, {num_kv_heads} key/value heads, RoPE in x and y",
        "patches": f"{model.patch_size} by {model.patch_size} pixels",
        "head": f"reads the {'CLS token' if model.pooling == 'cls' else 'mean of the patches'}",
        "images": _preprocessing(config.data, size),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"A Vision Transformer that classifies images.\n\n| | |\n|---|---|\n{table}"


def _preprocessing(data: DataConfig, size: int) -> str:
    mean, std = (", ".join(f"{x:g}" for x in values) for values in (data.mean, data.std))
    return (
        f"RGB; the central square of {100 * data.eval_crop:g}% of the short side, resized to "
        f"{size} by {size} pixels ({data.interpolation}, antialiased), scaled to 0 to 1, less "
        f"({mean}), over ({std})"
    )


def _usage(name: str) -> str:
    return f"""## How to use it

`pip install '.[hub]'` in a checkout of vitral's source installs it. Then:

```sh
vitral predict {hub.PREFIX}{name} photo.jpg
```

```python
import vitral

weights = vitral.load("{hub.PREFIX}{name}")
prediction = weights.predict("photo.jpg")[0]
print(prediction.names[0], prediction.probabilities[0])
```

With timm, after `pip install '.[hub,timm]'` there:

```python
import timm
import vitral.timm

model = timm.create_model("vitral", weights="{hub.PREFIX}{name}").eval()
```

No file is a pickle, and each is compared with its SHA-256 in `{MANIFEST}` before it is used."""


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
    start = f"began from `{printable(train.init)}`" if train.init else "began from random weights"
    optimizer = {"adamw": "AdamW", "muon": "Muon"}[config.optim.name]
    epochs = counted(train.epochs, "epoch")
    return f"""## Training

{epochs} of batches of {train.batch_size}, {optimizer} with a peak learning rate of \
{config.optim.lr:g} and a cosine schedule, seed {train.seed}; it {start}. All settings are in \
`{CONFIG}`, which repeats it:

```sh
hf download {name} {CONFIG} --local-dir .
vitral train {CONFIG}{"" if known else " --data PATH"} --out runs/again
```"""


def _results(description: Description, curves: bool) -> str:
    rows = []
    for kind in ("model", "ema"):
        scores = _scores(description, kind)
        if "top1" in scores:
            what = "weights as trained" if kind == "model" else "their moving average"
            used = ", used unless `--which` says otherwise" if kind == description.default else ""
            rows.append(
                f"| `{kind}.safetensors` | {what}{used} | {scores['top1']:.2%} | "
                f"{scores['top5']:.2%} | {scores['loss']:.4f} | {scores['ece']:.4f} |"
            )
    if not rows:
        return "## Results\n\nNothing has been measured."
    table = "\n".join(rows)
    picture = f"\n\n![Loss and accuracy over the training]({CURVES})" if curves else ""
    images = "the validation images"
    if description.config.data.hold_out:
        images = "training images that were held out, not the validation or test images,"
    return f"""## Results

On {images} of the same set, at {description.config.model.image_size} pixels:

| file | | top-1 | top-5 | loss | calibration error |
|---|---|---|---|---|---|
{table}

Weights that a run kept as its best were chosen by these very images, which flatters them a little.\
{picture}"""


def _limitations(description: Description) -> str:
    image_sizes = {size for size, _ in description.config.train.progressive}
    trained_sizes = sorted(image_sizes | {description.config.model.image_size})
    patch = description.config.model.patch_size
    return f"""## Limits

* It knows its {len(description.classes):,} classes alone, and gives one of them to every image.
* It was trained at {", ".join(map(str, trained_sizes))} pixels and measured at \
{description.config.model.image_size}. It takes any multiple of {patch}, of which nothing is known.
* It was measured on images like those it was trained on; not on other cameras, places or styles, \
on corrupted or adversarial images, or for its fairness to people in them."""


def _license_terms(description: Description, license: str | None) -> str:
    stated = f"`{license.lower()}`." if license else "None is stated: ask the owner before use."
    if set(description.classes) <= set(wnids()):
        stated += (
            "\n\nThe classes are ImageNet's. Its terms of access allow the images for research and "
            "education without commerce alone; what follows for weights is for their user to judge."
        )
    if description.source:
        stated += f"\n\nThe weights are those of `{description.source}`, converted by vitral."
    return f"""## License

{stated}

## Version

Written by vitral {description.vitral}, which reads them, as do later ones of the same schema."""
