"""Paired comparisons, against libraries' values, worked-out cases and simulated truth."""

from __future__ import annotations

import numpy as np
import pytest

from cdcda_export.errors import ConfigError, DataError
from cdcda_mobile.evaluation.statistics import bootstrap_interval, compare, estimate, holm, sign_flip_p, user_means

SKEWED = np.array([0.1, 0.3, 0.2, 1.9, 0.05, 0.6, 0.15, 3.1, 0.4, 0.25, 0.02, 0.9])


# scipy 1.17.1: stats.bootstrap((x,), np.mean, n_resamples=400000); without the correction it has 0.2367 to 1.2250
def test_intervals_are_those_of_scipy() -> None:
    assert bootstrap_interval(SKEWED, seed=4, resamples=40_000) == pytest.approx((0.3017, 1.4350), abs=0.02)


def test_the_seed_decides() -> None:
    assert bootstrap_interval(SKEWED, seed=1) == bootstrap_interval(SKEWED, seed=1)
    assert bootstrap_interval(SKEWED, seed=1) != bootstrap_interval(SKEWED, seed=2)


def test_a_wider_level_gives_a_wider_interval_and_none_has_all() -> None:
    narrow, wide = bootstrap_interval(SKEWED, level=0.5), bootstrap_interval(SKEWED, level=0.99)
    assert None not in (*narrow, *wide)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]  # type: ignore[operator]
    with pytest.raises(ConfigError, match="between 0 and 1"):
        bootstrap_interval(SKEWED, level=95)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    chance = np.random.default_rng(7)
    hits = 0
    for trial in range(400):
        low, high = bootstrap_interval(chance.normal(0.3, 1.0, 30), seed=trial, resamples=1000)
        assert low is not None and high is not None
        hits += low <= 0.3 <= high
    assert 0.90 <= hits / 400 <= 0.975  # a normal interval with known variance would have 0.95 +- 0.011


def test_equal_differences_give_a_point_and_no_effect() -> None:
    found = compare({"a": [2.0], "b": [3.0], "c": [9.0]}, {"a": [1.5], "b": [2.5], "c": [8.5]})
    assert (found.mean, found.low, found.high, found.effect) == (0.5, 0.5, 0.5, None)
    assert found.p == 0.25  # all signs alike: 2 of 2^3 patterns


def test_one_user_has_no_interval_and_proves_nothing() -> None:
    found = compare({"a": [2.0]}, {"a": [1.0]})
    assert (found.mean, found.low, found.high, found.p, found.n) == (1.0, None, None, 1.0, 1)


# scipy 1.17.1: stats.permutation_test((d,), sum, permutation_type="samples", n_resamples=inf); the second by hand: of the 32 patterns
# of 1 2 3 4 5, those whose sums are 7 or more from zero are 14
@pytest.mark.parametrize(("values", "p"), [([0.4, -0.1, 0.3, 0.25, -0.05, 0.6, 0.2, 0.1], 0.046875), ([1, 2, 3, -4, 5], 0.4375)])
def test_all_sign_patterns_of_few_users(values: list[float], p: float) -> None:
    assert sign_flip_p(np.array(values, np.float64)) == p


def test_drawn_sign_patterns_of_many_users_are_close_to_all() -> None:
    values = np.random.default_rng(3).normal(0.5, 1.0, 16)
    every = sign_flip_p(values)
    more = np.append(values, 0.0)  # a zero changes no sum, but makes it too many users to try all
    assert sign_flip_p(more, seed=1, draws=20_000) == pytest.approx(every, abs=0.01)
    assert sign_flip_p(np.ones(40), draws=999) == 1 / 1000  # never zero


def test_p_is_uniform_where_nothing_differs() -> None:
    chance = np.random.default_rng(11)
    p = [sign_flip_p(chance.normal(0, 1, 8)) for _ in range(400)]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.03)


def test_holm() -> None:
    # statsmodels 0.15.0: multipletests(p, method="holm"); by hand 4 x .005, 3 x .01, 2 x .03, then never less than the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_seeds_count_within_their_user_only() -> None:
    one = {"a": [1.0, 3.0], "b": [5.0]}
    assert user_means(one) == {"a": 2.0, "b": 5.0}
    found = compare(one, {"a": [1.0], "b": [1.0, 2.0, 3.0]})
    assert found.mean == pytest.approx(((2 - 1) + (5 - 2)) / 2)
    assert found.n == 2
    assert found.effect == pytest.approx(2 / np.std([1, 3], ddof=1))
    assert estimate(one).mean == 3.5


def test_only_the_same_users_are_compared() -> None:
    with pytest.raises(DataError, match="User b was measured in one arm only"):
        compare({"a": [1.0], "b": [1.0]}, {"a": [1.0]})
    with pytest.raises(DataError, match="User a has no finite value"):
        compare({"a": [float("nan")]}, {"a": [1.0]})
    with pytest.raises(DataError, match="no users"):
        compare({}, {})
