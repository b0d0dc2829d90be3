"""A merged model as an ONNX directory that runs on its own: graph with key-value cache, tokenizer, chat template, end tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdcda_export.chat_template import ChatTemplate, template_of
from cdcda_export.gguf import GgufFile
from cdcda_export.manifest import write_atomic
from cdcda_export.onnx_quant import quiet, save_model, trace
from cdcda_export.onnx_runtime import OnnxModel
from cdcda_export.progress import Progress
from cdcda_export.tokenizer import bpe_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["OnnxModel", "OnnxResult", "end_tokens", "export_onnx"]

# What llama.cpp takes as the end of a turn besides the ids that the file names (src/llama-vocab.cpp), for the architectures we know.
_END_MARKERS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "<end_of_turn>", "<|end|>")


@dataclass(frozen=True)
class OnnxResult:
    """What was written: ``files`` maps names to paths, ``tensor_types`` counts the parameters by type."""

    files: dict[str, Path]
    bytes: int
    tensor_types: dict[str, int]
    quant: str


def end_tokens(base: GgufFile) -> list[int]:
    """Return the ids that end a turn: the one that the file names first, then the markers that llama.cpp knows."""
    named = [base.get_value(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    marked = [i for i, token in enumerate(base.get_value("tokenizer.ggml.tokens", [])) if token in _END_MARKERS]
    return list(dict.fromkeys(int(i) for i in [*named, *marked] if i is not None))


def export_onnx(model: PreTrainedModel, base: GgufFile, quant: str, directory: Path, progress: Progress) -> OnnxResult:
    """Write a model whose adapter is merged already; equal inputs give equal bytes.

    Args:
        model: the merged model, float32, on the CPU.
        base: the GGUF it came from: tokenizer, chat template and special tokens are taken from there.
        quant: int8 or int4.
        directory: where to; only finished files remain there.
        progress: told of the two steps.

    Raises:
        ExportError: the tokenizer or the architecture cannot be written.
        MissingDependency: optimum or onnxruntime are not installed.
        DiskFull: no room is left.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # Before the tracing: it refuses what cannot work.
    texts = _companions(model, base)
    progress.start("exporting the graph")
    skeleton = trace(model, directory / ".trace")
    progress.done()
    progress.start(f"quantizing to {quant}")
    with quiet():
        weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
        filled, types = skeleton.fill(weights, quant)
        save_model(filled, directory / "model.onnx")
    for name, text in texts.items():
        write_atomic(directory / name, text)
    names = ["model.onnx", *(["model.onnx.data"] if (directory / "model.onnx.data").exists() else []), *texts]
    files = {name: directory / name for name in names}
    size = sum(path.stat().st_size for name, path in files.items() if name.startswith("model.onnx"))
    progress.done(f"{size / 1e6:.1f} MB")
    return OnnxResult(files, size, types, quant)


def _companions(model: PreTrainedModel, base: GgufFile) -> dict[str, str]:
    """Return the small files beside the graph: name -> content."""
    template = template_of(base)
    config = json.loads(model.config.to_json_string())
    config |= {"architectures": [type(model).__name__]}
    config.pop("_name_or_path", None)
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
        "config.json": _json(config),
        "generation_config.json": _json({key: value for key, value in generation.items() if value is not None}),
    }


def _json(value: dict[str, Any]) -> str:
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
