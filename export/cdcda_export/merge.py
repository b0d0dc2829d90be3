"""Merge an adapter into a base GGUF and quantize: one tensor at a time, everything else of the file copied."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cdcda_export.adapter import Adapter
from cdcda_export.errors import DiskFull, is_disk_full
from cdcda_export.ggml import TYPES, GgmlType, dequantize, quantize, row_bytes
from cdcda_export.gguf import DEFAULT_ALIGNMENT, GgufFile, InMemory, Tensor, TensorSource, pack_pair, write_gguf
from cdcda_export.quantization import Quant, is_double_quantized

_REWRITTEN_KEYS = ("general.file_type", "general.quantization_version")
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of the artifact, made when it is written: dequantize, add the change in float32, quantize once."""

    base: Tensor
    adapter: Adapter | None
    type: GgmlType

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.base.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape, rows first."""
        return self.base.shape

    def merged(self) -> np.ndarray:
        """Return W + scale * B A in float32."""
        if self.adapter is not None and self.name in self.adapter.replaced:
            return self.adapter.replaced[self.name]
        weights = dequantize(self.base.data, self.base.type, self.base.shape)
        delta = None if self.adapter is None else self.adapter.deltas.get(self.name)
        return weights if delta is None else weights + delta.dense()

    def read(self) -> np.ndarray:
        """Return the stored bytes; untouched tensors that keep their type are copied bit for bit."""
        touched = self.adapter is not None and self.name in self.adapter.touched
        if not touched and self.type == self.base.type:
            return self.base.data
        return quantize(self.merged(), self.type)


@dataclass(frozen=True)
class GgufResult:
    """A written GGUF."""

    path: Path
    bytes: int
    types: dict[str, int]
    double_quantized: str | None
    rewritten: int


def metadata_of(base: GgufFile, quant: Quant) -> list[bytes]:
    """Return the base's metadata entry by entry as stored, but for the two that name the quantization."""
    pairs = [base.raw_pair(key) for key in base.keys_of_metadata() if key not in _REWRITTEN_KEYS]
    return [
        *pairs,
        pack_pair("general.file_type", quant.file_type),
        pack_pair("general.quantization_version", _QUANTIZATION_VERSION),
    ]


def merge_to_gguf(
    base: GgufFile,
    adapter: Adapter | None,
    types: dict[str, GgmlType],
    quant: Quant,
    path: Path,
    on_tensor: Callable[[str], None] | None = None,
) -> GgufResult:
    """Write base + adapter as one GGUF of the given types.

    Args:
        base: the base model.
        adapter: what to add; None quantizes the base alone.
        types: the type of every tensor (``choose_types``).
        quant: the name written into the file.
        path: where to; the caller gives a name inside a partial directory.
        on_tensor: called after each tensor.

    Raises:
        DiskFull: there is no room; nothing is left behind.
    """
    sources: list[TensorSource] = [MergedTensor(tensor, adapter, types[name]) for name, tensor in base.items()]
    write_or_explain(path, metadata_of(base, quant), sources, int(base.get_value("general.alignment", DEFAULT_ALIGNMENT)), on_tensor)
    histogram: dict[str, int] = {}
    for kind in types.values():
        histogram[kind.name] = histogram.get(kind.name, 0) + 1
    return GgufResult(
        path=path,
        bytes=path.stat().st_size,
        types=dict(sorted(histogram.items(), key=lambda pair: -pair[1])),
        double_quantized=is_double_quantized(base, types),
        rewritten=0 if adapter is None else len(adapter.touched),
    )


def write_lora_gguf(base: GgufFile, adapter: Adapter, path: Path) -> GgufResult:
    """Write the adapter alone as a GGUF that llama.cpp loads with ``--lora``.

    llama.cpp scales by alpha / rank of each pair, so a pair whose scale differs has the ratio folded into its B.

    Raises:
        AdapterError: the adapter replaces whole tensors, which this format cannot hold.
    """
    from cdcda_export.errors import AdapterError

    if adapter.replaced:
        raise AdapterError(f"{adapter.path} replaces whole tensors ({', '.join(adapter.replaced)}): use --format gguf, which merges them.")
    alpha = float(adapter.config.get("lora_alpha", 8))
    pairs = [
        pack_pair("general.architecture", base.architecture),
        pack_pair("general.type", "adapter"),
        pack_pair("adapter.type", "lora"),
        pack_pair("adapter.lora.alpha", alpha),
        pack_pair("general.file_type", 0),
        pack_pair("general.quantization_version", _QUANTIZATION_VERSION),
    ]
    tensors: list[TensorSource] = []
    for name, delta in adapter.deltas.items():
        ratio = np.float32(delta.scale * delta.down.shape[0] / alpha)
        down = np.ascontiguousarray(delta.down, np.float32)
        up = np.ascontiguousarray(delta.up if ratio == 1 else delta.up * ratio, np.float32)
        tensors.append(InMemory(f"{name}.lora_a", down.shape, TYPES["F32"], down.reshape(-1).view(np.uint8)))
        tensors.append(InMemory(f"{name}.lora_b", up.shape, TYPES["F32"], up.reshape(-1).view(np.uint8)))
    write_or_explain(path, pairs, tensors, DEFAULT_ALIGNMENT, None)
    return GgufResult(path, path.stat().st_size, {"F32": len(tensors)}, None, len(adapter.deltas))


def write_or_explain(
    path: Path, pairs: list[bytes], tensors: list[TensorSource], alignment: int, on_tensor: Callable[[str], None] | None
) -> None:
    """Write a GGUF after checking that there is room for it; a failed write leaves no file.

    Raises:
        DiskFull: there is not.
    """
    need = sum(row_bytes(t.type, t.shape[-1]) * int(np.prod(t.shape[:-1], dtype=np.int64)) for t in tensors) + sum(map(len, pairs))
    free = shutil.disk_usage(path.parent).free
    if free < need:
        raise DiskFull(
            f"{path.parent} has {free / 1e6:.0f} MB free, the artifact needs {need / 1e6:.0f} MB; free some space and run again."
        )
    try:
        write_gguf(path, pairs, tensors, alignment, on_tensor)
    except OSError as error:
        path.unlink(missing_ok=True)
        if is_disk_full(error):
            raise DiskFull(f"The disk filled up while {path.name} was written; free some space and run again.") from error
        raise
    os.chmod(path, 0o600)
