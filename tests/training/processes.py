"""Small training runs in forked processes, and digests that are the same for equal runs."""

import hashlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401  DDP imports it; import it once, not in every fork

from vitral import settings
from vitral.cli import main
from vitral.report import curves, html  # noqa: F401  as above
from vitral.rundir import RunDir, read_rows
from vitral.training import Interrupted, train
from vitral.training.metrics import CLOCK_COLUMNS

TIMEOUT = 90.0  # seconds after which a process is considered stuck
COMMON = {
    "model.dim": 16,
    "model.depth": 2,
    "model.num-heads": 4,
    "model.num-kv-heads": 2,
    "model.patch-size": 4,
    "model.image-size": 16,
    "model.dropout": 0.1,
    "model.stochastic-depth": 0.3,
    "augment.policy": "trivialaugment",
    "augment.erasing": 0.5,
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "optim.warmup-epochs": 1,
    "train.ema-decay": 0.95,
    "train.log-every": 1,
    "train.checkpoint-steps": 3,
    "train.threads": 1,
}
# 27 steps: 8 * 40 images of `image_folder` in batches of 12.
SINGLE = {**COMMON, "train.epochs": 8, "train.batch-size": 12, "train.micro-batch": 8}
# 16 steps: 18 * 42 images of `pictures` in batches of 48.
DISTRIBUTED = {
    **COMMON,
    "data.workers": 0,
    "train.device": "cpu",
    "train.epochs": 18,
    "train.eval-every": 100,
    "train.batch-size": 48,
    "train.micro-batch": 4,
}
REPRODUCIBLE = {"train__reproducible": True}  # six images in each shard, in micro-batches of four


def options(base, changes):
    """Returns the options of a command: `base` with changes, whose names use __ for dots."""
    values = base | {n.replace("__", ".").replace("_", "-"): v for n, v in changes.items()}
    flags = [f"--{name}" for name, value in values.items() if value is True]
    pairs = [(f"--{n}", *str(v).split()) for n, v in values.items() if v is not True]
    return [*flags, *(word for pair in pairs for word in pair)]


def make_config(data, out, /, **changes):
    """Returns the settings of a run in one process: SINGLE with changes."""
    places = {"data.path": data, "train.out": out}
    return settings.load("digits", options(SINGLE | places, changes))


def words(data, out, /, **changes):
    """Returns a command that trains in several processes: DISTRIBUTED with changes."""
    return ["train", "digits", *options(DISTRIBUTED | {"data": data, "out": out}, changes)]


def folder_of(command):
    return Path(command[command.index("--out") + 1])


def fork(action, environment=None, stderr=None):
    """Runs `action` in a forked process, which exits with the code that it returns.

    Args:
        environment: changes to the process's environment.
        stderr: file for stderr, including a traceback.

    Returns:
        The process ID, which is also the ID of the process group of its workers.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgrp()
        os.environ |= environment or {}
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        sys.stderr = (stderr or Path(os.devnull)).open("w")
        os.dup2(sys.stderr.fileno(), 2)
        code = action()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def start_single(config):
    """Trains in a forked process, as torch takes seconds to import; returns its ID."""

    def action():
        try:
            train(config)
        except Interrupted as interrupted:
            return interrupted.exit_code
        return 0

    out = Path(config.train.out)
    return fork(action, stderr=out.with_name(f"{out.name}.err"))


def finish_single(config):
    """Trains in a forked process and returns its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(start_single(config), 0)[1])


def signal_at(config, step, number):
    """Trains until the log reaches `step`, sends a signal and returns the exit code."""
    child = start_single(config)
    wait_for([child], Path(config.train.out), step)
    os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


STARTED: list[int] = []


def start(commands, hook=None):
    """Runs each command in a forked process of the same training run; returns their IDs.

    Args:
        hook: called in each process, with its rank, before the command.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    children = [_fork_rank(rank, commands, port, hook) for rank in range(len(commands))]
    STARTED.extend(children)
    return children


def _fork_rank(rank, commands, port, hook):
    size, command = str(len(commands)), commands[rank]
    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    environment |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def action():
        if hook is not None:
            hook(rank)
        return main(command)

    return fork(action, environment, errors(command, rank))


def errors(command, rank):
    """Returns the file with the stderr of a process."""
    out = folder_of(command)
    return out.with_name(f"{out.name}.{rank}.err")


def finish(children):
    """Returns the exit codes of processes, once they and their workers have ended."""
    codes, end = {}, time.monotonic() + TIMEOUT
    while (left := set(children) - set(codes)) or any(map(alive, children)):
        for child in left:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            pytest.fail(f"a process or its worker is still running; of {children}, {codes} ended")
        time.sleep(0.001)
    return [codes[child] for child in children]


def alive(group):
    """Returns whether a process group has a process."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def end_all():
    """Ends processes that a failed test leaves behind."""
    for child in filter(alive, STARTED):
        os.killpg(child, signal.SIGKILL)
    STARTED.clear()


def run(command, size, hook=None):
    """Trains to the end in `size` processes and returns the run directory."""
    codes = finish(start([command] * size, hook))
    assert codes == [0] * size, [errors(command, rank).read_text() for rank in range(size)]
    return folder_of(command)


def wait_for(children, out, step):
    """Waits until the log reaches `step`."""
    while not any(row["step"] >= step for row in read_rows(RunDir(out).metrics)):
        time.sleep(0.001)
        for child in children:
            assert os.waitpid(child, os.WNOHANG)[0] == 0, f"ended before step {step}"


def newest(out):
    """Returns the directory of the last checkpoint."""
    return max(RunDir(out).checkpoints.iterdir())


def digests(out):
    """Returns digests of all tensors and tables, and the log without its clock columns."""
    run = RunDir(out)
    files = [*newest(out).glob("*.safetensors"), *run.weights.glob("*/*.safetensors")]
    tables = [run.path / "per_class.csv", run.path / "confused_pairs.csv"]
    files += [table for table in tables if table.exists()]  # there are no pairs of several labels
    found = {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    assert len(found) in (8, 9), sorted(found)
    rows = read_rows(run.metrics)
    found["log"] = json.dumps(
        [{k: v for k, v in r.items() if k not in CLOCK_COLUMNS} for r in rows]
    )
    state = json.loads((newest(out) / "state.json").read_text())
    found["state"] = {k: state[k] for k in ("step", "best", "evaluated", "counters", "metrics")}
    return found


def damage(file, kind):
    """Truncates a file, flips a bit in its middle, or deletes it."""
    data = file.read_bytes()
    middle = len(data) // 2
    if kind == "truncated":
        file.write_bytes(data[:middle])
    elif kind == "flipped":
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    else:
        file.unlink()
