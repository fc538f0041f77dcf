"""Trains on a Ray cluster, with as many workers as the first argument says, a GPU each:

    python examples/ray_train.py 16 imagenet-b16-300ep --data /shared/pack --out /shared/runs/b16

Needs `pip install 'ray[train]'`. --data must be the same on all nodes; --out is written on one.
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
    """Runs `vitral train` as the process that Ray's RANK and WORLD_SIZE tell it to be.

    As a process of its own: Ray calls this in a thread, where no signal can be handled.
    """
    with socket.create_server(("", 0)) as server:
        free = server.getsockname()[1]
    # Ray's own process group has taken the port that MASTER_PORT names.
    environment = {**os.environ, "MASTER_PORT": str(broadcast_from_rank_zero(free))}
    command = [sys.executable, "-m", "vitral", "train", *settings["words"]]
    subprocess.run(command, env=environment, check=True)


def main(workers: str, *words: str) -> None:
    """Trains in `workers` processes; begins them again, three times at most, if one fails."""
    ray.init()
    gpus = "GPU" in ray.cluster_resources()
    trainer = TorchTrainer(
        work,
        train_loop_config={"words": words},
        torch_config=TorchConfig(backend="gloo"),  # vitral makes a process group of its own
        scaling_config=ScalingConfig(num_workers=int(workers), use_gpu=gpus),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    )
    trainer.fit()


if __name__ == "__main__":
    if len(sys.argv) < 2 or not sys.argv[1].isdecimal():
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
