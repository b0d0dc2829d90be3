"""How the tensors of each architecture are named and laid out in a Hugging Face model and in a GGUF file.

Sources: llama.cpp ``gguf-py/gguf/tensor_mapping.py`` and ``conversion/{llama,qwen,gemma}.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cdcda_export.errors import FileError, UnsupportedArchitecture, did_you_mean

if TYPE_CHECKING:
    from cdcda_export.gguf import GgufFile

# Module inside a decoder layer -> name inside a GGUF block.
_LAYER_MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LLAMA_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GEMMA_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    ``permutes_qk``: rows of q and k are stored interleaved for llama.cpp's rotary kernel. ``norm_offset``: what GGUF norm weights
    carry above the Hugging Face ones (Gemma stores w+1). ``hf_config`` names the transformers config class.
    """

    name: str
    hf_config: str
    layer: dict[str, str]
    permutes_qk: bool = False
    norm_offset: float = 0.0

    def gguf_name(self, hf_name: str) -> str | None:
        """Return the GGUF tensor for a Hugging Face parameter (``model.layers.3.mlp.up_proj.weight``), None if there is none."""
        top = {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight",
        }
        if hf_name in top:
            return top[hf_name]
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", hf_name)
        if match is None or match[2] not in self.layer:
            return None
        return f"blk.{match[1]}.{self.layer[match[2]]}.{match[3]}"

    def is_permuted(self, gguf_name: str) -> bool:
        """Say whether this tensor's rows are stored in llama.cpp's rotary order."""
        return self.permutes_qk and re.fullmatch(r"blk\.\d+\.attn_[qk]\.(weight|bias)", gguf_name) is not None


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", "LlamaConfig", {**_LAYER_MODULES, **_LLAMA_NORMS}, permutes_qk=True),
    "qwen2": Architecture("qwen2", "Qwen2Config", {**_LAYER_MODULES, **_LLAMA_NORMS}),
    "qwen3": Architecture("qwen3", "Qwen3Config", {**_LAYER_MODULES, **_LLAMA_NORMS, **_QK_NORMS}),
    "gemma3": Architecture("gemma3", "Gemma3TextConfig", {**_LAYER_MODULES, **_GEMMA_NORMS, **_QK_NORMS}, norm_offset=1.0),
}


def get_architecture(name: str, where: str) -> Architecture:
    """Return an architecture by its GGUF name.

    Raises:
        UnsupportedArchitecture: the mapping of this architecture is not known.
    """
    if name not in ARCHITECTURES:
        hint = did_you_mean(name, ARCHITECTURES) if name else f" Known: {', '.join(ARCHITECTURES)}."
        raise UnsupportedArchitecture(f"{where} has the architecture '{name}', which cannot be exported.{hint}")
    return ARCHITECTURES[name]


def heads_of(base: GgufFile, gguf_name: str) -> int:
    """Return how many heads the rows of this q or k tensor are split into.

    Raises:
        FileError: the rows cannot be split so.
    """
    heads = int(base.hparam("attention.head_count"))
    if ".attn_q." not in gguf_name:
        heads = int(base.hparam("attention.head_count_kv", heads))
    if base[gguf_name].shape[0] % (2 * heads):
        raise FileError(f"{base.path} is damaged: the {base[gguf_name].shape[0]} rows of {gguf_name} are no {heads} heads.")
    return heads


def permute_rows(weights: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows from Hugging Face's half-split rotary layout to llama.cpp's interleaved one.

    Args:
        weights: shape (heads * head_dim, ...); each head's first half and second half of rows become alternating rows.
        heads: query heads for q, key-value heads for k.
    """
    split = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(weights.shape)


def unpermute_rows(weights: np.ndarray, heads: int) -> np.ndarray:
    """Undo ``permute_rows``."""
    split = weights.reshape(heads, weights.shape[0] // heads // 2, 2, *weights.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(weights.shape)
