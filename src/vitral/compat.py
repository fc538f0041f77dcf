"""Private or version-dependent PyTorch APIs, each behind one function. Tested: torch 2.11, 2.14."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch
from torch import Tensor


def lerp_all(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float | Tensor) -> None:
    """Interpolates each tensor toward its end by `weight`, in place, with few kernel launches.

    Args:
        tensors: the tensors to change.
        ends: a tensor of the same shape for each of them.
        weight: a number, or a scalar tensor on the device; a tensor needs memory for a copy of
            `tensors`.
    """
    if isinstance(weight, Tensor):
        steps = torch._foreach_sub(list(ends), list(tensors))
        torch._foreach_mul_(steps, weight)
        torch._foreach_add_(list(tensors), steps)
    else:
        torch._foreach_lerp_(list(tensors), list(ends), weight)


def add_all(tensors: Sequence[Tensor], others: Sequence[Tensor], alpha: float = 1.0) -> None:
    """Adds `alpha` times the corresponding tensor in `others` to each tensor, in place."""
    torch._foreach_add_(list(tensors), list(others), alpha=alpha)


def scale_all(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiplies each tensor by a scalar tensor, in place."""
    torch._foreach_mul_(list(tensors), factor)


def copy_all(tensors: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source into the corresponding tensor."""
    torch._foreach_copy_(list(tensors), list(sources))


def backward_of_ones(y: Tensor) -> None:
    """Runs the backward pass for a gradient of ones with respect to `y`.

    Passing a gradient to `Tensor.backward` would import SymPy, which takes a third as long as
    importing torch.
    """
    y.register_hook(Tensor.contiguous)  # the gradient of a sum is an expanded scalar
    y.sum().backward()


def make_inductor_deterministic() -> None:
    """Prevents Inductor from choosing kernels by their measured speed."""
    import torch._inductor.config as inductor

    inductor.deterministic = True


def allow_recompiles(count: int) -> None:
    """Raises torch.compile's limit on graphs per function to at least `count`.

    Beyond its default limit of 8, torch runs the function eagerly and only logs it.
    """
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, count)


def fresh_compile_cache() -> AbstractContextManager[Any]:
    """Returns a context in which the Inductor cache is empty."""
    from torch._inductor.utils import fresh_cache

    return fresh_cache()


def num_compiled_graphs() -> int:
    """Returns the number of graphs that Dynamo has compiled in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def has_linear_pointwise() -> bool:
    """Returns whether torch has oneDNN's linear operator, which only Inductor uses."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def has_bf16_products() -> bool:
    """Returns whether the processor multiplies in bfloat16: with AVX-512 BF16, so also with AMX."""
    return torch.cpu._is_avx512_bf16_supported()


def linear_pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, function: str, form: str
) -> Tensor:
    """oneDNN's linear layer followed by an elementwise function, such as ("gelu", "tanh")."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, function, [], form)


def loader_workers(batches: Any) -> Iterable[BaseProcess]:
    """Returns the worker processes of a DataLoader's iterator."""
    return cast(Iterable[BaseProcess], getattr(batches, "_workers", ()))


def wrap_exception(error: Exception) -> Any:
    """Wraps an exception as DataLoader workers do, to be raised in the main process."""
    from torch._utils import ExceptionWrapper

    return ExceptionWrapper((type(error), error, error.__traceback__))


def abandon_loader(error: BaseException) -> None:
    """Prevents a DataLoader's iterator that failed to start with `error` from cleaning up.

    Its cleanup would print a second error, about attributes that are not set yet.
    """
    trace = error.__traceback__
    while trace is not None:
        started: Any = trace.tb_frame.f_locals.get("self")
        if type(started).__name__ == "_MultiProcessingDataLoaderIter":
            started._shutdown = True
            if hasattr(started, "_pin_memory_thread_done_event"):
                started._pin_memory_thread_done_event.set()
        trace = trace.tb_next


def is_loader_timeout(error: RuntimeError, batches: Any) -> bool:
    """Returns whether a DataLoader's iterator timed out with `error`; it can still be used."""
    thread = getattr(batches, "_pin_memory_thread", None)
    alive = thread is None or thread.is_alive()
    return alive and str(error).startswith("DataLoader timed out")
