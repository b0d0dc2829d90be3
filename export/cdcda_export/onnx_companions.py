"""The small files beside an ONNX graph: tokenizer, chat template, end tokens, and the config of onnxruntime-genai."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cdcda_export.chat_template import ChatTemplate, template_of
from cdcda_export.gguf import GgufFile
from cdcda_export.tokenizer import bpe_tokenizer

# What llama.cpp takes as the end of a turn besides the ids that the file names (src/llama-vocab.cpp), for the architectures we know.
_END_MARKERS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "<end_of_turn>", "<|end|>")
# GGUF architecture -> onnxruntime-genai's model type (src/models/model_type.h), where the names differ.
_GENAI_TYPES = {"gemma3": "gemma3_text"}


def end_tokens(base: GgufFile) -> list[int]:
    """Return the ids that end a turn: the one that the file names first, then the markers that llama.cpp knows."""
    named = [base.get_value(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    marked = [i for i, token in enumerate(base.get_value("tokenizer.ggml.tokens", [])) if token in _END_MARKERS]
    return list(dict.fromkeys(int(i) for i in [*named, *marked] if i is not None))


def tokenizer_files(base: GgufFile) -> dict[str, str]:
    """Return the files that text needs: name -> content.

    Raises:
        ExportError: the tokenizer is of a kind that cannot be written.
    """
    template = template_of(base)
    generation = {
        "bos_token_id": base.get_value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": end_tokens(base),
        "pad_token_id": base.get_value("tokenizer.ggml.padding_token_id"),
        "do_sample": False,
    }
    return {
        "tokenizer.json": bpe_tokenizer(base).fast.to_str(pretty=True),
        "tokenizer_config.json": _json(_tokenizer_config(base, template)),
        "chat_template.jinja": template.source,
        "generation_config.json": _json({key: value for key, value in generation.items() if value is not None}),
    }


def model_files(base: GgufFile, config: Mapping[str, Any], inputs: list[str]) -> dict[str, str]:
    """Return the files that describe the graph: transformers' ``config.json`` and ``genai_config.json``.

    Args:
        base: the base model.
        config: transformers' config.
        inputs: the graph's inputs.
    """
    return {"config.json": _json(config), "genai_config.json": _json(_genai_config(base, inputs))}


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=int) + "\n"


def _tokenizer_config(base: GgufFile, template: ChatTemplate) -> dict[str, Any]:
    special = {"bos_token": template.bos_token, "eos_token": template.eos_token}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": template.source,
        **{key: token for key, token in special.items() if token},
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(base.hparam("context_length")),
    }


def _genai_config(base: GgufFile, inputs: list[str]) -> dict[str, Any]:
    """Return what onnxruntime-genai reads beside a decoder's graph (its ``src/config.h``); greedy, as our own runtime is."""
    hidden, heads = int(base.hparam("embedding_length")), int(base.hparam("attention.head_count"))
    context, ends = int(base.hparam("context_length")), end_tokens(base)
    padding = base.get_value("tokenizer.ggml.padding_token_id")
    begin = base.get_value("tokenizer.ggml.bos_token_id")
    own = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    return {
        "model": {
            "type": _GENAI_TYPES.get(base.architecture, base.architecture),
            "context_length": context,
            "vocab_size": base["token_embd.weight"].shape[0],
            "bos_token_id": ends[0] if begin is None else int(begin),
            "eos_token_id": ends,
            "pad_token_id": ends[0] if padding is None else int(padding),
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": int(base.hparam("attention.key_length", hidden // heads)),
                "hidden_size": hidden,
                "num_attention_heads": heads,
                "num_key_value_heads": int(base.hparam("attention.head_count_kv", heads)),
                "num_hidden_layers": int(base.hparam("block_count")),
                "inputs": own | {f"past_{what}_names": f"past_key_values.%d.{what}" for what in ("key", "value")},
                "outputs": {"logits": "logits"} | {f"present_{what}_names": f"present.%d.{what}" for what in ("key", "value")},
            },
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            # The graph returns a longer cache each step instead of writing into one of the full length.
            "past_present_share_buffer": False,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
