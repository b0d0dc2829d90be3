"""The sample users: real enough to test a personal model on."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from datetime import date
from importlib import resources

import pytest

from cdcda_mobile.config import HistoryConfig
from cdcda_mobile.history import list_users
from cdcda_mobile.tasks import TASKS

USERS = ("17", "42", "63", "88")
_NAMED = 5
_SMOOTHING = 0.3


def _rows(user: str) -> list[dict[str, str]]:
    text = resources.files("cdcda_mobile").joinpath("samples", f"{user}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def test_the_users_are_these() -> None:
    assert tuple(sorted(list_users(HistoryConfig()))) == USERS


@pytest.mark.parametrize("user", USERS)
def test_every_user_has_enough_dated_records_over_two_tasks(user: str) -> None:
    rows = _rows(user)
    assert len(rows) >= 80
    dates = [date.fromisoformat(row["date"]) for row in rows]
    assert dates == sorted(set(dates))
    counts = Counter(row["task"] for row in rows)
    assert {"headline", "rating"} <= set(counts)
    assert min(counts.values()) >= 25
    for row in rows:
        labels = TASKS[row["task"]].labels
        assert not labels or row["output"] in labels
        assert len(_words(row["input"])) >= 7


def test_no_two_records_share_five_words_in_a_row() -> None:
    seen: dict[tuple[str, ...], str] = {}
    for user in USERS:
        for row in _rows(user):
            mine = set()
            for text in (row["input"], row["output"]):
                words = _words(text)
                mine |= {tuple(words[i : i + _NAMED]) for i in range(len(words) - _NAMED + 1)}
            for gram in mine:
                assert gram not in seen, f"{seen.get(gram)} and {row['id']} share {' '.join(gram)!r}"
                seen[gram] = row["id"]


def _grams(text: str) -> Counter[str]:
    padded = f"^{text}$"
    return Counter(padded[i : i + n] for n in (1, 2, 3) for i in range(len(padded) - n + 1))


class _NaiveBayes:
    """A character n-gram classifier (orders 1 to 3, additive smoothing)."""

    def __init__(self, texts: dict[str, list[str]]) -> None:
        self.counts = {user: sum((_grams(t) for t in mine), Counter()) for user, mine in texts.items()}
        self.sizes = {user: sum(c.values()) for user, c in self.counts.items()}
        self.vocabulary = len(set().union(*self.counts.values()))

    def name(self, text: str) -> str:
        grams = _grams(text)

        def likelihood(user: str) -> float:
            return sum(
                n * math.log((self.counts[user][g] + _SMOOTHING) / (self.sizes[user] + _SMOOTHING * self.vocabulary))
                for g, n in grams.items()
            )

        return max(self.counts, key=likelihood)


@pytest.mark.parametrize("what", ["records", "headlines"])
def test_a_reader_can_tell_the_author_blind(what: str) -> None:
    """Trained on one half, named on the other: whole records, and headlines alone, at least 9 times in 10."""
    halves: tuple[dict[str, list[str]], dict[str, list[str]]] = ({}, {})
    for user in USERS:
        rows = _rows(user)
        whole = [f"{row['input']}\n{row['output']}" for row in rows]
        texts = whole if what == "records" else [row["output"] for row in rows if row["task"] == "headline"]
        halves[0][user], halves[1][user] = texts[::2], texts[1::2]
    classifier = _NaiveBayes(halves[0])
    right = sum(classifier.name(text) == user for user, texts in halves[1].items() for text in texts)
    assert right / sum(map(len, halves[1].values())) >= 0.9
