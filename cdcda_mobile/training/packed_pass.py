"""Forward and backward of many users' rows through one frozen base, written out by hand for CPU cores.

Autograd would keep every intermediate, pass over each several times, and run products with the slower of two BLAS libraries. Here a pass
keeps what the backward needs and recomputes what is cheap; the frozen projections that read the same input are one product for all
users; each user's low-rank products touch that user's tokens only. Formulas follow ``cdcda_export.decoder``; the tests hold the gradients
to autograd's. Nothing of one user enters another's numbers: every operation is per token, per row or per user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cdcda_export.decoder import Decoder
from cdcda_mobile.training.attention import Attention, angles, turn
from cdcda_mobile.training.lora import Layout, Views
from cdcda_mobile.training.packing import Pack

Key = tuple[int, str]
# Answer positions whose logits exist at the same time: 256 of SmolLM2's vocabulary are 50 MB.
_LOGITS = 256


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` by numpy's OpenBLAS: on AMD cores it reaches 185 GFLOP/s where torch's MKL reaches 155."""
    return torch.from_numpy(np.matmul(a.numpy(), b.numpy()))


@dataclass
class _Saved:
    """What one layer keeps for its backward; every tensor is float32 and has one row per token, but for heads and probabilities.

    ``out`` and ``down`` are the projections before the second norm that Gemma puts behind each block, ``qkv`` what is normed before the
    rotation; None in models without.
    """

    x: Tensor
    scale_in: Tensor
    qkv: Tensor | None
    scales_qk: tuple[Tensor, Tensor] | None
    heads: Tensor
    probabilities: list[Tensor]
    attended: Tensor
    out: Tensor | None
    scale_out: Tensor | None
    middle: Tensor
    scale_middle: Tensor
    gate_up: Tensor
    down: Tensor | None
    scale_down: Tensor | None


