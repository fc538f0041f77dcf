"""Weights and adjusted logits for rare classes, against formulas and scikit-learn."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from vitral import settings
from vitral.errors import UserError
from vitral.training.balance import Balance
from vitral.training.frozen import Features
from vitral.training.optim import loss_sum
from vitral.training.probe import Problem, fit, select, standardization

LABELS = np.repeat([0, 1, 2], [6, 3, 1])
CLASSES = ("cat", "dog", "eel")


def balance(*words, labels=LABELS, classes=CLASSES, **options):
    return Balance.of(settings.load("digits", words), classes, labels, **options)


def test_without_settings_nothing_changes():
    assert vars(balance()) == vars(balance(each_once=True)) == {"weights": None, "shift": None}
    assert balance().importance is None


def test_weights_by_hand():
    found = balance("--train.class-weights", "balanced")
    assert found.weights.tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    found = balance("--train.class-weights", "effective").weights
    numbers = [sum(0.999**i for i in range(n)) for n in (6, 3, 1)]  # Cui et al. 2019, proposition 1
    assert (found / found[2]).tolist() == pytest.approx([1 / number for number in numbers])
    assert found[LABELS].mean().item() == pytest.approx(1)
    for sampling, quotas in (("balanced", [1, 1, 1]), ("sqrt", [6**0.5, 3**0.5, 1])):
        words = ("--data.sampling", sampling)
        assert balance(*words).weights is None
        once = balance(*words, each_once=True).weights
        expected = np.divide(quotas, [6, 3, 1]) * 10 / sum(quotas)
        assert once.tolist() == pytest.approx(expected.tolist())


def test_a_class_without_images_counts_as_one():
    labels = np.repeat([0, 2], [3, 1])
    found = balance("--train.class-weights", "balanced", labels=labels).weights
    assert found.tolist() == pytest.approx([2 / 3, 2, 2])
    shift = balance("--train.logit-adjustment", "1", labels=labels).shift
    assert shift.tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 4), math.log(1 / 4)])


def test_importance_gives_balanced_accuracy():
    predicted = np.array([0, 0, 0, 1, 2, 0, 1, 1, 0, 2])
    for words in (("--train.class-weights", "balanced"), ("--train.logit-adjustment", "1")):
        importance = balance(*words).importance.numpy()[LABELS]
        weighted = np.average(predicted == LABELS, weights=importance)
        assert weighted == pytest.approx(balanced_accuracy_score(LABELS, predicted))


@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_the_weighted_loss_equals_the_formula(kind):
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 3, generator=draw, dtype=torch.float64)
    hard = F.one_hot(torch.tensor([0, 1, 2]), 3)
    mixed = torch.rand(3, 3, generator=draw).softmax(1)
    targets = torch.cat([hard, mixed]).double()
    changes = balance("--train.class-weights", "balanced")
    expected = 0.0
    for x, t in zip(logits, targets, strict=True):
        if kind == "ce":
            loss = -(t * x.log_softmax(0)).sum()
        else:
            loss = -(t * F.logsigmoid(x) + (1 - t) * F.logsigmoid(-x)).mean()
        expected += loss * (10 / 18 * t[0] + 10 / 9 * t[1] + 10 / 3 * t[2])
    found = loss_sum(logits, targets.float(), kind, changes.to("cpu", torch.float32))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_adjusted_logits_equal_the_formula():
    """Menon et al. 2021, equation 10: the softmax over logits plus tau times the log prior."""
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, priors = torch.tensor([2, 0, 1, 2, 0]), torch.tensor([0.6, 0.3, 0.1]).double()
    changes = balance("--train.logit-adjustment", "1.5").to("cpu", torch.float32)
    scaled = logits.exp() * priors**1.5
    expected = -(scaled[torch.arange(5), labels] / scaled.sum(1)).log().sum()
    found = loss_sum(logits, F.one_hot(labels, 3).float(), "ce", changes)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def make_features():
    """Three overlapping clusters with 160, 40 and 20 vectors."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(torch.tensor([160, 40, 20]))
    centers = torch.randn(3, 5, generator=draw)
    vectors = centers[labels] + 1.5 * torch.randn(220, 5, generator=draw)
    return Features(vectors, labels, torch.arange(220), {})


