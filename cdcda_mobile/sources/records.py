"""What every source yields, and how one row of it becomes a :class:`Record` or is refused with a reason."""

from __future__ import annotations

import datetime as dt
import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol

from cdcda_export.errors import did_you_mean
from cdcda_mobile.tasks import TASKS, Task

_MILLISECONDS_FROM = 10**11  # read as seconds this would be the year 5138
_INTEGER = re.compile(r"-?[0-9]{1,19}")
_DIGITS = re.compile(r"[0-9]+")
_SHORTEST_BEGINNING, _LONGEST_BEGINNING = 0.10, 0.25
_YEAR_MONTH = re.compile(r"([0-9]{4})-(0[1-9]|1[0-2])")


@dataclass(frozen=True)
class Record:
    """One thing the user was given and what the user made of it.

    ``date`` is ISO 8601 in UTC without a suffix, as exact as the source gave it (``2019``, ``2019-05-03``,
    ``2019-05-03T10:00:00``), so that comparing the strings compares the times.
    """

    id: str
    date: str
    task: str
    input: str
    output: str


@dataclass(frozen=True)
class Malformed:
    """A row that could not be used: where it stands (``file.jsonl:17``) and why."""

    place: str
    reason: str


@dataclass(frozen=True)
class Row:
    """One row of the wanted user, its columns already renamed to id, date, task, input and output.

    ``number`` counts from 1 in the order of the source; it becomes the id of a row without one.
    """

    place: str
    number: int
    fields: Mapping[str, object]


class Source(Protocol):
    """One kind of place that holds histories."""

    @property
    def label(self) -> str:
        """Name of the source for messages and manifests, without secrets."""
        ...

    def rows(self, user: str) -> Iterator[Row | Malformed]:
        """Yield the rows of one user, and the rows whose user cannot be told as :class:`Malformed`."""
        ...

    def users(self) -> Iterator[str]:
        """Yield the user ids of the source, each at least once."""
        ...


class Unusable(ValueError):
    """A value cannot be used; the message is the reason that the user reads."""


def is_plain_text(text: str) -> bool:
    """Say whether text can be stored as UTF-8 and holds no NUL."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def as_integer(user: str) -> int | None:
    """Return a user id as the 64-bit integer that is written so, None where it is none."""
    if not _INTEGER.fullmatch(user) or str(int(user)) != user:
        return None
    number = int(user)
    return number if -(2**63) <= number < 2**63 else None


def as_user(value: object) -> str:
    """Return a user id as text, or "" where the value names nobody."""
    if value is None or isinstance(value, (bool, list, dict)):
        return ""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    text = str(value).strip()
    return text if is_plain_text(text) else ""


def as_text(value: object, name: str) -> str:
    """Return a field as stripped text; lists of texts are joined by line breaks, whole floats lose their ``.0``.

    Raises:
        Unusable: the field is absent, empty, not text, or text that UTF-8 or C strings cannot hold.
    """
    if isinstance(value, (list, tuple)):
        value = "\n".join(as_text(item, name) for item in value)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None:
        raise Unusable(f"no {name}")
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Decimal)):
        raise Unusable(f"{name} is not text but {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise Unusable(f"no {name}")
    text = str(value).replace("\r\n", "\n").strip()
    if not is_plain_text(text):
        raise Unusable(f"{name} holds a NUL character" if "\0" in text else f"{name} is not valid UTF-8")
    if not text:
        raise Unusable(f"empty {name}")
    return text


def _from_epoch(seconds: float) -> str:
    if abs(seconds) >= _MILLISECONDS_FROM:
        seconds /= 1000
    moment = dt.datetime.fromtimestamp(seconds, dt.UTC)
    return moment.replace(tzinfo=None).isoformat()


def _from_digits(digits: str) -> str:
    """Read ``YYYY``, ``YYYYMMDD``, or seconds (or milliseconds) since 1970."""
    if len(digits) == 4 and digits != "0000":
        return digits
    if len(digits) == 8 and "1900" <= digits[:4] <= "2100":
        return dt.date.fromisoformat(digits).isoformat()
    return _from_epoch(int(digits))


def _from_datetime(moment: dt.datetime) -> str:
    if moment.tzinfo is not None:
        moment = moment.astimezone(dt.UTC).replace(tzinfo=None)
    return moment.isoformat()


def _from_text(text: str) -> str:
    if _DIGITS.fullmatch(text):
        return _from_digits(text)
    if _YEAR_MONTH.fullmatch(text):
        return text
    if len(text) <= 10:
        return dt.date.fromisoformat(text).isoformat()
    return _from_datetime(dt.datetime.fromisoformat(text))


def normal_date(value: object) -> str:
    """Return a date as sortable ISO 8601 text, in UTC where the source gave an offset.

    Takes ISO dates and datetimes, ``YYYY``, ``YYYY-MM``, ``YYYYMMDD``, seconds since 1970 (milliseconds from 1e11 on), and
    Python's own date types. A partial date sorts before every later moment inside it.

    Raises:
        Unusable: the value is no such date.
    """
    try:
        if isinstance(value, dt.datetime):
            return _from_datetime(value)
        if isinstance(value, dt.date):
            return value.isoformat()
        if isinstance(value, int) and not isinstance(value, bool):
            return _from_digits(str(value)) if value > 0 else _from_epoch(value)
        if isinstance(value, (float, Decimal)):
            return _from_epoch(float(value))
        return _from_text(as_text(value, "date"))
    except Unusable:
        raise
    except (ValueError, OverflowError, OSError):
        # The value is named by its first characters only: it may be a misplaced text of the user's.
        raise Unusable(f"cannot read the date {str(value)[:40]!r}") from None


def _label(task: Task, output: str) -> str:
    """Return the canonical spelling of a label of a closed set."""
    wanted = output.casefold()
    if task.metric == "rating" and wanted.endswith(".0"):
        wanted = wanted[:-2]
    for label in task.labels:
        if label.casefold() == wanted:
            return label
    raise Unusable(f"'{output[:40]}' is not one of the {len(task.labels)} labels of {task.name}")


def beginning_of(text: str) -> str:
    """Return the first 10 to 25 % of the words of a text, at least one, after LaMP's own recipe for histories without pairs.

    The share is a hash of the text, so that the same source always gives the same records.

    Raises:
        Unusable: the text has fewer than two words.
    """
    words = text.split()
    if len(words) < 2:
        raise Unusable("a text of one word cannot be completed")
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    share = _SHORTEST_BEGINNING + draw * (_LONGEST_BEGINNING - _SHORTEST_BEGINNING)
    return " ".join(words[: max(1, round(share * len(words)))])


def clean(row: Row) -> Record | Malformed:
    """Turn a row into a record, or say why that cannot be done.

    A text without an input becomes a completion where its task has one. A row without an id is named by its number, with leading zeros
    so that ids sort as the rows stand.
    """
    fields = row.fields
    try:
        name = as_text(fields.get("task"), "task")
        if name not in TASKS:
            raise Unusable(f"there is no task '{name[:40]}'.{did_you_mean(name, TASKS)}")
        task = TASKS[name]
        date = normal_date(fields.get("date"))
        alone = bool(task.completion) and fields.get("input") is None
        text = "" if alone else as_text(fields.get("input"), "input")
        output = as_text(fields.get("output"), "output")
        if alone:
            name, text = task.completion, beginning_of(output)
        if task.labels:
            output = _label(task, output)
        given = fields.get("id")
        identity = f"{row.number:08d}" if given is None or given == "" else as_text(given, "id")
    except Unusable as error:
        return Malformed(row.place, str(error))
    return Record(identity, date, name, text, output)
