"""What the compiler makes of an encoder block for an H100, found without a GPU: bytes, not time.

    python benchmarks/traffic.py [--sizes s b l] [--batch 512] [--kernels auto plain] [--list]

A training step of a Vision Transformer is matrix products, attention, and everything between, which
torch.compile fuses into kernels that do little else than move bytes. This counts those: it traces
two stacks of blocks, forward and backward, lets Inductor schedule them as for an H100, and takes
the difference, a block in the middle of a model. It prints the floors of both: bytes over the
bandwidth, and FLOPs over the rate of large matrix products. Attention is a stand-in, and counts in
neither.

Nothing is run, and no GPU is asked for: torch and Triton are told that there is one. That takes
private parts of them; written for torch 2.14.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch._inductor.config as inductor
import torch.utils._triton
import triton
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import scheduler
from torch._inductor.compile_fx import _recursive_post_grad_passes
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends.compiler import GPUTarget

from vitral import kernels
from vitral.config import ViTConfig
from vitral.model import EncoderBlock, GroupedQueryAttention, count_flops

BANDWIDTH = 3.0e12  # bytes/s that large kernels reach on an H100 (SXM, HBM3 of 3.35e12)
MATMUL = 793e12  # FLOP/s of a large bf16 matrix product that was measured on one


class Driver:
    """An H100 as far as Triton asks."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def is_active(self) -> bool:
        return True


def pretend() -> None:
    """Tells torch and Triton of an H100, as far as scheduling asks for one."""
    card = DeviceProperties(
        type="cuda", index=0, multi_processor_count=132, cc=90, major=9,
        regs_per_multiprocessor=65_536, max_threads_per_multi_processor=2048, warp_size=32,
    )  # fmt: skip
    DeviceProperties.create = classmethod(lambda cls, device: card)
    triton.runtime.driver.set_active(Driver())
    scheduler.has_triton = torch.utils._triton.has_triton = lambda *_: True
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(
        name="NVIDIA H100", total_memory=80 << 30, **card._asdict()
    )
    torch.cuda.current_device = lambda: 0
    inductor.fx_graph_cache = False


