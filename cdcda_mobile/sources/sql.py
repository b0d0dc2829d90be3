"""Histories in any database that SQLAlchemy speaks to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdcda_export.errors import ConfigError, DataError, FileError, MissingDependency, did_you_mean
from cdcda_mobile.config import HistoryConfig
from cdcda_mobile.sources.columns import Columns
from cdcda_mobile.sources.records import Malformed, Row, as_integer

if TYPE_CHECKING:
    from sqlalchemy import URL, ColumnElement, Connection, Engine, FromClause, Select

_BATCH = 500


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def _reported(label: str) -> Iterator[None]:
    """Turn what the database says into one sentence; values and passwords are not part of it."""
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError

    try:
        yield
    except DBAPIError as error:
        raise DataError(f"{label} refused: {_first_line(error.orig or error)}.") from None
    except SQLAlchemyError as error:
        raise DataError(f"{label} cannot be read: {_first_line(error)}.") from None


class SqlSource:
    """A table, a view or a query of a database, with the rows of many users.

    The user's id always travels as a bound parameter and names of columns and tables are quoted by SQLAlchemy. Nothing is ever
    committed.

    Raises:
        MissingDependency: SQLAlchemy or the driver is not installed.
        ConfigError: not a URL, or not exactly one of table and query.
        FileError: an SQLite file that is not there.
    """

    def __init__(self, config: HistoryConfig) -> None:
        if bool(config.table) == bool(config.query):
            raise ConfigError("A database needs either --table NAME or --query SQL, and not both.")
        self._config = config
        self._engine = _engine(config.data)
        url = self._engine.url
        # The query part of a URL may hold a password too, so it stays out of messages and manifests.
        self._database = url.set(query={}).render_as_string(hide_password=True)
        self.label = f"{self._database} {config.table or 'query'}"

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        with _reported(self._database):
            try:
                with self._engine.connect() as connection:
                    yield connection.execution_options(stream_results=True, yield_per=_BATCH)
            finally:
                self._engine.dispose()

    def rows(self, user: str) -> Iterator[Row | Malformed]:
        """Yield the user's rows by date, and as malformed the rows whose user is NULL."""
        with self._connection() as connection:
            if self._config.query and _takes_user(self._config.query):
                yield from self._one_user_query(connection, user)
                return
            origin, columns = self._origin(connection)
            result = connection.execute(_select(origin, columns, user))
            for number, values in enumerate(result.mappings(), 1):
                yield from self._row(dict(values), columns, number, user)

    def _row(self, values: dict[Any, Any], columns: Columns, number: int, user: str) -> Iterator[Row | Malformed]:
        place = f"{self._config.table or 'query'} row {number}"
        owner = columns.user_of(values)
        if not owner:
            yield Malformed(place, "no user")
        elif owner == user:  # a database may compare without case: Ada is not ada here
            yield columns.row(values, place, number)

    def _one_user_query(self, connection: Connection, user: str) -> Iterator[Row | Malformed]:
        """Run a query that names the user itself; all its rows are the user's."""
        from sqlalchemy import bindparam, text
        from sqlalchemy.types import NullType

        # Without a type the server compares as it would compare a quoted literal, with integers too.
        statement = text(_bare(self._config.query)).bindparams(bindparam("user", user, type_=NullType()))
        result = connection.execute(statement)
        columns = Columns(list(result.keys()), self._config, "The query", needs_user=False)
        for number, values in enumerate(result.mappings(), 1):
            yield columns.row({str(name): value for name, value in values.items()}, f"query row {number}", number)

    def users(self) -> Iterator[str]:
        """Yield the distinct users.

        Raises:
            ConfigError: the query takes the user as a parameter, so it cannot list them.
        """
        from sqlalchemy import select

        if self._config.query and _takes_user(self._config.query):
            raise ConfigError("Users cannot be listed by a query with :user: give --table, or a query without :user.")
        with self._connection() as connection:
            origin, columns = self._origin(connection)
            for (value,) in connection.execute(select(origin.c[columns.user]).distinct()):
                if owner := columns.user_of({columns.user: value}):
                    yield owner

    def _origin(self, connection: Connection) -> tuple[FromClause, Columns]:
        """Return what to select from, and its columns."""
        from sqlalchemy import column, select, text

        if self._config.table:
            return self._table(connection)
        query = text(_bare(self._config.query))
        names = list(connection.execute(select(text("*")).select_from(query.columns().subquery()).limit(0)).keys())
        columns = Columns(names, self._config, "The query")
        return query.columns(*(column(name) for name in names)).subquery(), columns

    def _table(self, connection: Connection) -> tuple[FromClause, Columns]:
        from sqlalchemy import column, inspect, table

        inspector = inspect(connection)
        name, schema = self._config.table, None
        if not inspector.has_table(name) and "." in name:
            schema, name = name.rsplit(".", 1)
        if not inspector.has_table(name, schema=schema):
            known = inspector.get_table_names() + inspector.get_view_names()
            raise ConfigError(f"There is no table '{self._config.table}'.{did_you_mean(self._config.table, known)}")
        types = {found["name"]: found["type"] for found in inspector.get_columns(name, schema=schema)}
        columns = Columns(types, self._config, f"Table {self._config.table}")
        # Only the user column keeps its type, to be compared; typed results would fail on the first malformed date.
        parts = [column(each, types[each]) if each == columns.user else column(each) for each in columns.needed()]
        return table(name, *parts, schema=schema), columns


