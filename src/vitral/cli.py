"""The command: the only place that reads arguments. torch is imported by the verbs that need it."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryFile
from types import FrameType
from typing import TYPE_CHECKING, Literal, TypeVar

from vitral.config import Config, UserError

if TYPE_CHECKING:
    from vitral.data.records import Dataset
    from vitral.weights import Weights

T = TypeVar("T")

HELP = """\
vitral trains, resumes and evaluates Vision Transformers, exactly reproducibly.

  vitral train [RECIPE|FILE.yaml] [--data PATH|NAME] [--out DIR] [--gpus N]
               [--section.key value ...]
               no recipe: handwritten digits, about a minute on two CPU cores
               the same command goes on with a run that was cut off; --dry-run only plans it
  vitral val WEIGHTS [--data PATH|NAME] [--resolutions N ...] [--out DIR]
               exact accuracy, per class, and calibration; or accuracy at several image sizes
  vitral val WEIGHTS --suite PATH [--out DIR]
               accuracy on ImageNet's test sets: validation, ReaL, -V2, -A, -R, -Sketch
  vitral predict WEIGHTS PATH... [--top 5] [--resolution N] [--json|--csv] [--out FILE]
               what is in images: files, folders, 'patterns*', or - for a list on standard input
  vitral explain WEIGHTS PATH... [--layer N] [--patch ROW COLUMN] [--out DIR]
               pictures of what the model attends to, and whether its prediction rests on that
  vitral report RUN [RUN ...] [--data PATH|NAME] [--out FILE]
               one self-contained page of a run, or of several beside each other
  vitral export WEIGHTS [--format onnx|pt2] [--out FILE] [--data PATH|NAME]
               one file that needs no vitral, compared with the model before it is kept
  vitral push WEIGHTS OWNER/NAME [--licence SPDX] [--private] [--dry-run]
               weights and their card to the Hugging Face Hub; --dry-run only prints the card
  vitral recipes [NAME]
               lists the recipes, or prints one
  vitral data check PATH|NAME        counts, classes, broken files, decode rate
  vitral data pack SRC DST [--size 256] [--jpeg]
               squares in one file, for which training needs next to no processor; or small JPEGs
  vitral data preview PATH|NAME [RECIPE] [--out FILE]
               a picture of a batch, before and after augmentation
  vitral bench data PATH|NAME [RECIPE] [--section.key value ...]
               rate of every way that images come in, beside torchvision's transforms
  vitral bench model|train [RECIPE] [--data PATH|NAME] [--section.key value ...]
               rate of the training step, --peers: beside timm's models; of training, beside the
               step on synthetic images
  vitral doctor
               what this machine offers: devices, kernels, decoders, disk

WEIGHTS is a run folder, a weight folder such as runs/digits/weights/best, or weights on the
Hugging Face Hub, hf-hub:owner/name or hf-hub:owner/name@revision.
`vitral train RECIPE --help` lists every setting with the recipe's value.
"""

TRAIN = """Trains, or goes on with the run in --out. Short forms: --data for --data.path, --out for
--train.out, --init for --train.init. --gpus N trains in N processes of this machine, a GPU each.
--dry-run prints the settings, the model's size, the steps and an estimated time, and stops."""


