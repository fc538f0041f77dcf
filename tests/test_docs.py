import doctest
import importlib
import re
import tomllib
from pathlib import Path

import pytest

import vitral

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["README.md"])
def test_examples_in_documents(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = doctest.testfile(str(ROOT / name), module_relative=False)
    assert result.attempted > 4
    assert result.failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", ["model", "config", "weights", "evaluation.evaluate"])
def test_examples_in_docstrings(name, capsys):
    result = doctest.testmod(importlib.import_module(f"vitral.{name}"))
    assert result.failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", ["README.md", *sorted(p.name for p in ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(name):
    page = ROOT / name if name == "README.md" else ROOT / "docs" / name
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_five_names():
    assert vitral.__all__ == ["ViT", "ViTConfig", "evaluate", "load", "train"]
    for name in vitral.__all__:
        assert getattr(vitral, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'vit'"):
        vitral.vit  # noqa: B018


def test_first_screen_of_the_readme_has_the_two_commands():
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:20])
    commands = re.findall(r"```sh\n(.*?)\n```", first, re.DOTALL)
    assert commands == ["pip install . && vitral train", "pip install '.[dev]' && pytest"]


def test_recipes_state_command_hardware_hours_and_result():
    from vitral import recipes

    for name in recipes.names():
        header = recipes.text(name).split("\n\n")[0]
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
