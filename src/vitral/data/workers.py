"""Starts, monitors and terminates worker processes that fetch items of a dataset."""

from __future__ import annotations

import atexit
import contextlib
import errno
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import secrets
import signal
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

from torch.utils.data import DataLoader, Dataset

from vitral.compat import abandon_loader, is_loader_timeout, loader_workers, wrap_exception
from vitral.errors import UserError, counted, first_few, reason_of

T = TypeVar("T")
POLL, REPORT_AFTER = 5, 60  # seconds between checks, and until a missing batch is reported
_started = weakref.WeakSet[BaseProcess]()  # workers


def in_workers(
    dataset: Dataset[T], requests: Iterable[Any], workers: int, pin_memory: bool = False
) -> Iterator[T]:
    """Yields the item of `dataset` for each request, in order, fetched by worker processes.

    If they cannot be started, fewer or none are used, and a line on stderr reports it. If nothing
    arrives for a minute, another line reports the request with the dataset's `locations(request)`.
    """
    pending: deque[Any] = deque()
    requested, reason = workers, ""
    if workers and multiprocessing.current_process().daemon:
        workers, reason = 0, "daemonic processes cannot have children"

    def recorded_requests() -> Iterator[Any]:
        for request in requests:
            pending.append(request)
            yield request

    source = recorded_requests()
    while True:
        try:
            batches = _start(dataset, source, workers, pin_memory)
            break
        except (OSError, RuntimeError) as error:
            if not workers:
                raise
            workers, reason = workers // 2, reason_of(error)
    if reason:
        _print_warning(f"{workers} of {counted(requested, 'data worker')} can be started: {reason}")
    _started.update(loader_workers(batches))
    return _monitored(batches, pending, getattr(dataset, "locations", None))


def _start(
    dataset: Dataset[T], requests: Iterator[Any], workers: int, pin_memory: bool
) -> Iterator[T]:
    """Starts a DataLoader. If it raises OSError or RuntimeError, no worker remains."""
    before = {*multiprocessing.active_children()}
    with warnings.catch_warnings():
        # The user asked for more workers than cores. CUDA starts threads in every process that
        # uses it, and Python 3.12 warns about them; workers do not use CUDA.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        warnings.filterwarnings("ignore", message="This process .* is multi-threaded")
        loader = DataLoader(
            _ReturnErrors(dataset),
            batch_size=None,
            sampler=requests,
            num_workers=workers,
            collate_fn=_identity,
            pin_memory=pin_memory,
            timeout=POLL if workers else 0,
            worker_init_fn=_prepare_worker,
            multiprocessing_context="fork" if workers and hasattr(os, "fork") else None,
        )
        try:
            return iter(loader)
        except BaseException as error:
            abandon_loader(error)
            for child in {*multiprocessing.active_children()} - before:
                child.kill()  # it ignores SIGTERM, which Python would send
                child.join()
            raise


def _monitored(
    batches: Iterator[T], pending: deque[Any], locations: Callable[[Any], list[str]] | None
) -> Iterator[T]:
    """Yields the batches; reports once what it is waiting for.

    Raises:
        OSError: from the dataset, or if shared memory is full in a worker.
        UserError: from the dataset, or if there are too few file descriptors.
    """
    waited = 0
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if is_loader_timeout(error, batches):
                waited += POLL
                if waited == REPORT_AFTER:
                    what = first_few(locations(pending[0])) if locations else "the data workers"
                    _print_warning(f"waiting for {what} ({REPORT_AFTER} s so far)")
                continue
            # Does not use the reason in the message, which is wrong in torch 2.11.
            if "unable to allocate shared memory" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/dev/shm") from None
            if "Too many open files" in str(error):
                fix = "raise the limit, for example with `ulimit -n 4096`, or pass --data.workers 0"
                raise UserError(f"data: too many open files; {fix}") from None
            raise
        if isinstance(batch, _Failed):
            raise batch.error
        waited = 0
        pending.popleft()
        yield batch


class _ReturnErrors(Dataset[Any]):
    """A dataset that returns its errors; torch would replace raised ones with multi-line errors."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, request: Any) -> Any:
        try:
            return self.dataset[request]
        except (OSError, UserError) as error:
            return _Failed(error)


class _Failed(NamedTuple):
    """Replaces an item that could not be fetched."""

    error: OSError | UserError


def _print_warning(line: str) -> None:
    """Prints a line to stderr, if it is available."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        print(f"vitral: {line}", file=sys.stderr, flush=True)


def _identity(fetched: Any) -> Any:
    return fetched


def _prepare_worker(_: int) -> None:
    """Prepares a worker process.

    It ignores Ctrl-C and the signals of schedulers, which reach the entire process group; the
    training process handles them.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_error  # pyright: ignore
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    # multiprocessing's thread would report that the reader has exited. Errors of the dataset are
    # sent to the reader.
    sys.excepthook = lambda *_: None
    if sys.platform == "linux":
        multiprocessing.connection.arbitrary_address = _abstract_address  # pyright: ignore


def _abstract_address(_: str) -> str:
    """Returns an address for a socket that is not a file.

    A worker sends open files through it. With a file, SIGKILL would leave its folder behind, and a
    long TMPDIR would not fit into the address.
    """
    return f"\0vitral-{os.getpid()}-{secrets.token_hex(8)}"


def _send_error(
    queue: multiprocessing.queues.Queue[Any], error: Exception, batch: tuple[int, Any]
) -> None:
    """Sends the error instead of a batch that could not be sent, for example in full shared memory.

    The sending thread would drop the batch, and the reader would wait for it forever. If the worker
    terminated, torch would raise an error at an arbitrary point in the reader.
    """
    known = isinstance(error, OSError)
    queue.put((batch[0], _Failed(error) if known else wrap_exception(error)))


@atexit.register
def _end_workers() -> None:
    """Kills the remaining workers.

    After an error, multiprocessing would send SIGTERM, which they ignore, and wait for them.
    """
    left = [child for child in multiprocessing.active_children() if child in _started]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would treat it as an error
    for child in left:
        child.kill()
