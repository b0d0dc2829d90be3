"""How alike two texts are, and whether a text is one at all."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from cdcda_export.errors import MissingDependency

_WORD = re.compile(r"\w+")
_STUTTER = re.compile(r"(.{1,40}?)\1{4,}", re.DOTALL)
_GRAM = 3
_LOOP_REPEATS = 3


def normalized(text: str) -> str:
    """Return the words of a text without case and punctuation, between single spaces."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def words(text: str) -> int:
    """Count the words of a text; a script without spaces counts its characters in pairs."""
    found = _WORD.findall(text)
    return sum(1 if word.isascii() else max(1, wide(word) // 2) for word in found)


def wide(text: str) -> int:
    """Count the characters of scripts that put no spaces between words."""
    return sum(unicodedata.east_asian_width(char) in "WF" for char in text)


def grams(text: str) -> frozenset[tuple[str, ...]]:
    """Return the set of three words in a row; of single words, or of characters, where there are too few of them."""
    units = normalized(text).split()
    if len(units) < _GRAM and wide(text) >= _GRAM:
        units = list(normalized(text).replace(" ", ""))
    if len(units) < _GRAM:
        return frozenset((unit,) for unit in units)
    return frozenset(zip(*(units[i:] for i in range(_GRAM)), strict=False))


def jaccard(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    """Return the overlap of two sets, from 0 to 1."""
    return len(one & other) / len(one | other) if one and other else 0.0


def contained(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    """Return which part of the first set stands in the second, from 0 to 1."""
    return len(one & other) / len(one) if one else 0.0


def farthest_first(sets: Sequence[frozenset[tuple[str, ...]]], count: int) -> list[int]:
    """Return which of the sets to take so that they are spread out: the first, then always the one whose nearest chosen one is farthest.

    Greedy max-min diversification (Gonzalez 1985), with one minus the overlap as the distance; the earlier wins where two are equal.
    """
    chosen: list[int] = []
    nearest = [0.0] * len(sets)
    left = list(range(len(sets)))
    while left and len(chosen) < count:
        best = min(left, key=lambda index: (nearest[index], index))
        left.remove(best)
        chosen.append(best)
        for index in left:
            nearest[index] = max(nearest[index], jaccard(sets[index], sets[best]))
    return chosen


def loops(text: str) -> bool:
    """Say whether a text turns in circles: the same three words three times, or anything five times in a row."""
    units = normalized(text).split()
    repeated = Counter(zip(*(units[i:] for i in range(_GRAM)), strict=False))
    return max(repeated.values(), default=0) >= _LOOP_REPEATS or _STUTTER.search(text) is not None


@lru_cache(maxsize=4096)
def _script(char: str) -> str:
    return unicodedata.name(char, "?").split(" ")[0]


def scripts(text: str) -> Counter[str]:
    """Count the letters of a text by their script (``LATIN``, ``CYRILLIC``, ``CJK``)."""
    return Counter(_script(char) for char in text if char.isalpha())


def languages(text: str) -> dict[str, float]:
    """Return how likely a text is in each of about a hundred languages: log likelihoods in nats, by ISO 639 code.

    Raises:
        MissingDependency: py3langid is not installed.
    """
    try:
        import py3langid
    except ImportError:
        raise MissingDependency("py3langid", "train") from None
    return {str(name): float(value) for name, value in py3langid.rank(text)}


def letter_share(text: str) -> float:
    """Return which part of the characters that are no space are letters, from 0 to 1."""
    solid = [char for char in text if not char.isspace()]
    return sum(char.isalpha() for char in solid) / len(solid) if solid else 0.0