@dataclass(frozen=True, kw_only=True)
class ValOptions:
    """Options of `vitral val`."""

    data: str | None = None
    """Image folder or known set; None takes the set that the weights were trained on."""
    resolutions: tuple[int, ...] | None = None
    """Image sizes to evaluate at, multiples of the patch size; the share cropped stays the same."""
    suite: str | None = None
    """Folder with ImageNet's test sets in folders of their own, instead of data and resolutions."""
    which: Literal["model", "ema"] | None = None
    """Raw or averaged weights; None takes what the weights name."""
    batch_size: int = 256
    """Images of a forward pass."""
    workers: int | None = None
    """Decoding processes; None takes the cores but one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    out: str | None = None
    """Folder for per_class.csv and confused_pairs.csv, or resolutions.csv, or suite.csv."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size: expected 1 or more, got {self.batch_size}")
        for name in ("data", "resolutions", "suite"):
            if getattr(self, name) in ("", ()):
                raise UserError(f"{name}: expected something after --{name}, got nothing")
        if self.suite is not None and (self.data is not None or self.resolutions):
            other = "resolutions" if self.data is None else "data"
            raise UserError(f"suite, {other}: expected one of the two, got both")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `vitral report`."""

    data: str | None = None
    """Where the run's data set is now; None takes the path that it had."""
    out: str | None = None
    """File to write; None takes report.html in the run folder, of several runs in this one."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of `vitral predict`."""

    top: int = 5
    """Likeliest classes of each image."""
    resolution: int | None = None
    """Side of the images that the model sees, a multiple of its patch; None takes training's."""
    which: Literal["model", "ema"] | None = None
    """Raw or averaged weights; None takes what the weights name."""
    batch_size: int = 64
    """Images of a forward pass."""
    workers: int | None = None
    """Decoding processes; None takes the cores but one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    json: bool = False
    """Print a JSON object a line, one for each image."""
    csv: bool = False
    """Print CSV, a line for each image and class."""
    out: str | None = None
    """File to write to; None is standard output."""

    def __post_init__(self) -> None:
        if self.json and self.csv:
            raise UserError("json, csv: expected one of the two, got both")


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """Options of `vitral explain`."""

    layer: int | None = None
    """Whose heads to show, counted from 0; None takes the last."""
    patch: tuple[int, int] | None = None
    """Row and column, from 0, of a patch to look at; None takes the one most attended to."""
    resolution: int | None = None
    """Side of the images that the model sees, a multiple of its patch; None takes training's."""
    which: Literal["model", "ema"] | None = None
    """Raw or averaged weights; None takes what the weights name."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    out: str = "explain"
    """Folder to write pictures to."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `vitral export`."""

    format: Literal["onnx", "pt2"] = "onnx"
    """For onnxruntime and the like, or for torch.export.load."""
    out: str | None = None
    """File to write, or to replace; None takes the run's name, in the current folder."""
    which: Literal["model", "ema"] | None = None
    """Raw or averaged weights; None takes what the weights name."""
    opset: Literal[20, 23] = 20
    """Of ONNX: 23 has attention and RMSNorm as operators, which older runtimes lack."""
    data: str | None = None
    """Image folder or known set to compare on; None takes the set trained on, if it is there."""
    images: int = 256
    """How many of its validation images to compare on; 0 takes random images alone."""

    def __post_init__(self) -> None:
        if self.images < 0:
            raise UserError(f"images: expected 0 or more, got {self.images}")


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Options of `vitral push`."""

    licence: str | None = None
    """Of the weights, as SPDX names it, such as Apache-2.0; None states none."""
    private: bool = False
    """Make the repository private; one that is public already is refused."""
    dry_run: bool = False
    """Print the card and push nothing."""


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Options of `vitral data check`."""

    workers: int | None = None
    """Decoding processes; None takes a core each."""


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """Options of `vitral data pack`."""

    size: int = 256
    """Side of the squares, or with --jpeg the short side, in pixels."""
    jpeg: bool = False
    """JPEGs of quality 90 instead of pixels: a seventh of the disk, but they must be decoded."""
    workers: int | None = None
    """Decoding processes; None takes a core each."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"size: expected 1 or more, got {self.size}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    That is 0, 2 for a user's mistake, 1 for a full disk, or a signal's.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if plain and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _interrupt)
    try:
        return _dispatch(words)
    except UserError as error:
        # Of a mistake that was not agreed on, each machine's first process speaks.
        rank = "RANK" if error.shared else "LOCAL_RANK"
        if os.environ.get(rank, "0") == "0":
            print(f"vitral: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has gone, as `| head` does; the interpreter must not try to flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"vitral: {place}{error.strerror}; make room and repeat the command", file=sys.stderr)
        return 1
    finally:
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(_: int, frame: FrameType | None) -> None:
    """Ctrl-C: in the middle of an import at once, as torch's turn the exception into others."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _dispatch(words: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):  # names are anybody's, the encoding is the terminal's
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"vitral {version('vitral')}")
        return 0
    verbs: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "val": _val,
        "predict": _predict,
        "explain": _explain,
        "report": _report,
        "export": _export,
        "push": _push,
        "recipes": _recipes,
        "data": _data,
        "bench": _bench,
        "doctor": _doctor,
    }
    return _choose("command", words, verbs)


def _choose(what: str, words: list[str], verbs: dict[str, Callable[[list[str]], int]]) -> int:
    from vitral.recipes import nearest

    got = words[0] if words else "nothing"
    if got in ("-h", "--help"):
        return _explain_use(what)
    if got not in verbs:
        near = nearest(got, list(verbs))
        raise UserError(f"{what}: expected one of {', '.join(verbs)}, got {got}{near}")
    return verbs[got](words[1:])


def _explain_use(verb: str) -> int:
    """Prints what the overview says of a command."""
    found = re.findall(rf"^  (vitral {verb}\b.*\n(?: {{15}}.*\n)*)", HELP, re.MULTILINE)
    print("usage: " + "       ".join(found), end="")
    return 0


