"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from vitral.config import OptimConfig


class AdamW:
    """AdamW (Loshchilov and Hutter 2017), with PyTorch's fused kernel.

    Calls the kernel through PyTorch's functional interface, because `torch.optim.AdamW` imports
    torch.compile, which takes as long and a quarter as much memory as importing torch.

    Args:
        groups: parameter groups with `params`, `weight_decay` and `lr_factor`.
        config: the other settings.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        self.param_groups, self.config = groups, config
        self.state = {
            p: {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
            for group in groups
            for p in group["params"]
        }

    @torch.no_grad()
    def step(self, lr: float, skipped: Tensor) -> None:
        """Updates the parameters with their gradients, or does nothing if `skipped` is 1.0.

        Args:
            lr: learning rate.
            skipped: 0.0 or 1.0, on the device, where the kernel reads it without waiting.
        """
        beta1, beta2 = self.config.betas
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in members]
            adamw(
                members,
                [p.grad for p in members],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                found_inf=skipped,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=lr * group["lr_factor"],
                weight_decay=group["weight_decay"],
                eps=self.config.eps,
                maximize=False,
            )
