"""JSONL, CSV and Parquet: columns, broken rows with their places, and how much is held in memory."""

from __future__ import annotations

import csv
import datetime as dt
import gzip
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdcda_export.errors import ConfigError, DataError, FileError, MissingDependency, UnknownUser
from cdcda_mobile.history import Malformed, list_users, read_history
from cdcda_mobile.sources import files
from cdcda_mobile.sources.parquet import _may_hold
from cdcda_mobile.tasks import TASKS
from history_rows import Rows, config, rows_of, write_jsonl


def write_gzip(path: Path, rows: Rows) -> Path:
    path.write_bytes(gzip.compress(write_jsonl(path.with_suffix(".plain"), rows).read_bytes()))
    return path


def write_csv(path: Path, rows: Rows) -> Path:
    lines = [",".join(rows[0])] + [",".join('"' + str(value).replace('"', '""') + '"' for value in row.values()) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_parquet(path: Path, rows: Rows) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    return path


WRITERS: dict[str, Callable[[Path, Rows], Path]] = {
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": write_gzip,
    "a.csv": write_csv,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_gives_the_same_history(name: str, tmp_path: Path) -> None:
    rows = rows_of("bob", 9) + rows_of("ada", 12) + rows_of("cem", 9)
    path = WRITERS[name](tmp_path / name, rows)
    read = read_history("ada", config(path))
    assert [(r.id, r.date, r.task, r.input, r.output) for r in read.records] == [
        (row["id"], row["date"], row["task"], row["input"], row["output"]) for row in rows_of("ada", 12)
    ]
    assert read.malformed == ()
    assert list_users(config(path)) == ["ada", "bob", "cem"]


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_reports_bad_rows_of_the_user_and_of_nobody(name: str, tmp_path: Path) -> None:
    rows = rows_of("ada", 4) + rows_of("bob", 4)
    rows[1]["output"] = ""
    rows[2]["date"] = "some day"
    rows[5]["output"] = ""  # bob's own trouble
    rows[6]["user"] = ""
    read = read_history("ada", config(WRITERS[name](tmp_path / name, rows)))
    assert [record.id for record in read.records] == ["ada-0", "ada-3"]
    reasons = [("empty output", 2), ("cannot read the date 'some day'", 3), ("no user", 7)]
    if name == "a.parquet":
        expected = [Malformed(f"{name} row {row}", reason) for reason, row in reasons]
    else:
        header = 1 if name == "a.csv" else 0
        expected = [Malformed(f"{name}:{row + header}", reason) for reason, row in reasons]
    assert list(read.malformed) == expected


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_maps_columns(name: str, tmp_path: Path) -> None:
    renamed = {"user": "who", "id": "nr", "date": "when", "task": "kind", "input": "given", "output": "made"}
    rows = [{renamed[key]: value for key, value in row.items()} for row in rows_of("ada", 3)]
    path = WRITERS[name](tmp_path / name, rows)
    assert len(read_history("ada", config(path, map=renamed)).records) == 3
    with pytest.raises(ConfigError, match="has no column 'wen' to be the date. Did you mean 'when'"):
        read_history("ada", config(path, map={**renamed, "date": "wen"}))
    with pytest.raises(ConfigError, match="no column for the user among given, kind, made, nr, when, who: .*--map user=COLUMN"):
        read_history("ada", config(path, map={"date": "when", "task": "kind"}))


@pytest.mark.parametrize(("user", "suggested"), [("adda", "Did you mean 'ada'"), ("zzz", "Known are")])
@pytest.mark.parametrize("name", WRITERS)
def test_every_file_suggests_users(name: str, user: str, suggested: str, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path / name, rows_of("ada", 2) + rows_of("bob", 2))
    with pytest.raises(UnknownUser, match=suggested):
        read_history(user, config(path))


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_may_be_absent_or_damaged(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(FileError, match="There is no file"):
        read_history("ada", config(path))
    WRITERS[name](path, rows_of("ada", 2000))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    if name in ("a.jsonl.gz", "a.parquet"):
        with pytest.raises(FileError, match="cut short|cannot be read as Parquet"):
            read_history("ada", config(path))
    else:
        assert len(read_history("ada", config(path)).malformed) == 1  # the line that was cut
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="holds no"):
        read_history("ada", config(path))


# Columns by name


@pytest.mark.parametrize(
    ("task", "columns", "pair"),
    [
        ("headline", {"text": "t", "title": "h", "category": "c"}, ("t", "h")),
        ("news_category", {"text": "t", "title": "h", "category": "SPORTS"}, ("t", "sports")),
        ("subject", {"body": "b", "subject": "s"}, ("b", "s")),
        ("rating", {"text": "t", "score": 3}, ("t", "3")),
        ("movie_tag", {"description": "d", "tag": "comedy"}, ("d", "comedy")),
        ("paper_title", {"abstract": "a", "title": "t"}, ("a", "t")),
        ("commit", {"files": ["x.py", "y.py"], "message": "m"}, ("x.py\ny.py", "m")),
        ("reply", {"message": "m", "reply": "r"}, ("m", "r")),
        ("citation", {"question": "q", "answer": "[2]"}, ("q", "[2]")),
        ("tweet", {"paraphrase": "p", "tweet": "t"}, ("p", "t")),
        ("news_section", {"text": "t", "category": "WEIRD NEWS"}, ("t", "weird news")),
        ("writing", {"plain": "p", "text": "t"}, ("p", "t")),
        ("headline", {"Text": "t", "TITLE": "h"}, ("t", "h")),
    ],
)
def test_columns_are_guessed_by_task(task: str, columns: dict[str, object], pair: tuple[str, str], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"author": 7, "sent": "2020", **columns}])
    (record,) = read_history("7", config(path, task=task)).records
    assert (record.task, record.input, record.output) == (task, *pair)


