"""Training: optimizer, learning rate schedule, training loop, checkpoints and run directory."""

from vitral.training.distributed import Interrupted
from vitral.training.parts import Parts
from vitral.training.run import train

__all__ = ["Interrupted", "Parts", "train"]
