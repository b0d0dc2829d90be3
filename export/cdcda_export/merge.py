"""Merge an adapter into a base GGUF and quantize: only the tensors that it touches are computed, everything else is copied.

The tensors that no adapter touches are the same for every user, so their bytes in the target types are made once per base
(``quantized_base``) and kept. What is left flows through small buffers: while the cores rewrite the next tensors, the last one is
hashed and written.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cdcda_export.adapter import Adapter
from cdcda_export.cache import cached
from cdcda_export.errors import DiskFull, is_disk_full
from cdcda_export.ggml import TYPES, GgmlType, Rewrite, ggml_version, row_bytes
from cdcda_export.gguf import DEFAULT_ALIGNMENT, GgufFile, Tensor, TensorSource, pack_pair, write_gguf
from cdcda_export.quantization import IGNORE_IMPORTANCE, Quant, file_type_of, is_double_quantized

_REWRITTEN_KEYS = ("general.file_type", "general.quantization_version")
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
_AHEAD_BYTES = 8 << 20
# Goes into the key of every cached base: raise it when the bytes written for the same inputs change.
_CACHE_FORMAT = 1

Importance = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class GgufResult:
    """A written GGUF: its place, size and SHA-256, how many tensors have which type, and how many were computed for this file."""

    path: Path
    bytes: int
    sha256: str
    types: dict[str, int]
    double_quantized: str | None
    rewritten: int


@dataclass(frozen=True)
class _Copied:
    """A tensor whose bytes lie in a file already."""

    file: GgufFile
    tensor: Tensor

    def start(self) -> Callable[[], np.ndarray]:
        return lambda: self.tensor.data

    def done(self) -> None:
        self.file.release(self.tensor.name)


@dataclass(frozen=True)
class _Computed:
    """A tensor that is decoded, changed in float32 and quantized once; what it is made of is read when its turn comes."""

    base: GgufFile
    tensor: Tensor
    rewrite: Callable[[], Rewrite]

    def start(self) -> Callable[[], np.ndarray]:
        return self.rewrite().start()

    def done(self) -> None:
        self.base.release(self.tensor.name)


class _Line:
    """Tensors in file order, a few of them under way while one is written; memory stays at the few."""

    def __init__(self, steps: list[tuple[Tensor, GgmlType, _Copied | _Computed]]) -> None:
        self._waiting = deque(steps)
        self._going: deque[tuple[_Copied | _Computed, Callable[[], np.ndarray], int]] = deque()
        self._previous: _Copied | _Computed | None = None

    def next(self) -> np.ndarray:
        if self._previous is not None:
            self._previous.done()
        ahead = sum(size for _, _, size in self._going)
        while self._waiting and (not self._going or ahead < _AHEAD_BYTES):
            tensor, kind, step = self._waiting.popleft()
            size = 0 if isinstance(step, _Copied) else tensor.rows * row_bytes(kind, tensor.shape[-1])
            self._going.append((step, step.start(), size))
            ahead += size
        self._previous, wait, _ = self._going.popleft()
        return wait()


@dataclass(frozen=True)
class _InLine:
    name: str
    shape: tuple[int, ...]
    type: GgmlType
    line: _Line

    def read(self) -> np.ndarray:
        return self.line.next()


def metadata_of(base: GgufFile, quant: Quant) -> list[bytes]:
    """Return the base's metadata entry by entry as stored, but for the two that name the quantization."""
    pairs = [base.raw_pair(key) for key in base.keys_of_metadata() if key not in _REWRITTEN_KEYS]
    return [
        *pairs,
        pack_pair("general.file_type", file_type_of(base, quant)),
        pack_pair("general.quantization_version", QUANTIZATION_VERSION),
    ]


