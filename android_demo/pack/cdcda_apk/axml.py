"""The application id in Android's binary XML: one string of the pool is replaced, and what stands behind it moves.

The format is that of AOSP's ``frameworks/base/libs/androidfw/include/androidfw/ResourceTypes.h``: a chunk around the file, in it the pool
of all strings, then the tree, which names strings by number.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from cdcda_export.errors import BuildError

_XML, _POOL = 0x0003, 0x0001
_UTF8 = 1 << 8
_HEADER = 28  # bytes of a pool's header


def renamed(manifest: bytes, old: str, new: str) -> bytes:
    """Return a binary manifest in which one string is another.

    Args:
        manifest: ``AndroidManifest.xml`` as aapt2 wrote it.
        old: the string; every attribute that is exactly this becomes ``new``.
        new: takes its place.

    Raises:
        BuildError: this is no binary manifest, or it does not hold the string.
    """
    try:
        kind, _, size = struct.unpack_from("<HHI", manifest, 0)
        pool_kind, header, pool_size = struct.unpack_from("<HHI", manifest, 8)
        if (kind, pool_kind, header, size) != (_XML, _POOL, _HEADER, len(manifest)):
            raise ValueError("no binary XML")
        count, styles, flags, start, _ = struct.unpack_from("<5I", manifest, 16)
        offsets = struct.unpack_from(f"<{count}I", manifest, 8 + _HEADER)
        strings = [_read(manifest, 8 + start + offset, bool(flags & _UTF8)) for offset in offsets]
    except (struct.error, IndexError, ValueError) as error:
        raise BuildError(f"The shell's manifest cannot be read ({error}); build the shell again.") from error
    if old not in strings or styles:
        raise BuildError(f"The shell's manifest does not name the application id {old}; build the shell again.")
    pool = _pool([new if one == old else one for one in strings], flags)
    rest = manifest[8 + pool_size :]
    return struct.pack("<HHI", _XML, 8, 8 + len(pool) + len(rest)) + pool + rest


def _read(data: bytes, at: int, utf8: bool) -> str:
    if utf8:
        _, at = _length8(data, at)  # in UTF-16 units
        length, at = _length8(data, at)
        return data[at : at + length].decode("utf-8")
    length = struct.unpack_from("<H", data, at)[0]
    at += 2
    if length & 0x8000:
        length, at = (length & 0x7FFF) << 16 | struct.unpack_from("<H", data, at)[0], at + 2
    return data[at : at + 2 * length].decode("utf-16-le")


def _length8(data: bytes, at: int) -> tuple[int, int]:
    first = data[at]
    return ((first & 0x7F) << 8 | data[at + 1], at + 2) if first & 0x80 else (first, at + 1)


def _pool(strings: Sequence[str], flags: int) -> bytes:
    """Return a pool of strings in UTF-16, which every Android reads."""
    offsets, data = [], b""
    for text in strings:
        offsets.append(len(data))
        units = text.encode("utf-16-le")
        length = len(units) // 2
        head = struct.pack("<H", length) if length < 0x8000 else struct.pack("<HH", length >> 16 | 0x8000, length & 0xFFFF)
        data += head + units + b"\0\0"
    data += b"\0" * (-len(data) % 4)
    start = _HEADER + 4 * len(strings)
    # Neither UTF-8 nor sorted any more.
    head = struct.pack("<HHI5I", _POOL, _HEADER, start + len(data), len(strings), 0, flags & ~(_UTF8 | 1), start, 0)
    return head + struct.pack(f"<{len(offsets)}I", *offsets) + data
