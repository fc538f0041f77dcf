"""Settings that depend on the machine, resolved once per run and stored in its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitral.compat import allow_recompiles, make_inductor_deterministic
from vitral.config import Config, ViTConfig
from vitral.data.fetch import Decoder
from vitral.data.sampling import derive_seed
from vitral.engines import onednn
from vitral.errors import UserError
from vitral.machine import available_cores
from vitral.model import CHANNELS, ViT, compile_blocks
from vitral.rundir import RunDir
from vitral.training import processor
from vitral.training.checkpoint import Checkpoint
from vitral.training.distributed import NUM_SHARDS, World
from vitral.training.optim import loss_sum
from vitral.training.trial import Precision, autocast, can_compile, fused_is_faster

MAX_GRAPHS = 64  # maximum number of graphs that a run compiles
CPU_BATCH = 64  # images per micro-batch on a CPU: more take memory and are not faster


@dataclass(frozen=True)
class Resolved:
    """Resolved settings. They affect rounding: the number of threads, the order of additions."""

    device: str
    """Type of the device: cpu, cuda, mps or xpu."""
    precision: Precision
    compile: bool
    threads: int
    micro_batch: int
    processes: int
    decoder: Decoder
    fused: bool
    """Whether the model uses the custom kernels, or oneDNN linear layers on a CPU."""

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a context with bf16 autocast, or without autocast in float32."""
        return autocast(self.device, self.precision)

    def for_inference(self, model: ViT) -> ViT:
        """Returns a copy of a model for inference without gradients, or the model itself.

        It depends only on the resolved settings, so that a resumed run rounds in the same way.
        """
        eager = self.fused and not self.compile and self.precision == "fp32"
        unsharded = type(model) is ViT
        return (
            onednn.by_onednn(model) if eager and unsharded and onednn.is_supported(model) else model
        )


def build_model(
    config: Config, num_classes: int, build: Callable[[ViTConfig, int], Any] = ViT
) -> ViT:
    """Builds the model of a run, initialized from the seed.

    Raises:
        ValueError: if the model of an experiment has state other than its parameters.
    """
    torch.manual_seed(derive_seed("init", config.train.seed))
    model = build(config.model, num_classes)
    if more := model.state_dict().keys() - {name for name, _ in model.named_parameters()}:
        raise ValueError(f"model: expected no state except parameters, got {min(more)}")
    return model


