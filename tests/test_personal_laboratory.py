"""The experiment's two steps can have a machine each: what the first wrote is all that the second needs, and nothing else passes for it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import personal_laboratory
from cdcda_export.progress import Silent
from cdcda_mobile.evaluation.arms import Person
from cdcda_mobile.history import Record
from personal_laboratory import Laboratory
from personal_users import People

ARMS = ["personal", "cdcda", "cdcda-unselected", "cdcda-other"]


def records(user: str, first: int, count: int) -> tuple[Record, ...]:
    return tuple(
        Record(f"{n:03}", "2020-01-01", "headline", f"text {n} of {user}", f"title {n} of {user}") for n in range(first, first + count)
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who was written for, by a teacher that gives as many records as are to be kept."""
    users: list[str] = []

    def written(
        train: Any, held: Any, user: str, config: Any, teacher: Any, base: Any, seed: int, out: Path, *rest: Any, **more: Any
    ) -> Any:
        users.append(f"{user} {out.name}")
        rows = [
            {"id": f"s{n}", "date": "2020-01-01", "task": "headline", "input": f"{user} {n}", "output": out.name}
            for n in range(config.keep)
        ]
        (out / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return SimpleNamespace(metrics=dict)

    monkeypatch.setattr(personal_laboratory, "augment", written)
    return users


def laboratory(tmp_path: Path, keep: int = 3) -> Laboratory:
    persons = [Person(user, records(user, 0, 4), records(user, 4, 2), records(user, 6, 2)) for user in ("ann", "bob")]
    settings = {"train": {}, "augment": {"keep": keep}, "tasks": {"headline": {"augment": {"strategies": ["answer"]}}}, "users": {}}
    found = People([], persons, {"eve": list(records("eve", 0, 5))})
    return Laboratory("headline", settings, found, persons, tmp_path / "work", tmp_path / "results", Silent())


def teacher(tmp_path: Path, content: str = "weights") -> Path:
    path = tmp_path / f"{content}.gguf"
    path.write_text(content)
    return path


def test_what_was_written_once_is_read_where_there_is_no_teacher(tmp_path: Path, asked: list[str]) -> None:
    laboratory(tmp_path).pools(ARMS, teacher(tmp_path))
    assert asked == ["ann selected", "ann unselected", "bob selected", "bob unselected"]
    laboratory(tmp_path).pools(ARMS, teacher(tmp_path))
    assert len(asked) == 4
    (ann, bob), origin = laboratory(tmp_path).written(ARMS)
    assert {name: {row.input for row in rows} for name, rows in ann.synthetic.items()} == {
        "selected": {f"ann {n}" for n in range(3)},
        "unselected": {f"ann {n}" for n in range(3)},
        "other": {f"bob {n}" for n in range(3)},
    }
    laboratory(tmp_path).pools(ARMS, teacher(tmp_path, "other weights"))
    assert len(asked) == 8 and laboratory(tmp_path).written(ARMS)[1] != origin and bob.synthetic


def test_records_of_other_settings_or_teachers_are_none(tmp_path: Path, asked: list[str]) -> None:
    with pytest.raises(SystemExit, match="ann/selected has no synthetic records under the present settings"):
        laboratory(tmp_path).written(ARMS)
    assert not laboratory(tmp_path).written(["personal"])[0][0].synthetic
    laboratory(tmp_path).pools(ARMS, teacher(tmp_path))
    with pytest.raises(SystemExit, match="present settings"):
        laboratory(tmp_path, keep=2).written(ARMS)
    one = laboratory(tmp_path)
    one.people = one.people[:1]
    one.pools(["cdcda"], teacher(tmp_path, "other weights"))
    with pytest.raises(SystemExit, match="several teachers"):
        laboratory(tmp_path).written(ARMS)
