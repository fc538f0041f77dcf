"""Training in several processes equals training in one, and all processes stop together."""

import dataclasses
import fcntl
import os
import random
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from vitral import evaluate, storage, weights
from vitral.config import DataConfig
from vitral.data import loader
from vitral.data.formats import open_dataset
from vitral.engines.choice import with_engine
from vitral.rundir import read_rows
from vitral.training import loop, validation
from vitral.training.distributed import gather_full, process_world
from vitral.training.run import open_data_once

from .processes import (
    REPRODUCIBLE,
    digests,
    errors,
    finish,
    folder_of,
    make_config,
    newest,
    run,
    start,
    wait_for,
    words,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

STEPS = 16  # of a run


def log_samples(file):
    """Returns a hook that logs step, position, image size, epoch and index of fetched samples."""
    fetch = loader.fetch

    def logged(requests):
        with file.open("a") as lines:
            for r in requests:
                for position, sample in enumerate(zip(r.epochs, r.indices, strict=True), r.first):
                    print(r.step, position, r.image_size, *sample, file=lines)
                lines.flush()
                yield r

    def hook(_):
        def fetch_logged(records, config, requests, *rest):
            training = not isinstance(requests, list)
            return fetch(records, config, logged(requests) if training else requests, *rest)

        loader.fetch = fetch_logged

    return hook


def samples(file, first=0, last=STEPS):
    """Returns the samples of steps `first` to `last` - 1, sorted: (step, position, ...)."""
    rows = [tuple(map(int, line.split())) for line in file.read_text().splitlines()]
    return sorted(row for row in rows if first <= row[0] < last)


@pytest.mark.parametrize(
    ("size", "batch", "parallel"),
    [
        (2, 4, "ddp"),  # six batches, the last of three images
        (3, 4, "ddp"),
        (4, 4, "ddp"),
        (4, 256, "ddp"),  # one batch
        (3, 10, "fsdp"),  # one batch per process
        (2, 9, "fsdp"),  # one process has an additional batch
        (4, 256, "fsdp"),
    ],
)
def test_every_image_is_validated_once(pictures, tmp_path, monkeypatch, size, batch, parallel):
    """All metrics are bit-identical to those of one process."""
    monkeypatch.setattr(validation, "EVAL_BATCH", batch)
    more = {"train__parallel": parallel, "train__epochs": 4, "train__micro_batch": 8}
    out = run(words(pictures, tmp_path / "run", **more), size)
    (row,) = (row for row in read_rows(out / "metrics.jsonl") if "val_loss" in row)
    for kind, name in (("model", "val"), ("ema", "ema")):
        found = with_engine(weights.load(out / "weights" / "last", which=kind), "plain")
        alone = evaluate(found, batch_size=min(batch, 23), workers=0)
        assert {k: row[f"{name}_{k}"] for k in alone.metrics()} == alone.metrics()
        assert np.bincount(alone.labels).tolist() == [1, 2, 3, 4, 6, 7]
    table = (out / "per_class.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[1]) for line in table] == [1, 2, 3, 4, 6, 7]


PLAIN = {
    "model__dropout": 0,
    "model__stochastic_depth": 0,
    "model__num_registers": 2,
    "model__layer_scale": 0.1,
    "model__qk_norm": True,
    "model__rope": "mixed",
    "augment__repeats": 2,
    "optim__clip_norm": 0.5,
    "optim__eps": 1e-3,  # otherwise rounding decides the sign of steps with tiny gradients
}


@pytest.fixture(scope="module")
def alone(pictures, tmp_path_factory):
    """A run in one process without dropout, and its samples."""
    folder = tmp_path_factory.mktemp("alone")
    command = words(pictures, folder / "run", **PLAIN)
    return run(command, 1, log_samples(folder / "samples")), samples(folder / "samples")


def assert_close(out, reference):
    """Asserts that two runs have the same losses and final weights up to rounding."""
    rows, expected = (read_rows(path / "metrics.jsonl") for path in (out, reference))
    for name in ("loss", "grad_norm", "lr"):
        values = [row[name] for row in expected]
        assert [row[name] for row in rows] == pytest.approx(values, rel=2e-5), name
    for name in ("val_loss", "ema_loss"):
        assert rows[-1][name] == pytest.approx(expected[-1][name], rel=2e-5)
    for name in ("model", "ema", "optimizer"):
        found, other = (
            load_file(newest(path) / f"{name}.safetensors") for path in (out, reference)
        )
        assert found.keys() == other.keys()
        for key, value in found.items():
            torch.testing.assert_close(value, other[key], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("size", "parallel", "micro_batch"),
    [
        (2, "ddp", 4),
        (4, "ddp", 10),
        (2, "fsdp", 24),
        pytest.param(4, "fsdp", 4, marks=pytest.mark.slow),
    ],
)
def test_distributed_training_equals_one_process(
    pictures, tmp_path, alone, size, parallel, micro_batch
):
    cut = {"train__parallel": parallel, "train__micro_batch": micro_batch}
    command = words(pictures, tmp_path / "run", **PLAIN, **cut)
    out = run(command, size, log_samples(tmp_path / "samples"))
    reference, order = alone
    assert samples(tmp_path / "samples") == order
    assert_close(out, reference)


def test_every_position_of_a_batch_is_filled_once(alone):
    """With repeats, the second half of a batch has the images of the first, in the next epoch."""
    _, order = alone
    assert [row[:2] for row in order] == [(s, p) for s in range(STEPS) for p in range(48)]
    for step in range(STEPS):
        rows = order[48 * step : 48 * (step + 1)]
        assert [row[4] for row in rows[:24]] == [row[4] for row in rows[24:]]
        assert [row[3] + 1 for row in rows[:24]] == [row[3] for row in rows[24:]]


@pytest.fixture(scope="module")
def reproduced(pictures, tmp_path_factory):
    """The digests and samples of a reproducible run in one process."""
    folder = tmp_path_factory.mktemp("reproduced")
    command = words(pictures, folder / "run", **REPRODUCIBLE)
    out = run(command, 1, log_samples(folder / "samples"))
    return digests(out), samples(folder / "samples")


@pytest.mark.parametrize("size", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_reproducible_runs_are_bit_identical(pictures, tmp_path, reproduced, size):
    command = words(pictures, tmp_path / "run", **REPRODUCIBLE)
    out = run(command, size, log_samples(tmp_path / "samples"))
    found = digests(out)
    assert {"val_temperature", "ema_temperature"} <= found["state"]["metrics"].keys()
    assert (found, samples(tmp_path / "samples")) == reproduced


@pytest.mark.slow
def test_two_processes_stop_early_at_the_same_step_after_a_resume(pictures, tmp_path):
    """With a tiny learning rate, no validation improves on the first one."""
    flat = {"train__eval_every": 1, "optim__lr": 1e-12, "train__patience": 6}
    complete, killed = (words(pictures, tmp_path / name, **flat) for name in ("complete", "killed"))
    expected = digests(run(complete, 2))
    assert read_rows(tmp_path / "complete" / "metrics.jsonl")[-1]["step"] == 7
    children = start([killed] * 2)
    wait_for(children, tmp_path / "killed", 4)
    for child in children:
        os.kill(child, signal.SIGKILL)
    finish(children)
    assert digests(run(killed, 2)) == expected


def test_balanced_sampling_is_the_same_in_two_processes(pictures, tmp_path):
    """Five classes of seven images and one of one image, each six times per epoch."""
    few = tmp_path / "few"
    shutil.copytree(pictures, few)
    for image in sorted((few / "train" / "class0").iterdir())[1:]:
        image.unlink()
    changes = {"data__sampling": "balanced", "train__epochs": 8, **REPRODUCIBLE}
    outs, found = [], []
    for size in (1, 2):
        command = words(few, tmp_path / f"run{size}", **changes)
        outs.append(run(command, size, log_samples(tmp_path / f"samples{size}")))
        found.append(samples(tmp_path / f"samples{size}"))
    assert found[0] == found[1]
    assert digests(outs[0]) == digests(outs[1])
    assert len(found[0]) == 48 * 6  # 8 epochs of 36 images
    # Each copy of image 0, the only one of its class, is augmented differently.
    rare = [epoch for *_, epoch, index in found[0] if index == 0]
    assert len(rare) == len(set(rare)) == 48


def test_sharded_tensors_are_gathered_only_on_the_main_process(tmp_path):
    """The other processes keep no memory for them, which is scarce on a GPU."""

    def gather(rank):
        with process_world(gpu=False, timeout_minutes=5) as world:
            sharded = distribute_tensor(
                torch.arange(6.0), init_device_mesh("cpu", (2,)), [Shard(0)]
            )
            full = gather_full({"weight": sharded}, world)["weight"]
        right = rank or full.tolist() == [0, 1, 2, 3, 4, 5]
        os._exit(not right or full.untyped_storage().nbytes() != (24, 0)[rank])

    assert finish(start([["--out", str(tmp_path / "run")]] * 2, gather)) == [0, 0]


def test_an_unresponsive_process_causes_a_timeout(tmp_path):
    def step(rank):
        try:
            with process_world(gpu=False, timeout_minutes=0.05) as world:
                world.gather(rank)
                if rank:
                    os.kill(os.getpid(), signal.SIGSTOP)
                world.gather(rank)
        except RuntimeError:
            os._exit(7)
        os._exit(0)

    first, second = start([["--out", str(tmp_path / "run")]] * 2, step)
    assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == 7
    os.kill(second, signal.SIGKILL)
    os.waitpid(second, 0)


def stop_at(command, size, step, number, ranks, hook=None):
    """Trains until the log reaches `step`, signals some processes and returns the exit codes."""
    children = start([command] * size, hook)
    wait_for(children, folder_of(command), step)
    for rank in ranks:
        os.kill(children[rank], number)
    return finish(children)


@pytest.mark.parametrize("reproducible", [True, False])
def test_resuming_on_other_numbers_of_processes(pictures, tmp_path, reproduced, reproducible):
    """2 -> 4 -> 1: the samples are those of one run; with `reproducible`, all bits are."""
    out, at = tmp_path / "run", random.randint(1, 5)
    print("stopped at", at)
    command = words(pictures, out, **(REPRODUCIBLE if reproducible else {}))
    hooks = [log_samples(tmp_path / f"samples{k}") for k in range(3)]
    assert stop_at(command, 2, at, signal.SIGTERM, [1], hooks[0]) == [143, 143]
    begun = [0, int(newest(out).name.removeprefix("step_"))]
    assert begun[1] >= at
    assert stop_at(command, 4, begun[1] + 1, signal.SIGKILL, range(4), hooks[1]) == [-9] * 4
    begun += [int(newest(out).name.removeprefix("step_")), STEPS]
    run(command, 1, hooks[2])
    seen = [samples(tmp_path / f"samples{k}", begun[k], begun[k + 1]) for k in range(3)]
    assert [row for part in seen for row in part] == reproduced[1]
    if reproducible:
        assert digests(out) == reproduced[0]


@pytest.mark.slow
def test_resuming_with_fsdp_and_in_one_process(pictures, tmp_path, alone):
    """DDP -> FSDP -> one process: equals an uninterrupted run up to rounding."""
    out = tmp_path / "run"
    command = words(pictures, out, **PLAIN)
    assert stop_at(command, 2, 3, signal.SIGTERM, [0]) == [143, 143]
    sharded = words(pictures, out, **PLAIN, train__parallel="fsdp")
    assert stop_at(sharded, 4, 8, signal.SIGTERM, [3]) == [143] * 4
    assert_close(run(command, 1), alone[0])


@pytest.mark.parametrize(
    ("number", "rank", "parallel"),
    [(signal.SIGTERM, 1, "ddp"), (signal.SIGINT, 0, "ddp"), (signal.SIGUSR1, 1, "fsdp")],
)
def test_a_signal_to_one_process_stops_all(pictures, tmp_path, number, rank, parallel):
    """One checkpoint is written before any process exits."""

    def hook(_):
        save = loop.checkpoints.save

        def save_slowly(*args):
            time.sleep(0.5)
            save(*args)

        loop.checkpoints.save = save_slowly

    out = tmp_path / "run"
    more = {"train__checkpoint_steps": 1000, "train__epochs": 300, "data__workers": 1}
    children = start([words(pictures, out, **more, train__parallel=parallel)] * 2, hook)
    wait_for(children, out, 4)
    os.kill(children[rank], number)
    assert finish(children[1:]) == [128 + number]
    (written,) = (out / "checkpoints").iterdir()
    assert finish(children[:1]) == [128 + number]
    storage.verify(written)
    assert read_rows(out / "metrics.jsonl")[-1]["step"] == int(written.name.removeprefix("step_"))
    assert not (out / "weights").exists()


def test_a_timed_checkpoint_is_written_once(pictures, tmp_path):
    def hook(_):
        update = loop.Trainer._step

        def an_hour_passes(self, batches):
            update(self, batches)
            if self.progress.step == 4:
                self.last_checkpoint -= 3600

        loop.Trainer._step = an_hour_passes

    more = {"train__checkpoint_minutes": 30, "train__checkpoint_steps": 1000}
    out = run(words(pictures, tmp_path / "run", **more), 2, hook)
    assert len(list((out / "checkpoints").iterdir())) == 2  # the timed one and the last


def test_the_number_of_processes_affects_rounding(pair, reproduced):
    """Otherwise equal digests would prove nothing."""
    assert not [name for name in pair if pair[name] == reproduced[0][name] and "csv" not in name]


@pytest.mark.parametrize(("rank", "workers"), [(0, 0), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_a_killed_process_stops_the_others(pictures, tmp_path, pair, rank, workers):
    """The resumed run then equals an uninterrupted one."""
    command = words(pictures, tmp_path / "run", data__workers=workers)
    codes = stop_at(command, 2, 5, signal.SIGKILL, [rank])
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] not in (0, 2)
    assert digests(run(command, 2)) == pair


@pytest.mark.slow
def test_progressive_image_sizes_resume_exactly(pictures, tmp_path):
    """The run is killed just before the image size changes, in one and in two processes."""
    progressive = {"train__progressive": "8 .5 16 .5", **REPRODUCIBLE}
    command = words(pictures, tmp_path / "uninterrupted", **progressive)
    uninterrupted = run(command, 1, log_samples(tmp_path / "samples"))
    image_sizes = [row[2] for row in samples(tmp_path / "samples")]
    assert image_sizes == [8] * 48 * 8 + [16] * 48 * 8
    for size in (1, 2):
        command = words(pictures, tmp_path / f"{size}", **progressive, train__checkpoint_steps=1)
        assert stop_at(command, size, 6, signal.SIGKILL, range(size)) == [-9] * size
        assert digests(run(command, size)) == digests(uninterrupted)


@pytest.fixture
def data_error():
    """Runs commands that must fail in all processes, with one line of stderr from one of them."""

    def expect(commands, *fragments, hook=None):
        out = folder_of(commands[0])
        before = contents(out)
        assert finish(start(commands, hook)) == [2] * len(commands)
        text = "".join(errors(commands[0], rank).read_text() for rank in range(len(commands)))
        assert re.fullmatch(r"vitral: .+\n", text), text
        for fragment in fragments:
            assert fragment in text, text
        return before == contents(out)

    return expect


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    # Closing the lock file would release the lock.
    return {path: path.read_bytes() for path in files if path.name != ".lock"}


@pytest.mark.parametrize(
    ("size", "more", "fragments"),
    [
        (
            4,
            {"train__batch_size": 44},
            ["multiple of 8, twice the number of processes (4), got 44", "nearest is 48"],
        ),
        (3, REPRODUCIBLE, ["train.reproducible: expected 1, 2, 4 or 8 processes, got 3"]),
        (1, {**REPRODUCIBLE, "train__batch_size": 40}, ["twice the number of shards", "got 40"]),
        (2, {**REPRODUCIBLE, "train__batch_size": 40}, ["twice the number of shards", "got 40"]),
        (2, {**REPRODUCIBLE, "train__parallel": "fsdp"}, ["train.parallel: expected ddp"]),
        (2, {"data": "/no/such/folder"}, ["vitral: data: /no/such/folder"]),
    ],
)
def test_invalid_settings_of_processes_are_rejected(
    pictures, tmp_path, data_error, size, more, fragments
):
    assert data_error([words(pictures, tmp_path / "run", **more)] * size, *fragments)
    assert not (tmp_path / "run").exists()


def own_machine(_):
    """Makes a process the only one on its machine."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def test_data_that_differs_between_machines_is_rejected(pictures, tmp_path, data_error):
    out, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(pictures, other)
    (other / "train" / "class0" / "00.jpg").unlink()
    for data, fragments in {
        "/no/such/folder": ["process 1: ", "/no/such/folder"],
        other: ["not the same in all processes"],
    }.items():
        assert data_error([words(pictures, out), words(data, out)], *fragments, hook=own_machine)
        assert not out.exists()


def test_one_process_of_each_machine_lists_the_files(pictures, tmp_path):
    """Two processes run on one machine, one of them without data, and a third on another."""
    expected = open_dataset(DataConfig(path=str(pictures)), 16, 0).fingerprint

    def opened(rank):
        os.environ |= {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": str(2 - rank // 2)}
        config = make_config(tmp_path / "missing" if rank == 1 else pictures, tmp_path / "run")
        with process_world(gpu=False, timeout_minutes=5) as world:
            dataset = open_data_once(config, None, world)
        os._exit(dataset.fingerprint != expected)

    commands = [["--out", str(tmp_path / "run")]] * 3
    assert finish(start(commands, opened)) == [0] * 3, errors(commands[1], 1).read_text()


@pytest.fixture
def stopped(pictures, tmp_path):
    """The command of a run that was stopped before its end."""
    command = words(pictures, tmp_path / "run")
    assert stop_at(command, 2, 4, signal.SIGTERM, [0, 1]) == [143, 143]
    return command


def test_unusable_run_directories_are_rejected(pictures, stopped, data_error):
    out = folder_of(stopped)
    with (out / ".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        assert data_error([stopped] * 2, "another process is training", str(out))
    assert data_error(
        [words(pictures, out, optim__lr=0.5)] * 2, "optim.lr", "0.5", f"--out {out}-2"
    )
    for manifest in out.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    assert data_error([stopped] * 2, "no checkpoint in", "can be used")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(("split", "who"), [("train", ""), ("val", "process 1: ")])
def test_a_broken_image_in_one_process_stops_all(
    pictures, tmp_path, monkeypatch, data_error, split, who, parallel
):
    monkeypatch.setattr(validation, "EVAL_BATCH", 4)
    folder = tmp_path / "images"
    shutil.copytree(pictures, folder)
    bad = folder / split / "class5" / "06.jpg"
    bad.write_bytes(b"no image")
    more = {"train__parallel": parallel, "train__epochs": 2, "train__batch_size": 12}
    data_error([words(folder, tmp_path / "run", **more)] * 2, f"vitral: {who}data:", str(bad))
    assert not (tmp_path / "run" / "weights").exists()


def poison(steps):
    """Returns a hook that makes images of the second process non-finite at some steps."""
    train_batches, fit = loop.train_batches, loop.Trainer.fit

    def hook(rank):
        def poisoned(*args, **settings):
            for batch in train_batches(*args, **settings):
                bad = rank == 1 and batch.step in steps
                images = batch.images * float("inf") if bad else batch.images
                yield dataclasses.replace(batch, images=images)

        def keep_own_weights(self):
            fit(self)
            as_main = dataclasses.replace(self.world, rank=0)  # so that each process keeps its own
            tensors = {"model": gather_full(self.optimizer.named, as_main)}
            storage.write(self.run.path / f"weights_of_{rank}", tensors, {})

        loop.train_batches = poisoned
        loop.Trainer.fit = keep_own_weights

    return hook


@pytest.mark.parametrize("way", [{}, {"train__parallel": "fsdp"}, REPRODUCIBLE])
def test_a_non_finite_step_in_one_process_is_skipped_in_all(pictures, tmp_path, way):
    more = {"train__epochs": 6, "train__checkpoint_steps": 1, **way}
    out = run(words(pictures, tmp_path / "run", **more), 2, poison([3]))
    assert [row["skipped"] for row in read_rows(out / "metrics.jsonl")] == [0, 0, 0, 1, 1, 1]
    names = [*(f"checkpoints/step_{k:07d}" for k in (4, 5, 6)), "weights_of_0", "weights_of_1"]
    after = [(out / name / "model.safetensors").read_bytes() for name in names]
    assert after[0] != after[1] != after[2] == after[3] == after[4]


def test_ten_non_finite_steps_in_one_process_stop_all(pictures, tmp_path, data_error):
    data_error(
        [words(pictures, tmp_path / "run")] * 2,
        "10 consecutive updates before step",
        hook=poison(range(2, 20)),
    )
    tensors = storage.read_tensors(newest(tmp_path / "run"), "model")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
