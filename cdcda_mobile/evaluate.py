"""How well answers match the user's own: LaMP's metrics, by LaMP's rules (its ``eval/evaluation.py``).

Answers are stripped and must equal a label exactly; an unparsable rating counts as the farther end of the scale; ROUGE without stemming.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cdcda_export.errors import MissingDependency
from cdcda_export.progress import Progress
from cdcda_export.verify import Probe, Runtime
from cdcda_mobile.history import Record
from cdcda_mobile.tasks import Task, get_task


@dataclass(frozen=True)
class Score:
    """One task's result: the main metric and the others; ``lower_is_better`` for errors."""

    metric: str
    value: float
    more: dict[str, float]
    lower_is_better: bool = False


def score(task: Task, answers: Sequence[str], golds: Sequence[str]) -> Score:
    """Score answers to one task against the user's own.

    Raises:
        MissingDependency: ROUGE needs ``rouge-score``.
    """
    scorers = {"text": _rouge, "label": _accuracy, "rating": _ratings}
    return scorers[task.metric](task, [a.strip() for a in answers], [g.strip() for g in golds])


def _rouge(task: Task, answers: list[str], golds: list[str]) -> Score:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingDependency("rouge-score", "train") from error
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    scores = [scorer.score(gold, answer) for answer, gold in zip(answers, golds, strict=True)]
    means = {kind: sum(s[kind].fmeasure for s in scores) / len(scores) for kind in ("rouge1", "rougeL")}
    return Score("ROUGE-L", means["rougeL"], {"ROUGE-1": means["rouge1"]})


def _accuracy(task: Task, answers: list[str], golds: list[str]) -> Score:
    right = sum(a == g for a, g in zip(answers, golds, strict=True)) / len(golds)
    return Score("accuracy", right, {"macro-F1": _macro_f1(task.labels, answers, golds)})


def _macro_f1(labels: Sequence[str], answers: list[str], golds: list[str]) -> float:
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


def _ratings(task: Task, answers: list[str], golds: list[str]) -> Score:
    errors = [parse_rating(a, float(g)) - float(g) for a, g in zip(answers, golds, strict=True)]
    mae = sum(map(abs, errors)) / len(errors)
    rmse = math.sqrt(sum(e * e for e in errors) / len(errors))
    right = sum(a == g for a, g in zip(answers, golds, strict=True)) / len(golds)
    return Score("MAE", mae, {"RMSE": rmse, "accuracy": right}, lower_is_better=True)


def answer_all(runtime: Runtime, probes: Sequence[Probe], max_tokens: int, progress: Progress, label: str) -> list[str]:
    """Return the greedy answer to every probe's prompt."""
    progress.start(label, len(probes), "prompts")
    answers = []
    for probe in probes:
        answers.append(runtime.decode(runtime.greedy(list(probe.prompt), max_tokens)).strip())
        progress.advance()
    progress.done()
    return answers


def task_rows(
    records: Sequence[Record],
    probes: Sequence[Probe],
    base_nll: Sequence[float],
    personal_nll: Sequence[float],
    base_answers: Sequence[str],
    personal_answers: Sequence[str],
) -> list[dict[str, Any]]:
    """Return one row per task: n, NLL per token and LaMP metric of base and personal model.

    Args:
        records: the test records.
        probes: the same, tokenized.
        base_nll: summed NLL of each record's answer under the base, in nats.
        personal_nll: likewise under the artifact.
        base_answers: greedy answers of the base.
        personal_answers: greedy answers of the artifact.
    """
    rows = []
    for name in dict.fromkeys(record.task for record in records):
        at = [i for i, record in enumerate(records) if record.task == name]
        golds = [records[i].output for i in at]
        tokens = sum(len(probes[i].answer) for i in at)
        base = score(get_task(name), [base_answers[i] for i in at], golds)
        personal = score(get_task(name), [personal_answers[i] for i in at], golds)
        rows.append(
            {
                "task": name,
                "n": len(at),
                "tokens": tokens,
                "nll_base": sum(base_nll[i] for i in at) / tokens,
                "nll_personal": sum(personal_nll[i] for i in at) / tokens,
                "metric": base.metric,
                "lower_is_better": base.lower_is_better,
                "base": base.value,
                "personal": personal.value,
                "more": {key: [base.more[key], personal.more[key]] for key in base.more},
            }
        )
    return rows
