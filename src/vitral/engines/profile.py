"""The machine profile: measures once per machine which of several implementations is the fastest.

Each measurement is a file in the user's cache directory. Later runs read it, so a decision does not
depend on the load at that time. A measurement is valid for one decision, shape, set of candidates
and machine: a processor with its instruction set, a version of torch, the environment variables
that change its kernels, and a number of threads. VITRAL_PROFILE=off disables the profile: every
decision is then its first candidate.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from vitral import storage
from vitral.caches import cache_dir
from vitral.config import ViTConfig
from vitral.documents import convert_json, parse_json
from vitral.errors import Messages, UserError, counted, printable, reason_of
from vitral.files import read_regular
from vitral.machine import processor

VARIABLES = ("ATEN_CPU_CAPABILITY", "DNNL_", "GOMP_", "KMP_", "MKL_", "OMP_", "ONEDNN_")  # prefixes
MARGIN = 1.05  # how many times faster than the first candidate another one must be
SLICE = 0.02  # seconds of consecutive calls of a candidate, unless a single call takes longer
SECONDS, MIN_ROUNDS, MAX_ROUNDS = 0.3, 3, 15  # for each candidate
MAX_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """A measurement, as stored in the cache."""

    machine: str
    threads: int
    decision: str
    shape: str
    names: tuple[str, ...]
    """The candidates. One that failed has no entry in `seconds`."""
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        valid = all(math.isfinite(value) and value > 0 for value in self.seconds.values())
        if not valid or not {*self.seconds} <= {*self.names}:
            raise UserError("seconds: expected a positive number for each name")

    def __str__(self) -> str:
        times = ", ".join(f"{name} {_milliseconds(s)}" for name, s in self.seconds.items())
        return f"{self.decision} ({self.shape}, {counted(self.threads, 'thread')}): {times}"


def block_shape(config: ViTConfig, images: int) -> dict[str, object]:
    """Returns the shape of an encoder block and its input, for `fastest`."""
    dim, _, heads, kv_heads = config.shape
    options = {"qk-norm": config.qk_norm, "layer-scale": config.layer_scale > 0}
    options |= {"dropout": config.dropout > 0, "qkv-bias": config.qkv_bias}
    return {
        "dim": dim,
        "heads": f"{heads}/{kv_heads}",
        "ffn": f"{config.mlp_ratio:g} {config.activation}",
        "rope": config.rope,
        "options": " ".join(name for name, is_on in options.items() if is_on) or "none",
        "input": f"{images} x {num_tokens(config)}",
    }


def num_tokens(config: ViTConfig) -> int:
    """Returns the number of tokens of an image, including CLS and registers."""
    return config.num_prefix + (config.image_size // config.patch_size) ** 2


def is_enabled() -> bool:
    """Returns whether decisions are measured: unless VITRAL_PROFILE is "off"."""
    return os.environ.get("VITRAL_PROFILE") != "off"


def fastest(
    decision: str, shape: Mapping[str, object], candidates: Mapping[str, Callable[[], object]]
) -> str:
    """Returns the name of the fastest candidate, measured once per machine.

    Returns the first candidate unless another one is at least 5% faster, so that noise does not
    change the decision. A candidate that raises an exception is not used; an exception of the first
    one is propagated.

    Args:
        decision: what is decided, such as "linear layers"; shown to the user.
        shape: the values on which the result depends, such as sizes; shown to the user.
        candidates: functions that do the same work, by name.
    """
    first, *others = candidates
    if not others or not is_enabled():
        return first
    seconds = recall(decision, shape, candidates, lambda: time_candidates(candidates))
    best = min(seconds, key=lambda name: seconds[name])
    return best if MARGIN * seconds[best] <= seconds[first] else first


def recall(
    decision: str,
    shape: Mapping[str, object],
    names: Iterable[str],
    measure: Callable[[], Mapping[str, float]],
) -> Mapping[str, float]:
    """Returns the stored seconds by name on this machine, or calls `measure` and stores them.

    See `fastest` for the arguments.
    """
    key = Measurement(
        machine=machine(),
        threads=torch.get_num_threads(),
        decision=decision,
        shape=", ".join(f"{name} {value}" for name, value in shape.items()),
        names=tuple(names),
    )
    digest = hashlib.sha256(_to_json(key)).hexdigest()
    path = _directory() / f"{digest}.json"
    if digest not in _recalled:
        found = _read(path)
        same = found is not None and dataclasses.replace(found, seconds={}) == key
        if found is None or not same or key.names[0] not in found.seconds:
            found = dataclasses.replace(key, seconds={**measure()})
            _say(str(found))
            _write(path, found)
        _recalled[digest] = found.seconds
    return _recalled[digest]


def time_candidates(candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Returns the minimum time of one call of each candidate, in seconds, measured in alternation.

    The clock is the processor time of this process if torch uses one thread, because other load
    hardly affects it, and wall time otherwise. The random state of torch is preserved.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def timed(call: Callable[[], object], count: int) -> float:
        started = clock()
        for _ in range(count):
            call()
        return max(clock() - started, 1e-9) / count

    times: dict[str, list[float]] = {}
    with torch.random.fork_rng([]):
        for name, call in candidates.items():
            try:
                call()  # allocates, imports and compiles
                times[name] = [min(timed(call, 1), timed(call, 1))]
            except Exception as error:  # compilers raise errors of any type
                if not times:
                    raise
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                _say(f"{name} is not used, because it fails: {reason}")
        counts = {name: math.ceil(SLICE / once) for name, (once,) in times.items()}
        longest = max(counts[name] * once for name, (once,) in times.items())
        names = itertools.cycle(counts)
        for _ in range(min(MAX_ROUNDS, max(MIN_ROUNDS, round(SECONDS / longest)))):
            for name in itertools.islice(names, len(counts)):
                times[name].append(timed(candidates[name], counts[name]))
            next(names)  # another candidate starts the next round
    return {name: min(values) for name, values in times.items()}


def measurements() -> list[Measurement]:
    """Returns the stored measurements of this machine, with any number of threads."""
    found = (_read(path) for path in sorted(_directory().glob("*.json")))
    own = (each for each in found if each is not None and each.machine == machine())
    return sorted(own, key=str)


@functools.cache
def machine() -> str:
    """Returns everything but the number of threads that affects the speed of an implementation."""
    variables = (f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES))
    capability = torch.backends.cpu.get_cpu_capability()
    return ", ".join([processor(), capability, f"torch {torch.__version__}", *variables])


_recalled: dict[str, Mapping[str, float]] = {}  # by this process, so that it does not change


def _read(path: Path) -> Measurement | None:
    try:
        return convert_json(Measurement, parse_json(read_regular(path, MAX_BYTES)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, UserError) as error:
        _say(f"{path} cannot be used: {reason_of(error)}")
        return None


def _write(path: Path, found: Measurement) -> None:
    try:
        storage.make_directory(path.parent)
        with storage.replacing(path) as building:
            building.write_bytes(_to_json(found))
    except OSError as error:
        _say(
            f"{path.parent} cannot be written: {reason_of(error)}; each process measures again; "
            "set VITRAL_CACHE to another directory"
        )


def _to_json(measurement: Measurement) -> bytes:
    return (json.dumps(dataclasses.asdict(measurement), indent=2) + "\n").encode()


def _say(text: str) -> None:
    print(f"machine profile: {printable(text)}", file=Messages(sys.stderr))


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


def _directory() -> Path:
    return cache_dir() / "profile"
