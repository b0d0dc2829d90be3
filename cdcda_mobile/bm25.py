"""Which texts are about the same thing: BM25, for retrieval into a prompt and for others' inputs that are like the user's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

_K1, _B, _EPSILON = 1.5, 0.75, 0.25


class Bm25:
    """Okapi BM25 over whitespace tokens, with the constants and the floor under common words of the ``rank_bm25`` that LaMP uses.

    Args:
        documents: what is searched, in the order of time.
    """

    def __init__(self, documents: Sequence[str]) -> None:
        counts = [Counter(text.split()) for text in documents]
        lengths = np.array([one.total() for one in counts], dtype=np.float64)
        self._length_term = _K1 * (1 - _B + _B * lengths / max(1.0, float(lengths.mean()) if len(lengths) else 1.0))
        self._postings: dict[str, list[tuple[int, int]]] = {}
        for at, one in enumerate(counts):
            for word, count in one.items():
                self._postings.setdefault(word, []).append((at, count))
        n = len(documents)
        self._idf = {word: math.log(n - len(found) + 0.5) - math.log(len(found) + 0.5) for word, found in self._postings.items()}
        floor = _EPSILON * sum(self._idf.values()) / max(1, len(self._idf))
        self._idf = {word: floor if idf < 0 else idf for word, idf in self._idf.items()}

    def scores(self, query: str) -> np.ndarray:
        """Return how well every document fits a query: float64, shape (documents,)."""
        total = np.zeros(len(self._length_term))
        for word in query.split():
            if word in self._postings:
                at, count = np.array(self._postings[word]).T
                total[at] += self._idf[word] * count * (_K1 + 1) / (count + self._length_term[at])
        return total

    def nearest(self, query: str, count: int) -> list[int]:
        """Return the positions of the best documents, best first; of equals the later one."""
        scores = self.scores(query)
        return sorted(range(len(scores)), key=lambda at: (scores[at], at), reverse=True)[:count]
