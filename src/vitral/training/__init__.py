"""Training: optimiser and schedule, step, loop, checkpoints and the run folder."""

from vitral.training.distributed import Interrupted
from vitral.training.parts import Parts
from vitral.training.run import train

__all__ = ["Interrupted", "Parts", "train"]
