"""Attention over packed rows: every segment sees itself and the segments that it continues."""

from __future__ import annotations

import torch
from torch import Tensor

from cdcda_export.decoder import Shape
from cdcda_mobile.training.packing import Pack, Segment


class Attention:
    """The attention of one pack, forward and backward.

    Args:
        shape: heads, key-value heads and their width.
        pack: the segments.
    """

    def __init__(self, shape: Shape, pack: Pack) -> None:
        self.shape, self.pack = shape, pack

    def forward(self, heads: Tensor, window: int) -> tuple[Tensor, list[Tensor]]:
        """Return what every token attended to, (tokens, heads * head_dim), and the probabilities of every segment.

        Args:
            heads: queries, keys and values, (heads + 2 kv_heads, tokens, head_dim).
            window: how far back a token sees; 0 for all the way.
        """
        shape = self.shape
        out = torch.empty(heads.shape[1], shape.heads, shape.head_dim)
        kept = []
        for index, segment in enumerate(self.pack.segments):
            q, k, v = self._heads_of(heads, segment)
            scores = torch.baddbmm(self.pack.mask(index, window, shape.groups), q, k.transpose(1, 2), alpha=shape.head_dim**-0.5)
            probabilities = torch.softmax(scores, dim=-1)
            self._ungroup(torch.bmm(probabilities, v), out[segment.start : segment.stop])
            kept.append(probabilities)
        return out.view(-1, shape.heads * shape.head_dim), kept

    def backward(self, d_out: Tensor, heads: Tensor, kept: list[Tensor]) -> Tensor:
        """Return the gradient of ``heads`` from that of what was attended to; ``kept`` are the probabilities."""
        shape = self.shape
        grad = torch.zeros_like(heads)
        turned = shape.heads + shape.kv_heads
        d_keys, d_values = grad[shape.heads : turned], grad[turned:]
        d_out = d_out.view(-1, shape.heads, shape.head_dim)
        for segment, probabilities in zip(self.pack.segments, kept, strict=True):
            q, k, v = self._heads_of(heads, segment)
            own = slice(segment.start, segment.stop)
            d = self._group(d_out[own].transpose(0, 1))
            dv = torch.bmm(probabilities.transpose(1, 2), d)
            ds = torch.ops.aten._softmax_backward_data(torch.bmm(d, v.transpose(1, 2)), probabilities, -1, torch.float32)
            ds.mul_(shape.head_dim**-0.5)
            grad[: shape.heads, own] = torch.bmm(ds, k).view(shape.heads, -1, shape.head_dim)
            dk, at = torch.bmm(ds.transpose(1, 2), q), 0
            for start, stop in (*segment.before, (segment.start, segment.stop)):
                d_keys[:, start:stop] += dk[:, at : at + stop - start]
                d_values[:, start:stop] += dv[:, at : at + stop - start]
                at += stop - start
        return grad

    def _heads_of(self, heads: Tensor, segment: Segment) -> tuple[Tensor, Tensor, Tensor]:
        """Return a segment's queries (kv_heads, groups * tokens, head_dim) and the keys and values it sees (kv_heads, keys, head_dim)."""
        shape = self.shape
        turned = shape.heads + shape.kv_heads
        seen = (*segment.before, (segment.start, segment.stop))
        both = torch.cat([heads[shape.heads :, start:stop] for start, stop in seen], dim=1)
        return self._group(heads[: shape.heads, segment.start : segment.stop]), both[: turned - shape.heads], both[turned - shape.heads :]

    def _group(self, x: Tensor) -> Tensor:
        """Lay the query heads that share a key-value head end to end: (heads, n, dim) -> (kv_heads, groups * n, dim)."""
        return x.reshape(self.shape.kv_heads, -1, self.shape.head_dim)

    def _ungroup(self, x: Tensor, out: Tensor) -> None:
        """Undo ``_group`` into ``out``, (n, heads, dim)."""
        out.copy_(x.view(self.shape.heads, -1, self.shape.head_dim).transpose(0, 1))


def angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the rotary angles: shape (tokens, head_dim / 2)."""
    angle = positions.float()[:, None] * frequencies[None, :]
    return angle.cos(), angle.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotate the two halves of every head into ``out``: (heads, tokens, head_dim); cos and sin (tokens, head_dim / 2)."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out[..., half:]).addcmul_(a, sin)
