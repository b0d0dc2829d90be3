"""LaMP's metrics, by hand-computed golden values."""

from __future__ import annotations

import math

import pytest

from cdcda_export.verify import Probe
from cdcda_mobile.evaluate import parse_rating, score, task_rows
from cdcda_mobile.history import Record
from cdcda_mobile.tasks import get_task


def test_rouge_of_texts() -> None:
    result = score(get_task("headline"), ["the cat sat ", "x"], ["the cat sat on a mat", "y"])
    assert result.metric == "ROUGE-L"
    assert result.value == pytest.approx((2 * 1.0 * 0.5 / 1.5) / 2)
    assert result.more["ROUGE-1"] == pytest.approx(result.value)


def test_labels_must_match_exactly_after_stripping() -> None:
    result = score(get_task("citation"), ["[1]", " [2] ", "[1].", "[1]"], ["[1]", "[2]", "[1]", "[2]"])
    assert result.value == 0.5
    # [1]: 1 hit, 2 said, 2 true; [2]: 1 hit, 1 said, 2 true
    assert result.more["macro-F1"] == pytest.approx((2 / 4 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("answer", "gold", "value"), [("4", 4, 4.0), ("4.5", 4, 4.5), ("bad", 2, 5.0), ("", 4, 1.0), ("nan", 3, 5.0), ("inf", 5, 1.0)]
)
def test_unparsable_ratings_count_as_the_farther_end(answer: str, gold: float, value: float) -> None:
    assert parse_rating(answer, gold) == value


def test_ratings() -> None:
    result = score(get_task("rating"), ["4", "2", "great"], ["5", "2", "4"])
    assert result.metric == "MAE"
    assert result.lower_is_better
    assert result.value == pytest.approx((1 + 0 + 3) / 3)
    assert result.more["RMSE"] == pytest.approx(math.sqrt(10 / 3))
    assert result.more["accuracy"] == pytest.approx(1 / 3)


def test_one_row_per_task_with_its_own_n_and_tokens() -> None:
    records = [
        Record("1", "2024-01-01", "headline", "a", "b c"),
        Record("2", "2024-01-02", "rating", "a", "3"),
        Record("3", "2024-01-03", "headline", "x", "y"),
    ]
    probes = [Probe("", "", (1,), (5, 6, 2)), Probe("", "", (1,), (7, 2)), Probe("", "", (1,), (8, 2))]
    rows = task_rows(records, probes, [6.0, 4.0, 4.0], [3.0, 2.0, 2.0], ["z", "1", "z"], ["b c", "3", "q"])
    assert [(r["task"], r["n"], r["tokens"]) for r in rows] == [("headline", 2, 5), ("rating", 1, 2)]
    assert rows[0]["nll_base"] == 2.0
    assert rows[0]["nll_personal"] == 1.0
    assert (rows[0]["base"], rows[0]["personal"]) == (0.0, 0.5)
    assert (rows[1]["base"], rows[1]["personal"]) == (2.0, 0.0)
