"""Test-time augmentation: the mean of the probabilities over several views of an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vitral.errors import UserError
from vitral.weights import Description

Tta = Literal["none", "flip", "five-crop"]
NUM_PASSES = {"none": 1, "flip": 2, "five-crop": 5}  # forward passes per image
NUM_CROPS = {"none": 1, "flip": 1, "five-crop": 5}  # crops per image, taken before the model


def check_tta(tta: Tta, description: Description) -> None:
    """Raises UserError if the weights do not support the views."""
    fit = description.config.data.fit
    if tta != "none" and description.multi_label:
        raise UserError(f"tta: expected none for weights with several labels per image, got {tta}")
    if tta == "five-crop" and fit != "crop":
        raise UserError(
            f"tta: expected none or flip for weights with data.fit {fit}, whose input is the "
            "entire image, got five-crop"
        )


def mean_probabilities(
    forward: Callable[[Tensor], Tensor], images: Tensor, tta: Tta, description: Description
) -> Tensor:
    """Returns the mean probabilities over the views of each image, (B, classes), float32.

    Args:
        forward: maps images (B, C, H, W) to logits (B, classes).
        images: the crops of each image, shape (B * NUM_CROPS[tta], C, H, W).
        description: converts the logits of each view to probabilities.
    """
    views = images.unflatten(0, (-1, NUM_CROPS[tta])).unbind(1)
    if tta == "flip":
        views = (images, images.flip(3))
    return torch.stack([description.probabilities(forward(view)) for view in views]).mean(0)
