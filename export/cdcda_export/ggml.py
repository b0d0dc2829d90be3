"""ggml's tensor types, and its own quantizer called through ctypes on every core.

The routines are those of ``libggml-base`` inside the installed llama-cpp-python, so a tensor quantized here has the very bytes that
``llama-quantize`` would write.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from cdcda_export.errors import FileError, MissingDependency
from cdcda_export.runtime import cpu_threads


@dataclass(frozen=True)
class GgmlType:
    """A storage type: ``block_size`` weights take ``block_bytes`` bytes."""

    name: str
    id: int
    block_size: int
    block_bytes: int


# name, id, weights per block, bytes per block: ggml/include/ggml.h and ggml-common.h. Integers and F64, which no language model here
# stores, are left out: ggml has no routine that decodes them, and calling what is not there ends the process.
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
        ("BF16", 30, 1, 2),
    )
}
_BY_ID = {kind.id: kind for kind in TYPES.values()}
_CHUNK_WEIGHTS = 1 << 15  # 128 KiB of float32: decoded, changed and quantized without leaving a core's cache


def type_by_id(type_id: int, where: str) -> GgmlType:
    """Return a type by ggml's number.

    Raises:
        FileError: the type is not one that we can read.
    """
    if type_id not in _BY_ID:
        raise FileError(f"{where} is stored in ggml type {type_id}, which cannot be read; use a base in one of {', '.join(TYPES)}.")
    return _BY_ID[type_id]


@cache
def ggml_version() -> str:
    """Return the version of the package that carries the quantizer: what it writes may change with it."""
    from importlib import metadata

    try:
        return metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError as error:
        raise MissingDependency("llama-cpp-python", "export") from error


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


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cpu_threads(), thread_name_prefix="ggml")


class _Scratch(threading.local):
    """Two float32 buffers for each thread: they stay in its cache from one chunk to the next."""

    def __init__(self) -> None:
        self.weights = np.empty(0, np.float32)
        self.change = np.empty(0, np.float32)

    def take(self, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
        if self.weights.size < rows * columns:
            self.weights, self.change = np.empty(rows * columns, np.float32), np.empty(rows * columns, np.float32)
        return self.weights[: rows * columns].reshape(rows, columns), self.change[: rows * columns].reshape(rows, columns)


_scratch = _Scratch()


@dataclass(frozen=True)
class Rewrite:
    """A tensor on its way from one type to another, with a low-rank change added in float32 between.

    ``change`` is (B, A, scale): B float32 (rows, rank), A float32 (rank, columns). The order of operations is peft's, so that the
    result is bit for bit that of merging there: W + (B A) * scale.
    """

    data: np.ndarray
    source: GgmlType
    shape: tuple[int, ...]
    target: GgmlType
    change: tuple[np.ndarray, np.ndarray, float] | None = None
    importance: np.ndarray | None = None

    def start(self) -> Callable[[], np.ndarray]:
        """Begin on every core; the function returned waits for the stored bytes, uint8."""
        columns = self.shape[-1]
        rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        out = np.empty(rows * row_bytes(self.target, columns), np.uint8)
        library = _library()
        library.ggml_quantize_init(self.target.id)
        share = -(-rows // cpu_threads())
        parts = [_pool().submit(self._rows, library, out, at, min(rows, at + share)) for at in range(0, rows, share)]

        def wait() -> np.ndarray:
            for part in parts:
                part.result()
            return out

        return wait

    def _rows(self, library: ctypes.CDLL, out: np.ndarray, first: int, last: int) -> None:
        columns = self.shape[-1]
        stride_in, stride_out = row_bytes(self.source, columns), row_bytes(self.target, columns)
        data, made = np.ascontiguousarray(self.data), out.ctypes.data
        floats = data.view(np.float32).reshape(-1, columns) if self.source.name == "F32" else None
        decode = library.ggml_get_type_traits(self.source.id).contents.to_float
        if floats is None and self.target.name == "F32" and self.change is None:
            decode(data.ctypes.data + first * stride_in, made + first * stride_out, (last - first) * columns)
            return
        weight_of = None if self.importance is None else np.ascontiguousarray(self.importance, np.float32)
        pointer = None if weight_of is None else weight_of.ctypes.data
        step = max(1, _CHUNK_WEIGHTS // columns)
        buffer, change = _scratch.take(min(step, last - first), columns)
        for at in range(first, last, step):
            count = min(step, last - at)
            block = buffer[:count]
            if floats is None:
                decode(data.ctypes.data + at * stride_in, block.ctypes.data, count * columns)
            elif self.change is not None:
                np.copyto(block, floats[at : at + count])
            else:
                block = floats[at : at + count]
            if self.change is not None:
                up, down, scale = self.change
                part = np.matmul(up[at : at + count], down, out=change[:count])
                part *= np.float32(scale)
                block += part
            library.ggml_quantize_chunk(self.target.id, block.ctypes.data, made + at * stride_out, 0, count, columns, pointer)


def quantize(weights: np.ndarray, kind: GgmlType, importance: np.ndarray | None = None) -> np.ndarray:
    """Quantize a matrix row by row, on every core.

    Args:
        weights: float32, shape (..., columns); columns a multiple of ``kind.block_size``.
        kind: the target type.
        importance: float32, shape (columns,): weight of each input channel in the rounding error; None for none.

    Returns:
        The stored bytes, uint8.
    """
    floats = np.ascontiguousarray(weights, dtype=np.float32)
    return Rewrite(floats.reshape(-1).view(np.uint8), TYPES["F32"], floats.shape, kind, importance=importance).start()()


def dequantize(data: np.ndarray, kind: GgmlType, shape: tuple[int, ...]) -> np.ndarray:
    """Return a stored tensor as float32 in its shape (rows first), decoded on every core; float32 itself as a view."""
    if kind.name == "F32":
        return data.view(np.float32).reshape(shape)
    return Rewrite(data, kind, shape, TYPES["F32"]).start()().view(np.float32).reshape(shape)