@torch.library.custom_op("traffic::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stands for attention: it would change kernels that the blocks share with nothing else."""
    raise NotImplementedError


@torch.library.custom_op("traffic::attend_backward", mutates_args=())
def attend_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients."""
    raise NotImplementedError


def _by_token(x: Tensor) -> Tensor:
    """As attention kernels lay their results out: (B, heads, N, S), heads of a token together."""
    B, heads, N, S = x.shape
    return x.new_empty(B, N, heads, S).transpose(1, 2)


attend.register_fake(lambda q, k, v: _by_token(q))
attend_backward.register_fake(lambda g, *inputs: tuple(map(_by_token, inputs[:3])))
attend.register_autograd(
    lambda ctx, g: attend_backward(g, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output),
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of a schedule."""

    fused: bool
    """Made by Inductor; others are matrix products, attention and vitral's own."""
    bytes: int
    """Read and written."""
    origins: str


def schedule(config: ViTConfig, depth: int, batch: int) -> dict[str, list[Kernel]]:
    """The kernels of both passes through `depth` blocks under bf16 autocast."""
    with torch.device("meta"):
        blocks = nn.ModuleList(EncoderBlock(config, config.stochastic_depth) for _ in range(depth))
    for block in blocks:
        block.ffn.fused = config.kernels == "auto"
    names, parameters = zip(*blocks.named_parameters(), strict=True)
    tokens = 1 + config.num_registers + (config.image_size // config.patch_size) ** 2
    head = config.shape.dim // config.shape.num_heads
    graphs: dict[str, tuple[Any, list[Any]]] = {}

    def keep(name: str) -> Any:
        def compiler(graph: Any, inputs: list[Any]) -> Any:
            graphs[name] = graph, inputs
            return graph

        return compiler

    def run(weights: list[Tensor], x: Tensor, table: Tensor) -> Tensor:
        own = dict(zip(names, weights, strict=True))
        with torch.autocast("cpu", torch.bfloat16):
            for i, block in enumerate(blocks):
                mine = {n.partition(".")[2]: w for n, w in own.items() if n.startswith(f"{i}.")}
                x = torch.func.functional_call(block, mine, (x, table, table))
        return x

    def partition(graph: Any, *rest: Any, **settings: Any) -> Any:
        joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, *rest, compiler="inductor", **settings)

    compiled = aot_function(
        run, fw_compiler=keep("forward"), bw_compiler=keep("backward"), partition_fn=partition,
        decompositions=select_decomp_table(),
    )  # fmt: skip
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings(action="ignore"):
        weights = [torch.empty(p.shape, requires_grad=True) for p in parameters]
        x = torch.empty(batch, tokens, config.shape.dim, requires_grad=True)
        y = compiled(weights, x, torch.empty(1, tokens, head))
        y.backward(torch.empty_like(y))
    return {name: list(lower(*graphs[name], name == "backward")) for name in graphs}


def lower(graph: Any, inputs: list[Any], backward: bool) -> Iterator[Kernel]:
    """Schedules a graph that was traced on the CPU as for a GPU."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    with mode, torch.no_grad():
        moved = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda:0")
            if isinstance(t, Tensor) else t for t in inputs
        ]  # fmt: skip
    with V.set_fake_mode(mode), torch.no_grad():
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
        view_to_reshape(graph)
        _recursive_post_grad_passes(graph, is_inference=False)
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
        lowering = GraphLowering(
            graph, example_inputs=moved, is_backward=backward, shape_env=ShapeEnv()
        )
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*moved)
            lowering._update_scheduler()
            for node in lowering.scheduler.nodes:
                yield Kernel(
                    not node.is_extern(), node.get_read_write_buffers_sizes(), _origins(node)
                )


def _origins(node: Any) -> str:
    parts = [part.node for part in node.get_nodes()]
    return ", ".join(sorted({str(origin) for part in parts for origin in part.get_origins()}))


def block_bytes(config: ViTConfig, batch: int) -> dict[str, int]:
    """Bytes that the fused kernels of a block in the middle move, by pass."""
    few, more = (schedule(config, depth, batch) for depth in (2, 4))
    return {
        name: sum(k.bytes for k in more[name] if k.fused) // 2
        - sum(k.bytes for k in few[name] if k.fused) // 2
        for name in ("forward", "backward")
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--sizes", nargs="+", default=["s", "b", "l"], choices=["ti", "s", "b", "l", "h"])
    add("--batch", type=int, default=512)
    add("--image-size", type=int, default=224)
    add("--patch-size", type=int, default=16)
    add("--kernels", nargs="+", default=["auto", "plain"], choices=["auto", "plain"])
    add("--list", action="store_true", help="the kernels of two blocks")
    options = parser.parse_args(arguments)
    GroupedQueryAttention.attend = lambda self, q, k, v: attend(q, k, v)
    kernels.can_fuse = lambda x: x.device.type == "cpu"
    pretend()
    sizes = functools.partial(
        ViTConfig, image_size=options.image_size, patch_size=options.patch_size
    )
    for size in options.sizes:
        for kind in options.kernels:
            config = sizes(size=size, kernels=kind)
            if options.list:
                _list(config, options.batch)
                continue
            moved = block_bytes(config, options.batch)
            layers = config.shape.depth
            flops = 3 * count_flops(config, 1000) * options.batch
            print(
                f"{size} {kind:5}  a block moves {moved['forward'] / 1e6:,.0f} MB forward, "
                f"{moved['backward'] / 1e6:,.0f} backward; {layers} blocks: "
                f"{1e3 * layers * sum(moved.values()) / BANDWIDTH:.1f} ms at "
                f"{BANDWIDTH / 1e12:g} TB/s, matrix products and attention "
                f"{1e3 * flops / MATMUL:.1f} ms at {MATMUL / 1e12:g} TFLOP/s",
                flush=True,
            )


def _list(config: ViTConfig, batch: int) -> None:
    for name, found in schedule(config, 2, batch).items():
        print(name)
        for kernel in found:
            if kernel.bytes > 1e6:
                kind = "fused" if kernel.fused else ""
                print(f"{kernel.bytes / 1e6:9,.1f} MB {kind:6} {kernel.origins[:110]}")


if __name__ == "__main__":
    main()
