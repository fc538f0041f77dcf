"""Draws the attention of a model to an image, and measures how meaningful it is.

NAME_explained.png   everything in one figure
NAME_rollout.png     attention rollout over the image
NAME_attention.png   attention of the token that the head reads, in one layer, over the image
NAME_layers.png      the same for every layer and head
NAME_patch.png       attention of a chosen patch to the others, over the image
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitral.data.augment import finish
from vitral.data.crops import eval_crop
from vitral.data.imagenet import display
from vitral.errors import UserError, printable, reason_of
from vitral.inference.attention import (
    Curve,
    attention_weights,
    deletion,
    insertion,
    position_similarity,
    read,
    rollout,
)
from vitral.inference.predict import resolve_image_size, to_pixels
from vitral.storage import replacing
from vitral.weights import Weights

Map = NDArray[np.float32]
Pixels = NDArray[np.uint8]

COLORMAP = "viridis"
ORDERS = 6  # random orders to compare a map with
SHOWN_HEADS = 16
SHOWN_CLASSES = 5
MAX_STEM = 200  # bytes; with _explained.png, within the limit of 255 for file names
MIN_PICTURE_SIZE = 512  # minimum side of an overlay, in pixels


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Explanation of a prediction for one image. Maps are (rows, columns) of patches."""

    pixels: Pixels
    """Input of the model, (H, W, 3)."""
    classes: tuple[str, ...]
    """Names of the most likely classes, most likely first."""
    probabilities: tuple[float, ...]
    """Probabilities of these classes."""
    reader: str
    """Token whose attention is shown: the CLS token or the mean patch."""
    rollout: Map
    """Contribution of each patch to this token through all layers, divided by the mean."""
    heads: Map
    """Attention of this token relative to uniform attention: (depth, Q, rows, columns)."""
    layer: int
    """Layer of `patch_attention` and `similarity`, counted from 0."""
    patch: tuple[int, int]
    """Row and column of the chosen patch, counted from 0."""
    patch_attention: Map
    """Attention of the chosen patch relative to uniform attention, averaged over the heads."""
    similarity: Map
    """Similarity of each patch to the chosen one by position alone, from -1 to 1."""
    deletion: Curve
    """Deletion curve of the most likely class, with patches in the order of the rollout."""
    insertion: Curve
    """Insertion curve in the same order."""
    random: tuple[Curve, ...]
    """Deletion curves in random orders."""

    @property
    def chance(self) -> tuple[float, float]:
        """Mean and standard deviation of the area under either curve over random orders."""
        areas = torch.tensor([curve.area for curve in self.random])
        return float(areas.mean()), float(areas.std())

    @property
    def summary(self) -> str:
        """One line with the prediction, and the areas for the rollout order and random orders."""
        mean, deviation = self.chance
        return (
            f"{self.classes[0]} {self.probabilities[0]:.1%}; rollout: deletion "
            f"{self.deletion.area:.3f}, insertion {self.insertion.area:.3f}, "
            f"random order {mean:.3f} ± {deviation:.3f}"
        )