@pytest.mark.parametrize(
    "words",
    [
        ("--data.sampling", "balanced"),
        ("--data.sampling", "sqrt"),
        ("--train.class-weights", "effective"),
        ("--train.logit-adjustment", "1"),
    ],
)
def test_the_probe_equals_scikit_learn(words):
    features = make_features()
    labels = features.labels.numpy()
    changes = balance(*words, labels=labels, each_once=True)
    found = fit(features, 3, seed=0, balance=changes)
    mean, deviation = (part.numpy() for part in standardization(features.vectors))
    vectors = (features.vectors.double().numpy() - mean) / deviation
    model = LogisticRegression(C=1 / (220 * found.strength), tol=1e-9, max_iter=10_000)
    model.fit(vectors, labels, None if changes.weights is None else changes.weights[labels])
    wanted = model.decision_function(vectors)
    if changes.shift is not None:
        # The bias has no penalty, so that a plain fit minus the shift is the adjusted fit.
        wanted = wanted - changes.shift.numpy()
    logits = features.vectors.double() @ found.weight.double().T + found.bias.double()
    difference = (logits - logits.mean(1)[:, None]).numpy() - (wanted - wanted.mean(1)[:, None])
    assert np.abs(difference).max() < 2e-3 * np.abs(wanted).max()
    plain = fit(features, 3, seed=0).predict(features.vectors)
    recalls = [
        balanced_accuracy_score(labels, predicted)
        for predicted in (found.predict(features.vectors), plain)
    ]
    assert recalls[0] > recalls[1]


def test_the_gradient_equals_autograd():
    vectors, labels = torch.randn(37, 4).double(), torch.randint(3, (37,))
    changes = Balance(torch.tensor([0.2, 1, 3]).double(), torch.tensor([-1, 0.5, 2]).double())
    head = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    logits = vectors @ head[:, :-1].T + head[:, -1] + changes.shift
    losses = F.cross_entropy(logits, labels, reduction="none")
    expected = (losses * changes.weights[labels]).mean()
    (gradient,) = torch.autograd.grad(expected, head)
    loss, found = Problem(vectors, labels, 3, balance=changes).loss(head.detach())
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(found, gradient)


def test_the_strength_is_selected_by_balanced_accuracy():
    features = make_features()
    changes = balance("--data.sampling", "balanced", labels=features.labels.numpy(), each_once=True)
    part = torch.arange(220) % 3 == 0
    problems = [
        Problem(features.vectors[rows].double(), features.labels[rows], 3, balance=changes)
        for rows in (~part, part)
    ]
    _, accuracy, (head,) = select([tuple(problems)])
    predicted = (features.vectors[part].double() @ head[:, :-1].T + head[:, -1]).argmax(1)
    recalls = [(predicted[features.labels[part] == c] == c).double().mean() for c in range(3)]
    shares = [(features.labels[part] == c).sum() / n for c, n in enumerate((160, 40, 20))]
    expected = np.average(recalls, weights=shares)  # a third of each class, up to rounding
    assert accuracy == pytest.approx(expected)


@pytest.mark.parametrize("name", ["w.yaml", "w.csv"])
def test_a_table_of_weights(tmp_path, name):
    text = {
        "w.yaml": "eel: 6\ncat: 1\ndog: 2.5\n",
        "w.csv": '\ufeffclass,weight\r\ncat, 1\r\n"eel",6\ndog,2.5\n\n',
    }
    (tmp_path / name).write_text(text[name], newline="")
    found = balance("--train.class-weights", str(tmp_path / name)).weights
    assert (found / found[0]).tolist() == pytest.approx([1, 2.5, 6])
    assert found[LABELS].mean().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("w.csv", "cat,1\ndog,2\n", "a weight for each class, got none for eel"),
        (
            "w.csv",
            "cat,1\ndogs,2\n",
            "row 2: expected the name of a class, got 'dogs'; did you mean dog",
        ),
        ("w.csv", "cat,1\ncat,2\n", "row 2: expected each class once, got cat twice"),
        ("w.csv", "cat,0\n", "row 1: expected a weight above 0, got '0'"),
        ("w.csv", "cat,nan\n", "row 1: expected a weight above 0"),
        ("w.csv", "cat,1,2\n", "row 1: expected two columns, class and weight, got 3"),
        ("w.csv", 'cat,"1\n', "cannot read"),
        ("w.yaml", "cat: much\n", "class 'cat': expected a weight above 0, got 'much'"),
        ("w.yaml", "1: 2\n", "class 1: expected the name of a class, got 1; quote it"),
        ("w.yaml", "- 1\n", "cannot read"),
        ("w.yaml", "cat: [\n", "not valid YAML"),
        ("w.yaml", "", "expected 'class: weight' lines"),
        ("gone.yaml", None, "No such file"),
    ],
)
def test_unusable_tables_are_rejected(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        balance("--train.class-weights", str(tmp_path / name))
    assert message in str(error.value)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)
