"""What the experiments have in common: runs of several variants and seeds, and going on with them.

Each run is a run folder of vitral, OUT/runs/VARIANT-seedN, trained by a process of its own: what
one leaves in memory, a compiler's caches above all, cannot touch another. What is finished is not
done again, and what was cut off goes on, by the means of vitral itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import ledger_pages
import ledger_rows
import torch
from ledger_rows import Row, headline_top1, held_out, summarize
from variants import find

from vitral.config import Config, DataConfig
from vitral.data.formats import open_dataset
from vitral.data.sampling import Order
from vitral.errors import UserError
from vitral.model import forward_flops
from vitral.rundir import Run, RunDir, read_run
from vitral.storage import replacing
from vitral.training import Interrupted
from vitral.training.resume import check_settings
from vitral.weights import load_settings

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
HERE = Path(__file__).parent
HEADER = (
    "what",
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
Top-1 in per cent, of the weights at the last step; a row is read by the figure in bold, the
averaged weights (EMA) where the recipe keeps them. ± is the sample standard deviation over the
seeds; of the difference to the first row, seed by seed, the standard error of the mean: of three
seeds, only 4.3 of these errors are beyond chance at 95%. FLOPs are the mean of a forward pass in
training, where stochastic depth may skip work and images may grow.
"""


@dataclass(frozen=True)
class Variant:
    """What is compared: a recipe with some changes."""

    name: str
    """Of its runs' folders."""
    title: str
    """What tables call it."""
    words: str = ""
    """Settings, as on the command line."""
    parts: str = ""
    """By the name of `variants.find`; none: vitral's own."""

    def at(self, out: Path, seed: int) -> Path:
        """The run folder of a seed."""
        return out / "runs" / f"{self.name}-seed{seed}"

    def seeds(self, out: Path) -> list[int]:
        """Of the runs that there are, finished or not."""
        names = [path.parent.name for path in out.glob("runs/*/config.yaml")]
        found = (re.fullmatch(rf"{re.escape(self.name)}-seed(\d+)", name) for name in names)
        return sorted(int(match[1]) for match in found if match)

    def finished(self, out: Path) -> dict[int, Run]:
        """The runs that are finished, by seed."""
        runs = {seed: read_run(self.at(out, seed)) for seed in self.seeds(out)}
        return {seed: run for seed, run in runs.items() if run.finished}


@dataclass(frozen=True)
class PlannedRun:
    """A run to be made, or made already."""

    variant: Variant
    path: Path
    config: Config
    command: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether it is."""
        return (self.path / "config.yaml").exists() and read_run(self.path).finished


@dataclass(frozen=True)
class Experiment:
    """What all runs of an experiment share."""

    out: Path
    recipe: str
    words: tuple[str, ...]
    """Settings of every run."""
    curves: bool = False
    """Whether to validate as often as the recipe says; else at the last step alone."""

    def plan(self, variant: Variant, seed: int) -> PlannedRun:
        """A run.

        Raises:
            UserError: for settings that are wrong, or other than those of the run that is there.
        """
        path = variant.at(self.out, seed)
        words = [*self.words, *variant.words.split()]
        words += ["--train.seed", str(seed), "--train.out", str(path)]
        config = load_settings(self.recipe, words)
        if not self.curves:
            train = dataclasses.replace(config.train, eval_every=config.train.epochs)
            config = dataclasses.replace(config, train=train)
            words += ["--train.eval-every", str(train.eval_every)]
        try:
            check_settings(RunDir(path), config)
        except UserError as error:
            reason = str(error).partition(";")[0]
            raise UserError(f"{reason}; give what it began with, or another OUT") from None
        own = [str(HERE / "variants.py"), variant.parts] if variant.parts else []
        program = own or ["-m", "vitral", "train"]
        return PlannedRun(variant, path, config, (sys.executable, *program, self.recipe, *words))


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, files: str | None = None
) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """The options, with those that all experiments have, and the settings for every run.

    Args:
        files: the rows that the program writes for the ledger, if it does.
    """
    add = parser.add_argument
    add("out", metavar="OUT", type=Path, help="folder of the runs, the table and the figure")
    add("--data", help="what to train on; else the recipe's")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--dry-run", action="store_true", help="only list the runs")
    add("--summary", action="store_true", help="only write the table and figure of what is there")
    if files is not None:
        add("--ledger", action="store_true", help=f"only write {files}")
        add("--data-name", help="what tables and rows call the data, a re-encoding by that word")
        add("--commit", help="of the code that trained; else that of this checkout")
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:end])
    data = [] if options.data is None else ["--data.path", options.data]
    return options, (*data, *words[end + 1 :])


def complete(runs: Sequence[PlannedRun], after: Callable[[PlannedRun], None]) -> int:
    """Trains what is not finished, one run after the other.

    Args:
        runs: in the order in which they are to be trained.
        after: what to do with each once it is finished, and with those that were.

    Returns:
        0, or 1 where runs failed, which does not keep others from being trained.

    Raises:
        Interrupted: by a signal, when the run in progress has written its checkpoint.
    """
    failed = []
    for number, run in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {run.path}", flush=True)
        code = 0 if run.finished else call(run.command)
        if code:
            failed.append(run.path.name)
            print(f"{run.path} failed with exit code {code}", file=sys.stderr, flush=True)
        else:
            after(run)
    if failed:
        print(f"failed: {', '.join(failed)}; the same command tries again", file=sys.stderr)
    return 1 if failed else 0


def call(command: Sequence[str]) -> int:
    """Runs a command, hands signals on to it, and returns its exit code.

    Raises:
        Interrupted: after a signal, when the command has ended.
    """
    received: list[int] = []
    waiting: list[int] = []  # until there is a child; each is sent once, as twice ends it at once
    child: subprocess.Popen[bytes] | None = None

    def forward_signal(number: int, _: FrameType | None) -> None:
        received.append(number)
        waiting.append(number)
        send()

    def send() -> None:
        while child is not None and waiting:
            child.send_signal(waiting.pop())

    before = {number: signal.signal(number, forward_signal) for number in SIGNALS}
    try:
        # In a session of its own: a terminal's Ctrl-C would reach it twice, and twice ends at once.
        child = subprocess.Popen(command, start_new_session=True)
        send()
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise Interrupted(received[0])
    return code


def listed(runs: Sequence[PlannedRun]) -> Iterator[str]:
    """A line for each run: parameters, FLOPs, steps, and whether it is done."""
    width = max(len(run.path.name) for run in runs)
    for run in runs:
        train = run.config.train
        _, images = counted(run.config.data, run.config.model.image_size)
        steps = Order(train.seed, images, train.batch_size).end_of_epoch(train.epochs)
        parameters, flops = size(run)
        state = "begun" if (run.path / "config.yaml").exists() else "to do"
        yield (
            f"{run.path.name:{width}}  {parameters / 1e6:8.3f} M parameters  "
            f"{flops / 1e6:10,.2f} MFLOPs an image  {steps:8,} steps  "
            f"{'finished' if run.finished else state}"
        )


def size(run: PlannedRun) -> tuple[int, float]:
    """Parameters, and FLOPs of an image's forward pass."""
    config = run.config
    classes, _ = counted(config.data, config.model.image_size)
    with torch.device("meta"):
        model = find(run.variant.parts).model(config.model, classes).eval()
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, forward_flops(model, config.model.image_size)


