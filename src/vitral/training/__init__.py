"""Training: optimiser and schedule, step, loop, checkpoints and the run folder."""

from vitral.training.distributed import Interrupted
from vitral.training.loop import train
from vitral.training.parts import Parts

__all__ = ["Interrupted", "Parts", "train"]
