"""How much of the personal change reached the file: the one question that quantization noise cannot hide.

For an adapted matrix with change D = scale * B A, the share that arrived is <W_artifact - W_base, D> / <D, D>, in Hugging Face's layout
and from the adapter's own file. Rounding noise is nearly orthogonal to D, so a faithful artifact is near 1 even at 4 bits; an adapter left
out gives 0, a doubled scale 2, unpermuted rows about 0 for q and k. It also shows what merging into a base of the same 4-bit type does:
weights that lie on the grid already fall back onto it, and the change is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from cdcda_export.adapter import PeftWeights
from cdcda_export.architectures import Architecture, get_architecture, heads_of, unpermute_rows
from cdcda_export.base_model import hf_tensor
from cdcda_export.ggml import dequantize
from cdcda_export.gguf import GgufFile


def arrived_in_merged(base: GgufFile, artifact: GgufFile, peft: PeftWeights) -> dict[str, float]:
    """Return the share of the change that arrived in a merged GGUF, by kind of layer (``q_proj``), the mean over layers."""
    architecture = get_architecture(base.architecture, str(base.path))
    return _by_kind(peft, lambda name: hf_tensor(artifact, architecture, name) - hf_tensor(base, architecture, name), architecture)


def arrived_in_lora(base: GgufFile, path: Path, peft: PeftWeights) -> dict[str, float]:
    """Return the share of the change that an adapter GGUF applies at run time, by kind of layer."""
    architecture, file = get_architecture(base.architecture, str(base.path)), GgufFile(path)
    alpha = float(file.get_value("adapter.lora.alpha"))

    def change(name: str) -> np.ndarray:
        if f"{name}.lora_a" not in file or f"{name}.lora_b" not in file:
            return np.zeros(base[name].shape, np.float32)
        down, up = (dequantize(t.data, t.type, t.shape) for t in (file[f"{name}.lora_a"], file[f"{name}.lora_b"]))
        dense = (up @ down) * np.float32(alpha / down.shape[0])
        return unpermute_rows(dense, heads_of(base, name)) if architecture.is_permuted(name) else dense

    return _by_kind(peft, change, architecture)


def _by_kind(peft: PeftWeights, change: Callable[[str], np.ndarray], architecture: Architecture) -> dict[str, float]:
    shares: dict[str, list[float]] = {}
    for module, pair in peft.pairs.items():
        name = architecture.gguf_name(f"{module}.weight")
        if name is None or "lora_A" not in pair:
            continue
        wanted = (pair["lora_B"] @ pair["lora_A"]) * np.float32(peft.scale(module))
        size = float((wanted * wanted).sum())
        if size > 0:
            got = change(name)
            shares.setdefault(module.rsplit(".", 1)[-1], []).append(float((got * wanted).sum()) / size)
    return {kind: float(np.mean(values)) for kind, values in shares.items()}
