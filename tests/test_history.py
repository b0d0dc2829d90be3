"""What a history is: recognised sources, cleaned rows, suggestions, and the split by time."""

from __future__ import annotations

import datetime as dt
import json
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from cdcda_export.errors import ConfigError, DataError, FileError, UnknownUser
from cdcda_mobile.config import HistoryConfig
from cdcda_mobile.history import (
    SOURCES,
    History,
    Malformed,
    Record,
    Split,
    check_split,
    list_users,
    read_history,
    source_kind,
    split_by_time,
)
from cdcda_mobile.sources.records import Row, Unusable, as_integer, clean, normal_date
from history_rows import config, rows_of, write_jsonl


def record(number: int, date: str = "", output: str = "") -> Record:
    return Record(f"r{number:03d}", date or f"2020-01-{number + 1:02d}", "headline", f"input {number}", output or f"output {number}")


def history(records: list[Record]) -> History:
    return History("u", tuple(records), (), "test")


# Which source is meant


def test_source_kinds(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "x_train_questions.json").write_text("[]")
    expected = {
        "samples": "samples",
        "a/b.jsonl": "jsonl",
        "b.jsonl.gz": "jsonl",
        "c.CSV": "csv",
        "d.parquet": "parquet",
        "sqlite:///x.db": "sql",
        str(tmp_path): "lamp",
    }
    assert {data: source_kind(data) for data in expected} == expected
    assert set(expected.values()) == set(SOURCES)


@pytest.mark.parametrize(("data", "said"), [("sampels", "Did you mean 'samples'"), ("notes.txt", "expected samples")])
def test_no_source(data: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_history("42", config(data))


def test_directory_without_lamp_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no \*_questions.json"):
        read_history("42", config(tmp_path))


def test_table_without_database(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows_of("ada", 2))
    with pytest.raises(ConfigError, match="belong to a database"):
        read_history("ada", config(path, table="t"))


def test_mapping_and_task_are_checked_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="no key 'inputs'. Did you mean 'input'"):
        read_history("42", config("nowhere.jsonl", map={"inputs": "x"}))
    with pytest.raises(ConfigError, match="no task 'headlin'. Did you mean 'headline'"):
        list_users(config("nowhere.jsonl", task="headlin"))
    with pytest.raises(FileError, match="There is no file nowhere.jsonl"):
        read_history("42", config("nowhere.jsonl"))


# Users and counts


def test_only_the_users_records_in_time_order(tmp_path: Path) -> None:
    rows = rows_of("bob", 3) + list(reversed(rows_of("ada", 30))) + rows_of("cem", 3)
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    read = read_history("ada", HistoryConfig(data=str(path)))
    assert (read.user, len(read.records), read.malformed, read.source) == ("ada", 30, (), str(path))
    assert [item.date for item in read.records] == sorted(row["date"] for row in rows_of("ada", 30))
    assert all(item.output.endswith("of ada") for item in read.records)
    assert list_users(config(path)) == ["ada", "bob", "cem"]


def test_unknown_user_is_told_the_nearest(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row for name in ("marta", "martin", "zoe") for row in rows_of(name, 2)])
    with pytest.raises(UnknownUser, match="has no user 'marti'. Did you mean 'martin' or 'marta'"):
        read_history("marti", config(path))
    with pytest.raises(UnknownUser, match="Known are marta, martin, zoe"):
        read_history("17", config(path))
    with pytest.raises(UnknownUser, match="no user"):
        read_history("zoe\0", config(path))


def test_too_few_records_says_how_many(tmp_path: Path) -> None:
    rows = rows_of("ada", 5)
    rows[2]["output"] = " "
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"User ada has 4 usable records \(1 more rows are malformed\), but 20 are needed"):
        read_history("ada", HistoryConfig(data=str(path)))


def test_nothing_usable(tmp_path: Path) -> None:
    rows = [{**row, "date": "soon"} for row in rows_of("ada", 3)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="no usable record; 3 rows are malformed, first a.jsonl:1: cannot read the date 'soon'"):
        read_history("ada", config(path))
    (tmp_path / "b.jsonl").write_text("nonsense\n")
    with pytest.raises(DataError, match="all 1 are malformed, first b.jsonl:1: not valid JSON"):
        read_history("ada", config(tmp_path / "b.jsonl"))
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(DataError, match="is empty"):
        read_history("ada", config(tmp_path / "c.jsonl"))


