"""Worker processes: results in order, despite failures."""

import errno
import gc
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import tempfile
import threading

import pytest
import torch
from torch.utils.data import Dataset

from vitral.data import workers as module
from vitral.data.workers import in_workers
from vitral.errors import UserError


class Doubled(Dataset):
    def __getitem__(self, index):
        return 2 * index


@pytest.mark.skipif(sys.version_info < (3, 12), reason="older versions do not warn")
def test_workers_start_in_a_process_with_threads():
    """CUDA starts threads in every process; from Python 3.12, a fork warns about them."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        assert list(in_workers(Doubled(), range(3), workers=1)) == [0, 2, 4]
    finally:
        end.set()
        thread.join()


class Failing(Dataset):
    def __getitem__(self, index):
        if index == 1:
            raise OSError(errno.EIO, "Input/output error", "a.jpg")
        raise UserError("b.jpg: Too many open files")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("index", "kind"), [(1, OSError), (2, UserError)])
def test_errors_in_workers_equal_those_of_the_dataset(index, kind, workers):
    """torch would replace them with errors of many lines, without the name of the file."""
    with pytest.raises(kind) as caught:
        list(in_workers(Failing(), [index], workers))
    if kind is OSError:
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, "a.jpg")
    else:
        assert str(caught.value) == "b.jpg: Too many open files"


class Unsendable(Dataset):
    def __getitem__(self, index):
        return lambda: index  # cannot be pickled


def test_other_send_errors_are_not_reported_as_a_full_disk(monkeypatch):
    # Seconds that torch waits, twice, for a worker that ignores its signal.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    with pytest.raises((AttributeError, pickle.PicklingError), match="pickle"):
        list(in_workers(Unsendable(), range(3), workers=1))
    gc.collect()  # the traceback keeps the reader alive in a reference cycle
    for worker in multiprocessing.active_children():  # as the command does at exit
        worker.kill()
        worker.join()


@pytest.mark.parametrize("spare", [5, 10, 14])
def test_too_few_file_descriptors_cause_fewer_workers_or_an_error(spare, capfd):
    """Starting workers can fail at several places; no process is left in any case."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    before = {*multiprocessing.active_children()}
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, hard))
    try:
        batches = in_workers(Doubled(), range(9), workers=4)
        assert list(batches) == [2 * i for i in range(9)]
        output = capfd.readouterr().err
        assert output.startswith("vitral: ")
        assert "of 4 data workers can be started: Too many open files" in output
    except UserError as error:
        assert "too many open files; raise the limit" in str(error)  # noqa: PT017
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    gc.collect()
    assert {*multiprocessing.active_children()} <= before


def in_daemon(_):
    return list(in_workers(Doubled(), range(3), workers=2))


def test_a_daemonic_process_fetches_without_workers(capfd):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(in_daemon, [0]) == [[0, 2, 4]]
    output = "vitral: 0 of 2 data workers can be started: daemonic processes cannot have children\n"
    assert capfd.readouterr().err == output


class Tensors(Dataset):
    def __getitem__(self, index):
        return torch.full((3,), index)


@pytest.mark.skipif(sys.platform != "linux", reason="sockets are files elsewhere")
def test_workers_need_no_temporary_files(tmp_path, monkeypatch):
    """Killed workers leave none behind, and a long TMPDIR does not matter."""
    place = tmp_path / ("x" * 120)
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    for k, tensor in enumerate(in_workers(Tensors(), range(4), workers=2)):
        assert tensor.tolist() == [k] * 3
        assert not [*place.iterdir()]


class Stopping(Dataset):
    def __getitem__(self, index):
        if index == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        return index

    def locations(self, request):
        return [f"/mnt/{request}.jpg"]


def test_slow_samples_are_reported_and_work_continues(monkeypatch):
    lines = []

    def record(line):
        lines.append(line)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGCONT)

    monkeypatch.setattr(module, "_print_warning", record)
    monkeypatch.setattr(module, "POLL", 1)
    monkeypatch.setattr(module, "REPORT_AFTER", 1)
    assert list(in_workers(Stopping(), range(4), workers=2)) == [0, 1, 2, 3]
    assert lines == ["waiting for /mnt/0.jpg (1 s so far)"]


def test_a_closed_stderr_only_loses_the_message(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    module._print_warning("a line")