def merge_to_gguf(
    base: GgufFile,
    adapter: Adapter | None,
    types: Mapping[str, GgmlType],
    quant: Quant,
    path: Path,
    on_tensor: Callable[[str], None] | None = None,
    importance: Importance | None = None,
    quantized: GgufFile | None = None,
) -> GgufResult:
    """Write base + adapter as one GGUF of the given types.

    Args:
        base: the base model.
        adapter: what to add; None quantizes the base alone.
        types: the type of every tensor (``choose_types``).
        quant: the name written into the file.
        path: where to; the caller gives a name inside a partial directory.
        on_tensor: called after each tensor.
        importance: tensor -> mean squared input of each column, float32; None quantizes without.
        quantized: the base in these types (``quantized_base``), from which untouched tensors are copied.

    Raises:
        DiskFull: there is no room; nothing is left behind.
    """
    steps = [(tensor, types[name], _step(base, tensor, types[name], adapter, importance or {}, quantized)) for name, tensor in base.items()]
    line = _Line(steps)
    sources: list[TensorSource] = [_InLine(tensor.name, tensor.shape, kind, line) for tensor, kind, _ in steps]
    alignment = int(base.get_value("general.alignment", DEFAULT_ALIGNMENT))
    sha256 = write_or_explain(path, metadata_of(base, quant), sources, alignment, on_tensor)
    histogram: dict[str, int] = {}
    for kind in types.values():
        histogram[kind.name] = histogram.get(kind.name, 0) + 1
    return GgufResult(
        path=path,
        bytes=path.stat().st_size,
        sha256=sha256,
        types=dict(sorted(histogram.items(), key=lambda pair: -pair[1])),
        double_quantized=is_double_quantized(base, dict(types)),
        rewritten=sum(isinstance(step, _Computed) for _, _, step in steps),
    )


def _step(
    base: GgufFile, tensor: Tensor, kind: GgmlType, adapter: Adapter | None, importance: Importance, quantized: GgufFile | None
) -> _Copied | _Computed:
    name = tensor.name
    weight_of = None if kind.name in IGNORE_IMPORTANCE else importance.get(name)
    if adapter is not None and name in adapter.replaced:
        replaced = adapter.replaced
        return _Computed(base, tensor, lambda: _whole(replaced[name], kind, weight_of))
    delta = None if adapter is None else adapter.deltas.get(name)
    if delta is None and kind == tensor.type:
        return _Copied(base, tensor)
    if delta is None and weight_of is None and quantized is not None:
        return _Copied(quantized, quantized[name])
    change = None if delta is None else (delta.up, delta.down, delta.scale)
    return _Computed(base, tensor, lambda: Rewrite(tensor.data, tensor.type, tensor.shape, kind, change, weight_of))


def _whole(weights: np.ndarray, kind: GgmlType, weight_of: np.ndarray | None) -> Rewrite:
    floats = np.ascontiguousarray(weights, np.float32)
    return Rewrite(floats.reshape(-1).view(np.uint8), TYPES["F32"], floats.shape, kind, importance=weight_of)


def quantized_base(
    base: GgufFile,
    base_sha256: str,
    types: Mapping[str, GgmlType],
    quant: Quant,
    on_tensor: Callable[[str], None] | None = None,
) -> GgufFile:
    """Return the base alone in these types, made once and kept in the cache folder.

    Raises:
        DiskFull: there is no room for it.
    """
    inputs: dict[str, Any] = {
        "base": base_sha256,
        "file_type": file_type_of(base, quant),
        "types": [f"{name}={kind.name}" for name, kind in types.items()],
        "ggml": ggml_version(),
        "format": _CACHE_FORMAT,
    }

    def build(folder: Path) -> dict[str, Any]:
        result = merge_to_gguf(base, None, types, quant, folder / "model.gguf", on_tensor)
        return {"sha256": result.sha256}

    return GgufFile(cached("bases", inputs, build).directory / "model.gguf")


def untouched(base: GgufFile, adapter: Adapter, types: Mapping[str, GgmlType], importance: Importance | None = None) -> Iterator[str]:
    """Yield the tensors whose bytes can come from ``quantized_base``: no change, another type than the base's, no importance."""
    for name, tensor in base.items():
        weighed = name in (importance or {}) and types[name].name not in IGNORE_IMPORTANCE
        if name not in adapter.touched and types[name] != tensor.type and not weighed:
            yield name


def write_or_explain(
    path: Path, pairs: list[bytes], tensors: list[TensorSource], alignment: int, on_tensor: Callable[[str], None] | None
) -> str:
    """Write a GGUF after checking that there is room for it, and return its SHA-256; a failed write leaves no file.

    Raises:
        DiskFull: there is no room.
    """
    need = sum(row_bytes(t.type, t.shape[-1]) * int(np.prod(t.shape[:-1], dtype=np.int64)) for t in tensors) + sum(map(len, pairs))
    free = shutil.disk_usage(path.parent).free
    if free < need:
        raise DiskFull(
            f"{path.parent} has {free / 1e6:.0f} MB free, the artifact needs {need / 1e6:.0f} MB; free some space and run again."
        )
    try:
        sha256 = write_gguf(path, pairs, tensors, alignment, on_tensor)
    except OSError as error:
        path.unlink(missing_ok=True)
        if is_disk_full(error):
            raise DiskFull(f"The disk filled up while {path.name} was written; free some space and run again.") from error
        raise
    os.chmod(path, 0o600)
    return sha256