def _select(origin: FromClause, columns: Columns, user: str) -> Select[Any]:
    """Select one user's rows and those of nobody, in an order that is the same every time."""
    from sqlalchemy import String, cast, or_, select

    owner = origin.c[columns.user]
    names = columns.needed()
    order: list[ColumnElement[Any]] = [origin.c[columns.date]]
    # Rows without an id are named by their place, so ties must not depend on the plan of the database.
    rest = [columns.id] if columns.id else [name for name in names if name not in (columns.user, columns.date)]
    order.extend(cast(origin.c[name], String) for name in rest)
    return select(*(origin.c[name] for name in names)).where(or_(_is_user(owner, user), owner.is_(None))).order_by(*order)


def _is_user(owner: ColumnElement[Any], user: str) -> ColumnElement[bool]:
    """Compare a column of any type with an id, so that an index on it can be used where its type is known."""
    from sqlalchemy import BigInteger, Enum, Integer, String, bindparam, cast

    number = as_integer(user)
    if isinstance(owner.type, Integer) and number is not None:
        return owner == bindparam("user", number, type_=BigInteger())
    if isinstance(owner.type, String) and not isinstance(owner.type, Enum):
        return owner == bindparam("user", user, type_=String())
    return cast(owner, String) == bindparam("user", user, type_=String())


def _bare(query: str) -> str:
    return query.strip().rstrip(";").rstrip()


def _takes_user(query: str) -> bool:
    """Say whether a query has the parameter ``:user``; any other parameter is an error."""
    from sqlalchemy import text

    parameters = set(text(_bare(query)).compile().params)
    if parameters - {"user"}:
        unknown = sorted(parameters - {"user"})[0]
        raise ConfigError(f"The query has the parameter ':{unknown}', but only :user is filled; write '\\:' for a plain colon.")
    return bool(parameters)


def _engine(data: str) -> Engine:
    try:
        from sqlalchemy import create_engine
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError, NoSuchModuleError
    except ImportError:
        raise MissingDependency("sqlalchemy", "data") from None
    try:
        url = make_url(data)
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        _check_sqlite(url)
        return create_engine(url, hide_parameters=True)
    except NoSuchModuleError:
        raise ConfigError(f"SQLAlchemy knows no database '{url.drivername}': try postgresql, mysql+pymysql or sqlite.") from None
    except (ArgumentError, ValueError):
        # The message of SQLAlchemy repeats the URL, which may hold a password.
        raise ConfigError("--data looks like a database URL but is none; expected driver://name:password@host/database.") from None
    except ImportError as error:
        raise MissingDependency(error.name or url.drivername, "data") from None


def _check_sqlite(url: URL) -> None:
    """Refuse an SQLite file that is not there: opening it would create it."""
    name = url.database
    if url.get_backend_name() == "sqlite" and name and name != ":memory:" and not name.startswith("file:"):
        if not Path(name).is_file():
            raise FileError(f"There is no SQLite file {name}.")