def _load(words: list[str], program: str, about: str) -> Config:
    """Settings from [RECIPE] and `--section.key value`; other data than digits: imagenette128."""
    from vitral import recipes

    if words and not words[0].startswith("-"):
        if recipes.weights_to_fit(words[0], words[1:]) is None:
            return recipes.load(words[0], words[1:], program=program, about=about)
        from vitral.weights import load_settings

        return load_settings(words[0], words[1:], program=program, about=about)
    # Told by the words alone, as the other settings may fit one of the two recipes only.
    name = "digits" if recipes.given("--data.path", words) in (None, "digits") else "imagenette128"
    return recipes.load(name, words, program=program, about=about)


def _train(words: list[str]) -> int:
    if "--resume" in words:  # as others have it; the nearest setting would be --train.seed
        raise UserError("--resume: no such setting; without it the same command goes on with a run")
    dry = "--dry-run" in words
    words = [word for word in words if word != "--dry-run"]
    processes, words = _take_processes(words)
    config = _load(words, "vitral train", TRAIN)
    if dry:
        from vitral.bench import plan
        from vitral.training.distributed import check_processes

        check_processes(config, processes or 1)
        print(plan(config))
        return 0
    if processes is not None:
        from vitral.training.launch import launch

        return launch(config, processes, words)
    from vitral.training import Interrupted, train

    try:
        train(config)
    except Interrupted as interrupted:
        return interrupted.exit_code
    return 0


def _take_processes(words: list[str]) -> tuple[int | None, list[str]]:
    """The value of --gpus, and the words without it."""
    value, rest = _take("--gpus", words)
    if value is None:
        return None, rest
    if not value.isdecimal():
        raise UserError(f"gpus: expected a number of processes, got {value or 'nothing'}")
    return int(value), rest


def _take(option: str, words: list[str]) -> tuple[str | None, list[str]]:
    """The value of an option, as the next word or behind '=', and the words without the two."""
    for where, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == option:
            end = where + 1 if equals else where + 2
            value = value if equals else "".join(words[where + 1 : end])
            return value, words[:where] + words[end:]
    return None, words


def _val(words: list[str]) -> int:
    from vitral import recipes

    path, rest = _positional(words, "WEIGHTS", "vitral val")
    options = recipes.parse(rest, ValOptions(), program="vitral val WEIGHTS")
    from vitral.evaluation import at_sizes, evaluate, open_set, summarise
    from vitral.weights import load

    weights = load(path, which=options.which)
    kind, trained_on = weights.description.default, weights.description.config.data.path
    place = options.suite or options.data or trained_on
    at_sizes(weights.description, options.resolutions or ())  # before the data are opened
    dataset = None if options.suite else open_set(weights.description, options.data)
    place += ", training images that were held out" if dataset and dataset.held_out else ""
    about = f"{weights.path} ({options.which or kind}) on {place}"
    known = weights.description.classes
    if dataset and len(dataset.classes) < len(known):
        some = f"{len(dataset.classes):,} of the {len(known):,} classes"
        about += f"\nscored on {some} that the weights know, as if they knew no other"
    if dataset is None or options.resolutions:
        return _val_table(weights, dataset, options, about)
    if options.out is not None:
        _writable(options.out)
    scores = evaluate(
        weights,
        dataset,
        batch_size=options.batch_size,
        workers=options.workers,
        device=options.device,
    )
    print(about)
    print(summarise(scores))
    if options.out is not None:
        scores.write_tables(Path(options.out))
    return 0


def _val_table(weights: Weights, dataset: Dataset | None, options: ValOptions, about: str) -> int:
    """Several sets, or sizes: a row of a table each."""
    from vitral.evaluation import evaluate_suite, find_suite, sweep
    from vitral.evaluation.table import show, write_rows

    if options.suite is not None:
        suite = find_suite(options.suite)
        title, file, names = "set", "suite.csv", suite.names()
        about = f"{about}\n{suite.describe()}"
        rows = evaluate_suite(
            weights,
            suite,
            batch_size=options.batch_size,
            workers=options.workers,
            device=options.device,
        )
    else:
        sides = options.resolutions or ()
        title, file, names = "resolution", "resolutions.csv", [*map(str, sides)]
        share = weights.description.config.data.eval_crop
        about = f"{about}, the central {100 * share:g}% of the short side at every size"
        found = sweep(
            weights,
            sides,
            dataset,
            batch_size=options.batch_size,
            workers=options.workers,
            device=options.device,
        )
        rows = (scores.row(str(side)) for side, scores in found)
    if options.out is not None:
        _writable(options.out)
    print(about, flush=True)
    done = show(title, names, rows)
    if options.out is not None:
        write_rows(Path(options.out) / file, title, done)
    return 0


