"""Ablations of a recipe: what each of its parts is worth, at equal FLOPs where the model changes.

    python benchmarks/ablate.py OUT [--data PATH] [--only STUDY ...] [--seeds 0 1 2]
                                [--recipe cifar10] [-- --section.key value ...]
    python benchmarks/ablate.py OUT --dry-run | --summary | --ledger

What follows `--` goes to every run. A tenth of the training images is held out, by seed, and
validated on, at the last step alone; no test image is looked at. Seed by seed over all variants, so
that what was cut off has whole rows; the same command goes on. After each run OUT/ablation.md and
OUT/ablation.svg are written anew: top-1 of the averaged weights (EMA) where the recipe keeps them,
of the raw ones elsewhere. Runs of one seed share their order and their held-out images, so a
variant is compared with the first of its study seed by seed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import experiments
from experiments import Experiment, Planned, Variant
from ledger import ROOT, Row, spread, summarise
from ledger import write as write_row
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitral.config import UserError, flatten
from vitral.report.gather import Run

RECIPE = Variant("recipe", "the recipe")


def kv_heads(count: int) -> Variant:
    """Of six query heads; what fewer spare, the feed-forward network gets."""
    words = (
        f"--model.num-heads 6 --model.num-kv-heads {count} --model.mlp-ratio {4 + 1 - count / 6}"
    )
    return Variant(f"kv{count}", f"{count} key/value head{'s' * (count > 1)}", words)


# The first variant of a study is what the others are compared with.
STUDIES = {
    "kv-heads": (kv_heads(6), kv_heads(3), kv_heads(2), kv_heads(1)),
    "positions": (
        RECIPE,
        Variant("mixed", "mixed RoPE", "--model.rope mixed"),
        Variant("learned", "learned positions", parts="learned-positions"),
        Variant("none", "no positions", parts="no-positions"),
    ),
    "augmentation": (
        RECIPE,
        Variant("no-policy", "without AutoAugment", "--augment.policy none"),
        Variant("no-mixing", "without Mixup, CutMix", "--augment.mixup 0 --augment.cutmix 0"),
        Variant("no-erasing", "without erasing", "--augment.erasing 0"),
    ),
    "parts": (
        RECIPE,
        Variant("no-qk-norm", "without QK-norm", "--model.no-qk-norm"),
        Variant("no-layer-scale", "without LayerScale", "--model.layer-scale 0"),
        Variant("no-registers", "without registers", "--model.num-registers 0"),
        Variant("mean-pooling", "mean pooling", "--model.pooling mean"),
    ),
    "norm": (RECIPE, Variant("layer-norm", "LayerNorm", parts="layer-norm")),
    "optimizer": (RECIPE, Variant("muon", "Muon", parts="muon")),
    "rate": (
        RECIPE,
        Variant("lr5e-4", "rate 5e-4", "--optim.lr 5e-4"),
        Variant("lr2e-3", "rate 2e-3", "--optim.lr 2e-3"),
        Variant("beta95", "second beta 0.95", "--optim.betas 0.9 0.95"),
    ),
    # By fewer FLOPs; the shares are those of the steps.
    "growing": (
        RECIPE,
        Variant("growing", "16, 24, then 32 px", "--train.progressive 16 0.2 24 0.3 32 0.5"),
    ),
}
VARIANTS = tuple(dict.fromkeys(variant for study in STUDIES.values() for variant in study))
EQUAL_FLOPS = ("kv-heads",)
TOLERANCE = 0.01
HEADER = ("variant", "parameters", "MFLOPs an image", "seeds", "top-1 (%)", "difference")


@dataclass(frozen=True)
class Result:
    """The finished runs of a variant."""

    variant: Variant
    parameters: int
    flops: float
    """Of an image's forward pass."""
    top1: dict[int, float]
    """By seed, in per cent."""


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Runs the command; returns 0, 1 where runs failed, 2 for a mistake, or a signal's code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=STUDIES, default=list(STUDIES), metavar="STUDY")
    add("--recipe", default="cifar10")
    add("--ledger", action="store_true", help="only write docs/results/STUDY-VARIANT.json")
    options, words = experiments.parse(parser, arguments)
    return experiments.main("ablate", lambda: run(options, words, root))


def run(options: argparse.Namespace, words: Sequence[str], root: Path) -> int:
    """Does what the options say.

    Raises:
        UserError: for settings that are wrong, or other than those of the runs in OUT.
    """
    out: Path = options.out
    if options.ledger:
        write_ledger(out, options.only, root)
        return 0
    if options.summary:
        write_summary(out)
        return 0
    experiment = Experiment(out, options.recipe, ("--data.hold-out", *words))
    runs = plan(experiment, options.only, options.seeds)
    if options.dry_run:
        for line in experiments.listed(runs):
            print(line, flush=True)
        return 0
    return experiments.complete(runs, lambda _: write_summary(out))


def plan(experiment: Experiment, studies: Sequence[str], seeds: Sequence[int]) -> list[Planned]:
    """All runs, seed by seed, without variants that change nothing of the recipe.

    Raises:
        UserError: as `Experiment.plan` does, for any run in OUT, and for unequal FLOPs.
    """
    chosen: dict[str, Variant] = {}
    for study in studies:
        base, *others = STUDIES[study]
        for variant in others:
            if changes(experiment, base, variant):
                chosen |= {base.name: base, variant.name: variant}
            else:
                print(f"{variant.title}: {experiment.recipe} is so already; left out")
    for variant in VARIANTS:
        for seed in variant.seeds(experiment.out):
            experiment.plan(variant, seed)  # refuses other settings
    if not chosen:
        raise UserError(f"only: expected a study that changes {experiment.recipe}, got none")
    runs = [experiment.plan(variant, seed) for seed in seeds for variant in chosen.values()]
    for study in set(studies) & set(EQUAL_FLOPS):
        refuse_unequal(study, [run for run in runs if run.variant in STUDIES[study]])
    return runs


