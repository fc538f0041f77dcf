"""The machine profile: what is measured, stored, recalled and ignored."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from vitral.engines import profile
from vitral.engines.profile import fastest

SHAPE = {"dim": 64, "images": 8}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """The folder of an empty profile."""
    monkeypatch.delenv("VITRAL_PROFILE")
    monkeypatch.setenv("VITRAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(profile, "SLICE", 1e-4)
    monkeypatch.setattr(profile, "SECONDS", 1e-3)
    forget(monkeypatch)
    return tmp_path / "cache/profile"


def forget(monkeypatch):
    """Makes the next decision read the cache, as another process would."""
    monkeypatch.setattr(profile, "_recalled", {})
    profile.machine.cache_clear()


def work(count):
    return lambda: sum(range(count))


def not_called():
    raise AssertionError("measured")


SLOW, FAST = work(20_000), work(2)


@pytest.mark.parametrize("names", [("slow", "fast"), ("fast", "slow")])
def test_the_fastest_candidate_is_chosen_in_any_order(names):
    candidates = {"slow": SLOW, "fast": FAST}
    assert fastest("sums", SHAPE, {name: candidates[name] for name in names}) == "fast"


def test_another_process_recalls_the_decision_without_measuring(monkeypatch, capsys):
    assert fastest("sums", SHAPE, {"slow": SLOW, "fast": FAST}) == "fast"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("machine profile: sums (dim 64, images 8, 1 thread): slow ")
    forget(monkeypatch)
    assert fastest("sums", SHAPE, {"slow": not_called, "fast": not_called}) == "fast"
    assert capsys.readouterr().err == ""
    (found,) = profile.measurements()
    assert line == f"machine profile: {found}"


@pytest.mark.parametrize(
    "seconds", [{"a": 1.0, "b": 0.96}, {"a": 1.0, "b": 1.0}, {"a": 1.0}, {"a": 1.0, "b": 2.0}]
)
def test_a_small_difference_keeps_the_first_candidate(monkeypatch, seconds):
    monkeypatch.setattr(profile, "time_candidates", lambda candidates: seconds)
    assert fastest("sums", SHAPE, {"a": FAST, "b": FAST}) == "a"


def test_a_failing_candidate_is_not_used(capsys):
    def fails():
        raise RuntimeError("unsupported\nshape")

    assert fastest("sums", SHAPE, {"slow": SLOW, "broken": fails}) == "slow"
    assert "broken is not used, because it fails: unsupported\n" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="unsupported"):
        fastest("sums", SHAPE, {"broken": fails, "fast": FAST})


@pytest.mark.parametrize("what", ["decision", "shape", "candidates", "threads", "environment"])
def test_a_measurement_is_not_used_for_anything_else(monkeypatch, what):
    seconds = {"a": 1.0, "b": 0.5}
    monkeypatch.setattr(profile, "time_candidates", lambda _: seconds)
    candidates = {"a": FAST, "b": FAST}
    assert fastest("sums", SHAPE, candidates) == "b"
    forget(monkeypatch)
    seconds.clear()
    seconds.update(a=1.0, b=2.0)
    assert fastest("sums", SHAPE, candidates) == "b"
    if what == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    if what == "environment":
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        profile.machine.cache_clear()
    shape = {**SHAPE, "dim": 65} if what == "shape" else SHAPE
    more = {"c": FAST} if what == "candidates" else {}
    decision = "products" if what == "decision" else "sums"
    assert fastest(decision, shape, {**candidates, **more}) == "a"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-9],
        lambda text: text.replace("slow", "other"),
        lambda text: json.dumps({**json.loads(text), "seconds": {"slow": -1.0, "fast": 1.0}}),
        lambda text: json.dumps({**json.loads(text), "seconds": {}}),
        lambda text: json.dumps({**json.loads(text), "seconds": {"fast": 1.0}}),
        lambda text: json.dumps({**json.loads(text), "machine": "another"}),
    ],
)
def test_a_damaged_or_foreign_file_is_measured_again(monkeypatch, folder, damage):
    fastest("sums", SHAPE, {"slow": SLOW, "fast": FAST})
    (path,) = folder.iterdir()
    path.write_text(damage(path.read_text()))
    forget(monkeypatch)
    assert fastest("sums", SHAPE, {"slow": SLOW, "fast": FAST}) == "fast"
    assert [found.seconds.keys() for found in profile.measurements()] == [{"slow", "fast"}]


def test_a_cache_that_cannot_be_written_is_reported(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VITRAL_CACHE", str(tmp_path / "file"))
    assert fastest("sums", SHAPE, {"slow": SLOW, "fast": FAST}) == "fast"
    assert "file/profile cannot be written: Not a directory; " in capsys.readouterr().err
    # The same process does not measure again.
    assert fastest("sums", SHAPE, {"slow": not_called, "fast": not_called}) == "fast"
    assert profile.measurements() == []


def test_without_the_profile_the_first_candidate_is_used(monkeypatch, folder):
    monkeypatch.setenv("VITRAL_PROFILE", "off")
    assert fastest("sums", SHAPE, {"slow": not_called, "fast": not_called}) == "slow"
    assert not folder.exists()


def test_a_single_candidate_is_not_measured():
    assert fastest("sums", SHAPE, {"only": not_called}) == "only"


def test_measuring_preserves_the_random_state():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    fastest("sums", SHAPE, {"a": lambda: torch.rand(9), "b": lambda: torch.rand(8)})
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("threads", "seconds"), [(1, 2.0), (2, 3.0)])
def test_one_thread_is_timed_by_processor_time(monkeypatch, threads, seconds):
    """Both clocks advance by a fixed time at each reading."""
    busy, elapsed = itertools.count(0, 2), itertools.count(0, 3)
    clocks = SimpleNamespace(process_time=lambda: next(busy), perf_counter=lambda: next(elapsed))
    monkeypatch.setattr(profile, "time", clocks)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert profile.time_candidates({"call": lambda: None}) == {"call": seconds}


def test_the_machine_is_its_processor_and_everything_that_changes_kernels(monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    found = profile.machine()
    assert torch.backends.cpu.get_cpu_capability() in found
    assert f"torch {torch.__version__}" in found
    assert "MKL_CBWR=COMPATIBLE" in found
    assert "OMP_WAIT_POLICY=PASSIVE" in found
    assert "HOME" not in found
