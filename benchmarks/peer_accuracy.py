"""The control: timm's ViT of the same shape, given a recipe's budget in vitral's own loop.

    python benchmarks/peer_accuracy.py RECIPE OUT [--data PATH] [--seeds 0 1 2]
        [--peers timm timm-own timm-rope timm-rope-own] [-- --section.key value ...]
    python benchmarks/peer_accuracy.py RECIPE OUT --dry-run | --summary | --ledger

Seed by seed, each contestant sees the same images in the same order and augmentation, in the same
batches, as often, under the same loss, schedule, moving average, precision and evaluation. What
differs is the model (timm_models.py says how: timm's own parts and initialisation) and what trains
it:

* `vitral`: the recipe as it is.
* `timm`, `timm-rope`: timm's plain and rotary ViT with the recipe's AdamW, clipping included, but
  timm's choice of what decays. The recipe's rate was chosen for vitral's model.
* `timm-own`, `timm-rope-own`: the same models with the rate, betas, decay and unclipped gradients
  that timm's ViT was made known with (DeiT). Read the better of the two.

So this asks what the model and the optimiser's settings give, all else equal; it is no run of
timm's train.py. By default that has SGD at 0.1 * batch / 256, which nobody trains ViTs with, and no
moving average, no clipping; it steps its schedule each epoch, not each step, warms up from a rate
above 0, drops each epoch's last images, computes in float32 or with float16, and crops and augments
by timm's own code. What the recipe says goes for all here: augmentation, loss, smoothing, moving
average, how long it warms up, where its cosine ends. vitral may run kernels of its own.

What follows `--` goes to every run. Seed by seed over all contestants, so that what was cut off has
whole rows; the same command goes on. After each run OUT/peer_accuracy.md and OUT/peer_accuracy.svg
are written anew: top-1 at the last step, never of the best validation.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import experiments
from ablate import Result, difference, result
from experiments import Experiment, Planned, Variant
from ledger import ROOT, Row, data_of, differences, flags, spread, summarise
from ledger import write as write_row
from ledger_figures import figure
from ledger_pages import KINDS, minutes
from timm_models import NAMES, own_settings

from vitral import recipes
from vitral.bench.peers import has_timm
from vitral.config import Config, UserError, flatten
from vitral.report.gather import Run

Finished = dict[Variant, dict[int, Run]]  # by contestant and seed

STUDY = "control"
OURS = Variant("vitral", "vitral")
PEERS = [name for peer in NAMES for name in (peer, f"{peer}-own")]
HEADER = (
    "contestant",
    "parameters",
    "MFLOPs an image",
    "seeds",
    "images seen",
    "top-1, EMA",
    "top-1, raw",
    "difference",
    "minutes",
)
ABOUT = """\
The same order, augmentation, images seen, batch, schedule, loss and evaluation for all. Top-1 in
per cent, of the weights at the last step. ± is the sample standard deviation over the seeds; of the
difference to vitral, seed by seed, the standard error of the mean. It is of the averaged weights
(EMA) where the recipe keeps them.
"""


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Runs the command; returns 0, 1 where runs failed, 2 for a mistake, or a signal's code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a recipe's name, or a YAML file")
    add("--peers", nargs="+", choices=PEERS, default=["timm", "timm-own"], metavar="PEER")
    add("--ledger", action="store_true", help="only write docs/results/RECIPE-CONTESTANT.json")
    options, words = experiments.parse(parser, arguments)
    return experiments.main("peer_accuracy", lambda: run(options, words, root))


def run(options: argparse.Namespace, words: Sequence[str], root: Path) -> int:
    """Does what the options say.

    Raises:
        UserError: without timm, for settings that timm's models cannot have, or for other settings
            than those of the runs in OUT.
    """
    out, recipe = options.out, options.recipe
    config = recipes.load(recipe, words)
    contestants = [OURS, *(peer(name, config) for name in dict.fromkeys(options.peers))]
    if options.ledger:
        write_ledger(out, Path(recipe).stem, root)
        return 0
    if options.summary:
        write_summary(out, Path(recipe).stem)
        return 0
    refuse(config)
    experiment = Experiment(out, recipe, tuple(words), curves=True)
    runs = [experiment.plan(found, seed) for seed in options.seeds for found in contestants]
    if options.dry_run:
        for line in (*experiments.listed(runs), *differing(runs)):
            print(line, flush=True)
        return 0
    return experiments.complete(runs, lambda _: write_summary(out, Path(recipe).stem))


def peer(name: str, config: Config) -> Variant:
    """A model of timm's, by the recipe's optimiser settings or, as NAME-own, by its own."""
    parts = name.removesuffix("-own")
    if name == parts:
        return Variant(name, name, parts=parts)
    optim = own_settings(config.optim, config.train.batch_size)
    was = flatten(config.optim)
    changed = {f"optim.{k}": v for k, v in flatten(optim).items() if v != was[k]}
    words = [word for setting, value in changed.items() for word in flags(setting, value)]
    return Variant(name, name, " ".join(words), parts)


def refuse(config: Config) -> None:
    """Raises UserError where timm's models cannot be trained, or not as vitral's is."""
    if not has_timm():
        raise UserError("timm: expected it installed, got none; pip install timm")
    if config.train.progressive:
        raise UserError(
            "train.progressive: expected none, as timm's models take images of one size, got "
            f"{config.train.progressive}; give a recipe without"
        )
    if config.train.init is not None:
        raise UserError(
            f"train.init: expected none, as timm's models take no weights of vitral's, got "
            f"{config.train.init}; give a recipe without"
        )


def differing(runs: Sequence[Planned]) -> Iterator[str]:
    """A line for each contestant: in what it differs from vitral's run."""
    for run in {run.variant.name: run for run in runs}.values():
        if run.variant != OURS:
            yield f"{run.variant.name} differs in {changes(run.config, runs[0].config)}"


