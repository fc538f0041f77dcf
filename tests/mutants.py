"""Plants one bug at a time in a copy of the source and reports which ones the tests catch.

    python tests/mutants.py [NAME ...]

Each bug is in a different area and runs only the test files of that area. The exit code is 1 if
the tests miss a bug.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutant:
    """A bug that replaces `old` by `new` in a module, and the test files that should catch it."""

    module: str
    old: str
    new: str
    tests: str


MUTANTS = {
    "rotary sign": Mutant(
        "model.py",
        "torch.cat([-sine, sine], dim=-1)",
        "torch.cat([sine, -sine], dim=-1)",
        "test_model.py",
    ),
    "group mapping": Mutant(
        "model.py",
        "groups = q.reshape(B, self.num_kv_heads, -1, S)",
        "groups = q.unflatten(1, (-1, self.num_kv_heads)).transpose(1, 2).flatten(2, 3)",
        "test_model.py",
    ),
    "norm epsilon": Mutant("kernels/norm.py", "EPS = 1e-6", "EPS = 1e-5", "test_model.py"),
    "mixup partner": Mutant(
        "data/augment.py",
        "return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)",
        "return x.flip(0)",
        "data/test_augment.py data/test_loader.py",
    ),
    "sampling hash": Mutant(
        "data/sampling.py",
        'hash64(seed, crc32(b"order"), epoch, np.arange(size))',
        'hash64(seed, crc32(b"order"), 0, np.arange(size))',
        "data/test_sampling.py",
    ),
    "crop rounding": Mutant(
        "data/crops.py",
        "np.rint((sizes - side) / 2)",
        "np.floor((sizes - side) / 2)",
        "data/test_crops.py",
    ),
    "normalization": Mutant(
        "data/augment.py",
        "mul_(1 / 255).sub_(center).div_(deviation)",
        "mul_(1 / 255).div_(deviation).sub_(center)",
        "data/test_augment.py",
    ),
    "learning-rate schedule": Mutant(
        "training/plan.py",
        "(step + 1) / self.warmup",
        "step / self.warmup",
        "training/test_plan.py training/test_optim.py",
    ),
    "weight decay of biases": Mutant(
        "training/optim.py",
        "config.weight_decay if parameter in decayed else 0.0",
        "config.weight_decay",
        "training/test_optim.py",
    ),
    "moving average": Mutant(
        "training/optim.py",
        "1 - min(self.decay, step / (step + 9))",
        "1 - self.decay",
        "training/test_optim.py",
    ),
    "momentum of Muon": Mutant(
        "training/muon.py",
        "lookahead = gradients.lerp_(moved, MOMENTUM)",
        "lookahead = moved",
        "training/test_muon.py",
    ),
    "resume cursor": Mutant(
        "training/loop.py",
        "steps=range(self.progress.step, self.plan.total)",
        "steps=range(max(0, self.progress.step - 1), self.plan.total)",
        "training/test_resume.py",
    ),
    "manifest": Mutant(
        "storage.py",
        'if sha256 != expected["sha256"]:',
        'if len(sha256) != len(expected["sha256"]):',
        "test_storage.py",
    ),
    "top-5 metric": Mutant(
        "evaluation/scores.py",
        "self.ranked[:, :k] == self.labels[:, None]",
        "self.ranked[:, : k + 1] == self.labels[:, None]",
        "evaluation/test_scores.py",
    ),
    "held-out fraction": Mutant(
        "data/sampling.py",
        "np.rint(fraction * counts)",
        "np.floor(fraction * counts)",
        "data/formats/test_folder.py data/test_splits.py",
    ),
    "shard of a process": Mutant(
        "data/loader.py",
        "starts = range(shard[0] * num_slices * size, (shard[0] + 1) * num_slices * size, size)",
        "starts = range(0, num_slices * size, size)",
        "data/test_loader.py",
    ),
}


def main(names: list[str]) -> int:
    """Tries the named bugs, or all; returns the exit code."""
    missed = []
    for name in names or MUTANTS:
        started = time.monotonic()
        caught = is_caught(MUTANTS[name])
        print(f"{'caught' if caught else 'MISSED'}  {name}  ({time.monotonic() - started:.0f} s)")
        missed += [] if caught else [name]
    print(f"{len(names or MUTANTS) - len(missed)} of {len(names or MUTANTS)} caught")
    return 1 if missed else 0


def is_caught(mutant: Mutant) -> bool:
    """Whether a test fails with the bug in place."""
    with TemporaryDirectory() as place:
        source = Path(place) / "src"
        shutil.copytree(ROOT / "src", source)
        module = source / "vitral" / mutant.module
        text = module.read_text(encoding="utf-8")
        assert text.count(mutant.old) == 1, f"{mutant.module}: expected {mutant.old!r} once"
        module.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        files = [str(ROOT / "tests" / name) for name in mutant.tests.split()]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(source)},
            capture_output=True,
            text=True,
        )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.returncode == 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
