"""The linear classifier on features."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.multiclass import OneVsRestClassifier

from vitral.data.sampling import divide
from vitral.errors import UserError
from vitral.training import probe
from vitral.training.folds import predict_folds
from vitral.training.frozen import Features
from vitral.training.probe import Problem, fit, out_of_fold, select, standardization

CLASSES, DIM = 4, 12


def make_features(count, views=1, noise=1.0, labels=None):
    """Returns Gaussian clusters around the center of each class, on scales from 0.01 to 100."""
    draw = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES, DIM, generator=draw)
    images = torch.arange(count).repeat(views)
    if labels is None:
        labels = torch.arange(count) % CLASSES
    drawn = noise * torch.randn(count * views, DIM, generator=draw)
    vectors = (centers[labels[images]] + drawn) * torch.logspace(-2, 2, DIM)
    return Features(vectors, labels[images], images, {})


def test_the_fit_equals_scikit_learn():
    features = make_features(300)
    found = fit(features, CLASSES, seed=0)
    mean, deviation = (part.numpy() for part in standardization(features.vectors))
    vectors = features.vectors.double().numpy()
    expected = LogisticRegression(C=1 / (300 * found.strength), tol=1e-8, max_iter=10_000)
    expected.fit((vectors - mean) / deviation, features.labels)
    # The loss does not change when the same number is added to the logits of all classes.
    logits = vectors @ found.weight.double().numpy().T + found.bias.double().numpy()
    wanted = expected.decision_function((vectors - mean) / deviation)
    difference = (logits - logits.mean(1)[:, None]) - (wanted - wanted.mean(1)[:, None])
    assert np.abs(difference).max() < 2e-3 * np.abs(wanted).max()


def test_the_gradient_equals_autograd(monkeypatch):
    monkeypatch.setattr(probe, "LOGITS_PER_BATCH", 10 * CLASSES)  # ten rows at a time
    vectors, labels = torch.randn(37, DIM).double(), torch.randint(CLASSES, (37,))
    head = torch.randn(CLASSES, DIM + 1, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(vectors @ head[:, :-1].T + head[:, -1], labels)
    (gradient,) = torch.autograd.grad(expected, head)
    loss, found = Problem(vectors, labels, CLASSES).loss(head.detach())
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(found, gradient)


def test_the_strength_with_the_best_held_out_score_is_selected(monkeypatch):
    monkeypatch.setattr(probe, "PATIENCE", len(probe.STRENGTHS))
    monkeypatch.setattr(probe, "SELECTION_TOLERANCE", 1e-7)
    features = make_features(120, noise=3.0)
    mean, deviation = standardization(features.vectors)
    vectors = (features.vectors.double() - mean) / deviation
    parts = [torch.arange(120) % 3 == k for k in range(3)]
    strength, accuracy, _ = select(
        [
            tuple(Problem(vectors[p], features.labels[p], CLASSES) for p in (~part, part))
            for part in parts
        ]
    )
    scores = {}
    for tried in probe.STRENGTHS:
        model = LogisticRegression(C=1 / (80 * tried), tol=1e-8, max_iter=10_000)
        found = [
            model.fit(vectors[~part], features.labels[~part]).score(
                vectors[part], features.labels[part]
            )
            for part in parts
        ]
        scores[tried] = np.mean(found)
    assert accuracy == pytest.approx(scores[strength])
    assert strength == max(s for s in scores if scores[s] == pytest.approx(max(scores.values())))


def test_the_views_of_an_image_are_held_out_together():
    """Random labels cannot be predicted, unless another view of the same image was fitted."""
    labels = torch.randint(CLASSES, (200,), generator=torch.Generator().manual_seed(1))
    one = make_features(200, labels=torch.zeros(200, dtype=torch.long))
    twice = Features(
        torch.cat([one.vectors, one.vectors]), labels.repeat(2), one.images.repeat(2), {}
    )
    assert fit(twice, CLASSES, seed=0).held_out < 0.6


def test_groups_are_held_out_together(monkeypatch):
    """Labels of unrelated groups cannot be predicted, unless an image of the group was fitted."""
    monkeypatch.setattr(probe, "STRENGTHS", (1e-3,))
    groups = np.repeat(np.arange(20), 6)
    one = make_features(20, labels=torch.zeros(20, dtype=torch.long))
    labels = torch.from_numpy(groups % CLASSES)
    copies = Features(one.vectors.repeat_interleave(6, 0), labels, torch.arange(120), {})
    assert fit(copies, CLASSES, seed=0).held_out > 0.9
    assert fit(copies, CLASSES, seed=0, groups=groups).held_out < 0.5
    correct, *_ = predict_folds(copies, CLASSES, 3, 0, [*"abcd"])
    assert correct.mean() > 0.8
    correct, _, fold = predict_folds(copies, CLASSES, 3, 0, [*"abcd"], groups=groups)
    assert correct.mean() < 0.5
    assert (fold.reshape(20, 6) == fold[::6, None]).all()
    with pytest.raises(UserError, match="folds: expected images of each class in each fold, got"):
        predict_folds(copies, CLASSES, 3, 0, [*"abcd"], groups=labels.numpy())


@pytest.mark.parametrize("held_out_folds", [5, 1])
def test_out_of_fold_predictions_equal_scikit_learn(monkeypatch, held_out_folds):
    monkeypatch.setattr(probe, "SELECTION_TOLERANCE", 1e-7)
    monkeypatch.setattr(probe, "MAX_CROSS_VALIDATED", 200 if held_out_folds == 5 else 100)
    features = make_features(150, views=2, noise=2.0)
    groups = np.arange(150) // 3
    images, probabilities = out_of_fold(features, CLASSES, seed=0, groups=groups)
    assert images.tolist() == [*range(150)]
    found = fit(features, CLASSES, seed=0, groups=groups)
    fold = divide(images, features.labels.numpy()[:150], 5, 0, "probe", groups)
    mean, deviation = standardization(features.vectors)
    vectors = ((features.vectors.double() - mean) / deviation).numpy()
    for k in range(5):
        rows = fold[features.images] != k
        model = LogisticRegression(C=1 / (rows.sum() * found.strength), tol=1e-9, max_iter=10_000)
        model.fit(vectors[rows], features.labels[rows])
        expected = model.predict_proba(vectors[:150][fold == k])
        assert np.abs(probabilities[fold == k] - expected).max() < 1e-3


def test_an_image_whose_label_is_in_no_other_fold_is_not_predicted():
    features = make_features(41, labels=torch.tensor([0, 1] * 20 + [2]))
    _, probabilities = out_of_fold(features, 3, seed=0)
    assert np.isnan(probabilities).all(1).tolist() == [False] * 40 + [True]
    _, probabilities = out_of_fold(features, 3, seed=0, groups=np.zeros(41, np.int64))
    assert np.isnan(probabilities).all()


def test_a_constant_feature_and_a_class_with_one_image_give_finite_weights():
    features = make_features(41, labels=torch.tensor([0, 1] * 20 + [2]))
    features.vectors[:, 3] = 7.0
    found = fit(features, 3, seed=0)
    assert all(part.isfinite().all() for part in (found.weight, found.bias))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_one_or_two_images_per_class_are_fitted(count):
    features = make_features(count, labels=torch.tensor([0, 1, 0, 1][:count]))
    found = fit(features, 2, seed=0)
    assert found.predict(features.vectors).tolist() == features.labels.tolist()


def test_check_is_called_before_each_evaluation():
    class StopError(Exception):
        pass

    def stop():
        raise StopError

    with pytest.raises(StopError):
        fit(make_features(40), CLASSES, seed=0, check=stop)


def several_labels(count, noise=1.0):
    """Returns features of images with any number of labels, each adding the center of its class."""
    draw = torch.Generator().manual_seed(1)
    labels = (
        torch.rand(count, CLASSES, generator=draw) < torch.tensor([0.5, 0.3, 0.2, 0.1])
    ).byte()
    centers = 2 * torch.randn(CLASSES, DIM, generator=draw)
    vectors = labels.float() @ centers + noise * torch.randn(count, DIM, generator=draw)
    return Features(vectors * torch.logspace(-2, 2, DIM), labels, torch.arange(count), {})


def test_several_labels_equal_one_versus_rest_in_scikit_learn():
    features = several_labels(300)
    found = fit(features, CLASSES, seed=0)
    mean, deviation = (part.numpy() for part in standardization(features.vectors))
    vectors = (features.vectors.double().numpy() - mean) / deviation
    one = LogisticRegression(C=1 / (300 * found.strength), tol=1e-8, max_iter=10_000)
    expected = OneVsRestClassifier(one).fit(vectors, features.labels.numpy())
    wanted = expected.decision_function(vectors)
    logits = (features.vectors @ found.weight.T + found.bias).numpy()
    assert np.abs(logits - wanted).max() < 2e-3 * np.abs(wanted).max()
    assert 0.8 < found.held_out < 1


def test_the_gradient_for_several_labels_equals_autograd(monkeypatch):
    monkeypatch.setattr(probe, "LOGITS_PER_BATCH", 10 * CLASSES)
    vectors, labels = torch.randn(37, DIM).double(), torch.randint(2, (37, CLASSES)).byte()
    head = torch.randn(CLASSES, DIM + 1, dtype=torch.float64, requires_grad=True)
    logits = vectors @ head[:, :-1].T + head[:, -1]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, labels.double(), reduction="sum"
    )
    (gradient,) = torch.autograd.grad(expected / 37, head)
    loss, found = Problem(vectors, labels, CLASSES).loss(head.detach())
    torch.testing.assert_close(loss, (expected / 37).detach())
    torch.testing.assert_close(found, gradient)


def test_several_labels_are_scored_by_mean_average_precision():
    features = several_labels(60, noise=4.0)
    heads = [torch.randn(CLASSES, DIM + 1, dtype=torch.float64) for _ in range(2)]
    parts = [torch.arange(60) % 2 == k for k in range(2)]
    held = [Problem(features.vectors[part], features.labels[part], CLASSES) for part in parts]
    logits = torch.cat(
        [p.vectors.double() @ h[:, :-1].T + h[:, -1] for p, h in zip(held, heads, strict=True)]
    )
    labels = torch.cat([problem.labels for problem in held])
    expected = average_precision_score(labels, logits, average="macro")
    assert probe.held_out_score(held, heads) == pytest.approx(expected, abs=1e-6)
