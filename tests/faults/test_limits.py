"""Names that are long or not UTF-8, and limits of the system: results, or one line and code 2."""

import os
import re
import resource
import shutil
import sys

import pytest
import torch

import vitral.inference.explain  # noqa: F401  here once, not in every forked process
from vitral import weights
from vitral.cli import main
from vitral.config import Config, ViTConfig
from vitral.data.tools import packing  # noqa: F401  as above
from vitral.files import MAX_INSIDE, MAX_PATH
from vitral.inference import export  # noqa: F401  as above
from vitral.model import ViT
from vitral.rundir import RunDir

from ..training.processes import SINGLE, options

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
LONG, ODD = "x" * 250, os.fsdecode(b"\xff\xfe")  # at most five more bytes; not UTF-8
BOTH = pytest.mark.parametrize("name", [LONG, ODD], ids=["long", "odd"])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    shape = ViTConfig(dim=16, depth=1, num_heads=2, num_kv_heads=1, patch_size=4, image_size=16)
    torch.manual_seed(0)
    description = weights.describe(Config(model=shape), ("dark", "light"), "", {})
    place = tmp_path_factory.mktemp("runs") / "run" / "weights" / "best"
    place.parent.mkdir(parents=True)
    weights.save(place, {"model": ViT(shape, 2).state_dict()}, description)
    return place


@pytest.fixture
def photo(image_folder, tmp_path):
    """Copies a photograph to a name."""

    source = image_folder / "val" / "dark" / "00.jpg"

    def copy(name):
        return str(shutil.copy(source, tmp_path / f"{name}.jpg"))

    return copy


def run(words, out, limits=(), streams="file"):
    """Runs a command in a forked process; returns its exit code, and what it prints.

    Its standard streams lead to the file `out`, or are "closed", or standard error is "unread".
    """
    child = os.fork()
    if not child:
        code = 99
        try:
            descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            reader, writer = os.pipe()
            os.close(reader)
            if streams == "closed":
                os.closerange(0, 3)
                sys.stdin = sys.stdout = sys.stderr = None  # as Python starts without them
            else:
                for number, name in ((1, "stdout"), (2, "stderr")):
                    unread = streams == "unread" and name == "stderr"
                    os.dup2(writer if unread else descriptor, number)
                    setattr(sys, name, open(number, "w", 1, closefd=False))  # noqa: SIM115
            os.closerange(3, descriptor + 100)
            for name, value in limits:
                resource.setrlimit(name, (value, value))
            code = main([*map(str, words)])
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, out.read_text(errors="surrogateescape")


@BOTH
def test_predict_and_embed(directory, photo, tmp_path, name):
    for command, ending in (("predict", ".txt"), ("embed", ".npz"), ("embed", ".parquet")):
        out = tmp_path / f"{name[: 255 - len(ending)]}{ending}"
        words = [command, str(directory), photo(name), "--out", str(out), "--workers", "0"]
        assert main(words) == 0
        assert out.stat().st_size > 0
    assert not [*tmp_path.glob(".*")]


