"""Dataset formats: one module per format, and the order in which they are tried.

A format is a module with `matches(root)`, which returns whether the format applies, and `open(root,
config, seed, train)`, which returns a Dataset. If `train` is False, only the validation split is
opened.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from types import ModuleType

from vitral.config import DataConfig
from vitral.data.formats import folder, ilsvrc, packed, parquet, shards, table
from vitral.data.formats.known import KNOWN_SETS, open_known
from vitral.data.formats.labels import SUFFIXES
from vitral.data.objects import PATH
from vitral.data.splits import Dataset, hold_out
from vitral.errors import data_error, unreadable
from vitral.files import expand

FORMATS = (packed, table, parquet, ilsvrc, shards, folder)


def open_dataset(config: DataConfig, image_size: int, seed: int, *, train: bool = True) -> Dataset:
    """Opens the dataset that `config.path` names: a known dataset, or the data at that path.

    Args:
        image_size: size of the images of the synthetic dataset, in pixels.
        seed: selects the held-out images if there is no validation split.
        train: False if only the validation split is needed; all images in a folder of class folders
            are then validation images.

    Raises:
        UserError: if the dataset cannot be used; the message contains the reason and the fix.
    """
    if config.path == PATH:
        fix = "call vitral.train(..., dataset=...) in Python to resume its run, or pass --data PATH"
        raise data_error(PATH, "a path", "a Python dataset", fix)
    try:
        if config.path in KNOWN_SETS:
            dataset = open_known(config, image_size, seed, train)
        else:
            root = expand(config.path)
            dataset = _format_of(root, config.path).open(root, config, seed, train)
    except OSError as error:
        raise unreadable(config.path, error) from error
    _check_task(config, dataset)
    if config.hold_out and train and not dataset.held_out:
        why = f"the validation images of {dataset.name} are not used"
        return hold_out(dataset, config.path, config.val_fraction, seed, why)
    return dataset


def _check_task(config: DataConfig, dataset: Dataset) -> None:
    if dataset.multi_label and config.task == "single":
        got, fix = "several", "pass --task auto"
        raise data_error(config.path, "one label per image with task single", got, fix)
    wanted = config.task == "multi" or config.label_separator is not None
    if wanted and not dataset.multi_label:
        got, fix = "one label per image", "list the labels of each image in a table"
        raise data_error(config.path, "images with any number of labels", got, fix)


def check_path(path: str) -> None:
    """Checks that a path names a dataset or contains data, without opening it.

    Raises:
        UserError: if it does not.
    """
    if path not in KNOWN_SETS:
        try:
            _format_of(expand(path), path)
        except OSError as error:
            raise unreadable(path, error) from error


def _format_of(root: Path, path: str) -> ModuleType:
    found = next((each for each in FORMATS if each.matches(root)), None)
    if found is None:
        raise _not_found(root, path)
    return found


def _not_found(root: Path, path: str) -> Exception:
    if root.exists():
        expected = f"an image folder or a table ({', '.join(SUFFIXES)})"
        return data_error(root, expected, "a file", "if it is an archive, extract it")
    near = difflib.get_close_matches(path.lower(), KNOWN_SETS, n=1)
    fix = f"did you mean {near[0]}?" if near else f"known datasets are {', '.join(KNOWN_SETS)}"
    return data_error(root, "an image folder", "nothing of that name", fix)
