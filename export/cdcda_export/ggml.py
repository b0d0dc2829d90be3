"""ggml's tensor types, and its own quantizer called through ctypes on every core.

The routines are those of ``libggml-base`` inside the installed llama-cpp-python, so a tensor quantized here has the very bytes that
``llama-quantize`` would write.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from cdcda_export.errors import FileError, MissingDependency


@dataclass(frozen=True)
class GgmlType:
    """A storage type: ``block_size`` weights take ``block_bytes`` bytes."""

    name: str
    id: int
    block_size: int
    block_bytes: int


# name, id, weights per block, bytes per block: ggml/include/ggml.h and ggml-common.h.
TYPES: dict[str, GgmlType] = {
    row[0]: GgmlType(*row)
    for row in (
        ("F32", 0, 1, 4),
        ("F16", 1, 1, 2),
        ("Q4_0", 2, 32, 18),
        ("Q4_1", 3, 32, 20),
        ("Q5_0", 6, 32, 22),
        ("Q5_1", 7, 32, 24),
        ("Q8_0", 8, 32, 34),
        ("Q2_K", 10, 256, 84),
        ("Q3_K", 11, 256, 110),
        ("Q4_K", 12, 256, 144),
        ("Q5_K", 13, 256, 176),
        ("Q6_K", 14, 256, 210),
        ("IQ4_NL", 20, 32, 18),
        ("IQ4_XS", 23, 256, 136),
        ("I8", 24, 1, 1),
        ("I16", 25, 1, 2),
        ("I32", 26, 1, 4),
        ("I64", 27, 1, 8),
        ("F64", 28, 1, 8),
        ("BF16", 30, 1, 2),
    )
}
_BY_ID = {kind.id: kind for kind in TYPES.values()}
_CHUNK_WEIGHTS = 1 << 20


def type_by_id(type_id: int, where: str) -> GgmlType:
    """Return a type by ggml's number.

    Raises:
        FileError: the type is not one that we can read.
    """
    if type_id not in _BY_ID:
        raise FileError(f"{where} is stored in ggml type {type_id}, which cannot be read; use a base in one of {', '.join(TYPES)}.")
    return _BY_ID[type_id]


def row_bytes(kind: GgmlType, columns: int) -> int:
    """Return the stored size of one row of ``columns`` weights, in bytes."""
    return columns // kind.block_size * kind.block_bytes


class _Traits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


@cache
def _library() -> ctypes.CDLL:
    """Load libggml-base from llama-cpp-python without importing llama_cpp itself (0.3 s saved)."""
    import importlib.util

    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise MissingDependency("llama-cpp-python", "export")
    folder = Path(spec.origin).parent / "lib"
    found = sorted(folder.glob("libggml-base.so")) + sorted(folder.glob("libggml-base.dylib")) + sorted(folder.glob("ggml-base.dll"))
    if not found:
        raise FileError(f"There is no libggml-base in {folder}; reinstall llama-cpp-python from source with shared libraries.")
    library = ctypes.CDLL(str(found[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return library


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _row_chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    step = max(1, _CHUNK_WEIGHTS // max(1, columns))
    return [(at, min(step, rows - at)) for at in range(0, rows, step)]


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_threads(), thread_name_prefix="ggml")


def quantize(weights: np.ndarray, kind: GgmlType, importance: np.ndarray | None = None) -> np.ndarray:
    """Quantize a matrix row by row.

    Args:
        weights: float32, shape (rows, columns); columns a multiple of ``kind.block_size``.
        kind: the target type.
        importance: float32, shape (columns,): weight of each input channel in the rounding error; None for none.

    Returns:
        The stored bytes, uint8, shape (rows * row_bytes,).
    """
    flat = np.ascontiguousarray(weights, dtype=np.float32).reshape(-1, weights.shape[-1])
    rows, columns = flat.shape
    if kind.name == "F32":
        return flat.reshape(-1).view(np.uint8)
    if kind.name == "F16":
        return flat.astype(np.float16).reshape(-1).view(np.uint8)
    out = np.empty(rows * row_bytes(kind, columns), np.uint8)
    library = _library()
    library.ggml_quantize_init(kind.id)
    weight_of = None if importance is None else np.ascontiguousarray(importance, np.float32)
    pointer = None if weight_of is None else weight_of.ctypes.data

    def run(chunk: tuple[int, int]) -> None:
        start, count = chunk
        library.ggml_quantize_chunk(kind.id, flat.ctypes.data, out.ctypes.data, start * columns, count, columns, pointer)

    list(_pool().map(run, _row_chunks(rows, columns)))
    return out


def dequantize(data: np.ndarray, kind: GgmlType, shape: tuple[int, ...]) -> np.ndarray:
    """Return a stored tensor as float32 in its shape (rows first)."""
    if kind.name == "F32":
        return data.view(np.float32).reshape(shape)
    if kind.name == "F16":
        return data.view(np.float16).astype(np.float32).reshape(shape)
    columns = shape[-1]
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    out = np.empty((rows, columns), np.float32)
    source = np.ascontiguousarray(data)
    to_float = _library().ggml_get_type_traits(kind.id).contents.to_float
    stride = row_bytes(kind, columns)

    def run(chunk: tuple[int, int]) -> None:
        start, count = chunk
        to_float(source.ctypes.data + start * stride, out.ctypes.data + start * columns * 4, count * columns)

    list(_pool().map(run, _row_chunks(rows, columns)))
    return out.reshape(shape)
