"""The engine for CPU cores: users' batches as passes, one after another or on several threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import TypeVar

import torch
from torch import Tensor

from cdcda_export.decoder import Decoder
from cdcda_mobile.training.lora import Layout
from cdcda_mobile.training.packed_pass import PackedPass
from cdcda_mobile.training.packing import Pack, Row, pack, split

# Of one pass: what its backward needs is about 0.8 MB per token with SmolLM2-135M.
MOST_TOKENS = 1024
# States of frozen layers that a group of users keeps: 3 000 rows of 75 tokens with SmolLM2-135M.
MOST_KEPT = 512 << 20
_T = TypeVar("_T")


class PackedEngine:
    """Computes losses and gradients of a group of users on CPU cores.

    Args:
        decoder: the frozen base, on the CPU.
        layout: of the adapters.
        pool: runs the passes; None runs them here, one after another.

    Attributes:
        device: where adapters and gradients lie.
        queues: whether ``gradients`` returns before its work is done.
        cpu_seconds: spent in threads of the pool.
    """

    def __init__(self, decoder: Decoder, layout: Layout, pool: Executor | None = None) -> None:
        self.decoder, self.layout, self.pool = decoder, layout, pool
        self.device, self.queues, self.cpu_seconds = torch.device("cpu"), False, 0.0
        self.below = FrozenLayers(decoder, layout.first_layer) if layout.first_layer else None

    def gradients(
        self, batches: Sequence[Sequence[Row]], adapters: Sequence[Tensor], gradients: Sequence[Tensor], parts: int = 1
    ) -> Tensor:
        """Write each user's gradient and return the losses.

        Args:
            batches: the rows of each user.
            adapters: the parameters of each user, shape (size,).
            gradients: where to; what stood there is lost.
            parts: passes that each user's batch is cut into, so that as many threads can work on a lone user.

        Returns:
            Each user's loss, sum(weight * NLL) / answer tokens, in nats: shape (users,).
        """
        plans = self._plans(batches, parts)
        scratch = [gradients if index == 0 else [torch.empty_like(g) for g in gradients] for index in range(len(plans))]
        answers = [sum(len(row.targets) for row in rows) for rows in batches]

        def run(index: int) -> list[tuple[int, float]]:
            users = [user for user, rows in enumerate(plans[index]) if rows]
            for gradient in scratch[index]:
                gradient.zero_()
            packed = pack([plans[index][user] for user in users])
            shares = packed.weights.clone()
            for user, span in zip(users, packed.spans, strict=True):
                shares[span.answers] /= answers[user]
            views = [self.layout.views(adapters[user]) for user in users]
            into = [self.layout.views(scratch[index][user]) for user in users]
            losses = PackedPass(self.decoder, self.layout, packed, views, self.below).backward(shares, into) * shares
            return [(user, float(losses[span.answers].sum())) for user, span in zip(users, packed.spans, strict=True)]

        found = torch.zeros(len(batches))
        # In the order of the passes, whichever ended first: the same bits on any number of threads.
        for index, part in enumerate(self._map(run, len(plans))):
            for user, loss in part:
                found[user] += loss
                if index:
                    gradients[user].add_(scratch[index][user])
        return found

    def nll(self, batches: Sequence[Sequence[Row]], adapters: Sequence[Tensor] | None, parts: int = 1) -> Tensor:
        """Return the mean negative log likelihood per answer token of each user, in nats: shape (users,); None asks the bare base."""
        plans = self._plans(batches, parts)

        below = self.below if adapters else None

        def run(index: int) -> list[tuple[int, float]]:
            users = [user for user, rows in enumerate(plans[index]) if rows]
            packed = pack([plans[index][user] for user in users])
            views = [self.layout.views(adapters[user]) for user in users] if adapters else None
            losses = PackedPass(self.decoder, self.layout if adapters else None, packed, views, below).losses()
            return [(user, float(losses[span.answers].sum())) for user, span in zip(users, packed.spans, strict=True)]

        found = torch.zeros(len(batches))
        for part in self._map(run, len(plans)):
            for user, loss in part:
                found[user] += loss
        return found / torch.tensor([sum(len(row.targets) for row in rows) for rows in batches])

    def _plans(self, batches: Sequence[Sequence[Row]], parts: int) -> list[list[list[Row]]]:
        """Return which rows of which user each pass takes: the first part of every user in the first pass, and so on."""
        cut = [split(rows, parts, max(1, MOST_TOKENS // len(batches))) for rows in batches]
        return [[passes[index] if index < len(passes) else [] for passes in cut] for index in range(max(map(len, cut)))]

    def _map(self, run: Callable[[int], _T], count: int) -> Iterable[_T]:
        if self.pool is None:
            return map(run, range(count))

        def timed(index: int) -> tuple[_T, float]:
            began = time.thread_time()
            return run(index), time.thread_time() - began

        done = list(self.pool.map(timed, range(count)))
        self.cpu_seconds += sum(seconds for _, seconds in done)
        return [found for found, _ in done]


class FrozenLayers:
    """What comes out of the layers below the first adapted one: the same in every epoch, so it is computed once for each row.

    Args:
        decoder: the frozen base.
        first_layer: the lowest adapted layer, above 0.
    """

    def __init__(self, decoder: Decoder, first_layer: int) -> None:
        self.decoder, self.first_layer = decoder, first_layer
        self._kept: dict[tuple[int, ...], Tensor] = {}
        self._bytes = 0

    def __call__(self, packed: Pack) -> Tensor:
        """Return the input of the first adapted layer: shape (tokens, hidden)."""
        found: dict[tuple[int, ...], Tensor] = {}
        for segment in packed.segments:
            ids = segment.row.ids
            if ids not in found:
                found[ids] = self._kept[ids] if ids in self._kept else self._computed(segment.row)
        return torch.cat([found[s.row.ids][s.position : s.position + s.stop - s.start] for s in packed.segments])

    def _computed(self, row: Row) -> Tensor:
        """Compute a row by itself: the same bits whichever rows are computed already."""
        states = PackedPass(self.decoder, None, pack([[row]]), None).below(self.first_layer)
        if self._bytes < MOST_KEPT:
            self._kept[row.ids] = states
            self._bytes += states.nbytes
        return states
