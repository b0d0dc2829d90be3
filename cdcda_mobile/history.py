"""Who the user is: read one person's records from any source and split them by time."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from cdcda_export.errors import ConfigError, DataError, UnknownUser
from cdcda_mobile.config import HistoryConfig
from cdcda_mobile.sources.columns import check_map
from cdcda_mobile.sources.files import FileSource, SampleSource
from cdcda_mobile.sources.lamp import LampSource, find_questions
from cdcda_mobile.sources.parquet import ParquetSource
from cdcda_mobile.sources.records import Malformed, Record, Source, clean, is_plain_text
from cdcda_mobile.sources.sql import SqlSource
from cdcda_mobile.workspace import read_lines

__all__ = ["SOURCES", "History", "Malformed", "Record", "Split", "list_users", "open_source", "read_history", "records_in", "split_by_time"]

_IDS_FOR_SUGGESTIONS = 5000
_WORD = re.compile(r"\w+")

SOURCES: dict[str, Callable[[HistoryConfig], Source]] = {
    "samples": SampleSource,
    "lamp": lambda config: LampSource(Path(config.data), config),
    "jsonl": lambda config: FileSource(Path(config.data), "jsonl", config),
    "csv": lambda config: FileSource(Path(config.data), "csv", config),
    "parquet": lambda config: ParquetSource(Path(config.data), config),
    "sql": SqlSource,
}

_ENDINGS = {".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".csv": "csv", ".csv.gz": "csv", ".parquet": "parquet"}
_EXPECTED = "samples, a directory with LaMP's *_questions.json, a .jsonl, .jsonl.gz, .csv or .parquet file, or an SQLAlchemy URL"


@dataclass(frozen=True)
class History:
    """All usable records of one user by date, then id, and every row that was refused."""

    user: str
    records: tuple[Record, ...]
    malformed: tuple[Malformed, ...]
    source: str


@dataclass(frozen=True)
class Split:
    """Three disjoint parts in the order of time; ``dropped`` are records left out because a later part repeats their text."""

    train: tuple[Record, ...]
    validation: tuple[Record, ...]
    test: tuple[Record, ...]
    dropped: tuple[Malformed, ...] = ()


def source_kind(data: str) -> str:
    """Return the key of :data:`SOURCES` for what ``--data`` names.

    Raises:
        ConfigError: it is nothing that holds histories.
    """
    if data == "samples":
        return "samples"
    if "://" in data:
        return "sql"
    path = Path(data)
    if path.is_dir():
        if find_questions(path):
            return "lamp"
        raise ConfigError(f"The directory {data} holds no *_questions.json; expected {_EXPECTED}.")
    for ending, kind in _ENDINGS.items():
        if data.lower().endswith(ending):
            return kind
    near = " Did you mean 'samples'?" if difflib.get_close_matches(data, ["samples"]) else ""
    raise ConfigError(f"'{data}' is no source of histories; expected {_EXPECTED}.{near}")


def open_source(config: HistoryConfig) -> Source:
    """Open the source that a config names.

    Raises:
        ConfigError: the source, its table, its query or its mapping makes no sense.
    """
    check_map(config)
    kind = source_kind(config.data)
    if kind != "sql" and (config.table or config.query):
        raise ConfigError("--table and --query belong to a database, and --data names none.")
    return SOURCES[kind](config)


def list_users(config: HistoryConfig) -> list[str]:
    """Return the ids of all users of a source, sorted.

    Raises:
        CdcdaError: as :func:`read_history`, as far as it concerns the source.
    """
    return sorted(set(open_source(config).users()))


def read_history(user: str, config: HistoryConfig) -> History:
    """Read one user's records; other users' rows pass by without being kept.

    Args:
        user: the id as the source writes it.
        config: the source, its column names, and how many records are needed at least.

    Returns:
        The usable records and the refused rows. Rows that name no readable user are refused for every user.

    Raises:
        UnknownUser: the source has no such user; the nearest ids are named.
        DataError: no usable record, or fewer than ``config.min_records``.
        ConfigError: the source or its mapping makes no sense.
        FileError: a file is absent or damaged.
        MissingDependency: pyarrow, SQLAlchemy or a driver is not installed.
    """
    source = open_source(config)
    records: list[Record] = []
    malformed: list[Malformed] = []
    places: list[str] = []
    seen = False
    for row in source.rows(user) if is_plain_text(user) else ():
        item: Record | Malformed
        if isinstance(row, Malformed):
            item = row
        else:
            seen = True
            item = clean(row)
        if isinstance(item, Malformed):
            malformed.append(item)
        else:
            records.append(item)
            places.append(row.place)
    if not seen:
        _raise_unknown(user, source, malformed)
    unique, duplicates = _without_duplicates(records, places)
    malformed.extend(duplicates)
    _check_count(user, unique, malformed, config)
    ordered = sorted(_with_unique_ids(unique), key=_by_time)
    return History(user, tuple(ordered), tuple(malformed), source.label)


def _by_time(record: Record) -> tuple[str, str]:
    return record.date, record.id


def _raise_unknown(user: str, source: Source, malformed: list[Malformed]) -> None:
    """Say that there is no such user, or that the source has no users at all."""
    known = _some_users(source)
    if not known and malformed:
        first = f"{malformed[0].place}: {malformed[0].reason}"
        raise DataError(f"{source.label} has no usable row; all {len(malformed)} are malformed, first {first}.")
    if not known and not isinstance(source, SqlSource):
        raise DataError(f"{source.label} is empty: it holds no rows of any user.")
    near = difflib.get_close_matches(user, known, n=3, cutoff=0.5)
    if near:
        hint = " Did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
    else:
        hint = f" Known are {', '.join(known[:5])}{' and others' if len(known) > 5 else ''}." if known else ""
    raise UnknownUser(f"{source.label} has no user '{user}'.{hint}")


def _some_users(source: Source) -> list[str]:
    """Return up to some thousands of ids, [] where the source cannot list them."""
    try:
        distinct: dict[str, None] = {}
        for name in source.users():
            distinct[name] = None
            if len(distinct) >= _IDS_FOR_SUGGESTIONS:
                break
        return list(distinct)
    except ConfigError:
        return []


def _without_duplicates(records: list[Record], places: list[str]) -> tuple[list[Record], list[Malformed]]:
    """Keep the first of records that agree in all but the id."""
    first: dict[tuple[str, ...], str] = {}
    kept: list[Record] = []
    duplicates: list[Malformed] = []
    for record, place in zip(records, places, strict=True):
        content = (record.date, record.task, record.input, record.output)
        if content in first:
            duplicates.append(Malformed(place, f"duplicate of {first[content]}"))
        else:
            first[content] = place
            kept.append(record)
    return kept, duplicates


def _with_unique_ids(records: list[Record]) -> list[Record]:
    """Give the second record of an id the suffix ``-2``, and so on."""
    given = {record.id for record in records}
    used: set[str] = set()
    unique = []
    for record in records:
        name, count = record.id, 1
        while name in used or (count > 1 and name in given):
            count += 1
            name = f"{record.id}-{count}"
        used.add(name)
        unique.append(Record(name, record.date, record.task, record.input, record.output))
    return unique


def _check_count(user: str, records: list[Record], malformed: list[Malformed], config: HistoryConfig) -> None:
    bad = len(malformed)
    if not records:
        first = malformed[0]
        raise DataError(f"User {user} has no usable record; {bad} rows are malformed, first {first.place}: {first.reason}.")
    if len(records) < config.min_records:
        also = f" ({bad} more rows are malformed)" if bad else ""
        raise DataError(f"User {user} has {len(records)} usable records{also}, but {config.min_records} are needed.")


def split_by_time(history: History, config: HistoryConfig) -> Split:
    """Split a history by time over all tasks together: test is its end, validation the end of what remains.

    A record whose text (input and output without case, punctuation and spacing) returns in a later part is left out of the
    earlier one, so that no part can be learned by heart from an earlier one.

    Args:
        history: records of one user.
        config: ``test_fraction`` of all records, ``validation_fraction`` of the rest (at least 2 where there are enough).

    Raises:
        DataError: too few records for a training part.
    """
    records = sorted(history.records, key=_by_time)
    cut = len(records) - max(1, int(len(records) * config.test_fraction + 0.5))
    test = records[max(cut, 0) :]
    rest, dropped = _not_in(records[: max(cut, 0)], test, "test")
    size = int(len(rest) * config.validation_fraction + 0.5)
    if config.validation_fraction:
        size = min(max(2, size), max(len(rest) - 1, 0))
    validation = rest[len(rest) - size :]
    train, more = _not_in(rest[: len(rest) - size], validation, "validation")
    if not train:
        raise DataError(f"User {history.user} has {len(records)} records, too few different ones to train on and to test.")
    split = Split(tuple(train), tuple(validation), tuple(test), (*dropped, *more))
    check_split(split)
    return split


def _words(text: str) -> str:
    """Return the words of a text; a text of symbols only is kept, or two emojis would be the same."""
    folded = text.casefold()
    return " ".join(_WORD.findall(folded)) or folded.strip()


def text_of(record: Record) -> tuple[str, str]:
    """Return input and output without case, punctuation and spacing: records that agree in both are one text."""
    return _words(record.input), _words(record.output)


def _not_in(earlier: Iterable[Record], later: Iterable[Record], part: str) -> tuple[list[Record], list[Malformed]]:
    texts: dict[tuple[str, str], str] = {}
    for record in later:
        texts.setdefault(text_of(record), record.id)
    kept: list[Record] = []
    dropped: list[Malformed] = []
    for record in earlier:
        twin = texts.get(text_of(record))
        if twin is None:
            kept.append(record)
        else:
            dropped.append(Malformed(f"record {record.id}", f"its text returns in the {part} part as record {twin}"))
    return kept, dropped


def check_split(split: Split) -> None:
    """Check that the parts are disjoint, in the order of time, and share no text.

    Raises:
        DataError: they are not; no adapter must be trained on such a split.
    """
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    names = [name for name in parts if parts[name]]
    for index, early in enumerate(names):
        for late in names[index + 1 :]:
            if {record.id for record in parts[early]} & {record.id for record in parts[late]}:
                raise DataError(f"The {early} and the {late} part share a record.")
            if max(map(_by_time, parts[early])) >= min(map(_by_time, parts[late])):
                raise DataError(f"The {early} part reaches into the time of the {late} part.")
            if set(map(text_of, parts[early])) & set(map(text_of, parts[late])):
                raise DataError(f"A text of the {late} part stands in the {early} part.")


def records_in(path: Path) -> list[Record]:
    """Return the records of a finished stage, such as ``history/test.jsonl`` or ``augment/kept.jsonl``."""
    return [Record(**{field.name: row[field.name] for field in fields(Record)}) for row in read_lines(path)]
