"""Rows of the ledger of results: what finished runs make, read and written as JSON."""

from __future__ import annotations

import json
import re
import shlex
import statistics
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from vitral import settings
from vitral.config import CHANGEABLE, Config, ViTConfig, flatten
from vitral.errors import UserError
from vitral.model import count_flops
from vitral.rundir import Run, read_run
from vitral.storage import replacing

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
MAX_POINTS = 100  # of a curve, at most
KINDS = {"raw": "val", "ema": "ema"}  # weights, and what the metrics log calls them
# Settings that runs of one row may differ in; the data are compared by their fingerprint.
VARIABLE = CHANGEABLE | {"train.seed"}
PATHS = {"data.path", "train.init"}
OMITTED = VARIABLE - PATHS | {"train.time_budget"}  # that no row tells; the epochs are told


def summarize(
    runs: Sequence[Path],
    *,
    title: str | None = None,
    data: str | None = None,
    study: str | None = None,
    note: str = "",
    commit: str | None = None,
) -> Row:
    """The row that finished runs make, a seed each.

    Args:
        runs: run folders; weights and checkpoints may be missing, and then the data are not
            compared.
        title: what the row is; None takes the recipe's name.
        data: what it was measured on; None takes the last name of `data.path`.
        study: the experiment that it belongs to; None for a headline row.
        commit: of the code that trained; None takes that of this checkout.

    Raises:
        UserError: for an unfinished run, or runs that differ in more than their seed.
    """
    found = [read_run(path) for path in runs]
    for run in found:
        check_finished(run)
    known = [data_of(run.path) for run in found]
    check_same_row(found, [facts.get("fingerprint") for facts in known])
    config = found[0].config
    recipe, changes = nearest_recipe(config)
    classes = next((len(facts["classes"]) for facts in known if facts), None)
    return {
        "title": title or f"`{recipe}`",
        "data": data or Path(config.data.path).name,
        "study": study,
        "note": note,
        "commit": head(ROOT) if commit is None else commit,
        "command": train_command(recipe, changes, found[0].environment.get("parts", "")),
        "parameters": found[0].environment["parameters"],
        "hardware": join_distinct(hardware(run.environment) for run in found),
        "versions": {
            "python": join_distinct(run.environment["python"] for run in found),
            "torch": join_distinct(run.environment["packages"]["torch"] for run in found),
            "vitral": join_distinct(run.environment["packages"]["vitral"] for run in found),
        },
        "config": differences(config, Config()),
        "runs": sorted(
            (entry(run, training_flops(run, classes)) for run in found),
            key=lambda run: run["seed"],
        ),
    }


