"""Writes report.html: a self-contained page about a run, or a comparison of several runs."""

from __future__ import annotations

import io
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from vitral.config import Config, flatten
from vitral.data.imagenet import short_name
from vitral.errors import counted, printable
from vitral.evaluation import Results, Scores
from vitral.evaluation.confusion import draw
from vitral.evaluation.label_errors import LabelErrors
from vitral.evaluation.metrics import ClassMetrics
from vitral.evaluation.multilabel import MultiLabelScores
from vitral.evaluation.output import TITLES, headline_rows, shown
from vitral.files import read_regular
from vitral.report.calibration import CalibrationReport
from vitral.report.figures import NUM_COLORS, Chart, Line, number
from vitral.report.label_errors import LabelErrorReport
from vitral.report.multilabel import MultiLabelReport
from vitral.report.predictions import Predictions
from vitral.report.thumbnails import attention_examples, data_uri, png_uri, thumbnail
from vitral.rundir import Row, Run, RunDir, duration, headline
from vitral.storage import replacing

MAX_MATRIX_CLASSES = 50  # limit for showing the full confusion matrix
MAX_LISTED_CLASSES = 20  # above this, only the ten best and the ten worst
MAX_PAIRS, IMAGES_PER_PAIR = 12, 4
MAX_MISTAKES = 24
MAX_PICTURE_SIZE = 1100  # of the augmented batch, in pixels


def write_report(
    run: Run,
    out: Path,
    predictions: Predictions | None,
    missing: str = "",
    errors: LabelErrors | None = None,
) -> None:
    """Writes the report of a run.

    Args:
        run: run from `read_run`.
        out: file to write.
        predictions: predictions of the run's weights for the validation images.
        missing: the reason why there are no predictions.
        errors: likely label errors, if they were searched for.
    """
    settings, defaults = flatten(run.config), flatten(Config())
    _write(
        out,
        "run.html",
        title=_names([run])[0],
        run=run,
        size=_size(run.config),
        command=_command(run.environment),
        settings=settings,
        changed={k: (v, defaults[k]) for k, v in settings.items() if v != defaults[k]},
        environment=_flattened(run.environment),
        charts=_charts({"": run.rows}),
        cost=_cost(run),
        best=_best(run),
        batch=_picture(RunDir(run.path).train_batch),
        **_sections(predictions),
        missing=missing,
        errors=errors and LabelErrorReport(errors),
    )


def write_comparison(runs: Sequence[Run], out: Path) -> None:
    """Writes a comparison of runs: results, curves in shared charts, and settings that differ."""
    names = _names(runs)
    settings = [flatten(run.config) for run in runs]
    columns = {key: [each[key] for each in settings] for key in settings[0] if key != "train.out"}
    _write(
        out,
        "comparison.html",
        title=f"Comparison of {len(runs)} runs",
        runs=list(zip(names, runs, strict=True)),
        colors=NUM_COLORS,
        main=" or ".join(dict.fromkeys(TITLES[run.headline] for run in runs)),
        different={k: v for k, v in columns.items() if any(value != v[0] for value in v)},
        charts=_charts(dict(zip(names, [run.rows for run in runs], strict=True))),
    )


