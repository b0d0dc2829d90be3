"""Predictions in LaMP's official format: ``{"task": "LaMP_3", "golds": [{"id", "output"}]}``, what its evaluation script reads."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdcda_export.errors import DataError, FileError
from cdcda_export.manifest import write_json


@dataclass(frozen=True)
class Predictions:
    """The answers to one of LaMP's tasks: id of the question -> answer, in the order of the file."""

    task: str
    answers: dict[str, str]


def write_predictions(path: Path, task: str, answers: Mapping[str, str], ids: Collection[str]) -> None:
    """Write answers atomically and private.

    Args:
        path: the file.
        task: LaMP's name, such as ``LaMP_3``.
        answers: id -> answer.
        ids: of all questions; LaMP scores a file only if it answers each of them and no other.

    Raises:
        DataError: the task has no name in LaMP, or the ids are not those of the questions.
    """
    if not task:
        raise DataError("This task is none of LaMP's, so its answers cannot be written as LaMP predictions.")
    check_ids(answers, ids)
    write_json(path, {"task": task, "golds": [{"id": name, "output": answers[name]} for name in ids]})


def read_predictions(path: Path) -> Predictions:
    """Read predictions, or the outputs of a split, which have the same form.

    Raises:
        FileError: the file is missing, truncated, or of another form.
        DataError: an id stands twice.
    """
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"Cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise FileError(f"{path} is truncated or no JSON; write it again.") from error
    rows = value.get("golds") if isinstance(value, dict) else None
    if not isinstance(rows, list) or not isinstance(value.get("task"), str) or not all(map(_is_row, rows)):
        raise FileError(f'{path} is not in LaMP\'s format, {{"task": "LaMP_3", "golds": [{{"id": "1", "output": "5"}}]}}.')
    twice = [name for name, count in Counter(str(row["id"]) for row in rows).items() if count > 1]
    if twice:
        raise DataError(f"The id {twice[0]!r} stands twice in {path}; every question is answered once.")
    return Predictions(value["task"], {str(row["id"]): row["output"] for row in rows})


def _is_row(row: object) -> bool:
    return isinstance(row, dict) and isinstance(row.get("id"), (str, int)) and isinstance(row.get("output"), str)


def check_ids(found: Collection[str], wanted: Collection[str]) -> None:
    """Hold the ids that were answered to those of the questions; they must match exactly.

    Raises:
        DataError: one is missing, or one is too many.
    """
    for said, ids in (("has no answer", set(wanted) - set(found)), ("is the id of no question", set(found) - set(wanted))):
        if ids:
            raise DataError(f"{min(ids)!r} {said} ({len(ids)} such); LaMP scores a file only if its ids are those of the questions.")
