"""A loaded model answers the test prompts, and its answers become the rows of the card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cdcda_export.progress import Progress
from cdcda_export.verify import Probe, Runtime
from cdcda_mobile.evaluation.metrics import score
from cdcda_mobile.history import Record
from cdcda_mobile.tasks import get_task


def answer_all(runtime: Runtime, probes: Sequence[Probe], max_tokens: int, progress: Progress, label: str) -> list[str]:
    """Return the greedy answer to every probe's prompt, in order."""
    progress.start(label, len(probes), "prompts")
    answers = runtime.greedy_many([list(probe.prompt) for probe in probes], max_tokens, progress.advance)
    progress.done()
    return [runtime.decode(ids).strip() for ids in answers]


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
