"""LaMP's metrics, by golden values: worked out by hand where that is said, else those of a library that is named."""

from __future__ import annotations

import math

import pytest

from cdcda_export.errors import DataError
from cdcda_mobile.evaluation.metrics import macro_f1, parse_rating, score
from cdcda_mobile.tasks import get_task


def test_rouge_of_texts() -> None:
    result = score(get_task("headline"), ["the cat sat ", "x"], ["the cat sat on a mat", "y"])
    assert result.metric == "ROUGE-L"
    assert result.value == pytest.approx((2 * 1.0 * 0.5 / 1.5) / 2)
    assert result.more["ROUGE-1"] == pytest.approx(result.value)


def test_rouge_ignores_case_and_punctuation_and_minds_order() -> None:
    # By hand. Words shared: red barge the ferry waits, 5 of 5 said and of 6 true: F1 = 10/11. Longest common subsequence: 2 words
    # ("ferry waits", "red barge"), so P = 2/5, R = 2/6, F1 = 4/11.
    result = score(get_task("headline"), ["red barge: the ferry waits"], ["Ferry waits for the red barge"])
    assert result.more["ROUGE-1"] == pytest.approx(10 / 11)
    assert result.value == pytest.approx(4 / 11)


def test_words_are_not_stemmed() -> None:
    assert score(get_task("headline"), ["cats"], ["cat"]).value == 0.0


def test_labels_must_match_exactly_after_stripping() -> None:
    result = score(get_task("citation"), ["[1]", " [2] ", "[1].", "[1]"], ["[1]", "[2]", "[1]", "[2]"])
    assert result.value == 0.5
    # [1]: 1 hit, 2 said, 2 true; [2]: 1 hit, 1 said, 2 true
    assert result.more["macro-F1"] == pytest.approx((2 / 4 + 2 / 3) / 2)


def test_macro_f1_is_over_the_fixed_labels() -> None:
    # scikit-learn 1.9.1: f1_score(labels=range(4), average="macro", zero_division=0), an unknown answer being -1
    assert macro_f1(["a", "b", "c", "d"], ["a", "b", "a", "zzz", "a", "a"], ["a", "b", "c", "a", "b", "a"]) == pytest.approx(0.30952380952)


@pytest.mark.parametrize(
    ("answer", "gold", "value"), [("4", 4, 4.0), ("4.5", 4, 4.5), ("bad", 2, 5.0), ("", 4, 1.0), ("nan", 3, 5.0), ("inf", 5, 1.0)]
)
def test_unparsable_ratings_count_as_the_farther_end(answer: str, gold: float, value: float) -> None:
    assert parse_rating(answer, gold) == value


def test_ratings() -> None:
    # scikit-learn 1.9.1 gives the same for (5, 2, 4) against (4, 2, 1): MAE 1.3333, RMSE 1.8257
    result = score(get_task("rating"), ["4", "2", "great"], ["5", "2", "4"])
    assert result.metric == "MAE"
    assert result.lower_is_better
    assert result.value == pytest.approx((1 + 0 + 3) / 3)
    assert result.more["RMSE"] == pytest.approx(math.sqrt(10 / 3))
    assert result.more["accuracy"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("answers", "golds"), [([], []), (["1"], ["1", "2"])])
def test_every_record_needs_an_answer(answers: list[str], golds: list[str]) -> None:
    with pytest.raises(DataError, match=f"{len(answers)} answers cannot be scored against {len(golds)} records of rating"):
        score(get_task("rating"), answers, golds)
