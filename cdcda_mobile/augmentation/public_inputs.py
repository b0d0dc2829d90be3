"""Inputs of others, for the strategy that lets the teacher answer them in the user's voice: read, and chosen to be like the user's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cdcda_export.errors import DataError, FileError
from cdcda_mobile.augmentation.textual import normalized
from cdcda_mobile.bm25 import Bm25
from cdcda_mobile.history import Record
from cdcda_mobile.sources.records import as_text
from cdcda_mobile.tasks import get_task


def read_inputs(path: Path) -> dict[str, list[str]]:
    """Return inputs by task from JSON lines ``{"task", "input"}``, each once, in the order of the file.

    Raises:
        FileError: the file cannot be read.
        DataError: a line is no such object.
        ConfigError: there is no such task.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # nothing else ends a line of JSON
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}; see augment.inputs.") from error
    found: dict[str, dict[str, None]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            task, text = as_text(row["task"], "task"), as_text(row["input"], "input")
        except (ValueError, KeyError, TypeError):
            raise DataError(f'{path}:{number} is no JSON object with texts as "task" and "input"; see augment.inputs.') from None
        found.setdefault(get_task(task).name, {})[text] = None
    return {task: list(texts) for task, texts in found.items()}


class NearestInputs:
    """The inputs in the order in which they are answered: in turn for each of the user's records the one most like it, none twice.

    What the teacher says of another world teaches nothing of the user's: the inputs are to be such as this user gets.

    Args:
        texts: of one task.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts, self._given = list(texts), list[int]()
        self._index: Bm25 | None = None

    def __bool__(self) -> bool:
        return bool(self._texts)

    def at(self, turn: int, record_of: Callable[[int], Record]) -> str:
        """Return the input of a turn, from 0; after the last one they begin again.

        Args:
            turn: the number.
            record_of: the record of each turn.
        """
        if self._index is None:
            self._index = Bm25([normalized(text) for text in self._texts])
        while len(self._given) <= turn:
            number = len(self._given)
            record = record_of(number)
            scores = self._index.scores(normalized(record.input or record.output))
            scores[self._given[number - number % len(self._texts) :]] = -np.inf
            self._given.append(int(np.argmax(scores)))
        return self._texts[self._given[turn]]