def test_duplicates_and_repeated_ids(tmp_path: Path) -> None:
    rows = rows_of("ada", 4)
    rows[1]["id"] = rows[2]["id"] = rows[0]["id"]
    rows[3]["id"] = "ada-0-2"
    rows.append({**rows[0], "id": "other"})
    rows.append({key: value for key, value in rows_of("ada", 1, start=9)[0].items() if key != "id"})
    read = read_history("ada", config(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert [item.id for item in read.records] == ["ada-0", "ada-0-3", "ada-0-4", "ada-0-2", "00000006"]
    assert read.malformed == (Malformed("a.jsonl:5", "duplicate of a.jsonl:1"),)


# Cleaning one row


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"date": "yesterday"}, "cannot read the date 'yesterday'"),
        ({"date": None}, "no date"),
        ({"date": True}, "date is not text but bool"),
        ({"date": "2020-13-01"}, "cannot read the date"),
        ({"date": 10**30}, "cannot read the date"),
        ({"date": float("nan")}, "cannot read the date"),
        ({"input": ""}, "empty input"),
        ({"input": None}, "no input"),
        ({"input": {"a": 1}}, "input is not text but dict"),
        ({"output": "a\0b"}, "output holds a NUL character"),
        ({"output": "a\ud800b"}, "output is not valid UTF-8"),
        ({"output": b"\xff"}, "output is not valid UTF-8"),
        ({"output": float("nan")}, "no output"),
        ({"task": "headlines"}, "there is no task 'headlines'. Did you mean 'headline'"),
        ({"task": None}, "no task"),
        ({"task": "rating", "output": "6"}, "'6' is not one of the 5 labels of rating"),
        ({"task": "movie_tag", "output": "western"}, "'western' is not one of the 15 labels"),
        ({"id": {}}, "id is not text but dict"),
    ],
)
def test_refused_rows_say_why(change: dict[str, object], reason: str) -> None:
    fields = {**rows_of("ada", 1)[0], **change}
    refused = clean(Row("f:1", 1, fields))
    assert isinstance(refused, Malformed)
    assert refused.place == "f:1"
    assert reason in refused.reason


def test_values_become_text() -> None:
    fields = {**rows_of("ada", 1)[0], "input": [" a ", "b"], "output": 4.0, "task": "rating", "id": 0}
    assert clean(Row("f:1", 1, fields)) == Record("0", "2020-01-01", "rating", "a\nb", "4")
    spelled = clean(Row("f:1", 7, {**fields, "task": "movie_tag", "output": "Sci-Fi", "id": ""}))
    assert isinstance(spelled, Record)
    assert (spelled.id, spelled.output) == ("00000007", "sci-fi")


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("2019", "2019"),
        (2019, "2019"),
        ("2019-05", "2019-05"),
        ("20190503", "2019-05-03"),
        (" 2019-05-03 ", "2019-05-03"),
        ("2019-05-03T10:00:00Z", "2019-05-03T10:00:00"),
        ("2019-05-03 10:00:00+02:00", "2019-05-03T08:00:00"),
        ("2019-05-03T10:00:00.5", "2019-05-03T10:00:00.500000"),
        (1556877600, "2019-05-03T10:00:00"),
        ("1556877600", "2019-05-03T10:00:00"),
        (1556877600123, "2019-05-03T10:00:00.123000"),
        (Decimal("1556877600"), "2019-05-03T10:00:00"),
        (-86400, "1969-12-31T00:00:00"),
        (dt.date(2019, 5, 3), "2019-05-03"),
        (dt.datetime(2019, 5, 3, 10, tzinfo=dt.timezone(dt.timedelta(hours=-1))), "2019-05-03T11:00:00"),
    ],
)
def test_dates(given: object, normal: str) -> None:
    assert normal_date(given) == normal


def test_dates_of_different_exactness_sort() -> None:
    times = [
        "2018-12-31T23:59:59Z",
        "2019",
        "2019-01",
        "2019-01-01",
        "2019-01-01T00:00:00.25",
        "2019-01-01T00:00:01",
        "2020-01-01",
    ]
    normal = [normal_date(time) for time in times]
    assert normal == sorted(normal)
    with pytest.raises(Unusable):
        normal_date("0001-01-01T00:00:00+05:00")


@pytest.mark.parametrize(
    ("user", "number"),
    [("42", 42), ("-3", -3), ("007", None), ("4_2", None), ("--5", None), ("²", None), (str(2**63), None), ("9" * 5000, None)],
)
def test_integer_ids(user: str, number: int | None) -> None:
    assert as_integer(user) == number


# The split


def test_split_sizes_and_order() -> None:
    records = [record(number) for number in range(25)]
    split = split_by_time(history(records[::-1]), HistoryConfig())
    assert split == Split(tuple(records[:18]), tuple(records[18:20]), tuple(records[20:]))


def test_validation_is_at_least_two_and_train_never_empty() -> None:
    def sizes(count: int, **more: Any) -> tuple[int, int, int]:
        split = split_by_time(history([record(number) for number in range(count)]), HistoryConfig(**more))
        return len(split.train), len(split.validation), len(split.test)

    assert sizes(10) == (6, 2, 2)
    assert sizes(4) == (1, 2, 1)
    assert sizes(2) == (1, 0, 1)
    assert sizes(10, validation_fraction=0) == (8, 0, 2)
    with pytest.raises(DataError, match="has 1 records, too few"):
        sizes(1)


def test_ties_are_broken_by_id() -> None:
    records = [record(number, date="2020-01-01") for number in range(20)]
    one, two = (split_by_time(history(order), HistoryConfig()) for order in (records, records[::-1]))
    assert one == two
    assert [item.id for item in one.test] == ["r016", "r017", "r018", "r019"]


