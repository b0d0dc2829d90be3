"""Forward and backward of a whole cohort on a GPU: one pass for all users, rows padded to (users, rows, tokens).

A GPU wants few large operations of shapes that repeat, where ``packed`` gives CPU cores no token too many. The base is frozen and shared,
so its products see the tokens of all users as one matrix; the adapters are batched products with one matrix per user. Padding stands to
the right, where a causal decoder never looks from a real token, so attention needs no mask and runs fused. Nothing of one user enters
another's numbers: every operation is per token, per row or per user.

The tests run all of this on a CPU, in float32 and in bfloat16. Not tried: CUDA graphs and ``torch.compile``, which would fuse the many
small operations between the products, and the speed and memory on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from cdcda_export.decoder import FUSED, Decoder
from cdcda_mobile.training.lora import Layout
from cdcda_mobile.training.packing import Row
from cdcda_mobile.training.padding import Block, blocks, send, shares

Key = tuple[int, str]
# By fused group: A of its adapted modules, (users, modules * rank, in), and B by module, (users, rank, out).
Adapters = dict[Key, tuple[Tensor, dict[str, Tensor]]]
# Answer positions whose logits exist at the same time: 1024 of a vocabulary of 152 000 are 2 GB with their gradients.
_LOGITS = 1024


@dataclass(frozen=True)
class _Attention:
    """What the attention of all layers shares: rows' length, (cos, sin) by theta, and the mask of local layers where rows need it."""

    tokens: int
    angles: dict[float, tuple[Tensor, Tensor]]
    mask: Tensor | None


