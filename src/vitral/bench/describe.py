"""Descriptions of a device and of a model's size, for benchmark output."""

from __future__ import annotations

from vitral.config import Config
from vitral.errors import counted
from vitral.model import ViT, count_flops
from vitral.training.resolved import Resolved


def describe_device(resolved: Resolved) -> str:
    """Returns device, precision, compilation, kernels and threads, in one line."""
    how = "compiled" if resolved.compile else "not compiled"
    if resolved.fused:
        how += {"cuda": ", fused kernels", "cpu": ", oneDNN linear layers"}[resolved.device]
    return f"{resolved.device}, {resolved.precision}, {how}, {counted(resolved.threads, 'thread')}"


def describe_size(config: Config, model: ViT, num_classes: int) -> list[str]:
    """Returns lines with the numbers of parameters and FLOPs."""
    flops = count_flops(config.model, num_classes)
    return [
        f"parameters  {model.num_parameters:,}",
        f"FLOPs       {flops / 1e9:.4g} G per image and forward pass, three times that in training",
    ]
