"""The control: timm's ViT of the same shape, given a recipe's budget in vitral's own loop.

    python benchmarks/peer_accuracy.py RECIPE OUT [--data PATH] [--seeds 0 1 2]
        [--peers timm timm-own timm-rope timm-rope-own folded] [-- --section.key value ...]
    python benchmarks/peer_accuracy.py RECIPE OUT --dry-run | --summary | --ledger

Seed by seed, each contestant sees the same images in the same order and augmentation, in the same
batches, as often, under the same loss, schedule, moving average, precision and evaluation. What
differs is the model (timm_models.py says how: timm's own parts and initialisation) and what trains
it:

* `vitral`: the recipe as it is.
* `timm`, `timm-rope`: timm's plain and rotary ViT with the recipe's optimiser, clipping included,
  but timm's choice of what decays. The recipe's rate was chosen for vitral's model.
* `timm-own`, `timm-rope-own`: the same models with AdamW at the rate, betas and decay, unclipped,
  that timm's ViT was made known with (DeiT). Read the better of the two.

So this asks what the model and the optimiser's settings give, all else equal; it is no run of
timm's train.py. By default that has SGD at 0.1 * batch / 256, which nobody trains ViTs with, and no
moving average, no clipping; it steps its schedule each epoch, not each step, warms up from a rate
above 0, drops each epoch's last images, computes in float32 or with float16, and crops and augments
by timm's own code. What the recipe says goes for all here: augmentation, loss, smoothing, moving
average, how long it warms up, where its cosine ends. vitral may run kernels of its own.

With `train.init`, the directory of a model imported from timm, it is fine-tuning that is compared:

* `vitral`: the import.
* `timm`: timm's model of that name, with its own weights, a new head of zeros, and timm's choice of
  what decays. The file DIR.safetensors next to the directory DIR is loaded, else downloaded.
* `folded`: the import, with LayerScale multiplied into the weights before it.

What follows `--` goes to every run. Seed by seed over all contestants, so that what was cut off has
whole rows; the same command goes on. After each run OUT/peer_accuracy.md and OUT/peer_accuracy.svg
are written anew: top-1 at the last step, never of the best validation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import experiments
from experiments import Experiment, PlannedRun, Variant
from ledger_figures import figure
from ledger_rows import ROOT, Row, data_of, differences, flags
from timm_models import NAMES, own_settings
from variants import exit_code

from vitral import weights
from vitral.bench.peers import has_timm
from vitral.config import Config, flatten
from vitral.errors import UserError
from vitral.weights import public

VITRAL = Variant("vitral", "vitral")
TUNED = ["timm", "folded"]  # of imported weights
PEERS = [*(name for peer in NAMES for name in (peer, f"{peer}-own")), "folded"]
CONTESTANTS = [VITRAL, *(Variant(name, name, parts=name.removesuffix("-own")) for name in PEERS)]
ABOUT = """\
The same order, augmentation, images seen, batch, schedule, loss and evaluation for all.

