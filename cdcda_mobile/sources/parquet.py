"""Histories in Parquet files, read row group by row group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdcda_export.errors import FileError, MissingDependency
from cdcda_mobile.config import HistoryConfig
from cdcda_mobile.sources.columns import Columns
from cdcda_mobile.sources.records import Malformed, Row, as_integer, as_user

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 1024


def _plain(array: Any) -> list[Any]:
    """Return Python values, with dates as text and broken bytes as surrogates, which no field accepts.

    Arrow writes dates that Python's calendar cannot hold, and nanoseconds; bytes that are no UTF-8 must cost a row, not the file.
    """
    import pyarrow as pa

    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if pa.types.is_timestamp(kind):
        # Arrow keeps UTC inside; without the zone the text is UTC, as everywhere in a history.
        array = array.cast(pa.timestamp(kind.unit)).cast(pa.string())
    elif pa.types.is_date(kind):
        array = array.cast(pa.date32(), safe=False).cast(pa.string())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        array = array.cast(pa.large_binary())
    return [value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value for value in array.to_pylist()]


class ParquetSource:
    """A Parquet file with the rows of many users.

    The filter on the user is pushed down by hand: a row group whose statistics exclude the user is not read, and of the others
    only the needed columns are, batch by batch. pyarrow's own filter would lose the row numbers that reports need.
    """

    def __init__(self, path: Path, config: HistoryConfig) -> None:
        self._path = path
        self._config = config
        self.label = str(path)

    def _open(self) -> tuple[Any, Columns]:
        """Open the file and find its columns.

        Raises:
            MissingDependency: pyarrow is not installed.
            FileError: the file is absent or no Parquet file.
        """
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise MissingDependency("pyarrow", "data") from None
        try:
            file = pq.ParquetFile(self._path)
        except FileNotFoundError:
            raise FileError(f"There is no file {self._path}.") from None
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise FileError(f"{self._path} cannot be read as Parquet: {_first_line(error)}.") from None
        return file, Columns(file.schema_arrow.names, self._config, self.label)

    def _batches(self, file: Any, columns: list[str], user: str | None) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield (number of its first row, batch) of the row groups that may hold the user (None: all)."""
        start = 0
        for group in range(file.metadata.num_row_groups):
            metadata = file.metadata.row_group(group)
            if user is None or _may_hold(metadata, columns[0], user):
                row = start
                for batch in file.iter_batches(batch_size=_BATCH, row_groups=[group], columns=columns):
                    yield row, batch
                    row += batch.num_rows
            start += metadata.num_rows

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn what is wrong inside a file whose footer could be read into one sentence."""
        import pyarrow as pa

        try:
            yield
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise FileError(f"{self._path} is damaged: {_first_line(error)}.") from None

    def rows(self, user: str) -> Iterator[Row | Malformed]:
        """Yield the user's rows, and as malformed the rows that name nobody."""
        opened, columns = self._open()
        with opened as file, self._reported():
            order = [columns.user, *(name for name in columns.needed() if name != columns.user)]
            for start, batch in self._batches(file, order, user):
                yield from self._wanted(batch, start, user, columns)

    def _wanted(self, batch: pa.RecordBatch, start: int, user: str, columns: Columns) -> Iterator[Row | Malformed]:
        owners = [as_user(value) for value in _plain(batch.column(columns.user))]
        wanted = [index for index, owner in enumerate(owners) if owner in (user, "")]
        if not wanted:
            return
        names = batch.schema.names
        arrays = [_plain(batch.column(name).take(_indices(wanted))) for name in names]
        for position, index in enumerate(wanted):
            place = f"{self._path.name} row {start + index + 1}"
            if not owners[index]:
                yield Malformed(place, "no user")
                continue
            values = {name: array[position] for name, array in zip(names, arrays, strict=True)}
            yield columns.row(values, place, start + index + 1)

    def users(self) -> Iterator[str]:
        """Yield the users of each batch, reading their column only."""
        opened, columns = self._open()
        with opened as file, self._reported():
            for _, batch in self._batches(file, [columns.user], None):
                for value in _plain(batch.column(columns.user).unique()):
                    if owner := as_user(value):
                        yield owner


def _indices(wanted: list[int]) -> Any:
    import pyarrow as pa

    return pa.array(wanted, type=pa.int64())


def _may_hold(group: Any, column: str, user: str) -> bool:
    """Say whether a row group may hold the user or rows without one, by the statistics in the file's footer."""
    for index in range(group.num_columns):
        chunk = group.column(index)
        if chunk.path_in_schema != column:
            continue
        known = chunk.statistics
        if known is None or not known.has_min_max or not known.has_null_count or known.null_count:
            return True
        low, high = known.min, known.max
        if isinstance(low, str) and isinstance(high, str):
            # Blank and padded ids are not excluded: they sort before every letter.
            return low.strip() != low or low == "" or low <= user <= high
        if isinstance(low, int) and isinstance(high, int) and not isinstance(low, bool):
            number = as_integer(user)
            return number is not None and low <= number <= high
        return True
    return True


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