@dataclass(frozen=True)
class PredictionReport:
    """Contents of the report about individual predictions."""

    predictions: Predictions

    @property
    def scores(self) -> Scores:
        """Scores of the predictions."""
        assert isinstance(self.predictions.scores, Scores)
        return self.predictions.scores

    @property
    def model(self) -> str:
        """Description of the weights that made the predictions."""
        weights = self.predictions.weights
        kind = "EMA" if weights.description.default == "ema" else "raw"
        step = weights.description.metrics["step"]
        return f"weights/{weights.path.name} ({kind}, step {step:,.0f})"

    @property
    def images(self) -> str:
        """Description of the images."""
        held_out = self.predictions.weights.description.config.data.hold_out
        return "held-out training images" if held_out else "validation images"

    @cached_property
    def metrics(self) -> Results:
        """Metrics of the predictions."""
        return Results(self.scores)

    @cached_property
    def headline(self) -> list[tuple[str, str, str]]:
        """Title, value and 95% interval of each metric."""
        return headline_rows(self.metrics)

    @cached_property
    def per_class(self) -> dict[str, list[ClassMetrics]]:
        """Tables of classes by title; for more than 20 classes, only the best and the worst."""
        rows = sorted(self.metrics.per_class, key=lambda row: -row.f1)
        if len(rows) <= MAX_LISTED_CLASSES:
            return {"All classes": rows}
        return {"Best classes": rows[:10], "Worst classes": rows[:-11:-1]}

    @cached_property
    def matrix(self) -> list[list[tuple[int, int]]] | None:
        """Number of images and percentage of the true class, by true and predicted class."""
        if len(self.scores.classes) > MAX_MATRIX_CLASSES:
            return None
        counts = self.scores.confusion()
        images = np.bincount(self.scores.labels, minlength=len(counts))
        percentages = np.rint(100 * counts / images.clip(1)[:, None]).astype(int)
        pairs = zip(counts.tolist(), percentages.tolist(), strict=True)
        return [list(zip(*pair, strict=True)) for pair in pairs]

    @cached_property
    def heat_map(self) -> str | None:
        """The confusion matrix as an image, if there are too many classes for a table."""
        return png_uri(draw(self.scores)) if self.matrix is None else None

    @cached_property
    def pairs(self) -> list[tuple[str, str, int, list[dict[str, Any]]]]:
        """True class, predicted class, images and examples of the most frequent confusions."""
        scores, found = self.scores, []
        for truth, other, count in scores.confused_pairs()[:MAX_PAIRS]:
            a, b = scores.classes.index(truth), scores.classes.index(other)
            chosen = np.flatnonzero((scores.labels == a) & (scores.predicted == b))
            found.append((truth, other, count, self._shown(chosen, IMAGES_PER_PAIR)))
        return found

    @cached_property
    def mistakes(self) -> list[dict[str, Any]]:
        """The most confident wrong predictions."""
        return self._shown(np.flatnonzero(~self.scores.hits(1)), MAX_MISTAKES)

    @cached_property
    def attention(self) -> list[dict[str, Any]]:
        """Evenly spaced images of the dataset, and the attention of the model to them."""
        found = attention_examples(self.predictions.weights, self.predictions.records)
        return [{**pictures, **self._caption(i)} for i, pictures in found]

    @cached_property
    def calibration(self) -> CalibrationReport:
        """Contents of the section on calibration."""
        return CalibrationReport(self.scores)

    def _shown(self, indices: NDArray[np.int64], count: int) -> list[dict[str, Any]]:
        """Returns the most confidently classified of some images, with their captions."""
        order = np.argsort(-self.calibration.scores.confidence[indices], kind="stable")[:count]
        records = self.predictions.records
        return [{"picture": thumbnail(records, int(i)), **self._caption(i)} for i in indices[order]]

    def _caption(self, i: int) -> dict[str, Any]:
        """Returns the true class of image i and its prediction."""
        scores = self.scores
        return {
            "truth": scores.classes[scores.labels[i]],
            "predicted": scores.classes[scores.ranked[i, 0]],
            "probability": self.calibration.scores.confidence[i],
        }


def _sections(predictions: Predictions | None) -> dict[str, Any]:
    """Returns the contents about individual predictions, by their name in the template."""
    if predictions is None:
        return {"results": None, "several": None}
    results = PredictionReport(predictions)
    if not isinstance(predictions.scores, MultiLabelScores):
        return {"results": results, "several": None}
    weights = results.model, results.images
    return {"results": None, "several": MultiLabelReport(predictions, predictions.scores, *weights)}


def _write(out: Path, template: str, **content: Any) -> None:
    pages = Environment(
        loader=PackageLoader("vitral.report", "pages"),
        autoescape=True,  # names of classes, paths and settings are untrusted
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"percent": "{:.2%}".format, "duration": duration, "number": number}
    pages.filters |= {"human": short_name, "value": _value}
    text = pages.get_template(template).render(**content)
    with replacing(out) as file:
        file.write_text(text, encoding="utf-8", errors="backslashreplace")