def explain(
    weights: Weights,
    image: Tensor,
    *,
    layer: int | None = None,
    patch: tuple[int, int] | None = None,
    image_size: int | None = None,
) -> Explanation:
    """Computes the attention of a model to an image, and its relevance to the prediction.

    Args:
        weights: weights from `load`; everything is computed on the device of the model.
        image: uint8, (3, H, W), of any size; the model's input is the evaluation crop.
        layer: layer of the head and patch maps, counted from 0; None uses the last.
        patch: row and column, counted from 0; None uses the most attended patch in that layer.
        image_size: side length of the model's input, in pixels; None uses the training size.

    Raises:
        UserError: if the model does not support the layer, the patch or the image size.
    """
    model, config = weights.model, weights.description.config
    size = resolve_image_size(config.model, image_size)
    grid, last = size // config.model.patch_size, len(model.blocks) - 1
    layer = last if layer is None else layer
    if not 0 <= layer <= last:
        raise UserError(f"layer: expected 0 to {last}, got {layer}")
    if patch is not None and not all(0 <= place < grid for place in patch):
        got = " ".join(map(str, patch))
        raise UserError(f"patch: expected a row and a column, each 0 to {grid - 1}, got {got}")

    pixels = eval_crop(image, config.data, size)
    batch = finish(pixels[None], None, config.data.mean, config.data.std).to(model.device)
    logits, attention = attention_weights(model, batch)
    N = attention[0].shape[-1]
    heads = torch.cat([read(model, w) for w in attention]).unflatten(-1, (grid, grid))
    flow = read(model, rollout(attention))[0]
    if patch is None:
        where = int(heads[layer].mean(0).argmax())
        patch = where // grid, where % grid
    row = attention[layer][0, :, model.num_prefix + patch[0] * grid + patch[1], model.num_prefix :]
    similarity = position_similarity(model, layer, grid, grid, patch)
    probabilities = weights.description.probabilities
    best = probabilities(logits)[0].topk(min(SHOWN_CLASSES, model.num_classes))
    target, order = int(best.indices[0]), flow.argsort(descending=True, stable=True)
    generator = torch.Generator().manual_seed(0)
    shuffled = [torch.randperm(grid**2, generator=generator).to(flow.device) for _ in range(ORDERS)]
    return Explanation(
        pixels=pixels.permute(1, 2, 0).numpy(),
        classes=tuple(display(weights.description.classes[i]) for i in best.indices.tolist()),
        probabilities=tuple(best.values.tolist()),
        reader="CLS" if config.model.pooling == "cls" else "mean patch",
        rollout=_numpy(flow / flow.mean()).reshape(grid, grid),
        heads=_numpy(heads * N),
        layer=layer,
        patch=patch,
        patch_attention=_numpy(row.mean(0) * N).reshape(grid, grid),
        similarity=_numpy(similarity),
        deletion=deletion(model, batch[0], target, order, probabilities),
        insertion=insertion(model, batch[0], target, order, probabilities),
        random=tuple(
            deletion(model, batch[0], target, random_order, probabilities)
            for random_order in shuffled
        ),
    )


def _numpy(values: Tensor) -> Map:
    return values.float().cpu().numpy()


def explanations(
    weights: Weights, images: Sequence[str], **options: Any
) -> Iterator[tuple[str, Explanation | None]]:
    """Calls `explain` for image files; yields a name for the files of each, and the result.

    The names are those of the images without suffix, shortened if they are long and numbered if
    they are not unique. If a file cannot be read, the result is None and an error is printed.
    """
    used: set[str] = set()
    for image in images:
        stem = Path(image).stem
        while len(os.fsencode(stem)) > MAX_STEM:
            stem = stem[:-1]
        endings = (f"-{n}" if n > 1 else "" for n in count(1))
        name = next(stem + ending for ending in endings if stem + ending not in used)
        used.add(name)
        try:
            pixels = to_pixels(image)
        except (OSError, ValueError) as error:
            print(f"vitral: {printable(image)}: {reason_of(error)}", file=sys.stderr)
            yield name, None
            continue
        yield name, explain(weights, pixels, **options)


def save(explanation: Explanation, directory: Path, name: str) -> None:
    """Writes the images of an explanation, each atomically."""
    shown = explanation
    overlays = {
        "rollout": shown.rollout,
        "attention": shown.heads[shown.layer].mean(0),
        "patch": shown.patch_attention,
    }
    files = {"explained": _png(_figure(shown, printable(name))), "layers": _png(_layers(shown))}
    for what, values in overlays.items():
        box = io.BytesIO()
        Image.fromarray(_overlay(shown.pixels, values, _scale(values))).save(box, "png")
        files[what] = box.getvalue()
    for what, content in files.items():
        with replacing(directory / f"{name}_{what}.png") as file:
            file.write_bytes(content)


def _png(figure: Figure) -> bytes:
    box = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # as in Chinese names
        figure.savefig(box, format="png", dpi=100)
    return box.getvalue()