def changes(experiment: Experiment, base: Variant, variant: Variant) -> bool:
    """Whether a variant is another training than its base."""
    settings, others = (flatten(experiment.plan(v, 0).config) for v in (base, variant))
    return bool(variant.parts) or any(
        settings[name] != others[name] for name in settings if name != "train.out"
    )


def refuse_unequal(study: str, runs: Sequence[Planned]) -> None:
    """Raises UserError where models cost more than a hundredth more than the cheapest."""
    flops = [experiments.size(run)[1] for run in runs]
    if max(flops) > (1 + TOLERANCE) * min(flops):
        raise UserError(
            f"{study}: expected equal FLOPs within {TOLERANCE:.0%}, got {min(flops):,.0f} to "
            f"{max(flops):,.0f} an image; give a --model.dim that 24 divides"
        )


def results(out: Path) -> dict[str, list[Result]]:
    """What there is of each study, the base first; nothing of one whose base is not there."""
    known: dict[Variant, Result] = {}
    for variant in VARIANTS:
        if runs := variant.finished(out):
            known[variant] = result(variant, runs)
    return {
        study: [known[variant] for variant in variants if variant in known]
        for study, variants in STUDIES.items()
        if variants[0] in known
    }


def result(variant: Variant, runs: dict[int, Run]) -> Result:
    """What the finished runs of a variant came to."""
    facts = next(iter(runs.values())).environment
    top1 = {seed: 100 * experiments.top1(run) for seed, run in runs.items()}
    return Result(variant, facts["parameters"], facts["flops_per_image"], top1)


def difference(base: Result, other: Result) -> str:
    """The mean difference over the seeds that both have, and its standard error, in points."""
    pairs = [other.top1[seed] - base.top1[seed] for seed in other.top1 if seed in base.top1]
    if other is base or not pairs:
        return ""
    mean = f"{statistics.fmean(pairs):+.2f}"
    error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
    return mean if error is None else f"{mean} ± {error:.2f}"


def write_summary(out: Path) -> None:
    """Writes OUT/ablation.md and OUT/ablation.svg from the runs that are finished.

    Raises:
        UserError: if none is.
    """
    studies = results(out)
    if not studies:
        raise UserError(
            f"{out}: expected finished runs of a study and of what it compares, got none"
        )
    experiments.write(out / "ablation.md", "\n".join(sections(studies)))
    draw(studies, out / "ablation.svg")


def sections(studies: dict[str, list[Result]]) -> Iterator[str]:
    """The tables in Markdown."""
    yield (
        "# Ablation\n\nTop-1 on held-out training images at the last step. ± is the sample\n"
        "standard deviation over the seeds; of the difference to the first row, seed by seed, the\n"
        "standard error of the mean.\n"
    )
    for study, found in studies.items():
        yield f"## {study}\n"
        yield experiments.table(HEADER, [cells(found[0], result) for result in found])


def cells(base: Result, result: Result) -> list[str]:
    """The cells of a variant's row."""
    return [
        result.variant.title,
        f"{result.parameters:,}",
        f"{result.flops / 1e6:,.2f}",
        ", ".join(map(str, result.top1)),
        spread([*result.top1.values()]),
        difference(base, result),
    ]


def draw(studies: dict[str, list[Result]], path: Path) -> None:
    """A panel a study: a dot a seed, a tick at the mean, a line at the mean of the base."""
    counts = [len(found) for found in studies.values()]
    figure = Figure(figsize=(7, 0.4 * sum(counts) + 0.9 * len(counts)), layout="constrained")
    panels = figure.subplots(len(counts), squeeze=False, height_ratios=[n + 1 for n in counts])
    for axes, (study, found) in zip(panels[:, 0], studies.items(), strict=True):
        panel(axes, found)
        axes.set_title(study, loc="left", fontsize=11)
    panels[-1, 0].set_xlabel("top-1 (%) on held-out images, at the last step")
    experiments.save(figure, path)


def panel(axes: Axes, found: Sequence[Result]) -> None:
    for row, result in enumerate(found):
        values = [*result.top1.values()]
        axes.plot(values, [row] * len(values), "o", color="#0b5cad", alpha=0.55, markersize=5)
        axes.plot(statistics.fmean(values), row, "|", color="#1b1f24", markersize=14)
    axes.axvline(
        statistics.fmean(found[0].top1.values()), color="#b3400a", linewidth=1, dashes=(5, 3)
    )
    axes.set_yticks(range(len(found)), [result.variant.title for result in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def write_ledger(out: Path, studies: Sequence[str], root: Path) -> None:
    """Writes a row of the ledger for each variant that has finished runs."""
    for study in studies:
        for variant in STUDIES[study]:
            if runs := variant.finished(out):
                path = root / "docs" / "results" / f"{study}-{variant.name}.json"
                write_row(ledger_row(study, variant, [*runs.values()]), path)
                print(path)


def ledger_row(study: str, variant: Variant, runs: Sequence[Run]) -> Row:
    """The row of a variant."""
    first = runs[0]
    name = Path(first.config.data.path).name
    row = summarise(
        [run.path for run in runs],
        title=variant.title,
        data=f"{name}, {first.config.data.val_fraction:.0%} of the training images held out",
        study=study,
        flops_per_image=first.environment["training_flops_per_image"] / 3,
    )
    if variant.parts:
        program = f"python benchmarks/variants.py {variant.parts}"
        row["command"] = row["command"].replace("vitral train", program, 1)
    return row


if __name__ == "__main__":
    sys.exit(main())
