"""Rows of many users laid end to end: no padding, and what several rows of a user begin with stands there once.

Every row of a user starts with the same system turn and instruction, and a decoder is causal: the hidden states of a shared beginning are
the same in each row, so they are computed once and every row attends to them. Loss and gradients are those of the rows one by one, and more
than a third of the tokens of a headline task is not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# A beginning shorter than this saves less than another segment costs.
_WORTH_SHARING = 4


@dataclass(frozen=True)
class Row:
    """One sequence of a user.

    Attributes:
        ids: the tokens, prompt and answer without the last token, which is predicted and never read.
        first: position of the first predicting token; all from there on predict.
        targets: the answer, as long as ``ids`` from ``first``.
        weight: of each answer token in the user's loss.
    """

    ids: tuple[int, ...]
    first: int
    targets: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Segment:
    """Tokens that follow each other, ``start`` to ``stop`` of the pack.

    ``before`` are the segments that they continue, root first; ``row`` is one that they stand in, from ``position`` on.
    """

    start: int
    stop: int
    before: tuple[tuple[int, int], ...]
    row: Row
    position: int


@dataclass(frozen=True)
class Span:
    """One user's part of a pack: tokens and predictions."""

    tokens: slice
    answers: slice


@dataclass
class Pack:
    """What one forward pass computes.

    Attributes:
        ids: token ids, shape (tokens,).
        positions: position of each token in its row, shape (tokens,).
        segments: the tokens in runs, a run after those it continues.
        spans: one for each user, in order.
        at: where each answer token is predicted, shape (answers,).
        targets: the answer tokens, shape (answers,).
        weights: their weights, shape (answers,).
        masks: additive attention masks by (segment, window), made on first use.
    """

    ids: Tensor
    positions: Tensor
    segments: list[Segment]
    spans: list[Span]
    at: Tensor
    targets: Tensor
    weights: Tensor
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def mask(self, index: int, window: int, groups: int) -> Tensor:
        """Return what a segment may not see as -inf: shape (1, groups * tokens, keys); ``window`` 0 sees all that came before."""
        key = (index, window)
        if key not in self.masks:
            segment = self.segments[index]
            own = torch.arange(segment.start, segment.stop)
            keys = self.positions[torch.cat([*(torch.arange(a, b) for a, b in segment.before), own])]
            distance = self.positions[own][:, None] - keys[None, :]
            hidden = (distance < 0) | ((distance >= window) if window else torch.zeros_like(distance, dtype=torch.bool))
            mask = torch.zeros(distance.shape).masked_fill_(hidden, float("-inf"))
            self.masks[key] = mask.repeat(groups, 1)[None]
        return self.masks[key]


def pack(batches: Sequence[Sequence[Row]]) -> Pack:
    """Lay rows out for one pass, those of each user side by side."""
    builder = _Builder()
    for rows in batches:
        builder.add_user(rows)
    return builder.done()


class _Builder:
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.segments: list[Segment] = []
        self.spans: list[Span] = []
        self.at: list[int] = []
        self.targets: list[int] = []
        self.weights: list[float] = []

    def add_user(self, rows: Sequence[Row]) -> None:
        tokens, answers = len(self.ids), len(self.at)
        self._grow(list(rows), 0, ())
        self.spans.append(Span(slice(tokens, len(self.ids)), slice(answers, len(self.at))))

    def _grow(self, rows: list[Row], depth: int, before: tuple[tuple[int, int], ...]) -> None:
        """Lay out rows that agree in their first ``depth`` tokens, which stand in ``before``."""
        by_next: dict[int | None, list[Row]] = {}
        for row in rows:
            by_next.setdefault(row.ids[depth] if depth < len(row.ids) else None, []).append(row)
        for group in by_next.values():
            shared = _shared(group)
            if len(group) > 1 and shared - depth >= _WORTH_SHARING:
                inner = (*before, self._segment(group[0], depth, shared, before))
                self._grow(group, shared, inner)
                continue
            for row in group:
                whole = before if depth == len(row.ids) else (*before, self._segment(row, depth, len(row.ids), before))
                self._predict(row, whole)

    def _segment(self, row: Row, depth: int, end: int, before: tuple[tuple[int, int], ...]) -> tuple[int, int]:
        start = len(self.ids)
        self.ids.extend(row.ids[depth:end])
        self.positions.extend(range(depth, end))
        self.segments.append(Segment(start, len(self.ids), before, row, depth))
        return start, len(self.ids)

    def _predict(self, row: Row, path: tuple[tuple[int, int], ...]) -> None:
        where = [index for start, stop in path for index in range(start, stop)]
        self.at.extend(where[row.first :])
        self.targets.extend(row.targets)
        self.weights.extend([row.weight] * len(row.targets))

    def done(self) -> Pack:
        return Pack(
            torch.tensor(self.ids),
            torch.tensor(self.positions),
            self.segments,
            self.spans,
            torch.tensor(self.at),
            torch.tensor(self.targets),
            torch.tensor(self.weights),
        )


def _shared(rows: Sequence[Row]) -> int:
    """Return how many tokens all rows begin with: those of the smallest and the largest of them, in sorted order."""
    low, high = min(row.ids for row in rows), max(row.ids for row in rows)
    at = 0
    while at < min(len(low), len(high)) and low[at] == high[at]:
        at += 1
    return at


def split(rows: Sequence[Row], parts: int, most: int) -> list[list[Row]]:
    """Cut a user's rows into passes of about as many tokens each, rows that begin alike together.

    Args:
        rows: at least one.
        parts: at least so many passes, as long as there are rows.
        most: tokens of a pass, unless a single row is longer.
    """
    ordered = sorted(rows, key=lambda row: (row.ids, row.targets))
    total = sum(len(row.ids) for row in rows)
    parts = min(len(rows), max(parts, -(-total // most)))
    found: list[list[Row]] = [[] for _ in range(parts)]
    seen, place = 0, -1
    for at, row in enumerate(ordered):
        # The middle of the row decides, so that no pass gets much more than its share; none is skipped, and none stays empty.
        wanted = (seen + len(row.ids) // 2) * parts // total
        place = max(min(wanted, place + 1, parts - 1), parts - (len(ordered) - at))
        found[place].append(row)
        seen += len(row.ids)
    return found
