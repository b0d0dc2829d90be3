"""A base GGUF in Hugging Face's layout, tensor by tensor or as a whole transformers model (for the ONNX graph).

transformers can read GGUF files itself, but takes 25 s for the weights and 13 s for the tokenizer of the default base;
this takes about one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cdcda_export.architectures import Architecture, get_architecture, heads_of, unpermute_rows
from cdcda_export.errors import FileError, MissingDependency, UnsupportedArchitecture
from cdcda_export.ggml import dequantize
from cdcda_export.gguf import GgufFile

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def hf_tensor(base: GgufFile, architecture: Architecture, gguf_name: str) -> np.ndarray:
    """Return one tensor in float32 and in Hugging Face's layout."""
    tensor = base[gguf_name]
    weights = dequantize(tensor.data, tensor.type, tensor.shape)
    if architecture.is_permuted(gguf_name):
        weights = unpermute_rows(weights, heads_of(base, gguf_name))
    if architecture.norm_offset and gguf_name.endswith("norm.weight"):
        weights = weights - np.float32(architecture.norm_offset)
    return weights


def hf_config(base: GgufFile) -> PretrainedConfig:
    """Return the transformers config that a GGUF's metadata describes.

    Raises:
        UnsupportedArchitecture: the architecture, or its rotary scaling, is not known here.
    """
    import transformers

    architecture = get_architecture(base.architecture, str(base.path))
    scaling = base.get_value(f"{base.architecture}.rope.scaling.type", "none")
    if scaling not in ("none", ""):
        raise UnsupportedArchitecture(
            f"{base.path} uses rotary scaling '{scaling}', which cannot be trained here; its adapters can still be exported."
        )
    hidden, heads = int(base.hparam("embedding_length")), int(base.hparam("attention.head_count"))
    values: dict[str, Any] = {
        "vocab_size": base["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": int(base.hparam("feed_forward_length")),
        "num_hidden_layers": int(base.hparam("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(base.hparam("attention.head_count_kv", heads)),
        "head_dim": int(base.hparam("attention.key_length", hidden // heads)),
        "max_position_embeddings": int(base.hparam("context_length")),
        "rms_norm_eps": float(base.hparam("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(base.hparam("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in base,
        "bos_token_id": base.get_value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": base.get_value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": base.get_value("tokenizer.ggml.padding_token_id"),
        "attention_bias": "blk.0.attn_q.bias" in base and base.architecture != "qwen2",
    }
    if base.architecture == "gemma3":
        window = int(base.hparam("attention.sliding_window", 512))
        values |= {
            "sliding_window": window,
            "query_pre_attn_scalar": values["head_dim"],
            "hidden_activation": "gelu_pytorch_tanh",
        }
    return getattr(transformers, architecture.hf_config)(**values)


def load_base_model(base: GgufFile) -> PreTrainedModel:
    """Return the base as a transformers causal language model: float32, CPU, eval mode, weights frozen.

    Raises:
        MissingDependency: torch or transformers are not installed.
        FileError: a tensor that the architecture needs is not in the file, or has another shape.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.modeling_utils import no_init_weights
    except ImportError as error:
        raise MissingDependency("torch and transformers", "train") from error
    architecture = get_architecture(base.architecture, str(base.path))
    config = hf_config(base)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        source = architecture.gguf_name(name)
        if source is None or source not in base:
            raise FileError(f"{base.path} lacks the tensor {source or name}, so it is no complete {base.architecture} model.")
        weights = hf_tensor(base, architecture, source)
        if weights.shape != tuple(parameter.shape):
            raise FileError(f"{base.path}: tensor {source} has shape {list(weights.shape)}, expected {list(parameter.shape)}.")
        state[name] = torch.from_numpy(np.array(weights) if not weights.flags.writeable else weights)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    _apply_rope_factors(model, base)
    return model.eval().requires_grad_(False)


def _apply_rope_factors(model: PreTrainedModel, base: GgufFile) -> None:
    """Divide the rotary frequencies by the factors that Llama 3.1 and later carry as a tensor."""
    if "rope_freqs.weight" not in base:
        return
    import torch

    tensor = base["rope_freqs.weight"]
    factors = torch.from_numpy(np.array(dequantize(tensor.data, tensor.type, tensor.shape)))
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq / factors
    rotary.original_inv_freq = rotary.inv_freq
