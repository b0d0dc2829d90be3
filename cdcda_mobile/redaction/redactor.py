"""A user's values become placeholders before a text leaves the machine, and come back in what returns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from cdcda_mobile.history import Record
from cdcda_mobile.redaction.accounts import accounts
from cdcda_mobile.redaction.addresses import addresses
from cdcda_mobile.redaction.contacts import contacts
from cdcda_mobile.redaction.credentials import credentials
from cdcda_mobile.redaction.names import NameFinder, capitalised, mailbox_names, parts, plain_names
from cdcda_mobile.redaction.spans import KINDS, Span, merged
from cdcda_mobile.tasks import get_task

_KIND = "|".join(KINDS)
# As we write them and as teachers change them: [NAME_1], [name 1], \[NAME\_1\], NAME_1.
_PLACEHOLDER = re.compile(
    rf"\\?\[\s?(?P<kind>(?i:{_KIND}))(?:\\?_|\s|-)?(?P<number>\d{{1,6}})\s?\\?\]"
    rf"|(?<![\w\[])(?P<bare>{_KIND})_(?P<n>\d{{1,6}})(?![\w\]])"
)
# What a teacher invents: [NAME], [COMPANY_2], [Your Name].
_INVENTED = re.compile(
    rf"\[(?:(?i:{_KIND})|[A-Z][A-Z_ ]*_\d+|(?:Your|My|First|Last|Full|Insert|Recipient|Sender|Company|Phone|Email)[A-Za-z' ]*)\]"
)
_SHORTEST_MENTION = 4
_SHORTEST_NUMBER = 6  # a PIN is hidden where it is called one, not wherever its four digits stand


class Redactor:
    """Hides what its finders know, and knows each value by one placeholder.

    The placeholders are a function of the records in their order. The table of values lives in this object alone: it is not written,
    logged or shown, and can be made again from the records.

    Args:
        records: of one user; what is found in any of them is hidden in all of them, and in every other text.
        names: finds names of persons beyond the plain finder.
    """

    def __init__(self, records: Iterable[Record], names: NameFinder | None = None) -> None:
        self._names = names
        self._placeholders: dict[str, str] = {}
        self._values: dict[str, str] = {}
        self._given = Counter[str]()
        self._mentions: re.Pattern[str] | None = None
        self._folded: re.Pattern[str] | None = None
        self._kinds: dict[str, str] = {}
        self._lower: dict[str, str] = {}
        texts = [text for record in records for text in _free_texts(record)]
        self._own = frozenset(match[0] for text in texts for match in _INVENTED.finditer(text))
        self._found = dict(zip(texts, self._detected(texts), strict=True))
        self._learn(texts)
        for text in texts:
            self.redact(text)

    @property
    def finds_names(self) -> bool:
        """Say whether more than the plain rules finds names."""
        return self._names is not None

    @property
    def label(self) -> str:
        """Say what finds names."""
        return self._names.label if self._names else "plain rules"

    @property
    def counts(self) -> dict[str, int]:
        """Return how many different values of each kind are hidden."""
        return {kind: self._given[kind] for kind in KINDS if self._given[kind]}

    def redact(self, text: str) -> str:
        """Return the text with placeholders for what must not leave the machine."""
        pieces, end = [], 0
        for span in self._spans(text):
            pieces += [text[end : span.start], self._placeholder(text[span.start : span.end], span.kind)]
            end = span.end
        return "".join(pieces) + text[end:]

    def restore(self, text: str) -> str:
        """Return the text with the user's values for placeholders; those that stand for nothing stay."""
        return _PLACEHOLDER.sub(lambda match: self._values.get(_canonical(match), match[0]), text)

    def unknown(self, text: str) -> list[str]:
        """Return the placeholders in an answer that stand for nothing."""
        strange = [match[0] for match in _PLACEHOLDER.finditer(text) if _canonical(match) not in self._values]
        return strange + [match[0] for match in _INVENTED.finditer(text) if match[0] not in (*self._own, *self._values, *strange)]

    def strange(self, text: str, shown: str) -> list[str]:
        """Return the placeholders in an answer that stand for nothing, or for something that the request did not show."""
        there = {_canonical(match) for match in _PLACEHOLDER.finditer(shown)}
        return self.unknown(text) + [match[0] for match in _PLACEHOLDER.finditer(text) if _canonical(match) not in there]

    def redact_record(self, record: Record) -> Record:
        """Return a record as the teacher may see it; labels and scores stay as they are."""
        output = record.output if get_task(record.task).labels else self.redact(record.output)
        return replace(record, input=self.redact(record.input), output=output)

    def restore_record(self, record: Record) -> Record:
        """Return what :meth:`redact_record` was given."""
        return replace(record, input=self.restore(record.input), output=self.restore(record.output))

    # Finding.

    def _detected(self, texts: Sequence[str]) -> list[list[Span]]:
        by_library = self._names.find(texts) if self._names else [[] for _ in texts]
        return [[*_plain(text), *spans] for text, spans in zip(texts, by_library, strict=True)]

    def _learn(self, texts: Sequence[str]) -> None:
        """Collect the values that are hidden wherever they stand."""
        everything = "\n".join(texts)
        for text, spans in self._found.items():
            for span in merged(spans):
                value = text[span.start : span.end]
                if _distinctive(value, span.kind):
                    self._kinds.setdefault(value, span.kind)
                for part in parts(value) if span.kind == "NAME" else ():
                    self._kinds.setdefault(part, "NAME")
            for name in mailbox_names(text):
                if name not in self._kinds and capitalised(everything, name):
                    self._kinds[name] = "NAME"
        if self._kinds:
            known = "|".join(re.escape(value) for value in sorted(self._kinds, key=lambda v: (-len(v), v)))
            self._mentions = re.compile(rf"(?<!\w)(?:{known})(?!\w)")
            self._folded = re.compile(self._mentions.pattern, re.IGNORECASE)
        self._lower = {value.casefold(): kind for value, kind in self._kinds.items()}

    def _spans(self, text: str) -> list[Span]:
        spans = self._found.get(text)
        if spans is None:
            spans = self._detected([text])[0]
        return merged([*spans, *self._mentioned(text), *(Span(*m.span(), "LITERAL") for m in _PLACEHOLDER.finditer(text))])

    def _mentioned(self, text: str) -> Iterator[Span]:
        # Who writes without capitals writes names so too.
        pattern = self._folded if text == text.lower() else self._mentions
        for match in pattern.finditer(text) if pattern else ():
            yield Span(*match.span(), self._kinds.get(match[0]) or self._lower.get(match[0].casefold(), "NAME"))

    def _placeholder(self, value: str, kind: str) -> str:
        known = self._placeholders.get(value)
        if known is None:
            self._given[kind] += 1
            known = f"[{kind}_{self._given[kind]}]"
            self._placeholders[value], self._values[known] = known, value
        return known


def _plain(text: str) -> Iterator[Span]:
    for find in (accounts, credentials, contacts, addresses, plain_names):
        yield from find(text)


def _distinctive(value: str, kind: str) -> bool:
    if kind == "NAME":
        return len(value) >= 3
    if value.isdecimal():
        return len(value) >= _SHORTEST_NUMBER
    return len(value) >= _SHORTEST_MENTION and (not value.isalpha() or len(value) >= _SHORTEST_NUMBER)


def _free_texts(record: Record) -> tuple[str, ...]:
    return (record.input,) if get_task(record.task).labels else (record.input, record.output)


def _canonical(match: re.Match[str]) -> str:
    return f"[{(match['kind'] or match['bare']).upper()}_{int(match['number'] or match['n'])}]"