def test_tasks_are_split_together() -> None:
    records = [record(number) for number in range(20)]
    mixed = [Record(r.id, r.date, "rating" if index > 14 else r.task, r.input, "3") for index, r in enumerate(records)]
    split = split_by_time(history(mixed), HistoryConfig())
    assert {item.task for item in split.test} == {"rating"}
    assert {item.task for item in split.train} == {"headline"}


def test_repeated_texts_leave_the_earlier_part() -> None:
    records = [record(number) for number in range(20)]
    records[3] = Record("early", records[3].date, "headline", "INPUT  19!", "Output, 19")
    records[5] = Record("middle", records[5].date, "headline", "input 15", "output 15")
    split = split_by_time(history(records), HistoryConfig())
    assert [item.id for item in split.test] == ["r016", "r017", "r018", "r019"]
    assert [item.id for item in split.validation] == ["r014", "r015"]
    assert {item.id for item in split.train} == {f"r{number:03d}" for number in range(14)} - {"r003", "r005"}
    assert split.dropped == (
        Malformed("record early", "its text returns in the test part as record r019"),
        Malformed("record middle", "its text returns in the validation part as record r015"),
    )


def test_the_same_input_with_another_answer_stays() -> None:
    records = [Record(r.id, r.date, r.task, "the same", r.output) for r in (record(number) for number in range(20))]
    assert split_by_time(history(records), HistoryConfig()).dropped == ()


def test_texts_of_symbols_only_are_told_apart() -> None:
    records = [record(number) for number in range(20)]
    records[0] = Record("smile", records[0].date, "reply", "?", "🙂")
    records[19] = Record("frown", records[19].date, "reply", "?", "🙁")
    assert split_by_time(history(records), HistoryConfig()).dropped == ()


@pytest.mark.parametrize(
    ("split", "said"),
    [
        (Split((record(1),), (), (record(1),)), "share a record"),
        (Split((record(2),), (), (record(1),)), "reaches into the time"),
        (Split((record(1),), (Record("x", "2020-01-09", "headline", "Input 1", "OUTPUT 1"),), ()), "stands in the train part"),
    ],
)
def test_a_wrong_split_is_noticed(split: Split, said: str) -> None:
    with pytest.raises(DataError, match=said):
        check_split(split)


# Sample users and real data


def test_sample_users_are_listed_and_safe() -> None:
    users = list_users(HistoryConfig())
    assert len(users) >= 4
    assert "42" in users
    for user in users:
        read = read_history(user, HistoryConfig())
        assert read.malformed == ()
        assert read.source == "samples"
        assert len(read.records) >= 80
        assert len({item.task for item in read.records}) >= 2
        split = split_by_time(read, HistoryConfig())
        assert split.dropped == ()
        assert all((split.train, split.validation, split.test))
    for outside in ("../../etc", "../samples/42", "42.jsonl", "", "/etc/passwd"):
        with pytest.raises(UnknownUser):
            read_history(outside, HistoryConfig())


def real(name: str) -> Path:
    folder = os.environ.get("CDCDA_DATA")
    path = Path(folder or "") / "personal" / name
    if not folder or not path.is_file():
        pytest.skip(f"CDCDA_DATA names no folder with personal/{name}")
    return path


def test_real_headlines() -> None:
    given = HistoryConfig(data=str(real("headlines.jsonl.gz")), task="headline")
    users = list_users(given)
    assert len(users) == 58
    read = read_history(users[0], given)
    split = split_by_time(read, given)
    kept = len(split.train) + len(split.validation) + len(split.test)
    assert kept + len(split.dropped) == len(read.records)
    assert len(split.test) == int(len(read.records) * 0.2 + 0.5)
    near = users[0][:-1] + "_"
    with pytest.raises(UnknownUser, match=users[0]):
        read_history(near, given)


def test_real_categories_outside_the_closed_set_are_counted() -> None:
    given = config(real("headlines.jsonl.gz"), task="news_category")
    user = "h328d2f37"  # writes for QUEER VOICES, which LaMP's categories do not know
    categories, headlines = read_history(user, given), read_history(user, config(given.data, task="headline"))
    refused = [item for item in categories.malformed if "is not one of the 15 labels of news_category" in item.reason]
    repeated = len(categories.malformed) - len(refused)
    assert len(categories.records) + len(refused) + repeated == len(headlines.records) + len(headlines.malformed)
    assert refused
    assert all(item.place.startswith("headlines.jsonl.gz:") for item in refused)


def test_real_commits_join_their_files() -> None:
    path = real("commits.jsonl.gz")
    given = HistoryConfig(data=str(path), task="commit")
    users = list_users(given)
    assert len(users) == 134
    read = read_history(users[5], given)
    assert all(item.input and "[" not in item.input[:1] for item in read.records)
    assert json.dumps([item.date for item in read.records]) == json.dumps(sorted(item.date for item in read.records))
    split_by_time(read, given)
