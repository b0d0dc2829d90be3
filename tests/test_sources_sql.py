"""Databases: SQLite in files, PostgreSQL in a real throw-away cluster."""

from __future__ import annotations

import datetime as dt
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cdcda_export.errors import ConfigError, DataError, FileError, MissingDependency, UnknownUser
from cdcda_mobile.config import HistoryConfig
from cdcda_mobile.history import History, Malformed, list_users, open_source, read_history
from history_rows import Rows, config, rows_of
from postgres_cluster import cluster

HOSTILE = ["o'brien", 'quo"te', "x' OR '1'='1", "'; DROP TABLE mails; --", ":user", "%s %(user)s", "\\", "名前"]


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    with cluster() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        sqlite3.connect(tmp_path / "a.db").close()
        return f"sqlite:///{tmp_path / 'a.db'}"
    address: str = request.getfixturevalue("postgres")
    execute(address, "DROP SCHEMA IF EXISTS public CASCADE", "DROP SCHEMA IF EXISTS other CASCADE", "CREATE SCHEMA public")
    return address


def execute(url: str, *statements: str, rows: Rows | None = None, insert: str = "") -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(sa.text(statement))
        if rows:
            connection.execute(sa.text(insert), rows)
    engine.dispose()


def fill(url: str, rows: Rows, table: str = "mails", user_type: str = "TEXT") -> None:
    """Make a table whose names need quoting, and put rows in it."""
    execute(
        url,
        f'CREATE TABLE {table} ("user" {user_type}, id TEXT, "Sent At" TEXT, task TEXT, input TEXT, output TEXT)',
        rows=rows,
        insert=f"INSERT INTO {table} VALUES (:user, :id, :date, :task, :input, :output)",
    )


def asked(url: str, **more: Any) -> HistoryConfig:
    return config(url, **{"map": {"date": "Sent At"}, **more})


def ids(history: History) -> list[str]:
    return [record.id for record in history.records]


def test_a_table(url: str) -> None:
    fill(url, rows_of("bob", 4) + rows_of("ada", 12)[::-1])
    read = read_history("ada", asked(url, table="mails"))
    assert [(r.id, r.date, r.task, r.input, r.output) for r in read.records] == [
        (row["id"], row["date"], row["task"], row["input"], row["output"]) for row in rows_of("ada", 12)
    ]
    assert read.malformed == ()
    assert list_users(asked(url, table="mails")) == ["ada", "bob"]


def test_bad_rows_of_the_user_and_of_nobody(url: str) -> None:
    rows = rows_of("ada", 5) + rows_of("bob", 3)
    rows[1]["output"] = None
    rows[2]["date"] = "2020-02-31"
    rows[5]["output"] = None
    rows[6]["user"] = None
    fill(url, rows)
    read = read_history("ada", asked(url, table="mails"))
    assert ids(read) == ["ada-0", "ada-3", "ada-4"]
    assert sorted(bad.reason for bad in read.malformed) == ["cannot read the date '2020-02-31'", "no output", "no user"]
    assert all(bad.place.startswith("mails row ") for bad in read.malformed)


def test_users_are_bound_and_never_part_of_the_statement(url: str) -> None:
    fill(url, [row for name in HOSTILE for row in rows_of(name, 2)])
    query = 'SELECT * FROM mails WHERE "user" = :user'
    for name in HOSTILE:
        for given in (asked(url, table="mails"), asked(url, query="SELECT * FROM mails"), asked(url, query=query)):
            assert ids(read_history(name, given)) == [f"{name}-0", f"{name}-1"]
    for name in ("' OR 1=1 --", "ada\0"):
        with pytest.raises(UnknownUser):
            read_history(name, asked(url, table="mails"))
    assert len(list_users(asked(url, table="mails"))) == len(HOSTILE)


def test_a_hostile_table_name_is_a_name(url: str) -> None:
    fill(url, rows_of("ada", 2))
    for name in ('mails"; DROP TABLE mails; --', "mails WHERE 1=1", "mials"):
        with pytest.raises(ConfigError, match="There is no table .* Did you mean 'mails'|There is no table .* Known: mails"):
            read_history("ada", asked(url, table=name))
    assert len(read_history("ada", asked(url, table="mails")).records) == 2


