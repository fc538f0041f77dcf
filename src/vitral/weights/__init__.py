"""Self-describing weight directories: saving, loading, and initializing a model from them.

config.json         architecture, class names, preprocessing, recipe, metrics, default file
model.safetensors   the trained weights
ema.safetensors     their exponential moving average (EMA), if the run computed it
manifest.json       sizes and SHA-256 of the other files
"""

from vitral.weights.description import (
    Description,
    Weights,
    Which,
    absolute_paths,
    describe,
    require_head,
)
from vitral.weights.initialize import initialize, load_settings, request
from vitral.weights.store import backbone_digest, find, load, read_description, save

__all__ = [
    "Description",
    "Weights",
    "Which",
    "absolute_paths",
    "backbone_digest",
    "describe",
    "find",
    "initialize",
    "load",
    "load_settings",
    "read_description",
    "request",
    "require_head",
    "save",
]