class PaddedEngine:
    """Computes losses and gradients of a cohort on one device, with the interface of ``PackedEngine``.

    The adapters stay float32, and so do the residual stream, norms, softmax and cross-entropy; products run in ``dtype``. In bfloat16 that
    makes gradients of SmolLM2-135M on text 3 to 4 % different from float32's; a residual stream in bfloat16 would make it 5 %.
    ``gradients`` only queues work: nothing in it waits for the device. On CUDA the last bits of two runs can differ.

    Args:
        decoder: the frozen base; its weights are copied where device or dtype differ.
        layout: of the adapters.
        most_tokens: of one pass, padding included, unless one row of each user is more; the backward of SmolLM2-135M needs about
            0.75 MB per token.
        device: where to compute, where adapters and gradients lie too; the decoder's by default.
        dtype: of the products; bfloat16 on CUDA and float32 elsewhere by default.
    """

    def __init__(
        self,
        decoder: Decoder,
        layout: Layout,
        most_tokens: int = 32768,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.layout, self.shape, self.most_tokens = layout, decoder.shape, most_tokens
        self.device = device or decoder.device
        self.queues = self.device.type == "cuda"
        self.cpu_seconds = 0.0  # what autograd's own thread takes is not known here
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        weights = decoder.weights
        self._embedding = self._frozen(weights["model.embed_tokens.weight"])
        tied = weights["lm_head.weight"] is weights["model.embed_tokens.weight"]
        self._head = self._embedding if tied else self._frozen(weights["lm_head.weight"])
        self._fused, self._bias = ({k: self._frozen(w) for k, w in group.items()} for group in (decoder.fused, decoder.fused_bias))
        self._widths = {
            (layer, group): [len(weights[f"model.layers.{layer}.{module}.weight"]) for module in modules]
            for layer in range(self.shape.layers)
            for group, modules in FUSED.items()
        }
        norms = [name.removesuffix(".weight") for name in weights if name.endswith("norm.weight")]
        self._norms = {name: decoder.norm_weight(name).to(self.device) for name in norms}
        self._rope = {theta: frequencies.to(self.device) for theta, frequencies in decoder.rope.items()}
        self._has_qk_norm = decoder.has_qk_norm

    def _frozen(self, weight: Tensor) -> Tensor:
        return weight.to(self.device, self.dtype)

    @torch.enable_grad()
    def gradients(
        self, batches: Sequence[Sequence[Row]], adapters: Sequence[Tensor], gradients: Sequence[Tensor], parts: int = 1
    ) -> Tensor:
        """Write each user's gradient and return the losses.

        Args:
            batches: the rows of each user.
            adapters: the parameters of each user, shape (size,).
            gradients: where to; what stood there is lost.
            parts: means nothing here; ``most_tokens`` decides.

        Returns:
            Each user's loss, sum(weight * NLL) / answer tokens, in nats: shape (users,).
        """
        flats = torch.stack([adapter.detach() for adapter in adapters]).requires_grad_()
        flats.grad = torch.zeros_like(flats)
        losses = self._losses([shares(rows) for rows in batches], flats)
        for gradient, row in zip(gradients, flats.grad, strict=True):
            gradient.copy_(row)
        return losses

    @torch.no_grad()
    def nll(self, batches: Sequence[Sequence[Row]], adapters: Sequence[Tensor] | None, parts: int = 1) -> Tensor:
        """Return the mean negative log likelihood per answer token of each user, in nats: shape (users,); None asks the bare base."""
        flats = torch.stack(list(adapters)) if adapters else None
        counts = torch.tensor([sum(len(row.targets) for row in rows) for rows in batches])
        return self._losses([[replace(row, weight=1.0) for row in rows] for rows in batches], flats) / send(counts, self.device)

    def _losses(self, batches: Sequence[Sequence[Row]], flats: Tensor | None) -> Tensor:
        """Return each user's weighted sum of losses; where ``flats`` wants a gradient, it is added to what ``flats`` has."""
        losses = [torch.zeros((), device=self.device) for _ in batches]
        for block in blocks(batches, self.most_tokens):
            block = block.to(self.device)
            answers = self._answers(block, flats)
            found, grad = self._cross_entropy(block, answers)
            if grad is not None:
                answers.backward(grad)
            for user, loss in zip(block.users, found, strict=True):
                losses[user] += loss
        return torch.stack(losses)

    # Forward.

    def _answers(self, block: Block, flats: Tensor | None) -> Tensor:
        """Return the final hidden states where answer tokens are predicted, normed: float32, shape (answers, hidden)."""
        adapters: Adapters = {}
        if flats is not None:
            adapters = self._adapters(flats if block.index is None else flats.index_select(0, block.index))
        attention = self._attention(block.ids.shape[2])
        first = self.layout.first_layer
        with torch.no_grad():
            x = F.embedding(block.ids.flatten(1), self._embedding).float() * self.shape.embedding_scale
            for layer in range(first):
                x = self._layer(layer, x, {}, attention)
        for layer in range(first, self.shape.layers):
            x = self._layer(layer, x, adapters, attention)
        # Only what predicts an answer meets the vocabulary; indices, unlike masks, need no look at the device.
        return self._norm(x.flatten(0, 1).index_select(0, block.at), "model.norm")

    def _adapters(self, flats: Tensor) -> Adapters:
        """Cut the users' parameters by fused group; one cast and one split, whose backward is one concatenation and one cast."""
        rank, shapes = self.layout.rank, []
        for part in self.layout.parts.values():
            shapes.append((len(part.names) * rank, part.inputs))
            shapes += [(rank, column.stop - column.start) for column in part.columns]
        pieces = flats.to(self.dtype).split([rows * columns for rows, columns in shapes], dim=1)
        views = iter([piece.view(-1, *shape) for piece, shape in zip(pieces, shapes, strict=True)])
        return {key: (next(views), {name.split(".", 3)[3]: next(views) for name in part.names}) for key, part in self.layout.parts.items()}

    def _attention(self, tokens: int) -> _Attention:
        positions = torch.arange(tokens, device=self.device)
        angles = {}
        for theta, frequencies in self._rope.items():
            angle = (positions[:, None] * frequencies[None, :]).repeat(1, 2)[:, None, :]
            angles[theta] = angle.cos(), angle.sin()
        distance = positions[:, None] - positions[None, :]
        masked = 0 < self.shape.window < tokens
        return _Attention(tokens, angles, (distance >= 0) & (distance < self.shape.window) if masked else None)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self._norms[name], self.shape.epsilon)

    def _affine(self, x: Tensor, key: Key, adapters: Adapters) -> list[Tensor]:
        """Return the projections of one fused group, adapters included: (users, rows * tokens, out) of each module."""
        x = x.to(self.dtype)
        found = list(F.linear(x, self._fused[key], self._bias.get(key)).split(self._widths[key], dim=-1))
        if key in adapters:
            down, ups = adapters[key]
            lows = torch.bmm(x, down.mT).split(self.layout.rank, dim=-1)
            for low, (module, up) in zip(lows, ups.items(), strict=True):
                index = FUSED[key[1]].index(module)
                found[index] = torch.baddbmm(found[index], low, up, alpha=self.layout.scale)
        return found

    def _layer(self, layer: int, x: Tensor, adapters: Adapters, attention: _Attention) -> Tensor:
        prefix, post = f"model.layers.{layer}", self.shape.window > 0
        q, k, v = self._affine(self._norm(x, f"{prefix}.input_layernorm"), (layer, "qkv"), adapters)
        (out,) = self._affine(self._attend(layer, q, k, v, attention), (layer, "o"), adapters)
        x = x + (self._norm(out, f"{prefix}.post_attention_layernorm") if post else out)
        inner = self._norm(x, f"{prefix}.{'pre_feedforward' if post else 'post_attention'}_layernorm")
        gate, up = self._affine(inner, (layer, "gate_up"), adapters)
        active = F.silu(gate) if self.shape.activation == "silu" else F.gelu(gate, approximate="tanh")
        (out,) = self._affine(active * up, (layer, "down"), adapters)
        return x + (self._norm(out, f"{prefix}.post_feedforward_layernorm") if post else out)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attention: _Attention) -> Tensor:
        """Return what every token attended to: (users, rows * tokens, heads * head_dim)."""
        shape, users = self.shape, len(q)
        cos, sin = attention.angles[shape.theta(layer)]
        q, k, v = (x.view(-1, attention.tokens, x.shape[-1] // shape.head_dim, shape.head_dim) for x in (q, k, v))
        if self._has_qk_norm:
            q, k = (self._norm(x, f"model.layers.{layer}.self_attn.{name}_norm") for name, x in (("q", q), ("k", k)))
        q, k, v = (x.to(self.dtype).transpose(1, 2) for x in (_turn(q, cos, sin), _turn(k, cos, sin), v))
        if attention.mask is not None and shape.is_local(layer):
            # The fused kernel that takes a mask knows no grouped heads.
            k, v = (x.repeat_interleave(shape.groups, dim=1) for x in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention.mask)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).reshape(users, -1, shape.heads * shape.head_dim)

    def _cross_entropy(self, block: Block, answers: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Return each user's loss and, where the answers have a graph, their gradient; logits exist for a few answers at a time."""
        losses, grads = [], []
        for start in range(0, len(answers), _LOGITS):
            at = slice(start, start + _LOGITS)
            hidden = answers[at].detach().requires_grad_(answers.requires_grad)
            loss = F.cross_entropy(F.linear(hidden.to(self.dtype), self._head).float(), block.targets[at], reduction="none")
            losses.append(loss.detach())
            if answers.requires_grad:
                grads += torch.autograd.grad(loss, hidden, block.weights[at])
        weighted = torch.cat(losses) * block.weights
        return [part.sum() for part in weighted.split(block.counts)], torch.cat(grads) if grads else None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads by their positions, in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
