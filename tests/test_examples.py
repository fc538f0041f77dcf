import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitral import recipes, storage
from vitral.training.metrics import read_rows

ROOT = Path(__file__).parent.parent
PATIENCE = 90.0  # seconds, after which a process hangs


@pytest.mark.parametrize("name", ["docs/imagenet.md", "examples/slurm.sh", "examples/ray_train.py"])
def test_commands_have_recipes_and_settings_that_exist(name):
    text = (ROOT / name).read_text().replace("\\\n", " ")
    commands = re.findall(r"(?:vitral train|slurm\.sh|ray_train\.py \d+) (imagenet-.*)", text)
    assert commands
    for command in commands:
        recipe, *words = shlex.split(
            re.sub("--gpus [0-9]+|--dry-run|`.*", "", command), comments=True
        )
        recipes.load(recipe, words)


@pytest.fixture
def job(tmp_path):
    """The environment of a job of one node, with what stands for srun and scontrol."""
    commands = {
        "srun": 'while test "$1" != torchrun; do shift; done; exec "$@"',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
        "scontrol": f'echo "$@" > {tmp_path}/scontrol',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    told = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "2"}
    return {**os.environ, **told, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_slurm_job_writes_a_checkpoint_when_its_time_is_up(job, tmp_path):
    """And is put back into the queue, to go on from there."""
    out, script = tmp_path / "run", (ROOT / "examples" / "slurm.sh").read_text()
    assert "--signal=B:USR1" in script  # to the script alone, not to what srun began
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
    assert parent.wait(PATIENCE) == 128 + signal.SIGUSR1
    assert (tmp_path / "scontrol").read_text() == f"requeue {os.getpid()}\n"
    assert "in each of 2 processes" in (out / "train.log").read_text()
    (written,) = (out / "checkpoints").iterdir()
    storage.verify(written)
    assert read_rows(out / "metrics.jsonl")[-1]["step"] == int(written.name.removeprefix("step_"))
