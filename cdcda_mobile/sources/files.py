"""Histories in JSONL and CSV files, plain or gzip, and the sample users that ship with the package."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

from cdcda_export.errors import FileError
from cdcda_mobile.config import HistoryConfig
from cdcda_mobile.sources.columns import Columns, check_map
from cdcda_mobile.sources.records import Malformed, Row

_HEADER_ROWS = 100  # JSONL has no header: the columns are those of its first rows
_LONGEST_LINE = 1 << 26
_DELIMITERS = (",", ";", "\t")

# A parsed row (number, place, values), or a row that could not be parsed.
Parsed = tuple[int, str, Mapping[str, object]] | Malformed
Opener = Callable[[], AbstractContextManager[BinaryIO]]


@contextmanager
def open_bytes(path: Path | Traversable) -> Iterator[BinaryIO]:
    """Open a file, unpacking ``.gz``, and turn what goes wrong while reading it into one sentence.

    Raises:
        FileError: the file is absent, unreadable, cut short or not gzip.
    """
    try:
        with path.open("rb") as raw:
            stream = gzip.GzipFile(fileobj=cast(BinaryIO, raw)) if path.name.endswith(".gz") else raw
            yield cast(BinaryIO, stream)
    except FileNotFoundError:
        raise FileError(f"There is no file {path}.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise FileError(f"{path} is not a gzip file or was cut short: fetch it again.") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}.") from None


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yield (line number, line), with None for a line too long to hold."""
    number = 0
    while line := stream.readline(_LONGEST_LINE):
        number += 1
        if len(line) < _LONGEST_LINE or line.endswith(b"\n"):
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(_LONGEST_LINE)
        yield number, None


def parse_jsonl(stream: BinaryIO, name: str) -> Iterator[Parsed]:
    """Parse JSON Lines; blank lines are nothing, every other line is a row."""
    for number, line in _lines(stream):
        place = f"{name}:{number}"
        if line is None:
            yield Malformed(place, f"line longer than {_LONGEST_LINE >> 20} MiB")
            continue
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            yield Malformed(place, "not valid UTF-8")
        except (ValueError, RecursionError):
            yield Malformed(place, "not valid JSON")
        else:
            if isinstance(values, dict):
                yield number, place, values
            else:
                yield Malformed(place, f"not a JSON object but {type(values).__name__}")


def parse_csv(stream: BinaryIO, name: str) -> Iterator[Parsed]:
    """Parse CSV with a header line; commas, semicolons and tabs separate, whichever the header has most of."""
    # Bytes that are no UTF-8 become surrogates here, which the cleaning of a field refuses with a reason.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_LINE))
    first = text.readline()
    delimiter = max(_DELIMITERS, key=first.count)
    reader = csv.reader(chain([first], text) if first else [], delimiter=delimiter)
    header: list[str] = []
    start = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield Malformed(f"{name}:{start}", f"not valid CSV ({error})")
            start = reader.line_num + 1
            continue
        if cells is None:
            return
        place, number, start = f"{name}:{start}", start, reader.line_num + 1
        if not header:
            header = [cell.strip() for cell in cells]
        elif cells and len(cells) != len(header):
            yield Malformed(place, f"{len(cells)} fields where the header has {len(header)}")
        elif cells:
            yield number, place, dict(zip(header, cells, strict=True))


PARSERS: dict[str, Callable[[BinaryIO, str], Iterator[Parsed]]] = {"jsonl": parse_jsonl, "csv": parse_csv}


def _with_columns(parsed: Iterator[Parsed], config: HistoryConfig, where: str, needs_user: bool) -> tuple[Columns | None, Iterable[Parsed]]:
    """Read the first rows to learn the columns; None where no row could be parsed."""
    head: list[Parsed] = []
    names: dict[str, None] = {}
    good = 0
    for item in parsed:
        head.append(item)
        if not isinstance(item, Malformed):
            names.update(dict.fromkeys(item[2]))
            good += 1
            if good == _HEADER_ROWS:
                break
    columns = Columns(names, config, where, needs_user) if good else None
    return columns, chain(head, parsed)


class FileSource:
    """A JSONL or CSV file with the rows of many users, read row by row."""

    def __init__(self, path: Path, kind: str, config: HistoryConfig) -> None:
        self._path = path
        self._parse = PARSERS[kind]
        self._config = config
        self.label = str(path)

    def rows(self, user: str) -> Iterator[Row | Malformed]:
        """Yield the user's rows; a row that cannot be parsed, or names nobody, is reported whoever asks."""
        with open_bytes(self._path) as stream:
            columns, parsed = _with_columns(self._parse(stream, self._path.name), self._config, self.label, True)
            for item in parsed:
                if isinstance(item, Malformed) or columns is None:
                    yield cast(Malformed, item)
                    continue
                number, place, values = item
                owner = columns.user_of(values)
                if not owner:
                    yield Malformed(place, "no user")
                elif owner == user:
                    yield columns.row(values, place, number)

    def users(self) -> Iterator[str]:
        """Yield the user of every row that names one."""
        with open_bytes(self._path) as stream:
            columns, parsed = _with_columns(self._parse(stream, self._path.name), self._config, self.label, True)
            for item in parsed:
                if columns is not None and not isinstance(item, Malformed) and (owner := columns.user_of(item[2])):
                    yield owner


class SampleSource:
    """The sample users of the package: ``samples/<user>.jsonl``, one file a user."""

    label = "samples"

    def __init__(self, config: HistoryConfig) -> None:
        check_map(config)
        self._config = config

    def _files(self) -> dict[str, Traversable]:
        # Listing instead of joining a path: a user id such as ../../etc finds nothing.
        folder = resources.files("cdcda_mobile").joinpath("samples")
        files = [file for file in folder.iterdir() if file.name.endswith(".jsonl")] if folder.is_dir() else []
        return {file.name.removesuffix(".jsonl"): file for file in files}

    def rows(self, user: str) -> Iterator[Row | Malformed]:
        """Yield all rows of the user's file."""
        file = self._files().get(user)
        if file is None:
            return
        with open_bytes(file) as stream:
            columns, parsed = _with_columns(parse_jsonl(stream, file.name), self._config, file.name, False)
            for item in parsed:
                if isinstance(item, Malformed) or columns is None:
                    yield cast(Malformed, item)
                else:
                    number, place, values = item
                    yield columns.row(values, place, number)

    def users(self) -> Iterator[str]:
        """Yield the names of the files."""
        yield from self._files()