def _report(words: list[str]) -> int:
    from vitral import recipes

    first, rest = _positional(words, "RUN", "vitral report")
    more = list(takewhile(lambda word: not word.startswith("-"), rest))
    rest, program = rest[len(more) :], "vitral report RUN [RUN ...]"
    options = recipes.parse(rest, ReportOptions(), program=program)
    if more and options.data is not None:
        raise UserError("data: expected none with several runs, as no images are looked at")
    from vitral.report.gather import evaluate_best, read_run
    from vitral.report.html import write_comparison, write_report

    runs = [read_run(Path(path)) for path in (first, *more)]
    out = Path(options.out or (Path() if more else runs[0].path) / "report.html")
    if out.is_dir():
        raise UserError(f"out: expected a file to write, got the folder {out}")
    _writable(str(out.parent))
    if more:
        write_comparison(runs, out)
    else:
        predictions, missing = None, ""
        try:
            predictions = evaluate_best(runs[0], options.data)
        except UserError as error:
            missing = str(error)
            print(f"vitral: without predictions: {error}", file=sys.stderr)
        write_report(runs[0], out, predictions, missing)
    print(out)
    return 0


def _predict(words: list[str]) -> int:
    path, places, options = _weights_and_places(words, "vitral predict", PredictOptions())
    from vitral.evaluation.evaluate import pick_device
    from vitral.inference.predict import find_images, predictions, write
    from vitral.weights import load

    weights = load(path, which=options.which, device=str(pick_device(options.device)))
    images = find_images(places)
    found = predictions(
        weights,
        images,
        options.top,
        resolution=options.resolution,
        batch_size=options.batch_size,
        workers=options.workers,
    )
    out = None if options.out is None else Path(options.out)
    if out is not None:
        if out.exists() and not out.is_file():
            raise UserError(f"out: expected a file to write, got {out}, which is none")
        _writable(str(out.parent))
    form = "json" if options.json else "csv" if options.csv else "text"
    return 0 if write(found, len(images), form, out) else 1


def _explain(words: list[str]) -> int:
    path, places, options = _weights_and_places(words, "vitral explain", ExplainOptions())
    from vitral.evaluation.evaluate import pick_device
    from vitral.inference.explain import explanations, save
    from vitral.inference.predict import find_images
    from vitral.weights import load

    weights = load(path, which=options.which, device=str(pick_device(options.device)))
    chosen = {"layer": options.layer, "patch": options.patch, "resolution": options.resolution}
    some = False
    for name, explanation in explanations(weights, find_images(places), **chosen):
        if explanation is not None:
            _writable(options.out)
            save(explanation, Path(options.out), name)
            print(f"{Path(options.out) / name}_explained.png: {explanation.summary}", flush=True)
            some = True
    return 0 if some else 1


def _export(words: list[str]) -> int:
    from vitral import recipes

    path, rest = _positional(words, "WEIGHTS", "vitral export")
    options = recipes.parse(rest, ExportOptions(), program="vitral export WEIGHTS")
    if options.out is not None:
        _writable(str(Path(options.out).parent))
    from vitral.inference.export import ExportError, export

    try:
        exported = export(path, **vars(options))
    except ExportError as error:
        print(f"vitral: {error}; nothing is kept", file=sys.stderr)
        return 1
    for file in exported.files:
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    print(*exported.agreements, sep="\n")
    if options.images and len(exported.agreements) == 1:
        print("the set trained on is not here: --data PATH compares on its validation images")
    return 0


def _push(words: list[str]) -> int:
    from vitral import hub, recipes

    path, rest = _positional(words, "WEIGHTS", "vitral push")
    name, rest = _positional(rest, "OWNER/NAME", "vitral push WEIGHTS")
    options = recipes.parse(rest, PushOptions(), program="vitral push WEIGHTS OWNER/NAME")
    hub.check_name(name)
    from vitral.inference.card import card, push
    from vitral.weights import load

    weights = load(path)
    if options.dry_run:
        print(card(weights, name, options.licence), end="")
    else:
        print(push(weights, name, private=options.private, licence=options.licence))
    return 0


def _recipes(words: list[str]) -> int:
    from vitral import recipes

    if words and words[0] in ("-h", "--help"):
        return _explain_use("recipes")
    if words:
        if words[1:]:
            raise UserError(
                f"recipes: expected one NAME, got {' '.join(words[1:])} after {words[0]}"
            )
        print(recipes.text(words[0]), end="")
    else:
        for name in recipes.names():
            print(f"{name:20}  {recipes.text(name).splitlines()[0].lstrip('# ')}")
    return 0