def test_integer_users(url: str) -> None:
    rows: Rows = [{**row, "user": 42} for row in rows_of("ada", 3)] + [{**row, "user": 7} for row in rows_of("bob", 2)]
    fill(url, rows, user_type="INTEGER")
    for given in (
        asked(url, table="mails"),
        asked(url, query="SELECT * FROM mails;"),
        asked(url, query='SELECT * FROM mails WHERE "user" = :user'),
    ):
        assert ids(read_history("42", given)) == ["ada-0", "ada-1", "ada-2"]
    assert list_users(asked(url, table="mails")) == ["42", "7"]
    for wrong in ("042", "4_2", "42.0", "x", "9" * 30, str(2**40)):
        with pytest.raises(UnknownUser):
            read_history(wrong, asked(url, table="mails"))


def test_a_view_and_a_quoted_table(url: str) -> None:
    fill(url, rows_of("ada", 3), table='"Select Mails"')
    execute(url, 'CREATE VIEW seen AS SELECT * FROM "Select Mails"')
    assert len(read_history("ada", asked(url, table="Select Mails")).records) == 3
    assert len(read_history("ada", asked(url, table="seen")).records) == 3


def test_a_query_with_joins_and_without_ids(url: str) -> None:
    execute(
        url,
        "CREATE TABLE people (nr INTEGER, name TEXT)",
        "CREATE TABLE reviews (who INTEGER, day DATE, body TEXT, stars INTEGER)",
        "INSERT INTO people VALUES (1, 'ada'), (2, 'bob')",
        "INSERT INTO reviews VALUES (1, '2020-01-02', 'b', 4), (1, '2020-01-02', 'a', 5), (1, '2019-01-02', 'c', 1)",
        "INSERT INTO reviews VALUES (2, '2020-01-01', 'd', 2)",
    )
    query = "SELECT name AS author, day, body, stars FROM reviews JOIN people ON who = nr"
    read = read_history("ada", config(url, query=query, task="rating"))
    assert [(r.id, r.date, r.input, r.output) for r in read.records] == [
        ("00000001", "2019-01-02", "c", "1"),
        ("00000002", "2020-01-02", "a", "5"),
        ("00000003", "2020-01-02", "b", "4"),
    ]
    assert list_users(config(url, query=query, task="rating")) == ["ada", "bob"]


def test_a_query_of_one_user_needs_no_user_column(url: str) -> None:
    fill(url, rows_of("ada", 3) + rows_of("bob", 3))
    query = 'SELECT id, "Sent At", task, input, output FROM mails WHERE "user" = :user ORDER BY id'
    given = asked(url, query=query)
    assert ids(read_history("bob", given)) == ["bob-0", "bob-1", "bob-2"]
    with pytest.raises(ConfigError, match="cannot be listed by a query with :user"):
        list_users(given)
    with pytest.raises(UnknownUser, match="has no user 'cem'"):
        read_history("cem", given)


def test_wrong_queries(url: str) -> None:
    fill(url, rows_of("ada", 3))
    with pytest.raises(ConfigError, match="has the parameter ':name', but only :user"):
        read_history("ada", asked(url, query="SELECT * FROM mails WHERE id = :name"))
    with pytest.raises(DataError, match="refused: .*mials"):
        read_history("ada", asked(url, query="SELECT * FROM mials"))
    with pytest.raises(DataError, match="refused: "):
        read_history("ada", asked(url, query="SELECT * FROM mails WHERE nothing = :user"))
    with pytest.raises(ConfigError, match="either --table NAME or --query SQL, and not both"):
        read_history("ada", asked(url))
    with pytest.raises(ConfigError, match="either --table"):
        read_history("ada", asked(url, table="mails", query="SELECT 1"))
    with pytest.raises(ConfigError, match="has no column for the date among Sent At, id, input, output, task, user"):
        read_history("ada", config(url, table="mails"))


def test_a_query_cannot_change_the_database(url: str) -> None:
    fill(url, rows_of("ada", 3))
    query = 'DELETE FROM mails WHERE "user" = :user RETURNING *'
    try:
        read_history("ada", asked(url, query=query))
    except DataError as error:  # PostgreSQL streams through a cursor, which takes a SELECT only
        assert "refused: syntax error" in str(error)
    assert len(read_history("ada", asked(url, table="mails")).records) == 3