@pytest.mark.parametrize("task", ["tweet", "writing"])
def test_a_text_without_an_input_is_completed(task: str, tmp_path: Path) -> None:
    rows = [{"author": 7, "sent": "2020", "text": "one two three four five"}, {"author": 7, "sent": "2021"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    read = read_history("7", config(path, task=task))
    assert [(r.task, r.input, r.output) for r in read.records] == [(TASKS[task].completion, "one", "one two three four five")]
    assert [bad.reason for bad in read.malformed] == ["no output"]


def test_a_task_column_wins_and_the_task_fills_its_gaps(tmp_path: Path) -> None:
    rows = rows_of("ada", 3)
    rows[1]["task"] = None
    rows[2]["task"] = "subject"
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    read = read_history("ada", config(path, task="reply"))
    assert [record.task for record in read.records] == ["headline", "reply", "subject"]
    assert read_history("ada", config(path)).malformed == (Malformed("a.jsonl:2", "no task"),)


def test_no_task_at_all(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"user": "ada", "date": "2020", "input": "a", "output": "b"}])
    with pytest.raises(ConfigError, match="has no task column: name the task of its records with --task, one of citation, "):
        read_history("ada", config(path))


def test_a_task_whose_columns_are_missing_is_malformed(tmp_path: Path) -> None:
    base = {"user": "ada", "date": "2020", "text": "t", "title": "h"}
    rows = [{**base, "task": "headline"}, {**base, "task": "rating"}]
    read = read_history("ada", config(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert len(read.records) == 1
    assert read.malformed[0].reason.startswith("no column for the output of task rating among date, task, text, title, user")


# JSONL


def test_jsonl_lines_that_are_no_rows(tmp_path: Path) -> None:
    good = json.dumps(rows_of("ada", 1)[0]).encode()
    lines = [
        b"\xef\xbb\xbf" + good,
        b"{broken",
        b"",
        b"[1, 2]",
        b'{"user": "ada\xff"}',
        b"[" * 100_000,
        b'{"n": ' + b"9" * 5000 + b"}",
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    read = read_history("ada", config(tmp_path / "a.jsonl"))
    assert len(read.records) == 1
    assert [(item.place, item.reason) for item in read.malformed] == [
        ("a.jsonl:2", "not valid JSON"),
        ("a.jsonl:4", "not a JSON object but list"),
        ("a.jsonl:5", "not valid UTF-8"),
        ("a.jsonl:6", "not valid JSON"),
        ("a.jsonl:7", "not valid JSON"),
    ]


def test_a_line_too_long_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LONGEST_LINE", 1 << 20)
    good = json.dumps(rows_of("ada", 1)[0])
    (tmp_path / "a.jsonl").write_text('{"x": "' + "y" * (3 << 20) + '"}\n' + good + "\n")
    read = read_history("ada", config(tmp_path / "a.jsonl"))
    assert len(read.records) == 1
    assert read.malformed == (Malformed("a.jsonl:1", "line longer than 1 MiB"),)


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes that Python held at most during a call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv"])
def test_one_user_is_read_without_the_others(name: str, tmp_path: Path) -> None:
    rows = [{**row, "input": f"{row['input']} " + "word " * 200} for number in range(200) for row in rows_of(f"user{number}", 30)]
    path = WRITERS[name](tmp_path / name, rows)
    del rows
    peak = peak_of(lambda: read_history("user77", config(path)))
    assert peak < 1_500_000, f"{peak} bytes for one user of a file of 6.5 MB"


# CSV


def test_csv_with_quotes_breaks_semicolons_and_short_rows(tmp_path: Path) -> None:
    text = (
        "\ufeffuser;date;task;input;output\r\n"
        'ada;2020-01-01;reply;"two\r\nlines; ""quoted""";yes\r\n'
        "ada;2020-01-02;reply;too short\r\n"
        "\r\n"
        "ada;2020-01-03;reply;a;b\r\n"
    )
    (tmp_path / "a.csv").write_bytes(text.encode() + b"ada;2020-01-04;reply;\xff;b\r\nada;2020-01-05;reply;a\0;b\r\n")
    read = read_history("ada", config(tmp_path / "a.csv"))
    assert [(record.id, record.input) for record in read.records] == [("00000002", 'two\nlines; "quoted"'), ("00000006", "a")]
    assert [(item.place, item.reason) for item in read.malformed] == [
        ("a.csv:4", "4 fields where the header has 5"),
        ("a.csv:7", "input is not valid UTF-8"),
        ("a.csv:8", "input holds a NUL character"),
    ]


def test_csv_with_a_field_that_never_ends(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", rows_of("ada", 3))
    with path.open("a") as file:
        file.write('"ada')
    read = read_history("ada", config(path))
    assert len(read.records) == 3
    assert [item.reason for item in read.malformed] == ["1 fields where the header has 6"]


def test_csv_with_a_field_too_long_for_the_parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LONGEST_LINE", 1000)
    before = csv.field_size_limit(1000)
    try:
        rows = rows_of("ada", 3)
        rows[1]["input"] = "x" * 5000
        read = read_history("ada", config(write_csv(tmp_path / "a.csv", rows)))
    finally:
        csv.field_size_limit(before)
    assert [record.id for record in read.records] == ["ada-0", "ada-2"]
    assert read.malformed == (Malformed("a.csv:3", "not valid CSV (field larger than field limit (1000))"),)


def test_csv_header_only(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user,date,task,input,output\n")
    with pytest.raises(DataError, match="is empty"):
        read_history("ada", config(tmp_path / "a.csv"))


# Parquet


def test_parquet_types(tmp_path: Path) -> None:
    zone = dt.timezone(dt.timedelta(hours=2))
    moment = dt.datetime(2020, 5, 3, 10, tzinfo=zone)
    table = pa.table(
        {
            "user": pa.array([42, 42, 7, None], pa.int64()),
            "time": pa.array([moment, moment + dt.timedelta(days=1), moment, moment], pa.timestamp("ns", "Europe/Berlin")),
            "text": pa.array(["good", "bad", "x", "y"]).dictionary_encode(),
            "score": [5.0, 1.0, 1.0, 1.0],
            "unused": [b"\0" * 1000] * 4,
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    given = config(tmp_path / "a.parquet", task="rating")
    read = read_history("42", given)
    assert [(r.id, r.date, r.input, r.output) for r in read.records] == [
        ("00000001", "2020-05-03T08:00:00", "good", "5"),
        ("00000002", "2020-05-04T08:00:00", "bad", "1"),
    ]
    assert read.malformed == (Malformed("a.parquet row 4", "no user"),)
    assert list_users(given) == ["42", "7"]


def test_parquet_dates_of_days_and_nanoseconds(tmp_path: Path) -> None:
    for kind, value, date in (
        (pa.date32(), dt.date(2020, 5, 3), "2020-05-03"),
        (pa.date64(), dt.date(2020, 5, 3), "2020-05-03"),
        (pa.timestamp("ns"), 1588500000123456789, "2020-05-03T10:00:00.123456"),
        (pa.timestamp("s"), 1588500000, "2020-05-03T10:00:00"),
    ):
        table = pa.table({"user": ["a"], "date": pa.array([value], kind), "input": ["i"], "output": ["o"]})
        pq.write_table(table, tmp_path / "a.parquet")
        (record,) = read_history("a", config(tmp_path / "a.parquet", task="reply")).records
        assert record.date == date


def test_parquet_reads_only_the_row_groups_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for number in range(10, 40) for row in rows_of(f"user{number}", 7)]
    path = write_parquet(tmp_path / "a.parquet", rows)
    asked: list[list[int]] = []
    original = pq.ParquetFile.iter_batches

    def spy(self: Any, *args: Any, **more: Any) -> Any:
        asked.append(more["row_groups"])
        return original(self, *args, **more)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    assert len(read_history("user22", config(path)).records) == 7
    assert asked == [[12]]


@pytest.mark.parametrize(("user", "groups"), [("3", [[3]]), ("03", []), ("x", []), ("-1", [])])
def test_parquet_row_groups_of_integer_users(user: str, groups: list[list[int]], tmp_path: Path) -> None:
    rows = [{**row, "user": number} for number in range(5) for row in rows_of(f"user{number}", 7)]
    path = write_parquet(tmp_path / "a.parquet", rows)
    file = pq.ParquetFile(path)
    found = [group for group in range(5) if _may_hold(file.metadata.row_group(group), "user", user)]
    assert [[group] for group in found] == groups


def test_parquet_without_statistics(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(rows_of("ada", 14))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7, write_statistics=False)
    assert len(read_history("ada", config(tmp_path / "a.parquet")).records) == 14


def test_parquet_text_that_is_no_utf8_costs_a_row(tmp_path: Path) -> None:
    rows = rows_of("ada", 3) + rows_of("bob", 3)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"Matter 1 of ada", b"Matter \xff of ada", 1))
    read = read_history("ada", config(path))
    assert [record.id for record in read.records] == ["ada-0", "ada-2"]
    assert read.malformed == (Malformed("a.parquet row 2", "output is not valid UTF-8"),)


def test_parquet_damaged_in_the_middle(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", rows_of("ada", 70))
    whole = bytearray(path.read_bytes())
    whole[4:2000] = b"\xff" * 1996
    path.write_bytes(whole)
    with pytest.raises(FileError, match="a.parquet is damaged: "):
        read_history("ada", config(path))


def test_parquet_row_group_with_nobody_is_read_for_everybody(tmp_path: Path) -> None:
    rows = rows_of("ada", 7) + [{**row, "user": None} for row in rows_of("bob", 7)]
    read = read_history("ada", config(write_parquet(tmp_path / "a.parquet", rows)))
    assert (len(read.records), len(read.malformed)) == (7, 7)


def test_parquet_row_group_of_others_with_nobody_is_read(tmp_path: Path) -> None:
    rows = rows_of("ada", 7) + rows_of("bob", 7)
    rows[9]["user"] = None
    read = read_history("ada", config(write_parquet(tmp_path / "a.parquet", rows)))
    assert (len(read.records), read.malformed) == (7, (Malformed("a.parquet row 10", "no user"),))


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", rows_of("ada", 2))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependency, match=r"pyarrow.*pip install 'cdcda-mobile\[data\]'"):
        read_history("ada", config(path))


# Sample users, from a folder of our own


def test_samples_are_read_by_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "samples").mkdir()
    rows = [{key: value for key, value in row.items() if key != "user"} for row in rows_of("ada", 3)]
    write_jsonl(tmp_path / "samples" / "ada.jsonl", [*rows, {"id": "x"}])
    write_jsonl(tmp_path / "outside.jsonl", rows)
    monkeypatch.setattr(files.resources, "files", lambda package: tmp_path)
    assert list_users(config("samples")) == ["ada"]
    read = read_history("ada", config("samples"))
    assert (len(read.records), read.source) == (3, "samples")
    assert read.malformed == (Malformed("ada.jsonl:4", "no task"),)
    with pytest.raises(UnknownUser):
        read_history("../outside", config("samples"))
