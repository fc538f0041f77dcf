"""Trains, resumes and evaluates modern Vision Transformers, exactly reproducibly.

The public names are `ViT` and `ViTConfig` (a model), `train` (training), `load` (trained weights,
for predictions), `evaluate` (validation) and `__version__`. torch is imported when a name that
needs it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vitral.caches import quiet_matplotlib

if TYPE_CHECKING:
    from vitral.config import ViTConfig
    from vitral.evaluation import evaluate
    from vitral.inference import load
    from vitral.model import ViT
    from vitral.training import train

__all__ = ["ViT", "ViTConfig", "evaluate", "load", "train"]

_HOMES = {
    "ViT": "model",
    "ViTConfig": "config",
    "evaluate": "evaluation",
    "load": "inference",
    "train": "training",
}


quiet_matplotlib()  # before anything imports it


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("vitral")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"vitral.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
