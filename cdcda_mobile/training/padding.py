"""Rows of many users side by side in one block, (users, rows, tokens), padded on the right: shapes that repeat, as a GPU wants them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cdcda_mobile.training.packing import Row

# Rows are as long as a multiple of this: shapes repeat, and kernels find their operands aligned.
_MULTIPLE = 16


@dataclass(frozen=True)
class Block:
    """Rows that are computed at once.

    Attributes:
        users: whose they are.
        counts: answer tokens of each user.
        ids: token ids, shape (users, rows, tokens), padded with token 0.
        at: where each answer token is predicted in the flattened ``ids``, user by user: shape (answers,).
        targets: the answer tokens, shape (answers,).
        weights: their weights, shape (answers,).
        index: the users again, for the device; None when it is all of them.
    """

    users: list[int]
    counts: list[int]
    ids: Tensor
    at: Tensor
    targets: Tensor
    weights: Tensor
    index: Tensor | None

    def to(self, device: torch.device) -> Block:
        """Return the block on a device, by copies that the host does not wait for."""
        return Block(
            self.users,
            self.counts,
            send(self.ids, device),
            send(self.at, device),
            send(self.targets, device),
            send(self.weights, device),
            None if self.index is None else send(self.index, device),
        )


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; only from pinned memory is that queued, from other memory the host waits for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def shares(rows: Sequence[Row]) -> list[Row]:
    """Return rows whose weights are divided by the number of answer tokens of all."""
    answers = sum(len(row.targets) for row in rows)
    return [replace(row, weight=row.weight / answers) for row in rows]


def blocks(batches: Sequence[Sequence[Row]], most: int) -> Iterator[Block]:
    """Cut a cohort's rows into blocks: first the longest of every user, so that the rows of a block are about as long.

    Args:
        batches: the rows of each user.
        most: tokens of a block, padding included, unless one row of each user is more.
    """
    ordered = [sorted(rows, key=lambda row: -len(row.ids)) for rows in batches]
    start = 0
    while left := {user: rows[start:] for user, rows in enumerate(ordered) if len(rows) > start}:
        longest = max(len(rows[0].ids) for rows in left.values())
        tokens = longest + -longest % _MULTIPLE
        height = min(max(1, most // (len(left) * tokens)), max(map(len, left.values())))
        index = torch.tensor(list(left)) if len(left) < len(batches) else None
        yield _block({user: rows[:height] for user, rows in left.items()}, height, tokens, index)
        start += height


def _block(batches: dict[int, list[Row]], height: int, tokens: int, index: Tensor | None) -> Block:
    ids: list[int] = []
    at: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    counts = []
    for rows in batches.values():
        for row in rows:
            at += range(len(ids) + row.first, len(ids) + len(row.ids))
            targets += row.targets
            weights += [row.weight] * len(row.targets)
            ids += (*row.ids, *[0] * (tokens - len(row.ids)))
        ids += [0] * (tokens * (height - len(rows)))
        counts.append(sum(len(row.targets) for row in rows))
    block = torch.tensor(ids).view(len(batches), height, tokens)
    return Block(list(batches), counts, block, torch.tensor(at), torch.tensor(targets), torch.tensor(weights), index)
