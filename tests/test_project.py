"""Tests of the files around the package: consistent versions, CI, and the word check."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import vitral

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def load(path):
    return yaml.safe_load((ROOT / path).read_text())


def test_changelog_and_citation_name_the_released_version():
    released = re.search(r"^## (\d\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    citation = load("CITATION.cff")
    assert released.groups() == (citation["version"], str(citation["date-released"]))
    assert citation["version"] == PROJECT["version"]


def test_the_package_is_marked_as_typed():
    assert Path(vitral.__file__).with_name("py.typed").is_file()


def test_ci_covers_the_lowest_supported_versions():
    lower = dict(d.split(">=") for d in PROJECT["dependencies"] if ">=" in d)
    job = load(".github/workflows/ci.yml")["jobs"]["linux"]
    assert {"run": ".ci/run"} in job["steps"]
    matrix = job["strategy"]["matrix"]
    [lowest] = matrix["include"]
    assert (lowest["torch"], lowest["torchvision"]) == (lower["torch"], lower["torchvision"])
    assert PROJECT["requires-python"] == f">={lowest['python']}"
    assert lowest["python"] in matrix["python"]


@pytest.fixture
def words(tmp_path):
    """Runs the check on one file of a repository; returns its exit code and output."""

    def run(name, text):
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
        (tmp_path / name).write_text(text)
        subprocess.run(["git", "add", name], cwd=tmp_path, check=True)
        script = ROOT / ".ci" / "words.py"
        command = [sys.executable, str(script)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.stderr == ""
        return done.returncode, done.stdout.splitlines()

    return run


def test_discouraged_words_are_found_in_text_and_names_and_across_lines(words):
    code, lines = words("a.py", "# Mend it\nx_told = 1\n# two, of\n# which one\n")
    assert code == 1
    assert [line.rpartition(": use ")[0] for line in lines] == [
        "a.py:1: mend", "a.py:2: told", "a.py:3: of which",
    ]  # fmt: skip


def test_other_words_and_other_files_pass(words):
    assert words("a.md", "Recommend amendments; besides, told apart.\n") == (0, [])
    assert words("a.txt", "Mend it.\n") == (0, [])
