"""The laboratory: the page of results is what the results say, and a result names its machine and never a record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from laboratory import RESULTS
from summary import README, render


def test_the_page_of_results_is_up_to_date() -> None:
    assert README.read_text(encoding="utf-8") == render(), "run python benchmarks/summary.py"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_result_says_where_it_was_measured(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["figures"] and result["raw"] and result["versions"]["python"] and result["hardware"]["cores"]
    assert all(value is None or isinstance(value, int | float) for value in result["figures"].values())
    assert (Path(__file__).parent.parent / "benchmarks" / f"{path.stem}.py").exists()
