"""What is fast and specific, behind functions that are called as plain ones would be."""

from vitral.kernels.feed_forward import can_fuse, feed_forward
from vitral.kernels.norm import EPS, normalise
from vitral.kernels.rows import put_rows, take_rows

__all__ = ["EPS", "can_fuse", "feed_forward", "normalise", "put_rows", "take_rows"]
