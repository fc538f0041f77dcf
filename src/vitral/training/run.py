"""Starts or resumes a run: opens its data and builds its model from the settings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from vitral import weights
from vitral.config import Config
from vitral.data.formats.objects import PythonDatasets, open_data, python_datasets
from vitral.data.objects import Source
from vitral.data.records import Files
from vitral.data.splits import Dataset
from vitral.errors import UserError
from vitral.files import check_room
from vitral.machine import pick_device
from vitral.model import ViT
from vitral.rundir import RunDir, RunPath
from vitral.settings import Request
from vitral.training import budget, resume
from vitral.training import checkpoint as checkpoints
from vitral.training.balance import Balance
from vitral.training.distributed import World, check_processes, exclusive_training, process_world
from vitral.training.frozen import freeze
from vitral.training.loop import Trainer
from vitral.training.parts import Parts
from vitral.training.resolved import build_model
from vitral.training.task import adapt_to_labels

DEFAULT_PARTS = Parts()


def train(
    recipe: str | Config | Request = "digits",
    *options: str,
    dataset: Source | None = None,
    val_dataset: Source | None = None,
    classes: Sequence[str] | None = None,
    fingerprint: str | None = None,
    parts: Parts = DEFAULT_PARTS,
) -> RunPath:
    """Trains a model, or resumes an existing run, and returns the path of the run directory.

    Args:
        recipe: the name of a recipe, a YAML file, or settings with `train.out`.
        options: changes to a recipe, as on the command line.
        dataset: a map-style dataset to train on instead of `data.path`. Its items are (image,
            label), or a mapping with both: a PIL image, a uint8 tensor (C, H, W) or a uint8 array
            (H, W, C), and an integer.
        val_dataset: a dataset to validate on. Default: `data.val_fraction` of each class is held
            out.
        classes: names of the classes. Default: those in `dataset.classes` or its `features`.
        fingerprint: identifies the images of both datasets, so that a run resumes with the same
            images. Default: every image is read and hashed before the run starts or resumes.
        parts: replaces vitral's model or optimizer, for an experiment.

    Raises:
        UserError: if there is an error in the settings or the data.
        Interrupted: if a signal arrives, after a checkpoint is written.
    """
    if isinstance(recipe, str):
        recipe = weights.request(recipe, options)
    request = Request(recipe) if isinstance(recipe, Config) else recipe
    config, datasets = python_datasets(request.config, dataset, val_dataset, classes, fingerprint)
    request = dataclasses.replace(request, config=config)
    if config.train.out is None:
        raise UserError("train.out: expected a directory for the run, got none")
    run = RunDir(config.train.out)
    device = pick_device(config.train.device)
    gpu, minutes = device.type == "cuda", config.train.timeout_minutes
    with exclusive_training(), process_world(gpu, minutes) as world, run:
        device = world.run_on_all_ranks(lambda: world.device(device))
        request = budget.fit_time_budget(request, run, world, datasets)
        config, notes, data, model = prepare(request.config, run, world, parts, datasets)
        if len({*world.gather(data.fingerprint)}) > 1:
            error = UserError(f"data: {config.data.path} is not the same in all processes")
            error.shared = True
            raise error
        check = functools.partial(resume.check, config, run, data, model, parts.name)
        checkpoint, warnings = resume.open_run(run, world, check)
        trainer = world.run_on_all_ranks(
            lambda: Trainer(config, data, model, device, run, checkpoint, world, parts)
        )
        try:
            if world.is_main:
                run.write_config(weights.absolute_paths(config))
            for text in (*request.notes, *notes, *warnings):
                trainer.console.message(text)
            trainer.fit()
        finally:
            trainer.close()
    return RunPath(run.path)


def prepare(
    config: Config,
    run: RunDir,
    world: World,
    parts: Parts = DEFAULT_PARTS,
    datasets: PythonDatasets | None = None,
    device: str = "cpu",
) -> tuple[Config, list[str], Dataset, ViT]:
    """Returns the settings, notes, dataset and model of a run. Every process must call this.

    The settings are adapted to the labels of the dataset.
    On the device "meta", only the shapes of the model and of the initial weights are compared.

    Raises:
        UserError: in all processes, before anything is written.
    """

    def check() -> None:
        check_processes(config, world.size)
        check_room(run.path)

    def build() -> tuple[Config, list[str], ViT]:
        assert dataset.train is not None
        adapted, notes = adapt_to_labels(config, dataset)
        notes += resume.check_settings(run, adapted) if world.is_main else []
        Balance.of(adapted, dataset.classes, dataset.train.labels)  # reads the table of weights
        with torch.device(device):
            model = build_model(adapted, len(dataset.classes), parts.model)
        path = adapted.train.init
        if path is not None and not checkpoints.steps(run.checkpoints):
            new = ", ".join(parts.initialize(model, path, dataset.classes)) or "none"
            notes.append(f"initialized from {path}; reinitialized parameters: {new}")
        freeze(model, adapted.train.trainable)
        return adapted, notes, model

    world.run_on_all_ranks(check)
    dataset = open_data_once(config, datasets, world)
    adapted, notes, model = world.run_on_all_ranks(build)
    return adapted, [*dataset.notes, *notes], dataset, model


def open_data_once(config: Config, datasets: PythonDatasets | None, world: World) -> Dataset:
    """Opens the dataset, in the first process of each machine before the others.

    The others receive the list of files if the dataset is a folder, because listing takes long.
    They open other datasets themselves, after downloads and indexes of archives are complete.

    Raises:
        UserError: in all processes.
    """
    own = world.run_once_per_machine(lambda: open_data(config, datasets))
    shared = own if own is not None and isinstance(own.train, Files) else None
    received = world.broadcast_on_machine(shared)
    return world.run_on_all_ranks(lambda: own or received or open_data(config, datasets))
