"""Predictions in LaMP's official format: ``{"task": "LaMP_3", "golds": [{"id", "output"}]}``, what its evaluation script reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from cdcda_export.errors import DataError
from cdcda_export.manifest import write_json


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


def check_ids(found: Collection[str], wanted: Collection[str]) -> None:
    """Hold the ids that were answered to those of the questions; they must match exactly.

    Raises:
        DataError: one is missing, or one is too many.
    """
    for said, ids in (("has no answer", set(wanted) - set(found)), ("is the id of no question", set(found) - set(wanted))):
        if ids:
            raise DataError(f"{min(ids)!r} {said} ({len(ids)} such); LaMP scores a file only if its ids are those of the questions.")
