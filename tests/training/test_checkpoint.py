"""Checkpoints: the newest intact one is read; old ones are removed once a new one is verified."""

import shutil

import pytest
import torch

from vitral import storage
from vitral.training import checkpoint
from vitral.training.checkpoint import Checkpoint

from .processes import damage


def make_checkpoint(step):
    """Returns a checkpoint whose content depends on its step."""
    draw = torch.Generator().manual_seed(step)
    tensors = {
        kind: {"a": torch.randn(40, 3, generator=draw), "b": torch.tensor(step)}
        for kind in ("model", "ema", "optimizer")
    }
    return Checkpoint(step, tensors, {"fingerprint": f"{step}", "broken": [[1, "empty"]]})


def assert_same(found, expected):
    assert found is not None
    assert found.step == expected.step
    assert found.state == {"schema": checkpoint.SCHEMA, "step": found.step, **expected.state}
    assert found.tensors.keys() == expected.tensors.keys()
    for kind, tensors in expected.tensors.items():
        assert found.tensors[kind].keys() == tensors.keys()
        assert all(found.tensors[kind][name].equal(value) for name, value in tensors.items())


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 3, 6 and 9."""
    for step in (3, 6, 9):
        checkpoint.save(tmp_path / "checkpoints", make_checkpoint(step), None)
    return tmp_path / "checkpoints"


def test_the_newest_checkpoint_is_read_as_written(folder):
    assert checkpoint.steps(folder.parent / "none") == []
    assert checkpoint.latest(folder.parent / "none", pytest.fail) is None
    assert sorted(checkpoint.steps(folder)) == [3, 6, 9]
    assert_same(checkpoint.latest(folder, pytest.fail), make_checkpoint(9))
    assert_same(checkpoint.read(folder, 6), make_checkpoint(6))
    assert checkpoint.read_state(folder, 3)["fingerprint"] == "3"


def test_steps_are_compared_as_numbers(tmp_path):
    for step in (10_000_000, 9_999_999, 2):
        checkpoint.save(tmp_path, make_checkpoint(step), None)
    (tmp_path / "step_99999999x").mkdir()
    (tmp_path / "notes").touch()
    assert_same(checkpoint.latest(tmp_path, pytest.fail), make_checkpoint(10_000_000))


@pytest.mark.parametrize(
    ("best", "kept"), [(None, [9, 12, 15]), (6, [6, 9, 12, 15]), (12, [9, 12, 15])]
)
def test_the_last_three_and_the_best_are_kept(folder, best, kept):
    (folder / ".step_0000001.new").mkdir()  # left by a killed write
    for step in (12, 15):
        checkpoint.save(folder, make_checkpoint(step), best)
    assert sorted(path.name for path in folder.iterdir()) == [f"step_{k:07d}" for k in kept]


def test_nothing_is_removed_before_the_new_one_is_verified(folder, monkeypatch):
    write = storage.write

    def write_badly(directory, *content):
        write(directory, *content)
        damage(directory / "ema.safetensors", "flipped")

    monkeypatch.setattr(storage, "write", write_badly)
    with pytest.raises(storage.CorruptError, match="step_0000012"):
        checkpoint.save(folder, make_checkpoint(12), None)
    assert sorted(checkpoint.steps(folder)) == [3, 6, 9, 12]
    warnings = []
    assert_same(checkpoint.latest(folder, warnings.append), make_checkpoint(9))
    assert len(warnings) == 1


@pytest.mark.parametrize("kind", ["truncated", "flipped", "deleted"])
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "ema.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    ],
)
def test_damaged_checkpoints_are_skipped(folder, name, kind):
    damage(folder / "step_0000009" / name, kind)
    warnings = []
    assert_same(checkpoint.latest(folder, warnings.append), make_checkpoint(6))
    (warning,) = warnings
    assert "step_0000009" in warning
    if kind != "flipped" or name != "manifest.json":
        assert name in warning


def test_checkpoints_of_another_version_are_skipped(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SCHEMA", 1)
        checkpoint.save(folder, make_checkpoint(12), None)
    warnings = []
    assert_same(checkpoint.latest(folder, warnings.append), make_checkpoint(9))
    assert f"schema 1, not {checkpoint.SCHEMA}" in warnings[0]


def test_a_checkpoint_between_two_renames_is_found(folder):
    """The process was killed while it replaced a checkpoint of the same step."""
    newest = folder / "step_0000009"
    shutil.copytree(newest, folder / f".{newest.name}.new")
    newest.rename(folder / f".{newest.name}.old")
    assert_same(checkpoint.latest(folder, pytest.fail), make_checkpoint(9))
    checkpoint.save(folder, Checkpoint(10, {}, {}), None)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_checkpoints_of_another_step_are_skipped(folder):
    shutil.copytree(folder / "step_0000006", folder / "step_0000018")
    warnings = []
    assert_same(checkpoint.latest(folder, warnings.append), make_checkpoint(9))
    (warning,) = warnings
    assert "step_0000018: step 6, not 18" in warning


def test_other_files_are_left_untouched(folder):
    (folder / "step_0000001").touch()
    (folder / "step_0000002").symlink_to("gone")
    (folder / ".step_0000004.new").symlink_to("gone")
    assert sorted(checkpoint.steps(folder)) == [3, 6, 9]
    for step in (12, 15):
        checkpoint.save(folder, make_checkpoint(step), None)
    assert sorted(checkpoint.steps(folder)) == [9, 12, 15]
    assert_same(checkpoint.latest(folder, pytest.fail), make_checkpoint(15))


def test_a_link_to_a_checkpoint_is_read_and_pruned(folder):
    elsewhere = folder.parent / "elsewhere"
    (folder / "step_0000003").rename(elsewhere)
    (folder / "step_0000003").symlink_to(elsewhere)
    assert_same(checkpoint.read(folder, 3), make_checkpoint(3))
    checkpoint.save(folder, make_checkpoint(12), None)
    assert sorted(path.name for path in folder.iterdir()) == [
        f"step_{step:07d}" for step in (6, 9, 12)
    ]
    assert (elsewhere / "manifest.json").exists()


def test_a_file_at_the_path_of_a_checkpoint_is_replaced(folder):
    (folder / "step_0000012").touch()
    checkpoint.save(folder, make_checkpoint(12), None)
    assert_same(checkpoint.latest(folder, pytest.fail), make_checkpoint(12))