class PackedPass:
    """One pass of a pack through the base, with an adapter for each span.

    Args:
        decoder: the frozen base, on the CPU.
        layout: of the adapters.
        pack: the rows.
        adapters: each span's parameters as ``Layout.views`` gives them; None for the bare base.
        below: gives the input of the first adapted layer; None computes it.
    """

    def __init__(
        self,
        decoder: Decoder,
        layout: Layout | None,
        pack: Pack,
        adapters: Sequence[Views] | None,
        below: Callable[[Pack], Tensor] | None = None,
    ) -> None:
        self.given = below
        self.decoder, self.shape, self.layout, self.pack = decoder, decoder.shape, layout, pack
        self.adapters = adapters or ()
        self.gradients: Sequence[Views] = ()
        self.reduced: dict[Key, list[Tensor]] = {}
        self.attention = Attention(self.shape, pack)
        self.angles = {theta: angles(pack.positions, frequencies) for theta, frequencies in decoder.rope.items()}

    # The two things that are asked of a pass.

    @torch.no_grad()
    def losses(self) -> Tensor:
        """Return each answer token's negative log likelihood, in nats: shape (answers,)."""
        hidden, _ = self._forward(keep=False)
        losses, _ = self._cross_entropy(hidden, None)
        return losses

    @torch.no_grad()
    def backward(self, weights: Tensor, gradients: Sequence[Views]) -> Tensor:
        """Add each span's gradient of ``sum(weights * losses)`` to ``gradients`` and return the losses: shape (answers,)."""
        self.gradients = gradients
        hidden, saved = self._forward(keep=True)
        losses, dx = self._cross_entropy(hidden, weights)
        first = self.layout.first_layer if self.layout else 0
        for layer in reversed(range(first, self.shape.layers)):
            dx = self._layer_backward(layer, saved.pop(), dx, lowest=layer == first)
        return losses

    # Forward.

    def _forward(self, keep: bool) -> tuple[Tensor, list[_Saved]]:
        first = self.layout.first_layer if self.layout else 0
        x = self.below(first) if self.given is None else self.given(self.pack)
        saved = []
        for layer in range(first, self.shape.layers):
            x, one = self._layer(layer, x)
            if keep:
                saved.append(one)
        return x, saved

    @torch.no_grad()
    def below(self, layer: int) -> Tensor:
        """Return the input of a layer: shape (tokens, hidden)."""
        x = F.embedding(self.pack.ids, self.decoder.weights["model.embed_tokens.weight"])
        if self.shape.embedding_scale != 1.0:
            x *= self.shape.embedding_scale
        for index in range(layer):
            x, _ = self._layer(index, x)
        return x

    def _layer(self, layer: int, x: Tensor) -> tuple[Tensor, _Saved]:
        prefix, post = f"model.layers.{layer}", self.shape.window > 0
        normed, scale_in = self._norm(x, f"{prefix}.input_layernorm")
        qkv = self._affine(normed, (layer, "qkv"))
        heads, scales_qk = self._rotate(layer, qkv)
        attended, probabilities = self.attention.forward(heads, self._window(layer))
        below = x
        if self._is_last(layer):
            # Nobody attends to what follows: from here on the predicting tokens are enough.
            attended, below = attended[self.pack.at], x[self.pack.at]
        out = self._affine(attended, (layer, "o"))
        projected, scale_out = self._norm(out, f"{prefix}.post_attention_layernorm") if post else (out, None)
        middle = projected.add_(below)
        inner, scale_middle = self._norm(middle, self._inner_norm(prefix))
        gate_up = self._affine(inner, (layer, "gate_up"))
        gate, up = gate_up.chunk(2, dim=-1)
        down = self._affine(self._activate(gate).mul_(up), (layer, "down"))
        result, scale_down = self._norm(down, f"{prefix}.post_feedforward_layernorm") if post else (down, None)
        saved = _Saved(
            x=x,
            scale_in=scale_in,
            qkv=None if scales_qk is None else qkv,
            scales_qk=scales_qk,
            heads=heads,
            probabilities=probabilities,
            attended=attended,
            out=out if post else None,
            scale_out=scale_out,
            middle=middle,
            scale_middle=scale_middle,
            gate_up=gate_up,
            down=down if post else None,
            scale_down=scale_down,
        )
        return result.add_(middle), saved

    def _is_last(self, layer: int) -> bool:
        return layer == self.shape.layers - 1

    def _spans(self, key: Key) -> list[slice]:
        """Return the rows of each user in a fused group's input: tokens, or predictions behind the last attention."""
        behind = self._is_last(key[0]) and key[1] != "qkv"
        return [span.answers if behind else span.tokens for span in self.pack.spans]

    def _inner_norm(self, prefix: str) -> str:
        return f"{prefix}.{'pre_feedforward' if self.shape.window > 0 else 'post_attention'}_layernorm"

    def _norm(self, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Return the RMS norm of ``x`` and the reciprocal root mean square: shapes (..., width) and (..., 1)."""
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(self.shape.epsilon).rsqrt_()
        return (x * scale).mul_(self.decoder.norm_weight(name)), scale

    def _norm_backward(self, dy: Tensor, x: Tensor, scale: Tensor, name: str) -> Tensor:
        """Return the gradient of the input of an RMS norm; ``dy`` is used up."""
        dy.mul_(self.decoder.norm_weight(name))
        unit = x * scale
        inner = torch.linalg.vecdot(dy, unit).div_(x.shape[-1])[..., None]
        return dy.sub_(unit.mul_(inner)).mul_(scale)

    def _affine(self, x: Tensor, key: Key) -> Tensor:
        """Return the projections of one fused group, adapters included: (tokens, out)."""
        y = matmul(x, self.decoder.fused[key].t())
        bias = self.decoder.fused_bias.get(key)
        if bias is not None:
            y += bias
        if self.layout is None or not self.adapters or key not in self.layout.parts:
            return y
        part, rank, reduced = self.layout.parts[key], self.layout.rank, []
        for rows, views in zip(self._spans(key), self.adapters, strict=True):
            down, ups = views[key]
            low = matmul(x[rows], down.t())
            for index, (columns, up) in enumerate(zip(part.columns, ups, strict=True)):
                y[rows, columns].addmm_(low[:, index * rank : (index + 1) * rank], up, alpha=self.layout.scale)
            reduced.append(low)
        self.reduced[key] = reduced
        return y

    def _affine_backward(self, dy: Tensor, x: Tensor, key: Key) -> Tensor:
        """Add the adapters' gradients and return the input's."""
        dx = matmul(dy, self.decoder.fused[key])
        self._adapter_backward(dy, x, dx, key)
        return dx

    def _adapter_backward(self, dy: Tensor, x: Tensor, dx: Tensor | None, key: Key) -> None:
        """Add the gradients of A and B, and what flows through them to ``dx`` where somebody below is trained."""
        if self.layout is None or key not in self.layout.parts:
            return
        part, rank, scale = self.layout.parts[key], self.layout.rank, self.layout.scale
        everyone = zip(self._spans(key), self.adapters, self.gradients, self.reduced.pop(key), strict=True)
        for rows, views, gradients, low in everyone:
            (down, ups), (d_down, d_ups) = views[key], gradients[key]
            d_low = torch.empty_like(low)
            for index, (columns, up, d_up) in enumerate(zip(part.columns, ups, d_ups, strict=True)):
                own, at = dy[rows, columns], slice(index * rank, (index + 1) * rank)
                d_low[:, at] = matmul(own, up.t())
                d_up.addmm_(low[:, at].t(), own, alpha=scale)
            d_low.mul_(scale)
            d_down.addmm_(d_low.t(), x[rows])
            if dx is not None:
                dx[rows].addmm_(d_low, down)

    # Rotary attention.

    def _rotate(self, layer: int, qkv: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return queries, keys and values head by head, (heads + 2 kv_heads, tokens, head_dim), normed where the model does, rotated."""
        shape = self.shape
        both = qkv.view(-1, shape.heads + 2 * shape.kv_heads, shape.head_dim)
        scales = None
        out = torch.empty(both.shape[1], both.shape[0], shape.head_dim)
        turned = shape.heads + shape.kv_heads
        source = both[:, :turned]
        if self.decoder.has_qk_norm:
            prefix = f"model.layers.{layer}.self_attn"
            q, scale_q = self._norm(both[:, : shape.heads], f"{prefix}.q_norm")
            k, scale_k = self._norm(both[:, shape.heads : turned], f"{prefix}.k_norm")
            source, scales = torch.cat((q, k), dim=1), (scale_q, scale_k)
        cos, sin = self.angles[shape.theta(layer)]
        turn(source.transpose(0, 1), cos, sin, out[:turned])
        out[turned:] = both[:, turned:].transpose(0, 1)
        return out, scales

    def _rotate_backward(self, layer: int, grad: Tensor, saved: _Saved) -> Tensor:
        """Return the gradient of the fused q, k, v projection: (tokens, out)."""
        shape = self.shape
        turned = shape.heads + shape.kv_heads
        out = torch.empty(grad.shape[1], grad.shape[0], shape.head_dim)
        cos, sin = self.angles[shape.theta(layer)]
        turn(grad[:turned], cos, -sin, out[:, :turned].transpose(0, 1))
        out[:, turned:] = grad[turned:].transpose(0, 1)
        if saved.qkv is not None and saved.scales_qk is not None:
            raw = saved.qkv.view(-1, shape.heads + 2 * shape.kv_heads, shape.head_dim)
            for name, scale, where in zip("qk", saved.scales_qk, (slice(0, shape.heads), slice(shape.heads, turned)), strict=True):
                norm = f"model.layers.{layer}.self_attn.{name}_norm"
                out[:, where] = self._norm_backward(out[:, where].clone(), raw[:, where], scale, norm)
        return out.view(out.shape[0], -1)

    def _window(self, layer: int) -> int:
        return self.shape.window if self.shape.is_local(layer) else 0

    # Feed-forward.

    def _activate(self, gate: Tensor) -> Tensor:
        return F.silu(gate) if self.shape.activation == "silu" else F.gelu(gate, approximate="tanh")

    def _activate_backward(self, dy: Tensor, gate: Tensor, out: Tensor) -> None:
        if self.shape.activation == "silu":
            torch.ops.aten.silu_backward.grad_input(dy, gate, grad_input=out)
        else:
            torch.ops.aten.gelu_backward.grad_input(dy, gate, approximate="tanh", grad_input=out)

    def _feed_forward_backward(self, layer: int, saved: _Saved, dy: Tensor) -> Tensor:
        """Return the gradient of the normed input of gate and up."""
        gate, up = saved.gate_up.chunk(2, dim=-1)
        active = self._activate(gate)
        d_active = self._affine_backward(dy, active * up, (layer, "down"))
        grad = torch.empty_like(saved.gate_up)
        d_gate, d_up = grad.chunk(2, dim=-1)
        torch.mul(d_active, active, out=d_up)
        self._activate_backward(d_active.mul_(up), gate, d_gate)
        inner = (saved.middle * saved.scale_middle).mul_(self.decoder.norm_weight(self._inner_norm(f"model.layers.{layer}")))
        return self._affine_backward(grad, inner, (layer, "gate_up"))

    def _layer_backward(self, layer: int, saved: _Saved, dy: Tensor, lowest: bool) -> Tensor:
        """Return the gradient of the layer's input; of the lowest adapted layer nobody needs it, and ``dy`` is returned."""
        prefix, d = f"model.layers.{layer}", dy
        if saved.down is not None and saved.scale_down is not None:
            d = self._norm_backward(dy.clone(), saved.down, saved.scale_down, f"{prefix}.post_feedforward_layernorm")
        d_inner = self._feed_forward_backward(layer, saved, d)
        d_middle = self._norm_backward(d_inner, saved.middle, saved.scale_middle, self._inner_norm(prefix)).add_(dy)
        d = d_middle
        if saved.out is not None and saved.scale_out is not None:
            d = self._norm_backward(d_middle.clone(), saved.out, saved.scale_out, f"{prefix}.post_attention_layernorm")
        d_attended = self._affine_backward(d, saved.attended, (layer, "o"))
        if self._is_last(layer):
            d_attended, d_middle = self._scattered(d_attended), self._scattered(d_middle)
        if lowest and (self.layout is None or (layer, "qkv") not in self.layout.parts):
            return dy
        d_qkv = self._rotate_backward(layer, self.attention.backward(d_attended, saved.heads, saved.probabilities), saved)
        normed = (saved.x * saved.scale_in).mul_(self.decoder.norm_weight(f"{prefix}.input_layernorm"))
        if lowest:
            self._adapter_backward(d_qkv, normed, None, (layer, "qkv"))
            return dy
        d_normed = self._affine_backward(d_qkv, normed, (layer, "qkv"))
        return self._norm_backward(d_normed, saved.x, saved.scale_in, f"{prefix}.input_layernorm").add_(d_middle)

    # The loss.

    def _cross_entropy(self, x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the loss of each answer token and, where weights are given, the gradient of ``x``: the logits exist in parts only.

        Args:
            x: what the last layer made of the predicting tokens, shape (answers, hidden).
            weights: of each loss.
        """
        normed, scale = self._norm(x, "model.norm")
        head, targets = self.decoder.weights["lm_head.weight"], self.pack.targets
        losses, d_normed = torch.empty(len(targets)), torch.empty_like(normed)
        for start in range(0, len(targets), _LOGITS):
            part = slice(start, start + _LOGITS)
            shares = matmul(normed[part], head.t())
            torch.log_softmax(shares, dim=-1, out=shares)
            losses[part] = shares.gather(1, targets[part, None])[:, 0].neg_()
            if weights is not None:
                share = shares.exp_()
                share.scatter_add_(1, targets[part, None], torch.full((len(share), 1), -1.0))
                d_normed[part] = matmul(share.mul_(weights[part, None]), head)
        if weights is None:
            return losses, x
        return losses, self._norm_backward(d_normed, x, scale, "model.norm")

    def _scattered(self, d: Tensor) -> Tensor:
        """Return the gradient of all tokens from that of the predicting ones."""
        return torch.zeros(len(self.pack.ids), d.shape[1]).index_add_(0, self.pack.at, d)
