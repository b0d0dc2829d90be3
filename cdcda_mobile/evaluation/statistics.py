"""Is a difference between two arms more than chance? The user is the unit, and every user is measured in both arms.

Records of one user resemble one another, and seeds repeat the same user: both are averaged within the user first. Intervals are BCa
bootstraps over users (Efron 1987), p-values come from flipping the signs of users' differences, families are corrected after Holm (1979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from cdcda_export.errors import ConfigError, DataError

_EXACT_USERS = 16  # 65,536 sign patterns
_AT_A_TIME = 4096  # resamples held in memory
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Estimate:
    """A mean over users with its interval; the bounds are None where one user alone gives none."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """The mean over users of arm A minus arm B.

    Attributes:
        mean: in the unit of the metric.
        low: lower bound of the interval, None for a single user.
        high: upper bound.
        p: two-sided, of the hypothesis that the arms may be exchanged within every user.
        n: how many users.
        effect: mean divided by the standard deviation of users' differences (Cohen's d_z), None where nothing varies.
        p_holm: ``p`` corrected for its family, where it has one.
    """

    mean: float
    low: float | None
    high: float | None
    p: float
    n: int
    effect: float | None = None
    p_holm: float | None = None


def user_means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return each user's mean over what was measured of them, such as seeds.

    Raises:
        DataError: a user has no value, or one that is no finite number.
    """
    bad = [user for user, found in values.items() if not len(found) or not all(map(math.isfinite, found))]
    if bad:
        raise DataError(f"User {bad[0]} has no finite value to compare; measure this user again.")
    return {user: math.fsum(found) / len(found) for user, found in values.items()}


def estimate(values: Mapping[str, Sequence[float]], seed: int = 0, level: float = 0.95, resamples: int = 10_000) -> Estimate:
    """Return the mean over users of one arm.

    Args:
        values: user -> one value per seed.
        seed: of the bootstrap.
        level: of the interval.
        resamples: of the bootstrap.

    Raises:
        DataError: there are no users, or one of them has no finite value.
    """
    means = _array(list(user_means(values).values()))
    low, high = bootstrap_interval(means, seed, level, resamples)
    return Estimate(float(means.mean()), low, high, len(means))


def compare(
    a: Mapping[str, Sequence[float]],
    b: Mapping[str, Sequence[float]],
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 10_000,
) -> Difference:
    """Return the mean over users of A minus B with its interval and p-value.

    Args:
        a: user -> one value per seed; the arms may have different seeds.
        b: the same users.
        seed: of the bootstrap and of the drawn sign patterns.
        level: of the interval.
        resamples: of the bootstrap, and sign patterns drawn where there are too many users to try all.

    Raises:
        DataError: the arms do not hold the same users, or a user has no finite value.
    """
    if a.keys() != b.keys():
        raise DataError(f"User {min(a.keys() ^ b.keys())} was measured in one arm only; comparisons are of the same users in both.")
    first, second = user_means(a), user_means(b)
    differences = _array([first[user] - second[user] for user in sorted(first)])
    low, high = bootstrap_interval(differences, seed, level, resamples)
    p = sign_flip_p(differences, seed, resamples)
    return Difference(float(differences.mean()), low, high, p, len(differences), _effect(differences))


def _array(values: Sequence[float]) -> np.ndarray:
    if not len(values):
        raise DataError("There are no users to compare.")
    return np.asarray(values, dtype=np.float64)


def _effect(differences: np.ndarray) -> float | None:
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    return float(differences.mean()) / spread if spread > 1e-12 else None


def bootstrap_interval(
    values: np.ndarray, seed: int = 0, level: float = 0.95, resamples: int = 10_000
) -> tuple[float, float] | tuple[None, None]:
    """Return the BCa bootstrap interval of a mean, (None, None) for fewer than two values.

    Args:
        values: one per user.
        seed: of the resampling.
        level: between 0 and 1.
        resamples: how many.

    Raises:
        ConfigError: the level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ConfigError(f"The level of an interval lies between 0 and 1, not at {level}.")
    n = len(values)
    if n < 2:
        return None, None
    chance = np.random.default_rng(seed)
    sizes = [min(_AT_A_TIME, resamples - at) for at in range(0, resamples, _AT_A_TIME)]
    means = np.concatenate([values[chance.integers(0, n, (size, n))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, _bca(values, means, [(1 - level) / 2, (1 + level) / 2]))
    return float(low), float(high)


def _bca(values: np.ndarray, means: np.ndarray, tails: Sequence[float]) -> list[float]:
    """Return the corrected quantiles: Efron (1987), with the acceleration of a mean from its jackknife."""
    centre = values.mean()
    # Means that equal the observed one count half, else the correction of few users would lean to one side.
    below = float(np.mean(means < centre) + 0.5 * np.mean(means == centre))
    if not 0 < below < 1 or np.ptp(values) == 0:
        return list(tails)
    bias = _NORMAL.inv_cdf(below)
    spread = values - centre
    acceleration = float((spread**3).sum() / (6 * (spread**2).sum() ** 1.5))
    corrected = []
    for tail in tails:
        z = bias + _NORMAL.inv_cdf(tail)
        corrected.append(_NORMAL.cdf(bias + z / (1 - acceleration * z)))
    return corrected


def sign_flip_p(differences: np.ndarray, seed: int = 0, draws: int = 10_000) -> float:
    """Return the two-sided p-value: how often random signs give a sum as far from zero as the one that was seen.

    All sign patterns are tried for up to 16 users; beyond, ``draws`` patterns are drawn and the seen one is counted among them.
    """
    n, seen = len(differences), abs(float(differences.sum()))
    limit = seen - 1e-9 * float(np.abs(differences).sum())  # sums that are equal but for rounding count
    if n <= _EXACT_USERS:
        signs = 1.0 - 2.0 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
        return float(np.mean(np.abs(signs @ differences) >= limit))
    chance, hits = np.random.default_rng(seed), 1
    for at in range(0, draws, _AT_A_TIME):
        signs = chance.choice([-1.0, 1.0], (min(_AT_A_TIME, draws - at), n))
        hits += int(np.sum(np.abs(signs @ differences) >= limit))
    return hits / (draws + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected after Holm (1979), in the order given: the chance of any false claim in the family stays below them."""
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        corrected[at] = largest
    return corrected
