"""Zip files as Android wants them: what is not compressed lies where it can be mapped, and the same content gives the same bytes."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

_ALIGNMENT = 4
_EPOCH = (1980, 1, 1, 0, 0, 0)
_HEADER = 30  # bytes of a local file header, without name and extra field
_EXTRA = 0xD935  # the field that zipalign fills up with
_CHUNK = 1 << 20
_LEVEL = 9


def add(archive: zipfile.ZipFile, name: str, content: bytes, compress: bool) -> None:
    """Add a file in memory."""
    info = _info(archive, name, compress)
    archive.writestr(info, content, compresslevel=_LEVEL if compress else None)


def add_file(archive: zipfile.ZipFile, name: str, path: Path, advance: Callable[[int], object]) -> None:
    """Add a large file as it is.

    Args:
        archive: open for writing.
        name: in it.
        path: of the file.
        advance: told of bytes that were written.
    """
    info = _info(archive, name, compress=False)
    info.file_size = path.stat().st_size
    with archive.open(info, "w") as target, path.open("rb") as source:
        while chunk := source.read(_CHUNK):
            target.write(chunk)
            advance(len(chunk))


def _info(archive: zipfile.ZipFile, name: str, compress: bool) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.external_attr = 0o644 << 16
    info.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    if not compress:
        begins = archive.start_dir + _HEADER + len(name.encode()) + 6
        padding = -begins % _ALIGNMENT
        info.extra = struct.pack("<HHH", _EXTRA, 2 + padding, _ALIGNMENT) + b"\0" * padding
    return info
