"""Trains timm's ViT of the same shape as a control, with a recipe's budget in vitral's own loop.

    python benchmarks/peer_accuracy.py RECIPE OUT [--data PATH] [--seeds 0 1 2]
        [--peers timm timm-own timm-rope timm-rope-own folded] [-- --section.key value ...]
    python benchmarks/peer_accuracy.py RECIPE OUT --dry-run | --summary | --ledger

For each seed, all contestants see the same images in the same order, augmentation and batches, for
the same number of epochs, with the same loss, schedule, moving average, precision and evaluation.
They differ in the model, which has timm's own parts and initialization (see timm_models.py), and in
the optimizer:

* `vitral`: the recipe, unchanged.
* `timm`, `timm-rope`: timm's plain and rotary ViT, with the optimizer and gradient clipping of the
  recipe, but timm's choice of decayed parameters. The recipe's learning rate was selected for
  vitral's model.
* `timm-own`, `timm-rope-own`: the same models with AdamW and the learning rate, betas and weight
  decay that DeiT introduced for timm's ViT, without clipping. Compare with the better of the two.

This measures the effect of the model and the optimizer settings with everything else equal. It does
not reproduce timm's train.py, which by default uses SGD at 0.1 * batch / 256 (unusual for ViTs), no
moving average and no clipping. timm's script also updates the schedule per epoch instead of per
step, warms up from a learning rate above 0, drops the last images of each epoch, computes in
float32 or with float16, and crops and augments with its own code. Here, the recipe's augmentation,
loss, label smoothing, moving average, warmup and end of the cosine apply to all contestants. vitral
may use its own kernels.

If `train.init` is the directory of a model imported from timm, fine-tuning is compared:

* `vitral`: the import.
* `timm`: timm's model of that name with its own weights, a new head of zeros, and timm's choice of
  decayed parameters. The weights are read from DIR.safetensors next to the directory DIR, or
  downloaded if there is no such file.
* `folded`: the import, with LayerScale multiplied into the preceding weights.

Settings after `--` apply to every run. All contestants are trained with one seed before the next
seed starts, so an interrupted experiment has complete seeds. Repeat the command to resume it. Each
finished run updates OUT/peer_accuracy.md and OUT/peer_accuracy.svg, which report top-1 at the last
step, never of the best validation.
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
TUNED = ["timm", "folded"]  # for imported weights
PEERS = [*(name for peer in NAMES for name in (peer, f"{peer}-own")), "folded"]
CONTESTANTS = [VITRAL, *(Variant(name, name, parts=name.removesuffix("-own")) for name in PEERS)]
ABOUT = """\
All contestants have the same order, augmentation, images seen, batch size, schedule, loss and
evaluation.

"""


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Runs the command; returns 0, 1 if a run failed, 2 for a user error, or a signal's code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a recipe's name, or a YAML file")
    add("--peers", nargs="+", choices=PEERS, metavar="PEER", help="default: the first two that fit")
    options, words = experiments.parse(parser, arguments, "docs/results/RECIPE-CONTESTANT.json")
    return exit_code("peer_accuracy", lambda: run(options, words, root))


def run(options: argparse.Namespace, words: Sequence[str], root: Path) -> int:
    """Executes the selected action.

    Raises:
        UserError: if timm is missing, if timm's models do not support the settings, or if the
            settings differ from those of the runs in OUT.
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
    """A timm model with the optimizer settings of the recipe, or with its own for NAME-own."""
    parts = name.removesuffix("-own")
    if name == "timm" and config.train.init:
        parts = weights.read_description(config.train.init)[1].source
        return Variant(name, name, parts=parts)
    if name == parts:
        return Variant(name, name, parts=parts)
    optim = own_settings(config.optim, config.train.batch_size)
    old = flatten(config.optim)
    changed = {f"optim.{k}": v for k, v in flatten(optim).items() if v != old[k]}
    words = [word for setting, value in changed.items() for word in flags(setting, value)]
    return Variant(name, name, " ".join(words), parts)


def check_peers(config: Config, peers: Sequence[str], fitting: Sequence[str]) -> None:
    """Raises UserError if the peers cannot be trained like vitral's model."""
    if not has_timm():
        raise UserError("timm: expected it installed, got none; pip install timm")
    if config.train.progressive:
        raise UserError(
            "train.progressive: expected none, as timm's models support only one image size, got "
            f"{config.train.progressive}; use a recipe without it"
        )
    init = config.train.init
    if init and not weights.read_description(init)[1].source.startswith(public.PREFIX):
        raise UserError(
            f"train.init: expected weights imported from timm, got {init}; import some with "
            "`vitral import timm:NAME DIR`"
        )
    if others := [name for name in peers if name not in fitting]:
        raise UserError(
            f"peers: expected some of {', '.join(fitting)} {'with' if init else 'without'} "
            f"train.init, got {others[0]}"
        )


def describe_differences(runs: Sequence[PlannedRun]) -> Iterator[str]:
    """A line for each peer that lists its differences from vitral's run."""
    for run in {run.variant.name: run for run in runs}.values():
        if run.variant != VITRAL:
            yield describe_difference(run.variant.name, run.config, runs[0].config)


def describe_difference(name: str, config: Config, base: Config) -> str:
    """The differences of a peer from vitral."""
    found = differences(config, base).items()
    settings = (" ".join(flags(name, value)).removeprefix("--") for name, value in found)
    model = ["LayerScale"] if name == "folded" else ["the model", "the decayed parameters"]
    return f"{name} differs in {', '.join([*model, *settings])}"


def write_summary(options: argparse.Namespace, recipe: str) -> None:
    """Writes OUT/peer_accuracy.md and OUT/peer_accuracy.svg from the finished runs.

    Raises:
        UserError: if there is no run of vitral, or if the runs are on different data.
    """
    found = rows(options, recipe)
    compared = [*found.values()]
    experiments.write(options.out / "peer_accuracy.svg", figure(compared))
    parts = [f"# Comparison with timm: {recipe}\n\n{ABOUT}{experiments.ABOUT}"]
    parts += [experiments.comparison(compared)]
    parts += ["![Top-1 at the last step](peer_accuracy.svg)\n"]
    finished = {variant.name: [*variant.finished(options.out).values()] for variant in CONTESTANTS}
    (_, base), *others = ((name, runs[0].config) for name, runs in finished.items() if runs)
    parts += [f"{describe_difference(name, config, base)}.\n" for name, config in others]
    experiments.write(options.out / "peer_accuracy.md", "\n".join(parts))


def rows(options: argparse.Namespace, recipe: str) -> dict[str, Row]:
    """The ledger row of each contestant with finished runs, vitral first.

    Raises:
        UserError: as in `write_summary`.
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
                    f"{run.path}: expected the data of the other runs of its seed, got other data; "
                    "use another OUT"
                )
    for name, row in found.items():
        if "train.init" in row["config"]:
            row["study"] = "finetune"
        row["title"] = f"`{recipe}`" if name == VITRAL.name else f"`{recipe}`, {name}"
    return found


if __name__ == "__main__":
    sys.exit(main())