@pytest.mark.parametrize("format", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_export(directory, tmp_path, capsys, format):
    out = tmp_path / ODD / f"{ODD}.{format}"
    words = ["export", str(directory), "--format", format, "--images", "0", "--out", str(out)]
    assert main(words) == 0
    assert [*out.parent.iterdir()] == [out]
    assert "top-1 agreement 100.00%" in capsys.readouterr().out


def test_explain(directory, photo, tmp_path, capsys):
    """Two names that are cut to the same are told apart."""
    photos, out = [photo(LONG), photo(f"{LONG[:248]}-2")], tmp_path / ODD
    assert main(["explain", str(directory), *photos, "--out", str(out)]) == 0
    assert len([*out.iterdir()]) == 10
    for line in capsys.readouterr().out.splitlines():
        assert re.search(r"_explained\.png: (dark|light) ", line)
        assert line.isprintable()


@BOTH
def test_a_run_and_a_pack(image_folder, tmp_path, capsys, name):
    data = tmp_path / f"{name}-data"
    shutil.copytree(image_folder, data)
    shutil.copytree(data / "val" / "dark", data / "val" / name)
    shutil.copytree(data / "train" / "dark", data / "train" / name)
    shutil.copy(data / "val" / "dark" / "00.jpg", data / "val" / "dark" / f"{name}.jpg")
    pack, out = tmp_path / f"{name}pack", tmp_path / f"{name}.run"
    pack, out = (path.with_name(path.name[:255]) for path in (pack, out))
    assert main(["data", "pack", str(data), str(pack), "--size", "16", "--workers", "0"]) == 0
    assert main(["data", "check", str(pack), "--workers", "0"]) == 0
    changes = {"train__epochs": 1, "optim__warmup_epochs": 0, "data__workers": 0}
    for source in (data, pack):
        place = out if source == data else tmp_path / "other"
        words = options(SINGLE | {"data.path": source, "train.out": place}, changes)
        assert main(["train", "digits", *words]) == 0
    assert "finished: " in RunDir(out).log.read_text()
    assert main(["val", str(out), "--workers", "0"]) == 0
    assert main(["report", str(out)]) == 0
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


TOO_LONG = 2 * LONG


@pytest.mark.parametrize(
    "words",
    [
        "predict WEIGHTS PHOTO --out",
        "embed WEIGHTS PHOTO --out x/NAME.npz",
        "explain WEIGHTS PHOTO --out",
        "export WEIGHTS --format pt2 --images 0 --out x/NAME.pt2",
        "val WEIGHTS --data DATA --out",
        "report RUN --out x/NAME.html",
        "train digits --out",
        "train digits --out NAME/run",
        "data pack DATA",
        "data preview digits --out x/NAME.jpg",
        "import timm:vit_tiny_patch16_224",
    ],
)
def test_what_cannot_be_a_name_is_refused_in_a_line(
    directory, image_folder, photo, tmp_path, monkeypatch, capsys, words
):
    places = {"WEIGHTS": directory, "PHOTO": photo("a"), "DATA": image_folder, "RUN": "run"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("train:\n  epochs: 1\n")
    words = [str(places.get(word, word)) for word in words.split()]
    words = [word.replace("NAME", TOO_LONG).replace("LONG", LONG) for word in words]
    if words[-1] in ("--out", str(image_folder), "timm:vit_tiny_patch16_224"):
        words.append(TOO_LONG)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"vitral: .+\n", error)
    assert error[:-1].isprintable()
    left = {path.name for path in tmp_path.rglob("*")}
    assert left <= {"a.jpg", "run", "config.yaml", "x"}


def test_a_deep_directory_is_refused_at_once(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    depth = (MAX_PATH - MAX_INSIDE - len(os.fsencode(tmp_path))) // 201
    out = "/".join(["d" * 200] * (depth + 1))
    for words in (["train", "digits", "--out"], ["data", "pack", str(image_folder)]):
        assert main([*words, out]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert not [*tmp_path.iterdir()]


def test_an_export_without_a_place_is_refused_before_the_work(directory, monkeypatch, capsys):
    """/proc permits no file, even to root."""
    monkeypatch.chdir("/proc")
    monkeypatch.setattr("vitral.engines.onnx.trace", None)
    assert main(["export", str(directory), "--format", "pt2"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"vitral: out: cannot write \.: .+; use a different directory\n", error)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_few_files(directory, image_folder, tmp_path, workers):
    """Whichever file is the first that cannot be opened."""
    words = ["predict", directory, image_folder / "val", "--workers", workers, "--batch-size", 6]
    codes = set()
    for limit in range(4, 24 if workers else 9):
        code, said = run(words, tmp_path / "said", [(resource.RLIMIT_NOFILE, limit)])
        codes.add(code)
        assert "Traceback" not in said
        if code == 0:
            assert len(re.findall(r"\.jpg: (?:dark|light) ", said)) == 12
        else:
            assert code == 2, said
            (line,) = [line for line in said.splitlines() if "raise the limit" in line]
            assert "ulimit -n" in line
    assert codes == {0, 2}


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ("predict WEIGHTS IMAGES --json --out OUT", "OUT"),
        ("embed WEIGHTS IMAGES --out OUT.npz", "OUT.npz"),
        ("explain WEIGHTS IMAGES --out OUT", "OUT/00_explained.png"),
        slow("export WEIGHTS --images 0 --format pt2 --out OUT.pt2", "OUT.pt2"),
        slow("export WEIGHTS --images 0 --out OUT.onnx", "OUT.onnx"),
        ("data pack DATA OUT --size 16 --workers 0", "OUT/train.pixels"),
        ("train digits --data DATA --out OUT", "OUT/config.yaml"),
    ],
)
def test_the_limit_on_the_size_of_files(directory, image_folder, tmp_path, words, place):
    places = {"WEIGHTS": directory, "IMAGES": image_folder / "val", "DATA": image_folder}
    words = [places.get(word, word) for word in words.split()]
    out = str(tmp_path / "out")
    words = [word.replace("OUT", out) if isinstance(word, str) else word for word in words]
    code, said = run(words, tmp_path / "said", [(resource.RLIMIT_FSIZE, 1000)])
    assert code == 2, said
    fix = "raise the limit on the size of files, for example with `ulimit -f unlimited`"
    error = f"vitral: {place.replace('OUT', out)}: File too large; {fix}"
    assert said.splitlines()[-1] == error
    assert "Traceback" not in said


def test_without_a_temporary_directory(tmp_path, monkeypatch, capsys):
    """As on a full disk, where importing torch fails."""

    def fail(*_):
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("vitral.cli._run", fail)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == (
        "vitral: No usable temporary directory found in ['/tmp']; "
        "free some space, or set TMPDIR to a directory with free space\n"
    )


@pytest.mark.parametrize("streams", ["unread", "closed"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("predict WEIGHTS BROKEN PHOTO --out out.csv --workers 0", 0),
        ("embed WEIGHTS BROKEN PHOTO --out out.npz --workers 0", 1),
        ("explain WEIGHTS BROKEN --out out", 1),
        ("val WEIGHTS --data DATA --out out --workers 0", 0),
        ("data check DATA --workers 0", 0),
        ("predict nowhere PHOTO", 2),
    ],
)
def test_commands_continue_when_no_one_reads_their_messages(
    directory, image_folder, photo, tmp_path, monkeypatch, words, expected, streams
):
    broken = tmp_path / "broken.jpg"
    broken.write_text("no image")
    places = {"WEIGHTS": directory, "BROKEN": broken, "PHOTO": photo("a"), "DATA": image_folder}
    monkeypatch.chdir(tmp_path)
    words = [places.get(word, word) for word in words.split()]
    assert run(words, tmp_path / "said", streams=streams)[0] == expected
    assert [*tmp_path.glob("out*")] or words[0] in ("explain", "data") or expected == 2
