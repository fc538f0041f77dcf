"""Rows of the ledger: computed from finished runs, and stored as JSON."""

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
MAX_POINTS = 100  # per curve
KINDS = {"raw": "val", "ema": "ema"}  # kinds of weights, and their names in the metrics log
# Settings that may differ between the runs of a row. The data are compared by their fingerprint.
VARIABLE = CHANGEABLE | {"train.seed"}
PATHS = {"data.path", "train.init"}
OMITTED = VARIABLE - PATHS | {"train.time_budget"}  # not in rows, which have train.epochs


def summarize(
    runs: Sequence[Path],
    *,
    title: str | None = None,
    data: str | None = None,
    study: str | None = None,
    note: str = "",
    commit: str | None = None,
) -> Row:
    """Returns the row of finished runs, one per seed.

    Args:
        runs: Run directories. Their data are not compared if weights and checkpoints are missing.
        title: Title of the row. Default: the name of the recipe.
        data: Name of the data. Default: the last component of `data.path`.
        study: Study that the row belongs to, or None for a headline row.
        note: Remark shown below the title.
        commit: Commit of the training code. Default: that of this checkout.

    Raises:
        UserError: if a run is unfinished, or if the runs differ in more than their seed.
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
    # Put lists of numbers on one line. Strings are not affected, as JSON escapes line breaks.
    text = re.sub(
        r'\[\n[^][{}"]*\]',
        lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"),
        text,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write_text(text + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Row]:
    """Returns the rows of a folder by name, with numbers in names in numerical order.

    Raises:
        UserError: if a file is not valid JSON.
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
    """Mean and sample standard deviation, such as 94.12 ± 0.08; only the value if there is one."""
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def headline_top1(row: Row) -> list[float]:
    """Headline top-1 of each seed in percent: that of the EMA if the runs have one."""
    return [100 * run["top1"].get("ema", run["top1"]["raw"]) for run in row["runs"]]


def check_finished(run: Run) -> None:
    """Raises UserError if the last step of a run is not completed and validated."""
    if not run.finished:
        epoch = run.rows[-1]["epoch"] if run.rows else 0
        raise UserError(
            f"{run.path}: expected a finished run of {run.config.train.epochs} epochs, got "
            f"{epoch:.3g}; repeat its command to resume"
        )
    if not run.environment:
        raise UserError(
            f"{run.path}: expected a readable env.json, got none; restore it, or train again"
        )


def check_same_row(runs: Sequence[Run], fingerprints: Sequence[str | None]) -> None:
    """Raises UserError if the runs are not seeds of one row."""
    first, seeds = runs[0], set()
    expected = settings_of(first)
    for run, fingerprint in zip(runs, fingerprints, strict=True):
        for name, value in settings_of(run).items():
            if name not in VARIABLE and value != expected[name]:
                raise UserError(
                    f"{run.path}: {name}: expected {expected[name]} as in {first.path}, got "
                    f"{value}; add it as another row"
                )
        # The held-out images depend on the seed, and the fingerprint depends on them.
        comparable = None not in (fingerprint, fingerprints[0]) and not held_out(run)
        if comparable and fingerprint != fingerprints[0]:
            raise UserError(
                f"{run.path}: expected the data of {first.path}, got other data; add it as another "
                "row"
            )
        seed = run.config.train.seed
        if seed in seeds:
            raise UserError(
                f"{run.path}: expected a different seed for each run, got {seed} twice; give one "
                "run per seed"
            )
        seeds.add(seed)


def settings_of(run: Run) -> dict[str, Any]:
    """The settings of a run by name, and the name of parts that are not vitral's own."""
    return {**flatten(run.config), "parts": run.environment.get("parts", "")}


def held_out(run: Run) -> bool:
    """Whether a run was validated on held-out training images, which depend on its seed."""
    return run.environment.get("held_out", run.config.data.hold_out)


def data_of(run: Path) -> dict[str, Any]:
    """Reads "classes" and "fingerprint" of the data from the weights or a checkpoint, if any."""
    places = (run / "weights" / "last" / "config.json", *run.glob("checkpoints/step_*/state.json"))
    for path in places:
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    return {}


def training_flops(run: Run, classes: int | None) -> float:
    """Floating-point operations of the complete training: three forward passes per image.

    The image size of each step follows from the settings. Validation is not counted.
    """
    config, steps = run.config, int(run.rows[-1]["step"])
    steps_by_size = Counter(config.image_size_at(step / steps) for step in range(steps))
    # The number that the run has logged is also correct for other models.
    known = {config.model.image_size: run.environment["training_flops_per_image"]}
    total = 0.0
    for image_size, count in steps_by_size.items():
        if image_size not in known and classes is None:
            raise UserError(
                f"{run.path}: expected weights or a checkpoint with the number of classes, got "
                "neither; restore one, or train without train.progressive"
            )
        each = known.get(image_size) or 3 * forward_flops(config.model, classes or 0, image_size)
        total += each * count * config.train.batch_size
    return total


