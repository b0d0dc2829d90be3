"""LaMP's prediction files: written whole, read strictly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cdcda_export.errors import DataError, FileError
from cdcda_mobile.evaluation.predictions import Predictions, check_ids, read_predictions, write_predictions


def test_what_is_written_is_the_official_format_in_the_order_of_the_questions(tmp_path: Path) -> None:
    path = tmp_path / "predictions.json"
    write_predictions(path, "LaMP_3", {"31": "4", "30": "5"}, ["30", "31"])
    assert json.loads(path.read_text()) == {"task": "LaMP_3", "golds": [{"id": "30", "output": "5"}, {"id": "31", "output": "4"}]}
    assert read_predictions(path) == Predictions("LaMP_3", {"30": "5", "31": "4"})
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("ids", "reason"), [(["1", "2"], "'2' has no answer"), ([], "'1' is the id of no question")])
def test_ids_must_match_and_nothing_is_written_otherwise(tmp_path: Path, ids: list[str], reason: str) -> None:
    path = tmp_path / "predictions.json"
    with pytest.raises(DataError, match=reason):
        write_predictions(path, "LaMP_3", {"1": "4"}, ids)
    with pytest.raises(DataError, match="none of LaMP's"):
        write_predictions(path, "", {"1": "4"}, ["1"])
    assert not path.exists()
    check_ids({"1": "4"}, ["1"])


@pytest.mark.parametrize(
    ("text", "error", "reason"),
    [
        ('{"task": "LaMP_3", "golds": [{"id": "1"', FileError, "truncated or no JSON"),
        ("[]", FileError, "not in LaMP's format"),
        ('{"golds": []}', FileError, "not in LaMP's format"),
        ('{"task": "LaMP_3", "golds": [{"id": "1"}]}', FileError, "not in LaMP's format"),
        ('{"task": "LaMP_3", "golds": [{"id": "1", "output": "a"}, {"id": 1, "output": "b"}]}', DataError, "'1' stands twice"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, error: type[Exception], reason: str) -> None:
    path = tmp_path / "golds.json"
    path.write_text(text)
    with pytest.raises(error, match=reason):
        read_predictions(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="Cannot read .*none.json"):
        read_predictions(tmp_path / "none.json")
