"""Which type each tensor takes: the choices of ``llama-quantize``, rewritten as a small table.

Source: ``llama_tensor_get_type_impl`` and ``tensor_type_fallback`` in llama.cpp's ``src/llama-quant.cpp`` (dense models only).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cdcda_export.errors import ConfigError, QuantizationError, did_you_mean
from cdcda_export.ggml import TYPES, GgmlType
from cdcda_export.gguf import GgufFile


@dataclass(frozen=True)
class Quant:
    """One name of ``--quant``: the main type, the number GGUF files call it by, and whether it is a K-quant mix."""

    name: str
    main: str
    file_type: int
    mix: bool = False


# file_type: enum llama_ftype in llama.cpp's include/llama.h.
QUANTS: dict[str, Quant] = {
    quant.name: quant
    for quant in (
        Quant("f32", "F32", 0),
        Quant("f16", "F16", 1),
        Quant("q4_0", "Q4_0", 2),
        Quant("q4_1", "Q4_1", 3),
        Quant("q8_0", "Q8_0", 7),
        Quant("q4_k_m", "Q4_K", 15, mix=True),
    )
}
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_OUTPUT = "output.weight"
_EMBEDDING = "token_embd.weight"


def get_quant(name: str) -> Quant:
    """Return a quantization by its name.

    Raises:
        ConfigError: there is no such quantization for GGUF.
    """
    if name not in QUANTS:
        raise ConfigError(f"There is no GGUF quantization '{name}'.{did_you_mean(name, QUANTS)}")
    return QUANTS[name]


def _more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _wanted(name: str, quant: Quant, layers: int, tied: bool) -> str:
    if name == _OUTPUT or (tied and name == _EMBEDDING):
        return quant.main if quant.main in ("F32", "F16", "Q8_0") else "Q6_K"
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if quant.mix and block and block[2] in ("attn_v", "ffn_down") and _more_bits(int(block[1]), layers):
        return "Q6_K"
    return quant.main


def choose_types(base: GgufFile, quant: Quant, allow_fallback: bool = False) -> dict[str, GgmlType]:
    """Return the type of every tensor in the artifact.

    Args:
        base: the base model.
        quant: what was asked for.
        allow_fallback: where rows are no multiple of a K-quant's 256, take the type that llama-quantize takes; otherwise refuse.

    Raises:
        QuantizationError: the main type does not fit the rows and no fallback is allowed.
    """
    layers, tied = int(base.hparam("block_count")), _OUTPUT not in base
    chosen: dict[str, GgmlType] = {}
    for name, tensor in base.items():
        if len(tensor.shape) < 2 or not name.endswith("weight") or "_norm.weight" in name:
            chosen[name] = tensor.type
            continue
        wanted = TYPES[_wanted(name, quant, layers, tied)]
        if tensor.shape[-1] % wanted.block_size:
            # The output matrix falls back silently as in llama-quantize: Q8_0 is the better type, not the worse one.
            if not allow_fallback and wanted.name == quant.main:
                raise QuantizationError(
                    f"{quant.name} needs rows that are a multiple of {wanted.block_size}, but {name} of {base.path.name} has rows of "
                    f"{tensor.shape[-1]}; use --quant q4_0 or q8_0 (smaller and faster on ARM), or --allow-fallback for llama-quantize's "
                    f"substitute {_FALLBACK.get(wanted.name, 'F16')}."
                )
            wanted = TYPES[_FALLBACK.get(wanted.name, "F16")]
            if tensor.shape[-1] % wanted.block_size:
                wanted = TYPES["F16"]
        chosen[name] = wanted
    return chosen


def is_double_quantized(base: GgufFile, types: dict[str, GgmlType]) -> str | None:
    """Return a sentence if tensors that are quantized already take another type, None if none does."""
    lossy = {t.type.name for n, t in base.items() if t.type.block_size > 1 and t.type != types[n] and types[n].name not in ("F32", "F16")}
    if not lossy:
        return None
    targets = sorted({types[n].name for n, t in base.items() if t.type.name in lossy and t.type != types[n]})
    return f"quantized twice: the base was {'/'.join(sorted(lossy))} already, its tensors became {'/'.join(targets)}"
