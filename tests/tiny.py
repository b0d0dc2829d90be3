"""Tiny random models and adapters, real files in the real formats: what the fast tests run on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from cdcda_export.adapter import PeftWeights
from cdcda_export.architectures import ARCHITECTURES, permute_rows
from cdcda_export.ggml import TYPES, quantize
from cdcda_export.gguf import GgufFile, InMemory, pack_pair, write_gguf

LAYERS, HEADS, KV_HEADS = 2, 4, 2
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_PRE = {"llama": "smollm", "qwen2": "qwen2", "qwen3": "qwen2", "gemma3": "smollm"}
_WORDS = ("the", "and", "ing", "er", "on", "at", "re", "th", "in", "an", "es", "or", "ou", "st", "en", "ed", "is", "it")


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in printable}
    extra = 0
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + extra)
            extra += 1
    return [table[b] for b in range(256)]


def vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, token types and merges of a small byte-level BPE."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *byte_alphabet()]
    merges: list[str] = []
    for word in _WORDS:
        parts = word[0]
        for letter in word[1:]:
            if parts + letter not in tokens:
                merges.append(f"{parts} {letter}")
                tokens.append(parts + letter)
            parts += letter
    tokens += [f"<pad{i}>" for i in range(-len(tokens) % 32)]
    types = [3 if t in special else 5 if t.startswith("<pad") else 1 for t in tokens]
    return tokens, types, merges


def make_gguf(
    path: Path, arch: str = "llama", hidden: int = 64, kind: str = "F32", seed: int = 0, layers: int = LAYERS, **changes: Any
) -> Path:
    """Write a tiny random model; ``changes`` overrides metadata or, with a None value, drops it."""
    rng = np.random.default_rng(seed)
    tokens, types, merges = vocabulary()
    head_dim = 32 if arch in ("gemma3", "qwen3") else hidden // HEADS
    ffn = hidden * 2
    shapes: dict[str, tuple[int, ...]] = {
        "attn_q": (HEADS * head_dim, hidden),
        "attn_k": (KV_HEADS * head_dim, hidden),
        "attn_v": (KV_HEADS * head_dim, hidden),
        "attn_output": (hidden, HEADS * head_dim),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }
    architecture = ARCHITECTURES[arch]
    tensors = [_tensor(rng, "token_embd.weight", (len(tokens), hidden), kind, 0.5), _norm(rng, "output_norm.weight", hidden)]
    for layer in range(layers):
        for block in architecture.layer.values():
            name = f"blk.{layer}.{block}"
            if block in shapes:
                tensors.append(_tensor(rng, f"{name}.weight", shapes[block], kind, 0.8 / shapes[block][1] ** 0.5))
                if arch == "qwen2" and block in ("attn_q", "attn_k", "attn_v"):
                    bias = rng.normal(0, 0.1, shapes[block][0]).astype(np.float32)
                    tensors.append(InMemory(f"{name}.bias", bias.shape, TYPES["F32"], bias.view(np.uint8)))
            else:
                tensors.append(_norm(rng, f"{name}.weight", head_dim if block in ("attn_q_norm", "attn_k_norm") else hidden))
    meta: dict[str, Any] = {
        "general.architecture": arch,
        "general.name": f"Tiny {arch}",
        "general.license": "apache-2.0",
        f"{arch}.block_count": layers,
        f"{arch}.context_length": 1024,
        f"{arch}.embedding_length": hidden,
        f"{arch}.feed_forward_length": ffn,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.rope.dimension_count": head_dim,
        f"{arch}.rope.freq_base": 10000.0,
        f"{arch}.vocab_size": len(tokens),
        "general.file_type": 0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _PRE[arch],
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    if arch == "gemma3":
        meta["gemma3.attention.sliding_window"] = 16
    meta |= changes
    pairs = [pack_pair(key, value) for key, value in meta.items() if value is not None]
    pairs.append(_pack_types(types))
    write_gguf(path, pairs, tensors)
    return path


def _pack_types(types: list[int]) -> bytes:
    import struct

    key = b"tokenizer.ggml.token_type"
    return struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 5, len(types)) + np.array(types, np.int32).tobytes()


def _tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...], kind: str, scale: float) -> InMemory:
    weights = rng.normal(0, scale, shape).astype(np.float32)
    return InMemory(name, shape, TYPES[kind], quantize(weights, TYPES[kind]))


def _norm(rng: np.random.Generator, name: str, size: int) -> InMemory:
    weights = (1 + rng.normal(0, 0.1, size)).astype(np.float32)
    return InMemory(name, (size,), TYPES["F32"], weights.view(np.uint8))


def make_adapter(
    directory: Path,
    base: Path,
    targets: tuple[str, ...] = TARGETS,
    rank: int = 4,
    alpha: float = 8.0,
    seed: int = 1,
    **config: Any,
) -> Path:
    """Write a random LoRA adapter in peft's format; ``config`` overrides adapter_config.json."""
    rng = np.random.default_rng(seed)
    file = GgufFile(base)
    architecture = ARCHITECTURES[file.architecture]
    tensors: dict[str, np.ndarray] = {}
    for layer in range(int(file.hparam("block_count"))):
        for module, block in architecture.layer.items():
            if module.rsplit(".", 1)[-1] in targets:
                rows, columns = file[f"blk.{layer}.{block}.weight"].shape
                prefix = f"base_model.model.model.layers.{layer}.{module}"
                tensors[f"{prefix}.lora_A.weight"] = rng.normal(0, 1 / columns**0.5, (rank, columns)).astype(np.float32)
                tensors[f"{prefix}.lora_B.weight"] = rng.normal(0, 0.15, (rows, rank)).astype(np.float32)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
        "base_model_name_or_path": base.stem,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings | config))
    return directory


def merge_peft(model: Any, peft: PeftWeights) -> None:
    """Add an adapter to a transformers model's weights in place."""
    import torch

    parameters = dict(model.named_parameters())
    for module in peft.pairs:
        parameters[f"{module}.weight"].data += torch.from_numpy(peft.change(module))
    for name, weights in peft.replaced.items():
        parameters[name].data.copy_(torch.from_numpy(weights.copy()))


__all__ = ["LAYERS", "TARGETS", "TEMPLATE", "make_adapter", "make_gguf", "merge_peft", "permute_rows", "vocabulary"]
