"""The steps of a run and its learning rates, against values computed by hand."""

import math

import pytest

from vitral.config import Config, OptimConfig, TrainConfig
from vitral.training.plan import Plan, Schedule

# cos(k pi / 6) for k = 1 to 5, on a scale of 0 to 1
FALL = [(2 + 3**0.5) / 4, 3 / 4, 1 / 2, 1 / 4, (2 - 3**0.5) / 4]


@pytest.mark.parametrize(
    ("optim", "warmup", "expected"),
    [
        ({"lr": 1.0}, 2, [1 / 2, 1, *FALL]),
        ({"lr": 8.0}, 4, [2, 4, 6, 8, *[8 * value for value in FALL]]),
        ({"lr": 1.0}, 0, FALL),
        ({"lr": 0.5}, 1, [0.5, *[value / 2 for value in FALL]]),
        ({"lr": 2.0, "final_lr": 0.1}, 2, [1, 2, *[0.2 + 1.8 * value for value in FALL]]),
        ({"lr": 2.0, "final_lr": 1.0}, 0, [2] * 5),
    ],
)
def test_schedule_by_hand(optim, warmup, expected):
    schedule = Schedule(OptimConfig(**optim), warmup, total=warmup + 5)
    assert [schedule.lr(step) for step in range(warmup + 5)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("final_lr", [0.0, 0.2])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 2), (5, 6), (10, 100), (0, 1000)])
def test_schedule_starts_and_ends_as_specified_without_jumps(warmup, total, final_lr):
    schedule = Schedule(OptimConfig(lr=3.0, final_lr=final_lr), warmup, total)
    rates = [schedule.lr(step) for step in range(total)]
    assert min(rates) > 0
    assert max(rates) <= 3
    assert not warmup or max(rates) == rates[warmup - 1] == 3
    assert rates == sorted(rates[:warmup]) + sorted(rates[warmup:], reverse=True)
    assert 3 * final_lr < rates[-1]
    assert schedule.lr(total) == pytest.approx(3 * final_lr, abs=1e-12)
    falls = [a - b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False)]
    assert all(fall <= 3 * math.pi / 2 / (total + 1 - warmup) for fall in falls)


def test_steps_of_a_run_by_hand():
    """25 images in batches of 4: an epoch ends within step 7, two within 13, three within 19."""
    train = TrainConfig(epochs=3, batch_size=4, eval_every=2)
    plan = Plan.of(Config(train=train, optim=OptimConfig(warmup_epochs=1)), 25)
    assert (plan.steps_per_epoch, plan.total) == (6.25, 19)
    assert plan.evaluations == {13, 19}
    assert plan.schedule.warmup == 6
