"""The merged model in float32, to hold an artifact against.

With torch it is our decoder with the adapter beside each layer: nothing of the merge, the row permutation or the quantizer is shared with
the code under test. Without torch it is the merged model as an f32 GGUF in llama.cpp, which leaves merge and permutation to the unit tests.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cdcda_export.adapter import Adapter, PeftWeights, read_peft
from cdcda_export.gguf import GgufFile
from cdcda_export.merge import merge_to_gguf
from cdcda_export.quantization import choose_types, get_quant
from cdcda_export.runtime import LlamaCpp
from cdcda_export.verify import Probe, Reference

if TYPE_CHECKING:
    from cdcda_export.decoder import Decoder, Lora


def has_torch() -> bool:
    """Say whether torch is installed (without importing it)."""
    return importlib.util.find_spec("torch") is not None


def lora_of(peft: PeftWeights) -> dict[str, Lora]:
    """Return an adapter's layers for the decoder.

    Raises:
        AdapterError: it adapts the embedding, which the decoder keeps frozen.
    """
    import torch

    from cdcda_export.decoder import Lora

    return {
        module: Lora(torch.from_numpy(pair["lora_A"].copy()), torch.from_numpy(pair["lora_B"].copy()), peft.scale(module))
        for module, pair in peft.pairs.items()
        if "lora_A" in pair
    }


def apply_whole_tensors(decoder: Decoder, peft: PeftWeights) -> None:
    """Put what LoRA layers cannot express into the decoder: replaced tensors and a low-rank change of the embedding."""
    import torch

    tied = decoder.weights["lm_head.weight"] is decoder.weights["model.embed_tokens.weight"]
    for name, weights in peft.replaced.items():
        decoder.weights[name] = torch.from_numpy(weights.copy())
    for module, pair in peft.pairs.items():
        if "lora_embedding_A" in pair:
            change = (pair["lora_embedding_B"] @ pair["lora_embedding_A"]).T * np.float32(peft.scale(module))
            decoder.weights[f"{module}.weight"] = decoder.weights[f"{module}.weight"] + torch.from_numpy(change)
    if tied:
        decoder.weights["lm_head.weight"] = decoder.weights["model.embed_tokens.weight"]


@contextmanager
def merged_reference(base: GgufFile, adapter: Adapter, n_ctx: int, decoder: Decoder | None = None) -> Iterator[tuple[Reference, str]]:
    """Give the merged float32 model's logits at a probe's answer positions, and what to call it on the card."""
    if has_torch():
        import torch

        from cdcda_export.decoder import Decoder

        model = decoder or Decoder(base)
        peft = read_peft(adapter.path)
        layers = lora_of(peft)
        apply_whole_tensors(model, peft)

        def ask_torch(probe: Probe) -> np.ndarray:
            where = probe.answer_positions()
            with torch.no_grad():
                return model.logits([probe.ids], layers, torch.arange(where.start, where.stop)).numpy()

        yield ask_torch, "merged model in float32 (torch)"
        return
    quant = get_quant("f32")
    with tempfile.TemporaryDirectory(prefix="cdcda-reference-") as folder:
        path = Path(folder) / "merged-f32.gguf"
        merge_to_gguf(base, adapter, choose_types(base, quant), quant, path)
        with LlamaCpp(path, n_ctx=n_ctx) as runtime:
            yield (lambda probe: runtime.logits(probe.ids)[probe.answer_positions()]), "merged model in float32 (llama.cpp)"
