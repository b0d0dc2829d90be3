"""Read safetensors files from anywhere: a header that is checked, and tensors that are read one at a time and not kept.

Format: https://github.com/huggingface/safetensors#format (8 bytes of length, JSON, data without gaps). The library's own reader hands out
all tensors at once beside the file's bytes, or none in bfloat16 to numpy.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cdcda_export.errors import FileError

_MAX_HEADER = 100 << 20
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATS: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its type in the format's words, its shape, and its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """Return a file's tensors in the order of its header.

    Raises:
        FileError: it cannot be read, is cut short, or is no safetensors file.
    """
    entries, descriptor = _open(path)
    os.close(descriptor)
    return entries


def _open(path: Path) -> tuple[dict[str, Entry], int]:
    try:
        with path.open("rb") as stream:
            return _parse(stream.read(8), stream.read, os.fstat(stream.fileno()).st_size), os.dup(stream.fileno())
    except OSError as error:
        raise FileError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FileError(_broken(path)) from error


def _broken(path: Path) -> str:
    return f"{path} is truncated or no safetensors file; fetch it again."


def _parse(prefix: bytes, read: Callable[[int], bytes], size: int) -> dict[str, Entry]:
    length = int.from_bytes(prefix, "little")
    if not 0 < length <= min(_MAX_HEADER, size - 8):
        raise ValueError("header")
    header = json.loads(read(length))
    entries = {name: _entry(entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
    at = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.bytes)):
        if entry.start != at:  # a gap or an overlap
            raise ValueError("offsets")
        at += entry.bytes
    if at != size:
        raise ValueError("size")
    return entries


def _entry(entry: dict[str, Any], data: int) -> Entry:
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if len(shape) > 8 or any(type(number) is not int or number < 0 for number in (*shape, begin, end - begin)):
        raise ValueError("numbers")
    dtype = str(entry["dtype"])
    if dtype in _ITEM_BYTES and end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError("bytes")
    return Entry(dtype, shape, data + begin, end - begin)


class OneAtATime(Mapping[str, np.ndarray]):
    """Arrays that are made whenever one is asked for and are not kept."""

    def __init__(self, makers: Mapping[str, Callable[[], np.ndarray]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> np.ndarray:
        """Make one."""
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        """Say whether there is one, without making it."""
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._makers)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._makers)


class FloatReader:
    """A safetensors file that stays open, read tensor by tensor as float32.

    The content is that of one moment: a file of the same name that replaces it is not read.

    Attributes:
        entries: what it holds.

    Raises:
        FileError: see ``read_header``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries, self._descriptor = _open(path)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, name: str) -> np.ndarray:
        """Return one tensor as float32; its type must be one of ``FLOATS``.

        Raises:
            FileError: the file was cut short meanwhile, or its disk fails.
        """
        entry = self.entries[name]
        stored = np.empty(entry.shape, FLOATS[entry.dtype])
        into, at = stored.reshape(-1).data.cast("B"), 0
        while at < entry.bytes:  # Linux reads at most 2 GB at once
            try:
                got = os.preadv(self._descriptor, [into[at:]], entry.start + at)
            except OSError as error:
                raise FileError(f"Cannot read {self.path}: {error.strerror or error}.") from error
            if not got:
                raise FileError(_broken(self.path))
            at += got
        if entry.dtype == "BF16":
            wide = stored.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        with np.errstate(over="ignore"):  # float64 may become infinite, which is refused by those who look
            return stored.astype(np.float32, copy=False)
