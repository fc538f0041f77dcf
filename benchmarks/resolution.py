"""Evaluates position encodings at image sizes from 96 to 256 pixels, after training at 128.

    python benchmarks/resolution.py OUT [--data PATH] [--sizes 96 112 128 160 192 224 256]
                                    [--seeds 0 1 2] [-- --section.key value ...]
    python benchmarks/resolution.py OUT --dry-run | --summary

Trains the recipe `imagenette128` with axial RoPE, with mixed RoPE, and with learned positions,
which are interpolated for other sizes. Settings after `--` apply to every run. Scores are those of
the averaged weights (EMA) at the last step, on the validation images. At every size, the crop spans
the same fraction of an image's short side. The short side of Imagenette's photographs has 160
pixels, so they are enlarged for larger sizes. Repeat the command to resume an interrupted
experiment. Each finished run updates OUT/resolution.md and OUT/resolution.svg; the scores of a run
are in its image_sizes.csv.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import experiments
import matplotlib
import torch
from experiments import Experiment, PlannedRun, Variant
from ledger_pages import table
from ledger_rows import mean_and_deviation
from matplotlib.figure import Figure
from variants import PARTS, exit_code

from vitral import weights
from vitral.errors import UserError
from vitral.evaluation import sweep
from vitral.evaluation.table import Row, write_rows
from vitral.rundir import read_run
from vitral.storage import replacing
from vitral.training import checkpoint
from vitral.weights import Weights

VARIANTS = (
    Variant("axial", "axial RoPE"),
    Variant("mixed", "mixed RoPE", "--model.rope mixed"),
    Variant("learned", "learned positions", parts="learned-positions"),
)
SIZES = (96, 112, 128, 160, 192, 224, 256)
TABLE = "image_sizes.csv"
Curve = dict[int, dict[int, float]]  # top-1 in percent by image size and seed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 1 if a run failed, 2 for a user error, or a signal's code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="in pixels")
    options, words = experiments.parse(parser, arguments)
    return exit_code("resolution", lambda: run(options, words))


def run(options: argparse.Namespace, words: tuple[str, ...]) -> int:
    """Executes the selected action.

    Raises:
        UserError: if settings are invalid, or differ from those of the runs in OUT.
    """
    out: Path = options.out
    if options.summary:
        write_summary(out)
        return 0
    experiment = Experiment(out, "imagenette128", words)
    for variant in VARIANTS:
        for seed in variant.seeds(out):
            experiment.plan(variant, seed)  # rejects other settings
    runs = [experiment.plan(variant, seed) for seed in options.seeds for variant in VARIANTS]
    for size in options.sizes:
        dataclasses.replace(runs[0].config.model, image_size=size)  # rejects partial patches
    if options.dry_run:
        for line in experiments.listed(runs):
            print(line, flush=True)
        return 0

    def after(run: PlannedRun) -> None:
        test(run, options.sizes, options.data)
        write_summary(out)

    return experiments.complete(runs, after)


def test(run: PlannedRun, sizes: Sequence[int], data: str | None) -> None:
    """Evaluates a finished run at the sizes missing from its table, and adds the scores to it."""
    known = {row.name: row for row in scores(run.path)}
    missing = [size for size in sizes if str(size) not in known]
    if not missing:
        return
    for size, found in sweep(last_weights(run.path), missing, data):
        known[str(size)] = found.row(str(size))
        print(f"{run.path.name} at {size} pixels: top-1 {found.top1:.2%}", flush=True)
        write_rows(
            run.path / TABLE, "image size", sorted(known.values(), key=lambda r: int(r.name))
        )


def last_weights(run: Path) -> Weights:
    """Loads the last weights of a finished run: the averaged ones if its recipe keeps them.

    Models other than vitral's have no weight directory; their weights are in the checkpoint.

    Raises:
        UserError: if there are no weights.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = run / "weights" / "last"
    if folder.exists():
        averaged = (folder / "ema.safetensors").exists()
        return weights.load(folder, which="ema" if averaged else "model", device=device)
    warnings: list[str] = []
    found = checkpoint.latest(run / "checkpoints", warnings.append)
    if found is None:
        warning = warnings[0] if warnings else "none"
        raise UserError(
            f"{run}: expected a checkpoint, got {warning}; remove the run and train it again"
        )
    config, state = read_run(run).config, found.state
    model = PARTS[state["parts"]].model(config.model, len(state["classes"]))
    model.load_state_dict(found.tensors.get("ema", found.tensors["model"]))
    classes, known = tuple(state["classes"]), (state["fingerprint"], state["metrics"])
    described = weights.describe(config, classes, *known)
    return Weights(model.to(device).eval().requires_grad_(False), described, run)