def _scale(values: Map) -> ScalarMappable:
    """Returns a color scale from the smallest value to the largest."""
    return ScalarMappable(Normalize(values.min(), values.max()), COLORMAP)


def _common_scale(heads: Map) -> ScalarMappable:
    """Returns a color scale from 0 to a high quantile: one sharp head would darken the others."""
    return ScalarMappable(Normalize(0, float(np.quantile(heads, 0.99))), COLORMAP)


def _overlay(pixels: Pixels, values: Map, scale: ScalarMappable) -> Pixels:
    """Draws a map in color over the image in gray, enlarged to at least MIN_PICTURE_SIZE."""
    factor = max(1, -(-MIN_PICTURE_SIZE // len(pixels)))
    large = pixels.repeat(factor, 0).repeat(factor, 1)
    gray = (large @ np.array([0.299, 0.587, 0.114]) / 255)[..., None]
    smooth = F.interpolate(
        torch.from_numpy(values)[None, None], large.shape[:2], mode="bilinear", align_corners=False
    )
    colors = scale.to_rgba(smooth[0, 0].numpy())[..., :3]
    return ((0.45 * gray + 0.55 * colors) * 255).round().astype(np.uint8)


def _figure(shown: Explanation, title: str) -> Figure:
    """Draws the input, prediction and curves, then the maps, then the heads of one layer."""
    num_heads = min(shown.heads.shape[1], SHOWN_HEADS)
    rows = -(-num_heads // 8)
    columns = max(-(-num_heads // rows), 4)
    below = 0.4 + rows * (0.2 + 11 / columns)
    figure = Figure(figsize=(12, 7 + below), layout=ConstrainedLayoutEngine(w_pad=0.1))
    short = title if len(title) <= 90 else f"{title[:89]}…"
    style: dict[str, Any] = {"x": 0.01, "ha": "left", "fontsize": 14, "fontweight": "bold"}
    figure.suptitle(short, parse_math=False, **style)
    top, middle, bottom = figure.subfigures(3, height_ratios=[3.5, 3.1, below], squeeze=False).flat
    input_axes, predicted, curves = top.subplots(1, 3, width_ratios=[1, 1, 2])
    _draw_input(input_axes, shown)
    _draw_prediction(predicted, shown)
    _draw_curves(curves, shown)
    _draw_maps(middle, shown)
    _draw_heads(bottom, shown, num_heads, rows, columns)
    return figure


def _bare(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _frame(axes: Axes, shown: Explanation, extent: float) -> None:
    """Draws a frame around the chosen patch of an image with sides of length `extent`."""
    size = extent / len(shown.rollout)
    corner = (shown.patch[1] * size - 0.5, shown.patch[0] * size - 0.5)
    for color, width in (("black", 3.5), ("white", 1.5)):
        frame = Rectangle(corner, size, size, fill=False, edgecolor=color, linewidth=width)
        frame.set_clip_on(False)
        axes.add_patch(frame)


def _draw_input(axes: Axes, shown: Explanation) -> None:
    size = len(shown.pixels)
    axes.imshow(shown.pixels, interpolation="nearest")
    _frame(axes, shown, size)
    row, column = shown.patch
    _bare(axes, f"input, {size} by {size} pixels\nframed: patch {row} {column}")


def _draw_prediction(axes: Axes, shown: Explanation) -> None:
    places = range(len(shown.classes))
    axes.barh(places, shown.probabilities, height=0.35, color="tab:blue")
    for place, name, value in zip(places, shown.classes, shown.probabilities, strict=True):
        short = name if len(name) <= 28 else f"{name[:27]}…"
        axes.text(
            0, place - 0.25, f"{value:.1%}  {short}", va="bottom", fontsize=9, parse_math=False
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(SHOWN_CLASSES - 0.5, -0.75)
    _bare(axes, "prediction")


def _draw_curves(axes: Axes, shown: Explanation) -> None:
    mean, deviation = shown.chance
    probabilities = torch.stack([curve.probabilities for curve in shown.random]).mean(0)
    fractions = shown.random[0].fractions
    chance = f"at random: {mean:.3f} ± {deviation:.3f}"
    for word, better, color, curve, seen in (
        ("deleted", "lower", "tab:blue", shown.deletion, fractions),
        ("inserted", "higher", "tab:orange", shown.insertion, 1 - fractions),
    ):
        label = f"{word}: {curve.area:.3f} ({better} is better)"
        axes.plot(*curve, color=color, linewidth=2, label=label)
        axes.plot(seen, probabilities, color=color, linestyle=":", label=f"{word} {chance}")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("fraction of patches deleted or inserted", fontsize=9)
    axes.set_ylabel("probability of the class", fontsize=9)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1),
        ncols=2,
        frameon=False,
        fontsize=8.5,
        title="Does the prediction depend on what the rollout shows? Areas under the curves:",
        alignment="left",
        title_fontsize=10,
    )


def _draw_maps(figure: SubFigure, shown: Explanation) -> None:
    layer, unit = shown.layer, "in multiples of uniform attention"
    maps = {
        "attention rollout\nin multiples of the mean": shown.rollout,
        f"{shown.reader} attention, layer {layer}\n{unit}": shown.heads[layer].mean(0),
        f"attention of the framed patch, layer {layer}\n{unit}": shown.patch_attention,
    }
    axes = figure.subplots(1, 4)
    for place, (title, values) in zip(axes, maps.items(), strict=False):
        scale = _scale(values)
        place.imshow(_overlay(shown.pixels, values, scale))
        figure.colorbar(scale, ax=place, fraction=0.046, pad=0.02)
        _bare(place, title)
    _frame(axes[2], shown, axes[2].get_xlim()[1] + 0.5)
    picture = axes[3].imshow(shown.similarity, cmap=COLORMAP, vmax=1)
    _frame(axes[3], shown, len(shown.similarity))
    figure.colorbar(picture, ax=axes[3], fraction=0.046, pad=0.02)
    _bare(axes[3], f"RoPE similarity to the framed patch, layer {layer}\nby position alone")


def _draw_heads(
    figure: SubFigure, shown: Explanation, num_heads: int, rows: int, columns: int
) -> None:
    heads = shown.heads[shown.layer, :num_heads]
    left = shown.heads.shape[1] - num_heads
    title = f"{shown.reader} attention of each head of layer {shown.layer}, in the same units"
    figure.suptitle(
        title + f" ({left} more not shown)" * (left > 0), x=0.01, ha="left", fontsize=10
    )
    places = figure.subplots(rows, columns, squeeze=False)
    scale = _common_scale(heads)
    for axes in places.flat:
        axes.set_axis_off()
    for number, axes in zip(range(num_heads), places.flat, strict=False):
        axes.imshow(_overlay(shown.pixels, heads[number], scale))
        axes.set_title(f"head {number}", loc="left", fontsize=10)
    figure.colorbar(scale, ax=places, extend="max", fraction=0.02, pad=0.01)


def _layers(shown: Explanation) -> Figure:
    """Draws all heads in one mosaic, with a row for each layer."""
    depth, num_heads, rows, columns = shown.heads.shape
    gap = ((0, 0), (0, 0), (0, 1), (0, 1))
    mosaic = np.pad(shown.heads, gap, constant_values=np.nan)
    mosaic = mosaic.transpose(0, 2, 1, 3).reshape(depth * (rows + 1), num_heads * (columns + 1))
    cell = min(1.5, 12 / num_heads)  # inches
    size = max(cell * num_heads, 6) + 1, cell * depth + 1
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    scale = _common_scale(shown.heads)
    axes.imshow(mosaic, cmap=COLORMAP, clim=scale.get_clim())
    _bare(axes, f"{shown.reader} attention by layer and head\nin multiples of uniform attention")
    across, down = range(num_heads), range(depth)
    axes.set_xticks([(i + 0.5) * (columns + 1) - 1 for i in across], [str(i) for i in across])
    axes.set_yticks([(i + 0.5) * (rows + 1) - 1 for i in down], [str(i) for i in down])
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    figure.colorbar(scale, ax=axes, extend="max", fraction=0.03, pad=0.02)
    return figure
