"""Where in a text something stands that must not leave the machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

# What a placeholder may be called. LITERAL is a text of the user's that looks like a placeholder.
KINDS = ("NAME", "EMAIL", "PHONE", "ADDRESS", "BANK", "CARD", "ACCOUNT", "SECRET", "IP", "MAC", "URL", "HANDLE", "WALLET", "LITERAL")

# Spaces and dashes as people and their word processors type them, for character classes.
SPACES = " \u00a0\u2009\u202f"
DASHES = "\\-\u2010\u2011\u2012\u2013"


@dataclass(frozen=True)
class Span:
    """Characters ``start`` to ``end`` (exclusive) of a text are of this kind, one of :data:`KINDS`."""

    start: int
    end: int
    kind: str


def found(
    pattern: re.Pattern[str], text: str, kind: str, group: int | str = 0, accept: Callable[[re.Match[str]], bool] | None = None
) -> Iterator[Span]:
    """Yield the places of a pattern's group that ``accept`` does not refuse."""
    for match in pattern.finditer(text):
        if match.start(group) >= 0 and (accept is None or accept(match)):
            yield Span(match.start(group), match.end(group), kind)


def digits(text: str) -> str:
    """Return the digits of a text."""
    return "".join(char for char in text if char.isdecimal())


def merged(spans: Iterable[Span]) -> list[Span]:
    """Unite spans that overlap, in the order of the text; the longest gives its kind, so that no part of any of them stays."""
    united: list[Span] = []
    longest = 0
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        last = united[-1] if united else None
        if last is None or span.start >= last.end:
            united.append(span)
            longest = span.end - span.start
            continue
        length = span.end - span.start
        kind = span.kind if length > longest else last.kind
        longest = max(longest, length)
        united[-1] = Span(last.start, max(last.end, span.end), kind)
    return united
