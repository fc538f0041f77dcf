"""Communication between the processes of a training run.

torchrun starts the processes. Without it, there is a single process and no communication.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vitral.config import Config
from vitral.errors import UserError, counted
from vitral.machine import num_gpus

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
LAUNCHER = "VITRAL_LAUNCHER"  # environment variable with the process ID of `vitral train --gpus N`
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
TRAINING_LOCK = threading.Lock()  # held while this process trains
NUM_SHARDS = 8  # shards of a global batch; train.reproducible adds their gradients in a fixed order


class Interrupted(Exception):
    """Stops a run after a signal. `train` raises it after writing a checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@dataclass(frozen=True)
class World:
    """This process and its communication with the other processes of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank among the processes of this machine."""
    local_size: int = 1
    group: dist.ProcessGroup | None = None
    """Process group for communication between CPUs."""
    machine_group: dist.ProcessGroup | None = None
    """The part of `group` that is on this machine."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and messages of the run."""
        return self.rank == 0

    def device(self, kind: torch.device) -> torch.device:
        """Returns the device of this process, of the given type.

        Raises:
            UserError: if the machine has too few GPUs.
        """
        if kind.type == "cpu" or self.size == 1:
            return kind
        if self.local_size > num_gpus():
            raise UserError(
                f"gpus: expected at most {counted(num_gpus(), 'process')} on this machine, "
                f"one per GPU, got {self.local_size}"
            )
        return torch.device("cuda", self.local_rank)

    def gather(self, value: T) -> list[T]:
        """Returns the values of all processes, by rank."""
        values: list[Any] = [value]
        if self.size > 1:
            values *= self.size
            dist.all_gather_object(values, value, group=self.group)
        return values

    def run_on_all_ranks(self, action: Callable[[], T]) -> T:
        """Runs `action` in every process. A UserError in one process is raised in all."""
        return self._run_shared(action, True)  # pyright: ignore[reportReturnType]

    def run_once_per_machine(self, action: Callable[[], T]) -> T | None:
        """Runs `action` in the first process of each machine; returns None in the others.

        A UserError in one process is raised in all.
        """
        return self._run_shared(action, self.local_rank == 0)

    def _run_shared(self, action: Callable[[], T], active: bool) -> T | None:
        result = message = None
        try:
            result = action() if active else None
        except UserError as error:
            message = str(error)
        gathered = self.gather((active, message))
        name_rank = self.size > 1 and len({text for was_active, text in gathered if was_active}) > 1
        for rank, (_, text) in enumerate(gathered):
            if text is not None:
                error = UserError(f"process {rank}: {text}" if name_rank else text)
                error.shared = True
                raise error
        return result

    def broadcast(self, value: T) -> T:
        """Returns the value of rank 0."""
        values: list[Any] = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def broadcast_on_machine(self, value: T) -> T:
        """Returns the value of the first process of this machine."""
        values: list[Any] = [value]
        if self.local_size > 1:
            first = self.rank - self.local_rank
            dist.broadcast_object_list(values, src=first, group=self.machine_group)
        return values[0]

    def broadcast_tensors(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Returns the named tensors of rank 0, on the CPU; other ranks may pass None."""
        if self.size == 1:
            return dict(tensors or {})
        known = {name: (t.shape, t.dtype) for name, t in (tensors or {}).items()}
        received = {}
        for name, (shape, dtype) in self.broadcast(known).items():
            own = tensors[name].cpu() if tensors else torch.empty(shape, dtype=dtype)
            received[name] = own.contiguous()
            dist.broadcast(received[name], src=0, group=self.group)
        return received


@contextlib.contextmanager
def exclusive_training() -> Iterator[None]:
    """Prevents two training runs in one process, whose threads share their random state.

    Raises:
        UserError: if another thread is training.
    """
    if not TRAINING_LOCK.acquire(blocking=False):
        raise UserError(
            "train: expected one training run at a time in a process, got a second one in another "
            "thread; wait for the first one, or start another process"
        )
    try:
        yield
    finally:
        TRAINING_LOCK.release()


@contextlib.contextmanager
def process_world(gpu: bool, timeout_minutes: float) -> Iterator[World]:
    """Context manager that connects the processes started by torchrun, if any.

    Args:
        gpu: whether to train on GPUs.
        timeout_minutes: how long to wait for the other processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in names)
    end_with_launcher()
    if gpu and local_rank < num_gpus():
        torch.cuda.set_device(local_rank)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    if store := _attempt_store(timeout):
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    world = World(rank, size, local_rank, local_size, group)
    try:
        yield dataclasses.replace(world, machine_group=_machine_group(world, timeout))
    except (UserError, Interrupted):  # raised in all processes
        dist.destroy_process_group()
        raise
    # Skipped after any other error, because it would wait for the other processes.
    dist.destroy_process_group()


