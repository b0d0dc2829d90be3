"""The adapter alone as a GGUF for llama.cpp's ``--lora``: the very file that its ``convert_lora_to_gguf.py`` writes.

One base in memory serves many people: llama.cpp adds ``alpha / rank * B A x`` beside each matrix, and adapters are switched per request.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cdcda_export.adapter import Adapter, Delta
from cdcda_export.errors import AdapterError
from cdcda_export.ggml import TYPES
from cdcda_export.gguf import DEFAULT_ALIGNMENT, GgufFile, InMemory, TensorSource, pack_pair
from cdcda_export.lora_card import describing_pairs
from cdcda_export.merge import QUANTIZATION_VERSION, GgufResult, write_or_explain

_EMBEDDING = "token_embd.weight"


def write_lora_gguf(base: GgufFile, adapter: Adapter, path: Path) -> GgufResult:
    """Write an adapter in float32, tensors in the adapter's own order.

    llama.cpp scales each pair by ``lora_alpha / rank``, so where peft's scale differs (rsLoRA, alpha patterns) the ratio goes into B.
    The converter ignores those settings; for a plain adapter its file and this one are the same.

    Args:
        base: the base model that the adapter was matched to.
        adapter: what to write.
        path: where to; the caller gives a name inside a partial directory.

    Raises:
        AdapterError: the adapter changes something that this format cannot hold.
        DiskFull: there is no room; nothing is left behind.
    """
    if adapter.replaced:
        raise AdapterError(f"{adapter.path} replaces whole tensors ({', '.join(adapter.replaced)}): use --format gguf, which merges them.")
    if _EMBEDDING in adapter.deltas and "output.weight" not in base:
        raise AdapterError(
            f"{adapter.path} adapts the embedding, which {base.path.name} also uses as its output layer;"
            " llama.cpp cannot apply that at run time: use --format gguf, which merges it."
        )
    alpha = float(adapter.config.get("lora_alpha", 8))
    pairs = [
        pack_pair("general.architecture", base.architecture),
        pack_pair("general.type", "adapter"),
        pack_pair("adapter.type", "lora"),
        *describing_pairs(adapter.path.absolute(), sum(delta.up.shape[0] * delta.down.shape[1] for delta in adapter.deltas.values())),
        pack_pair("adapter.lora.alpha", alpha),
        pack_pair("general.quantization_version", QUANTIZATION_VERSION),
    ]
    tensors = [tensor for delta in adapter.deltas.values() for tensor in _pair(delta, alpha)]
    sha256 = write_or_explain(path, pairs, tensors, DEFAULT_ALIGNMENT, None)
    return GgufResult(path, path.stat().st_size, sha256, {"F32": len(tensors)}, None, len(adapter.deltas))


def _pair(delta: Delta, alpha: float) -> list[TensorSource]:
    # llama.cpp reads alpha 0 as "no scaling", peft as "no change".
    ratio = np.float32(delta.scale * delta.down.shape[0] / alpha if alpha else delta.scale)
    # An embedding is looked up, not multiplied: llama.cpp takes rows of A by token id and multiplies them by B.
    first, second = (delta.up, delta.down.T) if delta.tensor == _EMBEDDING else (delta.down, delta.up)
    scaled = second if ratio == 1 else second * ratio
    return [_tensor(f"{delta.tensor}.lora_a", first), _tensor(f"{delta.tensor}.lora_b", scaled)]


def _tensor(name: str, weights: np.ndarray) -> InMemory:
    stored = np.ascontiguousarray(weights, np.float32)
    return InMemory(name, stored.shape, TYPES["F32"], stored.reshape(-1).view(np.uint8))
