"""Fast, hardware-specific operations with hardware-independent interfaces."""

from vitral.kernels.feed_forward import can_fuse, feed_forward, has_feed_forward
from vitral.kernels.linear import can_train_by_onednn, has_onednn, onednn_linear, onednn_product
from vitral.kernels.norm import EPS, normalize
from vitral.kernels.rows import put_rows, take_rows

__all__ = [
    "EPS",
    "can_fuse",
    "can_train_by_onednn",
    "feed_forward",
    "has_feed_forward",
    "has_onednn",
    "normalize",
    "onednn_linear",
    "onednn_product",
    "put_rows",
    "take_rows",
]
