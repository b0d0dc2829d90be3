"""LaMP's prediction files: written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cdcda_export.errors import DataError
from cdcda_mobile.evaluation.predictions import check_ids, write_predictions


def test_what_is_written_is_the_official_format_in_the_order_of_the_questions(tmp_path: Path) -> None:
    path = tmp_path / "predictions.json"
    write_predictions(path, "LaMP_3", {"31": "4", "30": "5"}, ["30", "31"])
    assert json.loads(path.read_text()) == {"task": "LaMP_3", "golds": [{"id": "30", "output": "5"}, {"id": "31", "output": "4"}]}
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