@cache
def forward_flops(config: ViTConfig, classes: int, image_size: int) -> float:
    """FLOPs of a forward pass of one image in training, cached for all seeds."""
    return count_flops(config, classes, image_size, training=True)


def entry(run: Run, flops: float) -> Row:
    """The results of one seed at its last step."""
    last = run.rows[-1]
    kept = {name: kind for name, kind in KINDS.items() if f"{kind}_top1" in last}
    scores = {
        measure: {name: last[f"{kind}_{measure}"] for name, kind in kept.items()}
        for measure in ("top1", "top5", "loss", "balanced")
        if f"val_{measure}" in last  # early runs have no balanced accuracy
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
        **({"balanced": scores["balanced"]} if "balanced" in scores else {}),
        "val_loss": scores["loss"],
        "memory_gb": max(row["memory_gb"] for row in run.rows),
        "images_per_second": statistics.median(row["images_per_second"] for row in run.rows),
        "curve": curve(run),
    }


def curve(run: Run) -> list[list[float | None]]:
    """Images seen, training loss, raw top-1 and EMA top-1 of up to 100 validations."""
    rows = run.validations
    if len(rows) > MAX_POINTS:
        rows = [rows[round(i * (len(rows) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]
    names = ("loss", "val_top1", "ema_top1")
    return [
        [row["images"], *(round(row[name], 5) if name in row else None for name in names)]
        for row in rows
    ]


def nearest_recipe(config: Config) -> tuple[str, dict[str, Any]]:
    """The recipe that differs in the fewest settings, and these settings as in `config`."""
    epochs, found = {"train.epochs": config.train.epochs}, {}
    for name, recipe in known_recipes().items():
        shorter = settings.replaced(recipe, settings.adjust_to_epochs(flatten(recipe), epochs))
        found[name] = differences(config, shorter)
    return min(found.items(), key=lambda item: len(item[1]))


@cache
def known_recipes() -> dict[str, Config]:
    """The recipes included in vitral, read once for all rows."""
    return {name: settings.load(name) for name in settings.recipes()}


def differences(config: Config, other: Config) -> dict[str, Any]:
    """The settings that differ, except for seeds and settings that do not affect the results.

    Only the last component of an absolute path is kept, as the rest depends on the machine.
    """
    others = flatten(other)
    return {
        name: portable_path(value) if name in PATHS else value
        for name, value in flatten(config).items()
        if name not in OMITTED and value != others[name]
    }


def portable_path(path: str | None) -> str | None:
    """A path or name without machine-specific directories, for use in a page."""
    return f"path/to/{Path(path).name}" if path and Path(path).is_absolute() else path


def train_command(recipe: str, changes: dict[str, Any], parts: str = "") -> str:
    """The command that trains a recipe with changes, and with parts of variants.py, for seed N."""
    program = ["python", "benchmarks/variants.py", parts] if parts else ["vitral", "train"]
    words = [word for name, value in changes.items() for word in flags(name, value)]
    return shlex.join([*program, recipe, *words, "--train.seed", "N"])


def flags(name: str, value: Any) -> list[str]:
    """A setting as command-line arguments."""
    section, key = name.replace("_", "-").split(".")
    if isinstance(value, bool):
        return [f"--{section}.{'' if value else 'no-'}{key}"]
    return [f"--{section}.{key}", *map(str, plain(value))]


def plain(value: Any) -> list[Any]:
    """Flattens nested tuples into a list."""
    return (
        [part for inner in value for part in plain(inner)] if isinstance(value, tuple) else [value]
    )


def hardware(environment: dict[str, Any]) -> str:
    """The hardware of a run, from its env.json."""
    resolved = environment["resolved"]
    processes, threads = resolved["processes"], resolved["threads"]
    if resolved["device"] == "cuda":
        text = f"{processes} x {environment['gpu']}" if processes > 1 else environment["gpu"]
    else:
        text = f"{environment['cpu_cores']} CPU cores, {threads} thread{'s' * (threads > 1)}"
        text += f" in each of {processes} processes" if processes > 1 else ""
    return f"{text}, {resolved['precision']}"


def join_distinct(values: Iterable[str]) -> str:
    """Joins the distinct values."""
    return "; ".join(sorted(set(values)))


def head(checkout: Path) -> str:
    """The commit of a checkout, with the suffix -dirty if its code differs from the commit.

    Pages and rows do not count as code, so adding a row does not make the next one dirty.

    Raises:
        UserError: if the directory is not a git checkout.
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
