"""The reference route for tests: tiny Hugging Face models, and llama.cpp's and PEFT's own tools (``benchmarks/standard_route.py``)."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from cdcda_export.base import default_base
from cdcda_export.base_model import load_base_model
from cdcda_export.gguf import GgufFile
from cdcda_export.tokenizer import bpe_tokenizer, has_known_tokenizer
from standard_route import (
    convert_f32,
    convert_lora,
    merge_with_peft,
    quantize_with_llama_cpp,
    read_imatrix,
)

_SMOLLM_VOCABULARY = 49152
_TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def hf_directory_of(base: Path, folder: Path) -> Path:
    """Write a GGUF as a float32 Hugging Face directory with a tokenizer that the converter accepts.

    A vocabulary that the converter would not recognise (it knows tokenizers by hashes) is replaced by a sentencepiece one: the
    tensors are what such a directory is for.
    """
    file = GgufFile(base)
    folder.mkdir(parents=True, exist_ok=True)
    load_base_model(file).save_pretrained(folder)
    if has_known_tokenizer(file) and file["token_embd.weight"].shape[0] == _SMOLLM_VOCABULARY:
        write_bpe(file, folder)
    else:
        write_sentencepiece(folder)
    return folder


def tiny_hf(arch: str, folder: Path, dtype: str = "float32", seed: int = 0, **changes: Any) -> Path:
    """Save a tiny random transformers model of an architecture, norms and biases random too."""
    import torch
    import transformers

    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    }
    config, model_class = classes[arch]
    own: dict[str, Any] = {"vocab_size": 288} if arch == "gemma3" else {"vocab_size": _SMOLLM_VOCABULARY}
    if arch in ("qwen3", "gemma3"):
        own["head_dim"] = 32
    if arch == "gemma3":
        own |= {"sliding_window": 16, "query_pre_attn_scalar": 32, "num_hidden_layers": 7}  # six local layers, then a global one
    torch.manual_seed(seed)
    model = model_class(config(**(_TINY | own | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed_tokens" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.8 / parameter.shape[1] ** 0.5)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    if arch == "gemma3":
        write_sentencepiece(folder)
    else:
        write_bpe(GgufFile(default_base()), folder)
    return folder


def write_bpe(base: GgufFile, folder: Path) -> None:
    """Write the byte-level tokenizer of a GGUF as transformers stores it."""
    bpe_tokenizer(base).save(folder / "tokenizer.json")
    tokens = base.get_value("tokenizer.ggml.tokens")
    special = {kind: tokens[base.get_value(f"tokenizer.ggml.{kind}_token_id")] for kind in ("bos", "eos")}
    settings = {f"{kind}_token": token for kind, token in special.items()}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": base.get_value("tokenizer.chat_template")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_sentencepiece(folder: Path) -> None:
    """Train a sentencepiece tokenizer of the 256 bytes and a few pieces, as ``tokenizer.model``."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the lock keeper sleeps until nine", "and the geese know it", "nobody paid for the winch"] * 20),
        model_writer=model,
        vocab_size=288,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


__all__ = [
    "convert_f32", "convert_lora", "hf_directory_of", "merge_with_peft", "quantize_with_llama_cpp", "read_imatrix", "tiny_hf",
    "write_bpe", "write_sentencepiece",
]  # fmt: skip
