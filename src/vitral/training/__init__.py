"""Training: optimiser and schedule, step, loop, checkpoints and the run folder."""

from vitral.training.loop import train
from vitral.training.run import Interrupted

__all__ = ["Interrupted", "train"]
