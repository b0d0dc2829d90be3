"""How well answers match the user's own: LaMP's metrics, by LaMP's rules (its ``eval/evaluation.py``).

Answers are stripped and must equal a label exactly; an unparsable rating counts as the farther end of the scale; ROUGE without stemming.
LaMP lets a bootstrap estimate the mean of ROUGE; here it is the mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cdcda_export.errors import DataError, MissingDependency
from cdcda_mobile.tasks import Task


@dataclass(frozen=True)
class Score:
    """One task's result.

    Attributes:
        metric: the main metric's name.
        value: its value over all records.
        more: the other metrics.
        lower_is_better: the main metric is an error.
    """

    metric: str
    value: float
    more: dict[str, float]
    lower_is_better: bool = False


def score(task: Task, answers: Sequence[str], golds: Sequence[str]) -> Score:
    """Score answers to one task against the user's own.

    Raises:
        DataError: there is nothing to score, or not one answer for each record.
        MissingDependency: ROUGE needs ``rouge-score``.
    """
    if not golds or len(answers) != len(golds):
        raise DataError(f"{len(answers)} answers cannot be scored against {len(golds)} records of {task.name}; give one for each.")
    scorers = {"text": _rouge, "label": _accuracy, "rating": _ratings}
    return scorers[task.metric](task, [a.strip() for a in answers], [g.strip() for g in golds])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def rouge_scorer() -> Any:
    """Return the scorer of ROUGE-1 and ROUGE-L as LaMP sets it.

    Raises:
        MissingDependency: ``rouge-score`` is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingDependency("rouge-score", "train") from error
    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False)


def _rouge(_: Task, answers: list[str], golds: list[str]) -> Score:
    scorer = rouge_scorer()
    scores = [scorer.score(gold, answer) for answer, gold in zip(answers, golds, strict=True)]
    one, longest = (_mean([float(s[kind].fmeasure) for s in scores]) for kind in ("rouge1", "rougeL"))
    return Score("ROUGE-L", longest, {"ROUGE-1": one})


def _exact(answers: list[str], golds: list[str]) -> float:
    """Return the share of answers that are the gold."""
    return _mean([answer == gold for answer, gold in zip(answers, golds, strict=True)])


def _accuracy(task: Task, answers: list[str], golds: list[str]) -> Score:
    return Score("accuracy", _exact(answers, golds), {"macro-F1": macro_f1(task.labels, answers, golds)})


def macro_f1(labels: Sequence[str], answers: Sequence[str], golds: Sequence[str]) -> float:
    """Return the mean F1 over the fixed label list; a label that nobody used counts as 0, as in scikit-learn."""
    total = 0.0
    for label in labels:
        hits = sum(a == g == label for a, g in zip(answers, golds, strict=True))
        said, true = answers.count(label), golds.count(label)
        total += 2 * hits / (said + true) if said + true else 0.0
    return total / len(labels)


def parse_rating(answer: str, gold: float) -> float:
    """Return a rating, or the farther of 1 and 5 where there is none."""
    try:
        value = float(answer)
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return value
    return 1.0 if abs(1 - gold) > abs(5 - gold) else 5.0


def _ratings(_: Task, answers: list[str], golds: list[str]) -> Score:
    errors = [abs(parse_rating(a, float(g)) - float(g)) for a, g in zip(answers, golds, strict=True)]
    rmse = math.sqrt(_mean([error * error for error in errors]))
    more = {"RMSE": rmse, "accuracy": _exact(answers, golds)}
    return Score("MAE", _mean(errors), more, lower_is_better=True)
