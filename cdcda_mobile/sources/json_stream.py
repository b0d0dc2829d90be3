"""Read a large JSON array item by item, holding one item and one chunk of text in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from cdcda_export.errors import FileError

_CHUNK = 1 << 16
_LONGEST_ITEM = 1 << 28
# The decoder points at the start of what it could not finish: a literal such as -Infinity or a pair of \uXXXX escapes.
_UNFINISHED = 16
_WHITE = " \t\r\n"
_ENDS = tuple(",]}:" + _WHITE)


class _Cursor:
    """A position in a JSON text that is read as it is needed."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._at = 0
        self._before = 0

    def broken(self, what: str) -> FileError:
        """Return the error for what stands at the current position."""
        return FileError(f"{self._name} cannot be read as JSON from character {self._before + self._at} on: {what}.")

    def _fill(self) -> bool:
        """Read on, at least doubling what is unread so that decoding again stays linear; False at the end of the file."""
        rest = self._buffer[self._at :]
        if len(rest) > _LONGEST_ITEM:
            raise self.broken("one item is longer than 256 million characters")
        try:
            more = self._stream.read(max(_CHUNK, len(rest)))
        except UnicodeDecodeError:
            raise self.broken("it is not UTF-8 text") from None
        self._before += self._at
        self._buffer, self._at = rest + more, 0
        return bool(more)

    def peek(self) -> str:
        """Return the next character that is not white space, "" at the end of the file."""
        while True:
            while self._at < len(self._buffer):
                if self._buffer[self._at] not in _WHITE:
                    return self._buffer[self._at]
                self._at += 1
            if not self._fill():
                return ""

    def take(self, expected: str) -> None:
        """Pass one expected character."""
        found = self.peek()
        if found != expected:
            raise self.broken(f"expected '{expected}', found {found!r}" if found else "it ends here, cut short")
        self._at += 1

    def value(self) -> Any:
        """Decode the next value."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                near_end = error.pos >= len(self._buffer) - _UNFINISHED or error.msg.startswith("Unterminated string")
                if not near_end:
                    self._at = error.pos
                    raise self.broken(error.msg) from None
                if not self._fill():
                    raise self.broken("it ends inside an item, cut short") from None
                continue
            except (ValueError, RecursionError):
                raise self.broken("a number is too long or the nesting too deep") from None
            cut = end >= len(self._buffer) - _UNFINISHED and self._buffer[end : end + 1] not in _ENDS
            if cut and self._fill():
                continue  # a number may go on in the next chunk: -4 was read of -4.5e10
            self._at = end
            return value


def _items(cursor: _Cursor) -> Iterator[Any]:
    """Yield the items of the array that starts here."""
    cursor.take("[")
    if cursor.peek() == "]":
        cursor.take("]")
        return
    while True:
        yield cursor.value()
        if cursor.peek() != ",":
            break
        cursor.take(",")
    cursor.take("]")


def iter_json_array(path: Path, key: str = "") -> Iterator[Any]:
    """Yield the items of a top-level JSON array, or of the array under ``key`` where the top level is an object.

    Args:
        path: a UTF-8 JSON file of any size.
        key: name of the array in an object; other values of that object are passed over.

    Raises:
        FileError: the file cannot be opened, is cut short, or is not such JSON. Items before the break have been yielded.
    """
    try:
        with path.open(encoding="utf-8-sig") as stream:
            cursor = _Cursor(stream, str(path))
            if key and cursor.peek() == "{":
                if not _enter(cursor, key):
                    return
            yield from _items(cursor)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}.") from None


def json_value(path: Path, key: str) -> Any:
    """Return the value under ``key`` of a top-level JSON object, None where there is no such key or no object.

    Args:
        path: a UTF-8 JSON file; what stands before the key is read and passed over.
        key: the name.

    Raises:
        FileError: the file cannot be opened, or is no JSON up to the value.
    """
    try:
        with path.open(encoding="utf-8-sig") as stream:
            cursor = _Cursor(stream, str(path))
            return cursor.value() if cursor.peek() == "{" and _enter(cursor, key) else None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}.") from None


def _enter(cursor: _Cursor, key: str) -> bool:
    """Move to the value of ``key`` in the object that starts here; False where the object has no such key."""
    cursor.take("{")
    while cursor.peek() == '"':
        name = cursor.value()
        cursor.take(":")
        if name == key:
            return True
        cursor.value()
        if cursor.peek() != ",":
            break
        cursor.take(",")
    cursor.take("}")
    return False
