"""The metrics log, TensorBoard events and console output."""

import io
import json
import os
import resource
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitral.rundir import RunDir, read_rows
from vitral.training import metrics
from vitral.training.metrics import Console, MetricsLog


def row(step, **more):
    return {"step": step, "epoch": step / 4, "images": 8 * step, "seconds": 1.5 * step, **more}


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path)


def write(run, step, rows):
    """Continues a log from a step; returns its totals."""
    log = MetricsLog(run, step)
    for each in rows:
        log.write(each)
    log.close()
    return log.totals


def test_rows_are_read_as_they_were_written(run):
    rows = [row(1, loss=0.1 + 0.2, lr=1e-30), row(2, loss=float("1e300"), val_top1=1 / 3)]
    assert write(run, 0, rows) == (0, 0)
    assert read_rows(run.metrics) == rows
    assert all(json.loads(line) for line in run.metrics.read_text().splitlines())


@pytest.mark.parametrize("tail", ["", '{"step": 7, "ep', '{"step": 7}\n', "\x00\x00"])
def test_rows_after_the_resumed_step_are_removed(run, tail):
    """And so is a line that a kill truncated."""
    write(run, 0, [row(k, energy_kwh=k / 10) for k in range(1, 7)])
    with run.metrics.open("a") as file:
        file.write(tail)
    assert write(run, 4, [row(5, loss=2.0)]) == (6.0, 0.4)
    expected = [*(row(k, energy_kwh=k / 10) for k in range(1, 5)), row(5, loss=2.0)]
    assert read_rows(run.metrics) == expected
    assert not list(run.path.glob(".*"))


def test_tensorboard_shows_each_step_once(run):
    write(run, 0, [row(k, loss=float(k)) for k in range(1, 7)])
    write(run, 4, [row(k, loss=10.0 * k) for k in (5, 6)])
    found = EventAccumulator(str(run.tensorboard)).Reload()
    assert {"loss", "epoch", "seconds"} <= set(found.Tags()["scalars"])
    shown = [(event.step, event.value) for event in found.Scalars("loss")]
    assert shown == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0), (6, 60.0)]


def test_tensorboard_has_the_first_batch(run):
    log = MetricsLog(run, 0)
    log.picture(torch.zeros(3, 5, 7, dtype=torch.uint8))
    found = EventAccumulator(str(run.tensorboard)).Reload()
    log.close()
    (image,) = found.Images("train_batch")
    assert (image.height, image.width) == (5, 7)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", ["metrics.jsonl", "train.log", "tensorboard"])
def test_a_file_that_cannot_grow_is_named(run, name, tmp_path):
    """By one error, and not in another thread. The size limit applies to a forked process."""
    log, console = MetricsLog(run, 0), Console(run.log, 100, 0, quiet=False)
    run.metrics.write_text("x" * 990)
    child = os.fork()
    if not child:
        os.dup2(os.open(tmp_path / "stderr", os.O_WRONLY | os.O_CREAT), 2)
        code = 99
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            for step in range(1, 10_000):
                if name == "train.log":
                    console.message("x" * 100)
                elif name == "tensorboard":
                    log.board.scalars(step, {"x": 1.0})
                else:
                    log.write(row(step, text=1.0))
        except OSError as error:
            code = 0 if f"{tmp_path}/{name}" in str(error.filename) else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / "stderr").read_text() == ""
    log.close()
    console.close()


VALUES = {"epoch": 1.25, "loss": 2.3456, "lr": 0.00123, "grad_norm": 0.876}
PACE = {"images_per_second": 1234.5, "data_wait": 0.07, "memory_gb": 1.26}
TEXT = "epoch 1.2  loss 2.346  lr 1.2e-03  norm 0.88  1,234 img/s  data wait 7%  1.3 GB"


def test_without_a_terminal_progress_lines_are_printed_and_logged(run, capsys):
    console = Console(run.log, 100, 0, quiet=False)
    console.message("starts")
    console.progress(40, VALUES, PACE, 75.0)
    console.progress(41, VALUES, {**PACE, "mfu": 0.456}, 5.0)
    console.close()
    shown = [
        "starts",
        f"step 40/100  {TEXT}  ETA 1:15",
        f"step 41/100  {TEXT}  MFU 46%  ETA 5 s",
    ]
    assert capsys.readouterr().out.splitlines() == shown
    kept = run.log.read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in kept] == shown  # after date and time
    Console(run.log, 100, 41, quiet=False).close()
    assert run.log.read_text().splitlines() == kept  # a resumed run appends


def test_a_quiet_console_prints_and_writes_nothing(run, capsys):
    console = Console(run.log, 100, 0, quiet=True)
    console.message("starts")
    console.progress(40, VALUES, PACE, 75.0)
    console.close()
    assert capsys.readouterr() == ("", "")
    assert not run.log.exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_and_messages_above_it(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    console = Console(run.log, 100, 20, quiet=False)
    console.progress(40, VALUES, PACE, 75.0)
    console.message("validated")
    console.close()
    shown = sys.stdout.getvalue()
    assert " 20%|" in shown
    assert " 40%|" in shown
    assert "40/100" in shown
    assert TEXT in shown
    assert "\rvalidated\n" in shown.replace(" ", "")
    assert [line.split(" ", 2)[2] for line in run.log.read_text().splitlines()] == ["validated"]


def test_a_notebook_gets_a_bar_too(run, monkeypatch):
    monkeypatch.setattr(metrics, "in_notebook", lambda: True)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    console = Console(run.log, 100, 20, quiet=False)
    for step in (40, 60):
        console.progress(step, VALUES, PACE, 75.0)
    console.close()
    text = sys.stdout.getvalue()
    assert "60/100" in text
    assert TEXT in text
    assert text.count("\n") == 1  # the end of the bar
    quiet = Console(run.log, 100, 20, quiet=True)
    quiet.progress(40, VALUES, PACE, 75.0)
    quiet.close()
    assert run.log.read_text() == ""


@pytest.mark.parametrize(("stream", "seconds"), [(io.StringIO, 5.0), (Terminal, 0.5)])
def test_progress_is_due_at_intervals(run, monkeypatch, stream, seconds):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stdout", stream())
    console = Console(run.log, 100, 0, quiet=False)
    for _ in range(2):
        assert not console.due()
        now[0] += seconds - 0.01
        assert not console.due()
        now[0] += 0.02
        assert console.due()
        console.progress(40, VALUES, PACE, 75.0)
    console.close()


def test_messages_are_logged_without_a_terminal(run, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        console = Console(run.log, 100, 0, quiet=False)
        for text in ("first", "second"):
            console.message(text)
        console.close()
    lines = run.log.read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["first", "second"]
