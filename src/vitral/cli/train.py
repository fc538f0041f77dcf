"""Train a model, or resume the run in --out.

Without a recipe, the model is trained on handwritten digits, which takes about a minute on two CPU
cores. Repeat the command to resume an interrupted run.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from vitral.cli.common import load_request
from vitral.errors import UserError

ARGUMENTS = {"recipe": "RECIPE?"}
HINTS = {"--resume": "not needed: repeating the command without it resumes the run"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `vitral train` in addition to the settings."""

    gpus: int | None = None
    """Number of GPUs of this machine to train on, with one process each."""
    dry_run: bool = False
    """Print the settings, model size, number of steps and estimated time, and exit."""

    folds: int | None = None
    """Number of folds for cross-validation on the training images after training; requires
    train.trainable head."""

    def __post_init__(self) -> None:
        if self.folds is not None and self.folds < 2:
            raise UserError(f"folds: expected 2 or more, got {self.folds}")
        if self.gpus is not None and self.gpus < 1:
            raise UserError(f"gpus: expected 1 or more, got {self.gpus}")


def run(args: argparse.Namespace, options: Options) -> int:
    """Trains the model and returns the exit code."""
    request = load_request(args)
    config = request.config
    if options.folds is not None and config.train.trainable != "head":
        raise UserError(
            f"folds: expected train.trainable head, got {config.train.trainable}; "
            "the recipe probe uses it"
        )
    if options.dry_run:
        from vitral.bench.train import plan
        from vitral.training.distributed import check_processes

        check_processes(config, options.gpus or 1)
        print(plan(request))
        return 0
    # The processes that `launch` starts have the same arguments.
    if options.gpus is not None and "TORCHELASTIC_RUN_ID" not in os.environ:
        from vitral.training.launch import launch

        return launch(config, options.gpus, args.words)
    from vitral.training import Interrupted, train

    try:
        run = train(request)
    except Interrupted as interrupted:
        return interrupted.exit_code
    if options.folds is not None and os.environ.get("RANK", "0") == "0":
        from vitral.training.folds import cross_validate

        print(cross_validate(run, options.folds))
    return 0
