"""Answers of a loaded model, and the rows of the card."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cdcda_export.progress import Silent
from cdcda_export.verify import Probe
from cdcda_mobile.evaluation.answers import answer_all, task_rows
from cdcda_mobile.history import Record


class Echo:
    """A runtime that answers with its prompt, reversed."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode()

    def logits(self, ids: list[int]) -> np.ndarray:
        return np.zeros((len(ids), 256), np.float32)

    def greedy(self, prompt: list[int], max_tokens: int) -> list[int]:
        return prompt[::-1][:max_tokens]

    def nll_many(self, probes: Sequence[Probe]) -> list[float]:
        return [float(len(probe.answer)) for probe in probes]

    def greedy_many(self, prompts: Sequence[list[int]], max_tokens: int, advance: Callable[[], object] = lambda: None) -> list[list[int]]:
        return [(advance(), self.greedy(prompt, max_tokens))[1] for prompt in prompts]


class Counted(Silent):
    """Progress that counts."""

    steps = 0

    def advance(self, n: int = 1, note: str = "") -> None:
        self.steps += n


def test_answers_are_in_order_stripped_and_counted() -> None:
    progress = Counted()
    probes = [Probe("", "", tuple(text.encode()), (1,)) for text in ("ab  ", "xyz")]
    assert answer_all(Echo(), probes, 3, progress, "asking") == ["b", "zyx"]
    assert progress.steps == 2


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
