"""The merged model in float32, to hold an artifact against.

With torch it is our decoder with the adapter beside each layer: nothing of the merge, the row permutation or the quantizer is shared with
the code under test. Without torch it is the merged model as an f32 GGUF in llama.cpp, which leaves merge and permutation to the unit tests.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cdcda_export.adapter import Adapter, PeftWeights, read_peft
from cdcda_export.merge import merge_to_gguf
from cdcda_export.quantization import choose_types, get_quant
from cdcda_export.runtime import LlamaCpp
from cdcda_export.verify import Probe, Reference

if TYPE_CHECKING:
    from cdcda_export.base import Base
    from cdcda_export.decoder import Decoder, Lora


def has_torch() -> bool:
    """Say whether torch is installed (without importing it)."""
    return importlib.util.find_spec("torch") is not None


def lora_of(peft: PeftWeights, device: Any = "cpu") -> dict[str, Lora]:
    """Return an adapter's layers for the decoder.

    Raises:
        AdapterError: it adapts the embedding, which the decoder keeps frozen.
    """
    import torch

    from cdcda_export.decoder import Lora

    def tensor(weights: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(weights.copy()).to(device)

    return {
        module: Lora(tensor(pair["lora_A"]), tensor(pair["lora_B"]), peft.scale(module))
        for module, pair in peft.pairs.items()
        if "lora_A" in pair
    }


def apply_whole_tensors(decoder: Decoder, peft: PeftWeights) -> None:
    """Put what LoRA layers cannot express into the decoder: replaced tensors and a low-rank change of the embedding."""
    import torch

    tied = decoder.weights["lm_head.weight"] is decoder.weights["model.embed_tokens.weight"]
    for name, weights in peft.replaced.items():
        decoder.weights[name] = torch.from_numpy(weights.copy()).to(decoder.device)
    for module, pair in peft.pairs.items():
        if "lora_embedding_A" in pair:
            change = torch.from_numpy(peft.change(module)).to(decoder.device)
            decoder.weights[f"{module}.weight"] = decoder.weights[f"{module}.weight"] + change
    if tied:
        decoder.weights["lm_head.weight"] = decoder.weights["model.embed_tokens.weight"]


def personalised(base: Base, adapter: Adapter) -> tuple[Decoder, dict[str, Lora]]:
    """Return the base with what LoRA layers cannot express put into it, and the layers; the base itself stays as it was."""
    # A copy of the table, not of the weights: what this adapter replaces must not stay for the next user of the same base.
    model = copy.copy(base.decoder)
    model.weights = dict(model.weights)
    peft = read_peft(adapter.path)
    apply_whole_tensors(model, peft)
    return model, lora_of(peft, model.device)


@contextmanager
def merged_reference(base: Base, adapter: Adapter, n_ctx: int) -> Iterator[tuple[Reference, str]]:
    """Give the merged float32 model's logits at a probe's answer positions, and what to call it on the card."""
    if has_torch():
        import torch

        model, layers = personalised(base, adapter)

        def ask_torch(probe: Probe) -> np.ndarray:
            where = probe.answer_positions()
            with torch.no_grad():
                return model.logits([probe.ids], layers, torch.arange(where.start, where.stop)).cpu().numpy()

        yield ask_torch, "merged model in float32 (torch)"
        return
    quant = get_quant("f32")
    with tempfile.TemporaryDirectory(prefix="cdcda-reference-") as folder:
        path = Path(folder) / "merged-f32.gguf"
        merge_to_gguf(base.file, adapter, choose_types(base.file, quant), quant, path)
        with LlamaCpp(path, n_ctx=n_ctx) as runtime:
            yield (lambda probe: runtime.logits(probe.ids)[probe.answer_positions()]), "merged model in float32 (llama.cpp)"
