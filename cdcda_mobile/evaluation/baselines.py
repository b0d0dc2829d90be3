"""The rivals that need no training: what a personal model must beat to be worth its file.

Retrieval as in LaMP (Salemi et al. 2023): BM25 over the user's training records, the nearest of them written before the question, those
of the question's own task as pairs, those of a task that only tells of the person (the papers of LaMP-1, the tweets of LaMP-7) as texts
that the person wrote. The rules answer without any model: a label or an opening of the user's past.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from cdcda_export.errors import DataError, ExportError
from cdcda_export.verify import Probe, make_probe
from cdcda_mobile.bm25 import Bm25
from cdcda_mobile.dataset import Encoding
from cdcda_mobile.history import Record
from cdcda_mobile.tasks import Metric, Task, get_task

# How a record of the past is told to the model.
_TOLD: dict[Metric, Callable[[Task, Record], str]] = {
    "label": lambda task, record: f'the {task.output} for the {task.input}: "{record.input}" is "{record.output}"',
    "rating": lambda task, record: f'{record.output} is the {task.output} for "{record.input}"',
    "text": lambda task, record: f'"{record.output}" is the {task.output} for "{record.input}"',
}


class Past:
    """A user's training records, searched for what tells of the person where a question is asked.

    Args:
        train: the records.
    """

    def __init__(self, train: Sequence[Record]) -> None:
        self._ordered = sorted(train, key=lambda record: (record.date, record.id))
        self._indices: dict[tuple[str, ...], tuple[list[Record], Bm25]] = {}

    def records(self, task: str) -> list[Record]:
        """Return the records of a task by date.

        Raises:
            DataError: there are none.
        """
        found = [record for record in self._ordered if record.task == task]
        if not found:
            raise DataError(f"The user has no training record of the task {task}, so no rule can be read off the past.")
        return found

    def nearest(self, record: Record, count: int) -> list[Record]:
        """Return the records of the same task, or of one that tells of the person, that are most like a question, nearest first."""
        task = get_task(record.task)
        if task.told_by not in self._indices:
            mine = [r for r in self._ordered if r.task in task.told_by]
            self._indices[task.told_by] = mine, Bm25([_searched(r) for r in mine])
        records, index = self._indices[task.told_by]
        return [records[at] for at in index.nearest(task.query(record.input), count)]


def _searched(record: Record) -> str:
    """Return what is searched of a record: a label or a score says nothing of the text, and the beginning of a text stands in it."""
    task = get_task(record.task)
    if task.teaches:
        return record.output
    return f"{record.output} {record.input}" if task.metric == "text" else record.input


def retrieval_turn(record: Record, shown: Sequence[Record]) -> str:
    """Return the user's turn that asks a question after showing records of the past."""
    task = get_task(record.task)
    told = [_TOLD[task.metric](task, past) for past in shown if past.task == record.task]
    written = [f'"{past.output}"' for past in shown if past.task != record.task]
    if written:
        told.append(f"{', and '.join(written)} {'are' if len(written) > 1 else 'is'} written by this person")
    return f"{', and '.join(told)}. {task.prompt(record.input)}" if told else task.prompt(record.input)


def retrieval_probes(
    train: Sequence[Record], test: Sequence[Record], encoding: Encoding, count: int, max_tokens: int, answer_tokens: int
) -> list[Probe]:
    """Return the test records as probes whose prompts show the nearest training records; ``answer_all`` turns them into predictions.

    What does not fit is left out, the farthest first; a question too long for any record is asked alone.

    Args:
        train: the user's training records.
        test: the questions.
        encoding: of the base.
        count: how many records are shown at most.
        max_tokens: of prompt and answer together.
        answer_tokens: kept free for the answer, or as many as the real one has.

    Raises:
        ExportError: a question alone does not fit.
    """
    past, probes = Past(train), []
    for record in test:
        shown = past.nearest(record, count)
        free = max(answer_tokens, len(encoding.tokenizer.encode(record.output)) + 1)  # the whole answer is scored, as in every other arm
        while shown and _length(encoding, retrieval_turn(record, shown)) + free > max_tokens:
            shown.pop()
        try:
            turn = retrieval_turn(record, shown)
            probes.append(make_probe(encoding.template, encoding.tokenizer, encoding.eos, turn, record.output, max_tokens))
        except ExportError as error:
            raise ExportError(f"Record {record.id} ({record.date}): {error}") from error
    return probes


def _length(encoding: Encoding, turn: str) -> int:
    return len(encoding.tokenizer.encode(encoding.template.prompt(turn)))


def majority_answers(train: Sequence[Record], test: Sequence[Record]) -> list[str]:
    """Return the user's most frequent output of each question's task (a label, a score); of equals the newest.

    Raises:
        DataError: a task has no training record.
    """
    past = Past(train)
    return [_most_common([r.output for r in past.records(record.task)]) for record in test]


def opening_answers(train: Sequence[Record], test: Sequence[Record]) -> list[str]:
    """Return the user's most frequent opening (``opening_of``) of each question's task, alone; of equals the newest.

    It is what a repository's convention gives away about a commit subject without any knowledge of the change.

    Raises:
        DataError: a task has no training record.
    """
    past = Past(train)
    return [_most_common([opening_of(r.output) for r in past.records(record.task)]) for record in test]


def opening_of(output: str) -> str:
    """Return the opening of a text: up to the first colon that is followed by a space (``fix: ``), else the first word."""
    head, colon, _ = output.partition(": ")
    return head + colon if colon else (output.split() or [""])[0]


def _most_common(outputs: Sequence[str]) -> str:
    newest = {output: at for at, output in enumerate(outputs)}
    counts = Counter(outputs)
    return max(counts, key=lambda output: (counts[output], newest[output]))