"""


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Runs the command; returns 0, 1 where runs failed, 2 for a mistake, or a signal's code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a recipe's name, or a YAML file")
    add("--peers", nargs="+", choices=PEERS, metavar="PEER", help="else the first two that fit")
    options, words = experiments.parse(parser, arguments, "docs/results/RECIPE-CONTESTANT.json")
    return exit_code("peer_accuracy", lambda: run(options, words, root))


def run(options: argparse.Namespace, words: Sequence[str], root: Path) -> int:
    """Does what the options say.

    Raises:
        UserError: without timm, for settings that timm's models cannot have, or for other settings
            than those of the runs in OUT.
    """
    recipe, name = options.recipe, Path(options.recipe).stem
    if options.ledger:
        found = rows(options, name)
        tuned = found[VITRAL.name]["study"] == "finetune"
        experiments.write_ledger("finetune" if tuned else name, found, root)
        return 0
    if options.summary:
        write_summary(options, name)
        return 0
    config = weights.load_settings(recipe, words)
    fitting = TUNED if config.train.init else PEERS[:-1]
    peers = [*dict.fromkeys(options.peers or fitting[:2])]
    check_peers(config, peers, fitting)
    contestants = [VITRAL, *(peer(name, config) for name in peers)]
    experiment = Experiment(options.out, recipe, tuple(words), curves=True)
    runs = [experiment.plan(found, seed) for seed in options.seeds for found in contestants]
    if options.dry_run:
        for line in (*experiments.listed(runs), *describe_differences(runs)):
            print(line, flush=True)
        return 0
    return experiments.complete(runs, lambda _: write_summary(options, name))


def peer(name: str, config: Config) -> Variant:
    """A model of timm's, by the recipe's optimizer settings or, as NAME-own, by its own."""
    parts = name.removesuffix("-own")
    if name == "timm" and config.train.init:
        parts = weights.read_description(config.train.init)[1].source
        return Variant(name, name, parts=parts)
    if name == parts:
        return Variant(name, name, parts=parts)
    optim = own_settings(config.optim, config.train.batch_size)
    was = flatten(config.optim)
    changed = {f"optim.{k}": v for k, v in flatten(optim).items() if v != was[k]}
    words = [word for setting, value in changed.items() for word in flags(setting, value)]
    return Variant(name, name, " ".join(words), parts)


def check_peers(config: Config, peers: Sequence[str], fitting: Sequence[str]) -> None:
    """Raises UserError where the peers cannot be trained, or not as vitral's model is."""
    if not has_timm():
        raise UserError("timm: expected it installed, got none; pip install timm")
    if config.train.progressive:
        raise UserError(
            "train.progressive: expected none, as timm's models take images of one size, got "
            f"{config.train.progressive}; give a recipe without"
        )
    init = config.train.init
    if init and not weights.read_description(init)[1].source.startswith(public.PREFIX):
        raise UserError(
            f"train.init: expected weights imported from timm, got {init}; make some by "
            "`vitral import timm:NAME DIR`"
        )
    if others := [name for name in peers if name not in fitting]:
        raise UserError(
            f"peers: expected some of {', '.join(fitting)} {'with' if init else 'without'} "
            f"train.init, got {others[0]}"
        )


def describe_differences(runs: Sequence[PlannedRun]) -> Iterator[str]:
    """A line for each contestant: in what it differs from vitral's run."""
    for run in {run.variant.name: run for run in runs}.values():
        if run.variant != VITRAL:
            yield describe_difference(run.variant.name, run.config, runs[0].config)


def describe_difference(name: str, config: Config, ours: Config) -> str:
    """In what a peer differs from vitral."""
    found = differences(config, ours).items()
    settings = (" ".join(flags(name, value)).removeprefix("--") for name, value in found)
    model = ["LayerScale"] if name == "folded" else ["the model", "what decays"]
    return f"{name} differs in {', '.join([*model, *settings])}"


def write_summary(options: argparse.Namespace, recipe: str) -> None:
    """Writes OUT/peer_accuracy.md and OUT/peer_accuracy.svg from the runs that are finished.

    Raises:
        UserError: if none of vitral is, or if they are on other data than each other.
    """
    found = rows(options, recipe)
    compared = [*found.values()]
    experiments.write(options.out / "peer_accuracy.svg", figure(compared))
    parts = [f"# The control: {recipe}\n\n{ABOUT}{experiments.ABOUT}"]
    parts += [experiments.comparison(compared)]
    parts += ["![Top-1 at the last step](peer_accuracy.svg)\n"]
    finished = {variant.name: [*variant.finished(options.out).values()] for variant in CONTESTANTS}
    ours, *others = ((name, runs[0].config) for name, runs in finished.items() if runs)
    parts += [f"{describe_difference(name, config, ours[1])}.\n" for name, config in others]
    experiments.write(options.out / "peer_accuracy.md", "\n".join(parts))


def rows(options: argparse.Namespace, recipe: str) -> dict[str, Row]:
    """The ledger's row of each contestant that has finished runs, vitral first.

    Raises:
        UserError: as `write_summary` does.
    """
    found = experiments.rows(CONTESTANTS, options, "control")
    if VITRAL.name not in found:
        raise UserError(f"{options.out}: expected a finished run of vitral, got none")
    known: dict[int, str] = {}
    for variant in CONTESTANTS:
        for seed, run in variant.finished(options.out).items():
            data = data_of(run.path).get("fingerprint", "")
            if known.setdefault(seed, data) != data:
                raise UserError(
                    f"{run.path}: expected the data of the other runs of its seed, got others; "
                    "give another OUT"
                )
    for name, row in found.items():
        if "train.init" in row["config"]:
            row["study"] = "finetune"
        row["title"] = f"`{recipe}`" if name == VITRAL.name else f"`{recipe}`, {name}"
    return found


if __name__ == "__main__":
    sys.exit(main())
