"""Sample order and random numbers: purity, exact counts, independence of batch boundaries."""

import numpy as np
import pytest

from vitral.data.sampling import (
    Order,
    Repetition,
    derive_seed,
    divide,
    hash64,
    permutation,
    quotas,
    uniforms,
)

INDICES = np.arange(20_000)


def test_permutations_are_valid_and_pure():
    orders = [(seed, epoch, permutation(seed, epoch, 997)) for seed in (0, 1) for epoch in (0, 1)]
    for seed, epoch, order in orders:
        assert sorted(order) == list(range(997))
        assert not order.flags.writeable  # it is cached
        permutation.cache_clear()
        assert np.array_equal(permutation(seed, epoch, 997), order)
        # by chance, two permutations agree at about one position
        assert all((order == other).sum() < 10 for *_, other in orders if other is not order)
    assert permutation(0, 0, 1).tolist() == [0]


def test_every_position_is_equally_likely():
    counts = np.zeros((5, 5))
    for epoch in range(5000):
        counts[np.arange(5), permutation(3, epoch, 5)] += 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-squared, p = 1/7,000


def test_uniforms_are_uniform_and_uncorrelated():
    values = uniforms(7, 3, INDICES, 6)
    assert values.shape == (20_000, 6)
    assert values.dtype == np.float64
    assert values.min() >= 0
    assert values.max() < 1
    for k in (1, 2, 3, 4):  # five standard errors
        std = (1 / (2 * k + 1) - 1 / (k + 1) ** 2) ** 0.5
        assert np.abs((values**k).mean(0) - 1 / (k + 1)).max() < 5 * std / len(values) ** 0.5
    neighbors = [values, np.roll(values, 1, axis=0), uniforms(7, 4, INDICES, 6)]
    neighbors += [uniforms(8, 3, INDICES, 6), uniforms(7, 3, INDICES, 6, "other")]
    correlation = np.corrcoef(np.hstack(neighbors), rowvar=False) - np.eye(30)
    assert np.abs(correlation).max() < 5 / len(values) ** 0.5
    bins = np.stack([np.histogram(column, 64, (0, 1))[0] for column in values.T])
    assert ((bins - 312.5) ** 2 / 312.5).sum(1).max() < 130  # 63 degrees of freedom


def test_uniforms_are_a_pure_function_of_sample_and_column():
    values = uniforms(7, 3, INDICES[:50], 6, "crop")
    assert np.array_equal(uniforms(7, 3, INDICES[:50], 2, "crop"), values[:, :2])
    assert uniforms(7, 3, INDICES[:50], 0, "crop").shape == (50, 0)
    shuffled = np.random.default_rng(0).permutation(50)
    assert np.array_equal(uniforms(7, 3, shuffled, 6, "crop"), values[shuffled])
    assert np.array_equal(uniforms(7, 3, np.array([11, 11]), 6, "crop"), values[[11, 11]])
    assert uniforms(7, 3, INDICES[:0], 6).shape == (0, 6)


def test_one_epoch_per_sample_equals_one_epoch_per_call():
    epochs = np.arange(50) % 3
    values = uniforms(7, epochs, INDICES[:50], 4)
    for epoch in range(3):
        here = epochs == epoch
        assert np.array_equal(values[here], uniforms(7, epoch, INDICES[:50][here], 4))


def test_hash_is_splitmix64():
    assert int(hash64(0)) == 0xE220A8397B1DCDAF  # its first two outputs for seed 0, as published
    assert int(hash64(0x9E3779B97F4A7C15)) == 0x6E789E6AA1B965F4


def test_hash_depends_on_every_word_and_its_position():
    calls = [(), (0,), (0, 0), (1,), (0, 1), (1, 0), (-1,), (2**63,), (1, 2, 3), (3, 2, 1)]
    assert len({int(hash64(*words)) for words in calls}) == len(calls)
    bits = np.unpackbits(
        (hash64(1, INDICES) ^ hash64(1, INDICES ^ 1)).view(np.uint8).reshape(-1, 8), axis=1
    )
    assert bits.mean() == pytest.approx(0.5, abs=0.005)  # one input bit flips half of these
    assert np.array_equal(hash64(1, INDICES)[5:7], hash64(1, INDICES[5:7]))