def _charts(runs: Mapping[str, Sequence[Row]]) -> list[Chart]:
    """Returns six charts; colors identify runs if there are several, and quantities otherwise."""
    several = len(runs) > 1

    def chart(title: str, unit: str, factor: float, zero: bool, **columns: str) -> Chart:
        lines = []
        for i, (run, rows) in enumerate(runs.items()):
            for j, (column, label) in enumerate(columns.items()):
                points = [(row["epoch"], factor * row[column]) for row in rows if column in row]
                if points:
                    name = f"{run}, {label}" if several and len(columns) > 1 else run or label
                    ema = column.startswith("ema")
                    lines.append(Line(name, points, i if several else j, dashed=ema))
        return Chart(title, unit, tuple(lines), zero)

    losses = {"val_loss": "validation", "ema_loss": "validation, EMA"}
    if not several:
        losses = {"loss": "training", **losses}
    main = headline(next((row for rows in runs.values() for row in rows if "val_loss" in row), {}))
    title = ("Average precision", "mAP, %") if main == "map" else ("Accuracy", "top-1, %")
    accuracy = {f"val_{main}": "raw weights", f"ema_{main}": "EMA"}
    return [
        chart("Loss", "nats", 1, False, **losses),
        chart(*title, 100, False, **accuracy),
        chart("Learning rate", "", 1, True, lr="learning rate"),
        chart("Gradient norm", "before clipping", 1, True, grad_norm="gradient norm"),
        chart("Throughput", "img/s", 1, True, images_per_second="throughput"),
        chart("Data wait", "% of the time", 100, True, data_wait="data wait"),
    ]


def _best(run: Run) -> tuple[str, str, str] | None:
    """Returns the metric that selects the best weights, its value, and which weights they are."""
    if run.best is None:
        return None
    kind, row = run.best
    metric = run.config.train.best_by
    kind_name = "EMA" if kind == "ema" else "raw weights"
    value = shown(metric, row.get(f"{kind}_{metric}", math.nan))
    return f"Best {TITLES[metric]}", value, f"{kind_name}, epoch {number(row['epoch'])}"


def _cost(run: Run) -> dict[str, str]:
    """Returns the cost of the run, by name."""
    if not run.rows:
        return {}
    last, environment = run.rows[-1], run.environment
    cost = {"Images seen": f"{last['images']:,.0f}"}
    flops = environment.get("training_flops_per_image")
    if flops:
        qualifier = "at most " if run.config.train.progressive else ""
        work = f"{flops * last['images']:.3g}".replace("e+", "e")
        formula = "three forward passes per image"
        cost["Floating-point operations"] = f"{qualifier}{work}, counted as {formula}"
    processes = environment.get("resolved", {}).get("processes", 1)
    device = environment.get("gpu") or f"CPU with {environment.get('cpu_cores', '?')} cores"
    hours = last["seconds"] * processes / 3600
    cost["Device hours"] = f"{hours:,.3g} on {processes} x {device}"
    if "energy_kwh" in last:
        cost["Energy"] = f"{last['energy_kwh']:.3g} kWh for the GPUs, measured by the driver"
    if "mfu" in last:
        cost["Model FLOPs utilization"] = f"{last['mfu']:.0%} in the last log row"
    return cost


def _size(config: Config) -> str:
    dim, depth, heads, kv_heads = config.model.shape
    return (
        f"{counted(depth, 'block')} of width {dim}, {counted(heads, 'head')} ({kv_heads} for keys "
        f"and values), patch size {config.model.patch_size} and image size "
        f"{config.model.image_size}"
    )


def _command(environment: Mapping[str, Any]) -> list[str]:
    """Returns the words of the command that started the run, quoted for a shell."""
    program, *words = environment.get("command") or [""]
    name = Path(program).name.replace("__main__.py", "vitral")
    return [shlex.quote(word) for word in (name, *words)] if name else []


def _names(runs: Sequence[Run]) -> list[str]:
    """Returns the names of the run directories, or their paths if two names are the same."""
    names = [printable(run.path.resolve().name) for run in runs]
    return names if len(set(names)) == len(names) else [printable(run.path) for run in runs]


def _flattened(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested facts into one table."""
    table = {}
    for key, value in facts.items():
        table |= _flattened(value, f"{key}.") if isinstance(value, dict) else {prefix + key: value}
    return table


def _picture(path: Path) -> tuple[str, int, int] | None:
    try:
        with Image.open(io.BytesIO(read_regular(path))) as image:
            return data_uri(image, min(MAX_PICTURE_SIZE, max(image.size))), *image.size
    except OSError:
        return None


def _value(value: Any) -> str:
    """Formats a setting for display."""
    if isinstance(value, tuple | list):
        return " ".join(map(_value, value)) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "–" if value is None else str(value)  # noqa: RUF001
