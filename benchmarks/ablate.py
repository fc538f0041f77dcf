"""Ablates a recipe: measures how much each part contributes to the accuracy.

    python benchmarks/ablate.py OUT [--data PATH] [--only STUDY ...] [--seeds 0 1 2]
                                [--recipe cifar10] [-- --section.key value ...]
    python benchmarks/ablate.py OUT --dry-run | --summary | --ledger

Settings after `--` apply to every run. A tenth of the training images is held out for validation,
by seed, and scored only at the last step; the test images are not used. All variants are trained
with one seed before the next seed starts, so an interrupted experiment has complete seeds. Repeat
the command to resume it. Each finished run updates OUT/ablation.md and OUT/ablation.svg. Runs with
the same seed share the order of the images and the held-out images, so variants are compared with
the first variant of their study seed by seed. The variants of `kv-heads` have equal FLOPs; for the
others, the table reports the FLOPs.
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
    """Key/value heads for six query heads, with a wider feed-forward network at equal FLOPs."""
    words = (
        f"--model.num-heads 6 --model.num-kv-heads {count} --model.mlp-ratio {4 + 1 - count / 6}"
    )
    return Variant(f"kv{count}", f"{count} key/value head{'s' * (count > 1)}", words)


# The first variant of each study is the baseline.
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
        Variant("adamw", "AdamW, lr 1e-3", "--optim.name adamw --optim.lr 1e-3"),
    ),
    "rate": (
        RECIPE,
        Variant("lr1e-3", "lr 1e-3", "--optim.lr 1e-3"),
        Variant("lr4e-3", "lr 4e-3", "--optim.lr 4e-3"),
        Variant("beta95", "beta2 0.95", "--optim.betas 0.9 0.95"),
    ),
    # With fewer FLOPs. Each image size is followed by its fraction of the steps.
    "growing": (
        RECIPE,
        Variant("growing", "16, 24, then 32 px", "--train.progressive 16 0.2 24 0.3 32 0.5"),
    ),
}
VARIANTS = tuple(dict.fromkeys(variant for study in STUDIES.values() for variant in study))
EQUAL_FLOPS = ("kv-heads",)
TOLERANCE = 0.01


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Runs the command; returns 0, 1 if a run failed, 2 for a user error, or a signal's code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=STUDIES, default=list(STUDIES), metavar="STUDY")
    add("--recipe", default="cifar10")
    options, words = experiments.parse(parser, arguments, "docs/results/STUDY-VARIANT.json")
    return exit_code("ablate", lambda: run(options, words, root))


def run(options: argparse.Namespace, words: Sequence[str], root: Path) -> int:
    """Executes the selected action.

    Raises:
        UserError: if settings are invalid, or differ from those of the runs in OUT.
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
    """Plans all runs, seed by seed, without variants that equal the recipe.

    Raises:
        UserError: as in `Experiment.plan`, for any run in OUT, and for unequal FLOPs.
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
                print(f"{variant.title}: no change to {experiment.recipe}; skipped")
    for variant in VARIANTS:
        for seed in variant.seeds(experiment.out):
            experiment.plan(variant, seed)  # rejects other settings
    if not chosen:
        raise UserError(f"only: expected a study that changes {experiment.recipe}, got none")
    runs = [experiment.plan(variant, seed) for seed in seeds for variant in chosen.values()]
    for study in set(studies) & set(EQUAL_FLOPS):
        check_equal_cost(study, [run for run in runs if run.variant in STUDIES[study]])
    return runs


def changes(base: PlannedRun, other: PlannedRun) -> bool:
    """Whether a run differs from its baseline."""
    settings, others = flatten(base.config), flatten(other.config)
    return bool(other.variant.parts) or any(
        settings[name] != others[name] for name in settings if name != "train.out"
    )


def check_equal_cost(study: str, runs: Sequence[PlannedRun]) -> None:
    """Raises UserError if the FLOPs of the models differ by more than 1%."""
    flops = [experiments.size(run)[1] for run in runs]
    if max(flops) > (1 + TOLERANCE) * min(flops):
        raise UserError(
            f"{study}: expected equal FLOPs within {TOLERANCE:.0%}, got {min(flops):,.0f} to "
            f"{max(flops):,.0f} per image; give a --model.dim divisible by 24"
        )


def write_summary(options: argparse.Namespace) -> None:
    """Writes OUT/ablation.md and OUT/ablation.svg from the finished runs.

    Raises:
        UserError: if there are none.
    """
    out: Path = options.out
    found = {
        study: [*experiments.rows(variants, options, study).values()]
        for study, variants in STUDIES.items()
        if variants[0].finished(out)
    }
    found = {study: compared for study, compared in found.items() if len(compared) > 1} or found
    if not found:
        raise UserError(f"{out}: expected finished runs of a study and its baseline, got none")
    parts = [f"# Ablation\n\n{experiments.ABOUT}"]
    for study, compared in found.items():
        parts += [f"## {study}\n", experiments.comparison(compared)]
    experiments.write(out / "ablation.md", "\n".join(parts))
    every = [row for compared in found.values() for row in compared]
    experiments.write(out / "ablation.svg", figure(every, by="study"))


if __name__ == "__main__":
    sys.exit(main())
