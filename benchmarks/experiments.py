"""Shared code of the experiments: trains several variants and seeds, and resumes them.

Each run has its own run directory, OUT/runs/VARIANT-seedN, and its own process, so that state in
memory, such as compiler caches, cannot affect another run. Finished runs are skipped, and
interrupted runs are resumed by vitral itself.
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
    "variant",
    "parameters",
    "MFLOPs per image",
    "seeds",
    "images seen",
    "top-1, EMA",
    "top-1, raw",
    "difference",
    "minutes",
)
ABOUT = """\
Top-1 in percent, of the weights at the last step. The headline score is in bold: that of the
averaged weights (EMA) if the recipe keeps them. ± is the sample standard deviation over the seeds.
Differences from the first row are computed seed by seed; their ± is the standard error of the mean.
With three seeds, a difference is significant at 95% only if it exceeds 4.3 standard errors. FLOPs
are the mean of a forward pass in training, where stochastic depth may skip work and image sizes may
grow.
"""


@dataclass(frozen=True)
class Variant:
    """A recipe with changes."""

    name: str
    """Name in the paths of its runs."""
    title: str
    """Name in tables."""
    words: str = ""
    """Changed settings, as on the command line."""
    parts: str = ""
    """Name for `variants.find`; empty for vitral's own parts."""

    def at(self, out: Path, seed: int) -> Path:
        """The run directory of a seed."""
        return out / "runs" / f"{self.name}-seed{seed}"

    def seeds(self, out: Path) -> list[int]:
        """The seeds of all runs in `out`, finished or not."""
        names = [path.parent.name for path in out.glob("runs/*/config.yaml")]
        found = (re.fullmatch(rf"{re.escape(self.name)}-seed(\d+)", name) for name in names)
        return sorted(int(match[1]) for match in found if match)

    def finished(self, out: Path) -> dict[int, Run]:
        """The finished runs by seed."""
        runs = {seed: read_run(self.at(out, seed)) for seed in self.seeds(out)}
        return {seed: run for seed, run in runs.items() if run.finished}


@dataclass(frozen=True)
class PlannedRun:
    """A run with its settings and command, finished or not."""

    variant: Variant
    path: Path
    config: Config
    command: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether the run directory contains a finished run."""
        return (self.path / "config.yaml").exists() and read_run(self.path).finished


@dataclass(frozen=True)
class Experiment:
    """Settings that all runs of an experiment share."""

    out: Path
    recipe: str
    words: tuple[str, ...]
    """Changed settings, as on the command line."""
    curves: bool = False
    """Whether to validate as often as the recipe does, instead of only at the last step."""

    def plan(self, variant: Variant, seed: int) -> PlannedRun:
        """Plans the run of a variant and a seed.

        Raises:
            UserError: if settings are invalid, or differ from those of the existing run.
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
            raise UserError(f"{reason}; use the original settings, or another OUT") from None
        own = [str(HERE / "variants.py"), variant.parts] if variant.parts else []
        program = own or ["-m", "vitral", "train"]
        return PlannedRun(variant, path, config, (sys.executable, *program, self.recipe, *words))


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, files: str | None = None
) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """Adds the common options and parses the arguments.

    Args:
        files: Path pattern of the ledger rows that the program writes, if any.

    Returns:
        The options, and the settings for every run.
    """
    add = parser.add_argument
    add("out", metavar="OUT", type=Path, help="directory for the runs, the table and the figure")
    add("--data", help="training data (default: that of the recipe)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--dry-run", action="store_true", help="only list the runs")
    add("--summary", action="store_true", help="only write the table and figure of finished runs")
    if files is not None:
        add("--ledger", action="store_true", help=f"only write {files}")
        add("--data-name", help="name of the data in tables and rows, including any re-encoding")
        add("--commit", help="commit of the training code (default: that of this checkout)")
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:end])
    data = [] if options.data is None else ["--data.path", options.data]
    return options, (*data, *words[end + 1 :])


def complete(runs: Sequence[PlannedRun], after: Callable[[PlannedRun], None]) -> int:
    """Trains the unfinished runs in sequence.

    A failed run does not prevent the others from being trained.

    Args:
        runs: Runs in the order of training.
        after: Called with each finished run, including those that were finished before.

    Returns:
        0, or 1 if a run failed.

    Raises:
        Interrupted: after a signal, once the current run has written its checkpoint.
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
        print(f"failed: {', '.join(failed)}; repeat the command to retry", file=sys.stderr)
    return 1 if failed else 0


def call(command: Sequence[str]) -> int:
    """Runs a command, forwards signals to it, and returns its exit code.

    Raises:
        Interrupted: after a signal, once the command has ended.
    """
    received: list[int] = []
    waiting: list[int] = []  # not sent yet; each is sent once, as a second one ends the child
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
        # In a new session, as a terminal would send Ctrl-C to the child a second time.
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
    """A line for each run with its parameters, FLOPs, steps and state."""
    width = max(len(run.path.name) for run in runs)
    for run in runs:
        train = run.config.train
        _, images = counted(run.config.data, run.config.model.image_size)
        steps = Order(train.seed, images, train.batch_size).end_of_epoch(train.epochs)
        parameters, flops = size(run)
        state = "started" if (run.path / "config.yaml").exists() else "not started"
        yield (
            f"{run.path.name:{width}}  {parameters / 1e6:8.3f} M parameters  "
            f"{flops / 1e6:10,.2f} MFLOPs per image  {steps:8,} steps  "
            f"{'finished' if run.finished else state}"
        )


def size(run: PlannedRun) -> tuple[int, float]:
    """Number of parameters, and FLOPs of a forward pass of one image."""
    config = run.config
    classes, _ = counted(config.data, config.model.image_size)
    with torch.device("meta"):
        model = find(run.variant.parts).model(config.model, classes).eval()
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, forward_flops(model, config.model.image_size)


@functools.cache
def counted(data: DataConfig, image_size: int) -> tuple[int, int]:
    """Number of classes and of training images, which do not depend on the seed."""
    dataset = open_dataset(data, image_size, seed=0)
    assert dataset.train is not None
    return len(dataset.classes), len(dataset.train)


def rows(variants: Sequence[Variant], options: argparse.Namespace, study: str) -> dict[str, Row]:
    """The ledger row of each variant with finished runs, by name."""
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
                # The summary in OUT does not show the commit, and needs no git checkout.
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
    """A Markdown table that compares rows with the first one, seed by seed."""
    return ledger_pages.table(HEADER, [cells(found[0], row) for row in found]) + "\n"


def cells(base: Row, row: Row) -> list[str]:
    """The cells of a row."""
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
    """Mean and standard error of the difference over the common seeds, in percentage points."""
    first, second = (
        {run["seed"]: top1 for run, top1 in zip(row["runs"], headline_top1(row), strict=True)}
        for row in (base, other)
    )
    differences = [second[seed] - first[seed] for seed in second if seed in first]
    if other is base or not differences:
        return ""
    mean = f"{statistics.fmean(differences):+.2f}"
    count = len(differences)
    error = statistics.stdev(differences) / math.sqrt(count) if count > 1 else None
    return mean if error is None else f"{mean} ± {error:.2f}"


def write(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path) as file:
        file.write_text(text, encoding="utf-8")
