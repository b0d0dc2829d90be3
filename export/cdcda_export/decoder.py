"""The four architectures as one small torch decoder: frozen float32 base, LoRA beside each linear layer, packed rows.

It exists because importing transformers costs 6 s and its padded batches waste the cores: rows of different length are laid end to end
(no padding), and logits are computed only where the caller asks. It is also the float32 reference that an artifact is verified against.
Layouts and formulas follow transformers' ``modeling_{llama,qwen2,qwen3,gemma3}.py``; the tests hold it to them.
"""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cdcda_export.architectures import Architecture, get_architecture
from cdcda_export.base_model import hf_tensor
from cdcda_export.errors import FileError, UnsupportedArchitecture
from cdcda_export.ggml import dequantize
from cdcda_export.gguf import GgufFile

# Projections that read the same input: their weights lie in one matrix, one after another.
FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class Lora:
    """One adapted linear layer: ``down`` is A (rank, in), ``up`` is B (out, rank), added as ``scale * B A x``."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class Shape:
    """The numbers of an architecture that the forward pass needs."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    rope_base: float
    rope_base_local: float
    window: int
    embedding_scale: float
    activation: str

    @property
    def groups(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.kv_heads

    def is_local(self, layer: int) -> bool:
        """Say whether a layer sees a sliding window only; Gemma 3 has five of those for each one that sees everything."""
        return self.window > 0 and (layer + 1) % 6 != 0

    def theta(self, layer: int) -> float:
        """Return the base of a layer's rotary frequencies."""
        return self.rope_base_local if self.is_local(layer) else self.rope_base


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: returning and refaulting it costs a quarter of the training time on a CPU.

    One arena for all threads, because the heaps of the others hold no more than 64 MB.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = ctypes.CDLL(None).mallopt
    mmap_threshold, trim_threshold, top_pad, arena_max = -3, -1, -2, -8
    for option, value in ((mmap_threshold, 1 << 30), (trim_threshold, 1 << 30), (top_pad, 1 << 26), (arena_max, 1)):
        mallopt(option, value)


def _shape(base: GgufFile) -> Shape:
    heads, hidden = int(base.hparam("attention.head_count")), int(base.hparam("embedding_length"))
    scaling = base.get_value(f"{base.architecture}.rope.scaling.type", "none")
    if scaling not in ("none", ""):
        raise UnsupportedArchitecture(
            f"{base.path} uses rotary scaling '{scaling}', which cannot be trained here; its adapters can still be exported."
        )
    gemma = base.architecture == "gemma3"
    theta = float(base.hparam("rope.freq_base", 10000.0))
    return Shape(
        layers=int(base.hparam("block_count")),
        heads=heads,
        kv_heads=int(base.hparam("attention.head_count_kv", heads)),
        head_dim=int(base.hparam("attention.key_length", hidden // heads)),
        epsilon=float(base.hparam("attention.layer_norm_rms_epsilon")),
        rope_base=theta,
        rope_base_local=10000.0 if gemma else theta,
        window=int(base.hparam("attention.sliding_window", 512)) if gemma else 0,
        # Gemma scales embeddings by sqrt(hidden), rounded to bfloat16 in no checkpoint but in float32 here as in transformers.
        embedding_scale=float(hidden) ** 0.5 if gemma else 1.0,
        activation="gelu" if gemma else "silu",
    )


class Decoder:
    """A frozen base model.

    Attributes:
        weights: Hugging Face parameter name -> float32 tensor in Hugging Face's layout.
        linear: names of the linear layers that can be adapted, such as ``model.layers.0.mlp.up_proj``.
        observe: told the name and the input, shape (tokens, in), of every linear layer that runs; ``lm_head`` gets the final hidden states.
    """

    def __init__(self, base: GgufFile, device: str = "cpu") -> None:
        self.architecture: Architecture = get_architecture(base.architecture, str(base.path))
        self.shape = _shape(base)
        self.device = torch.device(device)
        self.weights: dict[str, Tensor] = {}
        for name in self._parameter_names(base):
            source = self.architecture.gguf_name(name)
            if source is None or source not in base:
                raise FileError(f"{base.path} lacks the tensor {source or name}, so it is no complete {base.architecture} model.")
            weights = hf_tensor(base, self.architecture, source)
            tensor = torch.from_numpy(weights if weights.flags.writeable else np.array(weights))
            self.weights[name] = tensor.to(self.device)
        self.weights.setdefault("lm_head.weight", self.weights["model.embed_tokens.weight"])
        self.linear = [n.removesuffix(".weight") for n in self.weights if n.endswith("_proj.weight")]
        self.vocabulary = int(self.weights["lm_head.weight"].shape[0])
        self.observe: Callable[[str, Tensor], None] | None = None
        self.fused: dict[tuple[int, str], Tensor] = {}
        self.fused_bias: dict[tuple[int, str], Tensor] = {}
        self._fuse()
        self.has_qk_norm = "model.layers.0.self_attn.q_norm.weight" in self.weights
        self.rope = {theta: self._frequencies(base, theta) for theta in {self.shape.rope_base, self.shape.rope_base_local}}

    def _parameter_names(self, base: GgufFile) -> Iterator[str]:
        yield "model.embed_tokens.weight"
        yield "model.norm.weight"
        if "output.weight" in base:
            yield "lm_head.weight"
        for layer in range(self.shape.layers):
            for module, block in self.architecture.layer.items():
                yield f"model.layers.{layer}.{module}.weight"
                if f"blk.{layer}.{block}.bias" in base:
                    yield f"model.layers.{layer}.{module}.bias"

    def _fuse(self) -> None:
        """Lay projections of the same input into one matrix; their own weights become views of it."""
        for layer in range(self.shape.layers):
            for group, modules in FUSED.items():
                for kind, fused in (("weight", self.fused), ("bias", self.fused_bias)):
                    names = [f"model.layers.{layer}.{module}.{kind}" for module in modules]
                    if names[0] not in self.weights:
                        continue
                    parts = [self.weights[name] for name in names]
                    whole = fused[layer, group] = parts[0] if len(parts) == 1 else torch.cat(parts)
                    self.weights |= zip(names, whole.split([len(part) for part in parts]), strict=True)

    def folded(self, layers: Mapping[str, Lora]) -> Decoder:
        """Return this base with an adapter added to its projections; the base itself stays as it is."""
        model = copy.copy(self)
        model.weights, model.fused = dict(self.weights), dict(self.fused)
        for (layer, group), whole in self.fused.items():
            names = [f"model.layers.{layer}.{module}" for module in FUSED[group]]
            if not any(name in layers for name in names):
                continue
            whole = model.fused[layer, group] = whole.clone()
            parts = whole.split([len(self.weights[f"{name}.weight"]) for name in names])
            for name, part in zip(names, parts, strict=True):
                model.weights[f"{name}.weight"] = part
                if name in layers:
                    part.addmm_(layers[name].up, layers[name].down, alpha=layers[name].scale)
        return model

    def norm_weight(self, name: str) -> Tensor:
        """Return the factors of an RMS norm, shape (width,)."""
        weight = self.weights[f"{name}.weight"]
        return weight + self.architecture.norm_offset if self.architecture.norm_offset else weight

    def _frequencies(self, base: GgufFile, theta: float) -> Tensor:
        steps = torch.arange(0, self.shape.head_dim, 2, dtype=torch.float32) / self.shape.head_dim
        frequencies = 1.0 / (theta**steps)
        if "rope_freqs.weight" in base:
            tensor = base["rope_freqs.weight"]
            frequencies = frequencies / torch.from_numpy(np.array(dequantize(tensor.data, tensor.type, tensor.shape)))
        return frequencies.to(self.device)

    def hidden(self, rows: Sequence[Sequence[int]], adapter: Mapping[str, Lora] | None = None) -> Tensor:
        """Return the final hidden states of token rows laid end to end: float32, shape (sum of lengths, hidden)."""
        lengths = [len(row) for row in rows]
        ids = torch.tensor([token for row in rows for token in row], device=self.device)
        positions = torch.cat([torch.arange(n, device=self.device) for n in lengths]).float()
        angles = {}
        for theta, frequencies in self.rope.items():
            angle = positions[:, None] * frequencies[None, :]
            whole = torch.cat((angle, angle), dim=-1)[:, None, :]
            angles[theta] = (whole.cos(), whole.sin())
        x = F.embedding(ids, self.weights["model.embed_tokens.weight"]) * self.shape.embedding_scale
        for layer in range(self.shape.layers):
            x = self._layer(layer, x, angles, lengths, adapter or {})
        x = self._norm(x, "model.norm")
        if self.observe is not None:
            self.observe("lm_head", x)
        return x

    def logits(self, rows: Sequence[Sequence[int]], adapter: Mapping[str, Lora] | None = None, at: Tensor | None = None) -> Tensor:
        """Return next-token logits: shape (positions, vocabulary), at the flat positions ``at`` (all when None)."""
        hidden = self.hidden(rows, adapter)
        return F.linear(hidden if at is None else hidden[at], self.weights["lm_head.weight"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.norm_weight(name), self.shape.epsilon)

    def _linear(self, x: Tensor, name: str, adapter: Mapping[str, Lora]) -> Tensor:
        if self.observe is not None:
            self.observe(name, x)
        y = F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))
        lora = adapter.get(name)
        if lora is None:
            return y
        return torch.addmm(y, F.linear(x, lora.down), lora.up.t(), alpha=lora.scale)

    def _layer(
        self, index: int, x: Tensor, angles: dict[float, tuple[Tensor, Tensor]], lengths: list[int], adapter: Mapping[str, Lora]
    ) -> Tensor:
        prefix = f"model.layers.{index}"
        gemma = self.shape.window > 0
        attended = self._attention(index, self._norm(x, f"{prefix}.input_layernorm"), angles, lengths, adapter)
        x = x + (self._norm(attended, f"{prefix}.post_attention_layernorm") if gemma else attended)
        inner = self._norm(x, f"{prefix}.pre_feedforward_layernorm" if gemma else f"{prefix}.post_attention_layernorm")
        gate = self._linear(inner, f"{prefix}.mlp.gate_proj", adapter)
        gate = F.silu(gate) if self.shape.activation == "silu" else F.gelu(gate, approximate="tanh")
        out = self._linear(gate * self._linear(inner, f"{prefix}.mlp.up_proj", adapter), f"{prefix}.mlp.down_proj", adapter)
        return x + (self._norm(out, f"{prefix}.post_feedforward_layernorm") if gemma else out)

    def _attention(
        self, index: int, x: Tensor, angles: dict[float, tuple[Tensor, Tensor]], lengths: list[int], adapter: Mapping[str, Lora]
    ) -> Tensor:
        shape, prefix = self.shape, f"model.layers.{index}.self_attn"
        local = shape.is_local(index)
        cos, sin = angles[shape.theta(index)]
        q = self._linear(x, f"{prefix}.q_proj", adapter).view(-1, shape.heads, shape.head_dim)
        k = self._linear(x, f"{prefix}.k_proj", adapter).view(-1, shape.kv_heads, shape.head_dim)
        v = self._linear(x, f"{prefix}.v_proj", adapter).view(-1, shape.kv_heads, shape.head_dim)
        if self.has_qk_norm:
            q, k = self._norm(q, f"{prefix}.q_norm"), self._norm(k, f"{prefix}.k_norm")
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        rows, at = [], 0
        for n in lengths:
            one, two, three = (t[at : at + n].transpose(0, 1)[None] for t in (q, k, v))
            mask = _window_mask(n, shape.window, x.device) if local and n > shape.window else None
            rows.append(
                F.scaled_dot_product_attention(one, two, three, attn_mask=mask, is_causal=mask is None, enable_gqa=True)[0].transpose(0, 1)
            )
            at += n
        return self._linear(torch.cat(rows).reshape(at, shape.heads * shape.head_dim), f"{prefix}.o_proj", adapter)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def _window_mask(n: int, window: int, device: torch.device) -> Tensor:
    distance = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)[None, :]
    return (distance >= 0) & (distance < window)
