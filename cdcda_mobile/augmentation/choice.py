"""Which of the candidates are kept: of every group its share, in it those most like the user, and among them those that differ most."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from cdcda_mobile.augmentation.textual import farthest_first, grams

LESS_ALIKE = "less like the user than others"
LESS_DIVERSE = "too close to one that is kept"


@dataclass(frozen=True)
class Choice:
    """The places of the kept candidates, in order, and the reason for each of the others."""

    kept: tuple[int, ...]
    reasons: dict[int, str]


def choose(texts: Sequence[str], groups: Sequence[Hashable], keep: int, likeness: Sequence[float] | None, alike: float) -> Choice:
    """Choose from candidates.

    Every group (task, strategy, label) keeps its share of the candidates. In it, likeness leaves the best part; of these the likest is
    kept first, and then always the one that is farthest from those that are kept.

    Args:
        texts: input and output of each candidate.
        groups: the group of each.
        keep: how many to keep.
        likeness: of each candidate, higher is more like the user; None where it was not measured.
        alike: the part of a group that likeness leaves, at least as many as are kept.
    """
    kept: list[int] = []
    reasons: dict[int, str] = {}
    quotas = shares(Counter(groups), keep)
    for group, quota in quotas.items():
        members = [index for index, name in enumerate(groups) if name == group]
        left = members
        if likeness is not None:
            ranked = sorted(members, key=lambda index: (-likeness[index], index))
            left = ranked[: max(quota, math.ceil(alike * len(members)))]
            reasons |= dict.fromkeys(set(members) - set(left), LESS_ALIKE)
        chosen = [left[place] for place in farthest_first([grams(texts[index]) for index in left], quota)]
        reasons |= dict.fromkeys(set(left) - set(chosen), LESS_DIVERSE)
        kept += chosen
    return Choice(tuple(sorted(kept)), reasons)


def shares(sizes: Counter[Hashable], total: int) -> dict[Hashable, int]:
    """Divide a total among groups in proportion to their sizes, by largest remainders; nobody gets more than they have."""
    everything = sizes.total()
    total = min(total, everything)
    exact = {name: total * size / everything for name, size in sizes.items()}
    given = {name: math.floor(value) for name, value in exact.items()}
    behind = sorted(exact, key=lambda name: given[name] - exact[name])
    for name in behind[: total - sum(given.values())]:
        given[name] += 1
    return given
