"""Trains on a Ray cluster. The first argument is the number of workers, each with one GPU:

    python examples/ray_train.py 16 imagenet-b16-300ep --data /shared/pack --out /shared/runs/b16

This requires `pip install 'ray[train]'`. --data must be the same on all nodes; only one node writes
--out.
"""

import os
import socket
import subprocess
import sys

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer


def work(settings: dict[str, tuple[str, ...]]) -> None:
    """Runs `vitral train` with the RANK and WORLD_SIZE that Ray sets.

    The command runs in a subprocess, because Ray calls this function in a thread, which cannot
    handle signals.
    """
    with socket.create_server(("", 0)) as server:
        free = server.getsockname()[1]
    # Ray's own process group uses MASTER_PORT.
    environment = {**os.environ, "MASTER_PORT": str(broadcast_from_rank_zero(free))}
    command = [sys.executable, "-m", "vitral", "train", *settings["words"]]
    subprocess.run(command, env=environment, check=True)


def main(workers: str, *words: str) -> None:
    """Trains in `workers` processes, and restarts them up to three times if one fails."""
    ray.init()
    gpus = "GPU" in ray.cluster_resources()
    trainer = TorchTrainer(
        work,
        train_loop_config={"words": words},
        torch_config=TorchConfig(backend="gloo"),  # vitral creates its own process group
        scaling_config=ScalingConfig(num_workers=int(workers), use_gpu=gpus),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    )
    trainer.fit()


if __name__ == "__main__":
    if len(sys.argv) < 2 or not sys.argv[1].isdecimal():
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
