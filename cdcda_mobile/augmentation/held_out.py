"""What must never reach a prompt: the texts of validation and test records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cdcda_export.errors import DataError
from cdcda_mobile.augmentation.textual import normalized, wide, words
from cdcda_mobile.history import Record

_LEAK_WORDS = 5  # shorter texts, such as "4" or "fix typo", recur by chance


class HeldOut:
    """Recognises held-out texts, whatever their case, punctuation and spacing.

    Args:
        records: validation and test records.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        texts = {text for record in records for text in (record.input, record.output) if words(text) >= _LEAK_WORDS}
        secrets = {normalized(text) for text in texts}
        # A script without spaces has no borders that a text would have to begin and end at.
        self._secrets = tuple(sorted(text if wide(text) else f" {text} " for text in secrets))
        self._exact = {(record.task, normalized(record.input)) for record in records}

    def shown_in(self, text: str) -> bool:
        """Say whether a held-out text stands in a text."""
        framed = f" {normalized(text)} "
        return any(secret in framed for secret in self._secrets)

    def stands_in(self, task: str, text: str) -> bool:
        """Say whether a text of a task is a held-out input, or holds a held-out text."""
        return (task, normalized(text)) in self._exact or self.shown_in(text)

    def repeated_by(self, record: Record) -> bool:
        """Say whether a training record repeats a held-out text."""
        return self.stands_in(record.task, record.input) or self.shown_in(record.output)

    def assert_not_shown(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Hold the rule that no held-out text is ever shown to the teacher.

        Raises:
            DataError: one stands in the messages.
        """
        if any(self.shown_in(message["content"]) for message in messages):
            raise DataError("A text of a validation or test record stands in a request to the teacher, so nothing was sent; use --keep 0.")