def write(row: Row, path: Path) -> None:
    """Writes a row as JSON with sorted keys: the same row gives the same bytes."""
    text = json.dumps(row, indent=1, sort_keys=True, ensure_ascii=False)
    # Numbers of a list on one line. No string of JSON holds a line break, so none is touched.
    text = re.sub(
        r'\[\n[^][{}"]*\]',
        lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"),
        text,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write_text(text + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Row]:
    """The rows of a folder by name, numbers in names in their order.

    Raises:
        UserError: for a file that is no JSON.
    """
    rows = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: by_number(path.stem)):
        try:
            rows[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: expected JSON, got {error}; add the row again") from None
    return rows


def by_number(name: str) -> list[str | int]:
    """A key that sorts 4 before 16."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean and sample standard deviation, as 94.12 ± 0.08; of one value, the value alone."""
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def headline_top1(row: Row) -> list[float]:
    """The top-1, in per cent, of each seed that a row is quoted with: the EMA's where kept."""
    return [100 * run["top1"].get("ema", run["top1"]["raw"]) for run in row["runs"]]


def check_finished(run: Run) -> None:
    """Raises UserError for a run whose last step is not taken and validated."""
    if not run.finished:
        epoch = run.rows[-1]["epoch"] if run.rows else 0
        raise UserError(
            f"{run.path}: expected a finished run of {run.config.train.epochs} epochs, got "
            f"{epoch:.3g}; the command that began it goes on"
        )
    if not run.environment:
        raise UserError(
            f"{run.path}: expected env.json, got none that can be read; restore it, or train again"
        )


def check_same_row(runs: Sequence[Run], fingerprints: Sequence[str | None]) -> None:
    """Raises UserError for runs that are not seeds of one row."""
    first, seeds = runs[0], set()
    expected = settings_of(first)
    for run, fingerprint in zip(runs, fingerprints, strict=True):
        for name, value in settings_of(run).items():
            if name not in VARIABLE and value != expected[name]:
                raise UserError(
                    f"{run.path}: {name}: expected {expected[name]} as in {first.path}, got "
                    f"{value}; make another row of it"
                )
        # What is held out hangs on the seed, and the fingerprint on what is held out.
        comparable = None not in (fingerprint, fingerprints[0]) and not held_out(run)
        if comparable and fingerprint != fingerprints[0]:
            raise UserError(
                f"{run.path}: expected the data of {first.path}, got others; make another row of it"
            )
        seed = run.config.train.seed
        if seed in seeds:
            raise UserError(
                f"{run.path}: expected another seed than those before it, got {seed} again; "
                "name each seed's run once"
            )
        seeds.add(seed)


def settings_of(run: Run) -> dict[str, Any]:
    """Its settings by name, and the parts that are not vitral's own."""
    return {**flatten(run.config), "parts": run.environment.get("parts", "")}


def held_out(run: Run) -> bool:
    """Whether it was validated on a part of the training images, drawn by its seed."""
    return run.environment.get("held_out", run.config.data.hold_out)


def data_of(run: Path) -> dict[str, Any]:
    """What weights or a checkpoint know of the data, "classes" and "fingerprint"; else nothing."""
    places = (run / "weights" / "last" / "config.json", *run.glob("checkpoints/step_*/state.json"))
    for path in places:
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    return {}


def training_flops(run: Run, classes: int | None) -> float:
    """Floating-point operations of the whole training: three forward passes an image.

    Image sizes are those that the settings give each step. Validation is not counted.
    """
    config, steps = run.config, int(run.rows[-1]["step"])
    steps_by_size = Counter(config.image_size_at(step / steps) for step in range(steps))
    # What the run has counted itself is true of other models, too.
    known = {config.model.image_size: run.environment["training_flops_per_image"]}
    total = 0.0
    for image_size, count in steps_by_size.items():
        if image_size not in known and classes is None:
            raise UserError(
                f"{run.path}: expected weights or a checkpoint, which know the number of classes, "
                "got neither; restore one, or train without train.progressive"
            )
        each = known.get(image_size) or 3 * forward_flops(config.model, classes or 0, image_size)
        total += each * count * config.train.batch_size
    return total


@cache
def forward_flops(config: ViTConfig, classes: int, image_size: int) -> float:
    """Of an image in training, counted once for all seeds."""
    return count_flops(config, classes, image_size, training=True)


def entry(run: Run, flops: float) -> Row:
    """What one seed came to at its last step."""
    last = run.rows[-1]
    kept = {name: kind for name, kind in KINDS.items() if f"{kind}_top1" in last}
    scores = {
        measure: {name: last[f"{kind}_{measure}"] for name, kind in kept.items()}
        for measure in ("top1", "top5", "loss")
    }
    return {
        "seed": run.config.train.seed,
        "steps": last["step"],
        "images": last["images"],
        "epochs": round(last["epoch"], 3),
        "flops": flops,
        "minutes": round(last["seconds"] / 60, 2),
        "top1": scores["top1"],
        "top5": scores["top5"],
        "val_loss": scores["loss"],
        "memory_gb": max(row["memory_gb"] for row in run.rows),
        "images_per_second": statistics.median(row["images_per_second"] for row in run.rows),
        "curve": curve(run),
    }


def curve(run: Run) -> list[list[float | None]]:
    """Images seen, training loss, raw top-1 and the EMA's of each validation, or of 100 of them."""
    rows = run.validations
    if len(rows) > MAX_POINTS:
        rows = [rows[round(i * (len(rows) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]
    names = ("loss", "val_top1", "ema_top1")
    return [
        [row["images"], *(round(row[name], 5) if name in row else None for name in names)]
        for row in rows
    ]


def nearest_recipe(config: Config) -> tuple[str, dict[str, Any]]:
    """The recipe with the fewest other settings, and these settings as they are in `config`."""
    epochs, found = {"train.epochs": config.train.epochs}, {}
    for name, recipe in known_recipes().items():
        shorter = settings.replaced(recipe, settings.adjust_to_epochs(flatten(recipe), epochs))
        found[name] = differences(config, shorter)
    return min(found.items(), key=lambda item: len(item[1]))


@cache
def known_recipes() -> dict[str, Config]:
    """The recipes that come with vitral, read once for all rows."""
    return {name: settings.load(name) for name in settings.recipes()}


def differences(config: Config, other: Config) -> dict[str, Any]:
    """The settings that differ, without seeds and what cannot change the mathematics.

    Of an absolute path the last name is kept: the rest is its machine's business.
    """
    was = flatten(other)
    return {
        name: portable_path(value) if name in PATHS else value
        for name, value in flatten(config).items()
        if name not in OMITTED and value != was[name]
    }


def portable_path(path: str | None) -> str | None:
    """A path or name as it may stand in a page."""
    return f"path/to/{Path(path).name}" if path and Path(path).is_absolute() else path


def train_command(recipe: str, changes: dict[str, Any], parts: str = "") -> str:
    """What trains a recipe with some changes, and parts of variants.py, for any seed N."""
    program = ["python", "benchmarks/variants.py", parts] if parts else ["vitral", "train"]
    words = [word for name, value in changes.items() for word in flags(name, value)]
    return shlex.join([*program, recipe, *words, "--train.seed", "N"])


def flags(name: str, value: Any) -> list[str]:
    """A setting as the command line takes it."""
    section, key = name.replace("_", "-").split(".")
    if isinstance(value, bool):
        return [f"--{section}.{'' if value else 'no-'}{key}"]
    return [f"--{section}.{key}", *map(str, plain(value))]


def plain(value: Any) -> list[Any]:
    """The values of nested tuples in a row."""
    return (
        [part for inner in value for part in plain(inner)] if isinstance(value, tuple) else [value]
    )


def hardware(environment: dict[str, Any]) -> str:
    """What a run was on, as env.json tells it."""
    resolved = environment["resolved"]
    processes, threads = resolved["processes"], resolved["threads"]
    if resolved["device"] == "cuda":
        text = f"{processes} x {environment['gpu']}" if processes > 1 else environment["gpu"]
    else:
        text = f"{environment['cpu_cores']} CPU cores, {threads} thread{'s' * (threads > 1)}"
        text += f" in each of {processes} processes" if processes > 1 else ""
    return f"{text}, {resolved['precision']}"


def join_distinct(values: Iterable[str]) -> str:
    """The different ones of some texts."""
    return "; ".join(sorted(set(values)))


def head(checkout: Path) -> str:
    """The commit of a checkout, with -dirty where its code differs from it.

    Pages and rows are no code: a row drawn leaves the next one clean.

    Raises:
        UserError: where git knows none.
    """
    git = ["git", "-C", str(checkout)]
    changed = [*git, "status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks"]
    try:
        commit, status = (
            subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
            for words in ([*git, "rev-parse", "--short=12", "HEAD"], changed)
        )
    except (OSError, subprocess.CalledProcessError):
        raise UserError(
            f"commit: expected a git checkout at {checkout}, got none; give --commit"
        ) from None
    return f"{commit}-dirty" if status else commit
