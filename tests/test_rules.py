"""Rules about the source: where facts are defined, sizes of modules, and imports of commands."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitral import weights
from vitral.config import Config, ViTConfig
from vitral.model import ViT

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "vitral"
MODULES = sorted(SOURCE.rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
MAX_LINES, MAX_METHODS = 400, 15


def name_of(path):
    return path.relative_to(SOURCE).as_posix()


def literals(path):
    """The string literals of a module, docstrings excluded."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


@pytest.mark.parametrize(
    ("words", "home"),
    [
        ({"env.json", "metrics.jsonl", "train.log", "train_batch.jpg", "trace.json"}, "rundir.py"),
        ({"curves.png", "report.html", "checkpoints"}, "rundir.py"),
        ({".jpeg", ".jpe", ".webp", ".bmp", ".tiff", ".avif"}, "data/decode.py"),
        ({"/proc/cpuinfo"}, "machine.py"),
        ({"manifest.json"}, "storage.py"),
    ],
)
def test_a_name_is_defined_in_one_module(words, home):
    found = {name_of(path) for path in MODULES if words & set(literals(path))}
    assert found == {home}


@pytest.mark.parametrize("name", ["is_available", "device_count", "cpu_count", "sched_getaffinity"])
def test_only_the_machine_module_queries_the_hardware(name):
    found = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == name:
                owner = ast.unparse(node.value)
                if owner in ("torch.cuda", "os"):
                    found.add(name_of(path))
    assert found == {"machine.py"}


def test_long_modules_and_classes_have_a_reason():
    unexplained = []
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        methods = max(
            (sum(isinstance(n, ast.FunctionDef) for n in each.body) for each in classes), default=0
        )
        too_long = len(text.splitlines()) > MAX_LINES or methods > MAX_METHODS
        if too_long and "in one file because" not in " ".join(
            (ast.get_docstring(tree) or "").split()
        ):
            unexplained.append(name_of(path))
    assert unexplained == []


def test_benchmarks_do_not_import_each_other_in_a_cycle():
    names = {path.stem for path in BENCHMARKS}
    imports = {}
    for path in BENCHMARKS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        found |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        imports[path.stem] = found & names
    while leaves := {name for name, needs in imports.items() if not needs}:
        imports = {name: needs - leaves for name, needs in imports.items() if name not in leaves}
    assert imports == {}


COMPILER = ["torch._dynamo", "sympy", "torch.distributed.tensor"]
LIBRARIES = ["torchvision", "scipy", "sklearn", "pyarrow", "onnx", "onnxruntime", "pandas"]
UNUSED_IN_METRICS = [name for name in LIBRARIES if name not in ("scipy", "sklearn")]
OUTPUTS = ["matplotlib", "tensorboard"]
TINY = "['--model.dim', '16', '--model.depth', '1', '--epochs', '1', '--batch-size', '512']"


@pytest.fixture(scope="module")
def weight_directory(tmp_path_factory):
    config = Config(model=ViTConfig(dim=16, depth=1, num_heads=2, num_kv_heads=1, image_size=16))
    place = tmp_path_factory.mktemp("weights")
    model, description = ViT(config.model, 2), weights.describe(config, ("dark", "light"), "", {})
    weights.save(place / "best", {"model": model.state_dict()}, description)
    return place / "best"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("main(['--help'])", ["torch", "numpy", "matplotlib"]),
        ("main(['train', '--help'])", ["torch", "numpy", "matplotlib"]),
        ("main(['recipes'])", ["torch", "numpy"]),
        ("import vitral.weights", [*COMPILER, *LIBRARIES, *OUTPUTS, "torchcodec", "PIL"]),
        (
            "main(['doctor']); main(['data', 'check', IMAGES]); main(['predict', WEIGHTS, PHOTO]); "
            "main(['embed', WEIGHTS, PHOTO, '--out', 'e.npz'])",
            [*COMPILER, *LIBRARIES, *OUTPUTS],
        ),
        ("main(['val', WEIGHTS, '--data', IMAGES])", [*COMPILER, *UNUSED_IN_METRICS, *OUTPUTS]),
        (f"main(['train', '--dry-run', *{TINY}])", [*COMPILER, *LIBRARIES, *OUTPUTS]),
        (f"main(['train', '--out', 'run', *{TINY}])", [*COMPILER, *UNUSED_IN_METRICS]),
    ],
)
def test_a_command_imports_only_what_it_needs(
    statement, absent, weight_directory, image_folder, tmp_path
):
    program = (
        "import json, sys, vitral.cli\n"
        "WEIGHTS, IMAGES, PHOTO = sys.argv[1:]\n"
        "def main(words):\n"
        "    assert vitral.cli.main(words) == 0, words\n"
        f"{statement}\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    words = [weight_directory, image_folder, image_folder / "val" / "dark" / "00.jpg"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=tmp_path,
        env={**os.environ, "VITRAL_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = json.loads(done.stderr.splitlines()[-1])
    assert [name for name in absent if name in loaded] == []
