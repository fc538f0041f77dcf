"""Ablations of a recipe: what each of its parts is worth.

    python benchmarks/ablate.py OUT [--data PATH] [--only STUDY ...] [--seeds 0 1 2]
                                [--recipe cifar10] [-- --section.key value ...]
    python benchmarks/ablate.py OUT --dry-run | --summary | --ledger

What follows `--` goes to every run. A tenth of the training images is held out, by seed, and
validated on, at the last step alone; no test image is looked at. Seed by seed over all variants, so
that what was cut off has whole rows; the same command goes on. After each run OUT/ablation.md and
OUT/ablation.svg are written anew. Runs of one seed share their order and their held-out images, so
a variant is compared with the first of its study seed by seed. The variants of `kv-heads` cost the
same FLOPs; of the others the table says what they cost.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import experiments
from experiments import Experiment, PlannedRun, Variant
from ledger_figures import figure
from ledger_rows import ROOT
from variants import exit_code

from vitral.config import flatten
from vitral.errors import UserError

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
        Variant("layer-scale", "LayerScale 1e-4", "--model.layer-scale 1e-4"),
        Variant("no-registers", "without registers", "--model.num-registers 0"),
        Variant("mean-pooling", "mean pooling", "--model.pooling mean"),
    ),
    "norm": (RECIPE, Variant("layer-norm", "LayerNorm", parts="layer-norm")),
    "optimizer": (
        RECIPE,
        Variant("muon", "Muon", "--optim.name muon"),
        Variant("adamw", "AdamW, rate 1e-3", "--optim.name adamw --optim.lr 1e-3"),
    ),
    "rate": (
        RECIPE,
        Variant("lr1e-3", "rate 1e-3", "--optim.lr 1e-3"),
        Variant("lr4e-3", "rate 4e-3", "--optim.lr 4e-3"),
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


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Runs the command; returns 0, 1 where runs failed, 2 for a mistake, or a signal's code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=STUDIES, default=list(STUDIES), metavar="STUDY")
    add("--recipe", default="cifar10")
    options, words = experiments.parse(parser, arguments, "docs/results/STUDY-VARIANT.json")
    return exit_code("ablate", lambda: run(options, words, root))


def run(options: argparse.Namespace, words: Sequence[str], root: Path) -> int:
    """Does what the options say.

    Raises:
        UserError: for settings that are wrong, or other than those of the runs in OUT.
    """
    if options.ledger:
        for study in options.only:
            rows = experiments.rows(STUDIES[study], options, study)
            experiments.write_ledger(study, rows, root)
        return 0
    if options.summary:
        write_summary(options)
        return 0
    experiment = Experiment(options.out, options.recipe, ("--data.hold-out", *words))
    runs = plan(experiment, options.only, options.seeds)
    if options.dry_run:
        for line in experiments.listed(runs):
            print(line, flush=True)
        return 0
    return experiments.complete(runs, lambda _: write_summary(options))


def plan(experiment: Experiment, studies: Sequence[str], seeds: Sequence[int]) -> list[PlannedRun]:
    """All runs, seed by seed, without variants that change nothing of the recipe.

    Raises:
        UserError: as `Experiment.plan` does, for any run in OUT, and for unequal FLOPs.
    """
    chosen: dict[str, Variant] = {}
    wanted = dict.fromkeys(variant for study in studies for variant in STUDIES[study])
    known = {variant: experiment.plan(variant, seeds[0]) for variant in wanted}
    for study in studies:
        base, *others = STUDIES[study]
        for variant in others:
            if changes(known[base], known[variant]):
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
        check_equal_cost(study, [run for run in runs if run.variant in STUDIES[study]])
    return runs


def changes(base: PlannedRun, other: PlannedRun) -> bool:
    """Whether a run is another training than that of its base."""
    settings, others = flatten(base.config), flatten(other.config)
    return bool(other.variant.parts) or any(
        settings[name] != others[name] for name in settings if name != "train.out"
    )


def check_equal_cost(study: str, runs: Sequence[PlannedRun]) -> None:
    """Raises UserError where models cost more than a hundredth more than the cheapest."""
    flops = [experiments.size(run)[1] for run in runs]
    if max(flops) > (1 + TOLERANCE) * min(flops):
        raise UserError(
            f"{study}: expected equal FLOPs within {TOLERANCE:.0%}, got {min(flops):,.0f} to "
            f"{max(flops):,.0f} an image; give a --model.dim that 24 divides"
        )


def write_summary(options: argparse.Namespace) -> None:
    """Writes OUT/ablation.md and OUT/ablation.svg from the runs that are finished.

    Raises:
        UserError: if none is.
    """
    out: Path = options.out
    found = {
        study: [*experiments.rows(variants, options, study).values()]
        for study, variants in STUDIES.items()
        if variants[0].finished(out)
    }
    found = {study: compared for study, compared in found.items() if len(compared) > 1} or found
    if not found:
        raise UserError(
            f"{out}: expected finished runs of a study and of what it compares, got none"
        )
    parts = [f"# Ablation\n\n{experiments.ABOUT}"]
    for study, compared in found.items():
        parts += [f"## {study}\n", experiments.comparison(compared)]
    experiments.write(out / "ablation.md", "\n".join(parts))
    every = [row for compared in found.values() for row in compared]
    experiments.write(out / "ablation.svg", figure(every, by="study"))


if __name__ == "__main__":
    sys.exit(main())
