"""How much of the personal change reached an ONNX file: ``cdcda_export.arrival`` for tensors in blocks.

Read from the file that ships, by the names of its initializers, and not from anything that the export remembers.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from cdcda_export.adapter import PeftWeights
from cdcda_export.arrival import TensorCheck, check_tensors
from cdcda_export.errors import FileError, MissingDependency
from cdcda_export.gguf import GgufFile
from cdcda_export.onnx_file import MODEL
from cdcda_export.onnx_quant import dequantize_blocks


def check_onnx(base: GgufFile, path: Path, peft: PeftWeights) -> list[TensorCheck]:
    """Compare every rewritten tensor of an ONNX model with what base and adapter say it should be.

    Args:
        base: the base model.
        path: the exported directory, or its ``model.onnx``.
        peft: the adapter.

    Raises:
        FileError: the model cannot be read, or lacks a tensor that the adapter changes.
        MissingDependency: onnx is not installed.
    """
    file = path / MODEL if path.is_dir() else path
    tensors = _initializers(file)
    return check_tensors(base, peft, lambda parameter, name: _stored(tensors, parameter, base[name].shape[-1], file))


def _initializers(file: Path) -> dict[str, Any]:
    try:
        import onnx

        broken = importlib.import_module("google.protobuf.message").DecodeError
    except ImportError as error:
        raise MissingDependency("onnx", "onnx") from error
    try:
        model = onnx.load(str(file), load_external_data=False)
    except (OSError, broken) as error:
        raise FileError(f"Cannot read {file}; it is missing, truncated or damaged, export it again.") from error
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _stored(tensors: dict[str, Any], parameter: str, columns: int, file: Path) -> tuple[str, np.ndarray]:
    """Return how the file holds a parameter, and what, in float32."""
    from onnx import numpy_helper

    def read(name: str) -> np.ndarray:
        return np.asarray(numpy_helper.to_array(tensors[name], str(file.parent)))

    names = [name for name in ("int8", "int4", "scales", "zeros") if f"{parameter}.{name}" in tensors]
    if names[1:2] == ["scales"]:
        return names[0], dequantize_blocks({name: read(f"{parameter}.{name}") for name in names}, columns)
    if parameter not in tensors:
        raise FileError(f"{file} lacks the tensor {parameter}, which the adapter changes; export it again.")
    return "float32", read(parameter).astype(np.float32)
