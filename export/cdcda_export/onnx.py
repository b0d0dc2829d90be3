"""An adapter merged into its base as an ONNX directory that runs on its own: graph with key-value cache, tokenizer, chat template.

The base in ONNX, quantized, is made once and cached; a user's export copies it and puts the merged matrices in their places.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cdcda_export.adapter import PeftWeights
from cdcda_export.architectures import get_architecture
from cdcda_export.base_model import hf_tensor
from cdcda_export.cache import Entry, cached
from cdcda_export.errors import AdapterError, FileError, MissingDependency
from cdcda_export.gguf import GgufFile
from cdcda_export.manifest import write_atomic
from cdcda_export.onnx_companions import end_tokens, model_files, tokenizer_files
from cdcda_export.onnx_file import DATA, MODEL, Places, write_changed, write_model
from cdcda_export.onnx_graph import graph_inputs, skeleton_of
from cdcda_export.onnx_rewrite import plan
from cdcda_export.onnx_runtime import OnnxModel
from cdcda_export.progress import Progress

__all__ = ["OnnxModel", "OnnxResult", "end_tokens", "export_onnx", "merged"]

# Raise it with every change of what a base in ONNX looks like.
_FORMAT = 1


@dataclass(frozen=True)
class OnnxResult:
    """What was written.

    ``files`` maps names to paths, ``hashes`` to SHA-256; ``bytes`` is the size of the model alone; ``tensor_types`` counts the
    parameters by type.
    """

    files: dict[str, Path]
    hashes: dict[str, str]
    bytes: int
    tensor_types: dict[str, int]
    quant: str


def export_onnx(base: GgufFile, base_sha256: str, peft: PeftWeights | None, quant: str, directory: Path, progress: Progress) -> OnnxResult:
    """Write a base with an adapter merged into it; equal inputs give equal bytes.

    The first export of a base traces its graph, which needs optimum and torch; all others need neither.

    Args:
        base: the base model: weights, tokenizer, chat template and special tokens are taken from there.
        base_sha256: its hash.
        peft: the adapter; None writes the base alone.
        quant: int8 or int4.
        directory: where to; only finished files remain there.
        progress: told of the steps.

    Raises:
        AdapterError: the adapter does not fit the base.
        ExportError: the tokenizer or the architecture cannot be written, or a weight is not finite.
        MissingDependency: the graph must be traced, and optimum or torch are not installed.
        DiskFull: no room is left.
    """
    entry = _base_in_onnx(base, base_sha256, quant, progress)
    places = Places(**entry.facts["places"])
    touched = _touched(peft, places.parameters) if peft else []
    directory.mkdir(parents=True, exist_ok=True)
    progress.start(f"merging and quantizing to {quant}", len(touched), "tensors")

    def weights(parameter: str) -> np.ndarray:
        found = merged(base, parameter, peft)
        progress.advance()
        return found

    (directory / DATA).unlink(missing_ok=True)
    hashes = write_changed(entry.directory, places, touched, weights, directory)
    size = sum((directory / name).stat().st_size for name in hashes)
    for name in entry.facts["companions"]:
        shutil.copy(entry.directory / name, directory / name)
    progress.done(f"{size / 1e6:.1f} MB")
    hashes |= entry.facts["companions"]
    return OnnxResult({name: directory / name for name in hashes}, hashes, size, entry.facts["types"], quant)


def merged(base: GgufFile, parameter: str, peft: PeftWeights | None) -> np.ndarray:
    """Return one parameter with the adapter merged into it: float32, Hugging Face's layout, in peft's own order of operations.

    Raises:
        FileError: the base lacks the tensor.
        AdapterError: the change has another shape.
    """
    architecture = get_architecture(base.architecture, str(base.path))
    source = architecture.gguf_name(parameter)
    if source is None or source not in base:
        raise FileError(f"{base.path} lacks the tensor {source or parameter}, so it is no complete {base.architecture} model.")
    module = parameter.removesuffix(".weight")
    if peft is not None and parameter in peft.replaced:
        made = peft.replaced[parameter]
    elif peft is not None and module in peft.pairs and module != parameter:
        made = peft.change(module)
    else:
        return hf_tensor(base, architecture, source)
    if made.shape != base[source].shape:
        raise AdapterError(f"The adapter holds {parameter} as {list(made.shape)}, but the base has {list(base[source].shape)}.")
    if parameter not in peft.replaced:
        made += hf_tensor(base, architecture, source)
    return made


def _touched(peft: PeftWeights, parameters: Iterable[str]) -> list[str]:
    wanted = {*(f"{module}.weight" for module in peft.pairs), *peft.replaced}
    unknown = sorted(wanted - set(parameters))
    if unknown == ["lm_head.weight"] and {"lm_head.weight", "model.embed_tokens.weight"} <= set(peft.replaced):
        head, embedding = peft.replaced["lm_head.weight"], peft.replaced["model.embed_tokens.weight"]
        unknown = [] if np.array_equal(head, embedding) else unknown  # trainers save a tied output matrix beside the embedding
    if unknown:
        raise AdapterError(f"The adapter changes {unknown[0]}, which the base model does not have.")
    return sorted(wanted)


def _base_in_onnx(base: GgufFile, base_sha256: str, quant: str, progress: Progress) -> Entry:
    """Return the base alone as a finished ONNX directory."""

    def build(directory: Path) -> dict[str, Any]:
        try:
            import onnx
            import tokenizers  # noqa: F401
        except ImportError as error:
            raise MissingDependency("optimum and onnxruntime", "onnx") from error
        # Before the tracing: it refuses what cannot work.
        texts = tokenizer_files(base)
        skeleton = skeleton_of(base, progress)
        progress.start(f"quantizing the base to {quant}, once")
        made = plan(skeleton, quant)
        texts |= model_files(base, skeleton.config, [value.name for value in made.model.graph.input])
        places = write_model(made, lambda parameter: merged(base, parameter, None), directory)
        # Here alone: a user's file differs in the values of tensors only.
        onnx.checker.check_model(str(directory / MODEL))
        for name, text in texts.items():
            write_atomic(directory / name, text)
        progress.done()
        return {
            "places": asdict(places),
            "types": made.types,
            "companions": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()},
        }

    return cached("onnx-bases", {"format": _FORMAT, "base": base_sha256, "quant": quant, "graph": graph_inputs(base)}, build)
