"""Settings of a run and columns of a table, shared by several commands."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vitral import settings
from vitral.config import Config, Device, Engine


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of the commands that run a model."""

    device: Device = "auto"
    """Device to run on; auto uses a GPU if one is available."""
    engine: Engine = "auto"
    """How to run the model on a CPU. auto: onednn or plain, whichever is faster in a measurement
    that is stored for this machine. plain: the kernels of torch. onednn: those of oneDNN. bf16:
    oneDNN, with the linear layers in bfloat16, less accurate. onnxruntime, openvino: these
    packages, with a file that is exported once, in up to a minute, and cached."""


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Options of the commands that read a dataset and have no settings."""

    image_column: str | None = None
    """Column with the images in Parquet files, or with their paths in a table."""
    label_column: str | None = None
    """Column with the class of each image in Parquet files or a table."""
    task: Literal["auto", "single", "multi"] | None = None
    """multi if the table has other columns than one of 0 and 1 for each class."""
    label_separator: str | None = None
    """Text between the labels of an image in one cell, if the data is a table."""
    group_column: str | None = None
    """Column with the group of each image, if the data is a table; groups are not divided."""
    split_column: str | None = None
    """Column with the split of each image, if the data is a table."""

    @property
    def columns(self) -> dict[str, str]:
        """The given options, by the name of their setting."""
        given = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(TableOptions)
        }
        return {name: value for name, value in given.items() if value is not None}


def given_settings(args: argparse.Namespace) -> dict[str, Sequence[str]]:
    """Returns the settings among parsed arguments; PATH sets `data.path`."""
    given = dict(settings.given_settings(args))
    if "path" in args:
        given["data.path"] = [args.path]
    return given


def load_config(args: argparse.Namespace) -> Config:
    """Returns the settings given by the parsed arguments: RECIPE, options, and PATH of the data."""
    return load_request(args).config


def load_request(args: argparse.Namespace) -> settings.Request:
    """Returns the settings as `load_config`, and which of them were given as options."""
    from vitral.machine import num_gpus  # imports torch
    from vitral.weights import request

    started, given = time.monotonic(), given_settings(args)
    recipe = args.recipe or settings.default_recipe(given, gpu=num_gpus() > 0)
    return dataclasses.replace(request(recipe, given), started=started)