@functools.cache
def counted(data: DataConfig, image_size: int) -> tuple[int, int]:
    """Classes, and images to train on, which are as many whatever the seed."""
    dataset = open_dataset(data, image_size, seed=0)
    assert dataset.train is not None
    return len(dataset.classes), len(dataset.train)


def rows(variants: Sequence[Variant], options: argparse.Namespace, study: str) -> dict[str, Row]:
    """The ledger's row of each variant that has finished runs, by its name."""
    found = {}
    for variant in variants:
        if runs := [*variant.finished(options.out).values()]:
            data = runs[0].config.data
            name = options.data_name or Path(data.path).name
            if held_out(runs[0]):
                name += f", {data.val_fraction:.0%} of the training images held out"
            found[variant.name] = summarize(
                [run.path for run in runs],
                title=variant.title,
                data=name,
                study=study,
                # Pages of OUT say nothing of the code, and are written without git, too.
                commit=options.commit if options.ledger else "",
            )
    return found


def write_ledger(prefix: str, found: dict[str, Row], root: Path) -> None:
    """Writes each row to docs/results/PREFIX-NAME.json."""
    for name, row in found.items():
        path = root / "docs" / "results" / f"{prefix}-{name}.json"
        ledger_rows.write(row, path)
        print(path)


def comparison(found: Sequence[Row]) -> str:
    """A table in Markdown of rows that are compared with the first, seed by seed."""
    return ledger_pages.table(HEADER, [cells(found[0], row) for row in found]) + "\n"


def cells(base: Row, row: Row) -> list[str]:
    """A row's cells."""
    runs = row["runs"]
    flops = sum(run["flops"] for run in runs) / sum(run["images"] for run in runs) / 3
    return [
        row["title"],
        f"{row['parameters']:,}",
        f"{flops / 1e6:,.2f}",
        ", ".join(str(run["seed"]) for run in runs),
        ledger_pages.images(row),
        *ledger_pages.scores(row),
        difference(base, row),
        ledger_pages.minutes(row),
    ]


def difference(base: Row, other: Row) -> str:
    """The mean difference over the seeds that both have, and its standard error, in points."""
    ours, theirs = (
        {run["seed"]: top1 for run, top1 in zip(row["runs"], headline_top1(row), strict=True)}
        for row in (base, other)
    )
    pairs = [theirs[seed] - ours[seed] for seed in theirs if seed in ours]
    if other is base or not pairs:
        return ""
    mean = f"{statistics.fmean(pairs):+.2f}"
    error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
    return mean if error is None else f"{mean} ± {error:.2f}"


def write(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with replacing(path) as file:
        file.write_text(text, encoding="utf-8")