def test_unknown_users_are_told_the_nearest(url: str) -> None:
    fill(url, rows_of("marta", 2) + rows_of("zoe", 2))
    with pytest.raises(UnknownUser, match="has no user 'marte'. Did you mean 'marta'"):
        read_history("marte", asked(url, table="mails"))
    execute(url, "DELETE FROM mails")
    with pytest.raises(UnknownUser, match="has no user 'marta'.$"):
        read_history("marta", asked(url, table="mails"))


def test_a_database_that_ignores_case_does_not_mix_users(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "a.db").close()
    url = f"sqlite:///{tmp_path / 'a.db'}"
    fill(url, rows_of("Ada", 3) + rows_of("ada", 2), user_type="TEXT COLLATE NOCASE")
    assert ids(read_history("ada", asked(url, table="mails"))) == ["ada-0", "ada-1"]


# PostgreSQL's own


def test_postgres_types(postgres: str) -> None:
    execute(
        postgres,
        "DROP SCHEMA IF EXISTS other CASCADE",
        "CREATE SCHEMA other",
        "CREATE TABLE other.mails (author UUID, sent TIMESTAMPTZ, body TEXT, files JSON, score NUMERIC)",
        "INSERT INTO other.mails VALUES ('11111111-1111-1111-1111-111111111111', '2020-01-01 10:00+02', 'good', '[]', 5),"
        " ('11111111-1111-1111-1111-111111111111', '2020-01-02 10:00+02', 'bad', '[]', 1.0),"
        " (NULL, '2020-01-02 10:00+02', 'bad', '[]', 1.0)",
    )
    given = config(postgres, table="other.mails", task="rating")
    user = "11111111-1111-1111-1111-111111111111"
    read = read_history(user, given)
    assert [(r.date, r.input, r.output) for r in read.records] == [
        ("2020-01-01T08:00:00", "good", "5"),
        ("2020-01-02T08:00:00", "bad", "1"),
    ]
    assert read.malformed == (Malformed("other.mails row 3", "no user"),)
    assert list_users(given) == [user]


def test_postgres_url_without_driver_and_its_label(postgres: str) -> None:
    source = open_source(config(postgres.replace("+psycopg", "").replace("cdcda@", "cdcda:secret@"), table="mails"))
    assert source.label == "postgresql+psycopg://cdcda:***@/postgres mails"


def test_postgres_streams_one_user(postgres: str) -> None:
    execute(
        postgres,
        "DROP TABLE IF EXISTS many",
        "CREATE TABLE many AS SELECT 'user' || n % 100 AS author, n AS id, DATE '2020-01-01' + n AS day,"
        " 'body ' || n AS body, 'subject ' || n AS subject FROM generate_series(1, 100000) n",
        "CREATE INDEX ON many (author)",
    )
    read = read_history("user7", config(postgres, table="many", task="subject"))
    assert len(read.records) == 1000
    assert read.records[0].date == (dt.date(2020, 1, 1) + dt.timedelta(days=7)).isoformat()


# What goes wrong before a database is reached


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        ("oracel://u:secret@h/d", ConfigError, "knows no database 'oracel'"),
        ("://u:secret@h", ConfigError, "is none; expected driver://"),
        ("postgresql://u:secret@h:port/d", ConfigError, "is none; expected driver://"),
        ("mysql+pymysql://u:secret@h/d", MissingDependency, "pymysql"),
        ("postgresql://u:secret@127.0.0.1:1/d", DataError, "refused: .*onnection"),
        ("postgresql://u@127.0.0.1:1/d?password=secret", DataError, "refused: .*onnection"),
    ],
)
def test_urls_that_lead_nowhere_keep_their_password(data: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        read_history("ada", config(data, table="t"))
    assert "secret" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_an_absent_sqlite_file_is_not_created(tmp_path: Path) -> None:
    path = tmp_path / "none.db"
    with pytest.raises(FileError, match="There is no SQLite file"):
        list_users(config(f"sqlite:///{path}", table="t"))
    assert not path.exists()
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(DataError, match="refused: file is not a database"):
        list_users(config(f"sqlite:///{path}", table="t"))


def test_without_sqlalchemy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    with pytest.raises(MissingDependency, match=r"sqlalchemy.*pip install 'cdcda-mobile\[data\]'"):
        read_history("ada", config("sqlite:///x.db", table="t"))