def _data(words: list[str]) -> int:
    return _choose("data", words, {"check": _check, "pack": _pack, "preview": _preview})


def _check(words: list[str]) -> int:
    from vitral import recipes

    path, rest = _positional(words, "PATH", "vitral data check")
    options = recipes.parse(rest, CheckOptions(), program="vitral data check PATH")
    from vitral.data.check import check, format_report
    from vitral.data.fetch import available_cores

    config = dataclasses.replace(Config().data, path=path)
    workers = available_cores() if options.workers is None else options.workers
    report = check(config, Config().model.image_size, Config().train.seed, workers)
    print(format_report(report))
    return 2 if report.broken else 0


def _pack(words: list[str]) -> int:
    from vitral import recipes

    src, rest = _positional(words, "SRC", "vitral data pack")
    dst, rest = _positional(rest, "DST", "vitral data pack SRC")
    options = recipes.parse(rest, PackOptions(), program="vitral data pack SRC DST")
    from vitral.data.fetch import available_cores
    from vitral.data.packing import pack

    config = dataclasses.replace(Config().data, path=src)
    workers = available_cores() if options.workers is None else options.workers
    print(pack(config, Config().train.seed, Path(dst), options.size, options.jpeg, workers))
    return 0


def _preview(words: list[str]) -> int:
    path, rest = _positional(words, "PATH", "vitral data preview")
    given, rest = _take("--out", rest)
    out = "preview.jpg" if given is None else given
    about = "Writes preview.jpg, or --out FILE."
    config = _load(_with_data(path, rest), "vitral data preview PATH", about)
    if Path(out).suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise UserError(f"out: expected a name that ends in .jpg or .png, got {out or 'nothing'}")
    from vitral.report.pictures import preview

    _writable(str(Path(out).parent))
    preview(config, Path(out))
    print(f"{out}: images as validation sees them, and below each as training does")
    return 0


def _bench(words: list[str]) -> int:
    def model(rest: list[str]) -> int:
        about = "Rate of the training step on synthetic images; --peers: beside timm's models."
        peers = "--peers" in rest
        words = [word for word in rest if word != "--peers"]
        config = _load(words, "vitral bench model", about)
        from vitral.bench import bench_model

        print(bench_model(config, peers))
        return 0

    def train(rest: list[str]) -> int:
        about = "Rate of training beside that of its step on synthetic images."
        config = _load(rest, "vitral bench train", about)
        from vitral.bench import bench_train

        print(bench_train(config))
        return 0

    def data(rest: list[str]) -> int:
        about = "Images per second of every way in, beside torchvision's transforms."
        path, rest = _positional(rest, "PATH", "vitral bench data")
        config = _load(_with_data(path, rest), "vitral bench data PATH", about)
        from vitral.bench import bench_data

        print(bench_data(config))
        return 0

    return _choose("bench", words, {"model": model, "train": train, "data": data})


def _doctor(words: list[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        return _explain_use("doctor")
    if words:
        raise UserError(f"doctor: expected no arguments, got {' '.join(words)}")
    from vitral.doctor import examine

    print(examine())
    return 0


def _weights_and_places(words: list[str], program: str, default: T) -> tuple[str, list[str], T]:
    """Weights, images and options, as `predict` and `explain` take them."""
    from vitral import recipes

    path, rest = _positional(words, "WEIGHTS", program)
    places = list(takewhile(lambda word: word == "-" or not word.startswith("-"), rest))
    rest = rest[len(places) :]
    options = recipes.parse(rest, default, program=f"{program} WEIGHTS PATH...")
    if not places:
        raise UserError(f"{program}: expected PATH after WEIGHTS, got none")
    return path, places, options


def _positional(words: list[str], name: str, program: str) -> tuple[str, list[str]]:
    """The first argument and the others; a call for help goes to the parser of the others."""
    if words and words[0] in ("-h", "--help"):
        return "", ["--help"]
    if not words or words[0].startswith("-"):
        raise UserError(f"{program}: expected {name} first, got {words[0] if words else 'nothing'}")
    return words[0], words[1:]


def _with_data(path: str, words: list[str]) -> list[str]:
    """[RECIPE] and settings, with the path that stood before them as --data."""
    if not path:  # help is asked for in its place
        return words
    where = 1 if words and not words[0].startswith("-") else 0
    return [*words[:where], "--data", path, *words[where:]]


def _writable(directory: str) -> None:
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):  # what the file system allows os.access does not know
            pass
    except OSError as error:
        raise UserError(
            f"out: cannot write {directory}: {error.strerror}; give another folder"
        ) from None