def test_derived_seeds_are_valid_and_distinct():
    seeds = [derive_seed(p, *w) for p in ("mix", "drop") for w in ((0,), (1,), (0, 1), (1, 0))]
    assert len(set(seeds)) == 8
    assert all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds)
    assert derive_seed("mix", 0, 1) == seeds[2]


@pytest.mark.parametrize(
    ("size", "batch_size", "repeats"),
    [(10, 4, 1), (12, 4, 1), (7, 6, 1), (3, 8, 1), (1, 4, 1), (10, 8, 2), (5, 12, 3), (3, 16, 2)],
)
def test_every_epoch_contains_every_sample_once(size, batch_size, repeats):
    order = Order(5, size, batch_size, repeats)
    distinct = batch_size // repeats
    stream = []
    for step in range(4 * size):
        epochs, indices = order.samples(step, 0, batch_size)
        copies = indices.reshape(repeats, distinct)
        assert (copies == copies[0]).all()
        drawn_for = epochs.reshape(repeats, distinct)
        assert (drawn_for // repeats == drawn_for[0] // repeats).all()
        assert (drawn_for % repeats == np.arange(repeats)[:, None]).all()
        stream += zip(drawn_for[0] // repeats, copies[0], strict=True)
        for cut in (1, batch_size // 2):
            parts = [order.samples(step, a, a + cut) for a in range(0, batch_size, cut)]
            full = [np.concatenate(part) for part in zip(*parts, strict=True)]
            assert np.array_equal(full, [epochs, indices])
    for epoch in range(4 * distinct):
        members = stream[epoch * size : (epoch + 1) * size]
        expected = permutation(5, epoch, size)
        assert members == [(epoch, index) for index in expected]


@pytest.mark.parametrize(("batch_size", "repeats"), [(8, 1), (8, 2), (12, 3), (16, 4), (8, 4)])
def test_partners_are_different_images(batch_size, repeats):
    order = Order(0, 48, batch_size, repeats)  # an epoch contains complete batches
    for step in range(48 * repeats // batch_size):
        _, indices = order.samples(step, 0, batch_size)
        assert (indices != indices[np.arange(batch_size) ^ 1]).all()
        assert np.unique(indices, return_counts=True)[1].tolist() == [repeats] * (
            batch_size // repeats
        )


@pytest.mark.parametrize(
    ("size", "batch_size", "repeats", "ends"),
    [
        (10, 4, 1, [0, 3, 5, 8, 10]),
        (12, 4, 1, [0, 3, 6, 9, 12]),
        (3, 8, 1, [0, 1, 1, 2, 2]),
        (10, 8, 2, [0, 2, 3, 4, 5]),
    ],
)
def test_end_of_epoch_by_hand(size, batch_size, repeats, ends):
    order = Order(0, size, batch_size, repeats)
    assert [order.end_of_epoch(epoch) for epoch in range(5)] == ends


LABELS = np.repeat([0, 1, 3], [40, 9, 4])[np.random.default_rng(0).permutation(53)]  # 2 is empty
QUOTAS = {"balanced": [53 / 3] * 3, "sqrt": [53 * root / (40**0.5 + 5) for root in (40**0.5, 3, 2)]}


def epoch_of(order, epoch, size):
    """Returns the epochs to draw for and the indices of the samples of an epoch in batches of 1."""
    pairs = [order.samples(step, 0, 1) for step in range(epoch * size, (epoch + 1) * size)]
    return (np.concatenate(part) for part in zip(*pairs, strict=True))


@pytest.mark.parametrize("sampling", QUOTAS)
def test_images_are_repeated_by_the_quota_of_their_class(sampling):
    order = Order(5, 53, 1, 1, Repetition.of(LABELS, sampling))
    totals, drawn_for = np.zeros((200, 53)), []
    for epoch in range(200):
        drawn, indices = epoch_of(order, epoch, 53)
        drawn_for.append(set(zip(drawn.tolist(), indices.tolist(), strict=True)))
        assert len(drawn_for[-1]) == 53  # copies of an image are drawn for different epochs
        totals[epoch] = np.bincount(indices, minlength=53)
    assert len(set.union(*drawn_for)) == 200 * 53
    for label, quota in zip((0, 1, 3), QUOTAS[sampling], strict=True):
        times = totals[:, label == LABELS]
        classes = times.sum(1)
        assert set(classes) == {np.floor(quota), np.ceil(quota)}
        assert classes.mean() == pytest.approx(quota, abs=0.15)  # four standard errors
        assert (times.max(1) - times.min(1) <= 1).all()
        # Every image is equally likely to occur once more.
        assert np.abs(times.mean(0) - quota / len(times[0])).max() < 4 * 0.5 / 200**0.5


def test_repetition_is_pure_and_independent_of_batches():
    for repeats in (1, 2):
        orders = [Order(5, 53, 12, repeats, Repetition.of(LABELS, "balanced")) for _ in range(2)]
        for step in (0, 3, 70, 4):
            whole = np.array(orders[0].samples(step, 0, 12))
            parts = [orders[1].samples(step, start, start + 4) for start in (8, 0, 4)]
            assert np.array_equal(np.hstack([parts[1], parts[2], parts[0]]), whole)
        distinct = 12 // repeats
        drawn, indices = orders[0].samples(9, 0, 12)
        for copy in range(1, repeats):
            assert np.array_equal(indices[:distinct], indices[copy * distinct :])
            assert np.array_equal(drawn[:distinct] + copy, drawn[copy * distinct :])


def test_repetition_of_equal_classes_changes_nothing():
    labels = np.arange(60) % 6
    for sampling in ("balanced", "sqrt"):
        plain, repeated = Order(3, 60, 8), Order(3, 60, 8, 1, Repetition.of(labels, sampling))
        for step in range(30):
            assert np.array_equal(plain.samples(step, 0, 8), repeated.samples(step, 0, 8))


def test_quotas_by_hand():
    counts = np.array([16, 0, 4, 1])
    assert quotas(counts, "uniform").tolist() == [16, 0, 4, 1]
    assert quotas(counts, "balanced").tolist() == [7, 0, 7, 7]
    assert quotas(counts, "sqrt").tolist() == [12, 0, 6, 3]


@pytest.mark.parametrize("count", [2, 5])
def test_folds_divide_classes_evenly_but_not_groups(count):
    rng = np.random.default_rng(count)
    labels = np.repeat([0, 1, 2], [300, 100, 60])
    groups = labels * 1000 + rng.integers(0, 40, len(labels))
    groups[::20] = 7  # a group with all classes
    keys = np.arange(len(labels))
    fold = divide(keys, labels, count, 3, "test", groups)
    assert all(len({*fold[groups == group].tolist()}) == 1 for group in np.unique(groups))
    largest = np.bincount(np.unique(groups, return_inverse=True)[1]).max()
    for label in range(3):
        sizes = np.bincount(fold[labels == label], minlength=count)
        assert sizes.max() - sizes.min() <= largest
        assert sizes.min() > 0
    backwards = divide(keys[::-1], labels[::-1], count, 3, "test", groups[::-1])
    assert np.array_equal(backwards[::-1], fold)
    assert not np.array_equal(divide(keys, labels, count, 4, "test", groups), fold)


def test_groups_are_divided_largest_first():
    # 5 to fold 0, 4 to fold 1, 3 to fold 1, 3 to fold 0 and 1 to fold 1.
    groups = np.repeat([10, 11, 12, 13, 14], [5, 4, 3, 3, 1])
    fold = divide(np.arange(16), np.zeros(16, np.int64), 2, 0, "test", groups)
    assert np.bincount(fold).tolist() == [8, 8]
    of_group = {int(group): int(fold[groups == group][0]) for group in np.unique(groups)}
    assert of_group[10] == 0
    assert of_group[11] == of_group[14] == 1
    assert of_group[12] != of_group[13]


def test_folds_without_groups_have_equal_sizes():
    labels = np.repeat([0, 2], [40, 21])
    fold = divide(np.arange(61), labels, 4, 0, "test")
    assert np.bincount(fold[labels == 0]).tolist() == [10] * 4
    assert sorted(np.bincount(fold[labels == 2])) == [5, 5, 5, 6]
