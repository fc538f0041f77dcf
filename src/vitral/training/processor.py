"""Choices for training on a CPU, using the machine profile: threads, linear layers, compilation."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from vitral import compat, kernels
from vitral.config import Config, ViTConfig
from vitral.engines import profile
from vitral.model import Residual, ViT, compile_blocks, count_flops
from vitral.training.trial import Precision, autocast, can_compile

MAX_ELEMENTS = 1 << 19  # of the tokens in a measurement, to limit its duration
# Shorter runs take at most a few minutes on any processor, so compiling never saves time.
MIN_FLOPS = 1e13


@dataclass(frozen=True)
class Choices:
    """Choices for one process."""

    threads: int
    fused: bool
    """Whether oneDNN computes the linear layers."""
    compile: bool


def choose(
    config: Config, precision: Precision, max_threads: int, micro_batch: int, images: int
) -> Choices:
    """Chooses the fastest implementation for a run; measures those that the profile lacks.

    Args:
        config: the settings of the run; explicit settings are kept.
        precision: "fp32" or "bf16".
        max_threads: number of threads, if the settings leave it open and fewer are not faster.
        micro_batch: number of images in a forward pass.
        images: number of images that this process trains on; 0 if unknown.
    """
    train, block = config.train, Block.of(config.model, precision, micro_batch)
    with _keep_state():
        threads = train.threads or block.fastest_threads(max_threads)
        torch.set_num_threads(threads)
        fused = block.onednn_is_faster()
        compiled = train.compile == "always"
        if train.compile == "auto" and train.trainable == "all":
            compiled = block.compiling_pays(config, fused, images)
    return Choices(threads, fused, compiled)


@dataclass(frozen=True)
class Block:
    """The encoder block of a model, in training, with a batch of noise."""

    config: ViTConfig
    precision: Precision
    images: int

    @classmethod
    def of(cls, config: ViTConfig, precision: Precision, micro_batch: int) -> Block:
        single = dataclasses.replace(
            config, depth=1, stochastic_depth=0.0, activation_checkpointing=False
        )
        elements = profile.num_tokens(config) * config.shape.dim
        return cls(single, precision, max(1, min(micro_batch, MAX_ELEMENTS // elements)))

    def fastest_threads(self, most: int) -> int:
        """Returns the fastest number of threads: `most`, or half as many, and so on."""
        torch.set_num_threads(most)
        passes, counts = self.passes(fused=False), [most]
        while counts[-1] > 1:
            counts.append(counts[-1] // 2)

        def with_threads(count: int) -> Callable[[], None]:
            def run() -> None:
                torch.set_num_threads(count)
                passes()

            return run

        candidates = {str(count): with_threads(count) for count in counts}
        return int(profile.fastest("number of threads", self.shape, candidates))

    def onednn_is_faster(self) -> bool:
        """Returns whether linear layers are faster with oneDNN than with torch, which uses MKL."""
        supported = self.config.kernels == "auto" and self.precision == "fp32"
        if not supported or not kernels.has_onednn():
            return False
        candidates = {"torch": self.passes(fused=False), "oneDNN": self.passes(fused=True)}
        return profile.fastest("linear layers", self.shape, candidates) == "oneDNN"

    def compiling_pays(self, config: Config, fused: bool, images: int) -> bool:
        """Returns whether compiling takes less time than it saves in a run of `images` images."""
        if 3 * images * count_flops(config.model, 1) < MIN_FLOPS or not profile.is_enabled():
            return False
        if not can_compile(torch.device("cpu")):
            return False
        names, shape = ("eager", "compiled", "compilation"), {**self.shape, "oneDNN": fused}
        seconds = profile.recall("compilation", shape, names, lambda: self._time_compilation(fused))
        eager, compiled = seconds["eager"], seconds.get("compiled", float("inf"))
        saved = (eager - compiled) * config.model.shape.depth * images / self.images
        cost = seconds["compilation"] * num_graphs(config)
        return profile.MARGIN * compiled < eager and cost < saved

    def _time_compilation(self, fused: bool) -> dict[str, float]:
        """Returns the seconds of both passes, and of compiling them without a cache."""
        eager, compiled = self.passes(fused), self.passes(fused, compiled=True)
        torch.compiler.reset()
        with compat.fresh_compile_cache():
            started = time.perf_counter()
            compiled()
            compilation = time.perf_counter() - started
            seconds = profile.time_candidates({"eager": eager, "compiled": compiled})
        return {**seconds, "compilation": compilation}

    def passes(self, fused: bool, compiled: bool = False) -> Callable[[], None]:
        """Returns a function that runs the forward and backward pass."""
        model = ViT(self.config, 0)
        model.fuse(fused)
        if compiled:
            compile_blocks(model)
        grid, dim = self.config.image_size // self.config.patch_size, self.config.shape.dim
        x = torch.randn(self.images, profile.num_tokens(self.config), dim, requires_grad=True)

        def run() -> None:
            with autocast("cpu", self.precision):
                y = model.encode(x, grid, grid)
            compat.backward_of_ones(y)

        return run

    @property
    def shape(self) -> dict[str, object]:
        """The settings that affect the speed of a block."""
        return {**profile.block_shape(self.config, self.images), "precision": self.precision}


def num_graphs(config: Config) -> int:
    """Returns how often a run compiles the block: for each shape and use of stochastic depth.

    The shapes are those of the image sizes and, with a large rate, of the images that are kept.
    Validation needs another one.
    """
    with torch.device("meta"):
        modules = ViT(config.model, 0).modules()
    kinds = {m.skip if m.gathers else m.skip > 0 for m in modules if isinstance(m, Residual)}
    sizes = {size for size, _ in config.train.progressive}
    return max(1, len(sizes)) * len(kinds) + 1


@contextlib.contextmanager
def _keep_state() -> Iterator[None]:
    """Restores torch's random state and number of threads on exit."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng([]):
        try:
            yield
        finally:
            torch.set_num_threads(threads)
