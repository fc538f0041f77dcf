import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitral import cli, settings, storage, weights
from vitral.cli import completion
from vitral.cli.common import given_settings
from vitral.config import Config, ViTConfig
from vitral.errors import UserError
from vitral.model import ViT
from vitral.rundir import RunDir, read_rows

ROOT = Path(__file__).parent.parent
TIMEOUT = 90.0  # seconds until a process counts as hanging


DOCUMENTS = ["README.md", *sorted(f"docs/{page.name}" for page in ROOT.glob("docs/*.md"))]
SCRIPTS = ["examples/slurm.sh", "examples/ray_train.py"]


def commands_in(name):
    """The words after `vitral` of each command in a script, or in a document's blocks and text."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    lines = text.splitlines()
    if name.endswith(".md"):
        blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines()]
        # Not spans that only name a command or contain a placeholder: `vitral data check PATH`.
        spans = re.findall(r"`(vitral [^`]+(?:/| --)[^`]*)`", text)
        lines += [span for span in spans if not re.search(r" [A-Z]+( |$)", span)]
    for line in lines:
        line = re.sub(r"^.*(?:slurm\.sh|ray_train\.py \d+) (?=imagenet)", "vitral train ", line)
        line = re.sub(r"^.*own_folder\.py ", "vitral train imagenette128 --data ", line)
        for found in re.findall(r"(?:^\W*|[&|] |-m )vitral ([^$]+)$", line):
            found = re.sub(r"\bN\b", "0", re.sub(r"`.*", "", found))
            words = shlex.split(found, comments=True)
            yield list(takewhile(lambda word: word not in ("|", ">", "&&"), words))


def parse(words):
    """Parses a command as `vitral` does, without reading the reader's files."""
    if words == ["--help"]:
        return
    name, words = cli._choose(words)
    module, args = cli._module(name), cli.parser_for(name).parse(words)
    if hasattr(module, "Options"):
        settings.options(args, module.Options())
    if "recipe" in args:
        given = given_settings(args)
        if (args.recipe or "").endswith(".yaml"):
            args.recipe = "digits"  # instead of a file of the reader
        # Not load_config, which would read the weights. Their patch size limits the image size.
        if "train.init" in given:
            given.pop("model.image_size", None)
        recipe = args.recipe or settings.default_recipe(given, gpu=False)
        settings.load(recipe, given)
    if name == "recipes" and args.name is not None:
        settings.recipe_text(args.name)
    if name == "completion":
        assert args.shell in completion.SHELLS


@pytest.mark.parametrize("name", [*DOCUMENTS, *SCRIPTS])
def test_commands_have_recipes_and_settings_that_exist(name):
    commands = list(commands_in(name))
    assert commands or "```sh" not in (ROOT / name).read_text()
    for command in commands:
        parse(command)


def test_invalid_commands_are_detected():
    for wrong in (
        "train digit", "train --model.dimm 3", "val", "val runs/digits --wich ema", "predict runs",
        "data pack src", "data chekc path", "bench data path digits --data.worker 1", "trian",
        "recipes digit", "doctor all", "completion csh",
    ):  # fmt: skip
        with pytest.raises((UserError, AssertionError)):
            parse(wrong.split())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_yaml_blocks_are_valid_recipes(name, tmp_path):
    blocks = r"^```yaml.*?\n(.*?)^```"
    for text in re.findall(blocks, (ROOT / name).read_text(), re.MULTILINE | re.DOTALL):
        (tmp_path / "recipe.yaml").write_text(text)
        settings.load(str(tmp_path / "recipe.yaml"))


def test_the_own_folder_page_end_to_end(tmp_path, monkeypatch, capsys):
    """Runs all commands of the page except training from scratch, with a small model and images."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for level, name in enumerate(("n01440764", "n03888257")):
            folder = Path("photos", split, name)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 100, (20, 24, 3)) + 150 * level
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    shutil.copy("photos/val/n03888257/0.png", "photo.jpg")
    small = ViTConfig(dim=16, depth=2, num_heads=2, num_kv_heads=1, image_size=112)
    description = weights.describe(Config(model=small), ("a", "b"), "", {})
    weights.save(Path("small"), {"model": ViT(small, 2).state_dict()}, description)
    commands = [w for w in commands_in("docs/own-folder.md") if "imagenette128" not in w]
    commands = [words for words in commands if {"photos", "runs/probe"} & {*words}]
    ran = []
    for words in commands:
        words = ["small" if word.startswith("timm:") else word for word in words]
        short = ["--epochs", "1", "--batch-size", "4"] if words[0] == "train" else []
        assert cli.main([*words, *short]) == 0, words
        ran.append(" ".join(words[:2]))
    expected = (
        "data check, data check, train --data, train finetune, data preview, report runs/probe"
    )
    expected += ", predict runs/probe, explain runs/probe, val runs/probe, report runs/probe"
    assert ", ".join(ran) == expected
    assert RunDir("runs/probe").features.is_dir()
    assert "n03888257 parachute" in capsys.readouterr().out


@pytest.fixture
def job(tmp_path):
    """The environment of a job on one node, with substitutes for srun, torchrun and scontrol."""
    commands = {
        "srun": 'while test "$1" != torchrun; do shift; done; exec "$@"',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
        "scontrol": f'echo "$@" > {tmp_path}/scontrol',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "2"}
    return {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_slurm_job_writes_a_checkpoint_and_requeues_itself_when_its_time_is_up(job, tmp_path):
    out, script = tmp_path / "run", (ROOT / "examples" / "slurm.sh").read_text()
    assert "--signal=B:USR1" in script  # only to the script, not to the processes of srun
    small = "--model.depth 1 --train.device cpu --train.log-every 1 --train.checkpoint-steps 100000"
    words = ["digits", "--out", str(out), "--train.epochs", "300", *small.split()]
    with (tmp_path / "log").open("w") as log:
        parent = subprocess.Popen(
            ["bash", "-c", script.replace("=gpu ", "=2 "), "slurm.sh", *words],
            env=job, stdout=log, stderr=log,
        )  # fmt: skip
    while not any(row["step"] >= 4 for row in read_rows(out / "metrics.jsonl")):
        time.sleep(0.01)
        assert parent.poll() is None, (tmp_path / "log").read_text()
    parent.send_signal(signal.SIGUSR1)
    assert parent.wait(TIMEOUT) == 128 + signal.SIGUSR1
    assert (tmp_path / "scontrol").read_text() == f"requeue {os.getpid()}\n"
    assert "in each of 2 processes" in (out / "train.log").read_text()
    (written,) = (out / "checkpoints").iterdir()
    storage.verify(written)
    assert read_rows(out / "metrics.jsonl")[-1]["step"] == int(written.name.removeprefix("step_"))
