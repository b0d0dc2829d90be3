"""Read and write GGUF files: metadata kept as the bytes it came in, tensors as views of the mapped file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3, little-endian). The reader is ours because it
is on the hot path of every export: the vocabulary (tens of thousands of strings) is only decoded when someone asks for it.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import reprlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cdcda_export.errors import FileError
from cdcda_export.ggml import GgmlType, row_bytes, type_by_id
from cdcda_export.gguf_keys import wanted_instead

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32

# Value types of the specification: id -> struct format; 8 is a string, 9 an array.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY, _UINT32, _BOOL, _FLOAT32 = 8, 9, 4, 7, 6
_MAX_ELEMENTS = 1 << 40
_WRITE_BYTES = 1 << 30  # Linux writes at most 2 GB at once


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: ``shape`` in numpy order (rows first, the contiguous dimension last)."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    data: np.ndarray
    """The stored bytes, uint8, shape (n_bytes,)."""
    start: int = 0
    """Where they begin in the file."""

    @property
    def rows(self) -> int:
        """Number of rows: the product of all dimensions but the last."""
        return int(np.prod(self.shape[:-1], dtype=np.int64))


class _Cursor:
    """Reads little-endian values and refuses to leave the file."""

    def __init__(self, buffer: mmap.mmap | bytes, path: Path) -> None:
        self.buffer, self.path, self.at, self.size = buffer, path, 0, len(buffer)

    def skip(self, n: int) -> int:
        start = self.at
        if n < 0 or start + n > self.size:
            raise FileError(f"{self.path} is truncated: its header ends beyond the file's {self.size} bytes.")
        self.at = start + n
        return start

    def unpack(self, fmt: str) -> Any:
        size = struct.calcsize(fmt)
        return struct.unpack_from(fmt, self.buffer, self.skip(size))[0]

    def string(self) -> bytes:
        length = self.unpack("<Q")
        start = self.skip(length)
        return bytes(self.buffer[start : start + length])

    def skip_value(self, kind: int) -> None:
        """Move past a value without decoding it."""
        if kind in _SCALARS:
            self.skip(struct.calcsize(_SCALARS[kind]))
        elif kind == _STRING:
            self.skip(self.unpack("<Q"))
        elif kind == _ARRAY:
            inner, count = self.unpack("<I"), self.unpack("<Q")
            if inner in _SCALARS:
                self.skip(count * struct.calcsize(_SCALARS[inner]))
            elif inner == _STRING:
                self._skip_strings(count)
            else:
                raise FileError(f"{self.path} holds an array of unknown type {inner}.")
        else:
            raise FileError(f"{self.path} holds a value of unknown type {kind}.")

    def _skip_strings(self, count: int) -> None:
        read, at, buffer, size = struct.Struct("<Q").unpack_from, self.at, self.buffer, self.size
        for _ in range(count):
            if at + 8 > size:
                raise FileError(f"{self.path} is truncated inside its vocabulary.")
            at += 8 + read(buffer, at)[0]
        self.at = at
        self.skip(0)

    def value(self, kind: int) -> Any:
        """Decode a value: scalars, str, or a list of them (numbers as numpy arrays)."""
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])
        if kind == _STRING:
            return self.string().decode("utf-8", errors="replace")
        inner, count = self.unpack("<I"), self.unpack("<Q")
        if inner == _STRING:
            return [self.string().decode("utf-8", errors="replace") for _ in range(count)]
        dtype = np.dtype(_SCALARS[inner].replace("?", "B"))
        start = self.skip(count * dtype.itemsize)
        return np.frombuffer(self.buffer, dtype, count, start)


class GgufFile(Mapping[str, Tensor]):
    """A GGUF file, mapped: a mapping of tensor names to tensors, with metadata beside it.

    Raises:
        FileError: the file is missing, no GGUF, of another version or byte order, or shorter than it claims.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            reason = "it is empty" if isinstance(error, ValueError) else (error.strerror or str(error))
            raise FileError(f"Cannot read the GGUF file {self.path}: {reason}.") from error
        cursor = _Cursor(self._map, self.path)
        if bytes(self._map[:4]) != MAGIC:
            raise FileError(f"{self.path} is not a GGUF file (it does not begin with 'GGUF').")
        cursor.skip(4)
        version = cursor.unpack("<I")
        if version not in (2, VERSION):
            raise FileError(f"{self.path} is GGUF version {version}; only little-endian versions 2 and 3 can be read.")
        n_tensors, n_pairs = cursor.unpack("<Q"), cursor.unpack("<Q")
        if max(n_tensors, n_pairs) > 1_000_000:
            raise FileError(f"{self.path} is damaged: it claims {n_tensors} tensors and {n_pairs} metadata entries.")
        self._pairs = self._read_pairs(cursor, n_pairs)
        self._tensors = self._read_tensors(cursor, n_tensors)

    def _read_pairs(self, cursor: _Cursor, count: int) -> dict[str, tuple[int, int, int]]:
        pairs: dict[str, tuple[int, int, int]] = {}
        for _ in range(count):
            key = cursor.string().decode("utf-8", errors="replace")
            kind = cursor.unpack("<I")
            start = cursor.at
            cursor.skip_value(kind)
            pairs[key] = (kind, start, cursor.at)
        return pairs

    def _read_tensors(self, cursor: _Cursor, count: int) -> dict[str, Tensor]:
        infos = []
        for _ in range(count):
            name = cursor.string().decode("utf-8", errors="replace")
            n_dims = cursor.unpack("<I")
            if not 1 <= n_dims <= 4:
                raise FileError(f"{self.path} is damaged: tensor {name!r} has {n_dims} dimensions.")
            shape = tuple(cursor.unpack("<Q") for _ in range(n_dims))[::-1]
            infos.append((name, shape, cursor.unpack("<I"), cursor.unpack("<Q")))
        alignment = self.get_value("general.alignment", DEFAULT_ALIGNMENT)
        data_start = -(-cursor.at // alignment) * alignment
        tensors = {}
        for name, shape, type_id, offset in infos:
            kind = type_by_id(type_id, f"{self.path}: tensor {name}")
            if not 0 < math.prod(shape) <= _MAX_ELEMENTS or shape[-1] % kind.block_size:
                raise FileError(f"{self.path} is damaged: tensor {name!r} of type {kind.name} has shape {list(shape)}.")
            size = row_bytes(kind, shape[-1]) * int(np.prod(shape[:-1], dtype=np.int64))
            start = data_start + offset
            if start + size > len(self._map):
                raise FileError(
                    f"{self.path} is truncated: tensor {name!r} ends at byte {start + size}, the file has {len(self._map)}; fetch it again."
                )
            tensors[name] = Tensor(name, shape, kind, np.frombuffer(self._map, np.uint8, size, start), start)
        return tensors

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor by name."""
        return self._tensors[name]

    def __iter__(self) -> Any:
        """Iterate over tensor names in file order."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._tensors)

    def release(self, name: str) -> None:
        """Let go of the memory that reading a tensor took; the file is mapped still, and reading it again brings it back."""
        tensor = self._tensors[name]
        first = -(-tensor.start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.start + tensor.data.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED, first, length)

    def keys_of_metadata(self) -> list[str]:
        """Return all metadata keys in file order."""
        return list(self._pairs)

    def get_value(self, key: str, default: Any = None) -> Any:
        """Decode one metadata value; numbers in arrays come as numpy arrays.

        Raises:
            FileError: it is a count, an id, a list of tokens, and so on by its key, but holds something else.
        """
        if key not in self._pairs:
            return default
        kind, start, _ = self._pairs[key]
        cursor = _Cursor(self._map, self.path)
        cursor.at = start
        value = cursor.value(kind)
        wanted = wanted_instead(key, value)
        if wanted:
            found = " ".join(reprlib.repr(value).split())
            raise FileError(f"{self.path} cannot be used: its metadata '{key}' is {found}, not {wanted}.")
        return value

    def raw_pair(self, key: str) -> bytes:
        """Return one metadata entry (key, type, value) exactly as it is stored."""
        kind, start, end = self._pairs[key]
        return _string(key) + struct.pack("<I", kind) + bytes(self._map[start:end])

    @cached_property
    def architecture(self) -> str:
        """The architecture's name, for example ``llama``."""
        return str(self.get_value("general.architecture", ""))

    def hparam(self, key: str, default: Any = None) -> Any:
        """Return an architecture-specific value, for example ``block_count``.

        Raises:
            FileError: the file does not have it and there is no default, or it is no number of its kind.
        """
        value = self.get_value(f"{self.architecture}.{key}", default)
        if value is None:
            raise FileError(f"{self.path} has no metadata '{self.architecture}.{key}', so it cannot be used as a base model.")
        return value

    def type_histogram(self) -> dict[str, int]:
        """Return how many tensors are stored in each type, most frequent first."""
        counts: dict[str, int] = {}
        for tensor in self.values():
            counts[tensor.type.name] = counts.get(tensor.type.name, 0) + 1
        return dict(sorted(counts.items(), key=lambda pair: -pair[1]))


def _string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pack_pair(key: str, value: str | bool | int | float | list[str]) -> bytes:
    """Encode a metadata entry: str, bool, unsigned 32-bit int, 32-bit float, or a list of str."""
    if isinstance(value, str):
        body = struct.pack("<I", _STRING) + _string(value)
    elif isinstance(value, bool):
        body = struct.pack("<I?", _BOOL, value)
    elif isinstance(value, int):
        body = struct.pack("<II", _UINT32, value)
    elif isinstance(value, float):
        body = struct.pack("<If", _FLOAT32, value)
    else:
        body = struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(_string(item) for item in value)
    return _string(key) + body


class TensorSource(Protocol):
    """A tensor whose bytes are made when it is written, so that only one is in memory at a time."""

    @property
    def name(self) -> str:
        """The tensor's name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""

    @property
    def type(self) -> GgmlType:
        """How it is stored."""

    def read(self) -> np.ndarray:
        """Return the stored bytes, uint8."""


@dataclass(frozen=True)
class InMemory:
    """A small tensor whose bytes are at hand."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    data: np.ndarray

    def read(self) -> np.ndarray:
        """Return the bytes."""
        return self.data


def write_gguf(
    path: Path, pairs: Iterable[bytes], tensors: Iterable[TensorSource], alignment: int = DEFAULT_ALIGNMENT, on_tensor: Any = None
) -> str:
    """Stream a GGUF file to disk and fsync it; the caller owns the name (write beside, then rename).

    Args:
        path: the file to create.
        pairs: encoded metadata entries (``GgufFile.raw_pair``, ``pack_pair``).
        tensors: what to write, in order; ``read()`` is called once for each.
        alignment: bytes that every tensor starts at a multiple of; must agree with ``general.alignment``.
        on_tensor: called with each tensor's name after it was written.

    Returns:
        The file's SHA-256 as hex, taken while it was written.
    """
    entries, sources = list(pairs), list(tensors)
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(sources), len(entries)) + b"".join(entries))
    offset = 0
    for source in sources:
        header += _string(source.name) + struct.pack("<I", len(source.shape))
        header += b"".join(struct.pack("<Q", d) for d in reversed(source.shape))
        header += struct.pack("<IQ", source.type.id, offset)
        size = row_bytes(source.type, source.shape[-1]) * int(np.prod(source.shape[:-1], dtype=np.int64))
        offset += -(-size // alignment) * alignment
    header += b"\0" * (-len(header) % alignment)
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb", buffering=0) as stream:
        _write(stream, header, digest)
        for source in sources:
            data = np.ascontiguousarray(source.read())
            _write(stream, data.data.cast("B"), digest)
            if data.nbytes % alignment:
                _write(stream, b"\0" * (-data.nbytes % alignment), digest)
            if on_tensor is not None:
                on_tensor(source.name)
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _write(stream: FileIO, data: bytes | bytearray | memoryview, digest: Any) -> None:
    view, at = memoryview(data), 0
    digest.update(view)
    while at < len(view):
        at += stream.write(view[at : at + _WRITE_BYTES])
