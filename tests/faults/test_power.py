"""A power failure loses only the work since the last checkpoint.

A disk may lose everything that was not flushed: changes of a file since its last fsync, and changes
of the entries of a directory since its last fsync. A run records what remains on such a disk.
"""

import os
import resource
import shutil
from pathlib import Path

import pytest

from vitral import storage
from vitral.rundir import RunDir, read_rows
from vitral.training import checkpoint, train

from ..training.processes import digests, finish_single, fork, make_config

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


class Disk:
    """What remains of a directory after a power failure.

    Args:
        root: the directory, whose own entry is on the disk.
        keep: where to put copies of it.
    """

    def __init__(self, root, keep):
        self.root, self.keep, self.fsync = root, keep, os.fsync
        self.files, self.entries, self.count = {}, {root.stat().st_ino: {}}, 0

    def flush(self, descriptor):
        """Replaces os.fsync."""
        self.fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        number = os.fstat(descriptor).st_ino
        if number not in self.files and number not in self.entries:
            os.dup(descriptor)  # an open file keeps its inode number, even if it is removed
        if path.is_dir():
            self.entries[number] = {each.name: each.lstat().st_ino for each in path.iterdir()}
        else:
            self.files[number] = path.read_bytes()
        if path.name == "checkpoints":  # the entry of a new checkpoint
            self.count += 1
            self._restore(self.root.stat().st_ino, self.keep / f"{self.count:03d}")

    def _restore(self, number, place):
        """Writes a directory as it is on the disk; files without flushed content are empty."""
        place.mkdir()
        for name, inner in self.entries.get(number, {}).items():
            if inner in self.entries:
                self._restore(inner, place / name)
            else:
                (place / name).write_bytes(self.files.get(inner, b""))


@pytest.fixture(scope="module")
def failures(image_folder, tmp_path_factory):
    """A run, and what remains of its parent directory after a power failure at each checkpoint."""
    home = tmp_path_factory.mktemp("power")
    root, keep = home / "root", home / "keep"
    root.mkdir()
    keep.mkdir()
    out = root / "deep" / "run"

    def action():
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        disk = Disk(root, keep)
        os.fsync = disk.flush
        train(make_config(image_folder, out))
        return 0

    child = fork(action, stderr=home / "stderr")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, (home / "stderr").read_text()
    return out, sorted(keep.iterdir())


def test_what_a_checkpoint_implies_is_on_disk_before_it(failures):
    out, left = failures
    assert len(left) >= 9
    rows = read_rows(RunDir(out).metrics)
    for place in left:
        run = RunDir(place / "deep" / "run")
        found = checkpoint.latest(run.checkpoints, pytest.fail)
        assert found is not None
        assert run.config.read_bytes() == RunDir(out).config.read_bytes()
        assert run.environment.read_bytes() == RunDir(out).environment.read_bytes()
        assert read_rows(run.metrics)[: found.step] == rows[: found.step]
        assert next(run.tensorboard.iterdir()).stat().st_size > 0
        assert " starts: " in run.log.read_text()
        if found.state["evaluated"]:
            for name in ("per_class.csv", "confused_pairs.csv"):
                assert (run.path / name).stat().st_size > 0
        for weights in run.weights.glob("*"):
            storage.verify(weights)


@pytest.mark.parametrize(
    "chosen", [0, -1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 9))]
)
def test_a_run_resumes_after_a_power_failure(image_folder, failures, tmp_path, chosen):
    out, left = failures
    shutil.copytree(left[chosen] / "deep" / "run", tmp_path / "run")
    assert finish_single(make_config(image_folder, tmp_path / "run")) == 0
    assert "resumes from step" in (tmp_path / "run" / "train.log").read_text() or chosen == -1
    assert digests(tmp_path / "run") == digests(out)
