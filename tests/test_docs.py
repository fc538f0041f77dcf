import ast
import doctest
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import torch
import yaml

import vitral
from vitral import cli
from vitral.config import CHANGEABLE

ROOT = Path(__file__).parent.parent
PAGES = sorted(ROOT.glob("docs/*.md"))
HOST = "http://site"


@pytest.fixture(scope="module")
def tables():
    """docs/tables.py."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Page(HTMLParser):
    """The links of a page, the files it loads, and its anchors."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {value for key, value in attrs if key in ("id", "name") and value}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link":
            self.loads.append(given["href"])
        self.loads += [given[key] for key in ("src", "data") if key in given]
        self.loads += [part.split()[0] for part in given.get("srcset", "").split(",") if part]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The files of the site, built from a copy, by address."""
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", root / "docs")
    shutil.copy(ROOT / "mkdocs.yml", root)
    (root / "src").symlink_to(ROOT / "src")
    result = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=root, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "No issues found" in result.stdout + result.stderr
    files = [path for path in (root / "site").rglob("*") if path.is_file()]
    names = {path: path.relative_to(root / "site").as_posix() for path in files}
    return {f"{HOST}/{name.removesuffix('index.html')}": path for path, name in names.items()}


@pytest.fixture(scope="module")
def pages(site):
    """The pages of the site, by address."""
    found = {a: Page(file.read_text()) for a, file in site.items() if file.suffix == ".html"}
    # Its links start at the root of the host, because the page is shown at any address.
    del found[f"{HOST}/404.html"]
    return found


def test_every_page_is_on_the_site_and_in_its_navigation(pages):
    def leaves(nav):
        for entry in nav:
            for inner in entry.values():
                yield from [inner] if isinstance(inner, str) else leaves(inner)

    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(leaves(settings["nav"])) == [page.name for page in PAGES]
    names = {address.removeprefix(HOST).strip("/") or "index" for address in pages}
    assert names == {page.stem for page in PAGES}


def test_links_and_anchors_of_the_site_exist(site, pages):
    for address, page in pages.items():
        for link in page.links:
            target = urlsplit(urljoin(address, link))
            if target.scheme in ("http", "https") and target.netloc == "site":
                place = f"{HOST}{unquote(target.path)}"
                assert place in site, (address, link)
                fragment = unquote(target.fragment)
                assert not fragment or fragment in pages[place].anchors, (address, link)


def test_site_loads_nothing_from_other_hosts(site, pages):
    for address, page in pages.items():
        assert page.loads
        for link in page.loads:
            assert link.startswith("data:") or urljoin(address, link) in site, (address, link)
    for file in site.values():
        if file.suffix in (".css", ".svg"):
            assert not re.search(r"(url\(|@import|href=)[\s\"']*(https?:)?//", file.read_text())


def test_python_page_has_the_docstrings(pages):
    anchors = pages[f"{HOST}/python/"].anchors
    for name in ("model.ViT.forward_features", "config.ViTConfig", "training.run.train"):
        assert f"vitral.{name}" in anchors
    for name in ("Classifier.predict", "Prediction.probabilities", "load"):
        assert f"vitral.inference.predict.{name}" in anchors
    assert "vitral.evaluation.scores.Scores.calibration_error" in anchors
    assert "vitral.evaluation.evaluate.evaluate" in anchors


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_match_the_code(page, tables):
    text = page.read_text()
    assert text == tables.filled(text), "run `python docs/tables.py`"


def test_every_command_and_option_is_documented(tables):
    text = (ROOT / "docs" / "commands.md").read_text()
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    for command in re.findall(r"^  vitral ((?:data )?\w+)", cli.overview(), re.MULTILINE):
        assert command in headings
    settings = (ROOT / "docs" / "settings.md").read_text()
    for option in re.findall(r"--\w[\w-]*", cli.overview()):
        assert re.search(rf"`[^`\n]*{option}\b", text), option
    for command in cli.COMMANDS:
        for option in cli.parser_for(command).names:
            if not re.match(r"--([\w-]+\.)?no-", option):  # explained on the settings page
                assert f"`{option}`" in (settings if "." in option else text), option
    shown = re.findall(r"<!-- table: ([\w ]+) -->", text)
    assert shown == tables.commands()
    assert {*tables.SECTIONS} <= set(re.findall(r"<!-- table: (\w+) -->", settings))


def test_tables_contain_defaults_choices_and_how_to_turn_off_an_option(tables):
    model, val = tables.table("model"), tables.table("vitral val")
    assert "| `--model.patch-size` | integer | `16` | Side length of the square patches" in model
    assert (
        "| `--model.ffn-bias` (off: `--model.no-ffn-bias`) | switch | `on` | "
        "Use biases in the feed-forward network. |" in model
    )
    assert "| `--which` | `model`, `ema` |  | Weights to use: raw (model) or" in val
    train = tables.table("vitral train")
    assert "| `--lr` or `--optim.lr` | number | `0.001` | Peak learning rate. |" in train
    assert "| `--gpus` | integer | `None` | Number of GPUs of this machine" in train
    title, facts = tables.header("digits")
    assert title == "Handwritten digits of 8x8 pixels, learned from scratch in about a minute"
    assert facts["hardware"] == "two CPU cores"
    assert tables.header("imagenet-s16-300ep")[1]["hours"].endswith("if data loading keeps up")


def test_settings_that_may_change_on_resuming_are_documented():
    text = (ROOT / "docs" / "reliability.md").read_text()
    section = text.partition("## What may change on resuming")[2].partition("\n## ")[0]
    names = re.findall(r"`(\w+\.\w+)`", section)
    assert sorted(names) == sorted(CHANGEABLE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_placeholders_are_left(page):
    assert not re.search(r"^[A-Z_]+$|TODO|FIXME|XXX", page.read_text(), re.MULTILINE)


def literals(module):
    """The string literals of a module but docstrings, with {} for each value in an f-string."""
    nodes = [*ast.walk(ast.parse(module.read_text()))]
    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            parts = [getattr(part, "value", None) for part in node.values]
            yield "".join(part if isinstance(part, str) else "{}" for part in parts)
        elif isinstance(node, ast.Constant) and node not in docstrings:
            yield str(node.value)


def test_headings_of_troubleshooting_are_messages_in_the_code():
    """`data_error` adds "expected" and ", got", so the parts of a message may be separate."""
    modules = [set(literals(module)) for module in ROOT.glob("src/vitral/**/*.py")]
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    headings = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(headings) > 50
    for heading in headings:
        parts = heading.removeprefix("expected ").replace("...", "{}").split(", got ")
        assert any(
            all(any(part in text for text in texts) for part in parts) for texts in modules
        ), heading


def test_pictures_are_small_and_used():
    text = "".join(page.read_text() for page in PAGES)
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 150_000
        assert f"](images/{picture.name})" in text


@pytest.mark.parametrize("name", ["README.md", "docs/python.md"])
def test_examples_in_documents(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = doctest.testfile(str(ROOT / name), module_relative=False)
    assert result.attempted > 4
    assert result.failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", ["model", "config", "weights", "evaluation.evaluate", "timm"])
def test_examples_in_docstrings(name, capsys):
    result = doctest.testmod(importlib.import_module(f"vitral.{name}"))
    assert result.failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", ["README.md", *sorted(p.name for p in ROOT.glob("docs/*.md"))])
def test_links_exist(name):
    page = ROOT / name if name == "README.md" else ROOT / "docs" / name
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_the_public_names():
    assert vitral.__all__ == ["ViT", "ViTConfig", "evaluate", "load", "train"]
    for name in vitral.__all__:
        assert getattr(vitral, name).__doc__
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert vitral.__version__ == pyproject["version"]
    with pytest.raises(AttributeError, match="no attribute 'vit'"):
        vitral.vit  # noqa: B018


def test_first_screen_of_the_readme_has_the_two_commands():
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:20])
    commands = re.findall(r"```sh\n(.*?)\n```", first, re.DOTALL)
    assert commands == ["pip install . && vitral train", "pip install '.[dev]' && pytest -n auto"]


def test_recipes_state_command_hardware_hours_and_result():
    from vitral import settings

    for name in settings.recipes():
        header = settings.recipe_text(name).split("\n\n")[0]
        for word in ("command", "data", "hardware", "hours", "result"):
            assert re.search(rf"^#   {word} +\S", header, re.MULTILINE), (name, word)
        assert re.search(rf"^#   command +vitral train( {name})?( |$)", header, re.MULTILINE), name


def test_readme_names_the_sizes_that_models_have():
    import torch

    from vitral.config import PRESETS
    from vitral.model import count_flops

    text = (ROOT / "README.md").read_text()
    for size, shape in PRESETS.items():
        config = vitral.ViTConfig(size=size)
        with torch.device("meta"):
            millions = vitral.ViT(config, 1000).num_parameters / 1e6
        row = (
            f"| {size} | {shape.dim} | {shape.depth} | {shape.num_heads} | {shape.num_kv_heads} | "
        )
        assert f"{row}{millions:.1f} M | {count_flops(config, 1000) / 1e9:.1f} |" in text


def test_package_data_and_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [d for d in project["dependencies"] if "<" in d or "==" in d]


PROTOTYPE = {"s": 10_399, "b": 3_955, "l": 1_268}  # images/s at 224 px, as the page says


def test_imagenet_costs_match_the_flop_count():
    """Recomputes each row of the table of sizes and FLOPs in docs/imagenet.md."""
    from vitral import settings
    from vitral.model import ViT, count_flops

    page = (ROOT / "docs" / "imagenet.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(imagenet-[^`]+)`.*? \| ([\d,]+) \| (\d+) \| (.*) \|$", page, re.M)
    assert {row[0] for row in rows} == {n for n in settings.recipes() if n.startswith("imagenet-")}
    for name, parameters, epochs, rest in rows:
        more = ["--model.size", "b"] if name == "imagenet-finetune" else []
        config = settings.load(name, more)
        with torch.device("meta"):
            assert f"{sum(p.numel() for p in ViT(config.model, 1000).parameters()):,}" == parameters
        assert config.train.epochs == int(epochs)
        stages = config.train.progressive or ((config.model.image_size, 1.0),)
        counts = [count_flops(config.model, 1000, side) for side, _ in stages]
        seen = 1_281_167 * config.train.epochs
        mean = sum(n * fraction for n, (_, fraction) in zip(counts, stages, strict=True))
        forward = [f"{n / 1e9:.3f}" for n in counts]
        images, each, total, hours = rest.split(" | ")
        assert images == f"{seen:,}"
        assert re.findall(r"[\d.]+", each) == forward
        assert total == f"{3 * mean * seen / 1e18:.2f} E"
        rate = PROTOTYPE[config.model.size] * count_flops(config.model, 1000, 224) / mean
        assert hours == f"{seen / rate / 3600:.1f}"