def resolve(
    config: Config,
    model: ViT,
    device: torch.device,
    world: World | None = None,
    decoder: Decoder = "cpu",
    num_steps: int = 0,
) -> Resolved:
    """Resolves the settings that `config` leaves open, for a model on `device`.

    `num_steps` is the number of steps of the run; without it, a CPU does not compile by default.
    """
    world = world or World()
    train = config.train
    gpu = device.type == "cuda"
    precision = train.precision
    if precision == "auto":
        precision = "bf16" if gpu and torch.cuda.is_bf16_supported() else "fp32"
    compiled = train.compile == "always"
    if train.compile == "auto" and gpu:
        compiled = all(world.gather(can_compile(device)))
    reproducible = train.reproducible
    images_per_process = train.batch_size // (NUM_SHARDS if reproducible else world.size)
    threads = 1 if reproducible else max(1, min(16, available_cores() // world.local_size))
    resolved = Resolved(
        device=device.type,
        precision=precision,
        compile=compiled,
        threads=train.threads or threads,
        micro_batch=min(
            train.micro_batch or (images_per_process if gpu else CPU_BATCH), images_per_process
        ),
        processes=world.size,
        decoder=decoder,
        fused=False,
    )
    if gpu and train.micro_batch is None:
        resolved = _fit_micro_batch(resolved, config, model, device)
        torch.cuda.reset_peak_memory_stats(device)  # exclude the trials
    resolved = dataclasses.replace(resolved, micro_batch=min(world.gather(resolved.micro_batch)))
    # In a reproducible run, rounding must not depend on timing. Experiments have other models.
    if reproducible or not isinstance(model, ViT):
        return resolved
    if device.type == "cpu":
        images = num_steps * images_per_process
        return dataclasses.replace(resolved, **_choose_for_cpu(config, resolved, world, images))
    fused = fused_is_faster(
        config.model, resolved.device, resolved.precision, resolved.compile, resolved.micro_batch
    )
    return dataclasses.replace(resolved, fused=all(world.gather(fused)))


def _choose_for_cpu(
    config: Config, resolved: Resolved, world: World, images: int
) -> dict[str, Any]:
    """Returns the choices of the first process, which measures while the others wait."""
    precision, most, micro_batch = resolved.precision, resolved.threads, resolved.micro_batch
    choices = None
    if world.is_main:
        choices = processor.choose(config, precision, most, micro_batch, images)
    choices = world.broadcast(choices)
    assert choices is not None
    compiled = choices.compile
    if compiled and config.train.compile == "auto":
        compiled = all(world.gather(can_compile(torch.device("cpu"))))
    return {"threads": choices.threads, "fused": choices.fused, "compile": compiled}


def prepare_device(config: Config, device: torch.device) -> None:
    """Enables TF32 on a GPU, and deterministic algorithms if the settings require them."""
    if device.type == "cpu":
        return
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    deterministic = config.train.deterministic or config.train.reproducible
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        # torch reads it once, at the first matrix multiplication.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        make_inductor_deterministic()


def compiled(model: nn.Module, resolved: Resolved) -> Callable[[Tensor], Tensor]:
    """Returns the model as the training step calls it, compiled if `resolved` requires it."""
    if isinstance(model, ViT):
        model.fuse(resolved.fused)
    if not resolved.compile:
        return model
    allow_recompiles(MAX_GRAPHS)  # one for each image size and each size of a micro-batch
    # On a CPU, compiling takes long. Compiling one block for all takes two thirds of the time.
    if resolved.device == "cpu" and compile_blocks(model):
        return model
    return torch.compile(model, dynamic=False)


def resolve_resumed(
    checkpoint: Checkpoint,
    config: Config,
    model: ViT,
    run: RunDir,
    device: torch.device,
    world: World,
) -> Resolved:
    """Returns the resolved settings of a checkpoint, adapted to the number of processes.

    Raises:
        UserError: if the run cannot be resumed on this device.
    """
    saved = checkpoint.state["resolved"]
    if saved.device != device.type:
        raise UserError(
            f"train.device: the run in {run.path} started on {saved.device}, not {device.type}; "
            "resume it on that device, or start another run with --out"
        )
    if saved.compile and not all(world.gather(can_compile(device))):
        raise UserError(
            f"train.compile: the run in {run.path} is compiled, which fails on this machine; "
            "resume it on another machine, or start another run with --out"
        )
    if config.train.reproducible:  # otherwise the micro-batch would depend on free memory
        return dataclasses.replace(saved, processes=world.size)
    if saved.processes == world.size:
        return saved
    now = resolve(config, model, device, world, saved.decoder)
    kept = {name: getattr(saved, name) for name in ("precision", "compile", "fused")}
    return dataclasses.replace(now, **kept)


def _fit_micro_batch(
    resolved: Resolved, config: Config, model: ViT, device: torch.device
) -> Resolved:
    """Halves the micro-batch until both passes fit in memory next to the optimizer's state.

    The trials are not compiled: compiled code needs less memory, but would be compiled per size.
    """
    size, cuts = resolved.micro_batch, 1
    while True:
        micro = -(-size // (2 * cuts)) * 2
        try:
            _try_batch(micro, resolved, config, model, device)
        except torch.cuda.OutOfMemoryError:
            if micro == 2:
                raise
            cuts *= 2
        else:
            return dataclasses.replace(resolved, micro_batch=micro)
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()


def _try_batch(
    micro: int, resolved: Resolved, config: Config, model: ViT, device: torch.device
) -> None:
    """Runs both passes while the additional memory that a run needs is allocated."""
    image_size = max(
        [image_size for image_size, _ in config.train.progressive] or [config.model.image_size]
    )
    images = torch.zeros(micro, CHANNELS, image_size, image_size, device=device)
    targets = torch.zeros(micro, model.num_classes, device=device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # Moments, EMA and a spare copy, or a shard of them; in a reproducible run, three levels of
    # gradients that are not yet added; the next batch, which is augmented at the same time.
    num_shards = resolved.processes if config.train.parallel == "fsdp" else 1
    copies = 7 if config.train.reproducible else 4
    ballast_bytes = copies * weights // num_shards + 24 * images.numel()
    ballast = torch.empty(ballast_bytes, dtype=torch.uint8, device=device)
    with resolved.autocast():
        loss = loss_sum(model(images), targets, config.train.loss)
    loss.backward()
    del ballast
