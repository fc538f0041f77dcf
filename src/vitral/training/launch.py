"""Starts torchrun for `vitral train --gpus N`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from vitral.config import Config
from vitral.data.formats import check_path
from vitral.errors import UserError
from vitral.machine import num_gpus
from vitral.rundir import RunDir
from vitral.training.distributed import LAUNCHER, check_processes
from vitral.training.resume import check_settings
from vitral.training.signals import handled_signals


def launch(config: Config, processes: int, words: Sequence[str]) -> int:
    """Runs `vitral train WORDS` in one process per GPU of this machine; returns the exit code.

    Raises:
        UserError: for an error that the processes would raise.
    """
    _check(config, processes)
    # A store that survives a restart may keep the address of a previous process.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # train.threads is applied later
    # Seconds between a signal and SIGKILL: a large checkpoint takes longer than torch's 30.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    os.environ[LAUNCHER] = str(os.getpid())
    logging.disable()  # the processes print their own messages
    plan = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle=",".join(number.name for number in (*handled_signals(), signal.SIGQUIT)),
    )
    try:
        elastic_launch(plan, sys.executable)("-m", "vitral", "train", *words)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _check(config: Config, processes: int) -> None:
    assert processes >= 1
    count = num_gpus()
    if config.train.device != "cpu" and processes > count:
        raise UserError(
            f"gpus: expected at most {count}, the number of GPUs of this machine, got {processes}; "
            "to train without GPUs, add --train.device cpu"
        )
    check_processes(config, processes)
    check_settings(RunDir(config.train.out or ""), config)
    check_path(config.data.path)
