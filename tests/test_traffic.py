"""benchmarks/traffic.py: what the compiler would make of a block for a GPU that is not there."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "traffic.py"


def test_kernels_of_vitrals_own_spare_bytes():
    """By hand, of a block: GELU reads and writes what the products around it need not."""
    words = [sys.executable, str(SCRIPT), "--sizes", "ti", "--batch", "64"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"ti (\w+) +a block moves (\d+) MB forward, (\d+) backward", done.stdout)
    moved = {kind: (int(forward), int(backward)) for kind, forward, backward in found}
    hidden = 64 * 197 * 4 * 192 * 2 / 1e6  # bf16
    (fused, back), (plain, plain_back) = moved["auto"], moved["plain"]
    assert 0.95 < (plain - fused) / (2 * hidden) < 1.15  # it reads one and writes one
    # It reads two and writes one, which is read again for the sum over the tokens.
    assert 0.85 < (plain_back - back) / (4 * hidden) < 1.15