def scores(run: Path) -> list[Row]:
    """The rows of a run's table, if it exists."""
    path = run / TABLE
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))[1:]
    return [
        Row(name, int(images), int(classes), *map(float, fractions))
        for name, images, classes, *fractions in lines
    ]


def curves(out: Path) -> dict[Variant, Curve]:
    """The scores of each variant at the sizes for which all of its seeds were evaluated."""
    found: dict[Variant, Curve] = {}
    for variant in VARIANTS:
        tested = {seed: scores(variant.at(out, seed)) for seed in variant.finished(out)}
        curve: Curve = {}
        for seed, rows in tested.items():
            for row in rows:
                curve.setdefault(int(row.name), {})[seed] = 100 * row.top1
        count = sum(map(bool, tested.values()))
        complete = {size: tops for size, tops in curve.items() if len(tops) == count}
        if complete:
            found[variant] = complete
    return found


def write_summary(out: Path) -> None:
    """Writes OUT/resolution.md and OUT/resolution.svg from the available scores.

    Raises:
        UserError: if there are none.
    """
    found = curves(out)
    if not found:
        raise UserError(f"{out}: expected finished runs that were evaluated, got none")
    sizes = sorted({size for curve in found.values() for size in curve})
    rows = [
        [
            variant.title,
            ", ".join(map(str, sorted({seed for tops in curve.values() for seed in tops}))),
            *(
                mean_and_deviation([*curve[size].values()]) if size in curve else ""
                for size in sizes
            ),
        ]
        for variant, curve in found.items()
    ]
    header = ("positions", "seeds", *(f"{size} px" for size in sizes))
    introduction = (
        "# Image sizes\n\nTop-1 (%) on the validation images at sizes other than that of training. "
        "± is the sample\nstandard deviation over the seeds.\n\n"
    )
    experiments.write(out / "resolution.md", introduction + table(header, rows) + "\n")
    draw(found, out / "resolution.svg")


def draw(found: dict[Variant, Curve], path: Path) -> None:
    """Draws top-1 over image size: a line through the means, and a dot for each seed."""
    figure = Figure(figsize=(7, 4))
    # Not a constrained layout, whose last digits vary.
    axes = figure.subplots(gridspec_kw={"left": 0.09, "right": 0.98, "bottom": 0.12, "top": 0.97})
    for variant, curve in found.items():
        sizes = sorted(curve)
        means = [statistics.fmean(curve[size].values()) for size in sizes]
        (line,) = axes.plot(sizes, means, linewidth=1.5, label=variant.title)
        points = [(size, value) for size in sizes for value in curve[size].values()]
        axes.plot(*zip(*points, strict=True), "o", color=line.get_color(), alpha=0.5, markersize=4)
    axes.set_xticks(sorted({size for curve in found.values() for size in curve}))
    axes.set_xlabel("image size (pixels)")
    axes.set_ylabel("top-1 (%) on validation images")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    # Keep text as text, and write the same bytes for the same figure.
    style: dict[Any, str] = {"svg.fonttype": "none", "svg.hashsalt": "vitral"}
    with matplotlib.rc_context(style), replacing(path) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