def _machine_group(world: World, timeout: datetime.timedelta) -> dist.ProcessGroup | None:
    """Returns a process group for communication on this machine, whose ranks are consecutive."""
    if world.local_size == world.size:
        return world.group
    own = None
    for first, size in sorted({*world.gather((world.rank - world.local_rank, world.local_size))}):
        ranks = [*range(first, first + size)]
        group = dist.new_group(ranks, backend="gloo", timeout=timeout)  # called by every process
        own = group if isinstance(group, dist.ProcessGroup) else own
    return own


def end_with_launcher() -> None:
    """Makes the kernel send SIGTERM to this process when `vitral train --gpus N` is killed.

    Otherwise the processes would continue to train, keeping the run directory locked and the GPUs
    busy. Linux only.
    """
    launcher = os.environ.get(LAUNCHER)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if launcher is None or prctl is None:
        return
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(launcher):  # the launcher was already killed
        os.kill(os.getpid(), signal.SIGTERM)


def _attempt_store(timeout: datetime.timedelta) -> dist.Store | None:
    """Returns a store for connecting the processes after a restart, or None for the default.

    torchrun's own store survives a restart and keeps the addresses of the previous processes. On
    one machine, the restart count separates them; several machines do not agree on the count.
    """
    own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not own or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"vitral/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def check_processes(config: Config, processes: int) -> None:
    """Raises UserError if the batch cannot be divided among the processes."""
    size, reproducible = config.train.batch_size, config.train.reproducible
    cuts = NUM_SHARDS if reproducible else processes
    if NUM_SHARDS % processes and reproducible:
        raise UserError(
            f"train.reproducible: expected 1, 2, 4 or {NUM_SHARDS} processes, got {processes}"
        )
    if size % (2 * cuts):
        multiple = math.lcm(2 * cuts, 2 * config.augment.repeats)
        fitting = max(1, round(size / multiple)) * multiple
        what = "shards of train.reproducible" if reproducible else "processes"
        raise UserError(
            f"train.batch_size: expected a multiple of {2 * cuts}, twice the number of {what} "
            f"({cuts}), got {size}; the nearest is {fitting}"
        )
    if reproducible and config.train.parallel == "fsdp":
        raise UserError("train.parallel: expected ddp with train.reproducible, got fsdp")


class DelayedMax:
    """Maxima over all processes, available one step later so that no step waits for them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.pending: tuple[dist.Work, Tensor] | None = None

    def exchange(self, *values: int) -> list[int]:
        """Sends values to all processes and returns the maxima of the previous step's values.

        A single process gets its own values back.
        """
        if self.world.size == 1:
            return list(values)
        agreed = self.finish() or [0] * len(values)
        tensor = torch.tensor(values)
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.world.group, async_op=True)
        assert work is not None
        self.pending = work, tensor
        return agreed

    def finish(self) -> list[int] | None:
        """Waits for the last exchange and returns its maxima; None if there is none."""
        if self.pending is None:
            return None
        work, tensor = self.pending
        work.wait()
        self.pending = None
        return tensor.tolist()


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Returns whether a tensor is a DTensor, without importing torch.distributed.tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gather_full(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Returns full tensors in place of sharded ones. Every process must call this.

    Rank 0 gathers them one by one on its CPU; the other ranks receive empty tensors.
    """
    gathered = {}
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            tensor = tensor.full_tensor()
            # Do not use an empty view: it would keep the full tensor on every other GPU.
            tensor = tensor.cpu() if world.is_main else tensor.new_empty(0)
        gathered[name] = tensor
    return gathered


def distribute_like(value: Tensor, reference: Tensor) -> Tensor:
    """Moves a full tensor to the device of `reference`; shards it if `reference` is sharded."""
    value = value.to(reference.device)
    if not is_sharded(reference) or value.shape != reference.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = reference.device_mesh, reference.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)
