"""What stands between the augment stage and the teacher when ``--redact`` is given; without it nothing is changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from cdcda_export.progress import Progress
from cdcda_mobile.augmentation.prompts import Ask
from cdcda_mobile.augmentation.select import Judge, Verdict, first_object
from cdcda_mobile.config import AugmentConfig
from cdcda_mobile.history import Record
from cdcda_mobile.redaction.library import name_finder
from cdcda_mobile.redaction.redactor import Redactor


class Veil:
    """Hides a user's values on the way to the teacher and restores them on the way back.

    Args:
        train: the user's training records; the placeholders follow from them.
        config: ``redact`` and ``redact_names``.
        progress: told how many values of each kind are hidden, and what found the names; never a value.

    Raises:
        MissingDependency: a spaCy pipeline was asked for and spaCy is not installed.
        ConfigError: there is no such pipeline here, or it finds no names.
    """

    def __init__(self, train: Sequence[Record], config: AugmentConfig, progress: Progress) -> None:
        self.redactor = Redactor(train, name_finder(config.redact_names)) if config.redact else None
        self.counts = self.redactor.counts if self.redactor else {}
        if self.redactor:
            found = ", ".join(f"{count} {kind}" for kind, count in self.counts.items()) or "nothing was found"
            progress.say(f"Hidden from the teacher: {found}; names found by {self.redactor.label} (docs/privacy.md).")
            if not self.redactor.finds_names:
                progress.warn("Plain rules miss many names of persons; run `pip install 'cdcda-mobile[privacy]'` to find more.")

    def shown(self, records: Sequence[Record]) -> tuple[Record, ...]:
        """Return training records as the teacher may see them."""
        return tuple(self.redactor.redact_record(record) for record in records) if self.redactor else tuple(records)

    def text(self, text: str) -> str:
        """Return a text of somebody else's as the teacher may see it; what it shares with the user's records is hidden too."""
        return self.redactor.redact(text) if self.redactor else text

    def kept_out(self, records: Sequence[Record]) -> tuple[Record, ...]:
        """Return held-out records as they are and as they would look in a request, so that neither form is ever shown."""
        return (*records, *self.shown(records)) if self.redactor else tuple(records)

    def judge(self, judge: Judge) -> Judge:
        """Return a judge who sees the user's own values, in the request and in the answer, and no strange placeholder."""
        return _Unveiled(judge, self.redactor) if self.redactor else judge


class _Unveiled:
    def __init__(self, judge: Judge, redactor: Redactor) -> None:
        self._judge, self._redactor = judge, redactor

    def judge(self, ask: Ask, text: str) -> Verdict:
        value = first_object(text)
        if isinstance(value, dict):  # restored inside the strings: the values may hold quotes and line breaks
            sides = {name: side for name, side in value.items() if isinstance(side, str)}
            # Held-out values have placeholders too, so that they are recognised; only those that were shown may come back.
            shown = "\n".join(message["content"] for message in ask.request.messages)
            if any(self._redactor.strange(side, shown) for side in sides.values()):
                return Verdict(rule="placeholder", reason="a placeholder that stands for nothing")
            text = json.dumps({**value, **{name: self._redactor.restore(side) for name, side in sides.items()}}, ensure_ascii=False)
        examples = tuple(self._redactor.restore_record(record) for record in ask.examples)
        given, output = self._redactor.restore(ask.input), self._redactor.restore(ask.output)
        return self._judge.judge(replace(ask, examples=examples, input=given, output=output), text)