def changes(config: Config, ours: Config) -> str:
    """What a peer differs in from vitral."""
    found = differences(config, ours).items()
    settings = (" ".join(flags(name, value)).removeprefix("--") for name, value in found)
    return ", ".join(["the model", "what decays", *settings])


def write_summary(out: Path, recipe: str) -> None:
    """Writes OUT/peer_accuracy.md and OUT/peer_accuracy.svg from the runs that are finished.

    Raises:
        UserError: if none of vitral is, or if they are on other data than each other.
    """
    found = finished(out)
    rows = [ledger_row(variant, runs, recipe) for variant, runs in found.items()]
    experiments.write(out / "peer_accuracy.md", "\n".join(sections(recipe, found, rows)))
    experiments.write(out / "peer_accuracy.svg", figure(rows))


def finished(out: Path) -> Finished:
    """The finished runs of each contestant, vitral first.

    Raises:
        UserError: as `write_summary` does.
    """
    variants = [OURS, *(Variant(name, name, parts=name.removesuffix("-own")) for name in PEERS)]
    found = {variant: runs for variant in variants if (runs := variant.finished(out))}
    if OURS not in found:
        raise UserError(f"{out}: expected a finished run of vitral, got none")
    data = {
        data_of(run.path).get("fingerprint") for runs in found.values() for run in runs.values()
    }
    if len(data) > 1:
        raise UserError(f"{out}: expected all runs on the same data, got others; give another OUT")
    return found


def ledger_row(variant: Variant, runs: dict[int, Run], recipe: str) -> Row:
    """The row of a contestant."""
    first = next(iter(runs.values()))
    row = summarise(
        [run.path for run in runs.values()],
        title=f"`{recipe}`" if variant == OURS else f"`{recipe}`, {variant.name}",
        study=STUDY,
        flops_per_image=first.environment["training_flops_per_image"] / 3,
    )
    if variant.parts:
        program = f"python benchmarks/variants.py {variant.parts}"
        row["command"] = row["command"].replace("vitral train", program, 1)
    return row


def write_ledger(out: Path, recipe: str, root: Path) -> None:
    """Writes a row of the ledger for each contestant that has finished runs."""
    for variant, runs in finished(out).items():
        path = root / "docs" / "results" / f"{recipe}-{variant.name}.json"
        write_row(ledger_row(variant, runs, recipe), path)
        print(path)


def sections(recipe: str, found: Finished, rows: Sequence[Row]) -> Iterator[str]:
    """The page in Markdown."""
    yield f"# The control: {recipe}\n\n{ABOUT}"
    ours, *others = results = [result(variant, runs) for variant, runs in found.items()]
    lines = [cells(ours, each, row) for each, row in zip(results, rows, strict=True)]
    yield experiments.table(HEADER, lines)
    yield "![Validation top-1 against images seen, and at the last step](peer_accuracy.svg)\n"
    configs = {variant: next(iter(runs.values())).config for variant, runs in found.items()}
    for each in others:
        differs = changes(configs[each.variant], configs[OURS])
        yield f"`{each.variant.name}` differs in {differs}.\n"


def cells(ours: Result, found: Result, row: Row) -> list[str]:
    """The cells of a contestant's line."""
    runs = row["runs"]
    scores = [[100 * run["top1"][kind] for run in runs if kind in run["top1"]] for kind in KINDS]
    return [
        found.variant.title,
        f"{found.parameters:,}",
        f"{found.flops / 1e6:,.2f}",
        ", ".join(map(str, found.top1)),
        f"{statistics.fmean(run['images'] for run in runs):,.0f}",
        *(spread(values) if values else "none" for values in scores),
        difference(ours, found),
        minutes([run["minutes"] for run in runs]),
    ]


if __name__ == "__main__":
    sys.exit(main())
