"""The epochs that fit a time budget, with given costs and with measured ones."""

import multiprocessing

import pytest
import torch

from vitral import settings
from vitral.cli import main
from vitral.config import Seconds
from vitral.errors import UserError
from vitral.rundir import RunDir
from vitral.training import budget
from vitral.training.budget import Costs, max_epochs, with_epochs
from vitral.training.distributed import World

NONE = frozenset()
TINY = "--model.dim 16 --model.depth 1 --train.threads 1 --train.batch-size 480".split()


def request(*words):
    return settings.request("digits", [*words, "--train.device", "cpu"])


@pytest.mark.parametrize(
    ("words", "seconds"),
    [("600", 600), ("90s", 90), ("10m", 600), ("2h", 7200), ("1h30m", 5400), ("1m2.5s", 62.5)],
)
def test_time_budgets_are_parsed(words, seconds):
    config = request("--time-budget", words).config
    assert config.train.time_budget == seconds
    assert "time_budget: " + str(float(seconds)) in settings.dump(config)


@pytest.mark.parametrize("words", ["soon", "-5", "10 m", "1m1h", "0", "", "inf"])
def test_invalid_time_budgets_are_rejected(words):
    with pytest.raises(UserError, match=r"^train\.time_budget: expected a "):
        request("--time-budget", words)


def test_max_epochs_by_hand():
    """1,280 images are 20 steps per epoch; 38 epochs have 8 validations, one every 5 epochs."""
    config = request("--train.eval-every", "70").config
    costs = Costs(fixed=8.0, step=0.1, validation=2.0)
    given = frozenset({"train.eval_every"})
    assert max_epochs(config, given, costs, 1280, 100.0) == 45  # 8 + 90 + 2
    assert max_epochs(config, given, costs, 1280, 99.9) == 44
    assert max_epochs(config, given, costs, 1280, 12.0) == 1
    assert max_epochs(config, given, costs, 1280, 11.9) == 0
    assert max_epochs(request().config, NONE, costs, 1280, 100.0) == 38  # 8 + 76 + 8 * 2
    assert max_epochs(request().config, NONE, costs, 1280, 1e4) > 70


def test_one_more_epoch_exceeds_the_budget():
    costs = Costs(fixed=3.0, step=0.02, validation=0.7)
    config = request().config
    for seconds in range(5, 300, 7):
        found = max_epochs(config, NONE, costs, 1437, seconds)
        times = [costs.total(with_epochs(config, NONE, n), 1437) for n in (found, found + 1)]
        assert times[0] <= seconds < times[1]


@pytest.fixture
def measured(monkeypatch):
    """Replaces the measurement with costs in proportion to the area of the images."""
    image_sizes = []

    def measure(config, processes, data):
        image_size = config.model.image_size
        image_sizes.append(image_size)
        scale = (image_size / 8) ** 2
        return Costs(1.0, 0.05 * scale, 0.5 * scale), 1437

    monkeypatch.setattr(budget, "measure", measure)
    return image_sizes


def fit(tmp_path, *words):
    return budget.fit_time_budget(
        request(*words, "--out", str(tmp_path)), RunDir(tmp_path), World()
    )


def test_a_new_run_uses_the_epochs_that_fit(measured, tmp_path):
    found = fit(tmp_path, "--time-budget", "30s", "--train.ema-decay", "0.9")
    (note,) = found.notes
    epochs = found.config.train.epochs
    assert 15 < epochs < 25  # of 1.15 s each, and some validations
    adjusted = request("--epochs", str(epochs), "--train.ema-decay", "0.9").config
    assert found.config.optim == adjusted.optim
    assert found.config.train.eval_every == adjusted.train.eval_every
    assert found.config.train.ema_decay == 0.9
    assert note.startswith(f"train.time_budget 30 s: train.epochs 70 -> {epochs}, ")
    assert measured == [8]


def test_images_become_smaller_if_too_few_epochs_fit(measured, tmp_path):
    found = fit(tmp_path, "--time-budget", "8s").config
    assert 4 <= found.model.image_size < 8
    assert found.train.epochs >= 5
    assert measured == [8, found.model.image_size]
    kept = fit(tmp_path, "--time-budget", "8s", "--image-size", "8").config
    assert (kept.model.image_size, kept.train.epochs) == (8, 4)  # 1 + 90 * 0.05 + 4 * 0.5


def test_less_than_an_epoch_is_rejected_with_the_minimum(measured, tmp_path):
    with pytest.raises(UserError, match=r"at least 3 s for 1 epoch at 8 pixels, got 2 s"):
        fit(tmp_path, "--time-budget", "2s", "--image-size", "8")
    words = ["--time-budget", "5s", "--image-size", "8", "--optim.warmup-epochs", "2"]
    with pytest.raises(UserError, match=r"at least 6 s for 3 epochs at 8 pixels, got 5 s"):
        fit(tmp_path, *words)


@pytest.mark.parametrize("words", [[], ["--time-budget", "None"], ["--epochs", "3"]])
def test_without_a_budget_nothing_is_measured(monkeypatch, tmp_path, words):
    monkeypatch.setattr(budget, "measure", None)
    asked = request(*words, "--out", str(tmp_path))
    assert budget.fit_time_budget(asked, RunDir(tmp_path), World()) is asked


def test_epochs_and_a_budget_exclude_each_other(tmp_path):
    with pytest.raises(
        UserError, match=r"^train\.time_budget: cannot be combined with train\.epochs"
    ):
        request("--epochs", "3", "--time-budget", "5m")
    (tmp_path / "own.yaml").write_text("train: {time_budget: 5m, epochs: 80}")
    load = settings.request
    assert "train.time_budget" not in load(str(tmp_path / "own.yaml")).given  # a record
    assert load(str(tmp_path / "own.yaml"), ["--epochs", "8"]).config.train.time_budget is None
    (tmp_path / "own.yaml").write_text("train: {time_budget: 5m}")
    asked = load(str(tmp_path / "own.yaml"))
    assert "train.time_budget" in asked.given
    assert asked.config.train.time_budget == Seconds("5m") == 300


def test_a_run_is_resumed_without_a_second_measurement(measured, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    words = ["train", "digits", *TINY, "--out", str(out), "--train.device", "cpu"]
    monkeypatch.setattr(budget, "MEASURING_FRACTION", 0.0)
    assert main([*words, "--time-budget", "4s", "--image-size", "8"]) == 0
    config = settings.load(str(out / "config.yaml"))
    assert config.train.time_budget == 4
    assert config.train.epochs < 70
    assert main([*words, "--time-budget", "4", "--image-size", "8"]) == 0
    assert "this run is already finished" in capsys.readouterr().out
    assert main([*words, "--time-budget", "5", "--image-size", "8"]) == 2
    assert "train.time_budget: the run in" in capsys.readouterr().err
    again = tmp_path / "again"
    assert main(["train", str(out / "config.yaml"), "--out", str(again)]) == 0
    assert measured == [8]
    files = [path / "weights" / "last" / "model.safetensors" for path in (out, again)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("path", ["digits", "folder"])
def test_costs_are_measured_without_side_effects(image_folder, path):
    data = str(image_folder) if path == "folder" else path
    words = ["--data", data, "--time-budget", "1s", "--data.workers", "1", *TINY[:4]]
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    costs, images = budget.measure(request(*words, "--train.batch-size", "8").config, 1)
    assert images == (40 if path == "folder" else 1437)
    assert min(costs) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert not multiprocessing.active_children()
