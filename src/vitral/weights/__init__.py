"""Self-describing weight directories: save, load, and initialize a model from one.

config.json         architecture, class names, preprocessing, recipe, metrics, default file
model.safetensors   the trained weights
ema.safetensors     their moving average, if the run kept one
manifest.json       sizes and SHA-256 of the other files
"""

from vitral.weights.description import Description, Weights, Which, describe, require_head
from vitral.weights.initialize import initialize, load_settings, request
from vitral.weights.store import find, load, read_description, save

__all__ = [
    "Description",
    "Weights",
    "Which",
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
